"""An hour of training, saving and evaluating (`make soak`) leaks no memory, files or threads."""

import gc
import os
import pathlib
import signal
import threading
import time

import numpy as np
import pytest
from run_process import ROOT, read_metrics, saved_steps

from stf_jax.cli import run_command
from stf_jax.main import main

pytestmark = [pytest.mark.slow, pytest.mark.soak]
EVERY = 20
MINUTES = float(os.environ.get("SOAK_MINUTES", 60))
WARMUP = MINUTES / 4  # until all programs are compiled, all buffers allocated and all caches full
MAX_SLOPE, MAX_FILES = 60.0, 3  # tolerated growth: MiB per hour; files or threads
ARGUMENTS = [
    f"--config={ROOT}/configs/demo.py:stage=pretrain,steps=1000000",
    "--config.global_batch_size=4",
    "--config.mesh.data=1",
    "--config.mesh.fsdp=1",
    f"--config.checkpoint.every_steps={EVERY}",
    "--config.eval.benchmarks=('scenes',)",
    "--config.eval.limit=4",
    "--config.eval.every_steps=50",
]


def _sample():
    """Returns minutes, MiB of this process's anonymous memory, open files, and threads."""
    status = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
    memory = int(status["RssAnon"].split()[0]) / 1024
    return time.monotonic() / 60, memory, len(os.listdir("/proc/self/fd")), threading.active_count()


def test_an_hour_leaks_nothing(tmp_path, record_property):
    samples, before = [], set(threading.enumerate())

    def watch():
        end = time.monotonic() + 60 * MINUTES
        while time.monotonic() < end:
            time.sleep(5)
            samples.append(_sample())
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert run_command(main, [*ARGUMENTS, f"--workdir={tmp_path / 'run'}"]) == 143
    watcher.join()
    gc.collect()
    left = [thread for thread in threading.enumerate() if thread not in before and not thread.daemon]

    minutes, memory, files, threads = np.array([row for row in samples if row[0] > samples[0][0] + WARMUP]).T
    # The minimum of each minute, because saving and evaluating use memory for a while.
    minima = {int(minute): memory[minutes.astype(int) == int(minute)].min() for minute in minutes}
    slope = 60 * np.polyfit([*minima], [*minima.values()], 1)[0]
    first, *_, last = minima.values()
    lines = read_metrics(tmp_path / "run")
    record_property("soak, minutes", f"{MINUTES:g}")
    record_property(
        "soak, steps, saves, evaluations",
        f"{lines[-1]['step']}, {lines[-1]['step'] // EVERY}, {lines[-1]['step'] // 50}",
    )
    record_property("soak, memory at the end of warm-up and at the end, MiB", f"{first:.0f}, {last:.0f}")
    per_save = slope / (60 * lines[-1]["step"] / EVERY / MINUTES)
    record_property("soak, slope of memory", f"{slope:.1f} MiB per hour, {per_save:.2f} MiB per save")
    record_property(
        "soak, open files and threads, minimum and maximum",
        f"{files.min():.0f}..{files.max():.0f}, {threads.min():.0f}..{threads.max():.0f}",
    )
    assert saved_steps(tmp_path / "run")[-1] >= lines[-1]["step"]
    assert not left
    assert slope < MAX_SLOPE
    for counts in (files, threads):  # some exist only during a save
        first, last = np.array_split(counts, 2)
        assert np.median(last) <= np.median(first) + MAX_FILES
        assert last.max() <= first.max() + MAX_FILES
