"""One run per workdir: a second is refused while the first one's process lives, on a disk or in a bucket."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import pytest
from etils import epath
from run_process import ROOT

from stf_jax.cli import run_command
from stf_jax.config import UserError
from stf_jax.main import main
from stf_jax.runs import lock
from stf_jax.runs.lock import LOCK_NAME, lock_owner, workdir_lock

HOLD_LOCK = """
import sys, time
from etils import epath
from stf_jax.runs.lock import workdir_lock
with workdir_lock(epath.Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def _other_process(workdir):
    """Another process holds the workdir's lock."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK, str(workdir)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "locked\n"
        try:
            yield process
        finally:
            process.kill()


def test_workdir_is_locked_until_its_process_is_gone(tmp_path):
    workdir = epath.Path(tmp_path / "new" / "run")
    assert lock_owner(workdir) is None
    with _other_process(workdir) as process:
        for _ in range(2):  # asking changes nothing
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


def test_second_run_is_refused_and_deletes_nothing(tmp_path, capsys):
    """Partly written checkpoints in the workdir belong to the first run."""
    partial = tmp_path / "checkpoints" / "8.orbax-checkpoint-tmp"
    partial.mkdir(parents=True)
    with workdir_lock(epath.Path(tmp_path)):
        assert (
            run_command(main, [f"--config={ROOT}/tests/tiny.py", f"--workdir={tmp_path}", "--config.mesh.data=1"]) == 2
        )
    assert "is in use by another run" in capsys.readouterr().err
    assert partial.exists()
    assert not (tmp_path / "events.jsonl").exists()


def test_lock_waits_for_a_run_that_was_just_killed(tmp_path, monkeypatch):
    """Launch scripts restart a run at once."""
    with _other_process(tmp_path) as process:
        delays = []
        original_sleep = lock.time.sleep

        def sleep(seconds):
            delays.append(seconds)
            process.kill()
            process.wait()
            original_sleep(0)

        monkeypatch.setattr(lock.time, "sleep", sleep)
        with workdir_lock(epath.Path(tmp_path)):
            assert delays


def test_workdir_that_cannot_be_created_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"folder \S+/file/run cannot be created: Not a directory"),
        workdir_lock(epath.Path(tmp_path / "file" / "run")),
    ):
        pass


# ---- In a bucket -----------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A folder treated as a bucket, whose lease is renewed every half second."""
    monkeypatch.setattr(lock, "in_bucket", lambda path: True)
    monkeypatch.setattr(lock, "_RENEWAL_SECONDS", 0.5)
    return epath.Path(tmp_path)


def test_renewed_lease_refuses_other_runs(bucket):
    with workdir_lock(bucket):
        lease = json.loads((bucket / LOCK_NAME).read_text())
        assert lease["pid"] == os.getpid()
        assert lock_owner(bucket)["pid"] == os.getpid()
        with pytest.raises(UserError, match="in use by another run"), workdir_lock(bucket):
            pass
        assert lock_owner(bucket)["pid"] == os.getpid()  # the refused run did not remove it
    assert not (bucket / LOCK_NAME).exists()


def test_lease_of_a_dead_run_is_ignored(bucket):
    (bucket / LOCK_NAME).write_text('{"host": "gone", "pid": 1, "since": "2026", "renewed": 7}')
    assert lock_owner(bucket) is None
    with workdir_lock(bucket):
        assert json.loads((bucket / LOCK_NAME).read_text())["host"] != "gone"
