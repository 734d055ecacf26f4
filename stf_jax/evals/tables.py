"""Tables of questions in Parquet files, as data sets are published on the Hub.

Texts are read at once; images only when they are opened, from memory-mapped files.
"""

import collections
import dataclasses
import functools
import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import PIL.Image
from etils import epath

from stf_jax.config import UserError, short_message
from stf_jax.data.image import open_image
from stf_jax.data.records import BadRow
from stf_jax.data.sources.tables import ERRORS, open_source

Kind = Literal["text", "integer", "list of text", "image", "list of image"]
Columns = Mapping[str, Sequence[Kind]]  # by name, the kinds that a column may have
_CACHED_GROUPS = 2  # of rows, decoded: threads that open images in order work on two neighbors at most


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table, without its images."""

    number: int  # its position in all files, from 0
    name: str  # for messages: the file, and the row in it from 1
    values: Mapping[str, Any] = dataclasses.field(hash=False)

    def __getitem__(self, column: str) -> Any:
        return self.values[column]

    def check_complete(self) -> None:
        """Raises UserError if a value is missing, or a list empty or incomplete."""
        for column, value in self.values.items():
            if value is None or value == [] or (isinstance(value, list) and None in value):
                raise UserError(f"{self.name} has no {column}.")


class Table:
    """The rows of Parquet files with the same columns.

    Attributes:
      files: the files, in order.
      rows: the values of the columns, without images.
    """

    def __init__(self, files: Sequence[epath.Path], columns: Columns) -> None:
        """Reads the text of all rows.

        Args:
          files: the files, in order.
          columns: the columns that are needed, and the kinds that each may have; others are ignored.

        Raises:
          UserError: a file cannot be read, lacks a column, or has one of another kind; there are no rows; pyarrow is
            not installed.
        """
        self.files = files
        self._shards = [_Shard(file, columns) for file in files]
        self._starts: list[int] = []
        self.rows: list[Row] = []
        for shard in self._shards:
            self._starts.append(len(self.rows))
            self.rows += shard.read_rows(len(self.rows))
        if not self.rows:
            raise UserError(f"{' and '.join(map(str, files))} contains no questions.")
        self._lock = threading.Lock()
        self._groups: collections.OrderedDict[tuple[int, int, str], Sequence[Any]] = collections.OrderedDict()

    def image_opener(self, row: Row, column: str) -> Callable[[], PIL.Image.Image]:
        """Returns an opener of a row's image: the value of a column, or the only one of its list."""
        return _TableImage(self, row, column)

    def read_image(self, row: Row, column: str) -> bytes:
        """Reads the file of a row's image. Raises BadRow if there is none, or if it cannot be read."""
        index = max(index for index, start in enumerate(self._starts) if start <= row.number)
        group, offset = self._shards[index].locate(row.number - self._starts[index])
        with self._lock:  # a Parquet file can only be read by one thread at a time
            key = (index, group, column)
            if key not in self._groups:
                try:
                    self._groups[key] = self._shards[index].read_group(group, column)
                except ERRORS as error:
                    message = f"The image of {row.name} cannot be read: {short_message(error)}."
                    raise BadRow("corrupt", message, row.name) from None
            self._groups.move_to_end(key)
            while len(self._groups) > _CACHED_GROUPS:
                self._groups.popitem(last=False)
            value = self._groups[key][offset].as_py()
        if isinstance(value, list):
            if len(value) != 1:
                raise BadRow("missing", f"{row.name} has {len(value)} images, not one.", row.name)
            value = value[0]
        if isinstance(value, dict):
            value = value["bytes"]
        if not value:
            raise BadRow("missing", f"{row.name} contains no image.", row.name)
        return value


@dataclasses.dataclass(frozen=True, eq=False)
class _TableImage:
    """Opens an image in a table, in RGB.

    As in lmms-eval, transparency is dropped, which shows the colors below it. Images of other benchmarks become white
    there.

    Two are equal if their files are: a data set repeats an image in the row of each of its questions.
    """

    table: Table
    row: Row
    column: str

    def __call__(self) -> PIL.Image.Image:
        return open_image(self.table.read_image(self.row, self.column), f"of {self.row.name}").convert("RGB")

    @functools.cached_property
    def content(self) -> bytes | int:
        """The hash of the file, or the row's number if it cannot be read."""
        try:
            return hashlib.sha256(self.table.read_image(self.row, self.column)).digest()
        except BadRow:
            return self.row.number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _TableImage) and self.content == other.content

    def __hash__(self) -> int:
        return hash(self.content)


class _Shard:
    """One Parquet file."""

    def __init__(self, file: epath.Path, columns: Columns) -> None:
        try:
            import pyarrow.parquet  # takes half a second, and no other files need it
        except ImportError:
            raise UserError(f"{file} is a Parquet file, which needs a package: pip install pyarrow") from None
        self._file = file
        try:
            self._parquet = pyarrow.parquet.ParquetFile(open_source(file))
        except ERRORS as error:
            raise UserError(f"{file} cannot be read as Parquet: {short_message(error)}; download it again.") from None
        schema = self._parquet.schema_arrow
        for column, kinds in columns.items():
            if column not in schema.names:
                raise UserError(f"{file} has no column {column!r}; it has {', '.join(schema.names)}.")
            kind = _describe(schema.field(column).type)
            if kind not in kinds:
                raise UserError(f"{file}: column {column!r} is of type {kind}, not {' or '.join(kinds)}.")
        self._columns = [name for name, kinds in columns.items() if not any(kind.endswith("image") for kind in kinds)]
        self._group_sizes = [
            self._parquet.metadata.row_group(group).num_rows for group in range(self._parquet.num_row_groups)
        ]

    def read_rows(self, start: int) -> list[Row]:
        """Reads all columns but the images; the first row gets the number ``start``."""
        try:
            found = self._parquet.read(columns=self._columns).to_pylist()
        except ERRORS as error:
            raise UserError(f"{self._file} cannot be read: {short_message(error)}; download it again.") from None
        return [Row(start + number, f"{self._file}, row {number + 1}", values) for number, values in enumerate(found)]

    def locate(self, number: int) -> tuple[int, int]:
        """Returns a row's group, and its position there."""
        group = 0
        while number >= self._group_sizes[group]:
            number -= self._group_sizes[group]
            group += 1
        return group, number

    def read_group(self, group: int, column: str) -> Sequence[Any]:
        """Reads the images of a group of rows, without decoding them."""
        return self._parquet.read_row_group(group, columns=[column]).column(column)


def _describe(kind: Any) -> str:
    """Returns the kind of a column's type, or the type's name if it is none of them."""
    import pyarrow.types as types

    if types.is_string(kind) or types.is_large_string(kind):
        return "text"
    if types.is_integer(kind):
        return "integer"
    if types.is_list(kind) or types.is_large_list(kind):
        return f"list of {_describe(kind.value_type)}"
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return "image" if types.is_binary(kind) or types.is_large_binary(kind) else str(kind)
