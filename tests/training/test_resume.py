"""A run that is killed and started again ends, to the bit, as if it had never been killed."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from tiny import Setup, preparation

from stf_jax.data.pipeline import Batches, training_records
from stf_jax.main import main
from stf_jax.runtime.checkpoint import Checkpoints
from stf_jax.runtime.cli import door

ROOT = pathlib.Path(__file__).parents[2]
STEPS, EVERY, KILL_AFTER = 32, 4, 13
CHANGES = {
    "data.packing": True,
    "data.images_per_row": 3,
    "data.max_length": 384,
    "global_batch_size": 2,
    "mesh.data": 1,
    "mesh.fsdp": 2,
    "checkpoint.every_steps": EVERY,
    "checkpoint.keep_last": 2,
    "checkpoint.keep_every": 16,
    "optimizer.weight_decay": 0.1,
    "optimizer.clip_norm": 1.0,
}
# Two devices and quick compilation: the same program each time is what matters here.
ENVIRONMENT = {"JAX_NUM_CPU_DEVICES": "2", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def _arguments(workdir):
    options = [f"--config.{key}={value}" for key, value in CHANGES.items()]
    return [f"--config={ROOT}/tests/tiny.py:steps={STEPS}", f"--workdir={workdir}", *options]


def _start(workdir):
    with (workdir.parent / f"{workdir.name}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "stf_jax.main", *_arguments(workdir)],
            cwd=workdir.parent,
            env=os.environ | ENVIRONMENT,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _log(workdir):
    return (workdir.parent / f"{workdir.name}.log").read_text()


def _lines(workdir):
    path = workdir / "metrics.jsonl"
    # A line without its end is still being written.
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []


def _saved(workdir):
    return sorted(int(folder.name) for folder in (workdir / "checkpoints").iterdir() if folder.name.isdigit())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The workdirs of a whole run and of a killed and resumed one; the lines and checkpoints that the kill left."""
    folder = tmp_path_factory.mktemp("runs")
    whole, killed = folder / "whole", folder / "killed"
    first, other = _start(killed), _start(whole)
    try:
        while first.poll() is None and len(_lines(killed)) < KILL_AFTER:
            time.sleep(0.005)
        first.kill()
        assert first.wait() == -signal.SIGKILL, f"ended before it could be killed:\n{_log(killed)}"
        left = _lines(killed), _saved(killed)
        again = _start(killed)
        assert again.wait() == 0, _log(killed)
        assert other.wait() == 0, _log(whole)
    finally:
        for process in (first, other):
            process.kill()
    return whole, killed, *left


def test_the_kill_landed_in_the_middle(runs):
    _, _, lines, saved = runs
    reached = json.loads(lines[-1])["step"]
    assert KILL_AFTER <= reached < STEPS - EVERY
    # Work was lost that had to be done again, but not all of it.
    assert EVERY <= saved[-1] <= reached


def test_losses_are_bit_identical_after_the_kill(runs):
    whole, killed, _, _ = runs
    expected, resumed = ([json.loads(line) for line in _lines(workdir)] for workdir in (whole, killed))
    assert [line["step"] for line in expected] == [line["step"] for line in resumed] == list(range(1, STEPS + 1))
    for key in ("loss", "gradient_norm", "learned_tokens", "learning_rate", "tokens"):
        assert [line[key] for line in resumed] == [line[key] for line in expected], key
    assert len({line["loss"] for line in expected}) == STEPS
    assert expected[-1]["loss"] < expected[0]["loss"]


def test_the_run_goes_on_from_its_last_checkpoint(runs):
    """Lines up to the restored step stay as they were, times included; the clock goes on."""
    _, killed, before, saved = runs
    after = _lines(killed)
    assert after[: saved[-1]] == before[: saved[-1]]
    assert all(new != old for new, old in zip(after[saved[-1] :], before[saved[-1] :], strict=False))
    seconds = [json.loads(line)["seconds"] for line in after]
    assert seconds == sorted(seconds)


def _restored(workdir):
    setup = Setup.of(steps=STEPS, **CHANGES)
    records = training_records(setup.config)
    iterator = Batches(setup.config, records, preparation(setup.config), host=0, hosts=1)
    checkpoints = Checkpoints(workdir, setup.config.checkpoint)
    arrays, position, _ = checkpoints.restore(STEPS, setup.layout)
    iterator.set_state(position)
    checkpoints.close()
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(arrays)}, iterator


def test_final_state_is_bit_identical(runs):
    whole, killed, _, _ = runs
    (expected, iterator), (resumed, other) = _restored(whole), _restored(killed)
    assert expected.keys() == resumed.keys()
    assert (
        len(expected) == 40 + 2 * 19 + 2
    )  # parameters, two moments of the trainable ones, counts of Adam and schedule
    for path, value in expected.items():
        assert resumed[path].dtype == value.dtype
        assert resumed[path].tobytes() == value.tobytes(), path
    # And so is what would be read next.
    assert other.get_state() == iterator.get_state()
    jax.tree.map(np.testing.assert_array_equal, next(other), next(iterator))


def test_the_newest_checkpoints_and_each_sixteenth_are_kept(runs):
    whole, killed, _, saved = runs
    assert _saved(whole) == _saved(killed) == [16, 28, 32]
    assert len(saved) <= 3
    unfinished = [folder.name for folder in (killed / "checkpoints").iterdir() if not folder.name.isdigit()]
    assert not unfinished


def test_a_finished_run_does_nothing_more(runs):
    whole = runs[0]
    (whole / "results.json").write_text('{"benchmark": "kept"}')

    def contents():
        files = [file for file in whole.rglob("*") if file.is_file() and "tensorboard" not in file.parts]
        return {file: (file.read_bytes(), file.parent == whole or file.stat().st_mtime_ns) for file in files}

    before = contents()
    assert any("checkpoints" in file.parts for file in before)
    assert door(main, _arguments(whole)) == 0
    assert contents() == before
