"""Where a run stands, told from its workdir: at work, ended, stopped or dead; and nothing is written or disturbed."""

import datetime
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import pytest
import tiny
from etils import epath

from stf_jax.config import to_json
from stf_jax.main import HELP, main
from stf_jax.runtime.cli import run_command
from stf_jax.runtime.events import read_lines
from stf_jax.runtime.lock import workdir_lock
from stf_jax.runtime.status import format_status

LINE = {
    "step": 4,
    "loss": 1.25,
    "tokens_per_second": 1234.5,
    "seconds_per_step": 30.0,
    "data_wait": 0.015,
    "goodput": 0.97,
    "seconds": 11520.0,
    "tokens": 98765,
    "rows_replaced": 3,
    "updates_skipped": 2,
}


def at(minutes):
    """A time so many minutes ago, as events have it."""
    return (datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=minutes)).isoformat(timespec="seconds")


def event(kind, step, minutes=10, **facts):
    return {"time": at(minutes), "event": kind, "step": step, **facts}


def begin(minutes=10, **facts):
    return event("begin", 0, minutes, **{"resumed": False, "steps": 10, **facts})


def make(folder, *events, lines=(LINE,), checkpoints=("2", "4")):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(to_json(tiny.tiny())))
    for name, values in (("metrics.jsonl", lines), ("events.jsonl", events)):
        (folder / name).write_text("".join(json.dumps(value) + "\n" for value in values))
    os.utime(folder / "metrics.jsonl", (time.time() - 300,) * 2)
    for name in checkpoints:
        (folder / "checkpoints" / name).mkdir(parents=True)
    return folder


def told(folder):
    return format_status(epath.Path(folder)).splitlines()


def test_a_run_at_work(tmp_path):
    spike = event("spike", 3, 15, loss=9.5, usual=1.5, records=["ä"] * 99)
    make(tmp_path, begin(60), begin(20, resumed=True, changed={}), spike)
    with workdir_lock(epath.Path(tmp_path)):
        first, *rest = told(tmp_path)
    assert re.fullmatch(rf"{tmp_path}: running since 20[-\d]+ [:\d]+ UTC, process {os.getpid()} on \S+", first)
    assert rest[:8] == [
        "  step         4 of 10, logged 5 min ago",
        "  loss         1.250",
        "  speed        1,234 tok/s, data wait 2%, goodput 97%",
        "  left         3 min at that speed",
        "  trained      98,765 tokens in 3 h 12 min",
        "  skipped      3 rows, 2 updates",
        "  restarts     1",
        "  checkpoints  2, 4",
    ]
    assert [line[:15] for line in rest[8:]] == ["  events       ", " " * 15, " " * 15]
    assert [re.sub(r"20[-\d]+ [:\d]+", "THEN", line[15:], count=1) for line in rest[8:]] == [
        "THEN UTC, step 0: begin (resumed false, steps 10)",
        "THEN UTC, step 0: begin (resumed true, steps 10)",
        "THEN UTC, step 3: spike (" + ("loss 9.5, usual 1.5, records [" + '"ä", ' * 99)[:99] + "…)",
    ]


def test_a_run_that_was_just_begun(tmp_path):
    workdir = epath.Path(tmp_path)
    with workdir_lock(workdir):
        assert told(tmp_path)[0].endswith(", preparing to train")
        (tmp_path / "config.json").write_text('{"name": "tr')  # as it is being written
        assert told(tmp_path)[0].endswith(", preparing to train")
        make(tmp_path, begin(0), lines=(), checkpoints=())
        assert told(tmp_path)[1:3] == ["  step         none logged yet", "  checkpoints  none"]


FATES = {  # made when they are looked at, for they tell how long ago they were
    "ended": (lambda: [begin(), event("end", 10, 180)], "ended 3 h 0 min ago"),
    "stopped": (
        lambda: [begin(), event("stopped", 6, 2, status=143)],
        "stopped 2 min ago at step 6, exit status 143",
    ),
    "dead": (
        lambda: [begin(), event("spike", 3)],
        "dead: it has not ended, and no process is running it; run the same command to",
    ),
    "dead after it was stopped": (
        lambda: [event("stopped", 6), begin(resumed=True)],
        "dead: it has not ended, and no",
    ),
    "older than events": (list, "no process is running it"),
}


@pytest.mark.parametrize("fate", FATES)
def test_a_run_that_is_not_at_work(fate, tmp_path):
    events, says = FATES[fate]
    first, *rest = told(make(tmp_path, *events()))
    assert first.startswith(f"{tmp_path}: {says}")
    assert not any(line.startswith("  left") for line in rest)


@pytest.mark.parametrize("kind", ["end", "stopped"])
def test_a_run_that_goes_on_is_at_work_from_its_first_second(kind, tmp_path):
    """Before it has begun anew, its last event is still that of the process before."""
    make(tmp_path, begin(), event(kind, 4, 5, status=143))
    with workdir_lock(epath.Path(tmp_path)):
        assert "running since" in told(tmp_path)[0]


def test_stages_are_told_in_the_order_in_which_they_were_begun(tmp_path):
    make(tmp_path / "pretrain", begin(), event("end", 10, 2))
    make(tmp_path / "finetune", begin(1))
    make(tmp_path / "evals" / "step_2")  # no stage
    with workdir_lock(epath.Path(tmp_path / "finetune")):
        heads = [line for line in told(tmp_path) if line and not line.startswith(" ")]
    assert [re.split(" since| ago", line)[0] for line in heads] == [
        f"{tmp_path}/pretrain: ended 2 min",
        f"{tmp_path}/finetune: running",
    ]


def test_a_stage_that_reads_its_weights_is_getting_ready(tmp_path):
    """The first, of which nothing is there yet, and the second beside it."""
    with workdir_lock(epath.Path(tmp_path / "pretrain")):
        (line,) = told(tmp_path)
    assert re.fullmatch(rf"{tmp_path}/pretrain: running since .*, preparing to train", line)
    make(tmp_path / "pretrain", begin(), event("end", 10))
    with workdir_lock(epath.Path(tmp_path / "finetune")):
        heads = [line for line in told(tmp_path) if line and not line.startswith(" ")]
    assert heads[0].startswith(f"{tmp_path}/pretrain: ended")
    assert re.fullmatch(rf"{tmp_path}/finetune: running since .*, preparing to train", heads[1])


def test_each_stage_may_be_held_by_itself(tmp_path):
    for name in ("a", "b"):
        make(tmp_path / name, begin())
    with workdir_lock(epath.Path(tmp_path / "b")):
        heads = [line for line in told(tmp_path) if line and not line.startswith(" ")]
    assert [": running" in line for line in heads] == [False, True]


def test_what_is_half_written_is_not_counted(tmp_path):
    make(tmp_path, begin(), checkpoints=("2", "10", "4", "12.orbax-checkpoint-tmp-17", "descriptor"))
    (tmp_path / "damaged" / "8").mkdir(parents=True)
    for name in ("metrics.jsonl", "events.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"time": "2026-11-27T00:00:00+00:00", "event": "end", "step": 9, "lo')
    lines = told(tmp_path)
    assert "  checkpoints  2, 4, 10, 12.orbax-checkpoint-tmp-17 (incomplete)" in lines
    assert f"  damaged      8, moved to {tmp_path}/damaged" in lines
    assert lines[0].startswith(f"{tmp_path}: dead")
    assert lines[1].startswith("  step         4 of 10")


def test_of_long_metrics_the_end_is_read(tmp_path):
    many = [LINE | {"step": step} for step in range(2000)]
    assert told(make(tmp_path, begin(steps=3000), lines=many))[1].startswith("  step         1,999 of 3,000")
    size = len(json.dumps(many[-1])) + 1
    found = read_lines(epath.Path(tmp_path / "metrics.jsonl"), 3 * size - 5)
    assert [values["step"] for _, values in found] == [1998, 1999]


def test_lines_that_say_something_else_are_passed_over(tmp_path):
    odd = [{"step": 9}, {"event": "end"}, [9], "end"]
    lines = told(make(tmp_path, begin(), *odd, lines=[LINE, *odd]))
    assert lines[0].startswith(f"{tmp_path}: dead")
    assert lines[1].startswith("  step         4 of 10")


def test_a_loss_that_was_not_finite_is_said_to_be(tmp_path):
    assert "  loss         not finite" in told(make(tmp_path, lines=[LINE | {"loss": None}]))


# ---- The door --------------------------------------------------------------------------------------------------------


def everything(folder):
    return {path: (path.stat().st_mtime_ns, path.is_dir() or path.read_bytes()) for path in folder.rglob("*")}


ROOT = pathlib.Path(__file__).parents[2]
WORDS = ["--status", "--workdir={}", f"--config={ROOT}/tests/tiny.py", "--config.steps=8"]


@pytest.mark.parametrize("words", [WORDS, WORDS[::-1], WORDS[:2], ["--workdir", "{}", "--status"]])
def test_the_door_tells_and_writes_nothing(words, tmp_path, capsys):
    make(tmp_path, begin(), event("end", 10))
    before = everything(tmp_path)
    assert run_command(main, [word.format(tmp_path) for word in words]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"{tmp_path}: ended 10 min ago\n  step ")
    assert said.err == ""
    assert everything(tmp_path) == before


def test_help_comes_first(capsys):
    with pytest.raises(SystemExit) as ended:
        run_command(main, ["--status", "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == HELP


UNUSABLE = {
    "none is named": ([], "--workdir is missing; see --help."),
    "it is not there": (["--workdir={}/absent"], "{}/absent is not a run's workdir: it has no config.json of a run. Give"),
    "it is a file": (["--workdir={}/config.json"], "{}/config.json is not a run's workdir"),
    "it is a model's": (["--workdir={}"], "{} is not a run's workdir: it has no config.json of a run. Give"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_what_is_no_workdir_is_said_in_a_sentence(case, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    words, says = UNUSABLE[case]
    assert run_command(main, ["--status", *(word.format(tmp_path) for word in words)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {says.format(tmp_path)}")
    assert error.count("\n") == 1


def test_it_imports_nothing_that_computes(tmp_path):
    """What would take seconds, and devices that a run in progress has to itself."""
    make(tmp_path, begin())
    program = "import sys; from stf_jax.main import main; main(sys.argv[1:]); print(*sys.modules)"
    command = [sys.executable, "-c", program, "--status", f"--workdir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    modules = set(done.stdout.splitlines()[-1].split())
    assert "stf_jax.runtime.status" in modules
    assert not modules & {"stf_jax.training.loop", "orbax", "flax", "optax", "grain", "tensorboard", "transformers"}
