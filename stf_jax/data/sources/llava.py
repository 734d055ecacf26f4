"""Reads training data from files: LLaVA's JSON or JSON lines with a folder of images, or a folder by stf_jax.prepare.

It also opens tables (tables.py) and tars (tars.py), which it recognizes by their content.
"""

import functools
import io
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import numpy as np
import PIL.Image
from etils import epath

from stf_jax.config import TrainConfig, UserError, short_message
from stf_jax.data.image import open_image, read_image, read_size
from stf_jax.data.ratings import Filter
from stf_jax.data.records import BadRow, Embedded, Record, name_image
from stf_jax.data.rows import MAX_DEPTH, PAIRS_KEY, TURN_KEYS, is_too_deep, read_row
from stf_jax.data.sources.base import DataNotNamed
from stf_jax.data.sources.containers import Rows, exists, list_files, name_row, read_magic
from stf_jax.data.sources.tables import SPLITS, STATE, is_parquet, open_table
from stf_jax.data.sources.tars import is_tar, open_tars
from stf_jax.files import local_copy, to_path

KEPT = "kept.json"  # in a prepared folder: its rows, in the order of the images in its shards
SIZES = "image_sizes"  # in its rows: the width and height of each image
INFO = "dataset_info.json"  # TFDS's; written last
_CHUNK, _MAX_ROW = 2**16, 2**26  # characters of an annotation file read at once, and of a row
_EXTREME = f"it nests over {MAX_DEPTH} levels deep, or has a number with thousands of digits"
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
_log = logging.getLogger(__name__)
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
            if first == "{" and len(first_rows) == 1 and not first_rows[0].keys() & {*TURN_KEYS, PAIRS_KEY}:
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
    if text.count("[", *span) + text.count("{", *span) > MAX_DEPTH and is_too_deep(row):
        raise RecursionError  # it could be read, but writing it again may need more stack


class JsonRows:
    """Rows of a JSON file (containers.py), stored as JSON text: a quarter of the memory of Python objects."""

    needs_folder = True

    def __init__(self, annotations: epath.Path, name: str = "") -> None:
        """Raises UserError as :func:`read_rows`. ``name`` is the path that the user gave."""
        self.name, self.files = name or os.fspath(annotations), [annotations]
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

    def locate(self, index: int) -> tuple[str, int]:
        return self.name, index

    def select(self, keys: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        for index in range(len(self)):
            row = self[index]
            yield {key: row[key] for key in keys if key in row} if isinstance(row, dict) else {}


def open_container(name: str) -> Rows | None:
    """Opens tables or tars, or returns None for anything else: JSON, or a folder that stf_jax.prepare wrote.

    Raises:
      UserError: as :func:`open_table` and :func:`open_tars`; a folder has files of several kinds; a tar is compressed.
    """
    path = to_path(name)
    if path.is_dir() and ((path / STATE).exists() or (path / SPLITS).exists()):
        return open_table(name)
    if (path / INFO).exists():
        return None
    opened: dict[str, Callable[[str], Rows]] = {}
    for file in list_files(name):
        magic = read_magic(file)
        if is_parquet(magic):
            opened["Parquet files"] = open_table
        elif is_tar(magic):
            opened["tars"] = open_tars
        elif magic.startswith(_COMPRESSED):
            raise UserError(f"{file} is compressed, so its rows cannot be read by index; decompress it first.")
    if len(opened) > 1:
        raise UserError(f"{name} has {' and '.join(opened)}; give a pattern for each, such as {name}/*.tar.")
    return next((open_rows(name) for open_rows in opened.values()), None)


class LlavaRecords:
    """Records from rows of ``{id, image, conversations: [{from, value}, …]}`` (data/rows.py) and a folder of images."""

    def __init__(
        self, annotations: str, images: str = "", keep: Filter | None = None, rows: Rows | None = None
    ) -> None:
        """
        Args:
          annotations: JSON, tables or tars.
          images: the folder; may be empty if the rows contain their images.
          keep: leaves rows out, and texts of rows.
          rows: of the annotations, if they are already open.

        Raises:
          UserError: a path is missing or the annotations cannot be read; the filter leaves nothing.
        """
        if not annotations or (rows is None and not exists(annotations)):
            raise UserError(_say_missing("annotations", annotations, "data.annotations"))
        is_needed = images or (rows.needs_folder if rows is not None else True)
        if is_needed and (not images or not to_path(images).exists()):
            raise UserError(_say_missing("images", images, "data.images"))
        self._rows = rows if rows is not None else JsonRows(to_path(annotations), annotations)
        self._folder, self.name = to_path(images) if images else None, annotations
        self._keep, self._kept = keep, None if keep is None else self._find_kept(keep)

    def _find_kept(self, keep: Filter) -> np.ndarray:
        """Returns the rows with ratings that the filter accepts, and those without."""
        rated, kept = False, []
        for index, ratings in enumerate(self._rows.select(keep.keys)):
            rated |= any(value is not None for value in ratings.values())
            try:
                keep.keep(ratings, "row")
                kept.append(index)
            except BadRow as error:
                if error.reason != "filtered":
                    kept.append(index)  # it is reported when it is read
        self.is_rated = rated
        if not kept:
            raise UserError(f"data.filter={keep.text} leaves no row of {self.name}.")
        if rated:
            _log.info("data.filter keeps %d of the %d rows of %s.", len(kept), len(self._rows), self.name)
        return np.array(kept, np.int64)

    def __len__(self) -> int:
        return len(self._rows) if self._kept is None else len(self._kept)

    def __getitem__(self, index: int) -> Record:
        """Raises BadRow if the row cannot be used; opening its images may raise it too."""
        if self._kept is not None:
            index = int(self._kept[index])
        name, values = name_row(self._rows, index), self._rows[index]
        row = read_row(values if self._keep is None else self._keep.keep(values, name), name)
        images = tuple(functools.partial(self._open, image) for image in row.images)
        sizes = tuple(functools.partial(read_size, self._folder, image) for image in row.images)
        return Record(row.name, images, row.turns, row.ignored_keys, sizes=sizes)

    def _open(self, image: str | Embedded) -> PIL.Image.Image:
        content = read_image(self._folder, image)
        if isinstance(image, str) and self._folder is not None:
            return open_image(content, os.fspath(self._folder / image))
        return open_image(content, name_image(image))


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
        self._rows, self.name = JsonRows(path / KEPT), folder
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
        values = self._rows[index]
        sizes = values.pop(SIZES, ())  # folders of versions before tiles have none
        row = read_row(values, f"row {index} of {self.name}")
        images = tuple(functools.partial(self._open, index, i, str(name)) for i, name in enumerate(row.images))
        known = tuple(functools.partial(tuple[int, int], size) for size in sizes)
        return Record(row.name, images, row.turns, row.ignored_keys, sizes=known)

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
    """Opens a data set for each item of ``data.annotations``: JSON, a folder of stf_jax.prepare, tables or tars.

    Those with paths of images have them in the folders of ``data.images``, in the same order, or all in one.

    Raises:
      UserError: files are missing or malformed, the number of folders is wrong, or ``data.filter`` is malformed, names
        a rating that no data set has or leaves nothing of one.
      DataNotNamed: ``data.annotations`` is empty.
    """
    data = config.data
    if not data.annotations:
        raise DataNotNamed(_say_missing("annotations", data.annotations, "data.annotations"))
    keep = Filter(data.filter) if data.filter else None
    names = [name.strip() for name in data.annotations.split(",")]
    folders = [name.strip() for name in data.images.split(",")]
    containers = [open_container(name) if name else None for name in names]
    prepared = [
        bool(name) and rows is None and to_path(name).is_dir() for name, rows in zip(names, containers, strict=True)
    ]
    with_paths = [
        not done and (rows is None or rows.needs_folder) for done, rows in zip(prepared, containers, strict=True)
    ]
    if len(folders) > 1 and len(folders) != sum(with_paths):
        raise UserError(
            f"data.images has {len(folders)} folders for {sum(with_paths)} annotation files; give one for all, or one "
            "for each."
        )
    folder = iter(folders)
    sets: list[LlavaRecords | PreparedRecords] = []
    for name, rows, done, has_paths in zip(names, containers, prepared, with_paths, strict=True):
        if done:
            sets.append(PreparedRecords(name))
            continue
        images = folders[0] if len(folders) == 1 else next(folder) if has_paths else ""
        sets.append(LlavaRecords(name, images, keep, rows))
    if keep is not None and not any(isinstance(each, LlavaRecords) and each.is_rated for each in sets):
        raise UserError(f"data.filter={keep.text}: no data set has ratings under {', '.join(keep.keys)}.")
    return sets


COMPONENTS = {"llava": open_llava}
