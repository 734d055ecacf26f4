"""Training runs as processes of their own, as a user starts them, to be signalled, killed and started again."""

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
# What is compiled is kept for whoever comes later in the same folder: that it is the same program each time matters.
_ENVIRONMENT = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
_PATIENCE = 240  # seconds


class Run:
    """A process that trains in a workdir.

    Attributes:
      log: the file with all that it says, behind what the run said before in that workdir.
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
        """Starts it.

        Args:
          name: tells hosts of one run apart.
          cached: whether what was compiled once beside the workdir is not compiled again.
          folder: where paths of data begin; the workdir's, unless it is given.
        """
        workdir.parent.mkdir(exist_ok=True)
        self.workdir, self.log = workdir, workdir.parent / f"{workdir.name}{name}.log"
        self._said = self.log.stat().st_size if self.log.exists() else 0
        cache = {"JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled")} if cached else {}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "stf_jax.main", f"--workdir={workdir}", *arguments],
                cwd=folder or workdir.parent,
                env=os.environ | _ENVIRONMENT | cache | {"JAX_NUM_CPU_DEVICES": str(devices)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.began = time.monotonic()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()

    def said(self) -> str:
        """What this process said."""
        return self.log.read_bytes()[self._said :].decode(errors="replace")

    def wait_for(self, come: Callable[[], bool]) -> None:
        """Until that is so. Fails where the process ends before."""
        end = time.monotonic() + _PATIENCE
        while not come():
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.said()}"
            assert time.monotonic() < end, f"it does not come:\n{self.said()}"
            time.sleep(0.002)

    def wait_for_lines(self, count: int) -> None:
        """Until so many steps are logged."""
        self.wait_for(lambda: len(lines(self.workdir)) >= count)

    def kill(self) -> None:
        """As the kernel does for want of memory, or a cluster for want of patience."""
        self.process.kill()
        assert self.process.wait() == -signal.SIGKILL, f"ended before it could be killed:\n{self.said()}"

    def ends(self, patience: float = _PATIENCE) -> int:
        """The exit status."""
        return self.process.wait(timeout=patience)


def together(
    workdir: pathlib.Path, hosts: int, *arguments: str, devices: int = 1, folder: pathlib.Path | None = None
) -> list[Run]:
    """Hosts of one run, with so many devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"--coordinator=127.0.0.1:{free.getsockname()[1]}"
    which = [[coordinator, f"--processes={hosts}", f"--process={host}"] for host in range(hosts)]
    how = {"devices": devices, "cached": False, "folder": folder}
    return [Run(workdir, *arguments, *which[host], name=f".{host}", **how) for host in range(hosts)]


def lines(workdir: pathlib.Path) -> list[str]:
    """The whole lines of ``metrics.jsonl``; one without its end is still being written."""
    path = workdir / "metrics.jsonl"
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []


def logged(workdir: pathlib.Path) -> list[dict]:
    """What they say."""
    return [json.loads(line) for line in lines(workdir)]


def events(workdir: pathlib.Path) -> list[dict]:
    """What ``events.jsonl`` says."""
    return [json.loads(line) for line in (workdir / "events.jsonl").read_text().splitlines()]


def saved(workdir: pathlib.Path) -> list[int]:
    """The steps of whole checkpoints, the newest last."""
    folder = workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []
