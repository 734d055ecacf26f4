"""What a run says: a progress bar and a summary for people, ``metrics.jsonl`` and TensorBoard for machines."""

import contextlib
import json
import math
import time
from collections.abc import Iterator

import jax
import numpy as np
import tqdm
from etils import epath
from jax.experimental import multihost_utils
from tensorboard.summary import Writer

from stf_jax.runtime.files import GrowingFile

Clock = dict[str, float]  # seconds of wall-clock in training; tokens trained on; rows that could not be used
START: Clock = {"seconds": 0.0, "tokens": 0, "rows_replaced": 0}


class Telemetry:
    """Writes the scalars of logged steps. Only the first host of a run writes."""

    def __init__(self, workdir: epath.Path, name: str, steps: int, first: int, clock: Clock, active: bool):
        """``first`` is the step to continue from, reached at ``clock``; later lines of metrics are dropped."""
        self._active, self._workdir, self._name, self._steps = active, workdir, name, steps
        self._before, self._begin = clock, time.monotonic()
        self._last_time, self._last_step = self._begin, first
        self._tokens = self._all_tokens = self._replaced = 0  # this host's
        self._loss = math.nan
        if not active:
            return
        path = workdir / "metrics.jsonl"
        # A run that was killed had gone on past the checkpoint that this one continues from.
        lines = path.read_text().splitlines() if path.exists() else []
        self._file = GrowingFile(path, [line for line in lines if _step_of(line, first + 1) <= first])
        self._board = Writer(str(workdir / "tensorboard"))
        self._bar = tqdm.tqdm(total=steps, initial=first, desc=name, unit="step", dynamic_ncols=True, mininterval=0.5)

    def clock(self) -> Clock:
        """The run so far, over restarts and all hosts; they must all ask at the same step."""
        counts = multihost_utils.process_allgather(np.array([self._all_tokens, self._replaced], np.float64))
        tokens, replaced = counts.reshape(-1, 2).sum(axis=0)
        return {
            "seconds": self._before["seconds"] + time.monotonic() - self._begin,
            "tokens": self._before["tokens"] + int(tokens),
            "rows_replaced": self._before["rows_replaced"] + int(replaced),
        }

    def advance(self, tokens: int, replaced: int) -> None:
        """Counts a step: this host's tokens, without filling, and its rows so far that could not be used."""
        self._tokens += tokens
        self._all_tokens += tokens
        self._replaced = replaced
        if self._active:
            self._bar.update()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens meanwhile is left out of the speed of training."""
        begin = time.monotonic()
        yield
        self._last_time += time.monotonic() - begin

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Writes a logged step: the scalars, and the speed since the last one."""
        now = time.monotonic()
        elapsed = max(now - self._last_time, 1e-9)
        speed = {
            "tokens_per_second": self._tokens * jax.process_count() / elapsed,
            "seconds_per_step": elapsed / max(step - self._last_step, 1),
        }
        self._last_time, self._last_step, self._tokens = now, step, 0
        clock = self.clock()
        if not self._active:
            return
        self._loss = scalars["loss"]
        values = {"step": step, **scalars, **speed, **clock}
        self._file.append(json.dumps(values))
        for key, value in values.items():
            if key != "step":
                self._board.add_scalar(key, value, step)
        self._bar.set_postfix_str(
            f"loss {scalars['loss']:.3f}, lr {scalars['learning_rate']:.1e}, {speed['tokens_per_second']:,.0f} tok/s"
        )

    def close(self) -> None:
        """Ends the bar and the files, and says in a line what the run came to."""
        clock = self.clock()
        if not self._active:
            return
        self._bar.close()
        self._file.close()
        self._board.close()
        ran = self._steps > self._bar.initial
        loss = f", loss {self._loss:.3f}" if ran else " (done before)"
        if clock["rows_replaced"]:
            loss += f", {clock['rows_replaced']:,} rows could not be used"
        print(
            f"{self._name}: {self._steps} steps, {clock['tokens']:,} tokens in {clock['seconds']:.0f} s{loss}; "
            f"checkpoints, metrics and TensorBoard events are in {self._workdir}"
        )


def _step_of(line, otherwise):
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return otherwise
