"""JSON files of questions as the authors of benchmarks publish them, with images in a folder next to them.

They are read as the table that a data set on the Hub has of the same questions (tables.py).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import PIL.Image
from etils import epath

from stf_jax.config import UserError, shorten
from stf_jax.evals.benchmark import ImageFile
from stf_jax.evals.files import read_labels
from stf_jax.evals.tables import Columns, Kind, Row

_TYPES: Mapping[Kind, type] = {"text": str, "integer": int, "list of text": list}


@dataclasses.dataclass(frozen=True)
class AuthorsFile:
    """One of the files of a benchmark.

    Attributes:
      names: the names that it may have.
      image: the key of an image's name.
      folders: those that may have the images; without any of them they are in the folder of the benchmark.
      keys: its keys for columns of the table, where they differ.
      values: the columns that are the same for all its questions.
      under: the key of the list of questions; empty if the file is the list itself.
      suffix: ends the name of an image's file.
    """

    names: tuple[str, ...]
    image: str = "image"
    folders: tuple[str, ...] = ()
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    under: str = ""
    suffix: str = ""


@dataclasses.dataclass(frozen=True)
class _RGBFile:
    """Opens an image file in RGB, as tables do."""

    file: ImageFile

    def __call__(self) -> PIL.Image.Image:
        return self.file().convert("RGB")


class AuthorsTable:
    """The rows of a benchmark's files, one file after another.

    Attributes:
      files: the files.
      rows: the values of the columns, without images.
    """

    def __init__(self, folder: epath.Path, kinds: Sequence[AuthorsFile], columns: Columns) -> None:
        """Reads the files; there are none if no file exists.

        Args:
          folder: the benchmark's.
          kinds: the files, all of which are needed.
          columns: those of the table, and the kinds that each may have.

        Raises:
          UserError: only some of the files exist; a file is malformed, or has no questions.
        """
        places = [[folder / name for name in kind.names] for kind in kinds]
        found = [next((file for file in names if file.exists()), None) for names in places]
        self.files = [file for file in found if file is not None]
        self.rows: list[Row] = []
        self._images: list[_RGBFile] = []
        if self.files and len(self.files) < len(kinds):
            missing = places[found.index(None)][0]
            raise UserError(f"{missing} is missing next to {self.files[0]}: the benchmark needs both.")
        for file, kind in zip(self.files, kinds, strict=False):
            self._read(folder, file, kind, columns)

    def image_opener(self, row: Row, column: str) -> Callable[[], PIL.Image.Image]:
        """Returns an opener of a row's image."""
        del column
        return self._images[row.number]

    def _read(self, folder: epath.Path, file: epath.Path, kind: AuthorsFile, columns: Columns) -> None:
        texts = {
            column: kinds
            for column, kinds in columns.items()
            if column not in kind.values and not any(one.endswith("image") for one in kinds)
        }
        images = next((folder / name for name in kind.folders if (folder / name).is_dir()), folder)
        labels = read_labels(file, kind.under, **{kind.image: (str, int)})
        if not labels:
            raise UserError(f"{file} contains no questions.")
        for number, label in enumerate(labels, start=1):
            name = f"{file}, label {number}"
            values = dict(kind.values)
            for column, kinds in texts.items():
                key = kind.keys.get(column, column)
                values[column] = _check_kind(label.get(key), key, kinds, name)
            self.rows.append(Row(len(self.rows), name, values))
            self._images.append(_RGBFile(ImageFile(images, f"{label[kind.image]}{kind.suffix}")))


def _check_kind(value: Any, key: str, kinds: Sequence[Kind], name: str) -> Any:
    """Returns a value if it is of one of the kinds, or a missing one, which :meth:`Row.check_complete` reports."""
    if isinstance(value, str) and "list of text" in kinds:  # OCRBench's own program takes a single answer too
        value = [value]
    fits = value is None or any(type(value) is _TYPES[kind] for kind in kinds)
    if not fits or (isinstance(value, list) and not all(isinstance(one, str) for one in value)):
        raise UserError(f"{name}: {key} is {shorten(repr(value))}, not {' or '.join(kinds)}.")
    return value
