"""Records by index: what every source of training data gives, and the source that reads LLaVA's files.

A source is a random-access sequence (``len(source)``, ``source[index]``), which is what Grain shuffles, splits between
hosts and resumes.
"""

import dataclasses
import json
import os
import pathlib

import PIL.Image

from stf_jax.config import UserError

IMAGE_MARK = "<image>"  # where a picture stands in a conversation's text


@dataclasses.dataclass(frozen=True)
class Turn:
    """One utterance: ``speaker`` is ``human`` or ``gpt``, as in LLaVA's files."""

    speaker: str
    text: str


@dataclasses.dataclass(frozen=True)
class Record:
    """A conversation about no, one or several pictures; ``<image>`` stands in its text once for each."""

    id: str
    pictures: tuple[PIL.Image.Image, ...]
    turns: tuple[Turn, ...]


class LlavaRecords:
    """LLaVA's training files: a JSON array of ``{id, image, conversations: [{from, value}, …]}`` and a folder.

    ``image`` is a path below the folder, a list of such, or absent for a row of text.
    """

    def __init__(self, annotations: str, images: str):
        """Raises UserError where a file is missing or is not such an array."""
        for what, path, key in (("annotations", annotations, "data.annotations"), ("images", images, "data.images")):
            if not path or not os.path.exists(path):
                where = f"{path!r} does not exist" if path else "no path is given"
                raise UserError(
                    f"The {what} of the training data are missing: {where}. Provide them with --config.{key}=PATH, "
                    "or see training work on embedded data with --config=configs/demo.py."
                )
        try:
            rows = json.loads(pathlib.Path(annotations).read_bytes())
        except ValueError as error:
            raise UserError(f"{annotations} is not JSON: {error}.") from None
        except OSError as error:
            raise UserError(f"{annotations} cannot be read: {error.strerror}.") from None
        if not isinstance(rows, list) or not rows:
            raise UserError(f"{annotations} should hold a JSON array of at least one row.")
        self._rows, self._annotations = rows, annotations
        self._folder = pathlib.Path(images).resolve()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        """Raises UserError for a malformed row, a path that leaves the folder, and a picture that does not open."""
        row = self._rows[index]
        try:
            turns = tuple(Turn(turn["from"], turn["value"]) for turn in row["conversations"])
            if not all(isinstance(turn.text, str) for turn in turns):
                raise TypeError
            names = row.get("image", [])
            names = [names] if isinstance(names, str) else names
            pictures = tuple(self._open(name) for name in names)
            return Record(str(row.get("id", index)), pictures, turns)
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"Row {index} of {self._annotations} is not in LLaVA's conversation format.") from None

    def _open(self, name):
        path = pathlib.Path(os.path.normpath(self._folder / name))  # links within the folder may lead anywhere
        if not path.is_relative_to(self._folder):
            raise UserError(f"Image path {name!r} in {self._annotations} leaves the folder {self._folder}.")
        try:
            picture = PIL.Image.open(path)
            picture.load()  # here, so that a file that is cut short is named
            return picture
        except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
            raise UserError(f"Image {path} cannot be opened: {error}.") from None
