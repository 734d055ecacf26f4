"""Shapes of vision towers and language models: presets by name, imported ones from ``model.json`` in their folder."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from stf_jax.config import ModelConfig, UserError, did_you_mean
from stf_jax.files import read_json, to_path
from stf_jax.models.llm import LLMConfig, RopeScaling
from stf_jax.models.vit import VisionConfig

_clip = functools.partial(
    VisionConfig,
    activation="quick_gelu",
    class_token=True,
    pre_norm=True,
    patch_bias=False,
    norm_eps=1e-5,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)
_siglip = functools.partial(
    VisionConfig,
    activation="gelu_tanh",
    class_token=False,
    pre_norm=False,
    patch_bias=True,
    norm_eps=1e-6,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)

# "mini" are the demo's backbones (stf_jax/weights/miniatures), with eight blocks to provide eight depths to tap.
VISION: dict[str, VisionConfig] = {
    "clip-l-14-336": _clip(336, 14, width=1024, layers=24, heads=16, mlp=4096),
    "clip-b-16-224": _clip(224, 16, width=768, layers=12, heads=12, mlp=3072),
    "siglip-so400m-14-384": _siglip(384, 14, width=1152, layers=27, heads=16, mlp=4304),
    "siglip-b-16-384": _siglip(384, 16, width=768, layers=12, heads=12, mlp=3072),
    "siglip-b-16-256": _siglip(256, 16, width=768, layers=12, heads=12, mlp=3072),
    "clip-mini-16-384": _clip(384, 16, width=128, layers=8, heads=4, mlp=512),
    "clip-mini-16-96": _clip(96, 16, width=128, layers=8, heads=4, mlp=512),
    "clip-mini-8-96": _clip(96, 8, width=128, layers=8, heads=4, mlp=512),
    "clip-mini-8-48": _clip(48, 8, width=128, layers=8, heads=4, mlp=512),
    "siglip-mini-16-96": _siglip(96, 16, width=128, layers=8, heads=4, mlp=512),
    "siglip-mini-8-96": _siglip(96, 8, width=128, layers=8, heads=4, mlp=512),
}

_qwen2 = functools.partial(LLMConfig, rope_theta=1e6, norm_eps=1e-6, qkv_bias=True)
_qwen3 = functools.partial(LLMConfig, vocab=151_936, head_dim=128, rope_theta=1e6, norm_eps=1e-6, qk_norm=True)
_smol = functools.partial(LLMConfig, vocab=49_152, head_dim=64, tied=True)

LLM: dict[str, LLMConfig] = {
    "vicuna-7b": LLMConfig(32_000, width=4096, layers=32, heads=32, kv_heads=32, head_dim=128, mlp=11_008),
    "vicuna-13b": LLMConfig(32_000, width=5120, layers=40, heads=40, kv_heads=40, head_dim=128, mlp=13_824),
    "llama-3-8b": LLMConfig(
        128_256, width=4096, layers=32, heads=32, kv_heads=8, head_dim=128, mlp=14_336, rope_theta=5e5
    ),
    # v0.2: without the sliding window of v0.1.
    "mistral-7b": LLMConfig(
        32_000, width=4096, layers=32, heads=32, kv_heads=8, head_dim=128, mlp=14_336, rope_theta=1e6
    ),
    "qwen2.5-0.5b": _qwen2(151_936, width=896, layers=24, heads=14, kv_heads=2, head_dim=64, mlp=4864, tied=True),
    "qwen2.5-7b": _qwen2(152_064, width=3584, layers=28, heads=28, kv_heads=4, head_dim=128, mlp=18_944),
    "qwen3-0.6b": _qwen3(width=1024, layers=28, heads=16, kv_heads=8, mlp=3072, tied=True),
    "qwen3-8b": _qwen3(width=4096, layers=36, heads=32, kv_heads=8, mlp=12_288),
    "smollm2-135m": _smol(width=576, layers=30, heads=9, kv_heads=3, mlp=1536, rope_theta=1e5),
    "smollm2-360m": _smol(width=960, layers=32, heads=15, kv_heads=5, mlp=2560, rope_theta=1e5),
    "smollm2-1.7b": _smol(width=2048, layers=24, heads=32, kv_heads=32, mlp=8192, rope_theta=1.3e5),
    "llama-mini": LLMConfig(512, width=128, layers=4, heads=4, kv_heads=2, head_dim=32, mlp=256, tied=True),
    "llama-mini-6": LLMConfig(512, width=128, layers=6, heads=4, kv_heads=2, head_dim=32, mlp=512, tied=True),
}

_Config = TypeVar("_Config", VisionConfig, LLMConfig)


DEFAULTS = {"vision": "clip-l-14-336", "llm": "vicuna-7b"}  # the paper's; used where a config names none
# In a run or a folder of imported weights: {"vision": …, "llm": …, "fusion": …}, null where absent.
DESCRIPTION = "model.json"


@dataclasses.dataclass(frozen=True)
class ResolvedModel(ModelConfig):
    """A model with its shapes resolved. These hold even if its names have changed their meaning since.

    Attributes:
      vision_shape: None for a language model alone.
      llm_shape: None for a vision tower alone.
    """

    vision_shape: VisionConfig | None = None
    llm_shape: LLMConfig | None = None


def get_vision_config(config: ModelConfig) -> VisionConfig | None:
    """The shape of the vision tower; None for a language model alone. Raises UserError as :func:`vision_preset`."""
    return config.vision_shape if isinstance(config, ResolvedModel) else vision_preset(config.vision)


def get_llm_config(config: ModelConfig) -> LLMConfig | None:
    """The shape of the language model; None for a tower alone. Raises UserError as :func:`llm_preset`."""
    return config.llm_shape if isinstance(config, ResolvedModel) else llm_preset(config.llm)


def resolve_model(
    config: ModelConfig, vision: VisionConfig | None = None, llm: LLMConfig | None = None
) -> ResolvedModel:
    """The model with the given shapes, or else with those of its names.

    Raises:
      UserError: an unknown name.
    """
    if isinstance(config, ResolvedModel):
        return config
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    vision, llm = vision or vision_preset(config.vision), llm or llm_preset(config.llm)
    return ResolvedModel(**values, vision_shape=vision, llm_shape=llm)


def vision_preset(name: str) -> VisionConfig:
    """The tower of that name, or of that folder of imported weights. Raises UserError for an unknown one."""
    return _lookup(VISION, name, "vision", parse_vision_config)


def llm_preset(name: str) -> LLMConfig:
    """The language model of that name, or of that folder of imported weights. Raises UserError for an unknown one."""
    return _lookup(LLM, name, "llm", parse_llm_config)


def parse_vision_config(values: Mapping[str, Any]) -> VisionConfig:
    """A tower shape from plain data, as ``dataclasses.asdict`` and JSON produce it."""
    return VisionConfig(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})


def parse_llm_config(values: Mapping[str, Any]) -> LLMConfig:
    """A language model shape from plain data, as ``dataclasses.asdict`` and JSON produce it."""
    scaling = values["rope_scaling"]
    return LLMConfig(**{**values, "rope_scaling": RopeScaling(**scaling) if scaling else None})


def _lookup(
    presets: Mapping[str, _Config], name: str, key: str, build: Callable[[Mapping[str, Any]], _Config]
) -> _Config:
    name = name or DEFAULTS[key]
    if name in presets:
        return presets[name]
    if not (file := to_path(name) / DESCRIPTION).exists():
        raise UserError(f"Unknown preset model.{key}={name!r}; {did_you_mean(name, presets)}")
    try:
        values = read_json(file)[key]
        if values is not None:
            return build(values)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} does not describe a model.") from None
    raise UserError(f"model.{key}={name}: that folder has no {key} weights.")
