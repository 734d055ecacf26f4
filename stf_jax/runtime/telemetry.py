"""What a run says: a progress bar and a summary for people, ``metrics.jsonl`` and TensorBoard for machines."""

import json
import math
import pathlib
import time

import tqdm
from tensorboard.summary import Writer

Clock = dict[str, float]  # seconds of wall-clock in training, tokens trained on


class Telemetry:
    """Writes the scalars of logged steps. Only the first host of a run writes."""

    def __init__(self, workdir: pathlib.Path, name: str, steps: int, first: int, clock: Clock, active: bool):
        """``first`` is the step to continue from, reached at ``clock``; later lines of metrics are dropped."""
        self._active, self._workdir, self._name, self._steps = active, workdir, name, steps
        self._before, self._begin = clock, time.monotonic()
        self._last_time, self._last_step = self._begin, first
        self._tokens = self._all_tokens = 0
        self._loss = math.nan
        if not active:
            return
        path = workdir / "metrics.jsonl"
        if path.exists():
            # A run that was killed had gone on past the checkpoint that this one continues from.
            kept = [line for line in path.read_text().splitlines() if _step_of(line, first + 1) <= first]
            path.write_text("".join(line + "\n" for line in kept))
        self._file = path.open("a", buffering=1)
        self._board = Writer(str(workdir / "tensorboard"))
        self._bar = tqdm.tqdm(total=steps, initial=first, desc=name, unit="step", dynamic_ncols=True, mininterval=0.5)

    @property
    def clock(self) -> Clock:
        """Time and tokens of the run so far, over restarts."""
        return {
            "seconds": self._before["seconds"] + time.monotonic() - self._begin,
            "tokens": self._before["tokens"] + self._all_tokens,
        }

    def advance(self, tokens: int) -> None:
        """Counts a step of so many tokens (all hosts', without filling)."""
        self._tokens += tokens
        self._all_tokens += tokens
        if self._active:
            self._bar.update()

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Writes a logged step: the scalars, and the speed since the last one."""
        now = time.monotonic()
        elapsed = max(now - self._last_time, 1e-9)
        speed = {
            "tokens_per_second": self._tokens / elapsed,
            "seconds_per_step": elapsed / max(step - self._last_step, 1),
        }
        self._last_time, self._last_step, self._tokens = now, step, 0
        if not self._active:
            return
        self._loss = scalars["loss"]
        values = {"step": step, **scalars, **speed, **self.clock}
        self._file.write(json.dumps(values) + "\n")
        for key, value in values.items():
            if key != "step":
                self._board.add_scalar(key, value, step)
        self._bar.set_postfix_str(
            f"loss {scalars['loss']:.3f}, lr {scalars['learning_rate']:.1e}, {speed['tokens_per_second']:,.0f} tok/s"
        )

    def close(self) -> None:
        """Ends the bar and the files, and says in a line what the run came to."""
        if not self._active:
            return
        self._bar.close()
        self._file.close()
        self._board.close()
        clock, ran = self.clock, self._steps > self._bar.initial
        loss = f", loss {self._loss:.3f}" if ran else " (done before)"
        print(
            f"{self._name}: {self._steps} steps, {clock['tokens']:,} tokens in {clock['seconds']:.0f} s{loss}; "
            f"checkpoints, metrics and TensorBoard events are in {self._workdir}"
        )


def _step_of(line, otherwise):
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return otherwise
