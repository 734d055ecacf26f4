"""What `plan` foresees: our second stage beside MaxText's peak of memory, and STF's 144 tokens beside MLP's 576."""

import argparse
import collections
import dataclasses
import math
import pathlib
import sys
from typing import Any

import jax

from stf_jax.config import FusionConfig, TrainConfig, resolve
from stf_jax.models.vlm import slots_per_image
from stf_jax.planning.report import report
from stf_jax.planning.topology import topology_devices
from stf_jax.runtime.cli import parse
from stf_jax.training.state import blueprint

# GiB per chip at its peak, of MaxText's llama2-7b: float32 weights and moments, bfloat16 compute, full rematerialisation,
# splash attention, rows of 2048 tokens, compiled ahead of time for these slices with so many rows per chip.
_MAXTEXT = {
    ("v5e:4x8", 1): 4.59,
    ("v5e:4x8", 4): 7.78,
    ("v5e:4x8", 8): 11.75,
    ("v5p:2x2x4", 1): 8.14,
    ("v5p:2x2x4", 4): 11.14,
}
_CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
TEXT = {
    "pretrain": 64,
    "finetune": 304,
    "prefill": 64,
}  # tokens of a row beside its image's; benches/mixture.py's mean
_GIB = 2**30


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One program a line.

    Returns:
      Rows of ``what`` and: ``peak_gib``, ``maxtext_gib``, ``ratio``, and ``tower_fusion_gib``, what tower and fusion,
      which MaxText's has not, hold in weights, moments and gradients on a device; then ``positions``, ``peak_gib``,
      ``petaflop`` (executed in a step), ``seconds`` (estimated), and of the STF rows ``times_mlp``, how often faster.
    """
    jax.config.update("jax_platforms", "cpu")
    rows = [] if options.no_mark else [_beside_maxtext(*at, mark) for at, mark in _MAXTEXT.items()]
    devices = topology_devices(options.topology)
    for what in ("pretrain", "finetune", "prefill"):
        config = recipe("finetune" if what == "prefill" else what, options.llm)
        slower = None
        for fusion in ("mlp", "mbtf_stf"):
            model = dataclasses.replace(config.model, fusion=FusionConfig(fusion=fusion))
            length = slots_per_image(model) + TEXT[what]
            data = dataclasses.replace(config.data, max_length=length)
            changed = dataclasses.replace(config, model=model, data=data)
            found = report(changed, "prefill" if what == "prefill" else "train", devices)
            row = {
                "what": f"{what}, {fusion}, {found['rows']} rows",
                "positions": length,
                "peak_gib": (found["peak_bytes_per_device"] or 0) / _GIB,
                "petaflop": found["executed_flops"] / 1e15,
                "seconds": found["step_seconds_estimate"],
            }
            row["times_mlp"] = slower / row["seconds"] if slower else 1.0
            slower = slower or row["seconds"]
            rows.append(_said(row))
    return rows


def _beside_maxtext(topology, rows, mark):
    devices = topology_devices(topology)
    config = dataclasses.replace(recipe("finetune", "vicuna-7b"), global_batch_size=rows * len(devices))
    found = report(config, "train", devices)
    sizes = collections.Counter()
    for path, leaf in blueprint(config.model).shapes.items():
        sizes[path.split("/")[0]] += math.prod(leaf.shape)
    peak = found["peak_bytes_per_device"] / _GIB
    learned, frozen = 16 * sizes["fusion"], 2 * sizes["vision"]  # weight, moments and gradient of 4 bytes; bfloat16
    return _said(
        {
            "what": f"stage 2, {topology}, {rows} rows per chip",
            "peak_gib": peak,
            "maxtext_gib": mark,
            "ratio": peak / mark,
            "tower_fusion_gib": (learned + frozen) / len(devices) / _GIB,
        }
    )


def recipe(name: str, llm: str) -> TrainConfig:
    """The config of that name in configs/, with another language model."""
    (config,) = resolve(parse([f"--config={_CONFIGS / name}.py:llm={llm}"], "", workdir=False)[1])
    return config


def _said(row):
    print(f"{row['what']}: {row['peak_gib']:.2f} GiB", file=sys.stderr)
    return row
