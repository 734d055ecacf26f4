"""Estimates of `plan`: our second stage compared with MaxText's peak memory, and STF's 144 tokens with MLP's 576."""

import argparse
import collections
import dataclasses
import math
import sys
from collections.abc import Iterator
from typing import Any

import jax

from benchmarks.recipes import TEXT, load_recipe, make_task
from stf_jax.config import FusionConfig, TrainConfig
from stf_jax.models.blueprint import blueprint
from stf_jax.planning.report import make_report
from stf_jax.planning.topology import topology_devices

# Peak GiB per chip of MaxText's llama2-7b by slice and rows per chip: float32 weights and moments, bfloat16 compute,
# full rematerialization, splash attention, rows of 2048 tokens, compiled ahead of time.
_MAXTEXT = {
    ("v5e:4x8", 1): 4.59,
    ("v5e:4x8", 4): 7.78,
    ("v5e:4x8", 8): 11.75,
    ("v5p:2x2x4", 1): 8.14,
    ("v5p:2x2x4", 4): 11.14,
}
_SCHEDULES = ("pyramiddrop", "hidrop", "vica_7b")
_BUDGETS = (576, 144, 36, 9, 1)
_GIB = 2**30


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Estimates each program; one row each.

    Returns:
      Rows of ``what`` and: ``peak_gib``, ``maxtext_gib``, ``ratio`` and ``tower_fusion_gib``, the weights, moments and
      gradients per device of the vision tower and the fusion, which MaxText lacks; then ``positions``, ``peak_gib``,
      ``petaflop`` (executed per step), ``seconds`` (estimated) and ``times_mlp``, the speedup over ``mlp``.
    """
    jax.config.update("jax_platforms", "cpu")
    rows = [] if options.no_mark else [_compare_maxtext(*key, gib) for key, gib in _MAXTEXT.items()]
    devices = topology_devices(options.topology)
    for task in TEXT:
        mlp_seconds: float | None = None
        for name, config in make_variants(task, options.llm, options.methods):
            report = make_report(config, "prefill" if task == "prefill" else "train", devices)
            row = {
                "what": f"{task}, {name}, {report['rows']} rows",
                "positions": config.data.max_length,
                "peak_gib": (report["peak_bytes_per_device"] or 0) / _GIB,
                "petaflop": report["executed_flops"] / 1e15,
                "seconds": report["step_seconds_estimate"],
            }
            row["times_mlp"] = mlp_seconds / row["seconds"] if mlp_seconds else 1.0
            mlp_seconds = mlp_seconds or row["seconds"]
            rows.append(_print_row(row))
    return rows


def make_variants(task: str, llm: str, methods: bool) -> Iterator[tuple[str, TrainConfig]]:
    """Yields configs by name: each fusion, and with ``methods`` each fusion with each schedule and with budgets."""
    for fusion in ("mlp", "mbtf_stf"):
        config = make_task(task, fusion, llm)
        yield fusion, config
        if not methods:
            continue
        for name in _SCHEDULES:
            model = dataclasses.replace(config.model, schedule=name)
            yield f"{fusion} with {name}", dataclasses.replace(config, model=model)
        if task != "prefill":  # which reads one number of tokens
            model = dataclasses.replace(config.model, fusion=FusionConfig(fusion, budgets=_BUDGETS))
            data = dataclasses.replace(config.data, max_length=_BUDGETS[0] + TEXT[task])
            yield f"{fusion} with budgets", dataclasses.replace(config, model=model, data=data)


def _compare_maxtext(topology: str, rows: int, maxtext_gib: float) -> dict[str, Any]:
    devices = topology_devices(topology)
    config = dataclasses.replace(load_recipe("finetune", "vicuna-7b"), global_batch_size=rows * len(devices))
    report = make_report(config, "train", devices)
    sizes: collections.Counter[str] = collections.Counter()
    for path, leaf in blueprint(config.model).shapes.items():
        sizes[path.split("/")[0]] += math.prod(leaf.shape)
    peak = report["peak_bytes_per_device"] / _GIB
    trainable, frozen = 16 * sizes["fusion"], 2 * sizes["vision"]  # float32 weight, moments, gradient; bfloat16 weight
    return _print_row(
        {
            "what": f"stage 2, {topology}, {rows} rows per chip",
            "peak_gib": peak,
            "maxtext_gib": maxtext_gib,
            "ratio": peak / maxtext_gib,
            "tower_fusion_gib": (trainable + frozen) / len(devices) / _GIB,
        }
    )


def _print_row(row: dict[str, Any]) -> dict[str, Any]:
    print(f"{row['what']}: {row['peak_gib']:.2f} GiB", file=sys.stderr)
    return row
