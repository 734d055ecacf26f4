"""SIGTERM while a run is measured, or comes to its end: nothing is lost, and what is owed is made up for."""

import itertools
import json
import os
import signal
import threading
import time

import pytest
from run_process import ROOT, read_events, read_metrics, saved_steps

from stf_jax.evals import runner
from stf_jax.main import main
from stf_jax.runtime.cli import run_command
from stf_jax.training import loop

STEPS, MEASURED = 6, 3
TINY = f"--config={ROOT}/tests/tiny.py:steps="
ARGUMENTS = [
    f"{TINY}{STEPS}",
    "--config.mesh.data=1",
    "--config.checkpoint.every_steps=100",
    "--config.eval.benchmarks=('scenes',)",
    "--config.eval.limit=20",
    "--config.eval.batch=4",
    f"--config.eval.every_steps={MEASURED}",
]


@pytest.mark.parametrize("measured", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_sigterm_in_the_last_step_of_a_stage(tmp_path, monkeypatch, capsys, measured):
    """The stage is done; where it ends in a measurement, that is for the next start."""
    workdir, real, steps = tmp_path / "run", loop.Telemetry.advance, itertools.count(1)

    def advance(*what):
        if next(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
        return real(*what)

    monkeypatch.setattr(loop.Telemetry, "advance", advance)
    rest = [argument for argument in ARGUMENTS[1:] if measured or "benchmarks" not in argument]
    arguments = [f"{TINY}2", *rest, f"--workdir={workdir}"]
    _ends(arguments, 143)
    said = "after step 2, which is saved" if measured else "after train was complete"
    assert f"Stopped by SIGTERM {said}" in capsys.readouterr().err
    assert saved_steps(workdir) == [2]
    assert [line["step"] for line in read_metrics(workdir)] == ([1] if measured else [1, 2])
    before = [(event["event"], event["step"]) for event in read_events(workdir)]
    assert before == [("begin", 0), ("stopped" if measured else "end", 2)]
    _ends(arguments, 0)
    assert [line["step"] for line in read_metrics(workdir)] == [1, 2]
    assert ("scenes/accuracy" in read_metrics(workdir)[1]) == (workdir / "results.json").exists() == measured
    after = [(event["event"], event["step"]) for event in read_events(workdir)]
    assert after == before + [("begin", 2), ("end", 2)] * measured


@pytest.fixture
def told(monkeypatch):
    """SIGTERM to this process as it writes the sixth answer."""
    real, answers = runner.answer_line, itertools.count(1)

    def answer_line(*what):
        if next(answers) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
        return real(*what)

    monkeypatch.setattr(runner, "answer_line", answer_line)


def _ends(arguments, status):
    threads, handler = set(threading.enumerate()), signal.getsignal(signal.SIGTERM)
    assert run_command(main, arguments) == status
    assert signal.getsignal(signal.SIGTERM) == handler
    left = [thread for thread in threading.enumerate() if thread not in threads and not thread.daemon]
    for thread in left:
        thread.join(60)  # they were told to end, and need not have yet
    assert not any(thread.is_alive() for thread in left)


@pytest.mark.slow  # a minute
def test_a_measurement_that_is_given_up_is_made_up_for(tmp_path, capsys, request):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    _ends([*ARGUMENTS, f"--workdir={whole}"], 0)
    request.getfixturevalue("told")
    _ends([*ARGUMENTS, f"--workdir={stopped}"], 143)
    assert f"Stopped by SIGTERM after step {MEASURED}, which is saved" in capsys.readouterr().err
    assert saved_steps(stopped) == [MEASURED]
    assert [line["step"] for line in read_metrics(stopped)] == [1, 2]  # the third's line is owed as well
    assert not (stopped / "evals" / f"step_{MEASURED}" / "results.json").exists()

    answers = (stopped / "evals" / f"step_{MEASURED}" / "answers.jsonl").read_text().splitlines()
    assert len(answers) == 8  # the batch at hand to its end

    _ends([*ARGUMENTS, f"--workdir={stopped}", "--config.seed=1"], 2)
    assert "cannot resume with a changed seed (was 0, now 1)" in capsys.readouterr().err
    _ends([*ARGUMENTS, f"--workdir={stopped}", "--config.name=again"], 0)
    assert [line["step"] for line in read_metrics(stopped)] == list(range(1, STEPS + 1))
    timed = ("second", "flops", "wait", "goodput")
    for line, expected in zip(read_metrics(stopped), read_metrics(whole), strict=True):
        names = [name for name in expected if not any(word in name for word in timed)]
        assert {name: line[name] for name in names} == {name: expected[name] for name in names}
    assert "scenes/accuracy" in read_metrics(stopped)[MEASURED - 1]
    for path in (f"evals/step_{MEASURED}/answers.jsonl", "answers.jsonl"):
        said = [
            [json.loads(line)["text"] for line in (run / path).read_text().splitlines()] for run in (whole, stopped)
        ]
        assert said[0] == said[1]
        assert len(said[0]) == 40  # with and without the image
    assert [(event["event"], event["step"]) for event in read_events(stopped)] == [
        ("begin", 0),
        ("stopped", MEASURED),
        ("begin", MEASURED),
        ("end", STEPS),
    ]
    assert read_events(stopped)[2]["changed"] == {"name": ["train", "again"]}
