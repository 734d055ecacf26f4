"""Reads LoRA adapters in PEFT's files, which PEFT, LLaVA or LLaVA-STF saved, and merges them into their base."""

import dataclasses
import functools
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from stf_jax.config import UserError
from stf_jax.files import read_json
from stf_jax.weights.tensors import Entry, TensorFile, open_tensors

CONFIG = "adapter_config.json"
ROOT = "base_model.model."  # of the names in PEFT's files
_FILES = "adapter_model.safetensors", "adapter_model.bin"
_REST = "non_lora_trainables.bin"  # what LLaVA's script trains besides
_PART = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
# transformers' LLaVA has other names in its files than in PyTorch.
RENAMES = (
    ("model.language_model.", "language_model.model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.vision_tower.", "vision_tower."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("lm_head.", "language_model.lm_head."),
)


@dataclasses.dataclass(frozen=True)
class PeftAdapter:
    """What a folder of PEFT's files holds, by the names that PyTorch has.

    Attributes:
      parts: the tensors A [r, inputs] and B [outputs, r], under these names, of each module.
      whole: tensors that were saved whole.
    """

    folder: pathlib.Path
    parts: Mapping[str, Mapping[str, Entry]]
    whole: Mapping[str, Entry]
    _config: Mapping[str, Any]

    def rank_and_scale(self, module: str) -> tuple[int, float]:
        """r, and what multiplies B·A. Raises UserError if the config has no such numbers."""
        rank, alpha = (
            _find_value(self._config, "r", "rank_pattern", module),
            _find_value(self._config, "lora_alpha", "alpha_pattern", module),
        )
        if not (type(rank) is int and rank > 0 and isinstance(alpha, int | float) and math.isfinite(alpha)):
            raise UserError(f"The adapter's {CONFIG} has r={rank!r} and lora_alpha={alpha!r}, which should be numbers.")
        return rank, alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)


def is_adapter(folder: pathlib.Path | epath.Path) -> bool:
    """Whether a folder holds an adapter in PEFT's files."""
    return any(os.path.lexists(folder / name) or (folder / name).exists() for name in _FILES)


def read_adapter(folder: pathlib.Path) -> PeftAdapter:
    """Reads the names of a folder's tensors. Raises UserError if it cannot be read, or is not plain LoRA."""
    config = _read_config(folder / CONFIG)
    parts: dict[str, dict[str, Entry]] = {}
    whole: dict[str, Entry] = {}
    for file in [next(folder / name for name in _FILES if os.path.lexists(folder / name)), folder / _REST]:
        if file.name == _REST and not os.path.lexists(file):
            continue
        for full, entry in open_tensors(file).entries.items():
            name = full.removeprefix(ROOT).replace(".modules_to_save.", ".")
            if match := _PART.fullmatch(name):
                parts.setdefault(match[1], {})[match[2]] = entry
            elif ".lora_" in name:
                raise UserError(f"{file} holds {full}, which is not of plain LoRA: merge it with peft first.")
            else:
                whole[name] = entry
    if not parts:
        raise UserError(f"{folder} holds no LoRA tensors.")
    for module, pair in parts.items():
        if pair.keys() != {"A", "B"}:
            raise UserError(f"{folder} lacks lora_A or lora_B of {module}: download it again.")
    return PeftAdapter(folder, parts, whole, config)


def apply_adapter(base: TensorFile, folder: pathlib.Path) -> TensorFile:
    """The tensors of a base with an adapter merged into them, each when it is read: W + alpha/r·B·A in float32.

    Tensors that the adapter saved whole replace those of the base, or are added to them.

    Raises:
      UserError: the adapter cannot be read, is not plain LoRA, or is of another base.
    """
    adapter = read_adapter(folder)
    changed = {_find_name(base, name): entry for name, entry in adapter.whole.items()}
    for module, pair in adapter.parts.items():
        name = _find_name(base, f"{module}.weight")
        if name not in base:
            raise UserError(f"{folder} adapts {name}, which the base lacks: give the adapter's own base.")
        rank, scale = adapter.rank_and_scale(module)
        expected = (rank, base.shape(name)[-1]), (base.shape(name)[0], rank)
        if len(base.shape(name)) != 2 or (pair["A"].shape, pair["B"].shape) != expected:
            raise UserError(
                f"{folder} has lora_A {pair['A'].shape} and lora_B {pair['B'].shape} of rank {rank} for {name}, which "
                f"is {base.shape(name)} in the base: give the adapter's own base."
            )
        read = functools.partial(_read_merged, base, name, TensorFile(pair), scale)
        changed[name] = Entry(pair["A"].file, base.shape(name), base.dtype(name), read)
    return base.replace(changed)


def _read_merged(base: TensorFile, name: str, pair: TensorFile, scale: float) -> np.ndarray:
    kernel = base.read(name)
    a, b = (pair.read(part).astype(np.float32) for part in "AB")
    return (kernel.astype(np.float32) + scale * (b @ a)).astype(kernel.dtype)


def _find_name(base: TensorFile, name: str) -> str:
    """The name in the base of a tensor that PyTorch has under that name; the same if the base lacks it."""
    names = [name, *(new + name.removeprefix(old) for old, new in RENAMES if name.startswith(old))]
    return next((candidate for candidate in names if candidate in base), name)


def _read_config(file: pathlib.Path) -> dict[str, Any]:
    config = read_json(file)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA" or config.get("use_dora"):
        raise UserError(f"{file} does not describe plain LoRA: merge the adapter with peft, and import the result.")
    return config


def _find_value(config: Mapping[str, Any], key: str, patterns: str, module: str) -> Any:
    """A value for a module: that of the first pattern that the end of its name matches, or else the common one."""
    for pattern, value in (config.get(patterns) or {}).items():
        try:
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                return value
        except re.error as error:
            raise UserError(f"The adapter's {CONFIG} has {patterns} {pattern!r}: {error}.") from None
    return config.get(key)
