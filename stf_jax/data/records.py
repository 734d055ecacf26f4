"""Records by index: what every source of training data gives, and what makes one unfit to train on.

A source is a random-access sequence (``len(source)``, ``source[index]``). Pictures are opened when they are asked for,
so that conversations can be measured without them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import PIL.Image

from stf_jax.config import UserError

IMAGE_MARK = "<image>"  # where a picture stands in a conversation's text
REASONS = {
    "malformed": "not in LLaVA's conversation format",
    "roles": "human and gpt do not alternate",
    "no_system": "a system text, for which the template has no place",
    "mark_without_picture": f"more {IMAGE_MARK} than pictures",
    "picture_without_mark": f"more pictures than {IMAGE_MARK}",
    "mark_in_answer": f"{IMAGE_MARK} in an answer",
    "empty_answer": "an answer without text, or none",
    "over_length": "longer than a row of tokens",
    "over_estimate": "longer than a row of tokens, as estimated without --tokenizer",
    "too_many_pictures": "more pictures than data.images_per_row",
    "outside": "the image path leaves the folder",
    "missing": "the image file does not exist",
    "corrupt": "the image file cannot be decoded",
    "truncated": "the image file is cut short",
    "too_large": "the image is of absurd size",
}  # why a row is dropped, or replaced in training


class BadRow(UserError):
    """A row that cannot be trained on; ``reason`` is one of :data:`REASONS`, ``image`` the file at fault, if one is."""

    def __init__(self, reason: str, sentence: str, image: str = ""):
        super().__init__(sentence)
        self.reason, self.image = reason, image


@dataclasses.dataclass(frozen=True)
class Turn:
    """One utterance: ``speaker`` is ``human`` or ``gpt``, as in LLaVA's files, or, of a first turn, ``system``."""

    speaker: str
    text: str


@dataclasses.dataclass(frozen=True)
class Record:
    """A conversation about no, one or several pictures; ``<image>`` stands in its text once for each.

    Calling one of ``pictures`` opens it; what cannot be opened raises :class:`BadRow`.
    """

    id: str
    pictures: tuple[Callable[[], PIL.Image.Image], ...]
    turns: tuple[Turn, ...]


def read_row(row: Any, name: str) -> tuple[str, list[str], tuple[Turn, ...]]:
    """Id, image paths and turns of a row of LLaVA's files: ``{id, image, conversations: [{from, value}, …]}``.

    ``image`` is a path, a list of such, or absent for a row of text.

    Raises:
      BadRow: the row is not of that form, or an answer is empty, or there is none; ``name`` says which row it is.
    """
    try:
        turns = tuple(Turn(turn["from"], turn["value"]) for turn in row["conversations"])
        images = row.get("image", [])
        images = [images] if isinstance(images, str) else images
        texts = [*images, *(text for turn in turns for text in _both(turn))]
        if not isinstance(images, list) or not all(isinstance(text, str) for text in texts):
            raise TypeError
        # LLaVA's own files always have an id; the place of a row that has none is its name.
        identity = name if row.get("id") is None else str(row["id"])
        "".join([identity, *texts]).encode()  # half a surrogate pair is no text
    except (KeyError, TypeError, AttributeError, UnicodeEncodeError):
        raise BadRow("malformed", f"{name[:1].upper()}{name[1:]} is not in LLaVA's conversation format.") from None
    answers = [turn.text for turn in turns if turn.speaker == "gpt"]
    if not answers or not all(answer.replace(IMAGE_MARK, "").strip() for answer in answers):
        raise BadRow("empty_answer", f"Record {identity!r} has an empty answer, or none.")
    return identity, images, turns


def _both(turn):
    return turn.speaker, turn.text
