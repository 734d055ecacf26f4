"""Several hosts, one run: each starts the same command, and they find each other before a device is touched."""

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
from stf_jax.runtime.environment import TPUS

_PATIENCE = 300  # seconds that a host waits for the others to start
LOST = "Another host of the run was lost, it seems; start the same command again on all, and it goes on"
_GRACE = 5  # seconds that a host which failed leaves the others to fail likewise
_LONGEST = 2000  # bytes of a sentence
_OWN = re.compile("RESOURCE_EXHAUSTED|INVALID_ARGUMENT|UNIMPLEMENTED|out of memory")  # of what jax raises, our doing
_LAUNCHERS = (  # Open MPI and SLURM, by which Open MPI may itself be started: how many processes, and which
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)


def join(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None, *, silent: int = 100
) -> None:
    """Makes this process one of a run's, where it is: as told, or as SLURM, Open MPI or a TPU pod's machines tell jax.

    Without arguments and without those, there is one process. SLURM and Open MPI are taken to start a process for each
    GPU, as jax has it; told by arguments, a process takes all devices that it sees. On CPUs, jax uses gloo.

    Args:
      coordinator: ``HOST:PORT`` of process 0, as the others reach it.
      processes: how many there are; 1 keeps this one alone wherever it was started.
      process: which this one is, from 0.
      silent: seconds that one may be silent before the others take it for dead.

    Raises:
      UserError: arguments that do not go together; there are others, but jax cannot find them. Where they do not come
        in time, the process ends with exit status 75, for jax would abort.
    """
    if jax.distributed.is_initialized():
        return
    named = [argument is not None for argument in (coordinator, processes, process)]
    if all(named):
        if not re.fullmatch(r".+:\d+", coordinator):
            raise UserError(f"--coordinator={coordinator} should be HOST:PORT, a free port where process 0 runs.")
        if not 0 <= process < processes:
            raise UserError(f"--process={process} should be from 0 to {processes - 1}, for --processes={processes}.")
        if processes == 1:
            return
    elif any(named):
        raise UserError("--coordinator, --processes and --process go together: give all three or none.")
    else:
        processes, process = _launched()
        if processes is None and not _on_tpu():
            return
    who = "This process" if process is None else f"Process {process} of {processes}"
    late = _exit_after(
        _PATIENCE,
        f"error: {who} has not met the others at {coordinator or 'their coordinator'} in {_PATIENCE} s: start all of "
        "them together, and let them reach that port where process 0 runs.",
        status=TryAgain.status,
    )
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            cluster_detection_method="deactivate" if coordinator else None,
            initialization_timeout=2 * _PATIENCE,  # when jax would abort
            heartbeat_timeout_seconds=silent,
        )
    except (ValueError, OSError, jax.errors.JaxRuntimeError) as error:
        if processes is None and isinstance(error, ValueError):
            return  # a TPU that is part of no pod
        reason = short_message(error)
        if coordinator and isinstance(error, jax.errors.JaxRuntimeError):  # by one who still waits for who was before
            raise TryAgain(f"{who} was not let in by the others ({reason}); start again on all.") from None
        raise UserError(
            f"{who} cannot join the others ({reason}); say --coordinator=HOST:PORT, --processes=N and --process=I."
        ) from None
    finally:
        late.cancel()


def by_first(do: Callable[[], None]) -> None:
    """What process 0 does for all. Raises, in all, the UserError that it raises there."""
    sentence = ""
    if jax.process_index() == 0:
        try:
            do()
        except UserError as error:
            sentence = str(error)
    if jax.process_count() > 1:
        told = np.frombuffer(sentence.encode()[:_LONGEST].ljust(_LONGEST), np.uint8)
        sentence = multihost_utils.broadcast_one_to_all(told).tobytes().decode(errors="ignore").strip()
    if sentence:
        raise UserError(sentence)


def any_says(mine: bool) -> bool:
    """Whether any process says so; all must ask."""
    return mine if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.int32(mine)).any())


def lost(error: BaseException) -> bool:
    """Whether an exception may come of another process of this run having gone: jax's, but for a few kinds."""
    several = jax.distributed.is_initialized() and jax.process_count() > 1
    return several and isinstance(error, jax.errors.JaxRuntimeError) and not _OWN.search(str(error))


def status_of(error: BaseException) -> int:
    """The exit status of a process that raises it (docs/operations.md)."""
    if isinstance(error, KeyboardInterrupt):
        return 130  # as shells have it
    if isinstance(error, (UserError, RunFailed, TryAgain, Stopped)):
        return error.status
    return TryAgain.status if lost(error) else 1


def leave(status: int) -> int:
    """Lets a process that failed end with that status in a few seconds, where there are others; gives the status.

    By itself jax would wait five minutes for the others, and they for this one. So those that fail for the same reason
    have the time to say so, and the rest are ended by jax when this one's connections are lost.
    """
    if jax.distributed.is_initialized():
        _exit_after(_GRACE, status=status)
    return status


def _exit_after(seconds, sentence="", *, status):
    def end():
        print(sentence, end="\n" if sentence else "", file=sys.stderr, flush=True)
        os._exit(status)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    return timer


def _launched():
    """How many processes a launcher started, and which this one is; or Nones."""
    for names in _LAUNCHERS:
        processes, process = (int(os.environ.get(name) or -1) for name in names)  # an empty one is none
        if processes > 1 and process >= 0:
            return processes, process
    return None, None


def _on_tpu():
    platforms = jax.config.jax_platforms or "tpu"
    return "tpu" in platforms.split(",") and importlib.util.find_spec("libtpu") and any(map(glob.glob, TPUS))
