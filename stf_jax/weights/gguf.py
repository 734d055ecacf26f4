"""Reads GGUF files of Llama-family models, with the names, shapes and channel order of transformers.

llama.cpp rotates neighboring channels where transformers rotates channel i with i + Dh/2, so its files of Llama (and
Mistral, which it calls Llama) hold the rows of query and key in another order. This module restores transformers'
order. Quantized blocks are dequantized to float32; other values keep their dtype.
"""

import functools
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import gguf
import ml_dtypes
import numpy as np

from stf_jax.config import UserError
from stf_jax.models.decoders.base import DECODERS, DecoderFamily, LLMConfig, RopeScaling
from stf_jax.models.decoders.rope import write_rope
from stf_jax.weights.tensors import Entry, TensorFile

_KEYS = {  # attributes of LLMConfig
    "width": "embedding_length",
    "layers": "block_count",
    "mlp": "feed_forward_length",
    "heads": "attention.head_count",
    "kv_heads": "attention.head_count_kv",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "head_dim": "attention.key_length",
    "vocab": "vocab_size",
}
_LENGTH, _THETA = "context_length", "rope.freq_base"
_MAX_COUNT = 1000  # layers, or heads per layer
_ROPE_FREQS = "rope_freqs.weight"  # divisors of Llama 3's low frequencies
_UNQUANTIZED = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}

_Stored = Mapping[str, gguf.ReaderTensor]  # the tensors of a file, by their names in it


def open_gguf(file: pathlib.Path) -> tuple[TensorFile, dict[str, Any]]:
    """Opens a GGUF file; returns its tensors under transformers' names, and the equivalent ``config.json``.

    Raises:
      UserError: the file is not GGUF, is truncated, is one of several parts, holds a model of another family or an
        unexpected tensor.
    """
    try:
        reader = cached_reader(file, file.stat().st_mtime_ns)
        values = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("tokenizer.")}
        kind = values["general.architecture"]
    except (OSError, ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        # A truncated file shows as an index beyond its end, or as a shape that the rest does not fill.
        reason = "it is truncated or damaged" if isinstance(error, (IndexError, OverflowError)) else error
        raise UserError(f"{file} cannot be read as GGUF: {reason}; download it again.") from None
    if values.get("split.count", 1) > 1:
        raise UserError(f"{file} is one of {values['split.count']} parts; join them with llama.cpp's gguf-split first.")
    families = {family.gguf: family for family in DECODERS.known.values() if family.gguf}
    if kind not in families:
        raise UserError(f"{file} holds a model of architecture {kind!r}: supported: {', '.join(families)}.")
    family = families[kind]
    stored = {tensor.name: tensor for tensor in reader.tensors}
    sizes = {name: values[key] for name, end in _KEYS.items() if (key := f"{kind}.{end}") in values}
    for name in ("layers", "heads", "kv_heads"):
        if name in sizes and not (isinstance(sizes[name], int) and 0 < sizes[name] <= _MAX_COUNT):
            raise UserError(f"{file} says that {kind}.{_KEYS[name]} is {sizes[name]!r}, which is not supported.")
    for name in ("layers", "heads"):
        if name not in sizes:
            raise UserError(f"{file} lacks the key {kind}.{_KEYS[name]}, which is needed to read its tensors.")
    sizes.setdefault("kv_heads", sizes["heads"])
    try:
        head_dim = _head_dim(file, kind, values, stored, sizes)
        names = _map_names(stored, family, sizes["layers"])
        scaling = _read_rope_scaling(file, kind, values, stored)
    except KeyError as error:
        raise UserError(f"{file} lacks the key {error}, which is needed to read its tensors.") from None
    config = {family.fields[name]: value for name, value in sizes.items()}
    config |= {"model_type": family.model_type, family.fields["tied"]: "output.weight" not in stored}
    config |= {family.length: values[key]} if (key := f"{kind}.{_LENGTH}") in values else {}
    config |= write_rope(values.get(f"{kind}.{_THETA}", LLMConfig.rope_theta), scaling)
    entries: dict[str, Entry] = {}
    for name, tensor in stored.items():
        if name == _ROPE_FREQS:
            continue
        if name not in names:
            raise UserError(f"{file}: tensor {name} is unexpected in a model of architecture {kind!r}.")
        permuted = kind == "llama" and name.startswith("blk.") and name.split(".")[2] in ("attn_q", "attn_k")
        entries[names[name]] = _make_entry(file, tensor, head_dim if permuted else 0)
    return TensorFile(entries), config


@functools.lru_cache(maxsize=1)  # reading a vocabulary takes seconds
def cached_reader(file: pathlib.Path, modified_ns: int) -> gguf.GGUFReader:
    """Returns the reader of a file, cached by path and modification time in nanoseconds."""
    return gguf.GGUFReader(file)


def _map_names(stored: Iterable[str], family: DecoderFamily, layers: int) -> dict[str, str]:
    """Maps names in the file to transformers' names."""
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family.gguf)
    table = gguf.get_tensor_name_map(arch, layers)
    bases = {
        name.format(layer=layer).rpartition(".")[0]
        for name, _ in family.tensor_names.values()
        for layer in range(layers)
    }
    hf_names = {table.get_name(base): base for base in bases}
    parts = (name.rpartition(".") for name in stored)
    return {f"{base}.{end}": f"{hf_names[base]}.{end}" for base, _, end in parts if base in hf_names}


def _head_dim(
    file: pathlib.Path, kind: str, values: Mapping[str, Any], stored: _Stored, sizes: Mapping[str, Any]
) -> int:
    """Returns the channels per head. The numbers of heads then follow from the rows of query and key."""
    rows = int(stored["blk.0.attn_q.weight"].shape[-1]) if "blk.0.attn_q.weight" in stored else 0
    head_dim = sizes.get("head_dim", rows // sizes["heads"])
    rotated = values.get(f"{kind}.rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise UserError(f"{file} rotates {rotated} of a head's {head_dim} channels: only full rotation is supported.")
    return head_dim


def _make_entry(file: pathlib.Path, tensor: gguf.ReaderTensor, head_dim: int) -> Entry:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    kind = tensor.tensor_type.name
    dtype = np.dtype(_UNQUANTIZED[kind]) if kind in _UNQUANTIZED else None

    def read() -> np.ndarray:
        if dtype is not None:
            value = np.asarray(tensor.data).view(dtype).reshape(shape)
        else:
            value = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        if not head_dim:
            return value
        return value.reshape(-1, head_dim // 2, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)

    return Entry(file, shape, dtype.name if dtype is not None else kind, read)


def _read_rope_scaling(file: pathlib.Path, kind: str, values: Mapping[str, Any], stored: _Stored) -> RopeScaling | None:
    """Returns the scaling of rotary positions. Llama 3's is recognized by the divisors that the file stores instead."""
    scaling = values.get(f"{kind}.rope.scaling.type", "none")
    if _ROPE_FREQS in stored:
        return _read_llama3_scaling(file, stored[_ROPE_FREQS].data, values[f"{kind}.{_THETA}"])
    if scaling == "linear":
        return RopeScaling("linear", values[f"{kind}.rope.scaling.factor"])
    if scaling != "none":
        raise UserError(f"{file} scales rotary positions by {scaling!r}: supported: linear and Llama 3's.")
    return None


def _read_llama3_scaling(file: pathlib.Path, divisors: np.ndarray, theta: float) -> RopeScaling:
    scaling = RopeScaling("llama3", float(divisors.max()))
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    frequencies = theta ** -(np.arange(len(divisors)) / len(divisors))
    turns = scaling.original_length * frequencies / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    if not np.allclose(1 / (keep + (1 - keep) / scaling.factor), divisors, rtol=1e-4):
        raise UserError(f"{file}: {_ROPE_FREQS} is not Llama 3's scaling.")
    return scaling
