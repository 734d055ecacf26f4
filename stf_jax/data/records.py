"""Records by index: what every source of training data gives, and what makes one unfit to train on.

A source is a random-access sequence (``len(source)``, ``source[index]``). Images are opened when they are asked for,
so that conversations can be measured without them.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import PIL.Image

from stf_jax.config import UserError

IMAGE_MARK = "<image>"  # where an image stands in a conversation's text
REASONS = {
    "no_object": "a row that is no JSON object",
    "no_turns": "no list of turns under conversations or messages",
    "no_turn": "a turn that is not {from, value} or {role, content}, of texts",
    "speaker": "a turn by someone other than human, gpt, user, assistant and system",
    "image_value": "an image that is neither a path nor a list of paths",
    "unread": "images, other media or texts under keys that are not read",
    "token_without_row": "a token for which the model's embedding has no row",
    "no_vision": "an image, asked of a model that answers text alone",
    "no_text": "bytes that are not UTF-8, or half a character",
    "roles": "human and gpt do not alternate",
    "no_system": "a system text, for which the template has no place",
    "mark_without_image": f"more {IMAGE_MARK} than images",
    "image_without_mark": f"more images than {IMAGE_MARK}",
    "mark_in_answer": f"{IMAGE_MARK} in an answer or a system text",
    "empty_answer": "an answer without text",
    "no_answer": "no answer to learn",
    "over_length": "longer than a row of tokens",
    "over_estimate": "longer than a row of tokens, as estimated without --tokenizer",
    "too_many_images": "more images than data.images_per_row",
    "url": "the image is a URL or a data: URI, not a path",
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
    """A conversation about no, one or several images; ``<image>`` stands in its text once for each.

    Calling one of ``images`` opens it; what cannot be opened raises :class:`BadRow`.
    """

    id: str
    images: tuple[Callable[[], PIL.Image.Image], ...]
    turns: tuple[Turn, ...]
    unread: tuple[str, ...] = ()  # what of its row was passed over (data/rows.py)
    document: bool = False  # its turns are read as they stand, whatever the template
    labels: Callable[[], np.ndarray] | None = None  # of its image's cells, uint8 [S, S, 3], where it was drawn


def format_reasons(counts: Mapping[str, int]) -> str:
    """Why so many rows cannot be used, in a line: what is wrong, and how often."""
    return ", ".join(f"{REASONS.get(reason, reason)} ({count:,})" for reason, count in counts.items())
