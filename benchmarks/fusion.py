"""Every fusion between a vision tower and a language model: output tokens, parameters, FLOPs, time and memory."""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.process import measure_process
from benchmarks.timing import median_seconds
from stf_jax.config import FusionConfig, MeshConfig, ModelConfig, UserError, fusion_from_json
from stf_jax.models.fusions.base import FUSIONS, Fusion, tapped_blocks, tokens_per_image
from stf_jax.models.spec import llm_preset, vision_preset
from stf_jax.parallel.mesh import compute_context, make_mesh
from stf_jax.training.flops import prefill_flops


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures each fusion in a separate process; one row each, after a row that describes the setup.

    Returns:
      Rows of ``what``, ``tokens`` per image, ``million_parameters``, ``gflop`` (model FLOPs of the batch, forward),
      ``forward_ms``, ``both_ms`` (forward, and backward to the parameters) and, for these two calls, ``forward_mib``
      and ``both_mib``: see ``_measure_memory``.
    """
    if options.batch < 1:
        raise UserError("--batch must be at least 1.")
    names = options.fusions.split(",") if options.fusions else FUSIONS.known
    configs = [_make_config(options, name) for name in names]  # check all before the first measurement
    rows = [{"what": f"{options.vision} to {options.llm}", "batch": options.batch, "precision": options.precision}]
    for config in configs:
        task = json.dumps(dataclasses.asdict(config))
        row = measure_process(config.fusion.fusion, ["-m", "benchmarks.fusion", task, str(options.batch)])
        rows[0]["memory"] = row["memory"]
        rows.append({"what": row["what"]} | {key: row[key] for key in _FIGURES})
    return rows


_FIGURES = ("tokens", "million_parameters", "gflop", "forward_ms", "both_ms", "forward_mib", "both_mib")


def _make_config(options: argparse.Namespace, name: str) -> ModelConfig:
    config = ModelConfig(options.vision, options.llm, FusionConfig(name), options.precision)
    tokens_per_image(config.fusion, vision_preset(config.vision).grid)
    llm_preset(config.llm)
    return config


def measure(config: ModelConfig, batch: int) -> dict[str, Any]:
    """Measures a fusion with random weights on random states."""
    vision, width, dtype = vision_preset(config.vision), llm_preset(config.llm).width, jnp.dtype(config.precision)
    rng, mesh = np.random.default_rng(0), make_mesh(MeshConfig(1, 1, 1))

    def noise(*shape: int, scale: float = 1.0) -> jax.Array:
        return jnp.asarray(np.resize(rng.standard_normal(2**20, np.float32), shape) * scale, dtype)

    graph, weights = nnx.split(nnx.eval_shape(lambda: Fusion(nnx.Rngs(0), config.fusion, vision, width)))
    weights = jax.tree.map(lambda leaf: noise(*leaf.shape, scale=0.02), weights)
    states = tuple(noise(batch, vision.grid**2, vision.width) for _ in tapped_blocks(config.fusion, vision.layers))
    tokens = tokens_per_image(config.fusion, vision.grid)
    cotangent = noise(batch, tokens, width)

    def forward(weights: nnx.State, states: tuple[jax.Array, ...]) -> jax.Array:
        return nnx.merge(graph, weights)(states)

    def both(weights: nnx.State, states: tuple[jax.Array, ...], cotangent: jax.Array) -> tuple[jax.Array, Any]:
        out, back = jax.vjp(lambda weights: forward(weights, states), weights)
        return out, back(cotangent)

    calls: tuple[tuple[str, Callable[..., Any], tuple[jax.Array, ...]], ...]
    calls = ("forward", forward, ()), ("both", both, (cotangent,))
    figures: dict[str, Any] = {
        "tokens": tokens,
        "million_parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(weights)) / 1e6,
        "gflop": prefill_flops(config, batch, 1, 1)["fusion"] / 1e9,
    }
    with compute_context(mesh, config.precision):
        for name, call, arguments in calls:
            compiled = jax.jit(call).lower(weights, states, *arguments).compile()
            figures[f"{name}_ms"] = 1e3 * _time(compiled, weights, states, *arguments)
            figures[f"{name}_mib"], figures["memory"] = _measure_memory(compiled)
    return figures


def _time(call: Callable[..., Any], *arguments: Any) -> float:
    return median_seconds(lambda: jax.block_until_ready(call(*arguments)))


def _measure_memory(compiled: jax.stages.Compiled) -> tuple[float, str]:
    """MiB and what they include: the peak of the device so far, with weights and states; on CPUs the temporaries that
    the compiler reports, without arguments and results."""
    stats = jax.devices()[0].memory_stats()
    if stats:
        return stats["peak_bytes_in_use"] / 2**20, "device peak"
    memory = compiled.memory_analysis()
    assert memory is not None  # CPUs report it
    return memory.temp_size_in_bytes / 2**20, "temporaries"


if __name__ == "__main__":
    task, batch = json.loads(sys.argv[1]), int(sys.argv[2])
    fusion_config = fusion_from_json(task.pop("fusion"))
    print(json.dumps(measure(ModelConfig(**task, fusion=fusion_config), batch)))
