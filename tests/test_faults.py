"""Faults that really happen to runs: killed anywhere, told to end, hosts that die or hang, a disk that is full.

Minutes long each: `make test-slow`. What they measure is told at the end, for docs/BENCHMARKS.md.
"""

import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import time

import numpy as np
import pytest
from make_llava import make
from started import ROOT, Run, events, lines, logged, saved, together

pytestmark = pytest.mark.slow
EVERY = 8
TINY = f"--config={ROOT}/tests/tiny.py:steps="
EXACT = ("loss", "gradient_norm", "learned_tokens", "learning_rate", "tokens", "rows_replaced", "updates_skipped")


def _sums(workdir, step):
    """The checksums of a checkpoint: equal ones are of equal arrays, to the bit, and of equal places in the data."""
    sums = json.loads((workdir / "checkpoints" / str(step) / "sums" / "metadata").read_text())
    return {name: value for name, value in sums.items() if name != "clock"}


# ---- Killed ----------------------------------------------------------------------------------------------------------

STEPS, KILLS = 200, 20
MEASURED = ["eval.benchmarks=('scenes',)", "eval.limit=24", "eval.batch=8", "eval.every_steps=20"]
CHANGES = [f"checkpoint.every_steps={EVERY}", "mesh.data=1", "optimizer.clip_norm=1.0", *MEASURED]
ARGUMENTS = [f"{TINY}{STEPS}", *(f"--config.{change}" for change in CHANGES)]


def _in_evaluation(workdir):
    folders = [*(workdir / "evals").glob("step_*")] if (workdir / "evals").exists() else []
    return any((folder / "answers.jsonl").exists() and not (folder / "results.json").exists() for folder in folders)


def _in_save(workdir):
    return any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp")) if saved(workdir) else False


def _tracing(run):
    return "causal attention" in run.said()  # when kernels are chosen, and what is compiled then


def _strike(run, phase, newest, rng):
    """Kills a run in that phase; gives the seconds from its start to its first step, if it came to that."""
    recovery = None
    if phase == "start":
        time.sleep(rng.uniform(0.2, 6.0))
    elif phase == "compile":
        run.wait_for(lambda: _tracing(run))
        time.sleep(rng.uniform(0.0, 1.0))
    else:
        run.wait_for(lambda: _tracing(run) and len(lines(run.workdir)) > newest)
        recovery = time.monotonic() - run.began
        if phase == "step":
            after = newest + rng.randint(1, 12)
            run.wait_for(lambda: len(lines(run.workdir)) > after)
        elif phase == "save":
            run.wait_for(lambda: _in_save(run.workdir))
        elif phase == "evaluation":
            run.wait_for(lambda: _in_evaluation(run.workdir))
        time.sleep(rng.uniform(0.0, 0.05))
    run.kill()
    return recovery


def test_twenty_kills_at_any_moment_change_nothing(tmp_path, record_property):
    seed = int(os.environ.get("FAULTS_SEED", time.time()))
    rng, workdir, whole = random.Random(seed), tmp_path / "killed", tmp_path / "whole"
    lost, recoveries = [], []
    for phase in ["compile", "start", "step", "save", "evaluation"] * (KILLS // 5):
        newest = max(saved(workdir), default=0)
        with Run(workdir, *ARGUMENTS) as run:
            recoveries.append(_strike(run, phase, newest, rng))
        reached, resumed = len(lines(workdir)), max(saved(workdir), default=0)
        lost.append(reached - resumed)
        # Training goes on while a checkpoint is written; a kill then loses what came meanwhile as well.
        assert lost[-1] <= (2 * EVERY if _in_save(workdir) else EVERY), (seed, phase, reached, resumed)
        assert resumed >= newest
    for one in (workdir, whole):
        with Run(one, *ARGUMENTS) as run:
            assert run.ends() == 0, run.said()
    for key in EXACT:
        assert [line[key] for line in logged(workdir)] == [line[key] for line in logged(whole)], (seed, key)
    assert [line["step"] for line in logged(workdir)] == list(range(1, STEPS + 1))
    assert _sums(workdir, STEPS) == _sums(whole, STEPS)
    answers = sorted(path.relative_to(whole) for path in whole.rglob("answers.jsonl"))
    assert len(answers) == STEPS // 20
    for path in answers:
        said = [
            [json.loads(line)["text"] for line in (one / path).read_text().splitlines()] for one in (workdir, whole)
        ]
        assert said[0] == said[1], (seed, path)
    trained = [steps for steps, seconds in zip(lost, recoveries, strict=True) if seconds]  # the others came to no step
    recoveries = [seconds for seconds in recoveries if seconds]
    record_property("kills survived, to the bit", f"{len(lost)} (seed {seed})")
    record_property(
        f"steps lost to a kill, of an interval of {EVERY}", f"{statistics.mean(trained):.1f}, at most {max(trained)}"
    )
    record_property(
        "seconds from start to the first step again",
        f"{statistics.median(recoveries):.1f}, at most {max(recoveries):.1f}",
    )


# ---- Told to end -----------------------------------------------------------------------------------------------------


def test_a_second_sigterm_ends_at_once(tmp_path, monkeypatch):
    """Also while the first waits for what cannot be hurried: here, an image that never comes."""
    with _hanging(tmp_path, monkeypatch, "--config.faults.hang_seconds=0") as run:
        trained = -1
        while trained != (trained := len(lines(run.workdir))):  # on what was read before
            time.sleep(3)
        run.process.send_signal(signal.SIGTERM)
        run.wait_for(lambda: "the step is finished and saved before this ends" in run.said())
        time.sleep(2)
        assert run.process.poll() is None
        run.process.send_signal(signal.SIGTERM)
        assert run.ends(patience=5) == 143
        assert run.said().strip().endswith("the same command goes on from the last checkpoint.")


def test_sigterm_before_the_first_step_ends_at_once(tmp_path):
    with Run(tmp_path / "run", f"{TINY}8", "--config.mesh.data=1", cached=False) as run:
        run.wait_for(lambda: _tracing(run))
        run.process.send_signal(signal.SIGTERM)
        assert run.ends(patience=5) == 143
        assert "Ended by SIGTERM" in run.said()


def test_hosts_of_which_one_is_told_to_end_stop_after_the_same_step(tmp_path, record_property):
    arguments = [f"{TINY}60", "--config.mesh.data=2", "--config.checkpoint.every_steps=500"]
    for told in (1, 0):
        workdir = tmp_path / f"told{told}"
        with contextlib.ExitStack() as ends:
            hosts = [ends.enter_context(host) for host in together(workdir, 2, *arguments)]
            hosts[0].wait_for_lines(10)
            hosts[told].process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            assert [host.ends(patience=60) for host in hosts] == [143, 143], hosts[1 - told].said()
            record_property("seconds from SIGTERM to the end of two hosts", f"{time.monotonic() - began:.1f}")
        (step,) = saved(workdir)
        assert all(f"Stopped by SIGTERM after step {step}, which is saved" in host.said() for host in hosts)
        # On one host, to save time: it is the same run.
        with Run(workdir, *arguments, devices=2) as run:
            assert run.ends() == 0, run.said()
        assert [line["step"] for line in logged(workdir)] == list(range(1, 61))
    first, second = (np.array([line["loss"] for line in logged(tmp_path / f"told{told}")]) for told in (0, 1))
    np.testing.assert_allclose(first, second, rtol=1e-4)


# ---- Hosts that die or hang ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["KILL", "STOP"])
@pytest.mark.parametrize("victim", [0, 1])
def test_where_one_host_dies_or_stands_still_the_other_ends(tmp_path, fault, victim, record_property):
    """75 where we are first to know, 134 where jax is: launch/ starts both again. And then the run goes on."""
    arguments = [f"{TINY}60", "--config.mesh.data=2", f"--config.checkpoint.every_steps={EVERY}"]
    arguments += ["--config.faults.host_seconds=10", "--config.faults.hang_seconds=60"]
    with contextlib.ExitStack() as ends:
        hosts = [ends.enter_context(host) for host in together(tmp_path / "run", 2, *arguments)]
        hosts[0].wait_for_lines(20)
        hosts[victim].process.send_signal(getattr(signal, f"SIG{fault}"))
        began, other = time.monotonic(), hosts[1 - victim]
        assert other.ends(patience=60) in (75, -signal.SIGABRT), other.said()
        record_property(
            f"seconds until the other host ends, where host {victim} gets SIG{fault}", f"{time.monotonic() - began:.0f}"
        )
        said = other.said()
        assert "Another host of the run was lost" in said or "another task died" in said
    newest = max(saved(tmp_path / "run"))
    assert newest >= 8
    with contextlib.ExitStack() as ends:
        hosts = [ends.enter_context(host) for host in together(tmp_path / "run", 2, *arguments)]
        assert [host.ends() for host in hosts] == [0, 0], hosts[0].said()
    assert [line["step"] for line in logged(tmp_path / "run")] == list(range(1, 61))
    assert events(tmp_path / "run")[-2]["resumed"]


DISK = """
import os, pathlib, time
import PIL.Image
opened = PIL.Image.open
def open(*what, **how):
    while pathlib.Path(os.environ["AWAY"]).exists():
        time.sleep(0.1)
    return opened(*what, **how)
PIL.Image.open = open
"""


@contextlib.contextmanager
def _hanging(folder, monkeypatch, *more):
    """A run whose images are on a disk that answers no more, as a network's may."""
    make(folder, captions=1, conversations=24)
    (folder / "disk").mkdir()
    (folder / "disk" / "sitecustomize.py").write_text(DISK)  # which Python imports by itself
    monkeypatch.setenv("PYTHONPATH", f"{folder / 'disk'}{os.pathsep}{os.environ['PYTHONPATH']}")
    monkeypatch.setenv("AWAY", str(folder / "away"))
    files = {"data.source": "llava", "data.annotations": "llava_v1_5_mix665k.json", "data.images": "images"}
    changes = files | {"data.max_length": 192, "mesh.data": 1, "global_batch_size": 4, "checkpoint.every_steps": 1000}
    arguments = [f"{TINY}5000", *(f"--config.{key}={value}" for key, value in changes.items())]
    with Run(folder / "run", *arguments, *more) as run:
        run.wait_for_lines(8)
        (folder / "away").touch()
        yield run


def test_a_run_that_hangs_ends_in_the_time_it_was_given(tmp_path, monkeypatch, record_property):
    with _hanging(tmp_path, monkeypatch, "--config.faults.hang_seconds=45") as run:
        began = time.monotonic()
        assert run.ends(patience=120) == 75
        seconds = time.monotonic() - began
        record_property("seconds until a run that hangs ends, of 45 it was given", f"{seconds:.0f}")
        assert 40 < seconds < 60  # from when it hangs, not from its start
        said = run.said()
        assert "error: Nothing has happened for 45 s (faults.hang_seconds) since step" in said
    stacks = (tmp_path / "run" / "hang.host0.txt").read_text()
    assert "pipeline.py" in stacks


# ---- A disk that is full ---------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """A disk of eight megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", folder], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here; tests/runtime/test_damage.py limits the size of files instead")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_is_borne_for_a_while_and_ends_with_a_sentence(disk):
    """Room that comes back in time is used; else the run ends with status 1, and goes on when there is room."""
    arguments = [f"{TINY}240", "--config.mesh.data=1", "--config.checkpoint.every_steps=20"]
    workdir, filling = disk / "run", disk / "filling"

    def fill():
        with contextlib.suppress(OSError), filling.open("wb") as file:
            while True:
                file.write(bytes(4096))
                file.flush()

    with Run(workdir, *arguments) as run:
        run.wait_for(lambda: len(saved(workdir)) == 2)
        fill()
        run.wait_for(lambda: "could not be saved (No space left on device)" in run.said())
        kept = saved(workdir)
        filling.unlink()
        run.wait_for(lambda: max(saved(workdir)) > max(kept))
        fill()
        assert run.ends() == 1, run.said()
    assert "(No space left on device): mend that, by making room" in run.said().splitlines()[-1]
    assert "Traceback" not in run.said()
    newest = max(saved(workdir))
    filling.unlink()
    with Run(workdir, *arguments) as run:
        assert run.ends() == 0, run.said()
    assert events(workdir)[-2]["step"] == newest
    assert logged(workdir)[-1]["step"] == 240
