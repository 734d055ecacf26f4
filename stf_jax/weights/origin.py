"""What a config leaves open, taken from where a run continues or starts: tower, language model, tokenizer."""

import dataclasses
import os
from typing import Any

from etils import epath

from stf_jax.config import TrainConfig, UserError
from stf_jax.data import tokenizer as tokenizers
from stf_jax.models.presets import DEFAULTS, llm_preset, resolved, vision_preset
from stf_jax.runtime.files import read_json, to_path
from stf_jax.runtime.parameters import SavedParams, newest_step
from stf_jax.weights.folder import EMBEDDED
from stf_jax.weights.model import describe

_PRESETS = {"vision": vision_preset, "llm": llm_preset}
_EMBEDDED = {  # tower, language model and tokenizer of each
    "miniatures": ("clip-mini-16-96", "llama-mini", "miniature"),
    "miniatures/siglip": ("siglip-mini-16-96", "llama-mini", "miniature"),
    "miniatures/2": ("clip-mini-8-96", "llama-mini-6", "miniature/2"),
}


def complete(config: TrainConfig, workdir: epath.Path | None = None) -> TrainConfig:
    """The config with ``model.vision``, ``model.llm`` and ``data.tokenizer`` filled in, and the model's shapes known.

    Where ``workdir`` holds a checkpoint, what is empty is as the run there has it; else as ``init_from`` has it, whose
    later folders win; else the paper's tower and language model. What the config names is kept.

    Raises:
      UserError: a name that is not known, or a run in ``init_from`` that does not say what it is.
    """
    continued = workdir is not None and newest_step(workdir) is not None
    sources = [str(workdir)] if continued else [name.strip() for name in config.init_from.split(",") if name.strip()]
    known: dict[str, Any] = {}
    for source in sources:
        try:
            known |= _look(source)
        except UserError:
            if not continued and not (config.model.vision and config.model.llm):
                raise
    parts = {part: _part(part, getattr(config.model, part), known.get(part), continued) for part in _PRESETS}
    model = dataclasses.replace(config.model, **{part: name for part, (name, _) in parts.items()})
    model = resolved(model, *(shape for _, shape in parts.values()))
    tokenizer = config.data.tokenizer or known.get("tokenizer", "")
    gone = tokenizer not in tokenizers.EMBEDDED and not os.path.isdir(tokenizer)
    if continued and gone and (workdir / "tokenizer").is_dir():
        tokenizer = str(workdir / "tokenizer")
    data = dataclasses.replace(config.data, tokenizer=tokenizer)
    return dataclasses.replace(config, model=model, data=data)


def _part(part, named, found, continued):
    """The name and the shape of a part: what the config names, what was found, or the default."""
    if found and named in ("", found[0]):
        return found
    name = named or DEFAULTS[part]
    shape = _PRESETS[part](name)
    if continued and found and shape == found[1]:  # the same under another name, as where a folder was moved
        return found
    return name, shape


def _look(source):
    """Name and shape of each part that a folder has, and its tokenizer's name."""
    if source in EMBEDDED:
        *names, tokenizer = _EMBEDDED[source]
        parts = zip(_PRESETS, names, strict=True)
        return {part: (name, _PRESETS[part](name)) for part, name in parts} | {"tokenizer": tokenizer}
    folder = to_path(source)
    if not SavedParams.at(folder):
        return {}  # whether it can be read at all is said when it is
    description, model, tokenizer = describe(folder)
    parts = {part: (getattr(model, part), getattr(description, part)) for part in _PRESETS}
    known = {part: pair for part, pair in parts.items() if pair[1] is not None}
    if description.llm is not None and tokenizer is not None:
        known["tokenizer"] = _tokenizer_name(folder) or str(tokenizer)
    return known


def _tokenizer_name(folder):
    """As a run's config has it, if it is still there."""
    if not (folder / "config.json").exists():
        return ""
    name = read_json(folder / "config.json")["data"]["tokenizer"]
    return name if name in tokenizers.EMBEDDED or os.path.isdir(name) else ""
