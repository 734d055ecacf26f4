"""Parameters of our modules from state dicts of transformers' models."""

from collections.abc import Mapping

import numpy as np
from flax import nnx, traverse_util

from stf_jax.models.llm import Decoder, LLMConfig
from stf_jax.models.vit import VisionConfig, VisionTower
from stf_jax.weights.hf import DECODER, VISION, declared, places


def vision_tower(state: Mapping[str, np.ndarray], config: VisionConfig) -> dict:
    """Of a CLIP or SigLIP tower under any prefix."""
    anchor = VISION["patch_embed/kernel"].name
    (prefix,) = (name.removesuffix(anchor) for name in state if name.endswith(anchor))
    return _tree(state, places(VISION, declared(lambda: VisionTower(nnx.Rngs(0), config)), {"": prefix}))


def decoder(state: Mapping[str, np.ndarray], config: LLMConfig) -> dict:
    """Of a Llama, Mistral, Qwen2 or Qwen3 model."""
    return _tree(state, places(DECODER, declared(lambda: Decoder(nnx.Rngs(0), config)), {"": ""}))


def _tree(state, found):
    values = {path: place.to_ours(np.asarray(state[name]) for name in place.names) for path, place in found.items()}
    return traverse_util.unflatten_dict(values, sep="/")
