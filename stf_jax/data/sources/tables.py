"""Reads rows of tables with embedded images: Parquet files, and folders that ``datasets`` wrote with ``save_to_disk``.

Texts are decoded a group of rows at a time, and recent groups are kept. An image is read alone: its place in a Parquet
file is found when the first image of its group is read (pages.py). Of compressed images the group is decoded.
"""

import abc
import bisect
import collections
import functools
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from etils import epath

from stf_jax.config import UserError, short_message
from stf_jax.data.records import BadRow, Embedded
from stf_jax.data.rows import PAIRS_KEY, TURN_KEYS
from stf_jax.data.sources.containers import find_files, name_row
from stf_jax.data.sources.pages import find_values
from stf_jax.files import in_bucket, local_copy, read_json, to_path

if TYPE_CHECKING:
    import pyarrow

STATE = "state.json"  # written last by save_to_disk
SPLITS = "dataset_dict.json"  # in a folder of several that save_to_disk wrote
_ARROW_MAGIC = b"ARROW1"  # of Arrow's file format; save_to_disk writes streams
ERRORS = (OSError, ValueError, NotImplementedError)  # what pyarrow raises for files that it cannot read
_IMAGE_KEYS = ("image", "images")
_CACHED_BYTES = 2**28  # of decoded groups
_BLOCK = 16  # rows converted to Python at once: a neighbor is often next, but need not be
_METADATA = 64  # files whose footers are kept
_last = threading.local()  # the group of images that a thread decoded last: prepare reads them in order


def open_source(file: epath.Path) -> Any:
    """Opens a file for pyarrow, which maps it into memory unless it is in a bucket."""
    import pyarrow

    return file.open("rb") if in_bucket(file) else pyarrow.memory_map(os.fspath(file))


def is_parquet(magic: bytes) -> bool:
    """Whether a file that begins with these bytes is a Parquet file."""
    return magic.startswith(b"PAR1")


class _Column(NamedTuple):
    """A column with images: whether a value is a list of them, and whether it has their paths."""

    is_list: bool
    has_path: bool


class _File(abc.ABC):
    """A table in one file.

    Attributes:
      sizes: the number of rows of each group.
      columns: the columns with images, by name.
      has_paths: whether images are paths instead.
    """

    sizes: Sequence[int]
    columns: Mapping[str, _Column]
    has_paths: bool

    def __init__(self, path: epath.Path, schema: "pyarrow.Schema") -> None:
        names = schema.names
        if not {*TURN_KEYS, PAIRS_KEY} & {*names}:
            wanted = f"{', '.join(TURN_KEYS)} or {PAIRS_KEY}"
            raise UserError(f"{path} has no column {wanted}; it has {', '.join(names)}.")
        self.path, self.names = path, names
        self.columns = {field.name: column for field in schema if (column := _find_images(field.type)) is not None}
        self.has_paths = any(key in names and key not in self.columns for key in _IMAGE_KEYS)

    @abc.abstractmethod
    def read_texts(self, group: int, keys: Sequence[str] | None = None) -> "pyarrow.Table":
        """Reads the columns of a group, or some of them, without the images in them."""

    @abc.abstractmethod
    def read_image(self, group: int, row: int, column: str, number: int, texts: "pyarrow.Table") -> bytes | None:
        """Reads an image of a row of a group, whose texts are given."""


class _ParquetFile(_File):
    def __init__(self, path: epath.Path, metadata: Callable[[epath.Path], Any]) -> None:
        self._metadata = metadata
        try:
            found = metadata(path)
            schema = found.schema.to_arrow_schema()
        except ERRORS as error:
            raise UserError(f"{path} cannot be read as Parquet: {short_message(error)}; download it again.") from None
        super().__init__(path, schema)
        self.sizes = [found.row_group(group).num_rows for group in range(found.num_row_groups)]
        leaves = [found.schema.column(i) for i in range(len(found.schema))]
        self._leaves: dict[str, list[str]] = {}  # of each column, without those with the images' files
        self._files: dict[str, int] = {}  # the leaf with the images' files, of each column that has another one
        for i, leaf in enumerate(leaves):
            name = leaf.path.split(".")[0]
            column = self.columns.get(name)
            if column is not None and column.has_path and leaf.path.endswith(".bytes"):
                self._files[name] = i
            else:
                self._leaves.setdefault(name, []).append(leaf.path)
        self._places: dict[tuple[int, str], tuple[np.ndarray, np.ndarray] | None] = {}

    def _read(self, group: int, leaves: Sequence[str]) -> "pyarrow.Table":
        import pyarrow.parquet

        source = open_source(self.path)
        with pyarrow.parquet.ParquetFile(source, metadata=self._metadata(self.path)) as parquet, source:
            return parquet.read_row_group(group, columns=list(leaves), use_threads=False)

    def read_texts(self, group: int, keys: Sequence[str] | None = None) -> "pyarrow.Table":
        names = self._leaves if keys is None else [key for key in keys if key in self._leaves]
        return self._read(group, [leaf for name in names for leaf in self._leaves[name]])

    def read_image(self, group: int, row: int, column: str, number: int, texts: "pyarrow.Table") -> bytes | None:
        if (group, column) not in self._places:
            self._places[group, column] = self._find_places(group, column, texts)
        found = self._places[group, column]
        if found is not None:
            begins, places = found
            begin, size = places[begins[row] + number].tolist()
            with open(self.path, "rb") as file:
                return os.pread(file.fileno(), size, begin)
        if getattr(_last, "at", None) != (self, group, column):
            _last.values = self._read(group, [self._metadata(self.path).schema.column(self._files[column]).path])
            _last.at = self, group, column
        value = _last.values.column(column)[row].as_py()
        return (value[number] if self.columns[column].is_list else value)["bytes"]

    def _find_places(self, group: int, column: str, texts: "pyarrow.Table") -> tuple[np.ndarray, np.ndarray] | None:
        """Finds the images of a group in the file: the first of each row, and the places; None if that fails."""
        import pyarrow.compute

        if in_bucket(self.path):
            return None
        values = texts.column(column)
        if self.columns[column].is_list:
            counts = pyarrow.compute.list_value_length(values).fill_null(0).to_numpy()
        else:
            counts = values.is_valid().to_numpy().astype(np.int64)
        begins = np.concatenate([[0], np.cumsum(counts)])
        leaf, metadata = self._files[column], self._metadata(self.path)
        kind = metadata.schema.column(leaf)
        levels = kind.max_repetition_level, kind.max_definition_level
        places = find_values(self.path, metadata.row_group(group).column(leaf), levels)
        return (begins, places) if places is not None and len(places) == begins[-1] else None


class _ArrowFile(_File):
    """A file of batches; the operating system reads what is used."""

    def __init__(self, path: epath.Path) -> None:
        import pyarrow

        try:
            source = pyarrow.memory_map(os.fspath(path))
            is_file = source.read(len(_ARROW_MAGIC)) == _ARROW_MAGIC
            source.seek(0)
            opened = pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)
            table = opened.read_all()
        except ERRORS as error:
            raise UserError(f"{path} cannot be read as Arrow: {short_message(error)}; save it again.") from None
        super().__init__(path, table.schema)
        self._batches = table.to_batches()
        self.sizes = [len(batch) for batch in self._batches]

    def read_texts(self, group: int, keys: Sequence[str] | None = None) -> "pyarrow.Table":
        import pyarrow

        batch = self._batches[group]
        names = self.names if keys is None else [key for key in keys if key in self.names]
        values = [_leave_files_out(batch.column(x), self.columns.get(x)) for x in names]
        return pyarrow.Table.from_arrays(values, names)

    def read_image(self, group: int, row: int, column: str, number: int, texts: "pyarrow.Table") -> bytes | None:
        value = self._batches[group].column(column)[row]
        return (value[number] if self.columns[column].is_list else value)["bytes"].as_py()


def _find_images(kind: "pyarrow.DataType") -> _Column | None:
    """Returns what a column of that type has, if it has images: files, or pairs of a file and a path; or lists."""
    import pyarrow.types as types

    is_list = types.is_list(kind) or types.is_large_list(kind)
    kind = kind.value_type if is_list else kind
    has_path = types.is_struct(kind) and kind.get_field_index("path") >= 0
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    is_file = types.is_binary(kind) or types.is_large_binary(kind)
    return _Column(is_list, has_path) if is_file else None


def _leave_files_out(values: "pyarrow.Array", column: _Column | None) -> "pyarrow.Array":
    """Returns an array without the files of its images, if it has their paths; nothing is copied."""
    import pyarrow

    if column is None or not column.has_path:
        return values
    if column.is_list:
        inner = _leave_files_out(values.values, column._replace(is_list=False))
        kind = pyarrow.LargeListArray if pyarrow.types.is_large_list(values.type) else pyarrow.ListArray
        return kind.from_arrays(values.offsets, inner, mask=values.is_null() if values.null_count else None)
    return pyarrow.StructArray.from_arrays([values.field("path")], ["path"], mask=values.is_null())


class TableRows:
    """Rows of tables (containers.py)."""

    def __init__(self, name: str, files: Sequence[_File]) -> None:
        """
        Args:
          name: the path that the user gave.
          files: in order.
        """
        self.name, self._files = name, files
        self.files = [file.path for file in files]
        self._names = [os.fspath(file.path) for file in files]
        self.needs_folder = any(file.has_paths for file in files)
        groups = [(number, group, size) for number, file in enumerate(files) for group, size in enumerate(file.sizes)]
        self._groups = [group[:2] for group in groups]
        self._begins = [0, *itertools.accumulate(size for *_, size in groups)]
        self._file_begins = [0, *itertools.accumulate(sum(file.sizes) for file in files)]
        self._texts: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._bytes = 0  # of these texts
        self._lock = threading.Lock()
        self._local = threading.local()

    def __reduce__(self) -> Any:
        return _reopen, (self.name,)

    def __len__(self) -> int:
        return self._begins[-1]

    def locate(self, index: int) -> tuple[str, int]:
        file = bisect.bisect_right(self._file_begins, index) - 1
        return self._names[file], index - self._file_begins[file]

    def _locate_group(self, index: int) -> tuple[int, _File, int, int]:
        """Returns the number of a row's group among all, its file, its number there, and the row's in the group."""
        position = bisect.bisect_right(self._begins, index) - 1
        number, group = self._groups[position]
        return position, self._files[number], group, index - self._begins[position]

    def __getitem__(self, index: int) -> dict[str, Any]:
        position, file, group, row = self._locate_group(index)
        block, offset = divmod(row, _BLOCK)
        if getattr(self._local, "at", None) != (position, block):
            texts = self._read_texts(position, file, group, index)
            self._local.rows = texts.slice(block * _BLOCK, _BLOCK).to_pylist()
            self._local.at = position, block
        values = dict(self._local.rows[offset])
        where = name_row(self, index)
        for name, column in file.columns.items():
            found = values[name] if column.is_list else [values[name]]
            images = [
                self._embed(value, f"{i} of {where}", functools.partial(self.read_image, index, name, i))
                for i, value in enumerate(found or ())
            ]
            values[name] = images if column.is_list else images[0]
        return values

    @staticmethod
    def _embed(value: Any, name: str, read: Callable[[], bytes | None]) -> Embedded | None:
        """Returns the image of a value without its file; of a file itself, if there is no path."""
        if value is None:
            return None
        if isinstance(value, dict) and "bytes" not in value:
            return Embedded(name, read, value["path"] or "")
        content = value["bytes"] if isinstance(value, dict) else value
        return Embedded(name, functools.partial(_give, content))

    def _read_texts(self, position: int, file: _File, group: int, index: int) -> "pyarrow.Table":
        with self._lock:
            if position in self._texts:
                self._texts.move_to_end(position)
                return self._texts[position]
        try:
            texts = file.read_texts(group)
        except ERRORS as error:
            where = name_row(self, index)
            raise BadRow("corrupt", f"R{where[1:]} cannot be read: {short_message(error)}.") from None
        with self._lock:
            if position not in self._texts:  # another thread may have read it
                self._bytes += texts.nbytes
            self._texts[position] = texts
            while len(self._texts) > 1 and self._bytes > _CACHED_BYTES:
                self._bytes -= self._texts.popitem(last=False)[1].nbytes
        return texts

    def read_image(self, index: int, column: str, number: int) -> bytes | None:
        """Reads the file of an image of a row. Raises BadRow if it cannot be read."""
        position, file, group, row = self._locate_group(index)
        texts = self._read_texts(position, file, group, index)
        try:
            return file.read_image(group, row, column, number, texts)
        except ERRORS as error:
            name = f"{number} of {name_row(self, index)}"
            raise BadRow("corrupt", f"Image {name} cannot be read: {short_message(error)}.", name) from None

    def select(self, keys: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        for number, group in self._groups:
            file = self._files[number]
            if any(key in file.names for key in keys):
                try:
                    yield from file.read_texts(group, keys).to_pylist()
                    continue
                except ERRORS:
                    pass  # reading its rows reports it
            yield from itertools.repeat({}, file.sizes[group])


def open_table(name: str) -> TableRows:
    """Opens a Parquet file, a folder or pattern of them, or a folder of save_to_disk.

    Raises:
      UserError: a file cannot be read, or has no column of conversations; the folder has several splits; pyarrow is
        not installed.
    """
    try:
        import pyarrow.parquet  # takes half a second, and JSON does not need it
    except ImportError:
        raise UserError(f"{name} needs a package that is not installed: pip install pyarrow") from None
    path = to_path(name)
    if path.is_dir() and (path / SPLITS).exists():
        names = sorted(each.name for each in path.iterdir() if each.is_dir())
        raise UserError(f"{name} has several splits; choose one: {', '.join(os.path.join(name, x) for x in names)}.")
    if path.is_dir() and (path / STATE).exists():
        folder = epath.Path(local_copy(path))
        return TableRows(name, [_ArrowFile(folder / file) for file in _list_arrow_files(path)])
    files = find_files(name, is_parquet)
    splits = sorted({file.name.partition("-")[0] for file in files if "-of-" in file.name})
    if path.is_dir() and len(splits) > 1:
        patterns = " or ".join(os.path.join(name, f"{split}-*") for split in splits)
        raise UserError(f"{name} has Parquet files of several splits; choose one: {patterns}.")

    @functools.lru_cache(maxsize=_METADATA)
    def metadata(file: epath.Path) -> Any:
        with open_source(file) as source:
            return pyarrow.parquet.read_metadata(source)

    return TableRows(name, [_ParquetFile(file, metadata) for file in files])


def _give(content: bytes | None) -> bytes | None:
    return content


@functools.lru_cache(maxsize=8)  # prepare's workers unpickle rows with every shard
def _reopen(name: str) -> TableRows:
    return open_table(name)


def _list_arrow_files(folder: epath.Path) -> list[str]:
    """Returns the names of the files of a folder of save_to_disk."""
    state = read_json(folder / STATE)
    listed = state.get("_data_files") if isinstance(state, dict) else None
    files = listed if isinstance(listed, list) else []
    found = [file.get("filename") for file in files if isinstance(file, dict)]
    names = [name for name in found if isinstance(name, str) and name == os.path.basename(name)]
    if not names or len(names) != len(files):
        raise UserError(f"{folder / STATE} does not list the files of a data set; save it again with save_to_disk.")
    for name in names:
        if not (folder / name).exists():
            raise UserError(f"{folder / name} is missing, but {STATE} lists it; copy the folder again.")
    return names
