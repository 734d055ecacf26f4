"""Reads training data in LLaVA's format: JSON or JSON lines with a folder of images, or a folder by stf_jax.prepare."""

import functools
import io
import itertools
import json
import os
import re
from collections.abc import Iterator
from typing import Any, TextIO

import numpy as np
import PIL.Image
from etils import epath

from stf_jax.config import TrainConfig, UserError, short_message
from stf_jax.data.image import open_image, read_image
from stf_jax.data.records import BadRow, Record
from stf_jax.data.rows import TURN_KEYS, read_row
from stf_jax.data.sources.base import DataNotNamed
from stf_jax.files import local_copy, to_path

KEPT = "kept.json"  # in a prepared folder: its rows, in the order of the images in its shards
INFO = "dataset_info.json"  # TFDS's; written last
_CHUNK, _MAX_ROW = 2**16, 2**26  # characters of an annotation file read at once, and of a row
_MAX_DEPTH = 100  # levels of lists and objects in a row; LLaVA's have three
_EXTREME = f"it nests over {_MAX_DEPTH} levels deep, or has a number with thousands of digits"
_SPACE, _DECODER = re.compile(r"\s*"), json.JSONDecoder()


def read_rows(annotations: epath.Path) -> Iterator[Any]:
    """Yields the elements of a JSON array or the values of JSON lines, without loading the whole file.

    The first character decides which of them the file is. Bytes that are not UTF-8 become lone surrogates, so only
    their own row is unusable.

    Raises:
      UserError: the file cannot be read, is neither, is empty, or has an element that is not JSON, too deep or too
        long.
    """
    name = os.fspath(annotations)
    try:
        with annotations.open("rb") as file, io.TextIOWrapper(file, "utf-8-sig", "surrogateescape") as text:
            blank, first = 0, text.read(1)
            while first.isspace():
                blank, first = blank + (first == "\n"), text.read(1)
            rows = _lines(text, name, blank, first) if first == "{" else _elements(text, name, first)
            first_rows = list(itertools.islice(rows, 2))
            if first == "{" and len(first_rows) == 1 and not first_rows[0].keys() & set(TURN_KEYS):
                raise UserError(f"{name} should be a JSON array of rows, or have one row per line, but is one object.")
            yield from itertools.chain(first_rows, rows)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}.") from None


def _lines(file: TextIO, name: str, blank: int, first: str) -> Iterator[Any]:
    """Yields the values of JSON lines, after ``blank`` blank lines and the character ``first``, which are consumed."""
    number, line = blank, first + file.readline(_MAX_ROW)
    while line:
        number += 1
        try:
            if line.strip():
                row = _DECODER.decode(line)
                _check_depth(row, line)
                yield row
        except json.JSONDecodeError as error:
            problem = f"line {number} of {name} is not JSON: {error.msg}."
            if number == blank + 1:
                raise UserError(
                    f"{name} should be a JSON array of rows, or have one row per line, but {problem}"
                ) from None
            cut = "" if line.endswith("\n") else " The file ends there and may be cut short."
            raise UserError(problem[0].upper() + problem[1:] + cut) from None
        except (ValueError, RecursionError):
            raise UserError(f"Line {number} of {name} cannot be read: {_EXTREME}; remove it.") from None
        line = file.readline(_MAX_ROW)


def _elements(file: TextIO, name: str, first: str) -> Iterator[Any]:
    """Yields the elements of a JSON array, after the character ``first``, which is consumed."""
    text, index = first + file.read(_CHUNK), 0
    begin = re.match(r"\[(?!\s*\])", text)
    if begin is None:
        raise UserError(f"{name} should be a JSON array with at least one row, or have one row per line.")
    at, mark = begin.end(), ","
    while mark == ",":
        try:
            row, end = _element(text, at)
        except json.JSONDecodeError as error:  # the rest of the row may not be read yet
            text, at = text[at:], 0
            more = file.read(max(_CHUNK, len(text))) if len(text) < _MAX_ROW else ""
            if not more:
                raise UserError(f"Row {index} of {name} is not JSON: {error.msg}.") from None
            text += more
            continue
        except (ValueError, RecursionError):
            raise UserError(f"Row {index} of {name} cannot be read: {_EXTREME}; remove it.") from None
        yield row
        at, mark, index = end + 1, text[end], index + 1
    if (text[at:] + file.read(_CHUNK)).strip():
        raise UserError(f"{name} is not JSON: there is more text after its array, which ends with row {index - 1}.")


def _element(text: str, at: int) -> tuple[Any, int]:
    """Decodes the element at a position; returns it and the position of the mark after it."""
    row, end = _DECODER.raw_decode(text, _skip_space(text, at))
    end = _skip_space(text, end)
    if text[end : end + 1] not in (",", "]"):
        raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
    _check_depth(row, text, at, end)
    return row, end


def _skip_space(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    assert space is not None  # it also matches nothing
    return space.end()


def _check_depth(row: Any, text: str, *span: int) -> None:
    if text.count("[", *span) + text.count("{", *span) > _MAX_DEPTH and _is_too_deep(row):
        raise RecursionError  # it could be read, but writing it again may need more stack


def _is_too_deep(row: Any) -> bool:
    level = [row]
    for _ in range(_MAX_DEPTH):
        level = [
            inner
            for value in level
            if isinstance(value, (dict, list))
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
    return bool(level)


class _JsonRows:
    """A sequence of rows, stored as JSON text: a quarter of the memory of Python objects."""

    def __init__(self, annotations: epath.Path) -> None:
        text, ends = bytearray(), [0]
        for row in read_rows(annotations):
            text += json.dumps(row, ensure_ascii=False).encode(errors="surrogatepass")
            ends.append(len(text))
        self._text, self._ends = bytes(text), np.array(ends, np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Any:
        begin, end = self._ends[index : index + 2]
        return json.loads(self._text[begin:end].decode(errors="surrogatepass"))


class LlavaRecords:
    """Records from rows of ``{id, image, conversations: [{from, value}, …]}`` (data/rows.py) and a folder of images."""

    def __init__(self, annotations: str, images: str) -> None:
        """Raises UserError if a path is missing or the annotations cannot be read."""
        for kind, path, key in (("annotations", annotations, "data.annotations"), ("images", images, "data.images")):
            if not path or not to_path(path).exists():
                raise UserError(_say_missing(kind, path, key))
        self._rows, self.name = _JsonRows(to_path(annotations)), annotations
        self._folder = to_path(images)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        """Raises BadRow if the row cannot be used; opening its images may raise it too."""
        row = read_row(self._rows[index], f"row {index} of {self.name}")
        images = tuple(functools.partial(self._open, name) for name in row.images)
        return Record(row.name, images, row.turns, row.ignored_keys)

    def _open(self, name: str) -> PIL.Image.Image:
        return open_image(read_image(self._folder, name), os.fspath(self._folder / name))


class PreparedRecords:
    """Records from a folder that stf_jax.prepare wrote: checked rows, and their images in ArrayRecord shards."""

    def __init__(self, folder: str) -> None:
        """Raises UserError if the folder is incomplete."""
        import tensorflow_datasets as tfds  # slow to import

        path = to_path(folder)
        if not (path / INFO).exists():
            raise UserError(
                f"{folder} has no finished data set; run python -m stf_jax.prepare --annotations=FILE.json "
                f"--images=DIR --out={folder}."
            )
        self._rows, self.name = _JsonRows(path / KEPT), folder
        try:
            self._shards = tfds.builder_from_directory(local_copy(path)).as_data_source("train")
        except Exception as error:  # the JSON and protocol buffer readers raise many types
            raise UserError(f"{folder} is damaged and must be prepared again: {short_message(error)}.") from None
        if len(self._rows) != len(self._shards):
            raise UserError(f"{folder} is damaged: {KEPT} has {len(self._rows)} rows, its shards {len(self._shards)}.")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        """Returns a record; opening its images reads the shard."""
        row = read_row(self._rows[index], f"row {index} of {self.name}")
        images = tuple(functools.partial(self._open, index, i, name) for i, name in enumerate(row.images))
        return Record(row.name, images, row.turns, row.ignored_keys)

    def _open(self, index: int, image_index: int, name: str) -> PIL.Image.Image:
        try:
            content = self._shards[index]["images"][image_index]
        except (RuntimeError, ValueError) as error:  # a shard that is missing, cut short, or has a wrong checksum
            message = f"Row {index} of {self.name} cannot be read from its shard: {str(error).strip('.')}."
            raise BadRow("corrupt", message, name) from None
        return open_image(content, name)


def _say_missing(kind: str, path: str, key: str) -> str:
    problem = f"{path!r} does not exist" if path else "no path is given"
    return (
        f"The {kind} of the training data are missing: {problem}. Provide them with --config.{key}=PATH, or try "
        "training on embedded data with --config=configs/demo.py."
    )


def open_llava(config: TrainConfig) -> list[LlavaRecords | PreparedRecords]:
    """Opens a data set for each item of ``data.annotations``: a JSON file, or a folder that stf_jax.prepare wrote.

    The JSON files have their images in the folders of ``data.images``, in the same order, or all in one.

    Raises:
      UserError: files are missing or malformed, or the number of folders is wrong.
      DataNotNamed: ``data.annotations`` is empty.
    """
    annotations, images = config.data.annotations, config.data.images
    if not annotations:
        raise DataNotNamed(_say_missing("annotations", annotations, "data.annotations"))
    names = [name.strip() for name in annotations.split(",")]
    folders = [name.strip() for name in images.split(",")]
    prepared = [bool(name) and to_path(name).is_dir() for name in names]
    files = len(names) - sum(prepared)
    if len(folders) == 1:
        folders *= files
    if len(folders) != files:
        raise UserError(
            f"data.images has {len(folders)} folders for {files} annotation files; give one for all, or one for each."
        )
    folder = iter(folders)
    return [
        PreparedRecords(n) if done else LlavaRecords(n, next(folder)) for n, done in zip(names, prepared, strict=True)
    ]


COMPONENTS = {"llava": open_llava}
