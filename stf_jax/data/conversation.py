"""Conversations to token ids: the templates, which tokens are learned, and the slots of pictures.

A template turns a record into a list of items: spans of text, each learned or not, places of pictures, and ends of
utterances. :func:`encode` makes ids of them. What is learned follows from the spans themselves, so no second
tokenisation can disagree with the first (LLaVA's "tokenization mismatch" cannot happen).
"""

import dataclasses
import enum
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from stf_jax.config import UserError, nearest
from stf_jax.data.records import IMAGE_MARK, Record, Turn

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)  # Vicuna's, the prompt that its weights and LLaVA-1.5's were trained with


@dataclasses.dataclass(frozen=True)
class Text:
    """A span of text; whether the model learns to say it."""

    text: str
    learned: bool = False


class Mark(enum.Enum):
    """What stands between spans of text."""

    IMAGE = "a picture's slots"
    END = "the end-of-sequence token, learned"


Item = Text | Mark


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Token ids int32 [T], whether each is learned and whether it is an image slot, bool [T]."""

    tokens: np.ndarray
    learned: np.ndarray
    is_image: np.ndarray


def plain(turns: Sequence[Turn]) -> list[Item]:
    """LLaVA's stage-1 template: ``<image>`` caption newline, the caption and the newline learned.

    The instruction is dropped; without a caption after it, it makes a prompt. A record without a picture is a document:
    its turns as they stand, the model's learned.
    """
    images = sum(turn.text.count(IMAGE_MARK) for turn in turns)
    if not images:
        return [Text(turn.text, learned=turn.speaker == "gpt") for turn in turns]
    if len(turns) > 2 or any(turn.speaker != "gpt" for turn in turns[1:]):
        raise UserError("template 'plain' takes one instruction and one caption")
    return [Mark.IMAGE] * images + [Text(turn.text.strip() + "\n", learned=True) for turn in turns[1:]]


def v1(turns: Sequence[Turn]) -> list[Item]:
    """Vicuna's template, LLaVA's ``v1``: ``SYSTEM USER: … ASSISTANT: …</s>USER: …``; answers and ``</s>`` learned.

    A turn's pictures are moved to its front, each followed by a newline. A conversation that ends with a question
    makes a prompt.
    """
    if turns and turns[0].speaker != "human":
        turns = turns[1:]
    items: list[Item] = [Text(SYSTEM + " ")]
    for i, turn in enumerate(turns):
        if turn.speaker != ("human", "gpt")[i % 2]:
            raise UserError(f"turn {i + 1} is by {turn.speaker!r}, but 'human' and 'gpt' must alternate")
        images = turn.text.count(IMAGE_MARK)
        text = turn.text.replace(IMAGE_MARK, "").strip()
        if turn.speaker == "human":
            items += [Text("USER: "), *[Mark.IMAGE, Text("\n")] * images, Text(f"{text} ASSISTANT:")]
        elif images:
            raise UserError(f"turn {i + 1} is an answer that holds {IMAGE_MARK}")
        else:
            items += [Text(f" {text}", learned=True), Mark.END]
    return items


TEMPLATES: dict[str, Callable[[Sequence[Turn]], list[Item]]] = {"plain": plain, "v1": v1}


def template_items(template: str, record: Record) -> list[Item]:
    """The record's items in that template.

    Raises:
      UserError: an unknown template; a record that does not fit it, or whose pictures and ``<image>`` marks differ in
        number, named by its id.
    """
    if template not in TEMPLATES:
        raise UserError(f"Unknown data.template={template!r}; {nearest(template, TEMPLATES)}")
    try:
        items = TEMPLATES[template](record.turns)
    except UserError as error:
        raise UserError(f"Record {record.id!r}: {error}.") from None
    marks = sum(item is Mark.IMAGE for item in items)
    if marks != len(record.pictures):
        raise UserError(f"Record {record.id!r} has {len(record.pictures)} pictures but {marks} {IMAGE_MARK} marks.")
    return items


def encode(items: Sequence[Item], tokenizer: PreTrainedTokenizerFast, slots: int) -> Encoded:
    """Token ids of a conversation, begun as the tokenizer begins a text (with its BOS, where it has one).

    Text between two marks is tokenised in one piece, as LLaVA does between pictures. A token is learned if its last
    character lies in a learned span; each picture becomes ``slots`` image slots, whose id is the end of sequence's
    (they are never looked up).
    """
    end = tokenizer.eos_token_id
    begin = [token for token in tokenizer("").input_ids if token != end]
    parts = [_Part(begin, [False] * len(begin), is_image=False)]
    pieces = [list(group) for is_text, group in itertools.groupby(items, lambda i: isinstance(i, Text)) if is_text]
    texts = ["".join(span.text for span in piece) for piece in pieces]
    coded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True) if texts else {}
    spoken = iter(zip(pieces, coded.get("input_ids", []), coded.get("offset_mapping", []), strict=True))
    for is_text, group in itertools.groupby(items, lambda item: isinstance(item, Text)):
        if is_text:
            piece, tokens, offsets = next(spoken)
            learns = np.repeat([span.learned for span in piece], [len(span.text) for span in piece])
            # A token that covers no character (a lone prefix mark of SentencePiece) belongs to what follows it.
            parts.append(_Part(tokens, [learns[max(stop - 1, start)] for start, stop in offsets], is_image=False))
            continue
        for mark in group:
            count = slots if mark is Mark.IMAGE else 1
            parts.append(_Part([end] * count, [mark is Mark.END] * count, is_image=mark is Mark.IMAGE))
    return Encoded(
        tokens=np.concatenate([np.array(part.tokens, np.int32) for part in parts]),
        learned=np.concatenate([np.array(part.learned, bool) for part in parts]),
        is_image=np.concatenate([np.full(len(part.tokens), part.is_image) for part in parts]),
    )


class _Part(NamedTuple):
    tokens: list[int]
    learned: list[bool]
    is_image: bool
