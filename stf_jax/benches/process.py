"""A step of a benchmark as a process of its own: how long it takes, and the most memory it holds."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any


def measured(what: str, arguments: Sequence[str], **environment: str) -> dict[str, Any]:
    """Runs Python with those arguments; gives ``what``, ``seconds`` and ``gib``, the peak of resident memory.

    Memory is as Linux has it, pages of mapped files included. A last line of standard output that is a JSON object is
    joined to that, and wins. ``environment`` is added to the process's own.

    Raises:
      MemoryError: it was killed.
    """
    start, peak = time.monotonic(), 0
    environment = os.environ | environment
    with subprocess.Popen([sys.executable, *arguments], env=environment, stdout=subprocess.PIPE, text=True) as child:
        status = pathlib.Path(f"/proc/{child.pid}/status")
        while child.poll() is None:
            # The kernel's own high-water mark, so that nothing between two looks is missed.
            peak = max([peak, *(int(line.split()[1]) for line in _lines(status) if line.startswith("VmHWM"))])
            time.sleep(0.02)
        said = child.stdout.read().strip().split("\n")[-1]
    if child.returncode == -signal.SIGKILL:
        raise MemoryError(f"{what} was killed, as the system does for want of memory.")
    if child.returncode:
        raise RuntimeError(f"{what} failed with status {child.returncode}.")
    row = {"what": what, "seconds": time.monotonic() - start, "gib": peak / 2**20}
    return row | (json.loads(said) if said.startswith("{") else {})


def _lines(file):
    try:
        return file.read_text().splitlines()
    except OSError:  # the process has ended
        return []
