"""One live run a workdir: a lock that ends with its process; in a bucket, which has none, a note that is renewed."""

import contextlib
import errno
import fcntl
import itertools
import json
import logging
import os
import pathlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from stf_jax.config import UserError
from stf_jax.runtime.files import in_bucket, make_folder, writing

NAME = "run.lock"
_PATIENCE = 1.0  # seconds: a run that was killed may take as long to be gone
_RENEWED = 20.0  # seconds between a bucket's notes
_LOCKLESS = errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS  # of disks that know no locks

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def hold(workdir: epath.Path) -> Iterator[None]:
    """Makes a workdir and keeps other runs from it, until the block or the process ends, however that ends.

    Raises:
      UserError: another run holds it, or it cannot be made.
    """
    make_folder(workdir)
    note = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }
    with (_renewed if in_bucket(workdir) else _locked)(workdir / NAME, note):
        yield


def holder(workdir: epath.Path) -> dict[str, Any] | None:
    """``host``, ``pid`` and ``since`` of the run that holds a workdir, or None; changes nothing.

    A bucket's note may be of a run that died: who wants to know waits for whether it is renewed.
    """
    path = workdir / NAME
    if in_bucket(path):
        return _read(path) if _renews(path) else None
    try:
        with pathlib.Path(path).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read(path)
    except OSError:
        return None
    return None


@contextlib.contextmanager
def _locked(path, note):
    with writing(path):
        file = pathlib.Path(path).open("a", encoding="utf-8")  # noqa: SIM115
    with file:
        lock(file, path, lambda: _refusal(path))
        with writing(path):
            file.truncate(0)
            file.write(json.dumps(note))
            file.flush()
        yield


def lock(file: Any, path: epath.Path, refusal: Callable[[], str]) -> None:
    """Locks what is open, for as long as it is; one who was just killed may still have it for a second.

    Args:
      file: a file, or its number.
      path: what a message calls it.
      refusal: gives the sentence to a UserError where another process has it.
    """
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise UserError(refusal()) from None
            time.sleep(0.05)
        except OSError as error:
            if error.errno not in _LOCKLESS:
                raise UserError(f"{path} cannot be locked: {error.strerror}.") from None
            return _log.warning("%s is on a disk without locks: see that no other run uses it.", path)


@contextlib.contextmanager
def _renewed(path, note):
    if path.exists():
        _log.info("Another run was in this workdir; waiting for whether it lives.")
        if _renews(path):
            raise UserError(_refusal(path))
    ended = threading.Event()

    def write(turn):
        path.write_text(json.dumps(note | {"renewed": turn}))

    def renew():
        for turn in itertools.count(1):
            if ended.wait(_RENEWED):
                return
            with contextlib.suppress(Exception):  # of the bucket's library; the next one may come through
                write(turn)

    with writing(path):
        write(0)
    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        path.unlink(missing_ok=True)


def _renews(path):
    """Whether a note is renewed while one waits for it; clocks of different machines need not agree."""
    before = _read(path)
    if before is None:
        return False
    end = time.monotonic() + 2 * _RENEWED
    while time.monotonic() < end:
        time.sleep(_RENEWED / 10)
        now = _read(path)
        if now is not None and now != before:
            return True
    return False


def _read(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _refusal(path):
    who = _read(path) or {"pid": "?", "host": "?", "since": "?"}
    return (
        f"The workdir {path.parent} is in use by another run (process {who['pid']} on {who['host']}, since "
        f"{who['since']}); wait for it, end it, or choose another --workdir."
    )
