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
from stf_jax.weights.tensors import Entry, TensorFile

_KEYS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
    "head_dim": "attention.key_length",
    "rope_theta": "rope.freq_base",
    "vocab_size": "vocab_size",
}
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
    if kind not in ("llama", "qwen2", "qwen3"):
        raise UserError(f"{file} holds a model of architecture {kind!r}: supported: llama, qwen2, qwen3.")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    config = {name: values[key] for name, end in _KEYS.items() if (key := f"{kind}.{end}") in values}
    config |= {"model_type": kind, "tie_word_embeddings": "output.weight" not in stored}
    for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        if name in config and not (isinstance(config[name], int) and 0 < config[name] <= _MAX_COUNT):
            raise UserError(f"{file} says that {kind}.{_KEYS[name]} is {config[name]!r}, which is not supported.")
    try:
        config.setdefault("num_key_value_heads", config["num_attention_heads"])
        head_dim = _head_dim(file, kind, values, stored, config)
        names = _map_names(stored, kind, config["num_hidden_layers"])
        config["rope_scaling"] = _read_rope_scaling(file, kind, values, stored, config)
    except KeyError as error:
        raise UserError(f"{file} lacks the key {error}, which is needed to read its tensors.") from None
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


def _map_names(stored: Iterable[str], kind: str, layers: int) -> dict[str, str]:
    """Maps names in the file to transformers' names."""
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    bases = ["model.embed_tokens", "model.norm", "lm_head"]
    for layer in range(layers):
        block = f"model.layers.{layer}"
        bases += [f"{block}.self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
        bases += [f"{block}.mlp.{part}_proj" for part in ("gate", "up", "down")]
        bases += [f"{block}.input_layernorm", f"{block}.post_attention_layernorm"]
    table = gguf.get_tensor_name_map(arch, layers)
    hf_names = {table.get_name(base): base for base in bases}
    parts = (name.rpartition(".") for name in stored)
    return {f"{base}.{end}": f"{hf_names[base]}.{end}" for base, _, end in parts if base in hf_names}


def _head_dim(
    file: pathlib.Path, kind: str, values: Mapping[str, Any], stored: _Stored, config: Mapping[str, Any]
) -> int:
    """Returns the channels per head. The numbers of heads then follow from the rows of query and key."""
    rows = int(stored["blk.0.attn_q.weight"].shape[-1]) if "blk.0.attn_q.weight" in stored else 0
    head_dim = config.get("head_dim", rows // config["num_attention_heads"])
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


def _read_rope_scaling(
    file: pathlib.Path, kind: str, values: Mapping[str, Any], stored: _Stored, config: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Returns transformers' ``rope_scaling``. Llama 3's is recognized by the divisors that the file stores instead."""
    scaling = values.get(f"{kind}.rope.scaling.type", "none")
    if _ROPE_FREQS in stored:
        return _read_llama3_scaling(file, stored[_ROPE_FREQS].data, config["rope_theta"])
    if scaling == "linear":
        return {"rope_type": "linear", "factor": values[f"{kind}.rope.scaling.factor"]}
    if scaling != "none":
        raise UserError(f"{file} scales rotary positions by {scaling!r}: supported: linear and Llama 3's.")
    return None


def _read_llama3_scaling(file: pathlib.Path, divisors: np.ndarray, theta: float) -> dict[str, Any]:
    factor, low, high, original = float(divisors.max()), 1.0, 4.0, 8192
    frequencies = theta ** -(np.arange(len(divisors)) / len(divisors))
    turns = original * frequencies / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    if not np.allclose(1 / (keep + (1 - keep) / factor), divisors, rtol=1e-4):
        raise UserError(f"{file}: {_ROPE_FREQS} is not Llama 3's scaling.")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
