"""Chat templates as data: what surrounds the questions and answers of a conversation (data/conversation.py fills in).

A template's items are spans of text, control tokens and marks. Which of their tokens are targets of the loss is part of
the item.
"""

import dataclasses
import enum


@dataclasses.dataclass(frozen=True)
class Text:
    """A span of text, and whether its tokens are targets of the loss."""

    text: str
    is_target: bool = False


@dataclasses.dataclass(frozen=True)
class Control:
    """A special token by its name, and whether it is a target of the loss."""

    token: str
    is_target: bool = False


class Mark(enum.Enum):
    """An item between spans of text."""

    IMAGE = "the slots of an image"
    END = "the end-of-sequence token, a target"
    NEWLINE = "a newline as a separate token, a target"


Item = Text | Control | Mark
SYSTEM_PLACEHOLDER = Text("(the conversation's own system text)")  # replaced by it


@dataclasses.dataclass(frozen=True)
class Chat:
    """The chat template of a family of language models.

    A conversation is ``start``, then for each round: ``before_question``, question, ``before_answer``, answer,
    ``after_answer``. Targets are the answers and the items of ``after_answer`` that are marked as such. A conversation
    with its own, non-empty system text has ``start_with_system`` instead of ``start`` and the first
    ``before_question``.
    """

    before_question: tuple[Item, ...]
    before_answer: tuple[Item, ...]
    after_answer: tuple[Item, ...]
    start_with_system: tuple[Item, ...]  # contains SYSTEM_PLACEHOLDER once
    start: tuple[Item, ...] = ()
    answer_space: str = ""  # before an answer; a target
    sign: str = ""  # text that shows this template in a tokenizer's own, if no control token does

    @property
    def items(self) -> tuple[Item, ...]:
        """The items of a conversation without a system text of its own."""
        return (*self.start, *self.before_question, *self.before_answer, *self.after_answer)

    @property
    def controls(self) -> frozenset[str]:
        """Names of the control tokens that a tokenizer needs."""
        return frozenset(item.token for item in (*self.items, *self.start_with_system) if isinstance(item, Control))
