"""What a run says: a line a logged step and a summary for people, and for machines what journal.py and writers.py keep.

docs/ARCHITECTURE.md defines each figure. Nothing here waits for a device, but for the end of a profile.
"""

import concurrent.futures
import contextlib
import math
import sys
import time
from collections.abc import Iterator

import jax
import numpy as np
import tqdm
from etils import epath
from jax.experimental import multihost_utils

from stf_jax.config import TrainConfig, short_message
from stf_jax.runtime.chips import chip_of
from stf_jax.runtime.hosts import status_of
from stf_jax.runtime.journal import BOARD, EVENTS, METRICS, Events, enduring
from stf_jax.runtime.mesh import share_of_rows
from stf_jax.runtime.profile import Profile
from stf_jax.runtime.table import facts, span
from stf_jax.runtime.writers import open_writers

# Seconds of wall-clock in training; tokens trained on; rows that could not be used; updates that were not made.
Clock = dict[str, float]
START: Clock = {"seconds": 0.0, "tokens": 0, "rows_replaced": 0, "updates_skipped": 0}


class Telemetry:
    """Tells of a run's steps, and how it ends. Only the first host of a run writes.

    It ends with the ``with`` block: with the run's last step, or with what is raised before.
    """

    def __init__(
        self,
        workdir: epath.Path,
        config: TrainConfig,
        steps: int,
        first: int,
        clock: Clock,
        *,
        mesh: jax.sharding.Mesh,
        began: float,
        active: bool,
        events: Events,
        owed: bool = False,
    ):
        """Stands between all that is prepared and the first step.

        Args:
          first: the step to continue from, reached at ``clock``; later lines of metrics are dropped.
          began: ``time.monotonic()`` when this process turned to the run.
          owed: whether the line of step ``first`` is still to be written.
          events: a run that has begun there is said to have ended or stopped.

        Raises:
          UserError: the workdir cannot be written to; Weights & Biases does not take the run.
        """
        self._active, self._workdir, self._name, self._steps = active, workdir, config.name, steps
        self._events, self._writers = events, []
        self._before, self._begin = START | clock, time.monotonic()  # runs of old counted less
        self._clock = self._before  # as it was asked for last
        self._first = self._step = self._last_step = first
        self._last_time = self._begin
        self._tokens = self._all_tokens = self._replaced = 0  # this host's
        self._skipped = self._skipped_before = 0
        self._loss = math.nan
        self._devices, self._local, self._chip = mesh.size, mesh.local_devices, chip_of(mesh.devices.flat[0])
        self._shares = share_of_rows(mesh, jax.process_index())[1]  # of the rows, among the hosts
        self._flops = 0  # all devices', since the last logged step
        self._began, self._waited = began, dict.fromkeys(("data", "compile", "measure", "save"), 0.0)
        self._waited_before, self._compiling, self._news = dict(self._waited), 0.0, {}
        self._watch, self._ended = concurrent.futures.ThreadPoolExecutor(1), concurrent.futures.Future()
        self._ended.set_result(self._begin)  # when the devices ended the last step that they were given
        self._profile = Profile(workdir / "profile", config.profile.first_step, config.profile.steps if active else 0)
        if not active:
            return
        self._say = enduring("The log")  # which may be on a full disk, too
        self._writers = [(writer, enduring(writer.name)) for writer in open_writers(workdir, config, first - owed)]
        # Where it would not be seen, it would fill a log file with carriage returns.
        self._bar = tqdm.tqdm(
            total=steps, initial=first, desc=self._name, unit="step", dynamic_ncols=True, mininterval=0.5, disable=None
        )

    def __enter__(self) -> "Telemetry":
        return self

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        # Where something failed, the other hosts cannot be asked, and for what the devices still do nobody waits.
        clock = self._clock if error else self.clock()
        self._watch.shutdown(wait=not error, cancel_futures=bool(error))
        with contextlib.suppress(*([Exception] if error else [])):  # the first is to be told
            self._profile.end()
        if not self._active:
            return
        status = status_of(error) if error else 0
        self._bar.close()
        for writer, attempt in self._writers:
            attempt(writer.close, status)
        if self._events.under_way:
            how = {"status": status, "reason": short_message(error)} if error else {}
            self._events.add("stopped" if error else "end", self._step, **how)
        self._say(print, self._summary(clock, early=error is not None), flush=True)

    @property
    def updates_skipped(self) -> int:
        """Updates that were not made, over restarts."""
        return int(self._before["updates_skipped"]) + self._skipped

    def skipped(self) -> None:
        """Counts an update that was not made; all hosts call it alike."""
        self._skipped += 1

    def clock(self) -> Clock:
        """The run so far, over restarts and all hosts; they must all ask at the same step."""
        # In halves, for jax would send numbers of 64 bits as 32.
        mine = np.array([self._all_tokens, self._replaced], np.int64).view(np.int32)
        counts = np.ascontiguousarray(multihost_utils.process_allgather(mine)).view(np.int64).reshape(-1, 2)
        # Of hosts that read the same rows, each counts them.
        tokens, replaced = counts.sum(axis=0) * self._shares // jax.process_count()
        self._clock = {
            "seconds": self._before["seconds"] + time.monotonic() - self._begin,
            "tokens": self._before["tokens"] + int(tokens),
            "rows_replaced": self._before["rows_replaced"] + int(replaced),
            "updates_skipped": self.updates_skipped,
        }
        return self._clock

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """In which a step is given to the devices; a profile shows it by its number."""
        self._profile.before(step)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def advance(self, step: int, tokens: int, replaced: int, flops: int, done: jax.Array) -> None:
        """Counts a step that the devices were given.

        Args:
          tokens: this host's, without filling.
          replaced: this host's rows so far that could not be used.
          flops: the step's model FLOPs, all devices together.
          done: something that the step gives.
        """
        self._step = step
        self._tokens += tokens
        self._all_tokens += tokens
        self._replaced, self._flops = replaced, self._flops + flops
        self._ended = self._watch.submit(_when_ready, done)
        self._profile.after(step, done)
        if self._active:
            self._bar.update()

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """What the next step waits for: ``data``, ``compile``, ``measure`` or ``save``.

        It costs time only from when the devices have ended the steps they were given, which they work at meanwhile.
        """
        begin = time.monotonic()
        yield
        end = time.monotonic()
        if what == "compile":
            self._compiling += end - begin
            self._news = {"compile_seconds": self._compiling}
        if self._ended.done():
            self._waited[what] += max(end - max(begin, self._ended.result()), 0.0)

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Writes a logged step: the scalars, and the speed since the last one."""
        now = time.monotonic()
        waited = {what: seconds - self._waited_before[what] for what, seconds in self._waited.items()}
        elapsed = max(now - self._last_time - waited["compile"] - waited["measure"], 1e-9)
        tokens = self._tokens * self._shares / elapsed
        flops = self._flops / elapsed / self._devices
        speed = {
            "tokens_per_second": tokens,
            "tokens_per_second_per_device": tokens / self._devices,
            "seconds_per_step": elapsed / max(step - self._last_step, 1),
            "model_flops_per_second": flops,
            "data_wait": waited["data"] / elapsed,
            "goodput": self._goodput(now),
            **self._news,
        }
        if self._chip is not None:
            speed["mfu"] = flops / self._chip.flops
        memory = [stats["peak_bytes_in_use"] for device in self._local if (stats := device.memory_stats())]
        if memory:  # none of CPUs
            speed["device_memory_bytes"] = max(memory)
        self._last_time, self._last_step, self._tokens, self._flops = now, step, 0, 0
        self._waited_before, self._news = dict(self._waited), {}
        skipped, self._skipped_before = self._skipped - self._skipped_before, self._skipped
        clock = self.clock()
        if not self._active:
            return
        self._loss = scalars["loss"]
        values = {**scalars, **speed, **clock}
        for writer, attempt in self._writers:
            attempt(writer.write, step, values)
        self._say(tqdm.tqdm.write, self._line(step, values, skipped, now), file=sys.stderr)

    def _goodput(self, now):
        idle = self._begin - self._began + sum(self._waited.values())
        return 1 - idle / max(now - self._began, 1e-9)

    def _line(self, step, values, skipped, now):
        """A logged step for people; what there is no figure for is left out."""
        total = f"{self._steps:,}"
        parts = [
            f"step {step:>{len(total)},}/{total}",
            f"loss {values['loss']:6.3f}",
            f"lr {values['learning_rate']:.1e}",
            f"|g| {values['gradient_norm']:5.2f}" if "gradient_norm" in values else "",
            f"{values['tokens_per_second']:7,.0f} tok/s",
            f"MFU {values['mfu']:3.0%}" if "mfu" in values else "",
            f"data wait {values['data_wait']:3.0%}",
            f"goodput {values['goodput']:3.0%}",
        ]
        if skipped:
            parts.append(f"{skipped} update{'s' * (skipped > 1)} skipped")
        # Of measurements, what a benchmark comes to as a whole: its parts have longer names.
        parts += [f"{key} {value:.4g}" for key, value in values.items() if key.count("/") == 1]
        if self._first < step < self._steps:
            each = (now - self._begin - self._waited["compile"]) / (step - self._first)  # measuring and saving with it
            parts.append(f"{span(each * (self._steps - step))} left")
        return "  ".join(filter(None, parts))

    def _summary(self, clock, early):
        rows, updates, restarts = clock["rows_replaced"], clock["updates_skipped"], self._events.restarts
        skipped = [f"{rows:,} rows could not be used"] * (rows > 0) + [f"{updates:,} updates"] * (updates > 0)
        return facts(
            f"{self._name}: {'ended early' if early else 'done'}",
            {
                "steps": f"{self._step:,} of {self._steps:,}" if early else f"{self._steps:,}",
                "tokens": f"{clock['tokens']:,}",
                "time": span(clock["seconds"]),
                "last loss": "" if math.isnan(self._loss) else f"{self._loss:.3f}",
                "skipped": ", ".join(skipped),
                "restarts": f"{restarts:,}" if restarts else "",
                "goodput": f"{self._goodput(time.monotonic()):.0%}" if self._step > self._first else "",
                "checkpoints": str(self._workdir / "checkpoints"),
                "metrics": str(self._workdir / METRICS),
                "events": str(self._workdir / EVENTS),
                "TensorBoard": str(self._workdir / BOARD),
            },
        )


def _when_ready(done):
    done.block_until_ready()
    return time.monotonic()
