"""Training steps with each schedule of image tokens: time and model FLOPs, as shares of those without one."""

import argparse
import dataclasses
import statistics
from typing import Any

from benchmarks.recipes import make_stage
from stf_jax.config import FusionConfig, ModelConfig, UserError
from stf_jax.training.flops import step_flops
from stf_jax.training.timing import make_batch, time_train_steps


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures stage 2 with each schedule, one row each; medians over rounds that run all of them in turn."""
    if min(options.rows, options.text - 1, options.steps, options.rounds) < 1:
        raise UserError("--rows, --steps and --rounds must be at least 1, and --text at least 2.")
    model = ModelConfig(options.vision, options.llm, FusionConfig(options.fusion), "float32", remat="none")
    configs = {
        name: make_stage(dataclasses.replace(model, schedule=name), "finetune", options.rows, options.text)
        for name in ("", *options.schedules.split(";"))
    }
    seconds: dict[str, list[float]] = {name: [] for name in configs}
    for _ in range(options.rounds):
        for name, config in configs.items():
            timing = time_train_steps(config, lambda _: {}, make_batch(config), options.steps)
            seconds[name].append(statistics.median(timing.seconds))
            del timing  # its state
    flops = {
        name: step_flops(config.model, config.rules, options.rows, config.data.max_length, 1)
        for name, config in configs.items()
    }
    return [
        {
            "what": name or "no schedule",
            "step_ms": 1000 * statistics.median(seconds[name]),
            "time_share": statistics.median(own / full for own, full in zip(seconds[name], seconds[""], strict=True)),
            "flops_share": flops[name] / flops[""],
        }
        for name in configs
    ]
