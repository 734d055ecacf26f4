"""Training data in LLaVA's format: a JSON array or JSON lines with a folder of images, or what stf_jax.prepare made."""

import functools
import io
import itertools
import json
import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from stf_jax.config import UserError, short_message
from stf_jax.data.image import open_image, read_image
from stf_jax.data.records import BadRow, Record
from stf_jax.data.rows import TALK, read_row
from stf_jax.runtime.files import fetched, to_path

KEPT = "kept.json"  # in a prepared folder: the rows that its shards hold the images of, in order
INFO = "dataset_info.json"  # TFDS's, the last file that is written
_CHUNK, _LONGEST = 2**16, 2**26  # characters of an annotation file read together, and of a row
_DEEPEST = 100  # levels of lists and objects in a row, of which LLaVA's have three
_ABSURD = f"it nests over {_DEEPEST} levels deep, or has a number of thousands of digits"
_SPACE, _DECODER = re.compile(r"\s*"), json.JSONDecoder()


def read_rows(annotations: epath.Path) -> Iterator[Any]:
    """The elements of a JSON array, or the values of JSON lines, one after the other; never is all of it in memory.

    Which it is, the first character tells. Bytes that are not UTF-8 come as lone surrogates, so that they spoil their
    own row alone.

    Raises:
      UserError: the file cannot be read, is neither, holds nothing, or has an element that is not JSON or is beyond all
        measure.
    """
    name = os.fspath(annotations)
    try:
        with annotations.open("rb") as file, io.TextIOWrapper(file, "utf-8-sig", "surrogateescape") as text:
            blank, first = 0, text.read(1)
            while first.isspace():
                blank, first = blank + (first == "\n"), text.read(1)
            rows = _lines(text, name, blank, first) if first == "{" else _elements(text, name, first)
            begun = list(itertools.islice(rows, 2))
            if first == "{" and len(begun) == 1 and not begun[0].keys() & set(TALK):
                raise UserError(f"{name} should hold a JSON array of rows, or a row a line, but is one object.")
            yield from itertools.chain(begun, rows)
    except (OSError, ValueError) as error:
        raise UserError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}.") from None


def _lines(file, name, blank, first):
    """The values of JSON lines; of the file, so many blank lines and the first character were read."""
    number, line = blank, first + file.readline(_LONGEST)
    while line:
        number += 1
        try:
            if line.strip():
                row = _DECODER.decode(line)
                _check_depth(row, line)
                yield row
        except json.JSONDecodeError as error:
            what = f"line {number} of {name} is not JSON: {error.msg}."
            if number == blank + 1:
                raise UserError(f"{name} should hold a JSON array of rows, or a row a line, but {what}") from None
            cut = "" if line.endswith("\n") else " The file ends there, and may be cut short."
            raise UserError(what[0].upper() + what[1:] + cut) from None
        except (ValueError, RecursionError):
            raise UserError(f"Line {number} of {name} cannot be read: {_ABSURD}; take it out.") from None
        line = file.readline(_LONGEST)


def _elements(file, name, first):
    """The elements of a JSON array; of the file, the first character was read."""
    text, index = first + file.read(_CHUNK), 0
    begin = re.match(r"\[(?!\s*\])", text)
    if begin is None:
        raise UserError(f"{name} should hold a JSON array of at least one row, or a row a line.")
    at, mark = begin.end(), ","
    while mark == ",":
        try:
            row, end = _element(text, at)
        except json.JSONDecodeError as error:  # perhaps only for want of what is still to be read
            text, at = text[at:], 0
            more = file.read(max(_CHUNK, len(text))) if len(text) < _LONGEST else ""
            if not more:
                raise UserError(f"Row {index} of {name} is not JSON: {error.msg}.") from None
            text += more
            continue
        except (ValueError, RecursionError):
            raise UserError(f"Row {index} of {name} cannot be read: {_ABSURD}; take it out.") from None
        yield row
        at, mark, index = end + 1, text[end], index + 1
    if (text[at:] + file.read(_CHUNK)).strip():
        raise UserError(f"{name} is not JSON: its array ends after row {index - 1}, the file does not.")


def _element(text, at):
    """The element that begins there, and the place of the mark behind it."""
    row, end = _DECODER.raw_decode(text, _SPACE.match(text, at).end())
    end = _SPACE.match(text, end).end()
    if text[end : end + 1] not in (",", "]"):
        raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
    _check_depth(row, text, at, end)
    return row, end


def _check_depth(row, text, *span):
    if text.count("[", *span) + text.count("{", *span) > _DEEPEST and _nests_deeper(row):
        raise RecursionError  # it was read, but whoever writes it again may have less stack left


def _nests_deeper(row):
    level = [row]
    for _ in range(_DEEPEST):
        level = [
            inner
            for value in level
            if isinstance(value, (dict, list))
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
    return bool(level)


class _JsonRows:
    """Rows by index, kept as JSON text: a quarter of the memory that they take as objects."""

    def __init__(self, annotations: epath.Path):
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
    """Rows of ``{id, image, conversations: [{from, value}, …]}`` (data/rows.py), and the folder of their images."""

    def __init__(self, annotations: str, images: str):
        """Raises UserError where a file is missing or does not hold such rows."""
        for what, path, key in (("annotations", annotations, "data.annotations"), ("images", images, "data.images")):
            if not path or not to_path(path).exists():
                where = f"{path!r} does not exist" if path else "no path is given"
                raise UserError(
                    f"The {what} of the training data are missing: {where}. Provide them with --config.{key}=PATH, "
                    "or see training work on embedded data with --config=configs/demo.py."
                )
        self._rows, self.name = _JsonRows(to_path(annotations)), annotations
        self._folder = to_path(images)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        """Raises BadRow for a row that is not of that form; opening its images may raise it too."""
        row = read_row(self._rows[index], f"row {index} of {self.name}")
        return Record(
            row.name, tuple(functools.partial(self._open, name) for name in row.images), row.turns, row.unread
        )

    def _open(self, name):
        return open_image(read_image(self._folder, name), os.fspath(self._folder / name))


class PreparedRecords:
    """What stf_jax.prepare wrote: rows that were checked, and their images in ArrayRecord shards."""

    def __init__(self, folder: str):
        """Raises UserError where the folder is incomplete."""
        import tensorflow_datasets as tfds  # slow to import, and only wanted here

        path = to_path(folder)
        if not (path / INFO).exists():
            raise UserError(
                f"{folder} holds no finished data set; run python -m stf_jax.prepare --annotations=FILE.json "
                f"--images=DIR --out={folder}."
            )
        self._rows, self.name = _JsonRows(path / KEPT), folder
        try:
            self._shards = tfds.builder_from_directory(fetched(path)).as_data_source("train")
        except Exception as error:  # whatever its readers of JSON and of protocol buffers raise
            raise UserError(f"{folder} is damaged, and has to be prepared again: {short_message(error)}.") from None
        if len(self._rows) != len(self._shards):
            raise UserError(f"{folder} is damaged: {KEPT} has {len(self._rows)} rows, its shards {len(self._shards)}.")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        """A record; opening its images reads the shard."""
        row = read_row(self._rows[index], f"row {index} of {self.name}")
        opens = (functools.partial(self._open, index, place, name) for place, name in enumerate(row.images))
        return Record(row.name, tuple(opens), row.turns, row.unread)

    def _open(self, index, place, name):
        try:
            content = self._shards[index]["images"][place]
        except (RuntimeError, ValueError) as error:  # a shard that is lost, cut short, or whose checksum is wrong
            sentence = f"Row {index} of {self.name} cannot be read from its shard: {str(error).strip('.')}."
            raise BadRow("corrupt", sentence, name) from None
        return open_image(content, name)


def llava_records(annotations: str, images: str) -> list[LlavaRecords | PreparedRecords]:
    """The data sets of a run.

    Args:
      annotations: files of a JSON array or of JSON lines, or folders that stf_jax.prepare wrote, separated by commas.
      images: the JSON files' image folders, in the same order; one serves them all.

    Raises:
      UserError: files are missing or malformed, or there are not as many folders as JSON files.
    """
    names = [name.strip() for name in annotations.split(",")]
    folders = [name.strip() for name in images.split(",")]
    prepared = [bool(name) and to_path(name).is_dir() for name in names]
    files = len(names) - sum(prepared)
    if len(folders) == 1:
        folders *= files
    if len(folders) != files:
        raise UserError(
            f"data.images names {len(folders)} folders for {files} annotation files; name one, or one each."
        )
    rest = iter(folders)
    return [
        PreparedRecords(n) if done else LlavaRecords(n, next(rest)) for n, done in zip(names, prepared, strict=True)
    ]
