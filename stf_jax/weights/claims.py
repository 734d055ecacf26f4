"""The shapes of a tower and of a language model: what a config claims, held against the tensors.

What the tensors decide is taken from them. Where the config says otherwise and only one reading fits the tensors, that
is taken and noted; where the config seems to be another model's, it is refused by name.
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
from stf_jax.weights.tensors import Tensors

_DECODERS = {"llava_llama": "llama", "llava": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_TOWERS = ("clip_vision_model", "siglip_vision_model")

# Ends of the names that methods of quantisation give their tensors (GPTQ, AWQ, bitsandbytes, compressed-tensors, EXL2,
# HQQ, FP8), and the types that they store values in.
_QUANTISED = re.compile(
    r".*\.(qweight|qzeros|scales|absmax|quant_map|quant_state\..*|SCB|weight_packed|weight_scale|weight_scale_inv"
    r"|q_weight|q_scale|W_q)"
)
_NARROW = re.compile(r"(F8_.*|F4|F6_.*|float8_.*|float4_.*)")
_BYTES = ("U8", "I8", "U32", "uint8", "int8", "uint32")
_LORA = re.compile(r"(base_model\.model\..*|.*\.lora_(A|B|embedding_A|embedding_B)(\..*)?)")


def check_kind(tensors: Tensors, config: Mapping[str, Any], notes: list[str]) -> None:
    """Raises UserError for an adapter, and for weights that are quantised; notes a config that only says so."""
    if name := next(filter(_LORA.fullmatch, tensors.names), None):
        raise UserError(
            f"The tensors ({name}, …) are a LoRA adapter's, not a whole model's: merge it into its base model first "
            "(peft: merge_and_unload, then save_pretrained), and import the result."
        )
    if "tok_embeddings.weight" in tensors:
        raise UserError(
            "The tensors have the names of Mistral's or Meta's own code: import the same model's model*.safetensors."
        )
    said = config.get("quantization_config") or config.get("compression_config")
    method = said.get("quant_method", "") if isinstance(said, Mapping) else ""
    for name in tensors.names:
        dtype = tensors.dtype(name)
        if dtype.startswith("complex"):
            raise UserError(f"Tensor {name} has type {dtype}, which no weights have: is this a model's file?")
        whole = dtype in _BYTES and name.endswith("weight")
        if whole or _QUANTISED.fullmatch(name) or _NARROW.fullmatch(dtype):
            by = f" by {method}" if method else ""
            raise UserError(
                f"The weights are quantised{by} (tensor {name} has type {dtype}), which is not read: import the model "
                "that was quantised, or its GGUF."
            )
    if said:
        notes.append("The config's quantization_config is left out: no tensor is quantised.")


def section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A part of a composite config, or a config that is of one part."""
    values = config.get(key) or config
    if not isinstance(values, Mapping) or not isinstance(values.get("model_type", ""), str):
        raise UserError(f"config.json does not describe a model: its {key} or model_type is malformed.")
    return values


def sizes(tensors: Tensors, name: str, count: int) -> tuple[int, ...]:
    """The shape of a tensor that is there and has so many axes."""
    if name not in tensors:
        raise UserError(f"Tensor {name} is missing.")
    if len(tensors.shape(name)) != count:
        raise UserError(f"Tensor {name} has shape {tensors.shape(name)}: {count} axes were expected.")
    return tensors.shape(name)


def _count_layers(tensors, prefix):
    layer = re.compile(re.escape(prefix) + r"layers\.(\d+)\.")
    return max((int(match[1]) for name in tensors.names if (match := layer.match(name))), default=-1) + 1


def _require(key, said, held, name):
    """Raises UserError where a config's size is not that of a tensor: the config is another model's."""
    if said != held:
        raise UserError(f"The config says {key} {said}, but {name}: is that config.json this model's?")


def _settle(values, key, held, notes):
    """What the tensors hold, with a note where the config says otherwise."""
    if values.get(key) not in (None, held):
        notes.append(f"The config says {key} {values[key]}, but the tensors have {held}, which is taken.")
    return held


# ---- Vision towers ---------------------------------------------------------------------------------------------------


def tower_shape(tensors: Tensors, prefix: str, config: Mapping[str, Any], notes: list[str]) -> VisionConfig:
    """The vision tower whose names begin with ``prefix``.

    Raises UserError for a tower other than CLIP's and SigLIP's, or a config of another size.
    """
    conv, places = f"{prefix}embeddings.patch_embedding.weight", f"{prefix}embeddings.position_embedding.weight"
    width, _, patch, _ = sizes(tensors, conv, 4)
    class_token = f"{prefix}embeddings.class_embedding" in tensors
    patches = sizes(tensors, places, 2)[0] - class_token
    grid, layers = math.isqrt(patches), _count_layers(tensors, f"{prefix}encoder.")
    if grid * grid != patches:
        raise UserError(f"Tensor {places} has {patches} patches, which are no square.")
    (mlp,) = sizes(tensors, f"{prefix}encoder.layers.0.mlp.fc1.bias", 1)
    values = section(config, "vision_config")
    if values is not config and config.get("model_type") == "llava":  # whose tower is CLIP's unless it says otherwise
        values = {"model_type": "clip_vision_model", **values}
    if values.get("model_type") in _TOWERS:
        said = _said_tower(values, config.get("preprocessor", {}))
        _require("hidden_size", said.width, width, f"{conv} is {tensors.shape(conv)}")
        _require("intermediate_size", said.mlp, mlp, f"{prefix}encoder.layers.0.mlp.fc1.bias is ({mlp},)")
        _require("num_hidden_layers", said.layers, layers, f"the tensors hold {layers} layers")
        patch = _settle({"patch_size": said.patch_size}, "patch_size", patch, notes)
        size = said.image_size
        if size // patch != grid:  # else as it is said, for a size need not be whole patches
            size = _settle({"image_size": size}, "image_size", grid * patch, notes)
        return dataclasses.replace(said, image_size=size, patch_size=patch)
    # Only LLaVA's own files say nothing of their tower but its name. All of CLIP's have heads of 64 channels.
    if not class_token:
        raise UserError("The checkpoint does not say the shape of its vision tower; give its folder as --vision=DIR.")
    notes.append(
        f"The vision tower's shape was told by its tensors: {layers} layers of {width // 64} heads, CLIP's quick-GELU. "
        "If that is wrong, give its folder as --vision=DIR."
    )
    like = VISION_PRESETS["clip-l-14-336"]
    return dataclasses.replace(
        like, image_size=grid * patch, patch_size=patch, width=width, layers=layers, heads=max(1, width // 64), mlp=mlp
    )


def _said_tower(values, pixels):
    """A tower of transformers' ``vision_config`` and of its ``preprocessor_config.json``, either with keys left out."""
    kind = values["model_type"]
    full = _full(kind, values)
    if not all(type(size) is int and size > 0 for size in (full.image_size, full.patch_size)):
        raise UserError(f"Vision tower with images of {full.image_size!r} pixels and patches of {full.patch_size!r}.")
    if full.hidden_act not in _ACTIVATIONS:
        raise UserError(f"Vision tower with hidden_act {full.hidden_act!r}: known are {', '.join(_ACTIVATIONS)}.")
    if full.hidden_size % full.num_attention_heads:
        raise UserError(f"Vision tower of {full.hidden_size} channels with {full.num_attention_heads} heads.")
    like = VISION_PRESETS["clip-l-14-336" if kind == "clip_vision_model" else "siglip-so400m-14-384"]
    return dataclasses.replace(
        like,
        image_size=full.image_size,
        patch_size=full.patch_size,
        width=full.hidden_size,
        layers=full.num_hidden_layers,
        heads=full.num_attention_heads,
        mlp=full.intermediate_size,
        activation=_ACTIVATIONS[full.hidden_act],
        norm_eps=full.layer_norm_eps,
        mean=_channels(pixels, "image_mean", like.mean),
        std=_channels(pixels, "image_std", like.std),
    )


def _channels(pixels, key, default):
    values = pixels.get(key, default)
    if not isinstance(values, list | tuple) or [type(value) in (int, float) for value in values] != [True] * 3:
        raise UserError(f"The image processor's {key} is {values!r}, not three numbers.")
    return tuple(values)


# ---- Language models -------------------------------------------------------------------------------------------------


def decoder_shape(
    tensors: Tensors, prefix: str, embedding: str, head: str | None, config: Mapping[str, Any], notes: list[str]
) -> LLMConfig:
    """The language model whose names begin with ``prefix``.

    Args:
      tensors: of the checkpoint.
      prefix: of ``layers.0`` and ``norm``.
      embedding: name of the embedding's tensor.
      head: name of the output head's tensor; None where there is none.
      config: the checkpoint's.
      notes: are added to.

    Raises:
      UserError: an architecture that is not known, or a config of another size.
    """
    values = section(config, "text_config")
    kind, full = _said_decoder(values, config)
    window = getattr(full, "sliding_window", None)
    if window is not None and getattr(full, "use_sliding_window", True):
        notes.append(f"The sliding window of {window} positions is not applied: texts up to that length are exact.")

    layers, gate = _count_layers(tensors, prefix), f"{prefix}layers.0.mlp.gate_proj.weight"
    _require("num_hidden_layers", full.num_hidden_layers, layers, f"the tensors hold {layers} layers")
    _, width = sizes(tensors, embedding, 2)
    mlp, _ = sizes(tensors, gate, 2)
    _require("hidden_size", full.hidden_size, width, f"{embedding} is {tensors.shape(embedding)}")
    _require("intermediate_size", full.intermediate_size, mlp, f"{gate} is {tensors.shape(gate)}")
    heads, kv_heads, head_dim = _heads(tensors, f"{prefix}layers.0.self_attn.", full, values, notes)
    qkv_bias, qk_norm = _extras(tensors, f"{prefix}layers.0.self_attn.", kind, full, notes)
    return LLMConfig(
        vocab=_vocabulary(tensors, embedding, head, values, config, notes),
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp=mlp,
        rope_theta=_number(full.rope_parameters, "rope_theta"),
        rope_scaling=_rope_scaling(full.rope_parameters),
        norm_eps=full.rms_norm_eps,
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        tied=_tied(tensors, embedding, head, full.tie_word_embeddings or config.get("tie_word_embeddings"), notes),
    )


def _said_decoder(values, config):
    kind = values.get("model_type", config.get("model_type"))
    if kind is None:
        lacking = "has no model_type" if config.keys() - {"preprocessor"} else "is missing"
        raise UserError(f"config.json {lacking}, without which a language model's shape is not known: fetch it again.")
    kind = _DECODERS.get(kind, kind)
    if kind not in ("llama", "mistral", "qwen2", "qwen3"):
        raise UserError(f"Language model of model_type {kind!r}: known are llama, mistral, qwen2 and qwen3.")
    full = _full(kind, values)
    if full.hidden_act != "silu":
        raise UserError(f"Language model with hidden_act {full.hidden_act!r}: only 'silu' is known.")
    return kind, full


def _heads(tensors, prefix, full, values, notes):
    """Heads, kv heads and channels of a head, as the projections' rows have them."""
    rows, _ = sizes(tensors, f"{prefix}q_proj.weight", 2)
    kv_rows, _ = sizes(tensors, f"{prefix}k_proj.weight", 2)
    heads, said = full.num_attention_heads, values.get("head_dim")
    if f"{prefix}q_norm.weight" in tensors:  # the norm of one head
        (head_dim,) = sizes(tensors, f"{prefix}q_norm.weight", 1)
        heads = _settle(values, "num_attention_heads", rows // max(1, head_dim), notes)
    else:
        head_dim = said or rows // heads
    _settle(values, "head_dim", head_dim, notes)
    if type(head_dim) is not int or head_dim < 1 or heads * head_dim != rows:
        raise UserError(
            f"The config says num_attention_heads {heads}{f' and head_dim {said}' if said else ''}, but {prefix}"
            f"q_proj.weight is {tensors.shape(f'{prefix}q_proj.weight')}: is that config.json this model's?"
        )
    counted = f"{prefix}rotary_emb.inv_freq"  # one for two channels
    if counted in tensors and tensors.shape(counted) != (head_dim // 2,):
        raise UserError(f"{counted} is {tensors.shape(counted)}, but the config says heads of {head_dim} channels.")
    kv_heads = kv_rows // head_dim
    if kv_heads * head_dim != kv_rows or not kv_heads or heads % kv_heads:
        raise UserError(
            f"{prefix}k_proj.weight has {kv_rows} rows, which are no kv heads of {head_dim} channels for {heads} heads."
        )
    return heads, _settle(values, "num_key_value_heads", kv_heads, notes), head_dim


def _extras(tensors, prefix, kind, full, notes):
    """Whether query, key and value have biases, and query and key norms."""
    qkv_bias = f"{prefix}q_proj.bias" in tensors
    if qkv_bias != (kind == "qwen2" or bool(getattr(full, "attention_bias", False))):
        notes.append(f"The attention is read {'with' if qkv_bias else 'without'} biases, as the tensors have it.")
    if getattr(full, "mlp_bias", False):  # such tensors have no place
        notes.append("The config says mlp_bias, but the tensors have none.")
    qk_norm = f"{prefix}q_norm.weight" in tensors
    if kind == "qwen3" and not qk_norm:
        raise UserError(f"Tensor {prefix}q_norm.weight is missing.")
    if kind != "qwen3" and qk_norm:
        notes.append("Queries and keys are normalised, as the tensors have it, which the config does not say.")
    return qkv_bias, qk_norm


def _vocabulary(tensors, embedding, head, values, config, notes):
    """How many tokens there are: the embedding's rows, but for those that our export added for ``<image>``."""
    rows, _ = sizes(tensors, embedding, 2)
    if head is not None and sizes(tensors, head, 2)[0] != rows:
        raise UserError(
            f"{head} has {sizes(tensors, head, 2)[0]} rows and {embedding} {rows}: one row each for every token is "
            "expected; save the model with both resized alike (resize_token_embeddings)."
        )
    _settle(values, "vocab_size", rows, notes)
    ours = config.get("stf_vocab")
    if ours is None:
        return rows
    if type(ours) is not int or not 0 < ours <= rows:
        raise UserError(f"The config says stf_vocab {ours!r}, but {embedding} has {rows} rows.")
    mark = config.get("image_token_id", config.get("image_token_index"))  # for which our export added rows
    if rows != ours and (type(mark) is not int or rows != mark + 1):
        notes.append(
            f"The config says stf_vocab {ours}, but the vocabulary was resized since; all {rows} rows are taken."
        )
        return rows
    return ours


def _tied(tensors, embedding, head, said, notes):
    """Whether the head is the embedding, as transformers decides: a head of other values is one of its own."""
    if head == embedding and not said:
        raise UserError(
            "Tensor embed_tokens.weight is missing, and config.json does not say that it is tied to the head."
        )
    if head is None or not said:
        return bool(said)
    if head == embedding or tensors.equal(embedding, head):
        return True
    notes.append(
        f"The config says tie_word_embeddings, but {head} and {embedding} hold different values: the head is kept."
    )
    return False


def _full(kind, values):
    """transformers' config of that kind, with its defaults in place of keys that are left out."""
    from transformers import CONFIG_MAPPING  # imports torch where it is installed: 3 s

    try:
        full = CONFIG_MAPPING[kind](**{key: value for key, value in values.items() if key != "model_type"})
        said = [full.hidden_size, full.intermediate_size, full.num_hidden_layers, full.num_attention_heads]
    except Exception as error:  # whatever its checks raise, the file is at fault
        reason = short_message(error)
        raise UserError(f"config.json does not describe a model of model_type {kind!r}: {reason}.") from None
    eps = getattr(full, "rms_norm_eps", getattr(full, "layer_norm_eps", 0))
    if not 0 <= eps < 1:  # nor nan
        raise UserError(f"config.json does not describe a model of model_type {kind!r}: its norms add {eps}.")
    if not all(type(size) is int and 0 < size < 10**6 for size in said) or said[2] > 1000:
        raise UserError(f"config.json does not describe a model of model_type {kind!r}: its sizes are {said}.")
    return full


def _rope_scaling(values):
    kind = values["rope_type"]
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", _number(values, "factor"))
    if kind == "llama3":
        factors = (_number(values, f"{name}factor") for name in ("", "low_freq_", "high_freq_"))
        return RopeScaling("llama3", *factors, int(_number(values, "original_max_position_embeddings")))
    raise UserError(f"Rotary positions of type {kind!r}: known are default, linear and llama3.")


def _number(values, key):
    try:
        number = float(values[key])
    except (KeyError, TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise UserError(f"config.json gives rotary positions the {key} {values.get(key)!r}, no number above 0.")
    return number
