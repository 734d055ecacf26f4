"""Named tensors of a checkpoint on disk, read one at a time: safetensors and torch's pickles; GGUF is in gguf.py."""

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
from stf_jax.weights.locate import locate_weights, weight_map

_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}
_INTEGERS = ("int64", "int32")


class Entry(NamedTuple):
    """A tensor.

    Attributes:
      file: that holds it.
      shape: of the values.
      dtype: name of its type there: numpy's, or the file format's for one that numpy lacks.
      read: gives the values; None for a type that is not known.
    """

    file: pathlib.Path
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray] | None


class Tensors:
    """The tensors of a checkpoint. Nothing but names, shapes and types is held.

    Attributes:
      notes: what a user should know of the files that were chosen.
    """

    def __init__(self, entries: dict[str, Entry], notes: tuple[str, ...] = ()):
        self._entries, self.notes = entries, notes

    @property
    def names(self) -> list[str]:
        """Every tensor's."""
        return list(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> str:
        return self._entries[name].dtype

    def is_floating(self, name: str) -> bool:
        """Whether its values can be read, and are floating-point numbers."""
        entry = self._entries[name]
        return entry.read is not None and entry.dtype not in _INTEGERS

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same values; both are read, where their shapes are equal."""
        return self.shape(one) == self.shape(other) and np.array_equal(self.read(one), self.read(other))

    def file(self, name: str) -> pathlib.Path:
        return self._entries[name].file

    def check_type(self, name: str) -> None:
        """Raises UserError, naming file and tensor, where its type is not known."""
        entry = self._entries[name]
        if entry.read is None:
            raise UserError(f"{entry.file}: tensor {name} has type {entry.dtype}, which is not known.")

    def read(self, name: str) -> np.ndarray:
        """The values, in their own type. Raises UserError, naming file and tensor, where they cannot be read."""
        self.check_type(name)
        entry = self._entries[name]
        try:
            return entry.read()
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise UserError(f"{entry.file}: tensor {name} cannot be read: {error}.") from None


def open_tensors(source: pathlib.Path, named: str | None = None) -> Tensors:
    """Opens the files that :func:`stf_jax.weights.locate.locate_weights` chooses: safetensors or torch's pickles.

    Pickles are read with ``weights_only=True``: no code in them is run.

    Raises:
      UserError: no such file; one that is malformed, cut short or misses tensors that its index names; a tensor in two
        files.
    """
    located = locate_weights(source, named)
    if located.files[0].suffix == ".gguf":
        raise UserError(f"{located.files[0]} is a GGUF: import it first (python -m stf_jax.convert import).")
    read = {".safetensors": safetensors_entries, ".bin": _pickle}[located.files[0].suffix]
    entries: dict[str, Entry] = {}
    for file in located.files:
        for name, entry in read(file).items():
            if name in entries:
                raise UserError(f"Tensor {name} is both in {entries[name].file} and in {file}: keep the right one.")
            entries[name] = entry
    if located.index is not None:
        for name, file in weight_map(located.index).items():
            if name not in entries:
                raise UserError(f"{located.index} places tensor {name} in {file}, which does not hold it.")
    return Tensors(entries, located.notes)


def cast(value: np.ndarray, dtype: str) -> tuple[np.ndarray, int]:
    """The values in that type (empty: in their own), and how many became infinite by it."""
    wanted = jnp.dtype(dtype or value.dtype)
    if wanted == value.dtype:
        return value, 0
    with np.errstate(over="ignore"):
        result = value.astype(wanted)
    if jnp.finfo(wanted).max >= jnp.finfo(value.dtype).max:
        return result, 0
    return result, int(np.isinf(result).sum()) - int(np.isinf(value).sum())


def overflow_lines(overflowed: Mapping[str, int]) -> list[str]:
    """What a report tells people of values that became infinite, counted by tensor; empty where none did."""
    if not overflowed:
        return []
    return [
        f"WARNING: {sum(overflowed.values()):,} values of {len(overflowed)} tensors ({next(iter(overflowed))}, …) are "
        "beyond the range of that type and became infinite; use --dtype=bfloat16 or float32 instead"
    ]


def safetensors_entries(file: pathlib.Path) -> dict[str, Entry]:
    """The tensors of such a file, by name. Raises UserError where it is malformed."""
    entries = {}
    try:
        with safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                view = tensors.get_slice(name)
                kind = view.get_dtype()

                def read(name=name):
                    with safe_open(file, framework="numpy") as tensors:
                        return tensors.get_tensor(name)

                known = read if kind in _TYPES else None
                entries[name] = Entry(file, tuple(view.get_shape()), _TYPES.get(kind, kind), known)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read as safetensors: {error}; fetch it again.") from None
    return entries


_UNREADABLE = (
    pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError,
    AttributeError, AssertionError, zipfile.BadZipFile,
)  # fmt: skip


def _pickle(file):
    try:
        import torch
    except ImportError:
        raise UserError(f"{file} is a torch pickle: install torch to read it.") from None
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                    raise UserError(f"{file} is compressed, as none of torch's is, and may be a bomb; fetch another.")
        try:
            values = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # a file of before torch 1.6 cannot be mapped
            values = torch.load(file, map_location="cpu", weights_only=True)
    except _UNREADABLE:  # torch's own words would advise to allow code
        raise UserError(
            f"{file} cannot be read as weights alone (nothing in it was run): it is damaged or holds more than tensors."
        ) from None
    named = isinstance(values, dict) and all(isinstance(name, str) for name in values)
    if not named or not all(isinstance(value, torch.Tensor) for value in values.values()):
        raise UserError(f"{file} holds something other than named tensors.")

    def entry(name, value):
        dtype = str(value.dtype).removeprefix("torch.")

        def read():
            plain = value.detach().contiguous()
            if dtype == "bfloat16":  # numpy has none of its own
                return plain.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
            return plain.numpy()

        return Entry(file, tuple(value.shape), dtype, read if dtype in _TYPES.values() else None)

    return {name: entry(name, value) for name, value in values.items()}
