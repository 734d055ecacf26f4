"""Training records, and the reasons why one cannot be used.

Images are opened lazily, so that conversations can be measured without them.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import PIL.Image

from stf_jax.config import UserError

IMAGE_MARK = "<image>"  # marks the place of an image in a conversation's text
REASONS = {
    "no_object": "a row that is not a JSON object",
    "no_turns": "no list of turns under conversations, messages or texts",
    "ratings": "ratings that are not one number for each text",
    "filtered": "ratings outside the filter",
    "member": "a text in an archive that cannot be read",
    "no_turn": "a turn that is not {from, value} or {role, content} with string values",
    "speaker": "a turn by a speaker other than human, gpt, user, assistant and system",
    "image_value": "an image that is neither a path nor a list of paths",
    "unread": "images, other media or texts under keys that are not read",
    "token_without_row": "a token id beyond the model's embedding",
    "no_vision": "an image, for a text-only model",
    "no_text": "bytes that are not UTF-8, or half a surrogate pair",
    "roles": "human and gpt do not alternate",
    "mark_without_image": f"more {IMAGE_MARK} than images",
    "image_without_mark": f"more images than {IMAGE_MARK}",
    "mark_in_answer": f"{IMAGE_MARK} in an answer or a system text",
    "empty_answer": "an answer without text",
    "no_answer": "no answer to train on",
    "over_length": "more tokens than fit in a row",
    "over_estimate": "more tokens than fit in a row (estimated without --tokenizer)",
    "too_many_images": "more images than data.images_per_row",
    "url": "the image is a URL or a data: URI, not a path",
    "outside": "the image path leaves the folder",
    "missing": "the image file does not exist",
    "corrupt": "the image file cannot be decoded",
    "truncated": "the image file is cut short",
    "too_large": "the image is too large or too thin",
    "resized": "more tokens than when the row was measured, because an image has changed",
}  # why a row is dropped when preparing data, or left out in training


class BadRow(UserError):
    """A row that cannot be used: ``reason`` is a key of :data:`REASONS`, ``image`` the image at fault, if any."""

    def __init__(self, reason: str, message: str, image: str = "") -> None:
        super().__init__(message)
        self.reason, self.image = reason, image


@dataclasses.dataclass(frozen=True, eq=False)
class Embedded:
    """An image inside a file of rows, such as a Parquet file.

    Attributes:
      name: names the image in messages.
      read: returns the image's file, or None if the row has only its path; raises :class:`BadRow`.
      path: of the file that the image came from; may be empty.
    """

    name: str
    read: Callable[[], bytes | None]
    path: str = ""


def name_image(image: str | Embedded) -> str:
    """Names an image of a row in messages."""
    return image.name if isinstance(image, Embedded) else image


@dataclasses.dataclass(frozen=True)
class Turn:
    """A turn of a conversation.

    Attributes:
      speaker: ``human`` or ``gpt``, as in LLaVA; a first turn may be ``system``.
      text: contains ``<image>`` once for each image.
      in_place: whether the images stay where they are in the text, rather than move to its front, as in LLaVA.
    """

    speaker: str
    text: str
    in_place: bool = False


@dataclasses.dataclass(frozen=True)
class Record:
    """A conversation with any number of images; its text contains ``<image>`` once for each.

    Calling an element of ``images`` opens the image, or raises :class:`BadRow`.
    """

    id: str
    images: tuple[Callable[[], PIL.Image.Image], ...]
    turns: tuple[Turn, ...]
    ignored_keys: tuple[str, ...] = ()  # what was ignored in its row (data/rows.py)
    document: bool = False  # encode the turns without any template
    labels: Callable[[], np.ndarray] | None = None  # labels of the cells of its image, uint8 [S, S, 3]
    # Each returns the width and height of an image, or raises BadRow; (): it must be opened to know them.
    sizes: tuple[Callable[[], tuple[int, int]], ...] = ()

    def image_sizes(self) -> list[tuple[int, int]]:
        """Returns the width and height of each image, in pixels. Raises BadRow as opening an image does."""
        return [size() for size in self.sizes] if self.sizes else [image().size for image in self.images]


def make_question(id: str, images: Sequence[Callable[[], PIL.Image.Image]], text: str) -> Record:
    """A conversation of one question about images, which come before its text. Marks in the text are removed."""
    return Record(id, tuple(images), (Turn("human", f"{IMAGE_MARK}\n" * len(images) + text.replace(IMAGE_MARK, "")),))


def format_reasons(counts: Mapping[str, int]) -> str:
    """Formats reasons and their counts as one line."""
    return ", ".join(f"{REASONS.get(reason, reason)} ({count:,})" for reason, count in counts.items())
