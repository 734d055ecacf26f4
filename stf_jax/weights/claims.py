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
from stf_jax.models.decoders.base import DECODERS, DecoderFamily, LLMConfig
from stf_jax.models.decoders.rope import read_rope
from stf_jax.models.spec import match_family
from stf_jax.models.tensor_names import TensorNames
from stf_jax.models.towers.base import ACTIVATIONS, TOWERS, Channels, VisionConfig
from stf_jax.weights.mapping import rename
from stf_jax.weights.tensors import TensorFile

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
            f"The tensors ({name}, …) are a LoRA adapter's, not a complete model's: import the adapter's folder with "
            "its base (convert import ADAPTER --base=DIR)."
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


def find_prefix(tensors: TensorFile, anchor: str, kind: str) -> str | None:
    """Returns the prefix of the one name that ends with ``anchor``; None if no name does."""
    found = [name.removesuffix(anchor) for name in tensors.names if name == anchor or name.endswith("." + anchor)]
    if len(found) > 1:
        raise UserError(f"The checkpoint holds {len(found)} {kind}, named {', '.join(found)}; one was expected.")
    return found[0] if found else None


@dataclasses.dataclass(frozen=True)
class PartTensors:
    """The tensors of one part of a checkpoint, by the paths of its parameters.

    Attributes:
      names: the family's table.
      prefixes: prefixes of names in the table → their replacements in this checkpoint.
    """

    tensors: TensorFile
    names: TensorNames
    prefixes: Mapping[str, str]

    def name(self, path: str) -> str:
        """Returns the name of a parameter's tensor, in the first layer."""
        return rename(self.names[path].name.format(layer=0), self.prefixes)

    def holds(self, path: str) -> bool:
        """Whether the checkpoint has the parameter."""
        return path in self.names and self.name(path) in self.tensors

    def size(self, path: str, *axes: int) -> int:
        """Returns the size of an axis of a parameter, or the product of several that its tensor merges.

        Raises UserError if the tensor is missing or has another number of axes.
        """
        layout = self.names[path].layout
        return tensor_shape(self.tensors, self.name(path), len(layout))[layout.index(axes)]

    def shape(self, path: str) -> str:
        """Formats the name and shape of a parameter's tensor for messages."""
        return f"{self.name(path)} is {self.tensors.shape(self.name(path))}"

    def count_layers(self) -> int:
        """Returns the number of layers."""
        stem = next(name for name, _ in self.names.values() if "{layer}" in name).partition("{layer}")[0]
        layer = re.compile(re.escape(rename(stem, self.prefixes)) + r"(\d+)\.")
        return max((int(match[1]) for name in self.tensors.names if (match := layer.match(name))), default=-1) + 1


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


def get_tower_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the config of the vision tower."""
    values = get_section(config, "vision_config")
    if values is not config and config.get("model_type") == "llava":  # whose tower is CLIP's by default
        return {"model_type": TOWERS.find("clip").model_type, **values}
    return values


def infer_vision_config(part: PartTensors, family: str, config: Mapping[str, Any], notes: list[str]) -> VisionConfig:
    """Returns the config of a vision tower.

    Args:
      part: its tensors.
      family: the name of its family; empty if the config does not say it.
      config: the checkpoint's config.
      notes: a list to which remarks for the user are appended.

    Raises:
      UserError: the config has other sizes than the tensors, or does not describe the tower.
    """
    width, patch = part.size("patch_embed/kernel", 3), part.size("patch_embed/kernel", 0)
    class_token = part.holds("class_token")
    patches = part.size("position_embed", 0) - class_token
    grid, layers = math.isqrt(patches), part.count_layers()
    if grid * grid != patches:
        raise UserError(f"Tensor {part.name('position_embed')} has {patches} patches, which is not a square number.")
    mlp = part.size("blocks/mlp/up/bias", 0)
    if family:
        tower = _tower_from_config(family, mlp, get_tower_section(config), config.get("preprocessor", {}))
        keys = TOWERS.find(family).fields
        _require_equal(keys["width"], tower.width, width, part.shape("patch_embed/kernel"))
        _require_equal(keys.get("mlp", "mlp"), tower.mlp, mlp, part.shape("blocks/mlp/up/bias"))
        _require_equal(keys["layers"], tower.layers, layers, f"the tensors hold {layers} layers")
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
    return dataclasses.replace(
        TOWERS.find("clip").presets["clip-l-14-336"],
        image_size=grid * patch,
        patch_size=patch,
        width=width,
        layers=layers,
        heads=max(1, width // 64),
        mlp=mlp,
    )


def _tower_from_config(name: str, mlp: int, values: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> VisionConfig:
    """Builds a tower's config from transformers' ``vision_config`` and image processor config; both may omit keys.

    ``mlp`` is used if transformers' config does not give it.
    """
    family = TOWERS.find(name)
    hf_config = _load_hf_config(family.model_type, values, family.fields)
    found = {"mlp": mlp} | {name: getattr(hf_config, key) for name, key in family.fields.items()}
    activations = {hf_name: name for name, hf_name in ACTIVATIONS.items()}
    if not all(type(size) is int and size > 0 for size in (found["image_size"], found["patch_size"])):
        raise UserError(
            f"The vision tower has images of {found['image_size']!r} pixels and patches of {found['patch_size']!r}: "
            "both must be positive integers."
        )
    if found["activation"] not in activations:
        key = family.fields["activation"]
        raise UserError(f"The vision tower has {key} {found['activation']!r}: supported: {', '.join(activations)}.")
    if found["width"] % found["heads"]:
        raise UserError(
            f"The vision tower has {found['width']} channels with {found['heads']} heads: "
            "the heads must divide the channels."
        )
    found["activation"] = activations[found["activation"]]
    mean = _read_channels(preprocessor, "image_mean", family.mean)
    std = _read_channels(preprocessor, "image_std", family.std)
    return family.config(family=name, **family.traits, **found, mean=mean, std=std)


def _read_channels(preprocessor: Mapping[str, Any], key: str, default: Channels) -> Channels:
    values = preprocessor.get(key, default)
    if not isinstance(values, list | tuple) or [type(value) in (int, float) for value in values] != [True] * 3:
        raise UserError(f"The image processor's {key} is {values!r}, not three numbers.")
    red, green, blue = values
    return red, green, blue


# ---- Language models -------------------------------------------------------------------------------------------------


def find_decoder_family(config: Mapping[str, Any], families: Mapping[str, DecoderFamily]) -> str:
    """Returns the name of the family of the config's ``model_type``. Raises UserError if it is none of them."""
    kind = get_section(config, "text_config").get("model_type", config.get("model_type"))
    if kind is None:
        problem = "has no model_type" if config.keys() - {"preprocessor"} else "is missing"
        raise UserError(f"config.json {problem}, which is needed to import a language model: download it again.")
    for name, family in families.items():
        if kind in (family.model_type, *family.aliases):
            return name
    known = ", ".join(family.model_type for family in families.values())
    raise UserError(f"The language model has model_type {kind!r}: supported: {known}.")


def infer_llm_config(
    part: PartTensors, embedding: str, head: str | None, name: str, config: Mapping[str, Any], notes: list[str]
) -> LLMConfig:
    """Returns the config of a language model.

    Args:
      part: its tensors.
      embedding: name of the embedding's tensor.
      head: name of the output head's tensor; None if there is none.
      name: the name of its family.
      config: the checkpoint's config.
      notes: a list to which remarks for the user are appended.

    Raises:
      UserError: the config has other sizes than the tensors, or asks for something that is not computed here.
    """
    family, values, tensors = DECODERS.find(name), get_section(config, "text_config"), part.tensors
    hf_config = _load_hf_config(family.model_type, values, family.fields)
    for key, value in family.required.items():
        if getattr(hf_config, key) != value:
            raise UserError(f"The language model has {key} {getattr(hf_config, key)!r}: supported: {value!r}.")
    for key, note in family.ignored.items():
        if value := getattr(hf_config, key, None):
            notes.append(note.format(value))
    keys = family.fields
    found: dict[str, Any] = {field: getattr(hf_config, key, None) for field, key in keys.items()}
    layers, gate = part.count_layers(), "blocks/mlp/gate/kernel"
    _require_equal(keys["layers"], found["layers"], layers, f"the tensors hold {layers} layers")
    _, width = tensor_shape(tensors, embedding, 2)
    _require_equal(keys["width"], found["width"], width, f"{embedding} is {tensors.shape(embedding)}")
    _require_equal(keys["mlp"], found["mlp"], part.size(gate, 1), part.shape(gate))
    tied = found["tied"] or config.get(keys["tied"])
    found |= _infer_heads(part, family, found["heads"], values, notes)
    found |= {"vocab": _count_vocab(tensors, embedding, head, keys["vocab"], values, config, notes)}
    found |= {"tied": _is_tied(tensors, embedding, head, tied, keys["tied"], notes)}
    traits = {key: part.holds(path) for key, path in _TRAITS.items() if key in family.traits}
    found |= traits
    found["rope_theta"], found["rope_scaling"] = read_rope(hf_config.rope_parameters)
    family_name = _check_traits(part, name, traits, hf_config, notes)
    return family.config(**found, family=family_name)


# The parameters that show whether a decoder has a trait.
_TRAITS = {"qkv_bias": "blocks/attention/query/bias", "qk_norm": "blocks/attention/query_norm/scale"}


def _infer_heads(
    part: PartTensors, family: DecoderFamily, heads: int, values: Mapping[str, Any], notes: list[str]
) -> dict[str, int]:
    """Returns heads, kv heads and channels per head, from the rows of the projections."""
    query, key, norm = (f"blocks/attention/{name}" for name in ("query/kernel", "key/kernel", "query_norm/scale"))
    rows, kv_rows = part.size(query, 1, 2), part.size(key, 1, 2)
    keys = family.fields
    key_name, configured = keys["head_dim"], values.get(keys["head_dim"])
    if "qk_norm" in family.traits and part.holds(norm):  # of one head
        head_dim = part.size(norm, 0)
        heads = _note_conflict(values, keys["heads"], rows // max(1, head_dim), notes)
    else:
        head_dim = configured or rows // heads
    _note_conflict(values, key_name, head_dim, notes)
    if type(head_dim) is not int or head_dim < 1 or heads * head_dim != rows:
        raise UserError(
            f"The config says {keys['heads']} {heads}{f' and {key_name} {configured}' if configured else ''}, "
            f"but {part.shape(query)}: does config.json belong to this model?"
        )
    attention = part.name(query).rsplit(".", 2)[0]
    frequencies = f"{attention}.rotary_emb.inv_freq"  # one per two channels
    if frequencies in part.tensors and part.tensors.shape(frequencies) != (head_dim // 2,):
        raise UserError(
            f"{frequencies} is {part.tensors.shape(frequencies)}, but the config says heads of {head_dim} channels."
        )
    kv_heads = kv_rows // head_dim
    if kv_heads * head_dim != kv_rows or not kv_heads or heads % kv_heads:
        raise UserError(
            f"{part.name(key)} has {kv_rows} rows, which do not make kv heads of {head_dim} channels for {heads} heads."
        )
    return {
        "heads": heads,
        "kv_heads": _note_conflict(values, keys["kv_heads"], kv_heads, notes),
        "head_dim": head_dim,
    }


def _check_traits(part: PartTensors, name: str, traits: Mapping[str, bool], hf_config: Any, notes: list[str]) -> str:
    """Returns the family whose traits the tensors have: the one of the config if it can be."""
    family = DECODERS.find(name)
    expected = {
        key: value or bool(getattr(hf_config, family.asks.get(key, ""), False)) for key, value in family.traits.items()
    }
    if "qkv_bias" in traits and traits["qkv_bias"] != expected["qkv_bias"]:
        notes.append(
            f"The tensors have {'' if traits['qkv_bias'] else 'no '}attention biases, unlike the config; the tensors "
            "are used."
        )
    if "qk_norm" in traits and traits["qk_norm"] != expected["qk_norm"]:
        if expected["qk_norm"]:
            raise UserError(f"Tensor {part.name(_TRAITS['qk_norm'])} is missing.")
        notes.append("The tensors have query and key norms, unlike the config; the tensors are used.")
    return name if dict(traits) == dict(family.traits) else match_family(DECODERS, traits) or name


def _count_vocab(
    tensors: TensorFile,
    embedding: str,
    head: str | None,
    key: str,
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
    _note_conflict(values, key, rows, notes)
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


def _is_tied(
    tensors: TensorFile, embedding: str, head: str | None, configured: Any, key: str, notes: list[str]
) -> bool:
    """Whether the head is tied to the embedding; as in transformers, a head of other values is not."""
    if head == embedding and not configured:
        raise UserError("The embedding's tensor is missing, and config.json does not tie it to the head.")
    if head is None or not configured:
        return bool(configured)
    if head == embedding or tensors.equal(embedding, head):
        return True
    notes.append(f"The config says {key}, but {head} and {embedding} hold different values: the head is kept.")
    return False


def _load_hf_config(kind: str, values: Mapping[str, Any], keys: Mapping[str, str]) -> Any:
    """Returns transformers' config of a model type, with its defaults for missing keys. Its class declares no types."""
    from transformers import CONFIG_MAPPING  # imports torch if it is installed: 3 s

    try:
        hf_config = CONFIG_MAPPING[kind](**{key: value for key, value in values.items() if key != "model_type"})
        sizes = [getattr(hf_config, keys[key]) for key in ("width", "mlp", "layers", "heads") if key in keys]
    except Exception as error:  # its checks may raise anything, and the file is the cause
        reason = short_message(error)
        raise UserError(f"config.json does not describe a model of model_type {kind!r}: {reason}.") from None
    eps = getattr(hf_config, keys["norm_eps"])
    if not 0 <= eps < 1:  # also false for nan
        raise UserError(
            f"config.json does not describe a model of model_type {kind!r}: the epsilon of its norms is {eps}."
        )
    if not all(type(size) is int and 0 < size < 10**6 for size in sizes) or getattr(hf_config, keys["layers"]) > 1000:
        raise UserError(f"config.json does not describe a model of model_type {kind!r}: its sizes are {sizes}.")
    return hf_config
