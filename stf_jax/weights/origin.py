"""Fills in the tower, language model and tokenizer of a config from the run or weights that it starts from."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from etils import epath

from stf_jax.checkpointing.params import SavedParams, newest_step
from stf_jax.config import TrainConfig, UserError
from stf_jax.data import tokenizer as tokenizers
from stf_jax.data.tiles import check_tiles, find_tiles, with_newline
from stf_jax.files import read_json, to_path
from stf_jax.models.decoders.base import LLMConfig
from stf_jax.models.spec import DEFAULTS, llm_preset, resolve_model, vision_preset
from stf_jax.models.towers.base import VisionConfig
from stf_jax.weights.folder import EMBEDDED
from stf_jax.weights.model import describe_folder

_Shape = TypeVar("_Shape", VisionConfig, LLMConfig)

_PRESETS: Mapping[str, Callable[[str], VisionConfig | LLMConfig]] = {"vision": vision_preset, "llm": llm_preset}
_EMBEDDED = {  # tower, language model and tokenizer
    "miniatures": ("clip-mini-16-96", "llama-mini", "miniature"),
    "miniatures/siglip": ("siglip-mini-16-96", "llama-mini", "miniature"),
    "miniatures/2": ("clip-mini-8-96", "llama-mini-6", "miniature/2"),
}


def complete_config(config: TrainConfig, workdir: epath.Path | None = None) -> TrainConfig:
    """Returns the config with ``model.vision``, ``model.llm``, ``data.tokenizer`` and the model's shapes filled in.

    Empty values come from the run in ``workdir`` if it has a checkpoint; otherwise from ``init_from``, where later
    folders win; otherwise they are the paper's tower and language model. Values that the config sets are kept.

    Raises:
      UserError: an unknown name, or a run in ``init_from`` that does not describe its model.
    """
    resumed = workdir is not None and newest_step(workdir) is not None
    sources = [str(workdir)] if resumed else [name.strip() for name in config.init_from.split(",") if name.strip()]
    found: dict[str, Any] = {}
    for source in sources:
        try:
            found |= _inspect(source)
        except UserError:
            if not resumed and not (config.model.vision and config.model.llm):
                raise
    vision, vision_shape = _choose_part("vision", vision_preset, config.model.vision, found.get("vision"), resumed)
    llm, llm_shape = _choose_part("llm", llm_preset, config.model.llm, found.get("llm"), resumed)
    model = resolve_model(dataclasses.replace(config.model, vision=vision, llm=llm), vision_shape, llm_shape)
    tiles = find_tiles(config.data)
    check_tiles(tiles, model := with_newline(model, tiles))
    tokenizer = config.data.tokenizer or found.get("tokenizer", "")
    missing = tokenizer not in tokenizers.EMBEDDED and not os.path.isdir(tokenizer)
    if resumed and missing and workdir is not None and (workdir / "tokenizer").is_dir():
        tokenizer = str(workdir / "tokenizer")
    data = dataclasses.replace(config.data, tokenizer=tokenizer)
    return dataclasses.replace(config, model=model, data=data)


def _choose_part(
    part: str,
    preset: Callable[[str], _Shape],
    configured: str,
    found: tuple[str, _Shape] | None,
    resumed: bool,
) -> tuple[str, _Shape]:
    """Returns the name and shape of a part: the configured one, the one found, or the default."""
    if found and configured in ("", found[0]):
        return found
    name = configured or DEFAULTS[part]
    shape = preset(name)
    if resumed and found and shape == found[1]:  # the same part under another name: its folder was moved
        return found
    return name, shape


def _inspect(source: str) -> dict[str, Any]:
    """Returns the name and shape of each part in a folder, and its tokenizer's name."""
    if source in EMBEDDED:
        *names, embedded = _EMBEDDED[source]
        shapes = {part: (name, _PRESETS[part](name)) for part, name in zip(_PRESETS, names, strict=True)}
        return {**shapes, "tokenizer": embedded}
    folder = to_path(source)
    if not SavedParams.exists_in(folder):
        return {}  # loading it reports errors
    description, model, tokenizer = describe_folder(folder)
    parts = {part: (getattr(model, part), getattr(description, part)) for part in _PRESETS}
    found: dict[str, Any] = {part: pair for part, pair in parts.items() if pair[1] is not None}
    if description.llm is not None and tokenizer is not None:
        found["tokenizer"] = _configured_tokenizer(folder) or str(tokenizer)
    return found


def _configured_tokenizer(folder: epath.Path) -> str:
    """Returns the tokenizer in a run's config, or an empty string if it no longer exists."""
    if not (folder / "config.json").exists():
        return ""
    name = read_json(folder / "config.json")["data"]["tokenizer"]
    return name if name in tokenizers.EMBEDDED or os.path.isdir(name) else ""
