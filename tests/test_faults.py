"""Real faults: runs that are killed at any moment or terminated, hosts that die or hang, a full disk.

Each test takes minutes: `make test-slow`. Measurements are printed at the end, for docs/BENCHMARKS.md.
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
from run_process import ROOT, Run, metric_lines, read_events, read_metrics, saved_steps, start_hosts

pytestmark = pytest.mark.slow
EVERY = 8
TINY = f"--config={ROOT}/tests/tiny.py:steps="
EXACT = ("loss", "gradient_norm", "learned_tokens", "learning_rate", "tokens", "rows_replaced", "updates_skipped")


def _sums(workdir, step):
    """Reads the checksums of a checkpoint; equal ones mean bitwise equal arrays and the same position in the data."""
    sums = json.loads((workdir / "checkpoints" / str(step) / "sums" / "metadata").read_text())
    return {name: value for name, value in sums.items() if name != "clock"}


# ---- Killed ----------------------------------------------------------------------------------------------------------

STEPS, KILLS = 200, 20
EVALUATION = ["eval.benchmarks=('scenes',)", "eval.limit=24", "eval.batch=8", "eval.every_steps=20"]
CHANGES = [f"checkpoint.every_steps={EVERY}", "mesh.data=1", "optimizer.clip_norm=1.0", *EVALUATION]
ARGUMENTS = [f"{TINY}{STEPS}", *(f"--config.{change}" for change in CHANGES)]


def _in_evaluation(workdir):
    folders = [*(workdir / "evals").glob("step_*")] if (workdir / "evals").exists() else []
    return any((folder / "answers.jsonl").exists() and not (folder / "results.json").exists() for folder in folders)


def _in_save(workdir):
    return any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp")) if saved_steps(workdir) else False


def _tracing(run):
    return "causal attention" in run.output()  # logged when kernels are chosen, just before compilation


def _kill_in_phase(run, phase, newest, rng):
    """Kills a run in this phase; returns the seconds from its start to its first step, or None before a step."""
    recovery = None
    if phase == "start":
        time.sleep(rng.uniform(0.2, 6.0))
    elif phase == "compile":
        run.wait_for(lambda: _tracing(run))
        time.sleep(rng.uniform(0.0, 1.0))
    else:
        run.wait_for(lambda: _tracing(run) and len(metric_lines(run.workdir)) > newest)
        recovery = time.monotonic() - run.start_time
        if phase == "step":
            after = newest + rng.randint(1, 12)
            run.wait_for(lambda: len(metric_lines(run.workdir)) > after)
        elif phase == "save":
            run.wait_for(lambda: _in_save(run.workdir))
        elif phase == "evaluation":
            run.wait_for(lambda: _in_evaluation(run.workdir))
        time.sleep(rng.uniform(0.0, 0.05))
    run.kill()
    return recovery


def test_twenty_kills_at_any_moment_change_nothing(tmp_path, record_property):
    seed = int(os.environ.get("FAULTS_SEED", time.time()))
    rng, workdir, uninterrupted = random.Random(seed), tmp_path / "killed", tmp_path / "uninterrupted"
    lost, recoveries = [], []
    for phase in ["compile", "start", "step", "save", "evaluation"] * (KILLS // 5):
        newest = max(saved_steps(workdir), default=0)
        with Run(workdir, *ARGUMENTS) as run:
            recoveries.append(_kill_in_phase(run, phase, newest, rng))
        reached, resumed = len(metric_lines(workdir)), max(saved_steps(workdir), default=0)
        lost.append(reached - resumed)
        # Training continues while a checkpoint is written; a kill then also loses the steps since.
        assert lost[-1] <= (2 * EVERY if _in_save(workdir) else EVERY), (seed, phase, reached, resumed)
        assert resumed >= newest
    for folder in (workdir, uninterrupted):
        with Run(folder, *ARGUMENTS) as run:
            assert run.wait() == 0, run.output()
    killed_lines, expected_lines = read_metrics(workdir), read_metrics(uninterrupted)
    for key in EXACT:
        assert [line[key] for line in killed_lines] == [line[key] for line in expected_lines], (seed, key)
    assert [line["step"] for line in killed_lines] == list(range(1, STEPS + 1))
    assert _sums(workdir, STEPS) == _sums(uninterrupted, STEPS)
    paths = sorted(path.relative_to(uninterrupted) for path in uninterrupted.rglob("answers.jsonl"))
    assert len(paths) == STEPS // 20
    for path in paths:
        answers, expected = (
            [json.loads(line)["text"] for line in (folder / path).read_text().splitlines()]
            for folder in (workdir, uninterrupted)
        )
        assert answers == expected, (seed, path)
    trained = [steps for steps, seconds in zip(lost, recoveries, strict=True) if seconds]  # the others reached no step
    recoveries = [seconds for seconds in recoveries if seconds]
    record_property("kills survived, to the bit", f"{len(lost)} (seed {seed})")
    record_property(
        f"steps lost to a kill, of an interval of {EVERY}", f"{statistics.mean(trained):.1f}, at most {max(trained)}"
    )
    record_property(
        "seconds from start to the first step again",
        f"{statistics.median(recoveries):.1f}, at most {max(recoveries):.1f}",
    )


# ---- SIGTERM ---------------------------------------------------------------------------------------------------------


def test_a_second_sigterm_ends_at_once(tmp_path, monkeypatch):
    """Even while the first SIGTERM waits for something that takes forever: here, an image that cannot be read."""
    with _hanging(tmp_path, monkeypatch, "--config.faults.hang_seconds=0") as run:
        trained = -1
        while trained != (trained := len(metric_lines(run.workdir))):  # on batches that were read before
            time.sleep(3)
        run.process.send_signal(signal.SIGTERM)
        run.wait_for(lambda: "SIGTERM: finishing and saving the current step" in run.output())
        time.sleep(2)
        assert run.process.poll() is None
        run.process.send_signal(signal.SIGTERM)
        assert run.wait(timeout=5) == 143
        assert run.output().strip().endswith("run the same command to resume from the last checkpoint.")


def test_sigterm_before_the_first_step_ends_at_once(tmp_path):
    with Run(tmp_path / "run", f"{TINY}8", "--config.mesh.data=1", cached=False) as run:
        run.wait_for(lambda: _tracing(run))
        run.process.send_signal(signal.SIGTERM)
        assert run.wait(timeout=5) == 143
        assert "Ended by SIGTERM" in run.output()


def test_sigterm_to_one_host_stops_all_after_the_same_step(tmp_path, record_property):
    arguments = [f"{TINY}60", "--config.mesh.data=2", "--config.checkpoint.every_steps=500"]
    for target in (1, 0):
        workdir = tmp_path / f"target{target}"
        with contextlib.ExitStack() as stack:
            hosts = [stack.enter_context(host) for host in start_hosts(workdir, 2, *arguments)]
            hosts[0].wait_for_steps(10)
            hosts[target].process.send_signal(signal.SIGTERM)
            begin = time.monotonic()
            assert [host.wait(timeout=60) for host in hosts] == [143, 143], hosts[1 - target].output()
            record_property("seconds from SIGTERM to the end of two hosts", f"{time.monotonic() - begin:.1f}")
        (step,) = saved_steps(workdir)
        assert all(f"Stopped by SIGTERM after step {step}, which is saved" in host.output() for host in hosts)
        # Resumed on one host, to save time: it is the same run.
        with Run(workdir, *arguments, devices=2) as run:
            assert run.wait() == 0, run.output()
        assert [line["step"] for line in read_metrics(workdir)] == list(range(1, 61))
    first, second = (np.array([line["loss"] for line in read_metrics(tmp_path / f"target{host}")]) for host in (0, 1))
    np.testing.assert_allclose(first, second, rtol=1e-4)


# ---- Hosts that die or hang ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["KILL", "STOP"])
@pytest.mark.parametrize("victim", [0, 1])
def test_if_one_host_dies_or_hangs_the_other_ends_and_the_run_resumes(tmp_path, fault, victim, record_property):
    """The status is 75 if our code notices first, 134 if jax does; launch/ restarts both."""
    arguments = [f"{TINY}60", "--config.mesh.data=2", f"--config.checkpoint.every_steps={EVERY}"]
    arguments += ["--config.faults.host_seconds=10", "--config.faults.hang_seconds=60"]
    with contextlib.ExitStack() as stack:
        hosts = [stack.enter_context(host) for host in start_hosts(tmp_path / "run", 2, *arguments)]
        hosts[0].wait_for_steps(20)
        hosts[victim].process.send_signal(getattr(signal, f"SIG{fault}"))
        begin, other = time.monotonic(), hosts[1 - victim]
        assert other.wait(timeout=60) in (75, -signal.SIGABRT), other.output()
        record_property(
            f"seconds until the other host ends, where host {victim} gets SIG{fault}", f"{time.monotonic() - begin:.0f}"
        )
        output = other.output()
        assert "Another host of the run seems to be lost" in output or "another task died" in output
    newest = max(saved_steps(tmp_path / "run"))
    assert newest >= 8
    with contextlib.ExitStack() as stack:
        hosts = [stack.enter_context(host) for host in start_hosts(tmp_path / "run", 2, *arguments)]
        assert [host.wait() for host in hosts] == [0, 0], hosts[0].output()
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(1, 61))
    assert read_events(tmp_path / "run")[-2]["resumed"]


DISK = """
import os, pathlib, time
import PIL.Image
opened = PIL.Image.open
def open(*args, **kwargs):
    while pathlib.Path(os.environ["UNAVAILABLE"]).exists():
        time.sleep(0.1)
    return opened(*args, **kwargs)
PIL.Image.open = open
"""


@contextlib.contextmanager
def _hanging(folder, monkeypatch, *more):
    """A run whose images are on a disk that stops responding, as network disks may."""
    make(folder, captions=1, conversations=24)
    (folder / "disk").mkdir()
    (folder / "disk" / "sitecustomize.py").write_text(DISK)  # imported by Python at startup
    monkeypatch.setenv("PYTHONPATH", f"{folder / 'disk'}{os.pathsep}{os.environ['PYTHONPATH']}")
    monkeypatch.setenv("UNAVAILABLE", str(folder / "unavailable"))
    files = {"data.source": "llava", "data.annotations": "llava_v1_5_mix665k.json", "data.images": "images"}
    changes = files | {"data.max_length": 192, "mesh.data": 1, "global_batch_size": 4, "checkpoint.every_steps": 1000}
    arguments = [f"{TINY}5000", *(f"--config.{key}={value}" for key, value in changes.items())]
    with Run(folder / "run", *arguments, *more) as run:
        run.wait_for_steps(8)
        (folder / "unavailable").touch()
        yield run


def test_the_watchdog_ends_a_run_that_hangs(tmp_path, monkeypatch, record_property):
    with _hanging(tmp_path, monkeypatch, "--config.faults.hang_seconds=45") as run:
        begin = time.monotonic()
        assert run.wait(timeout=120) == 75
        seconds = time.monotonic() - begin
        record_property("seconds until a hanging run ends, with faults.hang_seconds=45", f"{seconds:.0f}")
        assert 40 < seconds < 60  # from when it hangs, not from its start
        assert "error: No progress for 45 s (faults.hang_seconds) since step" in run.output()
    stacks = (tmp_path / "run" / "hang.host0.txt").read_text()
    assert "pipeline.py" in stacks


# ---- A full disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """A disk of eight megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", folder], capture_output=True).returncode:
        pytest.skip("cannot mount a file system; tests/checkpointing/test_damage.py limits the size of files instead")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_is_tolerated_for_a_while(disk):
    """If space is freed in time, saving works again; otherwise the run ends with status 1, and can be resumed later."""
    arguments = [f"{TINY}240", "--config.mesh.data=1", "--config.checkpoint.every_steps=20"]
    workdir, filling = disk / "run", disk / "filling"

    def fill():
        with contextlib.suppress(OSError), filling.open("wb") as file:
            while True:
                file.write(bytes(4096))
                file.flush()

    with Run(workdir, *arguments) as run:
        run.wait_for(lambda: len(saved_steps(workdir)) == 2)
        fill()
        run.wait_for(lambda: "could not be saved (No space left on device)" in run.output())
        before = saved_steps(workdir)
        filling.unlink()
        run.wait_for(lambda: max(saved_steps(workdir)) > max(before))
        fill()
        assert run.wait() == 1, run.output()
    assert "(No space left on device). Fix the cause" in run.output().splitlines()[-1]
    assert "Traceback" not in run.output()
    newest = max(saved_steps(workdir))
    filling.unlink()
    with Run(workdir, *arguments) as run:
        assert run.wait() == 0, run.output()
    assert read_events(workdir)[-2]["step"] == newest
    assert read_metrics(workdir)[-1]["step"] == 240
