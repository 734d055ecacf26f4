"""Shapes of towers and language models: known ones by name, imported ones from their folder's ``model.json``."""

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

from stf_jax.config import ModelConfig, UserError, did_you_mean
from stf_jax.models.llm import LLMConfig, RopeScaling
from stf_jax.models.vit import VisionConfig
from stf_jax.runtime.files import read_json, to_path

_CLIP = dict(
    activation="quick_gelu",
    class_token=True,
    pre_norm=True,
    patch_bias=False,
    norm_eps=1e-5,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)
_SIGLIP = dict(
    activation="gelu_tanh",
    class_token=False,
    pre_norm=False,
    patch_bias=True,
    norm_eps=1e-6,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)

# "mini" are the demo's backbones (stf_jax/weights/miniatures): eight blocks, so that there are eight depths to tap.
VISION: dict[str, VisionConfig] = {
    "clip-l-14-336": VisionConfig(336, 14, width=1024, layers=24, heads=16, mlp=4096, **_CLIP),
    "clip-b-16-224": VisionConfig(224, 16, width=768, layers=12, heads=12, mlp=3072, **_CLIP),
    "siglip-so400m-14-384": VisionConfig(384, 14, width=1152, layers=27, heads=16, mlp=4304, **_SIGLIP),
    "siglip-b-16-384": VisionConfig(384, 16, width=768, layers=12, heads=12, mlp=3072, **_SIGLIP),
    "siglip-b-16-256": VisionConfig(256, 16, width=768, layers=12, heads=12, mlp=3072, **_SIGLIP),
    "clip-mini-16-384": VisionConfig(384, 16, width=128, layers=8, heads=4, mlp=512, **_CLIP),
    "clip-mini-16-96": VisionConfig(96, 16, width=128, layers=8, heads=4, mlp=512, **_CLIP),
    "clip-mini-8-96": VisionConfig(96, 8, width=128, layers=8, heads=4, mlp=512, **_CLIP),
    "clip-mini-8-48": VisionConfig(48, 8, width=128, layers=8, heads=4, mlp=512, **_CLIP),
    "siglip-mini-16-96": VisionConfig(96, 16, width=128, layers=8, heads=4, mlp=512, **_SIGLIP),
    "siglip-mini-8-96": VisionConfig(96, 8, width=128, layers=8, heads=4, mlp=512, **_SIGLIP),
}

_QWEN2 = dict(rope_theta=1e6, norm_eps=1e-6, qkv_bias=True)
_QWEN3 = dict(vocab=151_936, head_dim=128, rope_theta=1e6, norm_eps=1e-6, qk_norm=True)
_SMOL = dict(vocab=49_152, head_dim=64, tied=True)

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
    "qwen2.5-0.5b": LLMConfig(
        151_936, width=896, layers=24, heads=14, kv_heads=2, head_dim=64, mlp=4864, tied=True, **_QWEN2
    ),
    "qwen2.5-7b": LLMConfig(152_064, width=3584, layers=28, heads=28, kv_heads=4, head_dim=128, mlp=18_944, **_QWEN2),
    "qwen3-0.6b": LLMConfig(width=1024, layers=28, heads=16, kv_heads=8, mlp=3072, tied=True, **_QWEN3),
    "qwen3-8b": LLMConfig(width=4096, layers=36, heads=32, kv_heads=8, mlp=12_288, **_QWEN3),
    "smollm2-135m": LLMConfig(width=576, layers=30, heads=9, kv_heads=3, mlp=1536, rope_theta=1e5, **_SMOL),
    "smollm2-360m": LLMConfig(width=960, layers=32, heads=15, kv_heads=5, mlp=2560, rope_theta=1e5, **_SMOL),
    "smollm2-1.7b": LLMConfig(width=2048, layers=24, heads=32, kv_heads=32, mlp=8192, rope_theta=1.3e5, **_SMOL),
    "llama-mini": LLMConfig(512, width=128, layers=4, heads=4, kv_heads=2, head_dim=32, mlp=256, tied=True),
    "llama-mini-6": LLMConfig(512, width=128, layers=6, heads=4, kv_heads=2, head_dim=32, mlp=512, tied=True),
}

_Config = TypeVar("_Config", VisionConfig, LLMConfig)


DEFAULTS = {"vision": "clip-l-14-336", "llm": "vicuna-7b"}  # the paper's, where a config names none
DESCRIPTION = (
    "model.json"  # in a run or a folder of imported weights: {"vision": …, "llm": …, "fusion": …}, null where absent
)


@dataclasses.dataclass(frozen=True)
class ResolvedModel(ModelConfig):
    """A model whose shapes were read already: they hold, whatever its names say, or no longer say.

    Attributes:
      vision_shape: None for a language model alone.
      llm_shape: None for a vision tower alone.
    """

    vision_shape: VisionConfig | None = None
    llm_shape: LLMConfig | None = None


def vision_of(config: ModelConfig) -> VisionConfig | None:
    """The tower's shape; None for a language model alone. Raises UserError as :func:`vision_preset`."""
    return config.vision_shape if isinstance(config, ResolvedModel) else vision_preset(config.vision)


def llm_of(config: ModelConfig) -> LLMConfig | None:
    """The language model's shape; None for a tower alone. Raises UserError as :func:`llm_preset`."""
    return config.llm_shape if isinstance(config, ResolvedModel) else llm_preset(config.llm)


def resolved(config: ModelConfig, vision: VisionConfig | None = None, llm: LLMConfig | None = None) -> ResolvedModel:
    """The model with the shapes given, or else with those that its names stand for now.

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
    return _lookup(VISION, name, "vision", vision_config)


def llm_preset(name: str) -> LLMConfig:
    """The language model of that name, or of that folder of imported weights. Raises UserError for an unknown one."""
    return _lookup(LLM, name, "llm", llm_config)


def vision_config(values: Mapping) -> VisionConfig:
    """From plain data, as ``dataclasses.asdict`` and JSON leave it."""
    return VisionConfig(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})


def llm_config(values: Mapping) -> LLMConfig:
    """From plain data, as ``dataclasses.asdict`` and JSON leave it."""
    scaling = values["rope_scaling"]
    return LLMConfig(**{**values, "rope_scaling": RopeScaling(**scaling) if scaling else None})


def _lookup(presets: Mapping[str, _Config], name: str, key: str, build) -> _Config:
    name = name or DEFAULTS[key]
    if name in presets:
        return presets[name]
    if not (file := to_path(name) / DESCRIPTION).exists():
        raise UserError(f"Unknown preset model.{key}={name!r}; {did_you_mean(name, presets)}")
    try:
        values = read_json(file)[key]
        if values is not None:
            return build(values)
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} does not describe a model.") from None
    raise UserError(f"model.{key}={name}: the weights in that folder have no such part.")
