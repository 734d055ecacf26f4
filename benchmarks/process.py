"""Time and peak memory of a benchmark step in a separate process."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any


def measure_process(
    name: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Runs Python with these arguments; returns ``what``, ``seconds`` and ``gib``, the peak resident memory.

    Linux counts pages of mapped files as resident memory. If the last line of standard output is a JSON object, its
    keys are added and take precedence.

    Args:
      name: the value of ``what``.
      environment: added to the environment of this process.

    Raises:
      MemoryError: the process was killed.
    """
    start, peak = time.monotonic(), 0
    variables = os.environ | (environment or {})
    with subprocess.Popen([sys.executable, *arguments], env=variables, stdout=subprocess.PIPE, text=True) as child:
        status = pathlib.Path(f"/proc/{child.pid}/status")
        while child.poll() is None:
            # The high-water mark of the kernel includes peaks between two reads.
            peak = max([peak, *(int(line.split()[1]) for line in _read_lines(status) if line.startswith("VmHWM"))])
            time.sleep(0.02)
        assert child.stdout is not None  # it is a pipe
        last_line = child.stdout.read().strip().split("\n")[-1]
    if child.returncode == -signal.SIGKILL:
        raise MemoryError(f"{name} was killed, probably because it ran out of memory.")
    if child.returncode:
        raise RuntimeError(f"{name} failed with status {child.returncode}.")
    row = {"what": name, "seconds": time.monotonic() - start, "gib": peak / 2**20}
    return row | (json.loads(last_line) if last_line.startswith("{") else {})


def _read_lines(file: pathlib.Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:  # the process has exited
        return []
