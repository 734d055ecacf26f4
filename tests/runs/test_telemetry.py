"""Telemetry: figures with a simulated clock, log lines, events, writers, and profiles."""

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

from stf_jax.accounting.chips import CHIPS
from stf_jax.cli import run_command
from stf_jax.config import Stopped, UserError
from stf_jax.main import main
from stf_jax.runs import telemetry
from stf_jax.runs.events import Events, read_lines
from stf_jax.runs.profiler import Profile
from stf_jax.runs.telemetry import INITIAL_CLOCK, Telemetry
from stf_jax.table import format_duration

TINY = f"--config={pathlib.Path(__file__).parents[1]}/tiny.py"


class Simulation:
    """A telemetry object whose time and devices are controlled by the test."""

    def __init__(self, folder, monkeypatch, kind="cpu", memory=None, config=None, **options):
        self.seconds, self.folder, self._undo = 100.0, folder, monkeypatch.undo
        monkeypatch.setattr(telemetry.time, "monotonic", lambda: self.seconds)
        monkeypatch.setattr(telemetry, "get_row_share", lambda mesh, process: (0, 1))
        device = types.SimpleNamespace(device_kind=kind, memory_stats=lambda: memory)
        mesh = types.SimpleNamespace(size=4, devices=np.array([device] * 4), local_devices=[device] * 2)
        folder.mkdir(exist_ok=True)
        self.events = Events(epath.Path(folder), active=True)
        options = {"steps": 9, "first": 0, "clock": INITIAL_CLOCK, "active": True, "events": self.events} | options
        self.telemetry = Telemetry(epath.Path(folder), config or tiny.tiny(), mesh=mesh, start_time=90.0, **options)

    def wait(self, kind, seconds):
        with self.telemetry.time_waiting(kind):
            self.seconds += seconds

    def dispatch(self, flops=0, step=1):
        """Dispatches a step of 50 tokens; returns a function that completes it."""
        started, completed = threading.Event(), threading.Event()
        output = types.SimpleNamespace(block_until_ready=lambda: started.set() or completed.wait(10))
        self.telemetry.advance(step, 50, 0, flops, output, log_due=True)
        started.wait(10)

        def complete():
            completed.set()
            self.telemetry._done_time.result()

        return complete

    def end(self, error=None):
        self._undo()
        with contextlib.suppress(*([type(error)] if error else [])), self.events, self.telemetry:
            if error:
                raise error

    def lines(self):
        self.end()
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


SCALARS = {"loss": 1.0, "learning_rate": 0.1}


def test_speed_excludes_measuring_and_compiling(tmp_path, monkeypatch):
    simulation = Simulation(tmp_path, monkeypatch)
    for step, training, measuring, compiling in ((2, 2.0, 100.0, 3.0), (4, 4.0, 0.0, 0.0), (6, 1.0, 7.0, 2.0)):
        if compiling:
            simulation.wait("compile", compiling)
        simulation.seconds += training
        simulation.dispatch(step=step - 1)()
        simulation.dispatch(8000, step)()
        simulation.wait("measure", measuring)
        simulation.telemetry.log(step, SCALARS)
    lines = simulation.lines()
    assert [line["tokens_per_second"] for line in lines] == [50.0, 25.0, 100.0]
    assert [line["tokens_per_second_per_device"] for line in lines] == [12.5, 6.25, 25.0]
    assert [line["seconds_per_step"] for line in lines] == [1.0, 2.0, 0.5]
    assert [line["model_flops_per_second"] for line in lines] == [1000.0, 500.0, 2000.0]
    # Logged if something was compiled since the last line; the total so far.
    assert [line.get("compile_seconds") for line in lines] == [3.0, None, 5.0]
    assert [line.keys() & {"mfu", "device_memory_bytes"} for line in lines] == [set()] * 3


def test_waiting_counts_only_while_the_devices_are_idle(tmp_path, monkeypatch):
    simulation = Simulation(tmp_path, monkeypatch)  # after 10 seconds of preparation
    simulation.wait("data", 1.0)  # nothing runs yet: idle
    end = simulation.dispatch()
    simulation.wait("data", 2.0)  # the step runs throughout: not idle
    with simulation.telemetry.time_waiting("data"):
        simulation.seconds += 3.0
        end()
        simulation.seconds += 4.0  # idle
    end = simulation.dispatch(step=2)
    simulation.seconds += 6.0
    end()
    simulation.telemetry.log(2, SCALARS)
    simulation.wait("save", 4.0)
    simulation.dispatch(step=3)()
    simulation.telemetry.log(3, SCALARS)
    first, second = simulation.lines()
    assert first["seconds_per_step"] == 8.0
    assert first["data_wait"] == (1 + 4) / 16
    assert first["goodput"] == pytest.approx((16 - 5) / (10 + 16))
    assert second["data_wait"] == 0
    assert second["goodput"] == pytest.approx((16 - 5) / (10 + 16 + 4))


def test_step_is_logged_while_later_ones_run(tmp_path, monkeypatch):
    """Its figures are those of when it ended, not of when it is logged."""
    simulation = Simulation(tmp_path, monkeypatch)
    ends = [simulation.dispatch(1000, 1)]
    simulation.seconds += 2.0
    ends.pop()()
    ends = [simulation.dispatch(3000, 2)]
    simulation.wait("data", 7.0)  # the second step runs
    simulation.telemetry.log(1, SCALARS)
    simulation.seconds += 1.0
    ends.pop()()
    simulation.seconds += 5.0
    simulation.telemetry.log(2, SCALARS)
    first, second = simulation.lines()
    assert (first["seconds_per_step"], second["seconds_per_step"]) == (2.0, 8.0)
    assert (first["tokens"], second["tokens"]) == (50, 100)
    assert (first["seconds"], second["seconds"]) == (2.0, 10.0)
    assert (first["model_flops_per_second"], second["model_flops_per_second"]) == (125.0, 93.75)
    assert (first["goodput"], second["goodput"]) == pytest.approx((2 / 12, 10 / 20))


def test_mfu_and_memory_where_the_chip_is_known(tmp_path, monkeypatch, capsys):
    peak = int(CHIPS["v5e"].flops)
    simulation = Simulation(tmp_path, monkeypatch, "TPU v5 lite", {"peak_bytes_in_use": 7, "bytes_in_use": 5})
    simulation.seconds += 2.0
    simulation.dispatch(4 * peak)()
    simulation.telemetry.log(1, SCALARS)
    (line,) = simulation.lines()
    assert line["mfu"] == 0.5
    assert line["device_memory_bytes"] == 7
    assert "MFU 50%" in capsys.readouterr().err


# ---- The line --------------------------------------------------------------------------------------------------------


def logged(simulation, step, seconds=30.0, **scalars):
    simulation.seconds += seconds
    simulation.dispatch(step=step)()
    simulation.telemetry.log(step, {"loss": 1.25, "learning_rate": 2e-5, **scalars})


def test_log_lines(tmp_path, monkeypatch, capsys):
    simulation = Simulation(tmp_path, monkeypatch, steps=12_000)
    simulation.wait("compile", 50.0)
    logged(simulation, 2, gradient_norm=0.8125)
    simulation.telemetry.count_skipped_update()
    logged(simulation, 4, loss=math.nan, gradient_norm=math.inf)
    simulation.telemetry.count_skipped_update()
    simulation.telemetry.count_skipped_update()
    logged(simulation, 6, **{"scenes/accuracy": 0.25, "scenes/by_kind/count/accuracy": 0.5, "mme/perception": 1510.5})
    logged(simulation, 12_000)
    simulation.end()
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


def test_time_left_is_estimated_from_steps_of_this_process(tmp_path, monkeypatch, capsys):
    simulation = Simulation(tmp_path, monkeypatch, steps=130, first=100)
    logged(simulation, 100)  # a pending measurement
    logged(simulation, 110)
    simulation.end()
    first, second = capsys.readouterr().err.splitlines()
    assert not first.endswith("left")
    assert second.endswith("  2 min left")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.4, "59 s"), (60, "1 min"), (3599, "1 h 0 min"), (11_520, "3 h 12 min"), (86_400 * 2, "2 d 0 h")],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_bar_is_shown_only_on_terminals(tmp_path, monkeypatch, capsys):
    logged(simulation := Simulation(tmp_path / "file", monkeypatch), 1)
    simulation.end()
    assert "\r" not in capsys.readouterr().err
    monkeypatch.setattr(sys, "stderr", Terminal())
    simulation = Simulation(tmp_path / "terminal", monkeypatch)
    screen = sys.stderr
    logged(simulation, 1)
    simulation.telemetry._bar.refresh()
    simulation.end()
    assert "\r" in screen.getvalue()
    assert re.search(r"\rstep 1/9  loss  1.250 [^\r]*left\n", screen.getvalue())
    assert "1/9 [" in screen.getvalue()


# ---- Events ----------------------------------------------------------------------------------------------------------


def events(folder):
    return [event for _, event in read_lines(epath.Path(folder) / "events.jsonl")]


def test_events_are_kept_over_restarts(tmp_path):
    workdir = epath.Path(tmp_path)
    with Events(workdir, active=True) as first:
        first.add("begin", 0, resumed=False, host="a")
        first.add("spike", 3, loss=math.inf, usual=1.5, records=["a", "ä"])
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"event": "end", "st')  # killed while writing
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


def test_events_are_written_at_once(tmp_path):
    with Events(epath.Path(tmp_path), active=True) as log:
        log.add("begin", 0)
        assert [event["event"] for event in events(tmp_path)] == ["begin"]


def test_metrics_are_standard_json(tmp_path, monkeypatch):
    simulation = Simulation(tmp_path, monkeypatch)
    logged(simulation, 1, loss=math.nan)
    assert [line["loss"] for line in simulation.lines()] == [None]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_skipped_updates_are_counted_over_restarts(tmp_path, monkeypatch):
    simulation = Simulation(
        tmp_path, monkeypatch, clock={"seconds": 7.0, "tokens": 10, "rows_replaced": 2}
    )  # as old runs saved it
    simulation.telemetry.count_skipped_update()
    logged(simulation, 1)
    (line,) = simulation.lines()
    assert (line["rows_replaced"], line["updates_skipped"], line["tokens"]) == (2, 1, 60)
    again = Simulation(tmp_path / "again", monkeypatch, clock=INITIAL_CLOCK | {"updates_skipped": 4})
    again.telemetry.count_skipped_update()
    assert again.telemetry.clock()["updates_skipped"] == 5
    again.end()


# ---- The end ---------------------------------------------------------------------------------------------------------


def test_summary(tmp_path, monkeypatch, capsys):
    simulation = Simulation(
        tmp_path, monkeypatch, clock=INITIAL_CLOCK | {"seconds": 3600.0, "tokens": 1000, "rows_replaced": 3}
    )
    simulation.events.add("begin", 0, resumed=True)
    for step in range(1, 10):
        logged(simulation, step)
    simulation.telemetry.count_skipped_update()
    simulation.seconds += 30.0
    monkeypatch.setattr(simulation, "_undo", lambda: None)
    simulation.end()
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
def test_stopped_run_reports_it_without_contacting_other_hosts(error, status, reason, tmp_path, monkeypatch, capsys):
    simulation = Simulation(tmp_path, monkeypatch)
    simulation.events.add("begin", 0, resumed=False)
    logged(simulation, 2)

    def fail(*_):
        raise AssertionError("The other hosts may be gone.")

    finish, begin = simulation.dispatch(step=3), time.perf_counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(telemetry.multihost_utils, "process_allgather", fail)
        simulation.end(error)
    assert time.perf_counter() - begin < 5  # the pending step is not waited for
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


def test_run_that_has_ended_before_reports_no_second_end(tmp_path, monkeypatch, capsys):
    Simulation(tmp_path, monkeypatch, first=9).end()
    assert events(tmp_path) == []
    out = capsys.readouterr().out
    assert "last loss" not in out
    assert "goodput" not in out


# ---- Writers ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's
def test_full_disk_neither_ends_a_run_nor_leaves_gaps(tmp_path, monkeypatch, caplog):
    # Event files are read in the order of their names, in which number 10 sorts before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    simulation = Simulation(tmp_path, monkeypatch)
    logged(simulation, 1)
    full = (tmp_path / "metrics.jsonl").stat().st_size + 10  # so that the next line is cut
    with caplog.at_level(logging.WARNING), limit_file_size(full):
        for step in (2, 3):
            logged(simulation, step)
            simulation.events.add("save_failed", step, reason="?" * 2000)
    assert (tmp_path / "metrics.jsonl").stat().st_size == full
    for step in (4, 5):
        logged(simulation, step)
    assert [line["step"] for line in simulation.lines()] == [1, 2, 3, 4, 5]
    assert [event["step"] for event in events(tmp_path)] == [2, 3]
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    assert board.Tensors("loss")[-1].step == 5
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("stf_jax")]
    messages = [message.split(" cannot be written (")[0] for message in messages]
    assert (messages.count("metrics.jsonl"), messages.count("events.jsonl")) == (1, 1)


def test_log_on_a_full_disk_does_not_end_a_run(tmp_path, monkeypatch, caplog):
    simulation = Simulation(tmp_path, monkeypatch)
    with pathlib.Path("/dev/full").open("w", buffering=1) as full, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", full)
        patch.setattr(sys, "stdout", full)
        logged(simulation, 1)
        assert [line["step"] for line in simulation.lines()] == [1]
        with contextlib.suppress(OSError):
            full.close()
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("stf_jax")]
    assert messages == ["The log cannot be written ([Errno 28] No space left on device); the run continues."]


def test_workdir_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "events.jsonl").mkdir()
    with pytest.raises(UserError, match=rf"{tmp_path}/events.jsonl cannot be written: Is a directory"):
        Events(epath.Path(tmp_path), active=True)


class FakeWandb(types.ModuleType):
    """The functions of the package wandb that are used."""

    class Error(Exception):
        pass

    def __init__(self, rejection=""):
        super().__init__("wandb")
        self.inits, self.logged, self.finished, self._rejection = [], [], [], rejection

    def init(self, **options):
        if self._rejection:
            raise self.Error(self._rejection)
        self.inits.append(options)
        return types.SimpleNamespace(
            id=options["id"] or f"new{len(self.inits)}", log=self.log, finish=self.finished.append
        )

    def log(self, values, step):
        if values["loss"] < 0:
            raise BrokenPipeError("Its service has gone.")
        self.logged.append((step, values))


WANDB = {"wandb.project": "stf", "wandb.entity": "team"}


def test_wandb_run_is_resumed(tmp_path, monkeypatch, caplog):
    wandb, config = FakeWandb(), tiny.tiny(**WANDB)
    for first in (0, 2):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "wandb", wandb)
            simulation = Simulation(tmp_path, patch, config=config, first=first)
        logged(simulation, first + 1)
        logged(simulation, first + 2, loss=-1.0)
        logged(simulation, first + 3)
        simulation.end(Stopped("") if first == 0 else None)
    for init, previous_id in zip(wandb.inits, (None, "new1"), strict=True):
        assert init.pop("config")["global_batch_size"] == 8
        assert init == {
            "project": "stf",
            "entity": "team",
            "name": str(tmp_path),
            "id": previous_id,
            "resume": "allow",
            "dir": str(tmp_path),
        }
    assert [step for step, _ in wandb.logged] == [1, 3, 3, 5]
    assert wandb.logged[0][1].keys() == json.loads((tmp_path / "metrics.jsonl").read_text().split("\n")[0]).keys() - {
        "step"
    }
    assert wandb.finished == [143, 0]
    assert [record.getMessage() for record in caplog.records if record.name.startswith("stf_jax")] == [
        "Weights & Biases cannot be written (Its service has gone); the run continues."
    ] * 2


def test_wandb_may_reject_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(rejection="no API key\nconfigured"))
    with pytest.raises(UserError, match=r"rejected the run \(no API key configured\)\. .* WANDB_MODE=offline"):
        Simulation(tmp_path, monkeypatch, config=tiny.tiny(**WANDB))


@pytest.mark.parametrize("module", [None, types.ModuleType("wandb")], ids=["not installed", "a folder of that name"])
def test_missing_wandb_is_reported_before_the_workdir_is_created(module, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", module)
    assert run_command(main, [TINY, f"--workdir={tmp_path / 'run'}", "--config.wandb.project=stf"]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(
        r"error: wandb.project='stf' needs a package that is not installed: pip install wandb.*\n", error
    )
    assert not (tmp_path / "run").exists()


# ---- Profiles --------------------------------------------------------------------------------------------------------


def test_profile_has_the_selected_steps(tmp_path):
    double = jax.jit(lambda x: x * 2)
    double(1.0)
    profile = Profile(epath.Path(tmp_path / "profile"), 3, 2)
    for step in range(1, 7):
        profile.before_step(step)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            done = double(float(step))
        profile.after_step(step, done)
    profile.stop()
    assert traced_steps(tmp_path) == {3, 4}


def test_profile_of_a_resumed_run_that_ends_early(tmp_path):
    profile = Profile(epath.Path(tmp_path / "profile"), 3, 9)
    for step in (4, 5):  # of a run that resumes after the third
        profile.before_step(step)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            pass
        profile.after_step(step, jax.numpy.zeros(()))
    profile.stop()
    assert traced_steps(tmp_path) == {4, 5}


def traced_steps(workdir):
    (file,) = (workdir / "profile").rglob("*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(file))
    events = [event for plane in data.planes for line in plane.lines for event in line.events]
    return {dict(event.stats)["step_num"] for event in events if event.name == "train"}
