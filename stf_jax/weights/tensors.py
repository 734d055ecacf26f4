"""Named tensors of a checkpoint on disk, read one at a time: safetensors and torch's pickles; GGUF is in gguf.py."""

import pathlib
import pickle
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from stf_jax.config import UserError
from stf_jax.runtime.files import parse_json

_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}
_POINTER = b"version https://git-lfs"


class Entry(NamedTuple):
    """A tensor: its file, its shape, the name of its type there (numpy's, or a quantised one), and how to read it."""

    file: pathlib.Path
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


class Tensors:
    """The tensors of a checkpoint. Nothing but names, shapes and types is held."""

    def __init__(self, entries: dict[str, Entry]):
        self._entries = entries

    @property
    def names(self) -> list[str]:
        """Every tensor's."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> str:
        return self._entries[name].dtype

    def file(self, name: str) -> pathlib.Path:
        return self._entries[name].file

    def read(self, name: str) -> np.ndarray:
        """The values, in their own type. Raises UserError, naming file and tensor, where they cannot be read."""
        entry = self._entries[name]
        try:
            return entry.read()
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise UserError(f"{entry.file}: tensor {name} cannot be read: {error}.") from None


def open_tensors(source: pathlib.Path) -> Tensors:
    """Opens a folder of safetensors or else of torch's pickles, or one such file.

    Of a folder it takes what transformers would: the files that an index names, or ``model.safetensors``, or
    ``pytorch_model.bin`` likewise; without these, every ``*.safetensors`` or else every ``*.bin``.

    Pickles are read with ``weights_only=True``: no code in them is run.

    Raises:
      UserError: no such file; one that is malformed, cut short or misses tensors that its index names; a tensor in two
        files, or of a type that is not known.
    """
    files = _files(source)
    for file in files:
        with file.open("rb") as opened:
            if opened.read(len(_POINTER)) == _POINTER:
                raise UserError(f"{file} is a Git LFS pointer: fetch the file itself with git lfs pull.")
    read = {".safetensors": safetensors_entries, ".bin": _pickle}[files[0].suffix]
    entries: dict[str, Entry] = {}
    for file in files:
        for name, entry in read(file).items():
            if name in entries:
                raise UserError(f"Tensor {name} is both in {entries[name].file} and in {file}.")
            entries[name] = entry
    if source.is_dir():
        _check_index(source, files, entries)
    return Tensors(entries)


def _files(source):
    if source.is_file():
        if source.suffix not in (".safetensors", ".bin"):
            raise UserError(f"{source} is neither *.safetensors, *.bin nor *.gguf.")
        return [source]
    # What transformers would load; beside it may lie an adapter, another format or an optimizer's state.
    for whole in ("model.safetensors", "pytorch_model.bin"):
        index = source / f"{whole}.index.json"
        if index.is_file():
            return _indexed(index)
        if (source / whole).is_file():
            return [source / whole]
    for pattern in ("*.safetensors", "*.bin"):
        if files := sorted(source.glob(pattern)):
            return files
    raise UserError(f"{source} holds no weights: neither *.safetensors, *.bin nor *.gguf.")


def _indexed(index):
    """The files that an index names, all of which are there."""
    names = sorted(set(_weight_map(index).values()))
    for name in names:
        if pathlib.PurePath(name).name != name:
            raise UserError(f"{index} names {name!r}, which is not a file beside it.")
        if not (index.parent / name).is_file():
            raise UserError(f"{index} names {name}, which is missing.")
    return [index.parent / name for name in names]


def _weight_map(index):
    try:
        named = parse_json(index.read_bytes())["weight_map"]
        if named and all(isinstance(file, str) for file in named.values()):
            return named
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{index} is not an index of weights; fetch it again.")


def _check_index(folder, files, entries):
    for index in folder.glob(f"*{files[0].suffix}.index.json"):
        for name, file in _weight_map(index).items():
            if name not in entries or entries[name].file.name != file:
                raise UserError(f"{index} places tensor {name} in {file}, which does not hold it.")


def safetensors_entries(file: pathlib.Path) -> dict[str, Entry]:
    """The tensors of such a file, by name. Raises UserError where it is malformed or has a type that is not known."""
    entries = {}
    try:
        with safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                view = tensors.get_slice(name)
                if view.get_dtype() not in _TYPES:
                    raise UserError(f"{file}: tensor {name} has type {view.get_dtype()}, which is not known.")

                def read(name=name):
                    with safe_open(file, framework="numpy") as tensors:
                        return tensors.get_tensor(name)

                entries[name] = Entry(file, tuple(view.get_shape()), _TYPES[view.get_dtype()], read)
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
        if dtype not in _TYPES.values():
            raise UserError(f"{file}: tensor {name} has type {dtype}, which is not known.")

        def read():
            plain = value.detach().contiguous()
            if dtype == "bfloat16":  # numpy has none of its own
                return plain.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
            return plain.numpy()

        return Entry(file, tuple(value.shape), dtype, read)

    return {name: entry(name, value) for name, value in values.items()}
