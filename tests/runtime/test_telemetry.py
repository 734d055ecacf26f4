"""What a run tells of itself: figures by a clock that the test turns, a profile, and the keys of a real run."""

import json
import threading
import types

import jax
import numpy as np
import pytest
import tiny
from etils import epath

from stf_jax.runtime import telemetry
from stf_jax.runtime.cost import CHIPS
from stf_jax.runtime.telemetry import START, Profile, Telemetry


class Clock:
    """Seconds that pass when the test says so, and steps that devices end when it says so."""

    def __init__(self, folder, monkeypatch, kind="cpu", memory=None):
        self.seconds, self.folder, self._undo = 100.0, folder, monkeypatch.undo
        monkeypatch.setattr(telemetry.time, "monotonic", lambda: self.seconds)
        monkeypatch.setattr(telemetry, "share_of_rows", lambda mesh, process: (0, 1))
        device = types.SimpleNamespace(device_kind=kind, memory_stats=lambda: memory)
        mesh = types.SimpleNamespace(size=4, devices=np.array([device] * 4), local_devices=[device] * 2)
        self.log = Telemetry(epath.Path(folder), tiny.tiny(), 9, 0, START, mesh=mesh, began=90.0, active=True)

    def wait(self, what, seconds):
        with self.log.waiting(what):
            self.seconds += seconds

    def give(self, flops=0):
        """A step of 50 tokens is given; returns what ends it."""
        event = threading.Event()
        self.log.advance(1, 50, 0, flops, types.SimpleNamespace(block_until_ready=lambda: event.wait(10)))

        def end():
            event.set()
            self.log._ended.result()

        return end

    def lines(self):
        self._undo()
        self.log.close()
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


SCALARS = {"loss": 1.0, "learning_rate": 0.1}


def test_measuring_and_compiling_are_left_out_of_the_speed(tmp_path, monkeypatch):
    clock = Clock(tmp_path, monkeypatch)
    for step, training, measuring, compiling in ((2, 2.0, 100.0, 3.0), (4, 4.0, 0.0, 0.0), (6, 1.0, 7.0, 2.0)):
        if compiling:
            clock.wait("compile", compiling)
        clock.seconds += training
        clock.give()()
        clock.give(8000)()
        clock.wait("measure", measuring)
        clock.log.log(step, SCALARS)
    lines = clock.lines()
    assert [line["tokens_per_second"] for line in lines] == [50.0, 25.0, 100.0]
    assert [line["tokens_per_second_per_device"] for line in lines] == [12.5, 6.25, 25.0]
    assert [line["seconds_per_step"] for line in lines] == [1.0, 2.0, 0.5]
    assert [line["model_flops_per_second"] for line in lines] == [1000.0, 500.0, 2000.0]
    # Where something was compiled since the line before; all of it so far.
    assert [line.get("compile_seconds") for line in lines] == [3.0, None, 5.0]
    assert [line.keys() & {"mfu", "device_memory_bytes"} for line in lines] == [set()] * 3


def test_waiting_costs_what_the_devices_stood_idle(tmp_path, monkeypatch):
    clock = Clock(tmp_path, monkeypatch)  # after 10 seconds of getting ready
    clock.wait("data", 1.0)  # nothing runs yet: idle
    end = clock.give()
    clock.wait("data", 2.0)  # the step goes on throughout: not idle
    with clock.log.waiting("data"):
        clock.seconds += 3.0
        end()
        clock.seconds += 4.0  # idle
    end = clock.give()
    clock.seconds += 6.0
    end()
    clock.log.log(2, SCALARS)
    clock.wait("save", 4.0)
    clock.give()()
    clock.log.log(3, SCALARS)
    first, second = clock.lines()
    assert first["seconds_per_step"] == 8.0
    assert first["data_wait"] == (1 + 4) / 16
    assert first["goodput"] == pytest.approx((16 - 5) / (10 + 16))
    assert second["data_wait"] == 0
    assert second["goodput"] == pytest.approx((16 - 5) / (10 + 16 + 4))


def test_mfu_and_memory_where_the_chip_is_known(tmp_path, monkeypatch, capsys):
    peak = int(CHIPS["v5e"].flops)
    clock = Clock(tmp_path, monkeypatch, "TPU v5 lite", {"peak_bytes_in_use": 7, "bytes_in_use": 5})
    clock.seconds += 2.0
    clock.give(4 * peak)()
    clock.log.log(1, SCALARS)
    (line,) = clock.lines()
    assert line["mfu"] == 0.5
    assert line["device_memory_bytes"] == 7
    assert "MFU 50%" in capsys.readouterr().err


def test_a_profile_holds_the_steps_that_were_asked_for(tmp_path):
    double = jax.jit(lambda x: x * 2)
    double(1.0)
    profile = Profile(epath.Path(tmp_path / "profile"), 3, 2)
    for step in range(1, 7):
        profile.before(step)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            done = double(float(step))
        profile.after(step, done)
    profile.end()
    assert traced_steps(tmp_path) == {3, 4}


def test_a_profile_ends_with_the_run(tmp_path):
    profile = Profile(epath.Path(tmp_path / "profile"), 3, 9)
    for step in (4, 5):  # of a run that goes on after the third
        profile.before(step)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            pass
        profile.after(step, jax.numpy.zeros(()))
    profile.end()
    assert traced_steps(tmp_path) == {4, 5}


def traced_steps(workdir):
    (file,) = (workdir / "profile").rglob("*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(file))
    events = [event for plane in data.planes for line in plane.lines for event in line.events]
    return {dict(event.stats)["step_num"] for event in events if event.name == "train"}
