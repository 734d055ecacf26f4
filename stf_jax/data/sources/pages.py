"""Finds the values of a Parquet column in its file, so that one can be read without decoding its group of rows.

pyarrow decodes complete groups: 50 MB to read an image of 0.2 MB. But in a plain page the values follow each other, each
after its length, and ``datasets`` writes images in such pages. https://parquet.apache.org/docs/file-format describes
them.
"""

import dataclasses
import mmap
import os
from typing import Any

import numpy as np
from etils import epath

_DATA_PAGE, _PLAIN = 0, 0  # a kind of page, and an encoding
_KIND, _FULL_SIZE, _SIZE, _DATA_HEADER, _ENCODING = 1, 2, 3, 5, 2  # fields of a page's header, and of its part
_LENGTH = 4  # bytes of a length
_STORED = "UNCOMPRESSED"


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the values of a column of a group are.

    Attributes:
      pages: int64 [P, 3]: where a page begins in the file, its bytes there, and its bytes when uncompressed.
      values: int64 [V, 3]: the page of a value, where it begins in the uncompressed page, and its bytes.
      codec: the name of the compression.
    """

    pages: np.ndarray
    values: np.ndarray
    codec: str

    def __len__(self) -> int:
        return len(self.values)

    def read(self, file: epath.Path, index: int) -> bytes:
        """Reads a value."""
        page, begin, size = self.values[index].tolist()
        at, stored, full = self.pages[page].tolist()
        with open(file, "rb") as opened:
            if self.codec == _STORED:
                return os.pread(opened.fileno(), size, at + begin)
            return _decompress(os.pread(opened.fileno(), stored, at), self.codec, full)[begin : begin + size]


def find_values(file: epath.Path, column: Any, levels: tuple[int, int]) -> Places | None:
    """Finds the values of a column of a group in a local file. Returns None if its pages are not plain, or damaged.

    Args:
      column: pyarrow's metadata of the column in the group.
      levels: the highest repetition and definition level of the column.
    """
    pages: list[tuple[int, int, int]] = []
    values: list[tuple[int, int, int]] = []
    at, codec = column.data_page_offset, column.compression
    end = at + column.total_compressed_size
    if column.has_dictionary_page:
        return None
    try:
        with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            while at < end:
                header, at = _read_struct(content, at)
                stored, full = header[_SIZE], header[_FULL_SIZE]
                if header[_KIND] != _DATA_PAGE or header[_DATA_HEADER][_ENCODING] != _PLAIN or at + stored > end:
                    return None
                if codec == _STORED:
                    places = _find_lengths(content, at, at + stored, levels)
                else:
                    places = _find_lengths(_decompress(content[at : at + stored], codec, full), 0, full, levels)
                values += [(len(pages), begin, size) for begin, size in places]
                pages.append((at, stored, full))
                at += stored
    except (IndexError, KeyError, TypeError, ValueError, OSError):  # pyarrow reports what is wrong, if anything is
        return None
    return Places(np.array(pages, np.int64), np.array(values, np.int64).reshape(-1, 3), codec)


def _find_lengths(data: bytes | mmap.mmap, start: int, end: int, levels: tuple[int, int]) -> list[tuple[int, int]]:
    """Returns where the values of a page begin, from its start, and their sizes."""
    at, places = start, []
    for level in levels:  # their runs come first, each after its length
        if level:
            at += _LENGTH + int.from_bytes(data[at : at + _LENGTH], "little")
    while at < end:
        size = int.from_bytes(data[at : at + _LENGTH], "little")
        places.append((at + _LENGTH - start, size))
        at += _LENGTH + size
    if at != end:
        raise ValueError("the values do not fill the page")
    return places


def _decompress(content: bytes, codec: str, size: int) -> bytes:
    import pyarrow

    return pyarrow.decompress(content, size, codec.lower(), asbytes=True)


def _read_struct(data: mmap.mmap, at: int) -> tuple[dict[int, Any], int]:
    """Reads a struct of Thrift's compact protocol, without lists; returns its fields by number, and where it ends."""
    fields: dict[int, Any] = {}
    number = 0
    while head := data[at]:
        at += 1
        if head >> 4:
            number += head >> 4
        else:
            number, at = _read_integer(data, at)
        kind = head & 15
        if kind in (1, 2):  # true, false
            fields[number] = kind == 1
        elif kind in (4, 5, 6):  # integers
            fields[number], at = _read_integer(data, at)
        elif kind == 8:  # bytes
            size, at = _read_varint(data, at)
            at += size
        elif kind == 12:
            fields[number], at = _read_struct(data, at)
        else:
            raise ValueError("no header of a page")
    return fields, at + 1


def _read_integer(data: mmap.mmap, at: int) -> tuple[int, int]:
    value, at = _read_varint(data, at)
    return value >> 1 ^ -(value & 1), at


def _read_varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
