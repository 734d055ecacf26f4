"""Runs on several hosts: each starts the same command, and they connect before any device is used."""

import atexit
import contextlib
import glob
import importlib.util
import os
import re
import sys
import threading
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from stf_jax.config import RunFailed, Stopped, TryAgain, UserError, short_message
from stf_jax.environment import TPUS

_JOIN_TIMEOUT = 300  # seconds that a host waits for the others to start
PEER_LOST = "Another host of the run seems to be lost; run the same command on all hosts to resume"
_GRACE = 5  # seconds that a failed host leaves the others to report the same failure
_MESSAGE_BYTES = 2000  # of a message broadcast to all hosts; the rest is cut
_LOCAL_ERROR = re.compile("RESOURCE_EXHAUSTED|INVALID_ARGUMENT|UNIMPLEMENTED|out of memory")  # not a peer's fault
_LAUNCHERS = (  # number of processes and own rank; Open MPI first, because SLURM may have started it
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)


def join(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None, *, silent: int = 100
) -> None:
    """Connects this process to the others of its run, found by the arguments, SLURM, Open MPI or a TPU pod.

    With none of these the run has one process. Under SLURM and Open MPI, jax expects one process per GPU; with
    arguments, a process uses all devices that it sees. On CPUs, jax communicates by gloo.

    Args:
      coordinator: ``HOST:PORT`` of process 0, as reachable from the others.
      processes: number of processes; with 1, this process runs alone wherever it was started.
      process: index of this process, from 0.
      silent: seconds without a heartbeat after which a process counts as dead.

    Raises:
      UserError: only some of the arguments are given, or jax cannot find the other processes. If they do not start in
        time, the process exits with status 75, because jax would abort.
    """
    if jax.distributed.is_initialized():
        return
    if coordinator is not None and processes is not None and process is not None:
        if not re.fullmatch(r".+:\d+", coordinator):
            raise UserError(f"--coordinator={coordinator} should be HOST:PORT, a free port where process 0 runs.")
        if not 0 <= process < processes:
            raise UserError(f"--process={process} should be from 0 to {processes - 1}, for --processes={processes}.")
        if processes == 1:
            return
    elif any(argument is not None for argument in (coordinator, processes, process)):
        raise UserError("--coordinator, --processes and --process go together: give all three or none.")
    else:
        processes, process = _read_launcher()
        if processes is None and not _on_tpu():
            return
    who = "This process" if process is None else f"Process {process} of {processes}"
    timeout = _exit_after(
        _JOIN_TIMEOUT,
        f"error: {who} did not connect to the others at {coordinator or 'their coordinator'} within {_JOIN_TIMEOUT} s: "
        "start all processes together, and make that port of process 0 reachable from all hosts.",
        status=TryAgain.status,
    )
    jax.config.update("jax_enable_preemption_service", False)  # it would handle SIGTERM itself
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            cluster_detection_method="deactivate" if coordinator else None,
            initialization_timeout=2 * _JOIN_TIMEOUT,  # when jax would abort
            heartbeat_timeout_seconds=silent,
        )
    except (ValueError, OSError, jax.errors.JaxRuntimeError) as error:
        if processes is None and isinstance(error, ValueError):
            return  # a TPU that is not part of a pod
        reason = short_message(error)
        if coordinator and isinstance(error, jax.errors.JaxRuntimeError):
            # The coordinator of the previous start is still waiting for that start's processes.
            raise TryAgain(f"{who} was rejected by the coordinator ({reason}); start again on all hosts.") from None
        raise UserError(
            f"{who} cannot join the others ({reason}); give --coordinator=HOST:PORT, --processes=N and --process=I."
        ) from None
    finally:
        timeout.cancel()


def run_on_host0(function: Callable[[], object]) -> None:
    """Runs a function on process 0 alone. A UserError that it raises there is raised on all processes."""
    message = ""
    if jax.process_index() == 0:
        try:
            function()
        except UserError as error:
            message = str(error)
    if jax.process_count() > 1:
        padded = np.frombuffer(message.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES), np.uint8)
        message = multihost_utils.broadcast_one_to_all(padded).tobytes().decode(errors="ignore").strip()
    if message:
        raise UserError(message)


def any_process(local: bool) -> bool:
    """Whether ``local`` is true on any process. All processes must call this."""
    return local if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.int32(local)).any())


def is_peer_lost(error: BaseException) -> bool:
    """Whether another process of the run may have died: any jax runtime error but those with a local cause."""
    several = jax.distributed.is_initialized() and jax.process_count() > 1
    return several and isinstance(error, jax.errors.JaxRuntimeError) and not _LOCAL_ERROR.search(str(error))


def exit_status(error: BaseException) -> int:
    """Returns the exit status of a process that raises this error (docs/operations.md)."""
    if isinstance(error, KeyboardInterrupt):
        return 130  # the shells' convention
    if isinstance(error, (UserError, RunFailed, TryAgain, Stopped)):
        return error.status
    return TryAgain.status if is_peer_lost(error) else 1


def exit_soon(status: int) -> None:
    """Makes a process of several exit with this status; within seconds if it has failed.

    On its own, jax would wait five minutes for the others, and they for this one. The delay lets processes that fail
    for the same reason report it; jax ends the rest when this one's connections are lost.
    """
    if jax.distributed.is_initialized():
        if status:
            _exit_after(_GRACE, status=status)
        # Not later: when Python destroys jax's client for CPUs, that now and then waits forever (jaxlib 0.10.2).
        atexit.register(_exit_now, status)


def _exit_now(status: int) -> None:
    with contextlib.suppress(Exception):  # others may be gone
        jax.distributed.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _exit_after(seconds: float, message: str = "", *, status: int) -> threading.Timer:
    def end() -> None:
        print(message, end="\n" if message else "", file=sys.stderr, flush=True)
        os._exit(status)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    return timer


def _read_launcher() -> tuple[int, int] | tuple[None, None]:
    """Reads the number of processes that a launcher started and this one's index; (None, None) without a launcher."""
    for names in _LAUNCHERS:
        processes, process = (int(os.environ.get(name) or -1) for name in names)  # empty counts as unset
        if processes > 1 and process >= 0:
            return processes, process
    return None, None


def _on_tpu() -> bool:
    platforms = jax.config.jax_platforms or "tpu"  # type: ignore[attr-defined]  # jax adds its options at run time
    if "tpu" not in platforms.split(",") or importlib.util.find_spec("libtpu") is None:
        return False
    return any(map(glob.glob, TPUS))
