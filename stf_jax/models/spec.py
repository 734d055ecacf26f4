"""A model with its names resolved to the shapes of its parts: presets, or those of folders of imported weights."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from stf_jax.config import ModelConfig, UserError, did_you_mean
from stf_jax.files import read_json, to_path
from stf_jax.models.decoders.base import DECODERS, DecoderFamily, LLMConfig, RopeScaling
from stf_jax.models.fusions.base import tapped_blocks
from stf_jax.models.reducers.base import Reduction, resolve_reduction
from stf_jax.models.towers.base import TOWERS, TowerFamily, VisionConfig
from stf_jax.registry import Registry, is_outside, load_object, refuse_code_in

VISION: dict[str, VisionConfig] = {
    name: shape for tower in TOWERS.known.values() for name, shape in tower.presets.items()
}
LLM: dict[str, LLMConfig] = {
    name: shape for decoder in DECODERS.known.values() for name, shape in decoder.presets.items()
}
DEFAULTS = {"vision": "clip-l-14-336", "llm": "vicuna-7b"}  # the paper's; used where a config names none
# In a run or a folder of imported weights: {"vision": …, "llm": …, "fusion": …}, null where absent.
DESCRIPTION = "model.json"

_Config = TypeVar("_Config", VisionConfig, LLMConfig)
_Family = TypeVar("_Family", TowerFamily, DecoderFamily)


@dataclasses.dataclass(frozen=True)
class ModelSpec(ModelConfig):
    """A model with its shapes resolved. These hold even if its names have changed their meaning since.

    Attributes:
      vision_shape: None for a language model alone.
      llm_shape: None for a vision tower alone.
      newline: whether a learned token ends each row of an image's tiles (``data.tiles.marks``).
    """

    vision_shape: VisionConfig | None = None
    llm_shape: LLMConfig | None = None
    newline: bool = False

    @functools.cached_property
    def taps(self) -> tuple[int, ...]:
        """The tower's blocks that the fusion reads, deepest first; empty for a language model alone."""
        return () if self.vision_shape is None else tapped_blocks(self.fusion, self.vision_shape.layers)

    @functools.cached_property
    def reduction(self) -> Reduction:
        """What becomes of the fusion's tokens. Raises UserError as :func:`resolve_reduction` does."""
        return resolve_reduction(self)

    @property
    def slots(self) -> int:
        """Image tokens per image in a prompt. Raises as :attr:`reduction` does."""
        return self.reduction.slots


def resolve_model(config: ModelConfig, vision: VisionConfig | None = None, llm: LLMConfig | None = None) -> ModelSpec:
    """The model with the given shapes, or else with those of its names. Does nothing to a resolved one.

    Raises:
      UserError: an unknown name.
    """
    if isinstance(config, ModelSpec):
        return config
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    vision, llm = vision or vision_preset(config.vision), llm or llm_preset(config.llm)
    return ModelSpec(**values, vision_shape=vision, llm_shape=llm)


def training_budgets(config: ModelConfig) -> tuple[int, ...]:
    """The numbers of tokens per image at which a model is trained; empty if there is one."""
    budgets = config.fusion.budgets
    return () if config.cells or len(budgets) == 1 else budgets


def vision_preset(name: str) -> VisionConfig:
    """The tower of that name, or of that folder of imported weights. Raises UserError for an unknown one."""
    return _lookup(VISION, name, "vision", VisionConfig, parse_vision_config)


def llm_preset(name: str) -> LLMConfig:
    """The language model of that name, or of that folder of imported weights. Raises UserError for an unknown one."""
    return _lookup(LLM, name, "llm", LLMConfig, parse_llm_config)


def parse_vision_config(values: Mapping[str, Any]) -> VisionConfig:
    """A tower shape from plain data, as ``dataclasses.asdict`` and JSON produce it."""
    values = {"family": match_family(TOWERS, values) or "clip", **values}  # earlier versions name none
    family = TOWERS.find(values["family"])
    return family.config(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})


def parse_llm_config(values: Mapping[str, Any]) -> LLMConfig:
    """A language model shape from plain data, as ``dataclasses.asdict`` and JSON produce it."""
    values, scaling = {"family": match_family(DECODERS, values) or "llama", **values}, values["rope_scaling"]
    family = DECODERS.find(values["family"])
    return family.config(**{**values, "rope_scaling": RopeScaling(**scaling) if scaling else None})


def match_family(families: Registry[_Family], values: Mapping[str, Any]) -> str:
    """The name of the first of the package's families with these values as its traits; empty if there is none."""
    for name, family in families.known.items():
        if all(values.get(key) == value for key, value in family.traits.items()):
            return name
    return ""


def find_family(families: Registry[_Family], config: VisionConfig | LLMConfig, part: str) -> str:
    """The name of the family whose transformers class computes a part: its own, or another with its traits.

    Raises:
      UserError: there is none.
    """
    own = families.find(config.family)
    if all(getattr(config, key) == value for key, value in own.traits.items()):
        return config.family
    if not (name := match_family(families, dataclasses.asdict(config))):
        traits = ", ".join(f"{key}={getattr(config, key)}" for key in own.traits)
        raise UserError(f"transformers has no class for a {part} with {traits}.")
    return name


def _lookup(
    presets: Mapping[str, _Config],
    name: str,
    key: str,
    kind: type[_Config],
    parse: Callable[[Mapping[str, Any]], _Config],
) -> _Config:
    name = name or DEFAULTS[key]
    if name in presets:
        return presets[name]
    if (file := to_path(name) / DESCRIPTION).exists():
        return _read_part(file, name, key, parse)
    if not is_outside(name):
        raise UserError(f"Unknown preset model.{key}={name!r}; {did_you_mean(name, presets)}")
    if not isinstance(found := load_object(name, f"model.{key}"), kind):
        raise UserError(f"model.{key}={name} is a {type(found).__name__}, not a {kind.__name__}.")
    return found


def _read_part(file: Any, name: str, key: str, parse: Callable[[Mapping[str, Any]], _Config]) -> _Config:
    try:
        values = read_json(file)[key]
        if values is not None:
            refuse_code_in(file.parent, values)
            return parse(values)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} does not describe a model.") from None
    raise UserError(f"model.{key}={name}: that folder has no {key} weights.")
