"""How a run's process ends before its time: because it is told to (SIGTERM), or because nothing happens any more."""

import collections
import contextlib
import faulthandler
import os
import pathlib
import signal
import socket
import sys
import tempfile
import threading
import time

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stf_jax.config import Stopped, TryAgain
from stf_jax.runtime.files import in_bucket
from stf_jax.runtime.hosts import any_says

_PATIENCE = 10  # seconds to write down what hangs
_LAG = 2  # steps that the devices may be behind when it is asked what the hosts said


class Termination:
    """SIGTERM, as clusters send it before they take a machine: any host hears it, and all stop after the same step.

    Before the first step there is nothing to save, and a process ends at once; so it does when it is told twice. It is
    heard also while Python waits for a compiler or a device, in which time handlers written in Python would not run.
    """

    def __init__(self, mesh: Mesh):
        self._heard = self._stepping = False
        self._devices = mesh.local_mesh.devices.size
        self._said: collections.deque[jax.Array] = collections.deque()
        self._places = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._any = jax.jit(lambda x: x.max(), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __enter__(self) -> "Termination":
        self._mine = threading.current_thread() is threading.main_thread()  # signals are no other thread's matter
        if self._mine:
            self._hear, tell = socket.socketpair()
            tell.setblocking(False)
            self._before = signal.signal(signal.SIGTERM, lambda *_: None), signal.set_wakeup_fd(tell.fileno()), tell
            threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        if self._mine:
            handler, descriptor, tell = self._before
            signal.set_wakeup_fd(descriptor)
            signal.signal(signal.SIGTERM, handler)
            tell.close()  # which ends the thread

    def _listen(self):
        with self._hear:
            while told := self._hear.recv(1):
                if told[0] != signal.SIGTERM:
                    continue
                if self._heard or not self._stepping:
                    _say("Ended by SIGTERM; the same command goes on from the last checkpoint.")
                    os._exit(Stopped.status)
                self._heard = True
                _say("SIGTERM: the step is finished and saved before this ends.")

    def stepping(self) -> None:
        """From now on there is something to save."""
        self._stepping = True

    def after_step(self) -> bool:
        """Whether to stop after the step that the devices were just given: the same on all hosts.

        No host waits for another: what they say goes behind the step, and is read when the devices have come to it.
        """
        if jax.process_count() == 1:
            return self._heard
        mine = np.full(self._devices, self._heard, np.int32)
        self._said.append(self._any(jax.make_array_from_process_local_data(self._places, mine)))
        return len(self._said) > _LAG and bool(self._said.popleft())

    def now(self) -> bool:
        """The same, where all hosts have nothing on their way."""
        return any_says(self._heard)


class Watchdog:
    """Ends this process when it has not come on for a while: where one host hangs, the others would wait for ever."""

    def __init__(self, seconds: float, workdir: epath.Path):
        """``seconds``: 0 for no such end. ``workdir``: gets what every thread was at."""
        self._seconds, self._workdir, self._ended = seconds, workdir, threading.Event()
        self._at, self._last = "the start", time.monotonic()
        self._name = f"hang.host{jax.process_index()}.txt"

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()

    def comes_to(self, what: str) -> None:
        """This process has come on, to ``what``, a few words."""
        self._at, self._last = what, time.monotonic()

    def _watch(self):
        while not self._ended.wait(min(self._seconds / 10, 1.0)):
            if time.monotonic() - self._last > self._seconds:
                _say(
                    f"error: Nothing has happened for {self._seconds:g} s (faults.hang_seconds) since {self._at}, so "
                    "this host or another hangs; start the same command again, and it goes on from the last "
                    f"checkpoint ({self._stacks()} tells what this process was at)."
                )
                os._exit(TryAgain.status)

    def _stacks(self):
        """Where what all threads are at was written; not for long, for it may be the workdir's disk that hangs."""
        written = []

        def write():
            here = not in_bucket(self._workdir) and self._workdir.exists()
            path = pathlib.Path(self._workdir if here else tempfile.gettempdir()) / self._name
            with contextlib.suppress(OSError), path.open("w") as file:
                faulthandler.dump_traceback(file)
                written.append(path)

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        writer.join(timeout=_PATIENCE)
        return written[0] if written else "no file"


def _say(sentence):
    print(sentence, file=sys.stderr, flush=True)
