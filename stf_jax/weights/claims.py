"""Infers the configs of a vision tower and a language model, checking the checkpoint's config against its tensors.

Shapes come from the tensors wherever they determine them. If the config disagrees and only one value fits the tensors,
that value is used and noted; if the config seems to belong to another model, the checkpoint is refused.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from stf_jax.config import UserError, short_message
from stf_jax.models.llm import LLMConfig, RopeScaling
from stf_jax.models.presets import VISION as VISION_PRESETS
from stf_jax.models.vit import VisionConfig
from stf_jax.weights.tensors import TensorFile

_DECODERS = {"llava_llama": "llama", "llava": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_TOWERS = ("clip_vision_model", "siglip_vision_model")

_Channels = tuple[float, float, float]  # of red, green and blue

# Tensor names (GPTQ, AWQ, bitsandbytes, compressed-tensors, EXL2, HQQ, FP8) and types of quantized weights.
_QUANTIZED = re.compile(
    r".*\.(qweight|qzeros|scales|absmax|quant_map|quant_state\..*|SCB|weight_packed|weight_scale|weight_scale_inv"
    r"|q_weight|q_scale|W_q)"
)
_NARROW = re.compile(r"(F8_.*|F4|F6_.*|float8_.*|float4_.*)")
_BYTES = ("U8", "I8", "U32", "uint8", "int8", "uint32")
_LORA = re.compile(r"(base_model\.model\..*|.*\.lora_(A|B|embedding_A|embedding_B)(\..*)?)")


def check_supported(tensors: TensorFile, config: Mapping[str, Any], notes: list[str]) -> None:
    """Raises UserError for adapters and quantized weights; adds a note if only the config mentions quantization."""
    if name := next(filter(_LORA.fullmatch, tensors.names), None):
        raise UserError(
            f"The tensors ({name}, …) are a LoRA adapter's, not a complete model's: merge it into its base model first "
            "(peft: merge_and_unload, then save_pretrained), and import the result."
        )
    if "tok_embeddings.weight" in tensors:
        raise UserError(
            "The tensors have the names of Mistral's or Meta's own code: import the model's model*.safetensors instead."
        )
    quantization = config.get("quantization_config") or config.get("compression_config")
    method = quantization.get("quant_method", "") if isinstance(quantization, Mapping) else ""
    for name in tensors.names:
        dtype = tensors.dtype(name)
        if dtype.startswith("complex"):
            raise UserError(f"Tensor {name} has type {dtype}, which weights never have: is this a model's file?")
        is_bytes = dtype in _BYTES and name.endswith("weight")
        if is_bytes or _QUANTIZED.fullmatch(name) or _NARROW.fullmatch(dtype):
            by = f" by {method}" if method else ""
            raise UserError(
                f"The weights are quantized{by} (tensor {name} has type {dtype}), which is not supported: import the "
                "unquantized model, or its GGUF."
            )
    if quantization:
        notes.append("The config's quantization_config is ignored: no tensor is quantized.")


def get_section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Returns a section of a composite config, or the config itself if it describes a single part."""
    values = config.get(key) or config
    if not isinstance(values, Mapping) or not isinstance(values.get("model_type", ""), str):
        raise UserError(f"config.json does not describe a model: its {key} or model_type is malformed.")
    return values


def tensor_shape(tensors: TensorFile, name: str, count: int) -> tuple[int, ...]:
    """Returns the shape of a tensor. Raises UserError if it is missing or does not have ``count`` axes."""
    if name not in tensors:
        raise UserError(f"Tensor {name} is missing.")
    if len(tensors.shape(name)) != count:
        raise UserError(f"Tensor {name} has shape {tensors.shape(name)}: {count} axes were expected.")
    return tensors.shape(name)


def _count_layers(tensors: TensorFile, prefix: str) -> int:
    layer = re.compile(re.escape(prefix) + r"layers\.(\d+)\.")
    return max((int(match[1]) for name in tensors.names if (match := layer.match(name))), default=-1) + 1


def _require_equal(key: str, configured: int, actual: int, evidence: str) -> None:
    """Raises UserError if a size in the config is not that of the tensors: the config is another model's."""
    if configured != actual:
        raise UserError(f"The config says {key} {configured}, but {evidence}: does config.json belong to this model?")


def _note_conflict(values: Mapping[str, Any], key: str, actual: int, notes: list[str]) -> int:
    """Returns the value of the tensors, with a note if the config disagrees."""
    if values.get(key) not in (None, actual):
        notes.append(f"The config says {key} {values[key]}, but the tensors have {actual}, which is used.")
    return actual


# ---- Vision towers ---------------------------------------------------------------------------------------------------


def infer_vision_config(tensors: TensorFile, prefix: str, config: Mapping[str, Any], notes: list[str]) -> VisionConfig:
    """Returns the config of the vision tower whose tensor names begin with ``prefix``.

    Raises UserError if the tower is neither CLIP's nor SigLIP's, or the config has other sizes than the tensors.
    """
    conv, positions = f"{prefix}embeddings.patch_embedding.weight", f"{prefix}embeddings.position_embedding.weight"
    width, _, patch, _ = tensor_shape(tensors, conv, 4)
    class_token = f"{prefix}embeddings.class_embedding" in tensors
    patches = tensor_shape(tensors, positions, 2)[0] - class_token
    grid, layers = math.isqrt(patches), _count_layers(tensors, f"{prefix}encoder.")
    if grid * grid != patches:
        raise UserError(f"Tensor {positions} has {patches} patches, which is not a square number.")
    (mlp,) = tensor_shape(tensors, f"{prefix}encoder.layers.0.mlp.fc1.bias", 1)
    values = get_section(config, "vision_config")
    if values is not config and config.get("model_type") == "llava":  # whose tower is CLIP's by default
        values = {"model_type": "clip_vision_model", **values}
    if values.get("model_type") in _TOWERS:
        tower = _tower_from_config(values, config.get("preprocessor", {}))
        _require_equal("hidden_size", tower.width, width, f"{conv} is {tensors.shape(conv)}")
        _require_equal("intermediate_size", tower.mlp, mlp, f"{prefix}encoder.layers.0.mlp.fc1.bias is ({mlp},)")
        _require_equal("num_hidden_layers", tower.layers, layers, f"the tensors hold {layers} layers")
        patch = _note_conflict({"patch_size": tower.patch_size}, "patch_size", patch, notes)
        size = tower.image_size
        if size // patch != grid:  # otherwise kept, because a size need not be a multiple of the patch
            size = _note_conflict({"image_size": size}, "image_size", grid * patch, notes)
        return dataclasses.replace(tower, image_size=size, patch_size=patch)
    # Only LLaVA's own files give just the name of their tower. All CLIP towers have heads of 64 channels.
    if not class_token:
        raise UserError("The checkpoint does not describe its vision tower; give the tower's folder as --vision=DIR.")
    notes.append(
        f"The vision tower's shape was inferred from its tensors: {layers} layers of {width // 64} heads, CLIP's "
        "quick-GELU. If that is wrong, give the tower's folder as --vision=DIR."
    )
    preset = VISION_PRESETS["clip-l-14-336"]
    return dataclasses.replace(
        preset,
        image_size=grid * patch,
        patch_size=patch,
        width=width,
        layers=layers,
        heads=max(1, width // 64),
        mlp=mlp,
    )


def _tower_from_config(values: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> VisionConfig:
    """Builds a tower's config from transformers' ``vision_config`` and image processor config; both may omit keys."""
    kind = values["model_type"]
    hf_config = _load_hf_config(kind, values)
    if not all(type(size) is int and size > 0 for size in (hf_config.image_size, hf_config.patch_size)):
        raise UserError(
            f"The vision tower has images of {hf_config.image_size!r} pixels and patches of {hf_config.patch_size!r}: "
            "both must be positive integers."
        )
    if hf_config.hidden_act not in _ACTIVATIONS:
        raise UserError(
            f"The vision tower has hidden_act {hf_config.hidden_act!r}: supported: {', '.join(_ACTIVATIONS)}."
        )
    if hf_config.hidden_size % hf_config.num_attention_heads:
        raise UserError(
            f"The vision tower has {hf_config.hidden_size} channels with {hf_config.num_attention_heads} heads: "
            "the heads must divide the channels."
        )
    preset = VISION_PRESETS["clip-l-14-336" if kind == "clip_vision_model" else "siglip-so400m-14-384"]
    return dataclasses.replace(
        preset,
        image_size=hf_config.image_size,
        patch_size=hf_config.patch_size,
        width=hf_config.hidden_size,
        layers=hf_config.num_hidden_layers,
        heads=hf_config.num_attention_heads,
        mlp=hf_config.intermediate_size,
        activation=_ACTIVATIONS[hf_config.hidden_act],
        norm_eps=hf_config.layer_norm_eps,
        mean=_read_channels(preprocessor, "image_mean", preset.mean),
        std=_read_channels(preprocessor, "image_std", preset.std),
    )


def _read_channels(preprocessor: Mapping[str, Any], key: str, default: _Channels) -> _Channels:
    values = preprocessor.get(key, default)
    if not isinstance(values, list | tuple) or [type(value) in (int, float) for value in values] != [True] * 3:
        raise UserError(f"The image processor's {key} is {values!r}, not three numbers.")
    red, green, blue = values
    return red, green, blue


# ---- Language models -------------------------------------------------------------------------------------------------


def infer_llm_config(
    tensors: TensorFile, prefix: str, embedding: str, head: str | None, config: Mapping[str, Any], notes: list[str]
) -> LLMConfig:
    """Returns the config of the language model whose tensor names begin with ``prefix``.

    Args:
      tensors: the checkpoint's tensors.
      prefix: prefix of ``layers.0`` and ``norm``.
      embedding: name of the embedding's tensor.
      head: name of the output head's tensor; None if there is none.
      config: the checkpoint's config.
      notes: a list to which remarks for the user are appended.

    Raises:
      UserError: the architecture is not supported, or the config has other sizes than the tensors.
    """
    values = get_section(config, "text_config")
    kind, hf_config = _decoder_from_config(values, config)
    window = getattr(hf_config, "sliding_window", None)
    if window is not None and getattr(hf_config, "use_sliding_window", True):
        notes.append(
            f"The sliding window of {window} positions is not applied: only texts up to that length are exact."
        )

    layers, gate = _count_layers(tensors, prefix), f"{prefix}layers.0.mlp.gate_proj.weight"
    _require_equal("num_hidden_layers", hf_config.num_hidden_layers, layers, f"the tensors hold {layers} layers")
    _, width = tensor_shape(tensors, embedding, 2)
    mlp, _ = tensor_shape(tensors, gate, 2)
    _require_equal("hidden_size", hf_config.hidden_size, width, f"{embedding} is {tensors.shape(embedding)}")
    _require_equal("intermediate_size", hf_config.intermediate_size, mlp, f"{gate} is {tensors.shape(gate)}")
    heads, kv_heads, head_dim = _infer_heads(tensors, f"{prefix}layers.0.self_attn.", hf_config, values, notes)
    qkv_bias, qk_norm = _detect_biases_and_norms(tensors, f"{prefix}layers.0.self_attn.", kind, hf_config, notes)
    return LLMConfig(
        vocab=_count_vocab(tensors, embedding, head, values, config, notes),
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp=mlp,
        rope_theta=_positive_number(hf_config.rope_parameters, "rope_theta"),
        rope_scaling=_read_rope_scaling(hf_config.rope_parameters),
        norm_eps=hf_config.rms_norm_eps,
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        tied=_is_tied(
            tensors, embedding, head, hf_config.tie_word_embeddings or config.get("tie_word_embeddings"), notes
        ),
    )


def _decoder_from_config(values: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[str, Any]:
    kind = values.get("model_type", config.get("model_type"))
    if kind is None:
        problem = "has no model_type" if config.keys() - {"preprocessor"} else "is missing"
        raise UserError(f"config.json {problem}, which is needed to import a language model: download it again.")
    kind = _DECODERS.get(kind, kind)
    if kind not in ("llama", "mistral", "qwen2", "qwen3"):
        raise UserError(f"The language model has model_type {kind!r}: supported: llama, mistral, qwen2, qwen3.")
    hf_config = _load_hf_config(kind, values)
    if hf_config.hidden_act != "silu":
        raise UserError(f"The language model has hidden_act {hf_config.hidden_act!r}: supported: 'silu'.")
    return kind, hf_config


def _infer_heads(
    tensors: TensorFile, prefix: str, hf_config: Any, values: Mapping[str, Any], notes: list[str]
) -> tuple[int, int, int]:
    """Returns heads, kv heads and channels per head, from the rows of the projections."""
    rows, _ = tensor_shape(tensors, f"{prefix}q_proj.weight", 2)
    kv_rows, _ = tensor_shape(tensors, f"{prefix}k_proj.weight", 2)
    heads, configured = hf_config.num_attention_heads, values.get("head_dim")
    if f"{prefix}q_norm.weight" in tensors:  # the norm of one head
        (head_dim,) = tensor_shape(tensors, f"{prefix}q_norm.weight", 1)
        heads = _note_conflict(values, "num_attention_heads", rows // max(1, head_dim), notes)
    else:
        head_dim = configured or rows // heads
    _note_conflict(values, "head_dim", head_dim, notes)
    if type(head_dim) is not int or head_dim < 1 or heads * head_dim != rows:
        raise UserError(
            f"The config says num_attention_heads {heads}{f' and head_dim {configured}' if configured else ''}, but "
            f"{prefix}q_proj.weight is {tensors.shape(f'{prefix}q_proj.weight')}: "
            "does config.json belong to this model?"
        )
    frequencies = f"{prefix}rotary_emb.inv_freq"  # one per two channels
    if frequencies in tensors and tensors.shape(frequencies) != (head_dim // 2,):
        raise UserError(
            f"{frequencies} is {tensors.shape(frequencies)}, but the config says heads of {head_dim} channels."
        )
    kv_heads = kv_rows // head_dim
    if kv_heads * head_dim != kv_rows or not kv_heads or heads % kv_heads:
        raise UserError(
            f"{prefix}k_proj.weight has {kv_rows} rows, which do not make kv heads of {head_dim} channels "
            f"for {heads} heads."
        )
    return heads, _note_conflict(values, "num_key_value_heads", kv_heads, notes), head_dim


def _detect_biases_and_norms(
    tensors: TensorFile, prefix: str, kind: str, hf_config: Any, notes: list[str]
) -> tuple[bool, bool]:
    """Returns whether query, key and value have biases, and whether query and key have norms."""
    qkv_bias = f"{prefix}q_proj.bias" in tensors
    if qkv_bias != (kind == "qwen2" or bool(getattr(hf_config, "attention_bias", False))):
        notes.append(
            f"The tensors have {'' if qkv_bias else 'no '}attention biases, unlike the config; the tensors are used."
        )
    if getattr(hf_config, "mlp_bias", False):  # which the models here do not have
        notes.append("The config says mlp_bias, but the tensors have none.")
    qk_norm = f"{prefix}q_norm.weight" in tensors
    if kind == "qwen3" and not qk_norm:
        raise UserError(f"Tensor {prefix}q_norm.weight is missing.")
    if kind != "qwen3" and qk_norm:
        notes.append("The tensors have query and key norms, unlike the config; the tensors are used.")
    return qkv_bias, qk_norm


def _count_vocab(
    tensors: TensorFile,
    embedding: str,
    head: str | None,
    values: Mapping[str, Any],
    config: Mapping[str, Any],
    notes: list[str],
) -> int:
    """Returns the number of tokens: the embedding's rows, without those that our export added for ``<image>``."""
    rows, _ = tensor_shape(tensors, embedding, 2)
    if head is not None and tensor_shape(tensors, head, 2)[0] != rows:
        raise UserError(
            f"{head} has {tensor_shape(tensors, head, 2)[0]} rows and {embedding} {rows}: both need one row per "
            "token; resize both to the same size (resize_token_embeddings)."
        )
    _note_conflict(values, "vocab_size", rows, notes)
    vocab = config.get("stf_vocab")
    if vocab is None:
        return rows
    if type(vocab) is not int or not 0 < vocab <= rows:
        raise UserError(f"The config says stf_vocab {vocab!r}, but {embedding} has {rows} rows.")
    mark = config.get("image_token_id", config.get("image_token_index"))  # our export added rows up to this id
    if rows != vocab and (type(mark) is not int or rows != mark + 1):
        notes.append(
            f"The config says stf_vocab {vocab}, but the vocabulary was resized since; all {rows} rows are used."
        )
        return rows
    return vocab


def _is_tied(tensors: TensorFile, embedding: str, head: str | None, configured: Any, notes: list[str]) -> bool:
    """Whether the head is tied to the embedding; as in transformers, a head of other values is not."""
    if head == embedding and not configured:
        raise UserError("Tensor embed_tokens.weight is missing, and config.json does not tie it to the head.")
    if head is None or not configured:
        return bool(configured)
    if head == embedding or tensors.equal(embedding, head):
        return True
    notes.append(
        f"The config says tie_word_embeddings, but {head} and {embedding} hold different values: the head is kept."
    )
    return False


def _load_hf_config(kind: str, values: Mapping[str, Any]) -> Any:
    """Returns transformers' config of a model type, with its defaults for missing keys. Its class declares no types."""
    from transformers import CONFIG_MAPPING  # imports torch if it is installed: 3 s

    try:
        hf_config = CONFIG_MAPPING[kind](**{key: value for key, value in values.items() if key != "model_type"})
        sizes = [
            hf_config.hidden_size,
            hf_config.intermediate_size,
            hf_config.num_hidden_layers,
            hf_config.num_attention_heads,
        ]
    except Exception as error:  # its checks may raise anything, and the file is the cause
        reason = short_message(error)
        raise UserError(f"config.json does not describe a model of model_type {kind!r}: {reason}.") from None
    eps = getattr(hf_config, "rms_norm_eps", getattr(hf_config, "layer_norm_eps", 0))
    if not 0 <= eps < 1:  # also false for nan
        raise UserError(
            f"config.json does not describe a model of model_type {kind!r}: the epsilon of its norms is {eps}."
        )
    if not all(type(size) is int and 0 < size < 10**6 for size in sizes) or sizes[2] > 1000:
        raise UserError(f"config.json does not describe a model of model_type {kind!r}: its sizes are {sizes}.")
    return hf_config


def _read_rope_scaling(values: Mapping[str, Any]) -> RopeScaling | None:
    kind = values["rope_type"]
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", _positive_number(values, "factor"))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            factor=_positive_number(values, "factor"),
            low_freq_factor=_positive_number(values, "low_freq_factor"),
            high_freq_factor=_positive_number(values, "high_freq_factor"),
            original_length=int(_positive_number(values, "original_max_position_embeddings")),
        )
    raise UserError(f"The rotary positions have type {kind!r}: supported: default, linear, llama3.")


def _positive_number(values: Mapping[str, Any], key: str) -> float:
    try:
        number = float(values[key])
    except (KeyError, TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise UserError(
            f"config.json gives rotary positions the {key} {values.get(key)!r}, which is not a positive number."
        )
    return number
