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

from stf_jax.config import FusionConfig, UserError
from stf_jax.models.fusion import TAPS, Fusion, tapped_blocks, tokens_per_image
from stf_jax.models.llm import Decoder, LLMConfig
from stf_jax.models.presets import VISION as VISION_PRESETS
from stf_jax.models.vit import VisionConfig, VisionTower
from stf_jax.weights import hf
from stf_jax.weights.claims import check_kind, decoder_shape, sizes, tower_shape
from stf_jax.weights.hf import Place, declared, places
from stf_jax.weights.tensors import Tensors

# Tensors that have no place with us, and why that is well.
_UNUSED = (
    (r".*rotary_emb\.inv_freq", "computed from the config"),
    (r".*\.position_ids", "counted"),
)
_UNUSED_OF_TOWERS = (  # where there is a vision tower
    (r"(.*\.)?(post_layernorm|head)\..*", "above the blocks that are tapped"),
    (r"(.*\.)?(text_model\..*|text_projection\..*|visual_projection\..*|logit_scale|logit_bias)", "the text tower's"),
)


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


def recognise(tensors: Tensors, config: Mapping[str, Any], tower: VisionConfig | None = None) -> Recognised:
    """Detects what the tensors are. Values are read of two alone, where a config says that head and embedding are one.

    Args:
      tensors: of the checkpoint.
      config: the checkpoint's ``config.json``; empty where there is none.
      tower: the vision tower that the fusion reads where another checkpoint gives it; a tower in this one is left.

    Raises:
      UserError: nothing known is in it; a model that we do not have; a tensor missing, misshapen or unexplained.
    """
    found, notes = {}, list(tensors.notes)
    check_kind(tensors, config, notes)
    vision = llm = fusion = None
    prefix = _prefix(tensors, hf.VISION["patch_embed/kernel"].name, "vision towers")
    skipped, towers = prefix if tower is not None else None, prefix is not None
    if prefix is not None and tower is None:
        vision = tower_shape(tensors, prefix, config, notes)
        found |= _places("vision", hf.VISION, lambda: VisionTower(nnx.Rngs(0), vision), {"": prefix})
    names = _decoder_names(tensors)
    if names is not None:
        body, embedding, head = names
        llm = decoder_shape(tensors, body, embedding, head, config, notes)
        prefixes = {"model.": body, "model.embed_tokens.weight": embedding, "lm_head.weight": head or "lm_head.weight"}
        found |= _places("llm", hf.DECODER, lambda: Decoder(nnx.Rngs(0), llm), prefixes)
    joint = _exported_fusion(tensors, config, vision or tower) or _fusion(tensors, config, vision or tower)
    if joint is not None:
        fusion, table, prefix, read, out = joint
        if llm is not None and out != llm.width:
            raise UserError(f"The projector gives {out} channels, but the language model has {llm.width}.")
        found |= _places("fusion", table, lambda: Fusion(nnx.Rngs(0), fusion, read, out), {"": prefix})
    if not found:
        raise UserError("The checkpoint holds no vision tower, language model or projector that is known.")
    return Recognised(vision, llm, fusion, found, _check(tensors, found, llm, skipped, towers), tuple(notes))


def _places(part, table, build, prefixes):
    return {f"{part}/{path}": place for path, place in places(table, declared(build), prefixes).items()}


def _prefix(tensors, anchor, what):
    """What stands before the anchor in the one name that ends with it; None where none does."""
    found = [name.removesuffix(anchor) for name in tensors.names if name == anchor or name.endswith("." + anchor)]
    if len(found) > 1:
        raise UserError(f"The checkpoint holds {len(found)} {what}, named {', '.join(found)}; one was expected.")
    return found[0] if found else None


def _decoder_names(tensors):
    """A language model's prefix, and the names of its embedding and its head (or None); None where there is none."""
    body = _prefix(tensors, "embed_tokens.weight", "language models")
    head = _prefix(tensors, "lm_head.weight", "output heads")
    head = None if head is None else f"{head}lm_head.weight"
    if body is not None:
        return body, f"{body}embed_tokens.weight", head
    body = _prefix(tensors, "layers.0.mlp.gate_proj.weight", "language models")
    if body is None or head is None:
        return None
    return body, head, head  # of tied tensors, some programs save the head


def _exported_fusion(tensors, config, vision):
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
    return fusion, table, _prefix(tensors, anchor, "projectors") or "", vision, out


def _fusion(tensors, config, vision):
    """The fusion's config, table, prefix, the tower it reads and its output width; None where there is none."""
    hf_prefix = _prefix(tensors, "linear_1.weight", "projectors")
    prefix = hf_prefix if hf_prefix is not None else _prefix(tensors, "mm_projector.0.weight", "projectors")
    if prefix is None:
        return None
    first, second = ("linear_1", "linear_2") if hf_prefix is not None else ("mm_projector.0", "mm_projector.2")
    if f"{prefix}{second}.weight" not in tensors:
        raise UserError(f"The projector has no {prefix}{second}.weight: only those of two layers are known.")
    _check_projector(config, vision)
    hidden, window = sizes(tensors, f"{prefix}{first}.weight", 2)
    out, _ = sizes(tensors, f"{prefix}{second}.weight", 2)
    mixed = f"{prefix}mm_projector_crosslayer.2.weight" in tensors
    if mixed:
        mbtf_width, mbtf_hidden = sizes(tensors, f"{prefix}mm_projector_crosslayer.2.weight", 2)
        _, tapped = sizes(tensors, f"{prefix}mm_projector_crosslayer.0.weight", 2)
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
    # Parameters' tensors follow from channels and kernel alone, so that the eight tensors need no tower beside them.
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
        "mm_use_im_start_end": (False,),  # tokens around each image, which no template here has
        "image_aspect_ratio": ("square", "pad"),
    }
    for key, values in known.items():
        if config.get(key) is not None and config[key] not in values:
            raise UserError(f"The config says {key} {config[key]!r}: only {' and '.join(map(str, values))} is known.")


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


def _check(tensors, found, llm, skipped, towers):
    """Compares what is there with what is wanted; gives the tensors rightly left unread, with reasons."""
    wrong, read = [], set()
    for path, place in found.items():
        for name in place.names:
            read.add(name)
            wanted = place.theirs
            if name not in tensors:
                wrong.append(f"{name} {wanted} is missing")
            elif tensors.shape(name) != wanted and not (path in VOCABULARY and _grown(tensors.shape(name), wanted)):
                wrong.append(f"{name} is {tensors.shape(name)}, not {wanted}")
            elif not tensors.is_floating(name):
                wrong.append(f"{name} has type {tensors.dtype(name)}, which is no floating-point type")
    unused = {}
    for name in set(tensors.names) - read:
        if skipped is not None and name.startswith(skipped):
            unused[name] = "the tower of --vision is taken"
        elif llm is not None and llm.tied and name.endswith("lm_head.weight"):
            unused[name] = "tied to the embedding"
        else:
            reasons = _UNUSED + (_UNUSED_OF_TOWERS if towers else ())
            unused[name] = next((why for pattern, why in reasons if re.fullmatch(pattern, name)), "")
    wrong += [f"{name} {tensors.shape(name)} has no place" for name, why in unused.items() if not why]
    if wrong:
        listed = "; ".join(sorted(wrong)[:20]) + (f"; and {len(wrong) - 20} more" if len(wrong) > 20 else "")
        raise UserError(f"The tensors do not fit the model that the config describes: {listed}.")
    return dict(sorted(unused.items()))


VOCABULARY = ("llm/embedding", "llm/head/kernel")  # rows that an export added for <image> are cut off again


def _grown(shape, wanted):
    return shape[0] > wanted[0] and shape[1:] == wanted[1:]
