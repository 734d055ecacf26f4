"""Runs a study's unfinished cells, several at once if the machine has the devices."""

import concurrent.futures
import dataclasses
import os
import pathlib
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Sequence

import tqdm
from etils import epath

from stf_jax.config import TryAgain, UserError
from stf_jax.evals.runner import RESULTS, flatten_metrics, format_metric
from stf_jax.files import make_folder, read_json, write_json
from stf_jax.studies.study import EVAL_OPTIONS_FILE, Cell
from stf_jax.table import format_duration

LOG = "log.txt"  # in each cell's folder
_MAX_TRIES = 3  # for a cell that fails for a transient reason
_RUN_MEMORY = 2 * 2**30  # bytes of host memory for a run of the miniatures, with a reserve
# Few heaps with huge pages: by default, each step on a CPU returns its buffers to the system and allocates new ones,
# which takes a third of its time.
_MALLOC = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
}


@dataclasses.dataclass(frozen=True)
class Slot:
    """A share of this machine, which runs one cell at a time."""

    cpus: frozenset[int]
    environment: dict[str, str]


def make_slots(jobs: int) -> list[Slot]:
    """Divides the machine into ``jobs`` slots.

    If ``jobs`` is 0, there is one slot per GPU, one for all TPU chips, or one per CPU as memory permits.

    Raises:
      UserError: ``jobs`` exceeds the number of GPUs or CPUs.
    """
    cpus = sorted(os.sched_getaffinity(0))
    gpus = sorted(path.name.removeprefix("nvidia") for path in pathlib.Path("/dev").glob("nvidia[0-9]*"))
    gpus = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(gpus)).split(",") if gpu]
    tpu = any(pathlib.Path("/dev").glob("accel[0-9]*"))
    if gpus:
        default = len(gpus)
    elif tpu:
        default = 1
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        default = min(len(cpus), max(1, memory // _RUN_MEMORY))
    jobs = jobs or default
    if jobs > (1 if tpu else len(gpus or cpus)):
        raise UserError(f"--jobs={jobs} exceeds the number of devices of this machine; omit it.")
    shares = [frozenset(cpus[i::jobs]) for i in range(min(jobs, len(cpus)))]
    environments = [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[i::jobs])} if gpus else dict(_MALLOC) for i in range(jobs)]
    return [Slot(shares[i % len(shares)], environment) for i, environment in enumerate(environments)]


def run_cells(cells: Sequence[Cell], slots: Sequence[Slot], cache: pathlib.Path) -> dict[Cell, str]:
    """Runs the unfinished cells, training first and evaluations after, and prints a line for each.

    Args:
      cache: the folder of compiled programs, so that runs which differ only in their seeds compile once.

    Returns:
      The reason of failure for each failed cell. A failure does not stop the other cells.

    Raises:
      UserError: a cell's folder contains another run.
    """
    unfinished = [cell for cell in cells if not cell.done]
    print(f"{len(cells)} runs, {len(cells) - len(unfinished)} already done")
    if not unfinished:
        return {}
    free_slots: queue.Queue[Slot] = queue.Queue()
    for slot in slots:
        free_slots.put(slot)
    processes = _CellProcesses(free_slots, cache)
    failed: dict[Cell, str] = {}
    start = time.monotonic()
    training = [cell for cell in unfinished if cell.source_run is None]
    evaluations = [cell for cell in unfinished if cell.source_run is not None]
    for group in (training, evaluations):
        with concurrent.futures.ThreadPoolExecutor(len(slots)) as pool:
            bar = tqdm.tqdm(total=len(group), unit="run", disable=not group, mininterval=0.5)
            try:
                futures = {pool.submit(processes.run, cell): cell for cell in group}
                for future in concurrent.futures.as_completed(futures):
                    cell, error = futures[future], future.result()
                    bar.update()
                    if error:
                        failed[cell] = error
                    bar.write(f"{cell.name}: {error or _format_summary(cell)}")
            except BaseException:
                processes.terminate()
                pool.shutdown(cancel_futures=True)
                raise
            finally:
                bar.close()
    print(f"{len(unfinished)} runs took {format_duration(time.monotonic() - start)}")
    return failed


class _CellProcesses:
    """Runs cells in child processes."""

    def __init__(self, free_slots: queue.Queue[Slot], cache: pathlib.Path) -> None:
        self._free_slots, self._cache = free_slots, cache
        self._children: set[subprocess.Popen[bytes]] = set()
        self._lock, self._terminated = threading.Lock(), False

    def run(self, cell: Cell) -> str:
        """Runs a cell, waits for it, and returns an error message, or an empty string."""
        slot = self._free_slots.get()
        try:
            make_folder(epath.Path(cell.folder))
            if cell.source_run is not None:
                if not (cell.source_run / RESULTS).exists():
                    return f"{cell.source_run}, which it evaluates, has no results"
                write_json(epath.Path(cell.folder / EVAL_OPTIONS_FILE), list(cell.variant.eval_options))
            for _ in range(_MAX_TRIES):
                status = self._run_process(cell, slot)
                if status != TryAgain.status:
                    break
            if status == 0:
                return ""
            last_line = (cell.folder / LOG).read_text(errors="replace").strip().splitlines()[-1:]
            return f"ended with status {status} ({cell.folder / LOG}): {''.join(last_line)}"
        finally:
            self._free_slots.put(slot)

    def _run_process(self, cell: Cell, slot: Slot) -> int:
        # Sets this thread's affinity. The child inherits it before its libraries count CPUs.
        os.sched_setaffinity(0, slot.cpus)
        environment = {"JAX_COMPILATION_CACHE_DIR": str(self._cache), **os.environ, **slot.environment}
        with (cell.folder / LOG).open("ab") as log, self._lock:
            if self._terminated:
                return -signal.SIGTERM
            child = subprocess.Popen(cell.command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            self._children.add(child)
        status = child.wait()
        with self._lock:
            self._children.discard(child)
        return status

    def terminate(self) -> None:
        """Sends SIGTERM to the runs, so that they save and exit, and starts no more."""
        with self._lock:
            self._terminated = True
            for child in self._children:
                child.terminate()


def _format_summary(cell: Cell) -> str:
    """Formats the first metrics of a cell."""
    results = read_json(epath.Path(cell.folder / RESULTS))
    first = results[0] if isinstance(results, list) else results
    metrics = [(name, value) for name, value in flatten_metrics(first).items() if name.count("/") == 1]
    return ", ".join(f"{name} {format_metric(name, value)}" for name, value in metrics[:2])
