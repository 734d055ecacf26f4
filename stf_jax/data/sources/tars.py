"""Reads rows of tars in WebDataset's layout: files whose names share all but their suffix are a row.

An index of the members is made once for each tar and kept beside it, or in the cache if that folder cannot be written.
"""

import bisect
import functools
import hashlib
import itertools
import json
import os
import posixpath
import re
import secrets
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from stf_jax.config import UserError, short_message
from stf_jax.data.image import MAX_FILE_BYTES
from stf_jax.data.records import IMAGE_MARK, BadRow, Embedded
from stf_jax.data.rows import PAIRS_KEY, TURN_KEYS, is_too_deep
from stf_jax.data.sources.containers import find_files, name_row
from stf_jax.files import cache_folder, get_version, parse_json

_INDEX = ".index.json"  # after the name of a tar
_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")  # WebDataset's: the suffix begins at the first dot of the name
_IMAGES = ("jpg", "jpeg", "png", "gif", "webp", "bmp", "tif", "tiff", "ppm")
_CAPTIONS = ("txt", "text", "caption")
_BLOCK = 512
_ERRORS = (OSError, tarfile.TarError, ValueError)
_Sample = tuple[str, dict[str, tuple[int, int]]]  # its key; offset and size of each member, by suffix


def is_tar(magic: bytes) -> bool:
    """Whether a file that begins with these bytes is a tar."""
    return magic[257:262] == b"ustar"


class _TarFile:
    """The samples of a tar."""

    def __init__(self, path: epath.Path) -> None:
        self.path = path
        samples = _read_index(path)
        texts = [json.dumps(sample).encode() for sample in samples]
        self._text, self._ends = b"".join(texts), np.cumsum([0, *map(len, texts)])  # a tenth of the objects' memory

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> _Sample:
        return json.loads(self._text[self._ends[index] : self._ends[index + 1]])

    def read(self, place: tuple[int, int]) -> bytes:
        """Reads a member. Raises BadRow if it is too large, and OSError if it cannot be read."""
        offset, size = place
        if size > MAX_FILE_BYTES:
            raise BadRow("too_large", f"A member of {self.path} at byte {offset:,} has over {MAX_FILE_BYTES:,} bytes.")
        with self.path.open("rb") as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) != size:
            raise OSError("the file is cut short")
        return content


class TarRows:
    """Rows of tars (containers.py)."""

    needs_folder = False

    def __init__(self, name: str, files: Sequence[epath.Path]) -> None:
        """Reads the indices, and makes those that are missing. Raises UserError as :func:`open_tars`."""
        self.name, self.files = name, files
        self._tars = [_TarFile(file) for file in files]
        self._begins = [0, *itertools.accumulate(map(len, self._tars))]

    def __reduce__(self) -> Any:
        return _reopen, (self.name,)

    def __len__(self) -> int:
        return self._begins[-1]

    def _find(self, index: int) -> tuple[int, int]:
        """Returns the number of a row's tar, and its own there."""
        number = bisect.bisect_right(self._begins, index) - 1
        return number, index - self._begins[number]

    def locate(self, index: int) -> tuple[str, int]:
        number, row = self._find(index)
        return os.fspath(self.files[number]), row

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, sample = self._find(index)
        tar, file = self._tars[number], self.files[number]
        key, members = tar[sample]
        where = f"R{name_row(self, index)[1:]}"
        images = [
            Embedded(f"{key}.{suffix} of {file}", functools.partial(self.read_member, index, suffix))
            for suffix in members
            if suffix.lower().split(".")[-1] in _IMAGES
        ]
        row: Any = _read_text(tar, members["json"], f"{where}: {key}.json") if "json" in members else {}
        if not isinstance(row, dict):
            raise BadRow("no_object", f"{where}: {key}.json is not an object.")
        caption = next((suffix for suffix in _CAPTIONS if suffix in members), None)
        if caption and not any(row.get(name) for name in (*TURN_KEYS, PAIRS_KEY)):
            text = _read_text(tar, members[caption], f"{where}: {key}.{caption}")
            question = {"from": "human", "value": IMAGE_MARK * len(images)}
            row = row | {"conversations": [question, {"from": "gpt", "value": text}]}
        names = {suffix: f"{key}.{suffix}" for suffix in members if suffix not in ("json", *_CAPTIONS)}
        others = {suffix: name for suffix, name in names.items() if suffix.lower().split(".")[-1] not in _IMAGES}
        if images:  # the row may also have the names of their files
            row = {name: value for name, value in row.items() if name not in ("image", "images")} | {"images": images}
        return {"id": key} | others | row

    def read_member(self, index: int, suffix: str) -> bytes:
        """Reads a member of a row. Raises BadRow if it cannot be read."""
        number, sample = self._find(index)
        key, members = self._tars[number][sample]
        try:
            return self._tars[number].read(members[suffix])
        except OSError as error:
            name = f"{key}.{suffix} of {self.files[number]}"
            raise BadRow("missing", f"Image {name} cannot be read: {error.strerror or error}.", name) from None

    def select(self, keys: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        for index in range(len(self)):
            try:
                row = self[index]
            except BadRow:
                row = {}
            yield {key: row[key] for key in keys if key in row}


def _read_text(tar: _TarFile, place: tuple[int, int], where: str) -> Any:
    """Reads a member of JSON or of text."""
    try:
        content = tar.read(place)
        if not where.endswith(".json"):
            return content.decode()
        if is_too_deep(value := parse_json(content)):
            raise ValueError("it is nested too deeply")
        return value
    except BadRow:
        raise
    except OSError as error:
        raise BadRow("member", f"{where} cannot be read: {error.strerror or error}.") from None
    except ValueError as error:
        problem = "is not JSON" if where.endswith(".json") else "is not UTF-8"
        raise BadRow("member", f"{where} {problem}: {short_message(error)}.") from None


def open_tars(name: str) -> TarRows:
    """Opens a tar, or a folder or pattern of them.

    Raises:
      UserError: a tar is cut short or has no sample; a member is no file, has a name that leaves the archive, or occurs
        twice.
    """
    return TarRows(name, find_files(name, is_tar))


@functools.lru_cache(maxsize=8)  # prepare's workers unpickle rows with every shard
def _reopen(name: str) -> TarRows:
    return open_tars(name)


# ---- The index -------------------------------------------------------------------------------------------------------


def _read_index(path: epath.Path) -> list[_Sample]:
    """Returns the samples of a tar, from its index if that is of this tar."""
    version = get_version(path)
    cached = cache_folder() / "tars" / f"{hashlib.sha256(os.fspath(path).encode()).hexdigest()[:32]}{_INDEX}"
    places = [path.parent / (path.name + _INDEX), epath.Path(cached)]
    for place in places:
        try:
            index = json.loads(place.read_text())
            if index["version"] == list(version):
                return _check_samples(index["samples"], version[0])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # there is none, or it is of another tar or damaged
    samples = _list_samples(path)
    for place in places:
        partial = place.parent / f".{place.name}.{secrets.token_hex(4)}"  # hosts may write it at once
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps({"version": version, "samples": samples}))
            partial.replace(place)
            break
        except OSError:
            partial.unlink(missing_ok=True)
    return samples


def _check_samples(samples: Any, size: int) -> list[_Sample]:
    """Raises ValueError if a sample of an index is not of a tar of that size."""
    for key, members in samples:
        for suffix, (offset, length) in members.items():
            if not isinstance(key, str) or not isinstance(suffix, str) or not 0 <= offset <= offset + length <= size:
                raise ValueError("the index is damaged")
    return samples


def _list_samples(path: epath.Path) -> list[_Sample]:
    """Reads the headers of a tar."""
    samples: list[_Sample] = []
    name = ""
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                name = member.name
                if not member.isdir():
                    _add_member(samples, member, path)
            file.seek(tar.offset)
            if file.read(_BLOCK) != bytes(_BLOCK):  # the end of an archive; tarfile also stops at damaged headers
                raise tarfile.ReadError("it has no end mark")
    except _ERRORS as error:
        last = f" after {name}" if name else ""
        message = f"{path} is cut short or damaged{last}: {short_message(error)}; copy it again."
        raise error if isinstance(error, UserError) else UserError(message) from None
    if not samples:
        raise UserError(f"{path} has no files named KEY.SUFFIX, such as 000.jpg and 000.json.")
    return samples


def _add_member(samples: list[_Sample], member: tarfile.TarInfo, path: epath.Path) -> None:
    name = posixpath.normpath(member.name)
    if not member.isreg() or member.issparse():
        raise UserError(f"{path} has {member.name!r}, which is no ordinary file; remove it from the archive.")
    if posixpath.isabs(name) or name.split("/")[0] == ".." or "\0" in name or "\\" in name:
        raise UserError(f"{path} has {member.name!r}, a name that leaves the archive; make the archive again.")
    found = _KEY.fullmatch(name)
    if found is None:
        return  # no member of a sample, as for WebDataset
    key, suffix = found.groups()
    if not samples or samples[-1][0] != key:
        samples.append((key, {}))
    if suffix in samples[-1][1]:
        raise UserError(f"{path} has {member.name!r} twice; make the archive again.")
    samples[-1][1][suffix] = (member.offset_data, member.size)
