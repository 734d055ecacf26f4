"""What holds rows: a file, or a folder of files, whose rows are read by index. Its content decides which kind it is."""

import fnmatch
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from etils import epath

from stf_jax.config import UserError
from stf_jax.files import to_path

_MAGIC_BYTES = 512  # enough to recognize a file
_PATTERN = "*?["  # characters that make a path a pattern


class Rows(Protocol):
    """Rows of a file or folder, of random access, read by several threads at once; pickled as their path.

    Attributes:
      name: the path, as the user gave it.
      files: what the rows are read from.
      needs_folder: whether rows have paths of images.
    """

    @property
    def name(self) -> str: ...

    @property
    def files(self) -> Sequence[epath.Path]: ...

    @property
    def needs_folder(self) -> bool: ...

    def __len__(self) -> int:
        """The number of rows."""
        ...

    def __getitem__(self, index: int) -> Any:
        """Returns a row, a JSON value in which images may be ``Embedded``. Raises BadRow if it cannot be read."""
        ...

    def locate(self, index: int) -> tuple[str, int]:
        """Returns the file of a row, and its number there."""
        ...

    def select(self, keys: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        """Yields the values of some keys of each row; a row that cannot be read has none."""
        ...


def name_row(rows: Rows, index: int) -> str:
    """Names a row in messages: ``row 3 of FILE``."""
    file, number = rows.locate(index)
    return f"row {number} of {file}"


def list_files(name: str) -> list[epath.Path]:
    """Returns the file of that path, or the files of a folder or of a pattern, sorted by path.

    Patterns are such as ``FOLDER/train-*`` and ``FOLDER/*/*.parquet``. Hidden files are left out. There may be none.
    """
    path = to_path(name)
    if path.is_file():
        return [path]
    patterns: list[str] = []  # of names below ``path``, the last one first
    while _is_pattern(path):
        patterns.append(path.name)
        path = path.parent
    found = [path]
    for pattern in reversed(patterns or ["*"]):
        inside = [each for folder in found if folder.is_dir() for each in folder.iterdir()]
        found = [x for x in inside if fnmatch.fnmatchcase(x.name, pattern) and not x.name.startswith(".")]
    return sorted((x for x in found if x.is_file()), key=os.fspath)


def _is_pattern(path: epath.Path) -> bool:
    return any(mark in os.fspath(path) for mark in _PATTERN) and not path.exists()


def exists(name: str) -> bool:
    """Whether a path exists, or a pattern matches a file."""
    return to_path(name).exists() or bool(list_files(name))


def find_files(name: str, is_kind: Callable[[bytes], bool]) -> list[epath.Path]:
    """Returns the files of :func:`list_files` whose first bytes are of a kind. Raises UserError as read_magic."""
    return [file for file in list_files(name) if is_kind(read_magic(file))]


def read_magic(file: epath.Path) -> bytes:
    """Returns the first bytes of a file. Raises UserError if it cannot be read."""
    try:
        with file.open("rb") as opened:
            return opened.read(_MAGIC_BYTES)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}.") from None
