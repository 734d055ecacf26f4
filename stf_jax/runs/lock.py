"""Ensures one run per workdir: an flock on disks; in buckets, a lease file that is renewed."""

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
from typing import IO, Any

from etils import epath

from stf_jax.config import UserError
from stf_jax.files import as_user_error, in_bucket, make_folder

LOCK_NAME = "run.lock"
_TIMEOUT = 1.0  # seconds: a run that was just killed may hold its lock that long
_RENEWAL_SECONDS = 20.0  # between two writes of a bucket's lease
_LOCKS_UNSUPPORTED = errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS  # from file systems without locks

Owner = dict[str, Any]  # host, pid and since of the run that holds a lock
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def workdir_lock(workdir: epath.Path) -> Iterator[None]:
    """Creates a workdir and locks it until the block or the process ends, even if the process is killed.

    Raises:
      UserError: another run holds the lock, or the workdir cannot be created.
    """
    make_folder(workdir)
    owner = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }
    with (_lease if in_bucket(workdir) else _file_lock)(workdir / LOCK_NAME, owner):
        yield


def lock_owner(workdir: epath.Path) -> Owner | None:
    """Returns ``host``, ``pid`` and ``since`` of the run that holds a workdir's lock, or None. Changes nothing.

    A bucket's lease may belong to a dead run, so there this waits to see whether it is renewed.
    """
    path = workdir / LOCK_NAME
    if in_bucket(path):
        return _read(path) if _is_renewed(path) else None
    try:
        with pathlib.Path(path).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read(path)
    except OSError:
        return None
    return None


@contextlib.contextmanager
def _file_lock(path: epath.Path, owner: Owner) -> Iterator[None]:
    with as_user_error(path):
        file = pathlib.Path(path).open("a", encoding="utf-8")  # noqa: SIM115
    with file:
        lock_file(file, path, lambda: _in_use_message(path))
        with as_user_error(path):
            file.truncate(0)
            file.write(json.dumps(owner))
            file.flush()
        yield


def lock_file(file: IO[Any] | int, path: epath.Path, in_use_message: Callable[[], str]) -> None:
    """Locks an open file until it is closed; waits a second for a process that was just killed to release it.

    Args:
      file: a file object or descriptor.
      path: its name in messages.
      in_use_message: returns the message of the UserError when another process holds the lock.

    Raises:
      UserError: another process holds the lock, or the file cannot be locked.
    """
    end = time.monotonic() + _TIMEOUT
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise UserError(in_use_message()) from None
            time.sleep(0.05)
        except OSError as error:
            if error.errno not in _LOCKS_UNSUPPORTED:
                raise UserError(f"{path} cannot be locked: {error.strerror}.") from None
            return _log.warning("%s is on a file system without locks: make sure that no other run uses it.", path)


@contextlib.contextmanager
def _lease(path: epath.Path, owner: Owner) -> Iterator[None]:
    if path.exists():
        _log.info("Another run used this workdir; waiting to see whether it is still alive.")
        if _is_renewed(path):
            raise UserError(_in_use_message(path))
    ended = threading.Event()

    def write(count: int) -> None:
        path.write_text(json.dumps(owner | {"renewed": count}))

    def renew() -> None:
        for count in itertools.count(1):
            if ended.wait(_RENEWAL_SECONDS):
                return
            with contextlib.suppress(Exception):  # the bucket library's; the next write may succeed
                write(count)

    with as_user_error(path):
        write(0)
    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        path.unlink(missing_ok=True)


def _is_renewed(path: epath.Path) -> bool:
    """Waits to see whether a lease is renewed. Compares contents, because clocks of machines may disagree."""
    before = _read(path)
    if before is None:
        return False
    end = time.monotonic() + 2 * _RENEWAL_SECONDS
    while time.monotonic() < end:
        time.sleep(_RENEWAL_SECONDS / 10)
        now = _read(path)
        if now is not None and now != before:
            return True
    return False


def _read(path: epath.Path) -> Owner | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _in_use_message(path: epath.Path) -> str:
    owner = _read(path) or {"pid": "?", "host": "?", "since": "?"}
    return (
        f"The workdir {path.parent} is in use by another run (process {owner['pid']} on {owner['host']}, since "
        f"{owner['since']}); wait for it, end it, or choose another --workdir."
    )
