"""Finds the values of a Parquet column in its file, so that one can be read without decoding its group of rows.

pyarrow decodes complete groups: 50 MB to read an image of 0.2 MB. But in a plain page the values follow each other,
each after its length, and ``datasets`` writes images in such pages, not compressed. The format is described in
https://parquet.apache.org/docs/file-format.
"""

import mmap
from typing import Any

import numpy as np
from etils import epath

_DATA_PAGE, _PLAIN = 0, 0  # a kind of page, and an encoding
_KIND, _SIZE, _DATA_HEADER, _ENCODING = 1, 3, 5, 2  # fields of a page's header, and of its part
_LENGTH = 4  # bytes of a length


def find_values(file: epath.Path, column: Any, levels: tuple[int, int]) -> np.ndarray | None:
    """Finds the values of a column of a group in a local file.

    Args:
      column: pyarrow's metadata of the column in the group.
      levels: the highest repetition and definition level of the column.

    Returns:
      int64 [V, 2], where each value begins and its bytes; None if pages are compressed, not plain, or damaged.
    """
    if column.has_dictionary_page or column.compression != "UNCOMPRESSED":
        return None
    values: list[tuple[int, int]] = []
    at = column.data_page_offset
    end = at + column.total_compressed_size
    try:
        with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            while at < end:
                header, at = _read_struct(content, at)
                page_end = at + header[_SIZE]
                if header[_KIND] != _DATA_PAGE or header[_DATA_HEADER][_ENCODING] != _PLAIN or page_end > end:
                    return None
                for level in levels:  # their runs come first, each after its length
                    at += _LENGTH + int.from_bytes(content[at : at + _LENGTH], "little") if level else 0
                while at < page_end:
                    size = int.from_bytes(content[at : at + _LENGTH], "little")
                    values.append((at + _LENGTH, size))
                    at += _LENGTH + size
                if at != page_end:
                    return None
    except (
        IndexError,
        KeyError,
        TypeError,
        ValueError,
        OSError,
        RecursionError,
    ):  # pyarrow reports what is wrong, if anything is
        return None
    return np.array(values, np.int64).reshape(-1, 2)


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
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
    raise ValueError("no integer of 64 bits")
