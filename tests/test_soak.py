"""An hour of training, saving and measuring (`make soak`): memory, files and threads stay as they were."""

import gc
import os
import pathlib
import signal
import threading
import time

import numpy as np
import pytest
from started import ROOT, logged, saved

from stf_jax.main import main
from stf_jax.runtime.cli import door

pytestmark = [pytest.mark.slow, pytest.mark.soak]
EVERY = 20
MINUTES = float(os.environ.get("SOAK_MINUTES", 60))
WARM = MINUTES / 4  # until every program is compiled, every buffer made and every cache full
SLOPE, FILES = 60.0, 3  # MiB an hour, and files, that are taken for none
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


def _figures():
    """Minutes; MiB of this process's own in memory; open files; threads."""
    status = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
    memory = int(status["RssAnon"].split()[0]) / 1024
    return time.monotonic() / 60, memory, len(os.listdir("/proc/self/fd")), threading.active_count()


def test_an_hour_leaves_nothing_behind(tmp_path, record_property):
    samples, before = [], set(threading.enumerate())

    def watch():
        end = time.monotonic() + 60 * MINUTES
        while time.monotonic() < end:
            time.sleep(5)
            samples.append(_figures())
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert door(main, [*ARGUMENTS, f"--workdir={tmp_path / 'run'}"]) == 143
    watcher.join()
    gc.collect()
    left = [thread for thread in threading.enumerate() if thread not in before and not thread.daemon]

    minutes, memory, files, threads = np.array([row for row in samples if row[0] > samples[0][0] + WARM]).T
    # The least of each minute: what saving and measuring take, they give back.
    least = {int(minute): memory[minutes.astype(int) == int(minute)].min() for minute in minutes}
    slope = 60 * np.polyfit([*least], [*least.values()], 1)[0]
    first, *_, last = least.values()
    lines = logged(tmp_path / "run")
    record_property("soak, minutes", f"{MINUTES:g}")
    record_property(
        "soak, steps, saves, measurements",
        f"{lines[-1]['step']}, {lines[-1]['step'] // EVERY}, {lines[-1]['step'] // 50}",
    )
    record_property("soak, memory at the end of warm-up and at the end, MiB", f"{first:.0f}, {last:.0f}")
    each = slope / (60 * lines[-1]["step"] / EVERY / MINUTES)
    record_property("soak, slope of memory", f"{slope:.1f} MiB an hour, {each:.2f} MiB a save")
    record_property(
        "soak, open files and threads, least and most",
        f"{files.min():.0f}..{files.max():.0f}, {threads.min():.0f}..{threads.max():.0f}",
    )
    assert saved(tmp_path / "run")[-1] >= lines[-1]["step"]
    assert not left
    assert slope < SLOPE
    for counts in (files, threads):  # some come and go with each save
        first, last = np.array_split(counts, 2)
        assert np.median(last) <= np.median(first) + FILES
        assert last.max() <= first.max() + FILES
