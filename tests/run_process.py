"""Runs training in subprocesses, as a user does, for tests that signal, kill and restart it."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).parent.parent
# Caches every compiled program for later runs in the same folder; it must be the same program each time.
_ENVIRONMENT = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
_TIMEOUT = 240  # seconds


class Run:
    """A process that trains in a workdir.

    Attributes:
      log: the file that its output is appended to; it may have that of earlier processes in the same workdir.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        *arguments: str,
        devices: int = 1,
        name: str = "",
        cached: bool = True,
        folder: pathlib.Path | None = None,
    ):
        """Starts the process.

        Args:
          workdir: the run's workdir.
          *arguments: further command-line arguments.
          devices: number of simulated devices.
          name: distinguishes the logs of several hosts.
          cached: whether to use the compilation cache beside the workdir.
          folder: the working directory, for relative paths of data; default: the workdir's parent.
        """
        workdir.parent.mkdir(exist_ok=True)
        self.workdir, self.log = workdir, workdir.parent / f"{workdir.name}{name}.log"
        self._log_start = self.log.stat().st_size if self.log.exists() else 0
        cache = {"JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled")} if cached else {}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "stf_jax.main", f"--workdir={workdir}", *arguments],
                cwd=folder or workdir.parent,
                env=os.environ | _ENVIRONMENT | cache | {"JAX_NUM_CPU_DEVICES": str(devices)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.start_time = time.monotonic()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()

    def output(self) -> str:
        """Returns the output of this process so far."""
        return self.log.read_bytes()[self._log_start :].decode(errors="replace")

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Waits until the condition holds. Fails if the process ends first."""
        end = time.monotonic() + _TIMEOUT
        while not condition():
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.output()}"
            assert time.monotonic() < end, f"timed out:\n{self.output()}"
            time.sleep(0.002)

    def wait_for_steps(self, count: int) -> None:
        """Waits until this many steps are logged."""
        self.wait_for(lambda: len(metric_lines(self.workdir)) >= count)

    def kill(self) -> None:
        """Kills the process, as the kernel does when memory runs out, or a cluster after the grace period."""
        self.process.kill()
        assert self.process.wait() == -signal.SIGKILL, f"ended before it could be killed:\n{self.output()}"

    def wait(self, timeout: float = _TIMEOUT) -> int:
        """Waits for the process to end; returns its exit status."""
        return self.process.wait(timeout=timeout)


def start_hosts(
    workdir: pathlib.Path, hosts: int, *arguments: str, devices: int = 1, folder: pathlib.Path | None = None
) -> list[Run]:
    """Starts the hosts of one run, each with this many devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"--coordinator=127.0.0.1:{free.getsockname()[1]}"
    return [
        Run(
            workdir,
            *arguments,
            coordinator,
            f"--processes={hosts}",
            f"--process={host}",
            name=f".{host}",
            devices=devices,
            cached=False,
            folder=folder,
        )
        for host in range(hosts)
    ]


def metric_lines(workdir: pathlib.Path) -> list[str]:
    """Reads the complete lines of ``metrics.jsonl``; the last line may still be being written."""
    path = workdir / "metrics.jsonl"
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []


def read_metrics(workdir: pathlib.Path) -> list[dict]:
    """Reads the objects of ``metrics.jsonl``."""
    return [json.loads(line) for line in metric_lines(workdir)]


def read_events(workdir: pathlib.Path) -> list[dict]:
    """Reads the objects of ``events.jsonl``."""
    return [json.loads(line) for line in (workdir / "events.jsonl").read_text().splitlines()]


def saved_steps(workdir: pathlib.Path) -> list[int]:
    """Lists the steps of complete checkpoints, newest last."""
    folder = workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []
