"""Training data in LLaVA's format: a JSON array with a folder of pictures, or what stf_jax.prepare made of them."""

import functools
import json
import os
from collections.abc import Iterator
from typing import Any

import ijson
import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from stf_jax.config import UserError
from stf_jax.data.image import open_image, read_image
from stf_jax.data.records import Record, read_row
from stf_jax.runtime.files import fetched

KEPT = "kept.json"  # in a prepared folder: the rows that its shards hold the pictures of, in order
INFO = "dataset_info.json"  # TFDS's, the last file that is written


def read_rows(annotations: epath.Path) -> Iterator[Any]:
    """The elements of a JSON array one after the other; the file is never in memory whole.

    Raises:
      UserError: the file cannot be read, is not JSON, or is no array of at least one element.
    """
    name, found = os.fspath(annotations), False
    try:
        with annotations.open("rb") as file:
            if file.read(1024).lstrip()[:1] == b"{":
                raise UserError(f"{name} should hold a JSON array of at least one row.")
            file.seek(0)
            for row in ijson.items(file, "item", use_float=True):
                found = True
                yield row
    except ijson.JSONError as error:
        raise UserError(f"{name} is not JSON: {_one_line(error)}.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{name} cannot be read: {getattr(error, 'strerror', None) or _one_line(error)}.") from None
    if not found:
        raise UserError(f"{name} should hold a JSON array of at least one row.")


def _one_line(error):
    text = error.args[0] if error.args else error  # the parser's are bytes, and show the place below them
    text = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
    return " ".join(text.split("(right here)")[0].split())[:200].strip(" .")


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
    """A JSON array of ``{id, image, conversations: [{from, value}, …]}`` and the folder its image paths start from."""

    def __init__(self, annotations: str, images: str):
        """Raises UserError where a file is missing or is not such an array."""
        for what, path, key in (("annotations", annotations, "data.annotations"), ("images", images, "data.images")):
            if not path or not epath.Path(path).exists():
                where = f"{path!r} does not exist" if path else "no path is given"
                raise UserError(
                    f"The {what} of the training data are missing: {where}. Provide them with --config.{key}=PATH, "
                    "or see training work on embedded data with --config=configs/demo.py."
                )
        self._rows, self._name = _JsonRows(epath.Path(annotations)), annotations
        self._folder = epath.Path(images)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        """Raises BadRow for a row that is not of that form; opening its pictures may raise it too."""
        identity, images, turns = read_row(self._rows[index], f"row {index} of {self._name}")
        return Record(identity, tuple(functools.partial(self._open, name) for name in images), turns)

    def _open(self, name):
        return open_image(read_image(self._folder, name), os.fspath(self._folder / name))


class PreparedRecords:
    """What stf_jax.prepare wrote: rows that were checked, and their pictures in ArrayRecord shards."""

    def __init__(self, folder: str):
        """Raises UserError where the folder is incomplete."""
        path = epath.Path(folder)
        if not (path / INFO).exists():
            raise UserError(f"{folder} holds no finished data set; run python -m stf_jax.prepare --out={folder}.")
        self._rows, self._name = _JsonRows(path / KEPT), folder
        self._shards = tfds.builder_from_directory(fetched(path)).as_data_source("train")
        if len(self._rows) != len(self._shards):
            raise UserError(f"{folder} is damaged: {KEPT} has {len(self._rows)} rows, its shards {len(self._shards)}.")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        """A record; opening its pictures reads the shard."""
        identity, images, turns = read_row(self._rows[index], f"row {index} of {self._name}")
        opens = (functools.partial(self._open, index, place, name) for place, name in enumerate(images))
        return Record(identity, tuple(opens), turns)

    def _open(self, index, place, name):
        return open_image(self._shards[index]["images"][place], name)


def llava_records(annotations: str, images: str) -> list[LlavaRecords | PreparedRecords]:
    """The data sets of a run.

    Args:
      annotations: JSON files, or folders that stf_jax.prepare wrote, separated by commas.
      images: the JSON files' image folders, in the same order; one serves them all.

    Raises:
      UserError: files are missing or malformed, or there are not as many folders as JSON files.
    """
    names = [name.strip() for name in annotations.split(",")]
    folders = [name.strip() for name in images.split(",")]
    prepared = [bool(name) and epath.Path(name).is_dir() for name in names]
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
