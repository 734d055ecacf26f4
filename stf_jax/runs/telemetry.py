"""Reports a run's progress: log lines, a progress bar, a summary, and the figures in ``metrics.jsonl``.

docs/ARCHITECTURE.md defines each figure. Nothing here waits for a device or another host, except a save
and the end of a profile: a step is logged after the next ones were dispatched.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType

import jax
import numpy as np
import tqdm
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from stf_jax.accounting.chips import find_chip
from stf_jax.config import TrainConfig, short_message
from stf_jax.parallel.hosts import exit_status
from stf_jax.parallel.mesh import get_row_share
from stf_jax.runs.events import EVENTS, METRICS, TENSORBOARD, Events, log_errors_once
from stf_jax.runs.profiler import Profile
from stf_jax.runs.writers import Writer, open_writers
from stf_jax.table import format_duration, format_facts

# Seconds of wall-clock time in training; tokens trained on; unusable rows replaced; updates skipped.
Clock = dict[str, float]
INITIAL_CLOCK: Clock = {"seconds": 0.0, "tokens": 0, "rows_replaced": 0, "updates_skipped": 0}
_HALF = 20  # bits of the lower half of a count, because jax adds 32-bit numbers


@dataclasses.dataclass(frozen=True)
class _Progress:
    """What a process has done up to a step that it gave to the devices."""

    step: int
    done_time: concurrent.futures.Future[float]  # when the devices finish the step
    counts: tuple[int, int]  # this host's tokens and unusable rows
    shared_counts: jax.Array | None  # int32 [2, 2]: those of all hosts, in two halves; None if they were not added up
    flops: int  # of all devices
    waited: Mapping[str, float]
    compile_seconds: float


class Telemetry:
    """Reports the steps of a run and how it ends, from its first host alone.

    Leaving the ``with`` block ends the report: after the last step, or with the error that was raised.
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
        start_time: float,
        active: bool,
        events: Events,
        log_first_step: bool = False,
    ) -> None:
        """Starts timing. Create it when everything is ready for the first step.

        Args:
          workdir: the run's folder.
          config: the run's config.
          steps: the step at which the run ends.
          first: the step to continue from, reached at ``clock``; later lines of metrics are dropped.
          clock: totals of the run so far.
          mesh: its devices.
          start_time: ``time.monotonic()`` when this process started to prepare the run.
          active: whether this host reports.
          events: if the run has begun there, its end or stop is added.
          log_first_step: whether step ``first`` is still to be logged.

        Raises:
          UserError: the workdir cannot be written to, or Weights & Biases rejects the run.
        """
        self._active, self._workdir, self._name, self._steps = active, workdir, config.name, steps
        self._events = events
        self._writers: list[tuple[Writer, Callable[..., None]]] = []
        self._initial, self._train_start = INITIAL_CLOCK | clock, time.monotonic()  # old runs lack some counts
        self._clock = self._initial  # as last computed
        self._first = self._step = first
        self._total_tokens = self._replaced = self._flops = 0  # of this host, but FLOPs of all devices
        self._skipped = self._last_skipped = 0
        self._loss = math.nan
        self._mesh, self._chip = mesh, find_chip(mesh.devices.flat[0])
        self._shares = get_row_share(mesh, jax.process_index())[1]  # of the rows, among the hosts
        self._start_time, self._waited = start_time, dict.fromkeys(("data", "compile", "measure", "save"), 0.0)
        self._compile_seconds = 0.0
        self._executor = concurrent.futures.ThreadPoolExecutor(1)
        self._done_time: concurrent.futures.Future[float] = concurrent.futures.Future()
        self._done_time.set_result(self._train_start)  # when the devices finished the last step they were given
        self._last = self._snapshot(share=False)  # the last logged step
        self._unlogged: collections.deque[_Progress] = collections.deque()  # in the order of their steps
        self._profile = Profile(workdir / "profile", config.profile.first_step, config.profile.steps if active else 0)
        if not active:
            return
        self._try_print = log_errors_once("The log")  # the log may be on a full disk, too
        writers = open_writers(workdir, config, first - log_first_step)
        self._writers = [(writer, log_errors_once(writer.name)) for writer in writers]
        # Shown on terminals only: in a log file it would leave carriage returns.
        self._bar = tqdm.tqdm(
            total=steps, initial=first, desc=self._name, unit="step", dynamic_ncols=True, mininterval=0.5, disable=None
        )

    def __enter__(self) -> "Telemetry":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error, the other hosts may be gone, and what the devices still compute is not waited for.
        clock = self._clock if error else self.clock()
        self._executor.shutdown(wait=not error, cancel_futures=bool(error))
        with contextlib.suppress(*([Exception] if error else [])):  # the first error is the one to report
            self._profile.stop()
        if not self._active:
            return
        status = exit_status(error) if error else 0
        self._bar.close()
        for writer, attempt in self._writers:
            attempt(writer.close, status)
        if self._events.in_progress and error:
            self._events.add("stopped", self._step, status=status, reason=short_message(error))
        elif self._events.in_progress:
            self._events.add("end", self._step)
        self._try_print(print, self._summary(clock, early=error is not None), flush=True)

    @property
    def updates_skipped(self) -> int:
        """Number of skipped updates, over restarts."""
        return int(self._initial["updates_skipped"]) + self._skipped

    def count_skipped_update(self) -> None:
        """Counts a skipped update. All hosts must call it."""
        self._skipped += 1

    def clock(self) -> Clock:
        """Computes totals over restarts and hosts. All hosts must call it at the same step."""
        # As pairs of int32, because jax would send 64-bit numbers as 32-bit ones.
        local = np.array([self._total_tokens, self._replaced], np.int64).view(np.int32)
        counts = (
            np.ascontiguousarray(multihost_utils.process_allgather(local)).view(np.int64).reshape(-1, 2).sum(axis=0)
        )
        self._clock = self._add_initial(time.monotonic(), counts)
        return self._clock

    def _add_initial(self, now: float, counts: np.ndarray) -> Clock:
        """Returns totals over restarts, given the tokens and unusable rows that all hosts have counted."""
        tokens, replaced = counts * self._shares // jax.process_count()  # hosts that read the same rows each count them
        return {
            "seconds": self._initial["seconds"] + now - self._train_start,
            "tokens": self._initial["tokens"] + int(tokens),
            "rows_replaced": self._initial["rows_replaced"] + int(replaced),
            "updates_skipped": self.updates_skipped,
        }

    def _snapshot(self, share: bool) -> _Progress:
        counts = self._total_tokens, self._replaced
        return _Progress(
            self._step,
            self._done_time,
            counts,
            self._share(counts) if share and jax.process_count() > 1 else None,
            self._flops,
            dict(self._waited),
            self._compile_seconds,
        )

    def _share(self, counts: tuple[int, int]) -> jax.Array:
        """Adds up counts of all hosts on the devices, after the steps that they have; nothing waits for the result."""
        halves = np.array([[count >> _HALF, count % 2**_HALF] for count in counts], np.int32)
        local = np.zeros((self._mesh.local_mesh.devices.size, 2, 2), np.int32)
        local[0] = halves
        rows = NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))
        array = jax.make_array_from_process_local_data(rows, local)
        return jax.jit(_sum_rows, out_shardings=NamedSharding(self._mesh, PartitionSpec()))(array)

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Wraps the dispatch of a step, so that a profile shows it by its number."""
        self._profile.before_step(step)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def advance(self, step: int, tokens: int, replaced: int, flops: int, output: jax.Array, log_due: bool) -> None:
        """Counts a dispatched step. All hosts must call it for the same step.

        Args:
          step: its number.
          tokens: this host's tokens in the step, without padding.
          replaced: this host's unusable rows so far.
          flops: the step's model FLOPs on all devices together.
          output: an output of the step, to see when it is done.
          log_due: whether :meth:`log` is called for the step, now or later.
        """
        self._step = step
        self._total_tokens += tokens
        self._replaced, self._flops = replaced, self._flops + flops
        self._done_time = self._executor.submit(_time_when_ready, output)
        if log_due:
            self._unlogged.append(self._snapshot(share=True))
        self._profile.after_step(step, output)
        if self._active:
            self._bar.update()

    @contextlib.contextmanager
    def time_waiting(self, kind: str) -> Iterator[None]:
        """Times what the next step waits for: ``data``, ``compile``, ``measure`` or ``save``.

        Only time in which the devices are idle counts, that is, after they finish the steps they were given.
        """
        begin = time.monotonic()
        yield
        end = time.monotonic()
        if kind == "compile":
            self._compile_seconds += end - begin
        if self._done_time.done():
            self._waited[kind] += max(end - max(begin, self._done_time.result()), 0.0)

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Logs a step that the devices have finished: its scalars, and the speed since the last logged step.

        Later steps may have been dispatched; steps are logged in their order.
        """
        last, done = self._last, self._last
        while self._unlogged and self._unlogged[0].step <= step:
            done = self._unlogged.popleft()
        self._last, now = done, done.done_time.result()
        waited = {kind: seconds - last.waited[kind] for kind, seconds in done.waited.items()}
        elapsed = max(now - last.done_time.result() - waited["compile"] - waited["measure"], 1e-9)
        counts, devices = np.array(done.counts), self._mesh.size
        tokens = (counts[0] - last.counts[0]) * self._shares / elapsed
        flops = (done.flops - last.flops) / elapsed / devices
        speed = {
            "tokens_per_second": tokens,
            "tokens_per_second_per_device": tokens / devices,
            "seconds_per_step": elapsed / max(done.step - last.step, 1),
            "model_flops_per_second": flops,
            "data_wait": waited["data"] / elapsed,
            "goodput": self._goodput(now, done.waited),
        }
        if done.compile_seconds > last.compile_seconds:
            speed["compile_seconds"] = done.compile_seconds
        if self._chip is not None:
            speed["mfu"] = flops / self._chip.flops
        memory = [stats["peak_bytes_in_use"] for device in self._mesh.local_devices if (stats := device.memory_stats())]
        if memory:  # CPU devices report none
            speed["device_memory_bytes"] = max(memory)
        skipped, self._last_skipped = self._skipped - self._last_skipped, self._skipped
        if done.shared_counts is not None:
            counts = np.asarray(done.shared_counts).astype(np.int64) @ [2**_HALF, 1]
        self._clock = self._add_initial(now, counts)
        if not self._active:
            return
        self._loss = scalars["loss"]
        values = {**scalars, **speed, **self._clock}
        for writer, attempt in self._writers:
            attempt(writer.write, step, values)
        self._try_print(tqdm.tqdm.write, self._format_line(step, values, skipped, done), file=sys.stderr)

    def _goodput(self, now: float, waited: Mapping[str, float]) -> float:
        idle = self._train_start - self._start_time + sum(waited.values())
        return 1 - idle / max(now - self._start_time, 1e-9)

    def _format_line(self, step: int, values: Mapping[str, float], skipped: int, done: _Progress) -> str:
        """Formats a logged step for people, without figures that are not available."""
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
        # Only the overall metrics of benchmarks: those of their parts have longer names.
        parts += [f"{key} {value:.4g}" for key, value in values.items() if key.count("/") == 1]
        if self._first < step < self._steps:
            # Measuring and saving count, compiling does not.
            seconds = done.done_time.result() - self._train_start - done.waited["compile"]
            seconds_per_step = seconds / (step - self._first)
            parts.append(f"{format_duration(seconds_per_step * (self._steps - step))} left")
        return "  ".join(filter(None, parts))

    def _summary(self, clock: Clock, early: bool) -> str:
        rows, updates, restarts = clock["rows_replaced"], clock["updates_skipped"], self._events.restarts
        skipped = [f"{rows:,} unusable rows"] * (rows > 0) + [f"{updates:,} updates"] * (updates > 0)
        return format_facts(
            f"{self._name}: {'ended early' if early else 'done'}",
            {
                "steps": f"{self._step:,} of {self._steps:,}" if early else f"{self._steps:,}",
                "tokens": f"{clock['tokens']:,}",
                "time": format_duration(clock["seconds"]),
                "last loss": "" if math.isnan(self._loss) else f"{self._loss:.3f}",
                "skipped": ", ".join(skipped),
                "restarts": f"{restarts:,}" if restarts else "",
                "goodput": f"{self._goodput(time.monotonic(), self._waited):.0%}" if self._step > self._first else "",
                "checkpoints": str(self._workdir / "checkpoints"),
                "metrics": str(self._workdir / METRICS),
                "events": str(self._workdir / EVENTS),
                "TensorBoard": str(self._workdir / TENSORBOARD),
            },
        )


def _sum_rows(rows: jax.Array) -> jax.Array:
    return rows.sum(axis=0)


def _time_when_ready(output: jax.Array) -> float:
    output.block_until_ready()
    return time.monotonic()
