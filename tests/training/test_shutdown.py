"""SIGTERM during an evaluation or in the last step: nothing is lost, and the next start completes the evaluation."""

import itertools
import json
import os
import signal
import threading
import time

import pytest
import tiny
from run_process import read_events, read_metrics, saved_steps

from stf_jax.cli import run_command
from stf_jax.evals import runner
from stf_jax.main import main
from stf_jax.training import loop

STEPS, EVALUATED = 6, 3
TINY = f"--config={tiny.__file__}:steps="
ARGUMENTS = [
    f"{TINY}{STEPS}",
    "--config.mesh.data=1",
    "--config.checkpoint.every_steps=100",
    "--config.eval.benchmarks=('scenes',)",
    "--config.eval.limit=20",
    "--config.eval.batch=4",
    f"--config.eval.every_steps={EVALUATED}",
]


@pytest.mark.parametrize("evaluated", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_sigterm_in_the_last_step_of_a_stage(tmp_path, monkeypatch, capsys, evaluated):
    """The stage is complete; an evaluation at its end is left to the next start."""
    workdir, real, steps = tmp_path / "run", loop.Telemetry.advance, itertools.count(1)

    def advance(*args):
        if next(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
        return real(*args)

    monkeypatch.setattr(loop.Telemetry, "advance", advance)
    rest = [argument for argument in ARGUMENTS[1:] if evaluated or "benchmarks" not in argument]
    arguments = [f"{TINY}2", *rest, f"--workdir={workdir}"]
    _run(arguments, 143)
    when = "after step 2, which is saved" if evaluated else "after train was complete"
    assert f"Stopped by SIGTERM {when}" in capsys.readouterr().err
    assert saved_steps(workdir) == [2]
    assert [line["step"] for line in read_metrics(workdir)] == ([1] if evaluated else [1, 2])
    before = [(event["event"], event["step"]) for event in read_events(workdir)]
    assert before == [("begin", 0), ("stopped" if evaluated else "end", 2)]
    _run(arguments, 0)
    assert [line["step"] for line in read_metrics(workdir)] == [1, 2]
    assert ("scenes/accuracy" in read_metrics(workdir)[1]) == (workdir / "results.json").exists() == evaluated
    after = [(event["event"], event["step"]) for event in read_events(workdir)]
    assert after == before + [("begin", 2), ("end", 2)] * evaluated


@pytest.fixture
def sigterm_at_sixth_answer(monkeypatch):
    """Sends SIGTERM to this process as it writes the sixth answer."""
    real, answers = runner.answer_line, itertools.count(1)

    def answer_line(*args):
        if next(answers) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
        return real(*args)

    monkeypatch.setattr(runner, "answer_line", answer_line)


def _run(arguments, status):
    threads, handler = set(threading.enumerate()), signal.getsignal(signal.SIGTERM)
    assert run_command(main, arguments) == status
    assert signal.getsignal(signal.SIGTERM) == handler
    left = [thread for thread in threading.enumerate() if thread not in threads and not thread.daemon]
    for thread in left:
        thread.join(60)  # threads that were asked to stop may take a moment
    assert not any(thread.is_alive() for thread in left)


@pytest.mark.slow
def test_evaluation_of_the_step_that_sigterm_ends_is_left_to_the_next_start(tmp_path, monkeypatch):
    workdir, real, steps = tmp_path / "run", loop.Telemetry.advance, itertools.count(1)

    def advance(*args):
        if next(steps) == EVALUATED - 1:  # it is seen after the next step
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
        return real(*args)

    monkeypatch.setattr(loop.Telemetry, "advance", advance)
    arguments = [f"{TINY}{EVALUATED + 1}", *ARGUMENTS[1:], f"--workdir={workdir}"]
    _run(arguments, 143)
    assert saved_steps(workdir) == [EVALUATED]
    assert not (workdir / "evals").exists()
    _run(arguments, 0)
    assert (workdir / "evals" / f"step_{EVALUATED}" / "results.json").exists()
    metrics = read_metrics(workdir)
    assert [line["step"] for line in metrics] == list(range(1, EVALUATED + 2))
    assert ["scenes/accuracy" in line for line in metrics] == [False, False, True, True]


@pytest.mark.slow  # a minute
def test_interrupted_evaluation_is_completed_by_the_next_start(tmp_path, capsys, request):
    uninterrupted, stopped = tmp_path / "uninterrupted", tmp_path / "stopped"
    _run([*ARGUMENTS, f"--workdir={uninterrupted}"], 0)
    request.getfixturevalue("sigterm_at_sixth_answer")
    _run([*ARGUMENTS, f"--workdir={stopped}"], 143)
    assert f"Stopped by SIGTERM after step {EVALUATED}, which is saved" in capsys.readouterr().err
    assert saved_steps(stopped) == [EVALUATED]
    assert [line["step"] for line in read_metrics(stopped)] == [1, 2]  # the third line is also left to the next start
    assert not (stopped / "evals" / f"step_{EVALUATED}" / "results.json").exists()

    answers = (stopped / "evals" / f"step_{EVALUATED}" / "answers.jsonl").read_text().splitlines()
    assert len(answers) == 8  # the current batch is finished

    _run([*ARGUMENTS, f"--workdir={stopped}", "--config.seed=1"], 2)
    assert "cannot resume with a changed seed (was 0, now 1)" in capsys.readouterr().err
    _run([*ARGUMENTS, f"--workdir={stopped}", "--config.name=again"], 0)
    assert [line["step"] for line in read_metrics(stopped)] == list(range(1, STEPS + 1))
    timed = ("second", "flops", "wait", "goodput")
    for line, expected in zip(read_metrics(stopped), read_metrics(uninterrupted), strict=True):
        names = [name for name in expected if not any(word in name for word in timed)]
        assert {name: line[name] for name in names} == {name: expected[name] for name in names}
    assert "scenes/accuracy" in read_metrics(stopped)[EVALUATED - 1]
    for path in (f"evals/step_{EVALUATED}/answers.jsonl", "answers.jsonl"):
        texts = [
            [json.loads(line)["text"] for line in (run / path).read_text().splitlines()]
            for run in (uninterrupted, stopped)
        ]
        assert texts[0] == texts[1]
        assert len(texts[0]) == 40  # with and without the image
    assert [(event["event"], event["step"]) for event in read_events(stopped)] == [
        ("begin", 0),
        ("stopped", EVALUATED),
        ("begin", EVALUATED),
        ("end", STEPS),
    ]
    assert read_events(stopped)[2]["changed"] == {"name": ["train", "again"]}
