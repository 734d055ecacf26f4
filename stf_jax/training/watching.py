"""Looks at the loss of every step, a little behind the devices, so that they need not wait to be looked at."""

import collections
import dataclasses
import io
import logging
import statistics
from collections.abc import Callable

import jax
import numpy as np
from etils import epath

from stf_jax.config import FaultsConfig, RunFailed
from stf_jax.data.packing import Batch
from stf_jax.runtime.files import write_json

_LAG = 2  # steps
_USUAL, _ENOUGH = 50, 20  # losses that the next is compared with, and how many of them tell what is usual
_NAMED = 8  # records in a log line; events.jsonl has all

_log = logging.getLogger(__name__)


class Watch:
    """Tells of updates that were skipped and of losses that leap, and ends a run that has gone wrong."""

    def __init__(
        self,
        config: FaultsConfig,
        workdir: epath.Path,
        records: Callable[[int], list[list[str]]],
        tell: Callable[..., None],
        skipped: Callable[[], None],
    ):
        """Stands behind what gives devices their steps.

        Args:
          records: gives the ids of a step's records, row by row.
          tell: is called with an event, ``"skipped"`` or ``"spike"``, the step, and facts by name.
          skipped: is called for each update that was skipped.
        """
        self._config, self._workdir, self._records, self._tell, self._skipped = config, workdir, records, tell, skipped
        self._waiting: collections.deque = collections.deque()
        self._losses: collections.deque[float] = collections.deque(maxlen=_USUAL)
        self._in_a_row = 0
        self._leapt = False

    def note(self, step: int, batch: Batch, metrics: dict[str, jax.Array]) -> None:
        """Takes a step that the devices were given, and looks at one before it, as :meth:`catch_up` does.

        Args:
          batch: this host's share, in host memory.
        """
        self._waiting.append((step, batch, metrics))
        self.catch_up(_LAG)

    def catch_up(self, lag: int = 0) -> None:
        """Looks at all steps but so many.

        Raises:
          RunFailed: too many updates in a row had to be skipped; the last of their batches is in ``workdir/failures``.
        """
        while len(self._waiting) > lag:
            self._look(*self._waiting.popleft())

    def _look(self, step, batch, metrics):
        loss = float(metrics["loss"])
        if metrics["skipped"]:
            self._skipped()
            self._in_a_row += 1
            facts = {"loss": str(loss), "gradient_norm": str(float(metrics["gradient_norm"]))}
            self._say("skipped", step, f"loss {loss:g}, gradients {facts['gradient_norm']}: not learned from", **facts)
            if self._in_a_row > self._config.skipped_updates:
                self._fail(step, batch, facts)
            return
        self._in_a_row = 0
        if self._config.spike and len(self._losses) >= _ENOUGH:
            usual = statistics.median(self._losses)
            leaps = loss > self._config.spike * usual
            if leaps and not self._leapt:  # not of each step on a plateau
                self._say("spike", step, f"loss {loss:.3f}, where {usual:.3f} is usual", loss=loss, usual=usual)
            self._leapt = leaps
        self._losses.append(loss)

    def _say(self, kind, step, sentence, **facts):
        rows = self._records(step)
        names = [name for row in rows for name in row]
        self._tell(kind, step, **facts, records=names)
        if jax.process_index() == 0:
            more = f" and {len(names) - _NAMED} more (events.jsonl)" if len(names) > _NAMED else ""
            _log.warning("Step %d: %s; its records: %s%s.", step, sentence, ", ".join(names[:_NAMED]), more)

    def _fail(self, step, batch, facts):
        folder = self._workdir / "failures" / f"step_{step}"
        where = f"are in {folder}"
        try:
            self._dump(folder, step, batch, facts)
        except OSError as error:
            where = f"could not be written ({error.strerror or error})"
        raise RunFailed(
            f"Loss or gradients were not finite in {self._in_a_row} steps in a row (faults.skipped_updates="
            f"{self._config.skipped_updates}), the last of them {step}: its batch and the ids of its records {where}. "
            "Look at these, lower optimizer.learning_rate or set optimizer.clip_norm; the same command goes on from "
            "the last checkpoint."
        )

    def _dump(self, folder, step, batch, facts):
        folder.mkdir(parents=True, exist_ok=True)
        with io.BytesIO() as file:
            np.savez(file, **{field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)})
            (folder / f"batch.host{jax.process_index()}.npz").write_bytes(file.getvalue())
        if jax.process_index() == 0:
            write_json(folder / "step.json", {"step": step, **facts, "records": self._records(step)})
