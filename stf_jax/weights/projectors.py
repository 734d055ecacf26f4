"""Detects the fusion in a checkpoint: of our own exports, and of files of LLaVA and LLaVA-STF."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, get_args

from stf_jax.config import Aspect, FusionConfig, UserError, fusion_from_json
from stf_jax.models.decoders.base import LLMConfig
from stf_jax.models.fusions.base import TAPS, tapped_blocks, tokens_per_image
from stf_jax.models.spec import VISION
from stf_jax.models.tensor_names import TensorNames
from stf_jax.models.towers.base import VisionConfig
from stf_jax.weights.claims import find_prefix, tensor_shape
from stf_jax.weights.mapping import LLAVA_PROJECTOR, fusion_table
from stf_jax.weights.tensors import TensorFile

# Keys of an export's stf_config that do not belong to its FusionConfig.
_NOT_OF_THE_FUSION = ("side", "crosslayer", "class_token", "unused", "tiles")


@dataclasses.dataclass(frozen=True)
class DetectedFusion:
    """A fusion in a checkpoint.

    Attributes:
      table: names of its tensors, after ``prefix``.
      vision: the tower that it reads.
      out: its output width.
    """

    config: FusionConfig
    table: TensorNames
    prefix: str
    vision: VisionConfig
    out: int


def detect_fusion(
    tensors: TensorFile, config: Mapping[str, Any], vision: VisionConfig | None, llm: LLMConfig | None
) -> DetectedFusion | None:
    """Detects the fusion of a checkpoint with that ``config.json``; None if there is none.

    Args:
      vision: the tower that the fusion reads, where it is known.
      llm: the checkpoint's language model, if it has one.

    Raises:
      UserError: the fusion is not supported, or needs the tower.
    """
    return _read_exported_fusion(tensors, config, vision, llm) or _detect_published(tensors, config, vision)


def _read_exported_fusion(
    tensors: TensorFile, config: Mapping[str, Any], vision: VisionConfig | None, llm: LLMConfig | None
) -> DetectedFusion | None:
    """Returns the fusion of a folder that our export wrote, from its config."""
    if config.get("model_type") != "llava_stf":
        return None
    try:
        values = {key: value for key, value in config["stf_config"].items() if key not in _NOT_OF_THE_FUSION}
        fusion = fusion_from_json(values)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"config.json does not describe an STF-JAX export: {error!r}.") from None
    sizes = *fusion.taps, *fusion.budgets, fusion.mbtf_hidden, fusion.mbtf_width, fusion.stf_hidden, fusion.depth
    are_sizes = all(type(size) is int and size >= 0 for size in (*sizes, fusion.kernel))
    is_valid = isinstance(fusion.fusion, str) and are_sizes
    if not is_valid or not fusion.kernel or fusion.depth > 1000:
        raise UserError(f"config.json does not describe an STF-JAX export: its stf_config is {values}.")
    if vision is None:
        raise UserError("The export has no vision tower: give the tower's folder as --vision=DIR.")
    if llm is None:
        raise UserError("The export has no language model.")
    out = llm.width
    tokens_per_image(fusion, vision.grid)  # raises UserError for an unknown fusion, or a kernel that does not fit
    table = fusion_table(fusion, vision, out)
    anchor = next(tensor.name for tensor in table.values() if "{layer}" not in tensor.name)
    return DetectedFusion(fusion, table, find_prefix(tensors, anchor, "projectors") or "", vision, out)


def _detect_published(
    tensors: TensorFile, config: Mapping[str, Any], vision: VisionConfig | None
) -> DetectedFusion | None:
    """Detects LLaVA's projector, or MBTF and STF, by their names in LLaVA, LLaVA-STF or transformers."""
    hf_prefix = find_prefix(tensors, "linear_1.weight", "projectors")
    prefix = hf_prefix if hf_prefix is not None else find_prefix(tensors, "mm_projector.0.weight", "projectors")
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
    read = vision or dataclasses.replace(VISION["clip-l-14-336"], width=width)
    fusion = FusionConfig(
        fusion=name,
        taps=_find_taps(config, vision, tapped // width, has_mbtf),
        kernel=kernel,
        mbtf_hidden=mbtf_hidden,
        mbtf_width=mbtf_width,
        stf_hidden=hidden if kernel > 1 else 0,
    )
    table = fusion_table(fusion, read, out) if hf_prefix is None else LLAVA_PROJECTOR
    return DetectedFusion(fusion, table, prefix, read, out)


def _check_projector(config: Mapping[str, Any], vision: VisionConfig | None) -> None:
    """Raises UserError if LLaVA's config asks for something that the fusions here do not compute."""
    all_patches = vision is not None and not vision.class_token
    supported = {
        "projector_hidden_act": ("gelu",),
        "vision_feature_select_strategy": ("default", "full") if all_patches else ("default",),
        "mm_vision_select_feature": ("patch",),
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_use_im_start_end": (False,),  # no template here puts tokens around images
        "image_aspect_ratio": (*get_args(Aspect), "anyres"),
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
