"""The time that devices wait for the host in a training run: for the next batch, and for the log.

Reading an image takes a fixed time in which it needs no core, like a disk or a bucket that answers slowly. The run
without that time is the reference.
"""

import argparse
import contextlib
import functools
import io
import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import PIL.Image

import stf_jax
from stf_jax.config import TrainConfig, UserError, default_config
from stf_jax.data.records import Record, Turn
from stf_jax.data.sources.base import DataSet

_ROWS = 16  # twice what one reading thread reads ahead
_SKIPPED = 4  # first steps, in which batches that were read ahead are used up
_SECONDS = "STF_JAX_BENCH_READ_SECONDS"  # a data source gets nothing but the config of the run


class _Slow:
    name = "slow images"

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, index: int) -> Record:
        turns = Turn("human", "<image>\nWhich number is it?"), Turn("gpt", f"It is number {index}.")
        return Record(str(index), (functools.partial(_draw, index, self._seconds),), turns)


def _draw(index: int, seconds: float) -> PIL.Image.Image:
    time.sleep(seconds)
    return PIL.Image.new("RGB", (96, 96), (index % 256, 0, 0))


def open_slow(config: TrainConfig) -> Sequence[DataSet]:
    """The data source of the runs."""
    return [_Slow(float(os.environ[_SECONDS]))]


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Trains with fast reading, then with slow reading and lines of the log every step and every ten steps."""
    if not 0 < options.share < 1 or options.steps < 20:
        raise UserError("--share must be between 0 and 1, and --steps at least 20.")
    reference = _train(options.steps, 0.0, 10)
    rows: list[dict[str, Any]] = [
        {"what": "reading takes no time, a line every 10 steps", "seconds_per_step": reference}
    ]
    for every in (10, 1):
        seconds = _train(options.steps, options.share * reference / _ROWS, every)
        what = f"reading takes {options.share:g} of a step, a line every {'10 steps' if every > 1 else 'step'}"
        rows.append({"what": what, "seconds_per_step": seconds, "idle": max(1 - reference / seconds, 0.0)})
    return rows


def _train(steps: int, read_seconds: float, log_every_steps: int) -> float:
    """Returns the seconds per step of a run."""
    config = default_config()
    config.model.update(vision="clip-mini-8-96", llm="llama-mini-6", precision="float32", remat="none")
    config.data.update(source="benchmarks.idle:open_slow", tokenizer="miniature/2", max_length=192, threads=1)
    config.rules = (("vision/.*", "freeze"), (".*", "train"))
    config.update(steps=steps, global_batch_size=_ROWS, log_every_steps=log_every_steps, init_missing=(".*",))
    config.checkpoint.every_steps = steps
    os.environ[_SECONDS] = repr(read_seconds)
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            stf_jax.train(config, folder)
        lines = [json.loads(line) for line in (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["seconds_per_step"] for line in lines if line["step"] > _SKIPPED + log_every_steps)
