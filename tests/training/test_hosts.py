"""The demo's first stage on two hosts has the losses of one host; its checkpoints resume on one host or on four."""

import contextlib
import json
import shutil

import numpy as np
import pytest
from run_process import ROOT, read_metrics, start_hosts

from stf_jax.cli import run_command
from stf_jax.main import main

STEPS, SAVED = 4, 2


def _arguments():
    return [
        f"--config={ROOT}/configs/demo.py:stage=pretrain,steps={STEPS}",
        "--config.log_every_steps=1",
        f"--config.checkpoint.every_steps={SAVED}",
        "--config.data.scenes.size=256",
        "--config.model.scan_layers=True",  # compiles sooner
    ]


def _train_here(workdir, devices):
    """Trains in this process on this many devices."""
    mesh = ["--config.mesh.data=1", f"--config.mesh.fsdp={devices}"]
    assert run_command(main, [*_arguments(), f"--workdir={workdir}", *mesh]) == 0


@contextlib.contextmanager
def _train_on_hosts(workdir, hosts, devices, *more):
    """Trains on hosts with this many devices each, as a user does; yields their runs and waits for them at exit."""
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(run) for run in start_hosts(workdir, hosts, *_arguments(), *more, devices=devices)
        ]
        yield running
        for run in running:
            assert run.wait() == 0, run.output()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The workdirs of a run on one host of four devices and of one on two hosts of two, and the outputs of these."""
    folder = tmp_path_factory.mktemp("runs")
    one, two = folder / "one", folder / "two"
    with _train_on_hosts(two, 2, 2) as hosts:
        _train_here(one, 4)
    return one, two, [host.output() for host in hosts]


def _assert_same_run(workdir, other):
    lines, expected = read_metrics(workdir), read_metrics(other)
    for key in ("step", "tokens", "learned_tokens", "rows_replaced", "learning_rate"):
        assert [line[key] for line in lines] == [line[key] for line in expected], key
    losses, wanted = ([line["loss"] for line in some] for some in (lines, expected))
    np.testing.assert_allclose(losses, wanted, rtol=0, atol=1e-5)


def test_two_hosts_equal_one(runs):
    one, two, outputs = runs
    lines = read_metrics(one)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert len({round(line["loss"], 3) for line in lines}) == STEPS  # all losses are distinct
    _assert_same_run(two, one)
    assert "mesh data 1, fsdp 4, tensor 1" in outputs[0]
    assert f"{STEPS}/{STEPS}" in outputs[0]  # the progress bar
    assert not [word for word in ("mesh", "loss", f"/{STEPS}") if word in outputs[1]]


def test_checkpoint_does_not_depend_on_the_number_of_hosts(runs):
    data, clocks = (
        [json.loads((run / "checkpoints" / str(SAVED) / item / "metadata").read_text()) for run in runs[:2]]
        for item in ("data", "clock")
    )
    assert data[0] == data[1]
    assert data[0]["rows"] == SAVED * 8
    assert all(clock.pop("seconds") > 0 for clock in clocks)
    assert clocks[0] == clocks[1]


@pytest.mark.parametrize("hosts", [1, pytest.param(4, marks=pytest.mark.slow)])  # four: a minute
def test_checkpoint_of_two_hosts_resumes_elsewhere(runs, tmp_path, hosts):
    """On one host with one device; on four with one each, where pairs of hosts have the same rows."""
    one, two, _ = runs
    workdir = tmp_path / "run"
    shutil.copytree(two / "checkpoints" / str(SAVED), workdir / "checkpoints" / str(SAVED))
    shutil.copy(two / "metrics.jsonl", workdir)
    if hosts == 1:
        _train_here(workdir, 1)
    else:
        with _train_on_hosts(workdir, hosts, 1, "--config.mesh.tensor=2") as running:
            pass
        assert "mesh data 1, fsdp 2, tensor 2" in running[0].output()
    _assert_same_run(workdir, one)
    before, after = read_metrics(two), read_metrics(workdir)
    assert [line == old for line, old in zip(after, before, strict=True)] == [True, True, False, False]  # trained again
