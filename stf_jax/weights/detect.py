"""Detects the model in a checkpoint, from its tensor names and its config: parts, shapes and names.

Supported are CLIP and SigLIP towers, alone or with their text model; Llama, Mistral, Qwen2 and Qwen3; LLaVA-1.5 under
its own names and transformers'; LLaVA-STF, complete or only the eight tensors of its first stage; our own exports.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, get_args

from flax import nnx

from stf_jax.config import Aspect, FusionConfig, UserError
from stf_jax.models.fusions.base import TAPS, Fusion, tapped_blocks, tokens_per_image
from stf_jax.models.llm import Decoder, LLMConfig
from stf_jax.models.presets import VISION as VISION_PRESETS
from stf_jax.models.vit import VisionConfig, VisionTower
from stf_jax.weights import hf
from stf_jax.weights.claims import check_supported, infer_llm_config, infer_vision_config, tensor_shape
from stf_jax.weights.hf import Tensor, TensorMapping, map_parameters, param_shapes
from stf_jax.weights.tensors import TensorFile

# Tensors that are not imported, and why.
_UNUSED = (
    (r".*rotary_emb\.inv_freq", "computed from the config"),
    (r".*\.position_ids", "counted"),
)
_UNUSED_WITH_TOWER = (  # in checkpoints with a vision tower
    (r"(.*\.)?(post_layernorm|head)\..*", "above the blocks that are tapped"),
    (r"(.*\.)?(text_model\..*|text_projection\..*|visual_projection\..*|logit_scale|logit_bias)", "the text tower's"),
)


# A fusion's config, table and prefix, the tower it reads and its output width.
_DetectedFusion = tuple[FusionConfig, dict[str, Tensor], str, VisionConfig, int]


@dataclasses.dataclass(frozen=True)
class DetectedModel:
    """The parts of a checkpoint.

    Attributes:
      vision, llm, fusion: configs of the parts; None for a missing part.
      mappings: the tensors of each parameter, by its path (``llm/norm/scale``).
      unused: names of tensors that need not be read, with the reason.
      notes: remarks for the user.
    """

    vision: VisionConfig | None
    llm: LLMConfig | None
    fusion: FusionConfig | None
    mappings: dict[str, TensorMapping]
    unused: dict[str, str]
    notes: tuple[str, ...]


def detect_model(tensors: TensorFile, config: Mapping[str, Any], tower: VisionConfig | None = None) -> DetectedModel:
    """Detects the parts of a checkpoint.

    Values are read only to compare the head with the embedding, if the config says that they are tied.

    Args:
      tensors: the checkpoint's tensors.
      config: the checkpoint's ``config.json``; empty if there is none.
      tower: the vision tower that the fusion reads, if it comes from another checkpoint; one in here is then skipped.

    Raises:
      UserError: the checkpoint has no supported part; a model is not supported; a tensor is missing, unexpected or of
        the wrong shape.
    """
    mappings: dict[str, TensorMapping] = {}
    notes = list(tensors.notes)
    check_supported(tensors, config, notes)
    vision: VisionConfig | None = None
    llm: LLMConfig | None = None
    fusion: FusionConfig | None = None
    prefix = _find_prefix(tensors, hf.VISION["patch_embed/kernel"].name, "vision towers")
    skipped, has_tower = prefix if tower is not None else None, prefix is not None
    if prefix is not None and tower is None:
        vision = infer_vision_config(tensors, prefix, config, notes)
        mappings |= _map_part("vision", hf.VISION, lambda: VisionTower(nnx.Rngs(0), vision), {"": prefix})
    names = _find_decoder_names(tensors)
    if names is not None:
        body, embedding, head = names
        llm = infer_llm_config(tensors, body, embedding, head, config, notes)
        prefixes = {"model.": body, "model.embed_tokens.weight": embedding, "lm_head.weight": head or "lm_head.weight"}
        mappings |= _map_part("llm", hf.DECODER, lambda: Decoder(nnx.Rngs(0), llm), prefixes)
    source = vision or tower
    detected = _read_exported_fusion(tensors, config, source) or _detect_fusion(tensors, config, source)
    if detected is not None:
        fusion, table, prefix, read, out = detected
        if llm is not None and out != llm.width:
            raise UserError(f"The projector outputs {out} channels, but the language model has {llm.width}.")
        mappings |= _map_part(
            "fusion/connector", table, lambda: Fusion(nnx.Rngs(0), fusion, read, out).connector, {"": prefix}
        )
    if not mappings:
        raise UserError("The checkpoint holds no vision tower, language model or projector that is supported.")
    unused = _check_tensors(tensors, mappings, llm, skipped, has_tower)
    return DetectedModel(vision, llm, fusion, mappings, unused, tuple(notes))


def _map_part(
    part: str, table: Mapping[str, Tensor], build: Callable[[], nnx.Module], prefixes: Mapping[str, str]
) -> dict[str, TensorMapping]:
    mappings = map_parameters(table, param_shapes(build), prefixes)
    return {f"{part}/{path}": mapping for path, mapping in mappings.items()}


def _find_prefix(tensors: TensorFile, anchor: str, kind: str) -> str | None:
    """Returns the prefix of the one name that ends with ``anchor``; None if no name does."""
    found = [name.removesuffix(anchor) for name in tensors.names if name == anchor or name.endswith("." + anchor)]
    if len(found) > 1:
        raise UserError(f"The checkpoint holds {len(found)} {kind}, named {', '.join(found)}; one was expected.")
    return found[0] if found else None


def _find_decoder_names(tensors: TensorFile) -> tuple[str, str, str | None] | None:
    """Returns the prefix of a language model and its embedding's and head's names; None if there is no model."""
    body = _find_prefix(tensors, "embed_tokens.weight", "language models")
    head = _find_prefix(tensors, "lm_head.weight", "output heads")
    head = None if head is None else f"{head}lm_head.weight"
    if body is not None:
        return body, f"{body}embed_tokens.weight", head
    body = _find_prefix(tensors, "layers.0.mlp.gate_proj.weight", "language models")
    if body is None or head is None:
        return None
    return body, head, head  # of tied tensors, some programs save the head


def _read_exported_fusion(
    tensors: TensorFile, config: Mapping[str, Any], vision: VisionConfig | None
) -> _DetectedFusion | None:
    """Returns the same as :func:`_detect_fusion`, from the config of a folder that our export wrote."""
    if config.get("model_type") != "llava_stf":
        return None
    try:
        values = {key: value for key, value in config["stf_config"].items() if key not in ("side", "crosslayer")}
        fusion = FusionConfig(**{**values, "taps": tuple(values["taps"])})
        out = int(config["text_config"]["hidden_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"config.json does not describe an STF-JAX export: {error!r}.") from None
    sizes = (*fusion.taps, fusion.mbtf_hidden, fusion.mbtf_width, fusion.stf_hidden, fusion.depth, fusion.kernel)
    is_valid = isinstance(fusion.fusion, str) and all(type(size) is int and size >= 0 for size in sizes)
    if not is_valid or not fusion.kernel or fusion.depth > 1000:
        raise UserError(f"config.json does not describe an STF-JAX export: its stf_config is {values}.")
    if vision is None:
        raise UserError("The export has no vision tower: give the tower's folder as --vision=DIR.")
    tokens_per_image(fusion, vision.grid)  # raises UserError for an unknown fusion, or a kernel that does not fit
    table = hf.fusion_table(fusion, vision, out)
    anchor = next(tensor.name for tensor in table.values() if "{layer}" not in tensor.name)
    return fusion, table, _find_prefix(tensors, anchor, "projectors") or "", vision, out


def _detect_fusion(
    tensors: TensorFile, config: Mapping[str, Any], vision: VisionConfig | None
) -> _DetectedFusion | None:
    """Returns a fusion's config, table and prefix, the tower it reads and its output width; None if there is none."""
    hf_prefix = _find_prefix(tensors, "linear_1.weight", "projectors")
    prefix = hf_prefix if hf_prefix is not None else _find_prefix(tensors, "mm_projector.0.weight", "projectors")
    if prefix is None:
        return None
    first, second = ("linear_1", "linear_2") if hf_prefix is not None else ("mm_projector.0", "mm_projector.2")
    if f"{prefix}{second}.weight" not in tensors:
        raise UserError(f"The projector has no {prefix}{second}.weight: only projectors of two layers are supported.")
    _check_projector(config, vision)
    hidden, window = tensor_shape(tensors, f"{prefix}{first}.weight", 2)
    out, _ = tensor_shape(tensors, f"{prefix}{second}.weight", 2)
    has_mbtf = f"{prefix}mm_projector_crosslayer.2.weight" in tensors
    if has_mbtf:
        mbtf_width, mbtf_hidden = tensor_shape(tensors, f"{prefix}mm_projector_crosslayer.2.weight", 2)
        _, tapped = tensor_shape(tensors, f"{prefix}mm_projector_crosslayer.0.weight", 2)
        width = vision.width if vision else config.get("mm_hidden_size", mbtf_width)
        channels = mbtf_width
    else:
        mbtf_width = mbtf_hidden = 0
        width = tapped = vision.width if vision else config.get("mm_hidden_size", window)
        channels = width
    kernel = math.isqrt(window // channels)
    if kernel * kernel * channels != window or tapped % width:
        raise UserError(
            f"The projector reads windows of {window} values and taps of {tapped}, which do not divide into {width} "
            "channels, the width of its tower; give the tower's folder as --vision=DIR."
        )
    if kernel == 1:
        name = "mbtf" if has_mbtf else "mlp"
        if hidden != out:
            raise UserError(f"The projector has {hidden} channels between layers of {out}, which is not LLaVA's.")
    else:
        name = "mbtf_stf" if has_mbtf else "stf"
    # Shapes depend only on channels and kernel, so the eight tensors can be imported without a tower.
    read = vision or dataclasses.replace(VISION_PRESETS["clip-l-14-336"], width=width)
    fusion = FusionConfig(
        fusion=name,
        taps=_find_taps(config, vision, tapped // width, has_mbtf),
        kernel=kernel,
        mbtf_hidden=mbtf_hidden,
        mbtf_width=mbtf_width,
        stf_hidden=hidden if kernel > 1 else 0,
    )
    table = hf.fusion_table(fusion, read, out) if hf_prefix is None else dict(hf.LLAVA_PROJECTOR)
    return fusion, table, prefix, read, out


def _check_projector(config: Mapping[str, Any], vision: VisionConfig | None) -> None:
    """Raises UserError if LLaVA's config asks for something that the fusions here do not compute."""
    all_patches = vision is not None and not vision.class_token
    supported = {
        "projector_hidden_act": ("gelu",),
        "vision_feature_select_strategy": ("default", "full") if all_patches else ("default",),
        "mm_vision_select_feature": ("patch",),
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_patch_merge_type": ("flat",),
        "mm_use_im_start_end": (False,),  # no template here puts tokens around images
        "image_aspect_ratio": get_args(Aspect),
    }
    for key, values in supported.items():
        if config.get(key) is not None and config[key] not in values:
            raise UserError(f"The config says {key} {config[key]!r}: supported: {', '.join(map(str, values))}.")


def _find_taps(config: Mapping[str, Any], vision: VisionConfig | None, count: int, has_mbtf: bool) -> tuple[int, ...]:
    """Returns the tapped blocks, deepest first. Configs name at most one; the others are spaced as in the paper."""
    chosen = config.get("vision_feature_layer", config.get("mm_vision_select_layer", -2))
    if vision is None:
        if chosen != -2:
            raise UserError(f"The deepest tap is layer {chosen} of a tower: give the tower's folder as --vision=DIR.")
        if count not in (1, TAPS):
            raise UserError(f"The fusion reads {count} taps; give the tower's folder as --vision=DIR to locate them.")
        return ()
    if not isinstance(chosen, int):
        raise UserError(
            f"vision_feature_layer={chosen}: projectors that read several layers at once are not supported."
        )
    deepest = chosen if chosen >= 0 else vision.layers + 1 + chosen
    if not has_mbtf:
        return (deepest,)
    if count == min(TAPS, vision.layers):
        return (deepest, *tapped_blocks(FusionConfig(), vision.layers)[1:])
    return (deepest, *(math.ceil(vision.layers * i / count) for i in range(count - 1, 0, -1)))


def _check_tensors(
    tensors: TensorFile,
    mappings: Mapping[str, TensorMapping],
    llm: LLMConfig | None,
    skipped: str | None,
    has_tower: bool,
) -> dict[str, str]:
    """Compares the tensors with the expected ones; returns those that need not be read, with reasons."""
    problems: list[str] = []
    read: set[str] = set()
    for path, mapping in mappings.items():
        for name in mapping.names:
            read.add(name)
            expected = mapping.hf_shape
            if name not in tensors:
                problems.append(f"{name} {expected} is missing")
            elif tensors.shape(name) != expected and not (
                path in VOCABULARY and _has_extra_rows(tensors.shape(name), expected)
            ):
                problems.append(f"{name} is {tensors.shape(name)}, not {expected}")
            elif not tensors.is_floating(name):
                problems.append(f"{name} has type {tensors.dtype(name)}, which is not a floating-point type")
    unused: dict[str, str] = {}
    for name in set(tensors.names) - read:
        if skipped is not None and name.startswith(skipped):
            unused[name] = "the tower of --vision is used"
        elif llm is not None and llm.tied and name.endswith("lm_head.weight"):
            unused[name] = "tied to the embedding"
        else:
            reasons = _UNUSED + (_UNUSED_WITH_TOWER if has_tower else ())
            unused[name] = next((reason for pattern, reason in reasons if re.fullmatch(pattern, name)), "")
    problems += [f"{name} {tensors.shape(name)} is unexpected" for name, reason in unused.items() if not reason]
    if problems:
        listed = "; ".join(sorted(problems)[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise UserError(f"The tensors do not fit the model that the config describes: {listed}.")
    return dict(sorted(unused.items()))


VOCABULARY = ("llm/embedding", "llm/head/kernel")  # an export may have added rows for <image>, which imports drop


def _has_extra_rows(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return shape[0] > expected[0] and shape[1:] == expected[1:]
