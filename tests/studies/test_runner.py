"""Cells run once each, in order, within their shares of the machine, and end with whoever started them."""

import itertools
import os
import pathlib
import signal
import threading
import time

import make_study
import pytest

from stf_jax import ablate
from stf_jax.config import UserError
from stf_jax.runtime.cli import run_command
from stf_jax.studies import runner
from stf_jax.studies.runner import Slot, slots
from stf_jax.studies.study import Cell


@pytest.fixture
def world(tmp_path, monkeypatch):
    made = make_study.World(tmp_path)
    monkeypatch.setattr(Cell, "command", property(made.command))
    return made


def test_cells_run_once_and_those_that_ask_come_last(world, capsys):
    world.plan = {"stf, seed 1": [[0, 0.3]]}
    assert world.run() == {}
    names = [one["name"] for one in world.begun()]
    assert sorted(names) == sorted(cell.name for cell in world.cells)
    asking = [one for one in world.begun() if one["name"].startswith("fastv")]
    assert names[-2:] != names[:2]
    assert min(one["time"] for one in asking) > world.ended()["stf, seed 1"]
    assert all(one["asked"] for one in asking)
    said = capsys.readouterr().out
    assert "6 runs, 0 of them done before" in said
    assert "stf, seed 1: scenes/accuracy" in said
    # Again, nothing runs; then what is lacking does.
    assert world.run() == {}
    assert len(world.begun()) == 6
    assert "6 runs, 6 of them done before" in capsys.readouterr().out
    (world.cells[4].folder / "results.json").unlink()
    (world.cells[5].folder / "results.json").unlink()
    assert world.run() == {}
    assert [one["name"] for one in world.begun()[6:]] == ["stf, seed 1", "fastv, seed 1"]


def test_nothing_runs_beside_a_run_of_another_config(world):
    make_study.finish(world.cells[0])
    make_study.put(world.cells[0].folder / "pretrain" / "config.json", {"steps": 7})
    with pytest.raises(UserError, match="holds a run that differs"):
        world.run()
    assert not world.begun()


def test_a_cell_whose_machine_is_to_blame_is_tried_again(world):
    world.plan = {"mlp, seed 0": [[75, 0], [75, 0], [0, 0]], "stf, seed 0": [[75, 0]]}
    failed = world.run()
    names = [one["name"] for one in world.begun()]
    assert names.count("mlp, seed 0") == names.count("stf, seed 0") == 3
    assert {cell.name: why.partition(" (")[0] for cell, why in failed.items()} == {
        "stf, seed 0": "ended with status 75"
    }


def test_a_cell_that_fails_is_told_of_and_the_others_run(world, capsys):
    world.plan = {"mlp, seed 0": [[2, 0]]}
    failed = {cell.name: why for cell, why in world.run().items()}
    assert set(failed) == {"mlp, seed 0", "fastv, seed 0"}
    log = world.folder / "cells" / "mlp" / "seed_0" / "log.txt"
    assert failed["mlp, seed 0"] == f"ended with status 2 ({log}): error: it cannot be."
    assert failed["fastv, seed 0"] == f"{log.parent} is not there to be asked"
    assert f"mlp, seed 0: {failed['mlp, seed 0']}" in capsys.readouterr().out
    names = [one["name"] for one in world.begun()]
    assert sorted(names) == ["fastv, seed 1", "mlp, seed 0", "mlp, seed 1", "stf, seed 0", "stf, seed 1"]


def test_each_share_has_one_cell_at_a_time(world, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    before = os.sched_getaffinity(0)
    first, *_, last = sorted(before)
    world.plan = {cell.name: [[0, 0.1]] for cell in world.cells}
    world.run(
        Slot(frozenset([first]), {"MALLOC_ARENA_MAX": "2"}), Slot(frozenset([last]), {"CUDA_VISIBLE_DEVICES": "3"})
    )
    assert os.sched_getaffinity(0) == before
    ended = world.ended()
    times = {True: [], False: []}
    for one in world.begun():
        own = one["processors"] == [first] and one["environment"].get("MALLOC_ARENA_MAX") == "2"
        other = one["processors"] == [last] and one["environment"].get("CUDA_VISIBLE_DEVICES") == "3"
        assert own != other
        assert one["environment"]["JAX_COMPILATION_CACHE_DIR"] == str(world.folder / "programs")
        times[own].append((one["time"], ended[one["name"]]))
    for one in times.values():
        assert len(one) > 1
        one.sort()
        assert all(end < begin for (_, end), (begin, _) in itertools.pairwise(one))


def test_the_users_own_cache_is_kept(world, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    world.run()
    assert {one["environment"]["JAX_COMPILATION_CACHE_DIR"] for one in world.begun()} == {"elsewhere"}


@pytest.fixture
def alive():
    """Not ended by a signal that nobody hears."""
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(True))
    yield heard
    signal.signal(signal.SIGTERM, before)


def test_sigterm_lets_the_runs_end(world, alive, capsys, monkeypatch):
    monkeypatch.setattr(runner, "slots", lambda _: [Slot(frozenset(os.sched_getaffinity(0)), {})] * 2)
    world.plan = {cell.name: [[0, 60]] for cell in world.cells}
    own, ended = signal.getsignal(signal.SIGTERM), threading.Event()

    def send():
        while len(world.begun()) < 2 and not ended.wait(0.02):
            pass
        time.sleep(0.2)  # until they hear
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    begun = time.monotonic()
    status = run_command(ablate.main, [world.option, f"--out={world.folder}"])
    ended.set()
    sender.join()
    assert (status, alive) == (143, [])
    assert time.monotonic() - begun < 50  # of the minute that they would take
    assert capsys.readouterr().err.splitlines()[-1] == "Stopped by SIGTERM; the same command goes on where it was."
    assert signal.getsignal(signal.SIGTERM) is own
    stopped = pathlib.Path(f"{world.journal}.stopped").read_text().splitlines()
    assert sorted(stopped) == sorted(one["name"] for one in world.begun())  # nor tried again
    assert len(stopped) == 2
    for one in world.begun():
        with pytest.raises(ProcessLookupError):
            os.kill(one["pid"], 0)
    # The same command goes on.
    world.plan = {}
    assert run_command(ablate.main, [world.option, f"--out={world.folder}"]) == 0
    assert len(world.begun()) == 8


@pytest.fixture
def machine(monkeypatch):
    """Makes this one look like another."""

    def make(processors=4, devices=(), gibibytes=100, visible=None):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(processors)))
        monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": gibibytes * 2**18}.__getitem__)
        paths = [pathlib.Path("/dev") / name for name in devices]
        monkeypatch.setattr(
            pathlib.Path, "glob", lambda self, pattern: [path for path in paths if path.match(f"{self}/{pattern}")]
        )
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return make


GPUS = ("nvidia1", "nvidia0", "nvidiactl", "nvidia-uvm", "nvidia2", "nvidia3")


@pytest.mark.parametrize(
    ("how", "jobs", "visible"),
    [
        ({}, 0, ["0", "1", "2", "3"]),
        ({}, 2, ["0,2", "1,3"]),
        ({}, 1, ["0,1,2,3"]),
        ({"visible": "2,3"}, 0, ["2", "3"]),
        ({"processors": 2}, 0, ["0", "1", "2", "3"]),
    ],
)
def test_a_share_a_gpu(machine, how, jobs, visible):
    machine(devices=GPUS, **how)
    made = slots(jobs)
    assert [one.environment for one in made] == [{"CUDA_VISIBLE_DEVICES": each} for each in visible]
    assert set.union(*(set(one.processors) for one in made)) == set(range(how.get("processors", 4)))


@pytest.mark.parametrize(
    ("how", "jobs", "processors"),
    [
        ({}, 0, [{0}, {1}, {2}, {3}]),
        ({}, 3, [{0, 3}, {1}, {2}]),
        ({"gibibytes": 5}, 0, [{0, 2}, {1, 3}]),
        ({"gibibytes": 1}, 0, [{0, 1, 2, 3}]),
        ({"gibibytes": 1}, 4, [{0}, {1}, {2}, {3}]),
        ({"devices": GPUS, "visible": ""}, 0, [{0}, {1}, {2}, {3}]),
    ],
)
def test_a_share_a_processor(machine, how, jobs, processors):
    machine(**how)
    made = slots(jobs)
    assert [set(one.processors) for one in made] == processors
    assert all(one.environment["MALLOC_ARENA_MAX"] == "2" for one in made)
    assert all(one.environment == runner._MALLOC for one in made)


def test_a_tpu_is_one_share(machine):
    machine(devices=["accel0", "accel1", "accel2", "accel3"])
    (one,) = slots(0)
    assert set(one.processors) == {0, 1, 2, 3}
    with pytest.raises(UserError, match="--jobs=2 is more than this machine has devices for"):
        slots(2)


@pytest.mark.parametrize("how", [{}, {"devices": GPUS}, {"devices": GPUS, "processors": 64}])
def test_more_jobs_than_devices_are_refused(machine, how):
    machine(**how)
    with pytest.raises(UserError, match="--jobs=5 is more than this machine has devices for; leave it out"):
        slots(5)
