"""One live run a workdir: another is refused while its process lives, on a disk or in a bucket, and not after."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import pytest
from etils import epath
from run_process import ROOT

from stf_jax.config import UserError
from stf_jax.main import main
from stf_jax.runtime import lock as module
from stf_jax.runtime.cli import run_command
from stf_jax.runtime.lock import LOCK_NAME, lock_owner, workdir_lock

HOLDS = """
import sys, time
from etils import epath
from stf_jax.runtime.lock import workdir_lock
with workdir_lock(epath.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def _other(workdir):
    """Meanwhile, a process of its own holds the workdir."""
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(workdir)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_workdir_in_use_is_refused_until_its_process_is_gone(tmp_path):
    workdir = epath.Path(tmp_path / "new" / "run")
    assert lock_owner(workdir) is None
    with _other(workdir) as process:
        for _ in range(2):  # to ask changes nothing
            assert lock_owner(workdir)["pid"] == process.pid
        with (
            pytest.raises(
                UserError, match=rf"{workdir} is in use by another run .process {process.pid} on \S+, since 2.* UTC."
            ),
            workdir_lock(workdir),
        ):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert lock_owner(workdir) is None
    with workdir_lock(workdir):
        assert lock_owner(workdir)["pid"] == os.getpid()
    assert lock_owner(workdir) is None


def test_a_second_run_is_refused_and_clears_nothing_away(tmp_path, capsys):
    """What is half-written in the workdir, the first is writing."""
    half = tmp_path / "checkpoints" / "8.orbax-checkpoint-tmp"
    half.mkdir(parents=True)
    with workdir_lock(epath.Path(tmp_path)):
        assert (
            run_command(main, [f"--config={ROOT}/tests/tiny.py", f"--workdir={tmp_path}", "--config.mesh.data=1"]) == 2
        )
    assert "is in use by another run" in capsys.readouterr().err
    assert half.exists()
    assert not (tmp_path / "events.jsonl").exists()


def test_a_run_that_was_just_killed_is_waited_for(tmp_path, monkeypatch):
    """As a launch script meets it, which starts again at once."""
    with _other(tmp_path) as process:
        refusals = []
        real = module.time.sleep

        def sleep(seconds):
            refusals.append(seconds)
            process.kill()
            process.wait()
            real(0)

        monkeypatch.setattr(module.time, "sleep", sleep)
        with workdir_lock(epath.Path(tmp_path)):
            assert refusals


def test_a_workdir_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"folder \S+/file/run cannot be created: Not a directory"),
        workdir_lock(epath.Path(tmp_path / "file" / "run")),
    ):
        pass


# ---- In a bucket -----------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A folder that is taken for a bucket, and notes renewed every half a second."""
    monkeypatch.setattr(module, "in_bucket", lambda path: True)
    monkeypatch.setattr(module, "_RENEWAL_SECONDS", 0.5)
    return epath.Path(tmp_path)


def test_a_note_that_is_renewed_keeps_others_away(bucket):
    with workdir_lock(bucket):
        note = json.loads((bucket / LOCK_NAME).read_text())
        assert note["pid"] == os.getpid()
        assert lock_owner(bucket)["pid"] == os.getpid()
        with pytest.raises(UserError, match="in use by another run"), workdir_lock(bucket):
            pass
        assert lock_owner(bucket)["pid"] == os.getpid()  # the refused one took nothing away
    assert not (bucket / LOCK_NAME).exists()


def test_a_note_of_the_dead_is_passed_over(bucket):
    (bucket / LOCK_NAME).write_text('{"host": "gone", "pid": 1, "since": "2026", "renewed": 7}')
    assert lock_owner(bucket) is None
    with workdir_lock(bucket):
        assert json.loads((bucket / LOCK_NAME).read_text())["host"] != "gone"
