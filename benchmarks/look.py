"""Model FLOPs of the maps of ``python -m stf_jax.look``, for an image and a blank one, without running them."""

import argparse
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from stf_jax.accounting.flops import count_model_flops
from stf_jax.config import FusionConfig, ModelConfig
from stf_jax.looking.attribution import map_answer, map_tokens
from stf_jax.models.blueprint import Params, blueprint
from stf_jax.models.spec import resolve_model

_FUSIONS = ("mbtf_stf", "mlp")


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Counts TFLOPs in the traces of both maps (accounting/flops.py); nothing is computed.

    Returns:
      For each fusion: image ``tokens``; TFLOPs of the maps of ``image_tokens`` and of an ``answer``; ``both_images``.
    """
    return [_make_row(ModelConfig(options.vision, options.llm, FusionConfig(name)), options) for name in _FUSIONS]


def _make_row(config: ModelConfig, options: argparse.Namespace) -> dict[str, Any]:
    config = dataclasses.replace(config, precision="float32", attention="reference", remat="none")
    plan, model = blueprint(config), resolve_model(config)
    assert model.vision_shape is not None  # the presets of the options are complete models
    assert model.llm_shape is not None
    count, side = model.slots, model.vision_shape.image_size
    prompt = jax.ShapeDtypeStruct((count + options.text,), jnp.int32)
    pixels = jax.ShapeDtypeStruct((side, side, 3), jnp.uint8)
    tokens = jax.ShapeDtypeStruct((count, model.llm_shape.width), jnp.float32)
    answer = jax.ShapeDtypeStruct((options.answer,), jnp.int32)
    is_image = jnp.arange(count + options.text) < count

    def make_token_maps(params: Params, pixels: jax.Array, prompt: jax.Array) -> Any:
        return map_tokens(plan.merge(params), pixels, prompt, ~is_image)

    def make_answer_maps(params: Params, tokens: jax.Array, prompt: jax.Array, answer: jax.Array) -> Any:
        return map_answer(plan.merge(params), tokens, prompt, is_image, answer)

    made = sum(count_model_flops(make_token_maps, plan.shapes, pixels, prompt).values()) / 1e12
    read = sum(count_model_flops(make_answer_maps, plan.shapes, tokens, prompt, answer).values()) / 1e12
    return {
        "what": config.fusion.fusion,
        "tokens": count,
        "image_tokens": made,
        "answer": read,
        "both_images": 2 * (made + read),
    }
