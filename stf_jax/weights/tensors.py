"""Reads named tensors of a checkpoint one at a time, from safetensors and torch pickles; gguf.py reads GGUF."""

import pathlib
import pickle
import zipfile
from collections.abc import Callable, Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np
from jax import numpy as jnp
from safetensors import SafetensorError, safe_open

from stf_jax.config import UserError
from stf_jax.weights.locate import locate_weights, read_weight_map

_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}
_INTEGERS = ("int64", "int32")


class Entry(NamedTuple):
    """A tensor in a file.

    Attributes:
      file: the file that holds it.
      shape: shape of the values.
      dtype: name of the stored type: numpy's, or the file format's if numpy has no such type.
      read: reads the values; None for an unsupported type.
    """

    file: pathlib.Path
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray] | None


class TensorFile:
    """The tensors of a checkpoint, in one file or several. Only names, shapes and types are kept in memory.

    Attributes:
      entries: the tensors by name.
      notes: remarks for the user on the choice of files.
    """

    def __init__(self, entries: Mapping[str, Entry], notes: tuple[str, ...] = ()) -> None:
        self.entries, self.notes = entries, notes

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self.entries)

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def replace(self, entries: Mapping[str, Entry]) -> "TensorFile":
        """The same tensors, but with these in place of those of the same names, or added."""
        return TensorFile({**self.entries, **entries}, self.notes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entries[name].shape

    def dtype(self, name: str) -> str:
        return self.entries[name].dtype

    def is_floating(self, name: str) -> bool:
        """Whether the tensor has a supported floating-point type."""
        entry = self.entries[name]
        return entry.read is not None and entry.dtype not in _INTEGERS

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same values. Reads both if their shapes are equal."""
        return self.shape(one) == self.shape(other) and np.array_equal(self.read(one), self.read(other))

    def file(self, name: str) -> pathlib.Path:
        return self.entries[name].file

    def check_type(self, name: str) -> None:
        """Raises UserError, naming file and tensor, if the tensor's type is not supported."""
        entry = self.entries[name]
        if entry.read is None:
            raise UserError(f"{entry.file}: tensor {name} has type {entry.dtype}, which is not supported.")

    def read(self, name: str) -> np.ndarray:
        """Reads the values in their stored type. Raises UserError, naming file and tensor, if that fails."""
        self.check_type(name)
        entry = self.entries[name]
        assert entry.read is not None  # as check_type found
        try:
            return entry.read()
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise UserError(f"{entry.file}: tensor {name} cannot be read: {error}.") from None


def open_tensors(source: pathlib.Path, weights_name: str | None = None) -> TensorFile:
    """Opens the files that :func:`stf_jax.weights.locate.locate_weights` chooses: safetensors or torch pickles.

    Pickles are read with ``weights_only=True``: no code in them is run.

    Raises:
      UserError: there are no weights; a file is malformed, truncated or lacks tensors that its index lists; a tensor is
        in two files.
    """
    located = locate_weights(source, weights_name)
    if located.files[0].suffix == ".gguf":
        raise UserError(f"{located.files[0]} is a GGUF file: import it first (python -m stf_jax.convert import).")
    read = {".safetensors": list_safetensors, ".bin": _list_pickle}[located.files[0].suffix]
    entries: dict[str, Entry] = {}
    for file in located.files:
        for name, entry in read(file).items():
            if name in entries:
                raise UserError(f"Tensor {name} is both in {entries[name].file} and in {file}: keep the right one.")
            entries[name] = entry
    if located.index is not None:
        for name, shard in read_weight_map(located.index).items():
            if name not in entries:
                raise UserError(f"{located.index} places tensor {name} in {shard}, which does not contain it.")
    return TensorFile(entries, located.notes)


def cast(value: np.ndarray, dtype: str) -> tuple[np.ndarray, int]:
    """Casts values to ``dtype`` (empty: no cast); returns them and how many overflowed to infinity."""
    target = jnp.dtype(dtype or value.dtype)
    if target == value.dtype:
        return value, 0
    with np.errstate(over="ignore"):
        result = value.astype(target)
    if jnp.finfo(target).max >= jnp.finfo(value.dtype).max:
        return result, 0
    return result, int(np.isinf(result).sum()) - int(np.isinf(value).sum())


def format_overflow(overflowed: Mapping[str, int]) -> list[str]:
    """Lines of a report on values that overflowed to infinity, counted by tensor; empty if none did."""
    if not overflowed:
        return []
    return [
        f"WARNING: {sum(overflowed.values()):,} values of {len(overflowed)} tensors ({next(iter(overflowed))}, …) "
        "overflowed to infinity in that type; use --dtype=bfloat16 or float32 instead"
    ]


def list_safetensors(file: pathlib.Path) -> dict[str, Entry]:
    """Returns the tensors of a safetensors file by name. Raises UserError if it is malformed."""
    entries: dict[str, Entry] = {}
    try:
        with safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                view = tensors.get_slice(name)
                dtype = view.get_dtype()

                def read(name: str = name) -> np.ndarray:
                    with safe_open(file, framework="numpy") as tensors:
                        return tensors.get_tensor(name)

                reader = read if dtype in _TYPES else None
                entries[name] = Entry(file, tuple(view.get_shape()), _TYPES.get(dtype, dtype), reader)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read as safetensors: {error}; download it again.") from None
    return entries


_UNREADABLE = (
    pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError,
    AttributeError, AssertionError, zipfile.BadZipFile,
)  # fmt: skip


def _list_pickle(file: pathlib.Path) -> dict[str, Entry]:
    try:
        import torch
    except ImportError:
        raise UserError(f"{file} is a torch pickle: install torch to read it.") from None
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                    raise UserError(f"{file} is compressed, which torch never does: it may be a zip bomb.")
        try:
            values = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files from before torch 1.6 cannot be memory-mapped
            values = torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except _UNREADABLE:  # torch's own message suggests allowing code
        raise UserError(
            f"{file} cannot be read as plain weights (no code in it was run): it is damaged or holds more than tensors."
        ) from None
    is_named = isinstance(values, dict) and all(isinstance(name, str) for name in values)
    if not is_named or not all(isinstance(value, torch.Tensor) for value in values.values()):
        raise UserError(f"{file} holds something other than named tensors.")

    def entry(name: str, value: torch.Tensor) -> Entry:
        dtype = str(value.dtype).removeprefix("torch.")

        def read() -> np.ndarray:
            tensor = value.detach().contiguous()
            if dtype == "bfloat16":  # which numpy lacks
                return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
            return tensor.numpy()

        return Entry(file, tuple(value.shape), dtype, read if dtype in _TYPES.values() else None)

    return {name: entry(name, value) for name, value in values.items()}
