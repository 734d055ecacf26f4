"""The status of a run, read from its workdir without changing it: running, ended, stopped or dead."""

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

from stf_jax.cli import run_command
from stf_jax.config import to_json
from stf_jax.main import HELP, main
from stf_jax.runs.events import read_lines
from stf_jax.runs.lock import workdir_lock
from stf_jax.runs.status import format_status

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


def minutes_ago(minutes):
    """Formats the time this many minutes ago, as in events."""
    return (datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=minutes)).isoformat(timespec="seconds")


def make_event(kind, step, minutes=10, **fields):
    return {"time": minutes_ago(minutes), "event": kind, "step": step, **fields}


def make_begin(minutes=10, **fields):
    return make_event("begin", 0, minutes, **{"resumed": False, "steps": 10, **fields})


def make_workdir(folder, *events, lines=(LINE,), checkpoints=("2", "4")):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(to_json(tiny.tiny())))
    for name, values in (("metrics.jsonl", lines), ("events.jsonl", events)):
        (folder / name).write_text("".join(json.dumps(value) + "\n" for value in values))
    os.utime(folder / "metrics.jsonl", (time.time() - 300,) * 2)
    for name in checkpoints:
        (folder / "checkpoints" / name).mkdir(parents=True)
    return folder


def status_lines(folder):
    return format_status(epath.Path(folder)).splitlines()


def test_running_run(tmp_path):
    spike = make_event("spike", 3, 15, loss=9.5, usual=1.5, records=["ä"] * 99)
    make_workdir(tmp_path, make_begin(60), make_begin(20, resumed=True, changed={}), spike)
    with workdir_lock(epath.Path(tmp_path)):
        first, *rest = status_lines(tmp_path)
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


def test_run_that_has_just_begun(tmp_path):
    workdir = epath.Path(tmp_path)
    with workdir_lock(workdir):
        assert status_lines(tmp_path)[0].endswith(", preparing to train")
        (tmp_path / "config.json").write_text('{"name": "tr')  # partly written
        assert status_lines(tmp_path)[0].endswith(", preparing to train")
        make_workdir(tmp_path, make_begin(0), lines=(), checkpoints=())
        assert status_lines(tmp_path)[1:3] == ["  step         none logged yet", "  checkpoints  none"]


STATES = {  # functions, because the status says how long ago the events were
    "ended": (lambda: [make_begin(), make_event("end", 10, 180)], "ended 3 h 0 min ago"),
    "stopped": (
        lambda: [make_begin(), make_event("stopped", 6, 2, status=143)],
        "stopped 2 min ago at step 6, exit status 143",
    ),
    "dead": (
        lambda: [make_begin(), make_event("spike", 3)],
        "dead: it has not ended, and no process is running it; run the same command to",
    ),
    "dead after it was stopped": (
        lambda: [make_event("stopped", 6), make_begin(resumed=True)],
        "dead: it has not ended, and no",
    ),
    "without events": (list, "no process is running it"),
}


@pytest.mark.parametrize("state", STATES)
def test_run_that_is_not_running(state, tmp_path):
    events, message = STATES[state]
    first, *rest = status_lines(make_workdir(tmp_path, *events()))
    assert first.startswith(f"{tmp_path}: {message}")
    assert not any(line.startswith("  left") for line in rest)


@pytest.mark.parametrize("kind", ["end", "stopped"])
def test_resumed_run_is_running_from_its_start(kind, tmp_path):
    """Before it adds its first event, the last one is still that of the previous process."""
    make_workdir(tmp_path, make_begin(), make_event(kind, 4, 5, status=143))
    with workdir_lock(epath.Path(tmp_path)):
        assert "running since" in status_lines(tmp_path)[0]


def test_stages_are_listed_in_the_order_in_which_they_began(tmp_path):
    make_workdir(tmp_path / "pretrain", make_begin(), make_event("end", 10, 2))
    make_workdir(tmp_path / "finetune", make_begin(1))
    make_workdir(tmp_path / "evals" / "step_2")  # not a stage
    with workdir_lock(epath.Path(tmp_path / "finetune")):
        heads = [line for line in status_lines(tmp_path) if line and not line.startswith(" ")]
    assert [re.split(" since| ago", line)[0] for line in heads] == [
        f"{tmp_path}/pretrain: ended 2 min",
        f"{tmp_path}/finetune: running",
    ]


def test_stage_that_reads_its_weights_is_preparing(tmp_path):
    """First the first stage, which has no files yet; then the second, beside the first."""
    with workdir_lock(epath.Path(tmp_path / "pretrain")):
        (line,) = status_lines(tmp_path)
    assert re.fullmatch(rf"{tmp_path}/pretrain: running since .*, preparing to train", line)
    make_workdir(tmp_path / "pretrain", make_begin(), make_event("end", 10))
    with workdir_lock(epath.Path(tmp_path / "finetune")):
        heads = [line for line in status_lines(tmp_path) if line and not line.startswith(" ")]
    assert heads[0].startswith(f"{tmp_path}/pretrain: ended")
    assert re.fullmatch(rf"{tmp_path}/finetune: running since .*, preparing to train", heads[1])


def test_stages_are_locked_separately(tmp_path):
    for name in ("a", "b"):
        make_workdir(tmp_path / name, make_begin())
    with workdir_lock(epath.Path(tmp_path / "b")):
        heads = [line for line in status_lines(tmp_path) if line and not line.startswith(" ")]
    assert [": running" in line for line in heads] == [False, True]


def test_partly_written_files_are_ignored(tmp_path):
    make_workdir(tmp_path, make_begin(), checkpoints=("2", "10", "4", "12.orbax-checkpoint-tmp-17", "descriptor"))
    (tmp_path / "damaged" / "8").mkdir(parents=True)
    for name in ("metrics.jsonl", "events.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"time": "2026-11-27T00:00:00+00:00", "event": "end", "step": 9, "lo')
    lines = status_lines(tmp_path)
    assert "  checkpoints  2, 4, 10, 12.orbax-checkpoint-tmp-17 (incomplete)" in lines
    assert f"  damaged      8, moved to {tmp_path}/damaged" in lines
    assert lines[0].startswith(f"{tmp_path}: dead")
    assert lines[1].startswith("  step         4 of 10")


def test_only_the_end_of_long_metrics_is_read(tmp_path):
    many = [LINE | {"step": step} for step in range(2000)]
    assert status_lines(make_workdir(tmp_path, make_begin(steps=3000), lines=many))[1].startswith(
        "  step         1,999 of 3,000"
    )
    size = len(json.dumps(many[-1])) + 1
    found = read_lines(epath.Path(tmp_path / "metrics.jsonl"), 3 * size - 5)
    assert [values["step"] for _, values in found] == [1998, 1999]


def test_other_lines_are_ignored(tmp_path):
    odd = [{"step": 9}, {"event": "end"}, [9], "end"]
    lines = status_lines(make_workdir(tmp_path, make_begin(), *odd, lines=[LINE, *odd]))
    assert lines[0].startswith(f"{tmp_path}: dead")
    assert lines[1].startswith("  step         4 of 10")


def test_non_finite_loss(tmp_path):
    assert "  loss         not finite" in status_lines(make_workdir(tmp_path, lines=[LINE | {"loss": None}]))


# ---- The command -----------------------------------------------------------------------------------------------------


def snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.is_dir() or path.read_bytes()) for path in folder.rglob("*")}


ROOT = pathlib.Path(__file__).parents[2]
ARGUMENTS = ["--status", "--workdir={}", f"--config={ROOT}/tests/tiny.py", "--config.steps=8"]


@pytest.mark.parametrize("arguments", [ARGUMENTS, ARGUMENTS[::-1], ARGUMENTS[:2], ["--workdir", "{}", "--status"]])
def test_status_command_writes_nothing(arguments, tmp_path, capsys):
    make_workdir(tmp_path, make_begin(), make_event("end", 10))
    before = snapshot(tmp_path)
    assert run_command(main, [argument.format(tmp_path) for argument in arguments]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{tmp_path}: ended 10 min ago\n  step ")
    assert captured.err == ""
    assert snapshot(tmp_path) == before


def test_help_takes_precedence(capsys):
    with pytest.raises(SystemExit) as ended:
        run_command(main, ["--status", "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == HELP


UNUSABLE = {
    "missing": ([], "--workdir is missing; see --help."),
    "does not exist": (
        ["--workdir={}/absent"],
        "{}/absent is not a run's workdir: it has no config.json of a run. Give",
    ),
    "a file": (["--workdir={}/config.json"], "{}/config.json is not a run's workdir"),
    "a model's folder": (["--workdir={}"], "{} is not a run's workdir: it has no config.json of a run. Give"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_other_folders_are_refused_in_one_sentence(case, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    arguments, message = UNUSABLE[case]
    assert run_command(main, ["--status", *(argument.format(tmp_path) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message.format(tmp_path)}")
    assert error.count("\n") == 1


def test_status_command_imports_no_heavy_packages(tmp_path):
    """They would take seconds, and devices that the running run uses exclusively."""
    make_workdir(tmp_path, make_begin())
    program = "import sys; from stf_jax.main import main; main(sys.argv[1:]); print(*sys.modules)"
    command = [sys.executable, "-c", program, "--status", f"--workdir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    modules = set(done.stdout.splitlines()[-1].split())
    assert "stf_jax.runs.status" in modules
    assert not modules & {"stf_jax.training.loop", "orbax", "flax", "optax", "grain", "tensorboard", "transformers"}
