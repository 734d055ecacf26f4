"""What a run says: a progress bar for people, ``metrics.jsonl`` and TensorBoard for machines."""

import json
import pathlib
import time

import tqdm
from tensorboard.summary import Writer


class Telemetry:
    """Writes the scalars of logged steps. Only the first host of a run writes."""

    def __init__(self, workdir: pathlib.Path, name: str, steps: int, first: int, seconds: float, active: bool):
        """``first`` is the step to continue from, reached after ``seconds`` of training; later lines are dropped."""
        self._active = active
        self._seconds, self._begin = seconds, time.monotonic()
        self._last_time, self._last_step = self._begin, first
        self._tokens = 0
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
    def seconds(self) -> float:
        """Wall-clock of training so far, over restarts."""
        return self._seconds + time.monotonic() - self._begin

    def advance(self, tokens: int) -> None:
        """Counts a step of so many tokens (all hosts', without filling)."""
        self._tokens += tokens
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
        values = {"step": step, **scalars, **speed, "seconds": self.seconds}
        self._file.write(json.dumps(values) + "\n")
        for key, value in values.items():
            if key != "step":
                self._board.add_scalar(key, value, step)
        self._bar.set_postfix_str(
            f"loss {scalars['loss']:.3f}, lr {scalars['learning_rate']:.1e}, {speed['tokens_per_second']:,.0f} tok/s"
        )

    def close(self) -> None:
        """Ends the bar and the files."""
        if self._active:
            self._bar.close()
            self._file.close()
            self._board.close()


def _step_of(line, otherwise):
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return otherwise
