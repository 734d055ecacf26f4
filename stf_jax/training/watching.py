"""Looks at the loss of every step, a little behind the devices, so that they need not wait to be looked at."""

import collections
import dataclasses
import io
import logging
import math
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
_LOGGED = 10  # batches without a target token that are logged; events.jsonl has all

_WRONG = "loss, gradients or new parameters were not finite"

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
        in_a_row: int = 0,
    ):
        """Stands behind what gives devices their steps.

        Args:
          records: gives the ids of a step's records, row by row.
          tell: is called with an event, ``"skipped"``, ``"empty"`` or ``"spike"``, the step, and facts by name.
          skipped: is called for each update that was skipped.
          in_a_row: the value of that attribute when the run stopped before.

        Attributes:
          in_a_row: updates skipped since the last one that was made, because a number was not finite.
        """
        self._config, self._workdir, self._records, self._tell, self._skipped = config, workdir, records, tell, skipped
        self._waiting: collections.deque = collections.deque()
        self._losses: collections.deque[float] = collections.deque(maxlen=_USUAL)
        self.in_a_row = in_a_row
        self._leapt, self._empty = False, 0

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

    def finish(self, step: int, updates: int) -> None:
        """Looks at all steps, the last of which is the run's last.

        Args:
          updates: made by the whole run.

        Raises:
          RunFailed: the last updates were skipped, or all were.
        """
        self.catch_up()
        if self.in_a_row:
            raise RunFailed(
                f"The run ends with {self.in_a_row} skipped updates, because {_WRONG}; step {step} is not saved. Lower "
                "optimizer.learning_rate or set optimizer.clip_norm; the same command goes on from the last checkpoint."
            )
        if updates <= 0:
            raise RunFailed(
                f"No update was made in {step} steps, because no batch has a target token; step {step} is not "
                "saved. Look at the rows that were left out (the log names the first ones)."
            )

    def _look(self, step, batch, metrics):
        loss, norm = float(metrics["loss"]), float(metrics["gradient_norm"])
        if not metrics["learned_tokens"]:
            self._skipped()
            self._empty += 1
            rest = " Further such batches are only counted." if self._empty == _LOGGED else ""
            sentence = "no row of the batch has a target token, so no update was made"
            self._say("empty", step, sentence, rest, log=self._empty <= _LOGGED)
            return
        if metrics["skipped"]:
            self._skipped()
            self.in_a_row += 1
            facts = {"loss": str(loss), "gradient_norm": str(norm)}
            both = ", but not the new parameters" if math.isfinite(loss) and math.isfinite(norm) else ""
            self._say("skipped", step, f"loss {loss:g}, gradients {norm}{both}: not learned from", **facts)
            if self.in_a_row > self._config.skipped_updates:
                self._fail(step, batch, facts)
            return
        self.in_a_row = 0
        if self._config.spike and len(self._losses) >= _ENOUGH:
            usual = statistics.median(self._losses)
            leaps = loss > self._config.spike * usual
            if leaps and not self._leapt:  # not of each step on a plateau
                self._say("spike", step, f"loss {loss:.3f}, where {usual:.3f} is usual", loss=loss, usual=usual)
            self._leapt = leaps
        self._losses.append(loss)

    def _say(self, kind, step, sentence, rest="", *, log=True, **facts):
        rows = self._records(step)
        names = [name for row in rows for name in row]
        self._tell(kind, step, **facts, records=names)
        if log and jax.process_index() == 0:
            more = f" and {len(names) - _NAMED} more (events.jsonl)" if len(names) > _NAMED else ""
            _log.warning("Step %d: %s; its records: %s%s.%s", step, sentence, ", ".join(names[:_NAMED]), more, rest)

    def _fail(self, step, batch, facts):
        folder = self._workdir / "failures" / f"step_{step}"
        where = f"are in {folder}"
        try:
            self._dump(folder, step, batch, facts)
        except OSError as error:
            where = f"could not be written ({error.strerror or error})"
        raise RunFailed(
            f"Updates were skipped in {self.in_a_row} steps in a row (faults.skipped_updates="
            f"{self._config.skipped_updates}), because {_WRONG}; the last of them {step}: its batch and the ids of its "
            f"records {where}. "
            "Look at these, lower optimizer.learning_rate or set optimizer.clip_norm; the same command goes on from "
            "the last checkpoint."
        )

    def _dump(self, folder, step, batch, facts):
        folder.mkdir(parents=True, exist_ok=True)
        with io.BytesIO() as file:
            arrays = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
            np.savez(file, **{name: array for name, array in arrays.items() if array is not None})
            (folder / f"batch.host{jax.process_index()}.npz").write_bytes(file.getvalue())
        if jax.process_index() == 0:
            write_json(folder / "step.json", {"step": step, **facts, "records": self._records(step)})
