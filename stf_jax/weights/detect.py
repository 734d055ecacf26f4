"""Detects the model in a checkpoint, from its tensor names and its config: parts, shapes and names.

Supported are CLIP and SigLIP towers, alone or with their text model; Llama, Mistral, Qwen2 and Qwen3; LLaVA-1.5 under
its own names and transformers'; LLaVA-STF, complete or only the eight tensors of its first stage; our own exports.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import nnx

from stf_jax.config import FusionConfig, UserError
from stf_jax.models.decoders.base import DECODERS, DecoderFamily, LLMConfig, find_decoder_class
from stf_jax.models.fusions.base import Fusion
from stf_jax.models.layers import make_rngs
from stf_jax.models.tensor_names import TensorNames
from stf_jax.models.towers.base import TOWERS, TowerFamily, VisionConfig, find_tower_class
from stf_jax.registry import load_object
from stf_jax.weights.anyres import NEWLINE, read_tiles
from stf_jax.weights.claims import (
    PartTensors,
    check_supported,
    find_decoder_family,
    find_prefix,
    get_tower_section,
    infer_llm_config,
    infer_vision_config,
)
from stf_jax.weights.mapping import TensorMapping, map_parameters, param_shapes
from stf_jax.weights.projectors import detect_fusion
from stf_jax.weights.tensors import TensorFile

_ABOVE = "above the blocks that are tapped"
# Tensors that are not imported, and why.
_UNUSED = (
    (r".*rotary_emb\.inv_freq", "computed from the config"),
    (r".*\.position_ids", "counted"),
)
# The same in checkpoints with a vision tower.
_UNUSED_WITH_TOWER = (
    (r"(.*\.)?head\..*", _ABOVE),
    (r"(.*\.)?(text_model\..*|text_projection\..*|visual_projection\..*|logit_scale|logit_bias)", "the text tower's"),
)


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


def detect_model(
    tensors: TensorFile, config: Mapping[str, Any], tower: VisionConfig | None = None, families: Sequence[str] = ()
) -> DetectedModel:
    """Detects the parts of a checkpoint.

    Values are read only to compare the head with the embedding, if the config says that they are tied.

    Args:
      tensors: the checkpoint's tensors.
      config: the checkpoint's ``config.json``; empty if there is none.
      tower: the vision tower that the fusion reads, if it comes from another checkpoint; one in here is then skipped.
      families: ``package.module:FAMILY`` of a tower or a language model, besides the package's own.

    Raises:
      UserError: the checkpoint has no supported part; a model is not supported; a tensor is missing, unexpected or of
        the wrong shape.
    """
    towers, decoders = _find_families(families)
    mappings: dict[str, TensorMapping] = {}
    notes = list(tensors.notes)
    check_supported(tensors, config, notes)
    vision: VisionConfig | None = None
    llm: LLMConfig | None = None
    fusion: FusionConfig | None = None
    kind = get_tower_section(config).get("model_type")
    tower_name = next((name for name, family in towers.items() if family.model_type == kind), "")
    tower_family = towers[tower_name or "clip"]  # the names of its tensors are SigLIP's too
    prefix = find_prefix(tensors, tower_family.tensor_names[tower_family.anchor].name, "vision towers")
    skipped = prefix if tower is not None else None
    if prefix is not None and tower is None:
        part = PartTensors(tensors, tower_family.tensor_names, {"": prefix})
        vision = infer_vision_config(part, tower_name, config, notes)
        mappings |= _map_part(
            "vision", part.names, lambda: find_tower_class(vision)(make_rngs(0), vision), part.prefixes
        )
    names, head = _find_decoder_names(tensors, decoders), None
    if names is not None:
        body, embedding, head = names
        llm_name = find_decoder_family(config, decoders)
        family = decoders[llm_name]
        default = family.tensor_names["head/kernel"].name
        prefixes = {family.root: body, family.tensor_names["embedding"].name: embedding, default: head or default}
        part = PartTensors(tensors, family.tensor_names, prefixes)
        llm = infer_llm_config(part, embedding, head, llm_name, config, notes)
        mappings |= _map_part("llm", part.names, lambda: find_decoder_class(llm)(make_rngs(0), llm), prefixes)
    detected = detect_fusion(tensors, config, vision or tower, llm)
    if detected is not None:
        fusion, read, out = detected.config, detected.vision, detected.out
        if llm is not None and out != llm.width:
            raise UserError(f"The projector outputs {out} channels, but the language model has {llm.width}.")
        mappings |= _map_part(
            "fusion/connector",
            detected.table,
            lambda: Fusion(make_rngs(0), fusion, read, out).connector,
            {"": detected.prefix},
        )
        tiles = read_tiles(config, vision or tower)
        if tiles is not None and tiles.marks == "newline":
            name = f"{find_prefix(tensors, NEWLINE, 'newline tokens') or ''}{NEWLINE}"
            mappings["fusion/newline"] = TensorMapping((name,), ((0,),), (out,), stacked=False)
    if not mappings:
        raise UserError("The checkpoint holds no vision tower, language model or projector that is supported.")
    unused = _check_tensors(tensors, mappings, llm, head, skipped, tower_family if prefix is not None else None)
    return DetectedModel(vision, llm, fusion, mappings, unused, tuple(notes))


def _find_families(names: Sequence[str]) -> tuple[dict[str, TowerFamily], dict[str, DecoderFamily]]:
    """Returns the families of towers and language models by name: the package's, and those of ``names``."""
    towers, decoders = dict(TOWERS.known), dict(DECODERS.known)
    for name in names:
        family = load_object(name, "family")
        if isinstance(family, TowerFamily):
            towers[name] = family
        elif isinstance(family, DecoderFamily):
            decoders[name] = family
        else:
            raise UserError(f"{name} is a {type(family).__name__}, not a TowerFamily or a DecoderFamily.")
    return towers, decoders


def _unused_with(tower: TowerFamily) -> tuple[tuple[str, str], ...]:
    above = [(rf"(.*\.)?{re.escape(name)}\..*", _ABOVE) for name in tower.unused]
    pretraining = [(rf"(.*\.)?{re.escape(name)}", "used only in pretraining") for name in tower.pretraining]
    return (*above, *pretraining, *_UNUSED_WITH_TOWER)


def _map_part(
    part: str, table: TensorNames, build: Callable[[], nnx.Module], prefixes: Mapping[str, str]
) -> dict[str, TensorMapping]:
    mappings = map_parameters(table, param_shapes(build), prefixes)
    return {f"{part}/{path}": mapping for path, mapping in mappings.items()}


def _find_decoder_names(
    tensors: TensorFile, families: Mapping[str, DecoderFamily]
) -> tuple[str, str, str | None] | None:
    """Returns the prefix of a language model and its embedding's and head's names; None if there is no model."""
    for family in families.values():
        names, root = family.tensor_names, family.root
        anchor, head_name = names["embedding"].name.removeprefix(root), names["head/kernel"].name
        body = find_prefix(tensors, anchor, "language models")
        head = find_prefix(tensors, head_name, "output heads")
        head = None if head is None else f"{head}{head_name}"
        if body is not None:
            return body, f"{body}{anchor}", head
        first = names["blocks/mlp/down/kernel"].name.format(layer=0).removeprefix(root)
        body = find_prefix(tensors, first, "language models")
        if body is not None and head is not None:
            return body, head, head  # of tied tensors, some programs save the head
    return None


def _check_tensors(
    tensors: TensorFile,
    mappings: Mapping[str, TensorMapping],
    llm: LLMConfig | None,
    head: str | None,
    skipped: str | None,
    tower: TowerFamily | None,
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
        elif llm is not None and llm.tied and name == head:
            unused[name] = "tied to the embedding"
        else:
            reasons = _UNUSED + (_unused_with(tower) if tower else ())
            unused[name] = next((reason for pattern, reason in reasons if re.fullmatch(pattern, name)), "")
    problems += [f"{name} {tensors.shape(name)} is unexpected" for name, reason in unused.items() if not reason]
    if problems:
        listed = "; ".join(sorted(problems)[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise UserError(f"The tensors do not fit the model that the config describes: {listed}.")
    return dict(sorted(unused.items()))


VOCABULARY = ("llm/embedding", "llm/head/kernel")  # an export may have added rows for <image>, which imports drop


def _has_extra_rows(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return shape[0] > expected[0] and shape[1:] == expected[1:]
