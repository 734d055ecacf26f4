"""Runs a study's cells, several at once where there are devices for it. What is done is not done again."""

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
from stf_jax.runtime.files import make_folder, read_json, write_json
from stf_jax.runtime.table import format_duration
from stf_jax.studies.study import ASKED, Cell

LOG = "log.txt"  # of each cell
_TRIES = 3  # of a cell whose machine is to blame
_HOST_MEMORY = 2 * 2**30  # bytes that a run of the miniatures takes, and room
# Few heaps, of huge pages: by default each step of a CPU gives its buffers back and is given new ones, which takes a
# third of its time.
_MALLOC = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
}


@dataclasses.dataclass(frozen=True)
class Slot:
    """A share of this machine for one cell at a time."""

    processors: frozenset[int]
    environment: dict[str, str]


def slots(jobs: int) -> list[Slot]:
    """Shares for so many cells at once; for 0, one a GPU, or one a processor as far as memory goes; all of a TPU.

    Raises:
      UserError: more than there are GPUs or processors.
    """
    processors = sorted(os.sched_getaffinity(0))
    gpus = sorted(path.name.removeprefix("nvidia") for path in pathlib.Path("/dev").glob("nvidia[0-9]*"))
    gpus = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(gpus)).split(",") if gpu]
    tpu = any(pathlib.Path("/dev").glob("accel[0-9]*"))
    if gpus:
        most = len(gpus)
    elif tpu:
        most = 1
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        most = min(len(processors), max(1, memory // _HOST_MEMORY))
    jobs = jobs or most
    if jobs > (1 if tpu else len(gpus or processors)):
        raise UserError(f"--jobs={jobs} is more than this machine has devices for; leave it out.")
    shares = [frozenset(processors[i::jobs]) for i in range(min(jobs, len(processors)))]
    environments = [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[i::jobs])} if gpus else dict(_MALLOC) for i in range(jobs)]
    return [Slot(shares[i % len(shares)], environment) for i, environment in enumerate(environments)]


def run(cells: Sequence[Cell], shares: Sequence[Slot], cache: pathlib.Path) -> dict[Cell, str]:
    """Runs the cells that are not done, those first that others ask; a line for each that ends.

    Args:
      cache: folder of compiled programs, so that runs which differ in their seeds alone compile once.

    Returns:
      For each cell that failed, why. The others are run all the same.

    Raises:
      UserError: a cell's folder holds another run.
    """
    wanted = [cell for cell in cells if not cell.done]
    print(f"{len(cells)} runs, {len(cells) - len(wanted)} of them done before")
    if not wanted:
        return {}
    free: queue.Queue[Slot] = queue.Queue()
    for slot in shares:
        free.put(slot)
    work = _Work(free, cache)
    failed = {}
    begun = time.monotonic()
    for group in ([c for c in wanted if c.needs is None], [c for c in wanted if c.needs is not None]):
        with concurrent.futures.ThreadPoolExecutor(len(shares)) as pool:
            bar = tqdm.tqdm(total=len(group), unit="run", disable=not group, mininterval=0.5)
            try:
                running = {pool.submit(work.do, cell): cell for cell in group}
                for done in concurrent.futures.as_completed(running):
                    cell, why = running[done], done.result()
                    bar.update()
                    if why:
                        failed[cell] = why
                    bar.write(f"{cell.name}: {why or _said(cell)}")
            except BaseException:
                work.end()
                pool.shutdown(cancel_futures=True)
                raise
            finally:
                bar.close()
    print(f"{len(wanted)} runs took {format_duration(time.monotonic() - begun)}")
    return failed


class _Work:
    """Runs cells in processes of their own."""

    def __init__(self, free, cache):
        self._free, self._cache = free, cache
        self._children, self._lock, self._ended = set(), threading.Lock(), False

    def do(self, cell):
        """What went wrong, or nothing."""
        slot = self._free.get()
        try:
            make_folder(epath.Path(cell.folder))
            if cell.needs is not None:
                if not (cell.needs / RESULTS).exists():
                    return f"{cell.needs} is not there to be asked"
                write_json(epath.Path(cell.folder / ASKED), list(cell.variant.asked))
            for _ in range(_TRIES):
                status = self._start(cell, slot)
                if status != TryAgain.status:
                    break
            if status == 0:
                return ""
            last = (cell.folder / LOG).read_text(errors="replace").strip().splitlines()[-1:]
            return f"ended with status {status} ({cell.folder / LOG}): {''.join(last)}"
        finally:
            self._free.put(slot)

    def _start(self, cell, slot):
        # This thread's, which the child inherits before its libraries count processors.
        os.sched_setaffinity(0, slot.processors)
        environment = {"JAX_COMPILATION_CACHE_DIR": str(self._cache), **os.environ, **slot.environment}
        with (cell.folder / LOG).open("ab") as log, self._lock:
            if self._ended:
                return -signal.SIGTERM
            child = subprocess.Popen(cell.command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            self._children.add(child)
        status = child.wait()
        with self._lock:
            self._children.discard(child)
        return status

    def end(self):
        """Lets the runs save and end."""
        with self._lock:
            self._ended = True
            for child in self._children:
                child.terminate()


def _said(cell):
    """The first metrics of a cell."""
    found = read_json(epath.Path(cell.folder / RESULTS))
    first = found[0] if isinstance(found, list) else found
    shown = [
        f"{name} {format_metric(name, value)}" for name, value in flatten_metrics(first).items() if name.count("/") == 1
    ]
    return ", ".join(shown[:2])
