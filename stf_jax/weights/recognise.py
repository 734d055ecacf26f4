"""What a checkpoint of theirs is, told by its keys and its config: its parts, their shapes, under which names.

Read are CLIP and SigLIP towers, alone or beside their text model; Llama, Mistral, Qwen2 and Qwen3; LLaVA-1.5 under its
own names and under transformers'; LLaVA-STF, whole or only the eight tensors of its first stage; our own exports.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from flax import nnx
from transformers import CONFIG_MAPPING

from stf_jax.config import FusionConfig, UserError, one_line
from stf_jax.models.fusion import TAPS, Fusion, tapped_blocks, tokens_per_image
from stf_jax.models.llm import Decoder, LLMConfig, RopeScaling
from stf_jax.models.presets import VISION as VISION_PRESETS
from stf_jax.models.vit import VisionConfig, VisionTower
from stf_jax.weights import hf
from stf_jax.weights.hf import Place, declared, places

# Tensors that have no place with us, and why that is well.
_UNUSED = (
    (r".*rotary_emb\.inv_freq", "computed from the config"),
    (r".*\.position_ids", "counted"),
)
_UNUSED_OF_TOWERS = (  # where there is a vision tower
    (r"(.*\.)?(post_layernorm|head)\..*", "above the blocks that are tapped"),
    (r"(.*\.)?(text_model\..*|text_projection\..*|visual_projection\..*|logit_scale|logit_bias)", "the text tower's"),
)
_DECODERS = {"llava_llama": "llama", "llava": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclasses.dataclass(frozen=True)
class Recognised:
    """The parts of a checkpoint.

    Attributes:
      vision, llm, fusion: their shapes; None for a part that is not there.
      places: for each parameter of ours (``llm/norm/scale``), its tensors.
      unused: names of tensors that are rightly left unread, with the reason.
      notes: what a user should know.
    """

    vision: VisionConfig | None
    llm: LLMConfig | None
    fusion: FusionConfig | None
    places: dict[str, Place]
    unused: dict[str, str]
    notes: tuple[str, ...]


def recognise(
    shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], tower: VisionConfig | None = None
) -> Recognised:
    """Tells what the tensors of those shapes are.

    Args:
      shapes: shape of every tensor, by name.
      config: the checkpoint's ``config.json``; empty where there is none.
      tower: the vision tower that the fusion reads where another checkpoint gives it; a tower in this one is left.

    Raises:
      UserError: nothing known is in it; a model that we do not have; a tensor missing, misshapen or unexplained.
    """
    found, notes = {}, []
    vision = llm = fusion = None
    prefix = _prefix(shapes, hf.VISION["patch_embed/kernel"].name, "vision towers")
    skipped, towers = prefix if tower is not None else None, prefix is not None
    if prefix is not None and tower is None:
        vision = _vision(shapes, prefix, config, notes)
        found |= _places("vision", hf.VISION, lambda: VisionTower(nnx.Rngs(0), vision), {"": prefix})
    body = _prefix(shapes, "embed_tokens.weight", "language models")
    if body is not None:
        head = _prefix(shapes, "lm_head.weight", "output heads")
        llm = _llm(shapes, body, head, config, notes)
        names = {"model.": body, "lm_head.": f"{head or ''}lm_head."}
        found |= _places("llm", hf.DECODER, lambda: Decoder(nnx.Rngs(0), llm), names)
    joint = _exported_fusion(shapes, config, vision or tower) or _fusion(shapes, config, vision or tower)
    if joint is not None:
        fusion, table, prefix, read, out = joint
        found |= _places("fusion", table, lambda: Fusion(nnx.Rngs(0), fusion, read, out), {"": prefix})
    if not found:
        raise UserError("The checkpoint holds no vision tower, language model or projector that is known.")
    return Recognised(vision, llm, fusion, found, _check(shapes, found, llm, skipped, towers), tuple(notes))


def vision_shape(values: Mapping[str, Any], pixels: Mapping[str, Any]) -> VisionConfig:
    """A tower of transformers' ``vision_config`` and of its ``preprocessor_config.json``, either with keys left out.

    Raises UserError for a tower other than CLIP's and SigLIP's.
    """
    kind = values["model_type"]
    if kind not in ("clip_vision_model", "siglip_vision_model"):
        raise UserError(f"Vision tower of model_type {kind!r}: only CLIP's and SigLIP's are known.")
    full = _full(kind, values)
    if not all(type(size) is int and size > 0 for size in (full.image_size, full.patch_size)):
        raise UserError(f"Vision tower with pictures of {full.image_size!r} pixels and patches of {full.patch_size!r}.")
    if full.hidden_act not in _ACTIVATIONS:
        raise UserError(f"Vision tower with hidden_act {full.hidden_act!r}: known are {', '.join(_ACTIVATIONS)}.")
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
        raise UserError(f"The picture processor's {key} is {values!r}, not three numbers.")
    return tuple(values)


def _full(kind, values):
    """transformers' config of that kind, with its defaults in place of keys that are left out."""
    try:
        full = CONFIG_MAPPING[kind](**{key: value for key, value in values.items() if key != "model_type"})
        sizes = [full.hidden_size, full.intermediate_size, full.num_hidden_layers, full.num_attention_heads]
    except Exception as error:  # whatever its checks raise, the file is at fault
        said = one_line(error)
        raise UserError(f"config.json does not describe a model of model_type {kind!r}: {said}.") from None
    eps = getattr(full, "rms_norm_eps", getattr(full, "layer_norm_eps", 0))
    if not 0 <= eps < 1:  # nor nan
        raise UserError(f"config.json does not describe a model of model_type {kind!r}: its norms add {eps}.")
    if not all(type(size) is int and 0 < size < 10**6 for size in sizes) or sizes[2] > 1000:
        raise UserError(f"config.json does not describe a model of model_type {kind!r}: its sizes are {sizes}.")
    return full


def _sizes(shapes, name, count):
    """The shape of a tensor that is there and has so many axes."""
    if name not in shapes:
        raise UserError(f"Tensor {name} is missing.")
    if len(shapes[name]) != count:
        raise UserError(f"Tensor {name} has shape {shapes[name]}: {count} axes were expected.")
    return shapes[name]


def _places(part, table, build, prefixes):
    return {f"{part}/{path}": place for path, place in places(table, declared(build), prefixes).items()}


def _prefix(shapes, anchor, what):
    """What stands before the anchor in the one name that ends with it; None where none does."""
    found = [name.removesuffix(anchor) for name in shapes if name == anchor or name.endswith("." + anchor)]
    if len(found) > 1:
        raise UserError(f"The checkpoint holds {len(found)} {what}, named {', '.join(found)}; one was expected.")
    return found[0] if found else None


def _layers(shapes, prefix):
    found = {int(match[1]) for name in shapes if (match := re.match(re.escape(prefix) + r"layers\.(\d+)\.", name))}
    return max(found, default=-1) + 1


def _section(config, key):
    """A part of a composite config, or a config that is of one part."""
    values = config.get(key) or config
    if not isinstance(values, Mapping) or not isinstance(values.get("model_type", ""), str):
        raise UserError(f"config.json does not describe a model: its {key} or model_type is malformed.")
    return values


def _vision(shapes, prefix, config, notes):
    pixels = config.get("preprocessor", {})
    values = _section(config, "vision_config")
    if values.get("model_type") in ("clip_vision_model", "siglip_vision_model"):
        return vision_shape(values, pixels)
    # Only LLaVA's own files say nothing of their tower but its name. All of CLIP's have heads of 64 channels.
    if f"{prefix}embeddings.class_embedding" not in shapes:
        raise UserError("The checkpoint does not say the shape of its vision tower; give its folder as --vision=DIR.")
    width, _, patch, _ = _sizes(shapes, f"{prefix}embeddings.patch_embedding.weight", 4)
    grid = math.isqrt(_sizes(shapes, f"{prefix}embeddings.position_embedding.weight", 2)[0])
    (mlp,) = _sizes(shapes, f"{prefix}encoder.layers.0.mlp.fc1.bias", 1)
    layers = _layers(shapes, f"{prefix}encoder.")
    notes.append(
        f"The vision tower's shape was told by its tensors: {layers} layers of {width // 64} heads, CLIP's quick-GELU. "
        "If that is wrong, give its folder as --vision=DIR."
    )
    like = VISION_PRESETS["clip-l-14-336"]
    return dataclasses.replace(
        like, image_size=grid * patch, patch_size=patch, width=width, layers=layers, heads=max(1, width // 64), mlp=mlp
    )


def _llm(shapes, prefix, head, config, notes):
    values = _section(config, "text_config")
    kind = values.get("model_type")
    kind = _DECODERS.get(kind, kind)
    if kind not in ("llama", "mistral", "qwen2", "qwen3"):
        raise UserError(f"Language model of model_type {kind!r}: known are llama, mistral, qwen2 and qwen3.")
    full = _full(kind, values)
    if full.hidden_act != "silu":
        raise UserError(f"Language model with hidden_act {full.hidden_act!r}: only 'silu' is known.")
    window = getattr(full, "sliding_window", None)
    if window is not None and getattr(full, "use_sliding_window", True):
        notes.append(f"The sliding window of {window} positions is not applied: texts up to that length are exact.")
    tied = full.tie_word_embeddings
    if values is not config and head is None:  # in a composite config either may say so; a head that is there wins
        tied = tied or config.get("tie_word_embeddings", False)
    rows, _ = _sizes(shapes, f"{prefix}embed_tokens.weight", 2)
    return LLMConfig(
        vocab=config.get("stf_vocab", rows),
        width=full.hidden_size,
        layers=full.num_hidden_layers,
        heads=full.num_attention_heads,
        kv_heads=full.num_key_value_heads,
        head_dim=getattr(full, "head_dim", None) or full.hidden_size // full.num_attention_heads,
        mlp=full.intermediate_size,
        rope_theta=_number(full.rope_parameters, "rope_theta"),
        rope_scaling=_rope_scaling(full.rope_parameters),
        norm_eps=full.rms_norm_eps,
        qkv_bias=f"{prefix}layers.0.self_attn.q_proj.bias" in shapes,
        qk_norm=f"{prefix}layers.0.self_attn.q_norm.weight" in shapes,
        tied=tied,
    )


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


def _exported_fusion(shapes, config, vision):
    """As :func:`_fusion`, of a folder that our export wrote, whose config tells."""
    if config.get("model_type") != "llava_stf":
        return None
    try:
        values = config["stf_config"]
        fusion = FusionConfig(**{**values, "taps": tuple(values["taps"])})
        out = int(config["text_config"]["hidden_size"])
        widths = (fusion.mbtf_hidden, fusion.mbtf_width, fusion.stf_hidden)
        numbers = (*fusion.taps, fusion.kernel, *widths, fusion.depth)
        if not all(type(number) is int and number >= 0 for number in numbers) or fusion.depth > 1000:
            raise TypeError(f"its numbers are {numbers}")
        tokens_per_image(fusion, vision.grid)
        table = hf.fusion_table(fusion)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"config.json does not describe an export of ours: {error!r}.") from None
    anchor = next(tensor.name for tensor in table.values() if "{layer}" not in tensor.name)
    return fusion, table, _prefix(shapes, anchor, "projectors") or "", vision, out


def _fusion(shapes, config, vision):
    """The fusion's config, table, prefix, the tower it reads and its output width; None where there is none."""
    hf_prefix = _prefix(shapes, "linear_1.weight", "projectors")
    prefix = hf_prefix if hf_prefix is not None else _prefix(shapes, "mm_projector.0.weight", "projectors")
    if prefix is None:
        return None
    first, second = ("linear_1", "linear_2") if hf_prefix is not None else ("mm_projector.0", "mm_projector.2")
    if f"{prefix}{second}.weight" not in shapes:
        raise UserError(f"The projector has no {prefix}{second}.weight: only those of two layers are known.")
    _check_projector(config, vision)
    hidden, window = _sizes(shapes, f"{prefix}{first}.weight", 2)
    out, _ = _sizes(shapes, f"{prefix}{second}.weight", 2)
    mixed = f"{prefix}mm_projector_crosslayer.2.weight" in shapes
    if mixed:
        mbtf_width, mbtf_hidden = _sizes(shapes, f"{prefix}mm_projector_crosslayer.2.weight", 2)
        _, tapped = _sizes(shapes, f"{prefix}mm_projector_crosslayer.0.weight", 2)
        width = vision.width if vision else config.get("mm_hidden_size", mbtf_width)
        table, channels = dict(hf.MBTF), mbtf_width
    else:
        mbtf_width = mbtf_hidden = 0
        width = tapped = vision.width if vision else config.get("mm_hidden_size", window)
        table, channels = {}, width
    kernel = math.isqrt(window // channels)
    if kernel * kernel * channels != window or tapped % width:
        raise UserError(
            f"The projector reads {window} values and its taps {tapped}: no whole windows and taps of a tower of "
            f"{width} channels; give the tower's folder as --vision=DIR."
        )
    if kernel == 1:
        name = "mbtf" if mixed else "mlp"
        if hidden != out:
            raise UserError(f"The projector has {hidden} channels between layers of {out}, which is not LLaVA's.")
        table |= hf.LLAVA_HF if hf_prefix is not None else hf.PROJECTOR
    else:
        name = "mbtf_stf" if mixed else "stf"
        table |= hf.STF
    # Parameters' shapes follow from channels and kernel alone, so that the eight tensors need no tower beside them.
    read = vision or dataclasses.replace(VISION_PRESETS["clip-l-14-336"], width=width)
    fusion = FusionConfig(
        fusion=name,
        taps=_taps(config, vision, tapped // width, mixed),
        kernel=kernel,
        mbtf_hidden=mbtf_hidden,
        mbtf_width=mbtf_width,
        stf_hidden=hidden if kernel > 1 else 0,
    )
    return fusion, table, prefix, read, out


def _check_projector(config, vision):
    """Raises UserError where LLaVA's config asks for what the fusions here do not compute."""
    whole = vision is not None and not vision.class_token
    known = {
        "projector_hidden_act": ("gelu",),
        "vision_feature_select_strategy": ("default", "full") if whole else ("default",),
        "mm_vision_select_feature": ("patch",),
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_patch_merge_type": ("flat",),
    }
    for key, values in known.items():
        if config.get(key, values[0]) not in values:
            raise UserError(f"config.json says {key} {config[key]!r}: only {' and '.join(values)} is known.")


def _taps(config, vision, count, mixed):
    """Blocks, deepest first. The files name one at most; the others are spaced as the authors' are."""
    chosen = config.get("vision_feature_layer", config.get("mm_vision_select_layer", -2))
    if vision is None:
        if chosen != -2:
            raise UserError(f"The deepest tap is layer {chosen} of a tower: give its folder as --vision=DIR.")
        if count not in (1, TAPS):
            raise UserError(f"The fusion reads {count} taps; give the tower's folder as --vision=DIR to tell which.")
        return ()
    if not isinstance(chosen, int):
        raise UserError(f"vision_feature_layer={chosen}: a projector that reads several layers at once is not known.")
    deepest = chosen if chosen >= 0 else vision.layers + 1 + chosen
    if not mixed:
        return (deepest,)
    if count == min(TAPS, vision.layers):
        return (deepest, *tapped_blocks(FusionConfig(), vision.layers)[1:])
    return (deepest, *(math.ceil(vision.layers * i / count) for i in range(count - 1, 0, -1)))


def _check(shapes, found, llm, skipped, towers):
    """Compares what is there with what is wanted; gives the tensors rightly left unread, with reasons."""
    wrong, read = [], set()
    for path, place in found.items():
        for name in place.names:
            read.add(name)
            wanted = place.theirs
            if name not in shapes:
                wrong.append(f"{name} {wanted} is missing")
            elif shapes[name] != wanted and not (path in VOCABULARY and _grown(shapes[name], wanted)):
                wrong.append(f"{name} is {shapes[name]}, not {wanted}")
    unused = {}
    for name in shapes.keys() - read:
        if skipped is not None and name.startswith(skipped):
            unused[name] = "the tower of --vision is taken"
        elif llm is not None and llm.tied and name.endswith("lm_head.weight"):
            unused[name] = "tied to the embedding"
        else:
            reasons = _UNUSED + (_UNUSED_OF_TOWERS if towers else ())
            unused[name] = next((why for pattern, why in reasons if re.fullmatch(pattern, name)), "")
    wrong += [f"{name} {shapes[name]} has no place" for name, why in unused.items() if not why]
    if wrong:
        listed = "; ".join(sorted(wrong)[:20]) + (f"; and {len(wrong) - 20} more" if len(wrong) > 20 else "")
        raise UserError(f"The tensors do not fit the model that the config describes: {listed}.")
    return dict(sorted(unused.items()))


VOCABULARY = ("llm/embedding", "llm/head/kernel")  # rows that an export added for <image> are cut off again


def _grown(shape, wanted):
    return shape[0] > wanted[0] and shape[1:] == wanted[1:]
