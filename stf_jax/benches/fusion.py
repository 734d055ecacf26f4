"""Every fusion at the shapes of a tower and a language model: tokens out, parameters, FLOPs, time and memory."""

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from stf_jax.benches.process import measured
from stf_jax.config import FusionConfig, MeshConfig, ModelConfig, UserError, did_you_mean
from stf_jax.models.fusion import FUSIONS, Fusion, tapped_blocks, tokens_per_image
from stf_jax.models.presets import llm_preset, vision_preset
from stf_jax.runtime.cost import forward_flops
from stf_jax.runtime.mesh import computing, make_mesh

_TIMES, _LONG = 5, 5.0  # a call is made so often, and the median counts; fewer times once they took so many seconds


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each fusion, which has a process of its own; before them, one that says what the columns are of.

    Returns:
      Rows of ``what``, ``tokens`` out for an image, ``million_parameters``, ``gflop`` (model FLOPs of the batch,
      forward), ``forward_ms``, ``both_ms`` (forward, and backward to the parameters) and, of these two calls,
      ``forward_mib`` and ``both_mib``: see ``_memory``.
    """
    if options.batch < 1:
        raise UserError("--batch must be at least 1.")
    names = options.fusions.split(",") if options.fusions else FUSIONS
    configs = [_config(options, name) for name in names]  # all checked before one is measured
    rows = [{"what": f"{options.vision} to {options.llm}", "batch": options.batch, "precision": options.precision}]
    for config in configs:
        task = json.dumps(dataclasses.asdict(config))
        row = measured(config.fusion.fusion, ["-m", "stf_jax.benches.fusion", task, str(options.batch)])
        rows[0]["memory"] = row["memory"]
        rows.append({"what": row["what"]} | {key: row[key] for key in _FIGURES})
    return rows


_FIGURES = ("tokens", "million_parameters", "gflop", "forward_ms", "both_ms", "forward_mib", "both_mib")


def _config(options, name):
    if name not in FUSIONS:
        raise UserError(f"--fusions={options.fusions} names {name!r}: {did_you_mean(name, FUSIONS)}")
    config = ModelConfig(options.vision, options.llm, FusionConfig(name), options.precision)
    tokens_per_image(config.fusion, vision_preset(config.vision).grid)
    llm_preset(config.llm)
    return config


def figures(config: ModelConfig, batch: int) -> dict[str, Any]:
    """What a fusion of random weights comes to, reading random states."""
    vision, width, dtype = vision_preset(config.vision), llm_preset(config.llm).width, jnp.dtype(config.precision)
    rng, mesh = np.random.default_rng(0), make_mesh(MeshConfig(1, 1, 1))

    def noise(*shape, scale=1.0):
        return jnp.asarray(np.resize(rng.standard_normal(2**20, np.float32), shape) * scale, dtype)

    graph, weights = nnx.split(nnx.eval_shape(lambda: Fusion(nnx.Rngs(0), config.fusion, vision, width)))
    weights = jax.tree.map(lambda leaf: noise(*leaf.shape, scale=0.02), weights)
    states = tuple(noise(batch, vision.grid**2, vision.width) for _ in tapped_blocks(config.fusion, vision.layers))
    tokens = tokens_per_image(config.fusion, vision.grid)
    cotangent = noise(batch, tokens, width)

    def forward(weights, states):
        return nnx.merge(graph, weights)(states)

    def both(weights, states, cotangent):
        out, back = jax.vjp(lambda weights: forward(weights, states), weights)
        return out, back(cotangent)

    found = {
        "tokens": tokens,
        "million_parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(weights)) / 1e6,
        "gflop": forward_flops(config, batch, 1, 1).fusion / 1e9,
    }
    with computing(mesh, config.precision):
        for name, call, arguments in (("forward", forward, ()), ("both", both, (cotangent,))):
            compiled = jax.jit(call).lower(weights, states, *arguments).compile()
            found[f"{name}_ms"] = 1e3 * _seconds(compiled, weights, states, *arguments)
            found[f"{name}_mib"], found["memory"] = _memory(compiled)
    return found


def _seconds(call, *arguments):
    jax.block_until_ready(call(*arguments))  # wakes threads, and touches what it writes to
    found = []
    while len(found) < _TIMES and sum(found) < _LONG:
        begin = time.perf_counter()
        jax.block_until_ready(call(*arguments))
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def _memory(compiled):
    """MiB, and of what: a device tells its peak so far, weights and states included; for a CPU the compiler tells its
    temporaries, without arguments and results."""
    stats = jax.devices()[0].memory_stats()
    if stats:
        return stats["peak_bytes_in_use"] / 2**20, "device peak"
    return compiled.memory_analysis().temp_size_in_bytes / 2**20, "temporaries"


if __name__ == "__main__":
    task, batch = json.loads(sys.argv[1]), int(sys.argv[2])
    taken = FusionConfig(**task.pop("fusion") | {"taps": ()})
    print(json.dumps(figures(ModelConfig(**task, fusion=taken), batch)))
