"""Checks the loss of every step, a few steps behind the devices so that they never wait for it."""

import collections
import dataclasses
import io
import logging
import math
import statistics
from collections.abc import Callable, Mapping
from typing import NoReturn

import jax
import numpy as np
from etils import epath

from stf_jax.config import FaultsConfig, RunFailed
from stf_jax.data.packing import Batch
from stf_jax.files import write_json

_LAG_STEPS = 2
_WINDOW, _MIN_WINDOW = 50, 20  # recent losses whose median the next is compared with: at most, at least
_MAX_IDS_LOGGED = 8  # records in a log line; events.jsonl has all
_MAX_EMPTY_LOGGED = 10  # log lines about batches without a target token; events.jsonl has all

_NOT_FINITE = "loss, gradients or new parameters were not finite"

_Step = tuple[int, Batch[np.ndarray], dict[str, jax.Array]]  # number, this host's batch, metrics

_log = logging.getLogger(__name__)


class LossMonitor:
    """Reports skipped updates and loss spikes, and ends a run whose updates keep failing."""

    def __init__(
        self,
        config: FaultsConfig,
        workdir: epath.Path,
        records: Callable[[int], list[list[str]]],
        on_event: Callable[..., None],
        on_skip: Callable[[], None],
        in_a_row: int = 0,
    ) -> None:
        """Creates a monitor of the run in ``workdir``.

        Args:
          records: returns the ids of a step's records, row by row.
          on_event: called with an event, ``"skipped"``, ``"empty"`` or ``"spike"``, the step, and facts as keywords.
          on_skip: called for each skipped update.
          in_a_row: the value of that attribute when the run last stopped.

        Attributes:
          in_a_row: consecutive updates skipped because a number was not finite.
        """
        self._config, self._workdir, self._records = config, workdir, records
        self._on_event, self._on_skip = on_event, on_skip
        self._pending: collections.deque[tuple[_Step, Callable[[], object]]] = collections.deque()
        self._losses: collections.deque[float] = collections.deque(maxlen=_WINDOW)
        self.in_a_row = in_a_row
        self._is_spiking, self._empty_count = False, 0

    def enqueue(
        self,
        step: int,
        batch: Batch[np.ndarray],
        metrics: dict[str, jax.Array],
        then: Callable[[], object] = lambda: None,
    ) -> None:
        """Adds a dispatched step, and processes an earlier one as :meth:`drain` does.

        Args:
          batch: this host's share, in host memory.
          then: called when the step has been processed.
        """
        self._pending.append(((step, batch, metrics), then))
        self.drain(_LAG_STEPS)

    def drain(self, lag: int = 0) -> None:
        """Processes pending steps until at most ``lag`` remain.

        Raises:
          RunFailed: too many consecutive updates were skipped; the last of their batches is in ``workdir/failures``.
        """
        while len(self._pending) > lag:
            step, then = self._pending.popleft()
            self._process(*step)
            then()

    def finish(self, step: int, updates: int) -> None:
        """Processes all steps at the end of the run, the last of which is ``step``.

        Args:
          updates: applied in the whole run.

        Raises:
          RunFailed: the last updates were skipped, or all were.
        """
        self.drain()
        if self.in_a_row:
            raise RunFailed(
                f"The run ends with {self.in_a_row} skipped updates, because {_NOT_FINITE}; step {step} is not saved. "
                "Lower optimizer.learning_rate or set optimizer.clip_norm; the same command resumes from the last "
                "checkpoint."
            )
        if updates <= 0:
            raise RunFailed(
                f"No update was made in {step} steps, because no batch has a target token; step {step} is not "
                "saved. Look at the rejected rows (the log names the first ones)."
            )

    def _process(self, step: int, batch: Batch[np.ndarray], metrics: Mapping[str, jax.Array]) -> None:
        loss, norm = float(metrics["loss"]), float(metrics["gradient_norm"])
        if not metrics["learned_tokens"]:
            self._on_skip()
            self._empty_count += 1
            suffix = " Further such batches are only counted." if self._empty_count == _MAX_EMPTY_LOGGED else ""
            message = "no row of the batch has a target token, so no update was made"
            self._report("empty", step, message, suffix, log=self._empty_count <= _MAX_EMPTY_LOGGED)
            return
        if metrics["skipped"]:
            self._on_skip()
            self.in_a_row += 1
            facts = {"loss": str(loss), "gradient_norm": str(norm)}
            clause = ", but not all new parameters are finite" if math.isfinite(loss) and math.isfinite(norm) else ""
            message = f"loss {loss:g}, gradients {norm}{clause}: update skipped"
            self._report("skipped", step, message, loss=str(loss), gradient_norm=str(norm))
            if self.in_a_row > self._config.skipped_updates:
                self._raise_failed(step, batch, facts)
            return
        self.in_a_row = 0
        if self._config.spike and len(self._losses) >= _MIN_WINDOW:
            median = statistics.median(self._losses)
            is_spike = loss > self._config.spike * median
            if is_spike and not self._is_spiking:  # once per plateau
                self._report(
                    "spike", step, f"loss {loss:.3f}, but the recent median is {median:.3f}", loss=loss, usual=median
                )
            self._is_spiking = is_spike
        self._losses.append(loss)

    def _report(
        self, kind: str, step: int, message: str, suffix: str = "", *, log: bool = True, **facts: float | str
    ) -> None:
        rows = self._records(step)
        ids = [name for row in rows for name in row]
        self._on_event(kind, step, **facts, records=ids)
        if log and jax.process_index() == 0:
            more = f" and {len(ids) - _MAX_IDS_LOGGED} more (events.jsonl)" if len(ids) > _MAX_IDS_LOGGED else ""
            _log.warning("Step %d: %s; records: %s%s.%s", step, message, ", ".join(ids[:_MAX_IDS_LOGGED]), more, suffix)

    def _raise_failed(self, step: int, batch: Batch[np.ndarray], facts: Mapping[str, str]) -> NoReturn:
        folder = self._workdir / "failures" / f"step_{step}"
        where = f"are in {folder}"
        try:
            self._write_failure(folder, step, batch, facts)
        except OSError as error:
            where = f"could not be written ({error.strerror or error})"
        raise RunFailed(
            f"Updates were skipped in {self.in_a_row} steps in a row (faults.skipped_updates="
            f"{self._config.skipped_updates}), because {_NOT_FINITE}. The batch of the last one, {step}, and the ids "
            f"of its records {where}. Look at these, lower optimizer.learning_rate or set optimizer.clip_norm; the "
            "same command resumes from the last checkpoint."
        )

    def _write_failure(self, folder: epath.Path, step: int, batch: Batch[np.ndarray], facts: Mapping[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with io.BytesIO() as file:
            arrays = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
            np.savez(file, **{name: array for name, array in arrays.items() if array is not None})
            (folder / f"batch.host{jax.process_index()}.npz").write_bytes(file.getvalue())
        if jax.process_index() == 0:
            write_json(folder / "step.json", {"step": step, **facts, "records": self._records(step)})
