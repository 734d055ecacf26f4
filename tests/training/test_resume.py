"""A run that is killed and started again ends, to the bit, as if it had never been killed."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from make_llava import make
from tiny import Setup, preparation

from stf_jax.data.pipeline import Batches, training_records
from stf_jax.main import main
from stf_jax.runtime.checkpoint import Checkpoints
from stf_jax.runtime.cli import door

ROOT = pathlib.Path(__file__).parents[2]
STEPS, EVERY, KILL_AFTER = 32, 4, 13
CHANGES = {
    "mesh.data": 1,
    "checkpoint.every_steps": EVERY,
    "checkpoint.keep_last": 2,
    "checkpoint.keep_every": 16,
    "optimizer.weight_decay": 0.1,
    "optimizer.clip_norm": 1.0,
}
DATA = {
    "packed scenes": {
        "data.packing": True,
        "data.images_per_row": 3,
        "data.max_length": 384,
        "global_batch_size": 2,
        "mesh.fsdp": 2,
    },
    # Seven of its 32 rows cannot be used (tests/make_llava.py); four epochs.
    "LLaVA's files, grouped": {
        "data.source": "llava",
        "data.annotations": "llava_v1_5_mix665k.json",
        "data.images": "images",
        "data.max_length": 192,
        "global_batch_size": 4,
    },
}
REPLACED = {"packed scenes": 0, "LLaVA's files, grouped": 4 * 7}
# Two devices and quick compilation, kept for whoever comes later: the same program each time is what matters here.
ENVIRONMENT = {"JAX_NUM_CPU_DEVICES": "2", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def _arguments(workdir, kind):
    options = [f"--config.{key}={value}" for key, value in (CHANGES | DATA[kind]).items()]
    return [f"--config={ROOT}/tests/tiny.py:steps={STEPS}", f"--workdir={workdir}", *options]


def _start(workdir, kind):
    with (workdir.parent / f"{workdir.name}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "stf_jax.main", *_arguments(workdir, kind)],
            cwd=workdir.parent,
            env=os.environ | ENVIRONMENT | {"JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled")},
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


@dataclasses.dataclass(frozen=True)
class Runs:
    """The workdirs of a whole run and of a killed and resumed one; the lines and checkpoints that the kill left."""

    kind: str
    whole: pathlib.Path
    killed: pathlib.Path
    lines: list[str]
    saved: list[int]


@pytest.fixture(scope="module", params=DATA)
def runs(request, tmp_path_factory):
    kind, folder = request.param, tmp_path_factory.mktemp("runs")
    if kind != "packed scenes":
        make(folder, captions=1, conversations=24)
    whole, killed = folder / "whole", folder / "killed"
    first, other = _start(killed, kind), _start(whole, kind)
    try:
        while first.poll() is None and len(_lines(killed)) < KILL_AFTER:
            time.sleep(0.005)
        first.kill()
        assert first.wait() == -signal.SIGKILL, f"ended before it could be killed:\n{_log(killed)}"
        left = _lines(killed), _saved(killed)
        first = _start(killed, kind)
        assert first.wait(timeout=120) == 0, _log(killed)
        assert other.wait(timeout=120) == 0, _log(whole)
    finally:
        for process in (first, other):
            process.kill()
    return Runs(kind, whole, killed, *left)


def test_the_kill_landed_in_the_middle(runs):
    reached = json.loads(runs.lines[-1])["step"]
    assert KILL_AFTER <= reached < STEPS - EVERY
    # Work was lost that had to be done again, but not all of it.
    assert EVERY <= runs.saved[-1] <= reached


def test_losses_are_bit_identical_after_the_kill(runs):
    expected, resumed = ([json.loads(line) for line in _lines(workdir)] for workdir in (runs.whole, runs.killed))
    assert [line["step"] for line in expected] == [line["step"] for line in resumed] == list(range(1, STEPS + 1))
    for key in ("loss", "gradient_norm", "learned_tokens", "learning_rate", "tokens", "rows_replaced"):
        assert [line[key] for line in resumed] == [line[key] for line in expected], key
    assert len({line["loss"] for line in expected}) == STEPS
    assert expected[-1]["loss"] < expected[0]["loss"]
    assert expected[-1]["rows_replaced"] == REPLACED[runs.kind]


def test_the_run_goes_on_from_its_last_checkpoint(runs):
    """Lines up to the restored step stay as they were, times included; the clock goes on."""
    before, last, after = runs.lines, runs.saved[-1], _lines(runs.killed)
    assert after[:last] == before[:last]
    assert all(new != old for new, old in zip(after[last:], before[last:], strict=False))
    seconds = [json.loads(line)["seconds"] for line in after]
    assert seconds == sorted(seconds)


def _restored(workdir, kind):
    paths = {
        key: str(workdir.parent / DATA[kind][key]) for key in ("data.annotations", "data.images") & DATA[kind].keys()
    }
    setup = Setup.of(steps=STEPS, **(CHANGES | DATA[kind] | paths))
    records = training_records(setup.config)
    iterator = Batches(setup.config, records, preparation(setup.config), host=0, hosts=1)
    checkpoints = Checkpoints(workdir, setup.config.checkpoint)
    arrays, position, _ = checkpoints.restore(STEPS, setup.layout)
    iterator.set_state(position)
    checkpoints.close()
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(arrays)}, iterator


def test_final_state_is_bit_identical(runs):
    (expected, iterator), (resumed, other) = (_restored(workdir, runs.kind) for workdir in (runs.whole, runs.killed))
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


HOST = """
import sys
import jax
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
from stf_jax.main import main
from stf_jax.runtime.cli import door
sys.exit(door(main, sys.argv[3:]))
"""


def test_two_hosts_go_on_where_one_stopped(runs, tmp_path):
    """From the checkpoint half-way, with the same rows at each step, each host reading half of them."""
    if runs.kind == "packed scenes":
        pytest.skip("the other data have all that this is about")
    workdir = tmp_path / "run"
    shutil.copytree(runs.whole / "checkpoints" / "16", workdir / "checkpoints" / "16")
    shutil.copy(runs.whole / "metrics.jsonl", workdir)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    arguments = [*_arguments(workdir, runs.kind), "--config.mesh.fsdp=2"]
    with contextlib.ExitStack() as stack:
        hosts = []
        for host in range(2):
            hosts.append(
                subprocess.Popen(
                    [sys.executable, "-c", HOST, address, str(host), *arguments],
                    cwd=runs.whole.parent,
                    env=os.environ | ENVIRONMENT | {"JAX_NUM_CPU_DEVICES": "1"},
                    stdout=subprocess.DEVNULL,
                    stderr=stack.enter_context((tmp_path / f"{host}.log").open("w")),
                )
            )
            stack.callback(hosts[-1].kill)
        for host, process in enumerate(hosts):
            assert process.wait(timeout=120) == 0, (tmp_path / f"{host}.log").read_text()
    expected, resumed = ([json.loads(line) for line in _lines(folder)] for folder in (runs.whole, workdir))
    assert resumed[:16] == expected[:16]
    for key in ("step", "learned_tokens", "tokens", "rows_replaced"):
        assert [line[key] for line in resumed] == [line[key] for line in expected], key
    for key in ("loss", "gradient_norm"):
        np.testing.assert_allclose(
            [line[key] for line in resumed], [line[key] for line in expected], rtol=1e-4, err_msg=key
        )
    # It did run anew: the times are its own.
    assert all(new["seconds"] != old["seconds"] for new, old in zip(resumed[16:], expected[16:], strict=True))


def test_the_newest_checkpoints_and_each_sixteenth_are_kept(runs):
    assert _saved(runs.whole) == _saved(runs.killed) == [16, 28, 32]
    assert len(runs.saved) <= 3
    unfinished = [folder.name for folder in (runs.killed / "checkpoints").iterdir() if not folder.name.isdigit()]
    assert not unfinished


def test_a_finished_run_does_nothing_more(runs, monkeypatch):
    whole = runs.whole
    monkeypatch.chdir(whole.parent)
    (whole / "results.json").write_text('{"benchmark": "kept"}')

    def contents():
        files = [file for file in whole.rglob("*") if file.is_file() and "tensorboard" not in file.parts]
        return {file: (file.read_bytes(), file.parent == whole or file.stat().st_mtime_ns) for file in files}

    before = contents()
    assert any("checkpoints" in file.parts for file in before)
    assert door(main, _arguments(whole, runs.kind)) == 0
    assert contents() == before
