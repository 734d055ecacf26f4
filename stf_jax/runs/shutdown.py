"""Graceful stop on SIGTERM, and a watchdog for hangs."""

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
from stf_jax.files import in_bucket
from stf_jax.parallel.hosts import any_process

_DUMP_TIMEOUT = 10  # seconds to write the stack traces of a hang
_LAG = 2  # steps that the devices may be behind when a host reads whether to stop


class Termination:
    """Handles SIGTERM, which clusters send before they take a machine: all hosts stop after the same step.

    Until :meth:`enable_graceful_stop` there is nothing to save, and the process ends at once; so it does at a second
    SIGTERM. Signals are also received while Python waits for a compiler or a device, when Python handlers do not run.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._received = self._graceful = False
        self._devices = mesh.local_mesh.devices.size
        self._pending: collections.deque[jax.Array] = collections.deque()
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._any = jax.jit(lambda x: x.max(), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __enter__(self) -> "Termination":
        self._installed = threading.current_thread() is threading.main_thread()  # only it may set signal handlers
        if self._installed:
            self._reader, writer = socket.socketpair()
            writer.setblocking(False)
            handler = signal.signal(signal.SIGTERM, lambda *_: None)
            self._restore = handler, signal.set_wakeup_fd(writer.fileno()), writer
            threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._installed:
            handler, descriptor, writer = self._restore
            signal.set_wakeup_fd(descriptor)
            signal.signal(signal.SIGTERM, handler)
            writer.close()  # ends the thread

    def _listen(self) -> None:
        with self._reader:
            while received := self._reader.recv(1):
                if received[0] != signal.SIGTERM:
                    continue
                if self._received or not self._graceful:
                    _print("Ended by SIGTERM; run the same command to resume from the last checkpoint.")
                    os._exit(Stopped.status)
                self._received = True
                _print("SIGTERM: finishing and saving the current step, then stopping.")

    def enable_graceful_stop(self) -> None:
        """From now on, the first SIGTERM stops the run after a step instead of ending the process."""
        self._graceful = True

    def should_stop_after_step(self) -> bool:
        """Whether to stop after the step just dispatched; the same on all hosts.

        No host waits for another: each host's flag is dispatched behind the step, and read when the devices get there.
        """
        if jax.process_count() == 1:
            return self._received
        flags = np.full(self._devices, self._received, np.int32)
        self._pending.append(self._any(jax.make_array_from_process_local_data(self._sharding, flags)))
        return len(self._pending) > _LAG and bool(self._pending.popleft())

    def should_stop_now(self) -> bool:
        """Whether any host received SIGTERM. All hosts must call this together, with no work in flight."""
        return any_process(self._received)


class Watchdog:
    """Ends this process when it makes no progress: if one host hangs, the others would wait forever."""

    def __init__(self, seconds: float, workdir: epath.Path) -> None:
        """Watches nothing yet.

        Args:
          seconds: time without a heartbeat that counts as a hang; 0 disables the watchdog.
          workdir: the stack traces of a hang are written there.
        """
        self._seconds, self._workdir, self._ended = seconds, workdir, threading.Event()
        self._activity, self._last = "the start", time.monotonic()
        self._name = f"hang.host{jax.process_index()}.txt"

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def heartbeat(self, activity: str) -> None:
        """Reports progress; ``activity`` names what was just done, in a few words."""
        self._activity, self._last = activity, time.monotonic()

    def _watch(self) -> None:
        while not self._ended.wait(min(self._seconds / 10, 1.0)):
            if time.monotonic() - self._last > self._seconds:
                _print(
                    f"error: No progress for {self._seconds:g} s (faults.hang_seconds) since {self._activity}, so this "
                    "host or another hangs. Run the same command to resume from the last checkpoint "
                    f"(stack traces: {self._dump_stacks()})."
                )
                os._exit(TryAgain.status)

    def _dump_stacks(self) -> pathlib.Path | str:
        """Writes the stacks of all threads; returns the path. Gives up soon: the workdir's disk may be what hangs."""
        written: list[pathlib.Path] = []

        def write() -> None:
            local = not in_bucket(self._workdir) and self._workdir.exists()
            path = pathlib.Path(self._workdir if local else tempfile.gettempdir()) / self._name
            with contextlib.suppress(OSError), path.open("w") as file:
                faulthandler.dump_traceback(file)
                written.append(path)

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        writer.join(timeout=_DUMP_TIMEOUT)
        return written[0] if written else "none could be written"


def _print(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
