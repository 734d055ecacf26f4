"""The demo's first stage on two hosts loses what it does on one; its checkpoints go on as one host or as four."""

import contextlib
import json
import shutil

import numpy as np
import pytest
from started import ROOT, logged, together

from stf_jax.main import main
from stf_jax.runtime.cli import door

STEPS, SAVED = 4, 2


def _arguments():
    return [
        f"--config={ROOT}/configs/demo.py:stage=pretrain,steps={STEPS}",
        "--config.log_every_steps=1",
        f"--config.checkpoint.every_steps={SAVED}",
        "--config.data.scenes.size=256",
        "--config.model.scan_layers=True",  # compiles sooner
    ]


def _alone(workdir, devices):
    """Trains in this process, on so many of its devices."""
    mesh = ["--config.mesh.data=1", f"--config.mesh.fsdp={devices}"]
    assert door(main, [*_arguments(), f"--workdir={workdir}", *mesh]) == 0


@contextlib.contextmanager
def _together(workdir, hosts, devices, *more):
    """Meanwhile trains on hosts with so many devices each, as a user starts them; gives them."""
    with contextlib.ExitStack() as ends:
        running = [ends.enter_context(run) for run in together(workdir, hosts, *_arguments(), *more, devices=devices)]
        yield running
        for run in running:
            assert run.ends() == 0, run.said()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The workdir of a run on one host of four devices, that of one on two hosts of two, and what these two said."""
    folder = tmp_path_factory.mktemp("runs")
    one, two = folder / "one", folder / "two"
    with _together(two, 2, 2) as hosts:
        _alone(one, 4)
    return one, two, [host.said() for host in hosts]


def _assert_same(workdir, other):
    lines, expected = logged(workdir), logged(other)
    for key in ("step", "tokens", "learned_tokens", "rows_replaced", "learning_rate"):
        assert [line[key] for line in lines] == [line[key] for line in expected], key
    losses, wanted = ([line["loss"] for line in some] for some in (lines, expected))
    np.testing.assert_allclose(losses, wanted, rtol=0, atol=1e-5)


def test_two_hosts_train_as_one(runs):
    one, two, said = runs
    lines = logged(one)
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


@pytest.mark.parametrize("hosts", [1, pytest.param(4, marks=pytest.mark.slow)])  # four: a minute
def test_two_hosts_checkpoint_goes_on_elsewhere(runs, tmp_path, hosts):
    """On one host with one device; on four with one each, of which two and two hold the same rows."""
    one, two, _ = runs
    workdir = tmp_path / "run"
    shutil.copytree(two / "checkpoints" / str(SAVED), workdir / "checkpoints" / str(SAVED))
    shutil.copy(two / "metrics.jsonl", workdir)
    if hosts == 1:
        _alone(workdir, 1)
    else:
        with _together(workdir, hosts, 1, "--config.mesh.tensor=2") as running:
            pass
        assert "mesh data 1, fsdp 2, tensor 2" in running[0].said()
    _assert_same(workdir, one)
    before, after = logged(two), logged(workdir)
    assert [line == old for line, old in zip(after, before, strict=True)] == [True, True, False, False]  # ran anew
