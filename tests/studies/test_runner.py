"""The runner runs each cell once, in order, in slots of the machine, and stops its processes when it is stopped."""

import itertools
import os
import pathlib
import signal
import threading
import time

import make_study
import pytest

from stf_jax import ablate
from stf_jax.cli import run_command
from stf_jax.config import UserError
from stf_jax.studies import runner
from stf_jax.studies.runner import Slot, make_slots
from stf_jax.studies.study import Cell


@pytest.fixture
def study(tmp_path, monkeypatch):
    study = make_study.FakeStudy(tmp_path)
    monkeypatch.setattr(Cell, "command", property(study.command))
    return study


def test_cells_run_once_and_evaluations_come_last(study, capsys):
    study.plan = {"stf, seed 1": [[0, 0.3]]}
    assert study.run() == {}
    names = [start["name"] for start in study.starts()]
    assert sorted(names) == sorted(cell.name for cell in study.cells)
    evaluations = [start for start in study.starts() if start["name"].startswith("fastv")]
    assert names[-2:] != names[:2]
    assert min(start["time"] for start in evaluations) > study.ends()["stf, seed 1"]
    assert all(start["evaluates"] for start in evaluations)
    output = capsys.readouterr().out
    assert "6 runs, 0 already done" in output
    assert "stf, seed 1: scenes/accuracy" in output
    # The second time nothing runs; then only the cells without results.
    assert study.run() == {}
    assert len(study.starts()) == 6
    assert "6 runs, 6 already done" in capsys.readouterr().out
    (study.cells[4].folder / "results.json").unlink()
    (study.cells[5].folder / "results.json").unlink()
    assert study.run() == {}
    assert [start["name"] for start in study.starts()[6:]] == ["stf, seed 1", "fastv, seed 1"]


def test_nothing_runs_if_a_folder_contains_another_run(study):
    make_study.finish(study.cells[0])
    make_study.put(study.cells[0].folder / "pretrain" / "config.json", {"steps": 7})
    with pytest.raises(UserError, match="contains a run that differs"):
        study.run()
    assert not study.starts()


def test_a_cell_is_retried_after_a_transient_failure(study):
    study.plan = {"mlp, seed 0": [[75, 0], [75, 0], [0, 0]], "stf, seed 0": [[75, 0]]}
    failed = study.run()
    names = [start["name"] for start in study.starts()]
    assert names.count("mlp, seed 0") == names.count("stf, seed 0") == 3
    assert {cell.name: error.partition(" (")[0] for cell, error in failed.items()} == {
        "stf, seed 0": "ended with status 75"
    }


def test_a_failed_cell_is_reported_and_the_others_run(study, capsys):
    study.plan = {"mlp, seed 0": [[2, 0]]}
    failed = {cell.name: error for cell, error in study.run().items()}
    assert set(failed) == {"mlp, seed 0", "fastv, seed 0"}
    log = study.folder / "cells" / "mlp" / "seed_0" / "log.txt"
    assert failed["mlp, seed 0"] == f"ended with status 2 ({log}): error: a fake failure."
    assert failed["fastv, seed 0"] == f"{log.parent}, which it evaluates, has no results"
    assert f"mlp, seed 0: {failed['mlp, seed 0']}" in capsys.readouterr().out
    names = [start["name"] for start in study.starts()]
    assert sorted(names) == ["fastv, seed 1", "mlp, seed 0", "mlp, seed 1", "stf, seed 0", "stf, seed 1"]


def test_each_slot_runs_one_cell_at_a_time(study, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    before = os.sched_getaffinity(0)
    first, *_, last = sorted(before)
    study.plan = {cell.name: [[0, 0.1]] for cell in study.cells}
    study.run(
        Slot(frozenset([first]), {"MALLOC_ARENA_MAX": "2"}), Slot(frozenset([last]), {"CUDA_VISIBLE_DEVICES": "3"})
    )
    assert os.sched_getaffinity(0) == before
    ends = study.ends()
    times = {True: [], False: []}
    for start in study.starts():
        in_first = start["cpus"] == [first] and start["environment"].get("MALLOC_ARENA_MAX") == "2"
        in_second = start["cpus"] == [last] and start["environment"].get("CUDA_VISIBLE_DEVICES") == "3"
        assert in_first != in_second
        assert start["environment"]["JAX_COMPILATION_CACHE_DIR"] == str(study.folder / "programs")
        times[in_first].append((start["time"], ends[start["name"]]))
    for spans in times.values():
        assert len(spans) > 1
        spans.sort()
        assert all(end < start for (_, end), (start, _) in itertools.pairwise(spans))


def test_the_users_compilation_cache_is_kept(study, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    study.run()
    assert {start["environment"]["JAX_COMPILATION_CACHE_DIR"] for start in study.starts()} == {"elsewhere"}


@pytest.fixture
def unhandled():
    """Records SIGTERMs that the command does not handle, instead of dying from them."""
    signals = []
    previous_handler = signal.signal(signal.SIGTERM, lambda *_: signals.append(True))
    yield signals
    signal.signal(signal.SIGTERM, previous_handler)


def test_sigterm_stops_the_runs(study, unhandled, capsys, monkeypatch):
    monkeypatch.setattr(runner, "make_slots", lambda _: [Slot(frozenset(os.sched_getaffinity(0)), {})] * 2)
    study.plan = {cell.name: [[0, 60]] for cell in study.cells}
    previous_handler, ended = signal.getsignal(signal.SIGTERM), threading.Event()

    def send():
        while len(study.starts()) < 2 and not ended.wait(0.02):
            pass
        time.sleep(0.2)  # until they have installed their handlers
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    start = time.monotonic()
    status = run_command(ablate.main, [study.option, f"--out={study.folder}"])
    ended.set()
    sender.join()
    assert (status, unhandled) == (143, [])
    assert time.monotonic() - start < 50  # less than the minute that they would take
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "Stopped by SIGTERM; the same command continues where it stopped."
    assert signal.getsignal(signal.SIGTERM) is previous_handler
    stopped = pathlib.Path(f"{study.log}.stopped").read_text().splitlines()
    assert sorted(stopped) == sorted(start["name"] for start in study.starts())  # and none was retried
    assert len(stopped) == 2
    for start in study.starts():
        with pytest.raises(ProcessLookupError):
            os.kill(start["pid"], 0)
    # The same command continues.
    study.plan = {}
    assert run_command(ablate.main, [study.option, f"--out={study.folder}"]) == 0
    assert len(study.starts()) == 8


@pytest.fixture
def machine(monkeypatch):
    """Returns a function that makes this machine look like another one."""

    def imitate(cpus=4, devices=(), gibibytes=100, visible=None):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)))
        monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": gibibytes * 2**18}.__getitem__)
        paths = [pathlib.Path("/dev") / name for name in devices]
        monkeypatch.setattr(
            pathlib.Path, "glob", lambda self, pattern: [path for path in paths if path.match(f"{self}/{pattern}")]
        )
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return imitate


GPUS = ("nvidia1", "nvidia0", "nvidiactl", "nvidia-uvm", "nvidia2", "nvidia3")


@pytest.mark.parametrize(
    ("hardware", "jobs", "visible"),
    [
        ({}, 0, ["0", "1", "2", "3"]),
        ({}, 2, ["0,2", "1,3"]),
        ({}, 1, ["0,1,2,3"]),
        ({"visible": "2,3"}, 0, ["2", "3"]),
        ({"cpus": 2}, 0, ["0", "1", "2", "3"]),
    ],
)
def test_one_slot_per_gpu(machine, hardware, jobs, visible):
    machine(devices=GPUS, **hardware)
    slots = make_slots(jobs)
    assert [slot.environment for slot in slots] == [{"CUDA_VISIBLE_DEVICES": gpus} for gpus in visible]
    assert set.union(*(set(slot.cpus) for slot in slots)) == set(range(hardware.get("cpus", 4)))


@pytest.mark.parametrize(
    ("hardware", "jobs", "cpus"),
    [
        ({}, 0, [{0}, {1}, {2}, {3}]),
        ({}, 3, [{0, 3}, {1}, {2}]),
        ({"gibibytes": 5}, 0, [{0, 2}, {1, 3}]),
        ({"gibibytes": 1}, 0, [{0, 1, 2, 3}]),
        ({"gibibytes": 1}, 4, [{0}, {1}, {2}, {3}]),
        ({"devices": GPUS, "visible": ""}, 0, [{0}, {1}, {2}, {3}]),
    ],
)
def test_one_slot_per_cpu(machine, hardware, jobs, cpus):
    machine(**hardware)
    slots = make_slots(jobs)
    assert [set(slot.cpus) for slot in slots] == cpus
    assert all(slot.environment["MALLOC_ARENA_MAX"] == "2" for slot in slots)
    assert all(slot.environment == runner._MALLOC for slot in slots)


def test_one_slot_for_all_tpu_chips(machine):
    machine(devices=["accel0", "accel1", "accel2", "accel3"])
    (slot,) = make_slots(0)
    assert set(slot.cpus) == {0, 1, 2, 3}
    with pytest.raises(UserError, match="--jobs=2 exceeds the number of devices of this machine"):
        make_slots(2)


@pytest.mark.parametrize("hardware", [{}, {"devices": GPUS}, {"devices": GPUS, "cpus": 64}])
def test_more_jobs_than_devices_are_refused(machine, hardware):
    machine(**hardware)
    with pytest.raises(UserError, match="--jobs=5 exceeds the number of devices of this machine; omit it"):
        make_slots(5)
