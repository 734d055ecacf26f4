"""What a run tells of itself: figures by a clock that the test turns, lines, events, writers, and a profile."""

import contextlib
import io
import json
import logging
import math
import pathlib
import re
import sys
import threading
import time
import types

import jax
import numpy as np
import pytest
import tiny
from etils import epath
from full_disk import limit_file_size
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from stf_jax.config import Stopped, UserError
from stf_jax.main import main
from stf_jax.runtime import telemetry
from stf_jax.runtime.chips import CHIPS
from stf_jax.runtime.cli import run_command
from stf_jax.runtime.events import Events, read_lines
from stf_jax.runtime.profile import Profile
from stf_jax.runtime.table import format_duration
from stf_jax.runtime.telemetry import INITIAL_CLOCK, Telemetry

TINY = f"--config={pathlib.Path(__file__).parents[1]}/tiny.py"


class Clock:
    """Seconds that pass when the test says so, and steps that devices end when it says so."""

    def __init__(self, folder, monkeypatch, kind="cpu", memory=None, config=None, **options):
        self.seconds, self.folder, self._undo = 100.0, folder, monkeypatch.undo
        monkeypatch.setattr(telemetry.time, "monotonic", lambda: self.seconds)
        monkeypatch.setattr(telemetry, "get_row_share", lambda mesh, process: (0, 1))
        device = types.SimpleNamespace(device_kind=kind, memory_stats=lambda: memory)
        mesh = types.SimpleNamespace(size=4, devices=np.array([device] * 4), local_devices=[device] * 2)
        folder.mkdir(exist_ok=True)
        self.events = Events(epath.Path(folder), active=True)
        options = {"steps": 9, "first": 0, "clock": INITIAL_CLOCK, "active": True, "events": self.events} | options
        self.log = Telemetry(epath.Path(folder), config or tiny.tiny(), mesh=mesh, began=90.0, **options)

    def wait(self, what, seconds):
        with self.log.waiting(what):
            self.seconds += seconds

    def give(self, flops=0, step=1):
        """A step of 50 tokens is given; returns what ends it."""
        begun, event = threading.Event(), threading.Event()
        done = types.SimpleNamespace(block_until_ready=lambda: begun.set() or event.wait(10))
        self.log.advance(step, 50, 0, flops, done)
        begun.wait(10)

        def end():
            event.set()
            self.log._ended.result()

        return end

    def end(self, error=None):
        self._undo()
        with contextlib.suppress(*([type(error)] if error else [])), self.events, self.log:
            if error:
                raise error

    def lines(self):
        self.end()
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


# ---- The line --------------------------------------------------------------------------------------------------------


def logged(clock, step, seconds=30.0, **scalars):
    clock.seconds += seconds
    clock.give(step=step)()
    clock.log.log(step, {"loss": 1.25, "learning_rate": 2e-5, **scalars})


def test_a_line_a_logged_step_is_read_by_people(tmp_path, monkeypatch, capsys):
    clock = Clock(tmp_path, monkeypatch, steps=12_000)
    clock.wait("compile", 50.0)
    logged(clock, 2, gradient_norm=0.8125)
    clock.log.skipped()
    logged(clock, 4, loss=math.nan, gradient_norm=math.inf)
    clock.log.skipped()
    clock.log.skipped()
    logged(clock, 6, **{"scenes/accuracy": 0.25, "scenes/by_kind/count/accuracy": 0.5, "mme/perception": 1510.5})
    logged(clock, 12_000)
    clock.end()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "step      2/12,000  loss  1.250  lr 2.0e-05  |g|  0.81        2 tok/s  data wait  0%  goodput 33%"
        "  2 d 2 h left",
        "step      4/12,000  loss    nan  lr 2.0e-05  |g|   inf        2 tok/s  data wait  0%  goodput 50%"
        "  1 update skipped  2 d 1 h left",
        "step      6/12,000  loss  1.250  lr 2.0e-05        2 tok/s  data wait  0%  goodput 60%"
        "  2 updates skipped  scenes/accuracy 0.25  mme/perception 1510  2 d 1 h left",
        "step 12,000/12,000  loss  1.250  lr 2.0e-05        2 tok/s  data wait  0%  goodput 67%",
    ]


def test_what_is_left_is_told_by_the_steps_of_this_process_alone(tmp_path, monkeypatch, capsys):
    clock = Clock(tmp_path, monkeypatch, steps=130, first=100)
    logged(clock, 100)  # a measurement that was owed
    logged(clock, 110)
    clock.end()
    first, second = capsys.readouterr().err.splitlines()
    assert not first.endswith("left")
    assert second.endswith("  2 min left")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.4, "59 s"), (60, "1 min"), (3599, "1 h 0 min"), (11_520, "3 h 12 min"), (86_400 * 2, "2 d 0 h")],
)
def test_times_are_for_people(seconds, text):
    assert format_duration(seconds) == text


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_is_for_terminals_alone(tmp_path, monkeypatch, capsys):
    logged(clock := Clock(tmp_path / "file", monkeypatch), 1)
    clock.end()
    assert "\r" not in capsys.readouterr().err
    monkeypatch.setattr(sys, "stderr", Terminal())
    clock = Clock(tmp_path / "terminal", monkeypatch)
    screen = sys.stderr
    logged(clock, 1)
    clock.log._bar.refresh()
    clock.end()
    assert "\r" in screen.getvalue()
    assert re.search(r"\rstep 1/9  loss  1.250 [^\r]*left\n", screen.getvalue())
    assert "1/9 [" in screen.getvalue()


# ---- What befell -----------------------------------------------------------------------------------------------------


def events(folder):
    return [event for _, event in read_lines(epath.Path(folder) / "events.jsonl")]


def test_events_are_kept_over_restarts(tmp_path):
    workdir = epath.Path(tmp_path)
    with Events(workdir, active=True) as first:
        first.add("begin", 0, resumed=False, host="a")
        first.add("spike", 3, loss=math.inf, usual=1.5, records=["a", "ä"])
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"event": "end", "st')  # killed there
    with Events(workdir, active=True) as second:
        assert second.restarts == 0
        second.add("begin", 2, resumed=True, changed={"steps": [6, 8]})
        assert second.restarts == 1
    with Events(workdir, active=True) as third, Events(workdir, active=False) as other:
        other.add("begin", 2, resumed=True)
        assert (third.restarts, other.restarts) == (1, 0)
    found = events(tmp_path)
    assert all(re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", event.pop("time")) for event in found)
    assert found == [
        {"event": "begin", "step": 0, "resumed": False, "host": "a"},
        {"event": "spike", "step": 3, "loss": None, "usual": 1.5, "records": ["a", "ä"]},  # JSON has no infinity
        {"event": "begin", "step": 2, "resumed": True, "changed": {"steps": [6, 8]}},
    ]


def test_events_are_there_at_once(tmp_path):
    with Events(epath.Path(tmp_path), active=True) as log:
        log.add("begin", 0)
        assert [event["event"] for event in events(tmp_path)] == ["begin"]


def test_metrics_are_json_to_the_letter(tmp_path, monkeypatch):
    clock = Clock(tmp_path, monkeypatch)
    logged(clock, 1, loss=math.nan)
    assert [line["loss"] for line in clock.lines()] == [None]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_updates_that_were_skipped_are_counted_over_restarts(tmp_path, monkeypatch):
    clock = Clock(tmp_path, monkeypatch, clock={"seconds": 7.0, "tokens": 10, "rows_replaced": 2})  # of an old run
    clock.log.skipped()
    logged(clock, 1)
    (line,) = clock.lines()
    assert (line["rows_replaced"], line["updates_skipped"], line["tokens"]) == (2, 1, 60)
    again = Clock(tmp_path / "again", monkeypatch, clock=INITIAL_CLOCK | {"updates_skipped": 4})
    again.log.skipped()
    assert again.log.clock()["updates_skipped"] == 5
    again.end()


# ---- The end ---------------------------------------------------------------------------------------------------------


def test_a_summary_ends_the_run(tmp_path, monkeypatch, capsys):
    clock = Clock(tmp_path, monkeypatch, clock=INITIAL_CLOCK | {"seconds": 3600.0, "tokens": 1000, "rows_replaced": 3})
    clock.events.add("begin", 0, resumed=True)
    for step in range(1, 10):
        logged(clock, step)
    clock.log.skipped()
    clock.seconds += 30.0
    monkeypatch.setattr(clock, "_undo", lambda: None)
    clock.end()
    monkeypatch.undo()
    assert capsys.readouterr().out.splitlines() == [
        "train: done",
        "  steps        9",
        "  tokens       1,450",
        "  time         1 h 5 min",
        "  last loss    1.250",
        "  skipped      3 unusable rows, 1 updates",
        "  restarts     1",
        "  goodput      97%",
        f"  checkpoints  {tmp_path}/checkpoints",
        f"  metrics      {tmp_path}/metrics.jsonl",
        f"  events       {tmp_path}/events.jsonl",
        f"  TensorBoard  {tmp_path}/tensorboard",
    ]
    assert [event["event"] for event in events(tmp_path)] == ["begin", "end"]


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (Stopped("Stopped by SIGTERM after step 2."), 143, "Stopped by SIGTERM after step 2"),
        (KeyboardInterrupt(), 130, "KeyboardInterrupt"),
        (ValueError("A bug\n of two lines."), 1, "A bug of two lines"),
    ],
)
def test_a_run_that_stops_says_so_and_asks_no_other_host(error, status, reason, tmp_path, monkeypatch, capsys):
    clock = Clock(tmp_path, monkeypatch)
    clock.events.add("begin", 0, resumed=False)
    logged(clock, 2)

    def asked(*_):
        raise AssertionError("The other hosts may not be there.")

    finish, begin = clock.give(step=3), time.perf_counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(telemetry.multihost_utils, "process_allgather", asked)
        clock.end(error)
    assert time.perf_counter() - begin < 5  # the step has not ended: nobody waits for it
    finish()
    out = capsys.readouterr().out
    assert out.startswith("train: ended early\n  steps        3 of 9\n")
    last = events(tmp_path)[-1]
    assert {key: last[key] for key in ("event", "step", "status", "reason")} == {
        "event": "stopped",
        "step": 3,
        "status": status,
        "reason": reason,
    }


def test_a_run_that_had_ended_before_is_not_said_to_end_again(tmp_path, monkeypatch, capsys):
    Clock(tmp_path, monkeypatch, first=9).end()
    assert events(tmp_path) == []
    out = capsys.readouterr().out
    assert "last loss" not in out
    assert "goodput" not in out


# ---- Writers ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's
def test_a_full_disk_neither_ends_a_run_nor_leaves_gaps(tmp_path, monkeypatch, caplog):
    # Event files are numbered by process and read in order of their names, in which 10 comes before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    clock = Clock(tmp_path, monkeypatch)
    logged(clock, 1)
    full = (tmp_path / "metrics.jsonl").stat().st_size + 10  # so that the next line is cut
    with caplog.at_level(logging.WARNING), limit_file_size(full):
        for step in (2, 3):
            logged(clock, step)
            clock.events.add("save_failed", step, reason="?" * 2000)
    assert (tmp_path / "metrics.jsonl").stat().st_size == full
    for step in (4, 5):
        logged(clock, step)
    assert [line["step"] for line in clock.lines()] == [1, 2, 3, 4, 5]
    assert [event["step"] for event in events(tmp_path)] == [2, 3]
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    assert board.Tensors("loss")[-1].step == 5
    told = [record.getMessage() for record in caplog.records if record.name.startswith("stf_jax")]
    told = [message.split(" cannot be written (")[0] for message in told]
    assert (told.count("metrics.jsonl"), told.count("events.jsonl")) == (1, 1)


def test_a_log_on_a_full_disk_does_not_end_the_run_either(tmp_path, monkeypatch, caplog):
    clock = Clock(tmp_path, monkeypatch)
    with pathlib.Path("/dev/full").open("w", buffering=1) as full, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", full)
        patch.setattr(sys, "stdout", full)
        logged(clock, 1)
        assert [line["step"] for line in clock.lines()] == [1]
        with contextlib.suppress(OSError):
            full.close()
    told = [record.getMessage() for record in caplog.records if record.name.startswith("stf_jax")]
    assert told == ["The log cannot be written ([Errno 28] No space left on device); the run continues."]


def test_a_workdir_that_cannot_be_written_to_is_said_in_a_sentence(tmp_path):
    (tmp_path / "events.jsonl").mkdir()
    with pytest.raises(UserError, match=rf"{tmp_path}/events.jsonl cannot be written: Is a directory"):
        Events(epath.Path(tmp_path), active=True)


class StandIn(types.ModuleType):
    """What of Weights & Biases' package is called."""

    class Error(Exception):
        pass

    def __init__(self, refuses=""):
        super().__init__("wandb")
        self.begun, self.logged, self.finished, self._refuses = [], [], [], refuses

    def init(self, **how):
        if self._refuses:
            raise self.Error(self._refuses)
        self.begun.append(how)
        return types.SimpleNamespace(id=how["id"] or f"new{len(self.begun)}", log=self.log, finish=self.finished.append)

    def log(self, values, step):
        if values["loss"] < 0:
            raise BrokenPipeError("Its service has gone.")
        self.logged.append((step, values))


WANDB = {"wandb.project": "stf", "wandb.entity": "team"}


def test_weights_and_biases_goes_on_with_the_same_run(tmp_path, monkeypatch, caplog):
    stand_in, config = StandIn(), tiny.tiny(**WANDB)
    for first in (0, 2):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "wandb", stand_in)
            clock = Clock(tmp_path, patch, config=config, first=first)
        logged(clock, first + 1)
        logged(clock, first + 2, loss=-1.0)
        logged(clock, first + 3)
        clock.end(Stopped("") if first == 0 else None)
    for begun, kept in zip(stand_in.begun, (None, "new1"), strict=True):
        assert begun.pop("config")["global_batch_size"] == 8
        assert begun == {
            "project": "stf",
            "entity": "team",
            "name": str(tmp_path),
            "id": kept,
            "resume": "allow",
            "dir": str(tmp_path),
        }
    assert [step for step, _ in stand_in.logged] == [1, 3, 3, 5]
    assert stand_in.logged[0][1].keys() == json.loads(
        (tmp_path / "metrics.jsonl").read_text().split("\n")[0]
    ).keys() - {"step"}
    assert stand_in.finished == [143, 0]
    assert [record.getMessage() for record in caplog.records if record.name.startswith("stf_jax")] == [
        "Weights & Biases cannot be written (Its service has gone); the run continues."
    ] * 2


def test_weights_and_biases_may_refuse_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", StandIn(refuses="no API key\nconfigured"))
    with pytest.raises(UserError, match=r"rejected the run \(no API key configured\); .* WANDB_MODE=offline"):
        Clock(tmp_path, monkeypatch, config=tiny.tiny(**WANDB))


@pytest.mark.parametrize("module", [None, types.ModuleType("wandb")], ids=["nothing", "a folder of that name"])
def test_weights_and_biases_that_is_not_installed_is_said_before_anything_is_made(
    module, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "wandb", module)
    assert run_command(main, [TINY, f"--workdir={tmp_path / 'run'}", "--config.wandb.project=stf"]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: wandb.project='stf' needs a package that is not installed: pip install wandb.*\n", error)
    assert not (tmp_path / "run").exists()


# ---- Profiles --------------------------------------------------------------------------------------------------------


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
