"""The demo's first stage on two hosts loses what it does on one; its checkpoints go on as one host or as four."""

import contextlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from stf_jax.main import main
from stf_jax.runtime.cli import door

ROOT = pathlib.Path(__file__).parents[2]
STEPS, SAVED = 4, 2


def _arguments(workdir):
    return [
        f"--config={ROOT}/configs/demo.py:stage=pretrain,steps={STEPS}",
        f"--workdir={workdir}",
        "--config.log_every_steps=1",
        f"--config.checkpoint.every_steps={SAVED}",
        "--config.data.scenes.size=256",
        "--config.model.scan_layers=True",  # compiles sooner
    ]


def _alone(workdir, devices):
    """Trains in this process, on so many of its devices."""
    jax.config.update("jax_disable_most_optimizations", True)
    mesh = ["--config.mesh.data=1", f"--config.mesh.fsdp={devices}"]
    assert door(main, [*_arguments(workdir), *mesh]) == 0
    jax.config.update("jax_disable_most_optimizations", False)


@contextlib.contextmanager
def _together(workdir, hosts, devices, *more):
    """Meanwhile trains on hosts with so many devices each, as a user starts them; gives what each says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    logs = [workdir.parent / f"{workdir.name}.{host}.log" for host in range(hosts)]
    with contextlib.ExitStack() as stack:
        running = []
        for host, log in enumerate(logs):
            which = [f"--coordinator={coordinator}", f"--processes={hosts}", f"--process={host}"]
            command = [sys.executable, "-m", "stf_jax.main", *_arguments(workdir), *which, *more]
            out = stack.enter_context(log.open("w"))
            running.append(subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT))
            stack.callback(running[-1].kill)
        yield logs
        for process, log in zip(running, logs, strict=True):
            assert process.wait(timeout=240) == 0, log.read_text()


def _lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The workdir of a run on one host of four devices, that of one on two hosts of two, and what these two said."""
    folder = tmp_path_factory.mktemp("runs")
    one, two = folder / "one", folder / "two"
    with _together(two, 2, 2) as logs:
        _alone(one, 4)
    return one, two, [log.read_text() for log in logs]


def _assert_same(workdir, other):
    lines, expected = _lines(workdir), _lines(other)
    for key in ("step", "tokens", "learned_tokens", "rows_replaced", "learning_rate"):
        assert [line[key] for line in lines] == [line[key] for line in expected], key
    losses, wanted = ([line["loss"] for line in some] for some in (lines, expected))
    np.testing.assert_allclose(losses, wanted, rtol=0, atol=1e-5)


def test_two_hosts_train_as_one(runs):
    one, two, said = runs
    lines = _lines(one)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert len({round(line["loss"], 3) for line in lines}) == STEPS  # none may be taken for another
    _assert_same(two, one)
    assert "mesh data 1, fsdp 4, tensor 1" in said[0]
    assert f"{STEPS}/{STEPS}" in said[0]  # the bar
    assert not [word for word in ("mesh", "loss", f"/{STEPS}") if word in said[1]]


def test_a_checkpoint_does_not_tell_how_many_hosts_wrote_it(runs):
    data, clocks = (
        [json.loads((run / "checkpoints" / str(SAVED) / item / "metadata").read_text()) for run in runs[:2]]
        for item in ("data", "clock")
    )
    assert data[0] == data[1]
    assert data[0]["rows"] == SAVED * 8
    assert all(clock.pop("seconds") > 0 for clock in clocks)
    assert clocks[0] == clocks[1]


@pytest.mark.parametrize("hosts", [1, 4])
def test_two_hosts_checkpoint_goes_on_elsewhere(runs, tmp_path, hosts):
    """On one host with one device; on four with one each, of which two and two hold the same rows."""
    one, two, _ = runs
    workdir = tmp_path / "run"
    shutil.copytree(two / "checkpoints" / str(SAVED), workdir / "checkpoints" / str(SAVED))
    shutil.copy(two / "metrics.jsonl", workdir)
    if hosts == 1:
        _alone(workdir, 1)
    else:
        with _together(workdir, hosts, 1, "--config.mesh.tensor=2") as logs:
            pass
        assert "mesh data 1, fsdp 2, tensor 2" in logs[0].read_text()
    _assert_same(workdir, one)
    before, after = _lines(two), _lines(workdir)
    assert [line == old for line, old in zip(after, before, strict=True)] == [True, True, False, False]  # ran anew
