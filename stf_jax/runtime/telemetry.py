"""What a run says: a progress bar and a summary for people, ``metrics.jsonl`` and TensorBoard for machines.

docs/ARCHITECTURE.md defines each figure. Nothing here waits for a device, but for the end of a profile.
"""

import concurrent.futures
import contextlib
import json
import math
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator

import jax
import numpy as np
import tqdm
from etils import epath
from jax.experimental import multihost_utils
from tensorboard.summary import Writer

from stf_jax.config import TrainConfig
from stf_jax.runtime.cost import chip_of
from stf_jax.runtime.files import GrowingFile, in_bucket, upload
from stf_jax.runtime.mesh import share_of_rows

Clock = dict[str, float]  # seconds of wall-clock in training; tokens trained on; rows that could not be used
START: Clock = {"seconds": 0.0, "tokens": 0, "rows_replaced": 0}


class Telemetry:
    """Writes the scalars of logged steps. Only the first host of a run writes."""

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
    ):
        """Stands between all that is prepared and the first step.

        Args:
          first: the step to continue from, reached at ``clock``; later lines of metrics are dropped.
          began: ``time.monotonic()`` when this process turned to the run.
        """
        self._active, self._workdir, self._name, self._steps = active, workdir, config.name, steps
        self._before, self._begin = clock, time.monotonic()
        self._last_time, self._last_step = self._begin, first
        self._tokens = self._all_tokens = self._replaced = 0  # this host's
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
        path = workdir / "metrics.jsonl"
        # A run that was killed had gone on past the checkpoint that this one continues from.
        lines = path.read_text().splitlines() if path.exists() else []
        self._file = GrowingFile(path, [line for line in lines if _step_of(line, first + 1) <= first])
        self._board = Writer(str(workdir / "tensorboard"))
        self._bar = tqdm.tqdm(
            total=steps, initial=first, desc=self._name, unit="step", dynamic_ncols=True, mininterval=0.5
        )

    def clock(self) -> Clock:
        """The run so far, over restarts and all hosts; they must all ask at the same step."""
        # In halves, for jax would send numbers of 64 bits as 32.
        mine = np.array([self._all_tokens, self._replaced], np.int64).view(np.int32)
        counts = np.ascontiguousarray(multihost_utils.process_allgather(mine)).view(np.int64).reshape(-1, 2)
        # Of hosts that read the same rows, each counts them.
        tokens, replaced = counts.sum(axis=0) * self._shares // jax.process_count()
        return {
            "seconds": self._before["seconds"] + time.monotonic() - self._begin,
            "tokens": self._before["tokens"] + int(tokens),
            "rows_replaced": self._before["rows_replaced"] + int(replaced),
        }

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
            "goodput": 1 - (self._begin - self._began + sum(self._waited.values())) / max(now - self._began, 1e-9),
            **self._news,
        }
        if self._chip is not None:
            speed["mfu"] = flops / self._chip.flops
        memory = [stats["peak_bytes_in_use"] for device in self._local if (stats := device.memory_stats())]
        if memory:  # none of CPUs
            speed["device_memory_bytes"] = max(memory)
        self._last_time, self._last_step, self._tokens, self._flops = now, step, 0, 0
        self._waited_before, self._news = dict(self._waited), {}
        clock = self.clock()
        if not self._active:
            return
        self._loss = scalars["loss"]
        values = {"step": step, **scalars, **speed, **clock}
        self._file.append(json.dumps(values))
        for key, value in values.items():
            if key != "step":
                self._board.add_scalar(key, value, step)
        busy = f", MFU {speed['mfu']:.0%}" if "mfu" in speed else ""
        self._bar.set_postfix_str(
            f"loss {scalars['loss']:.3f}, lr {scalars['learning_rate']:.1e}, {tokens:,.0f} tok/s{busy}"
        )

    def close(self) -> None:
        """Ends the bar and the files, and says in a line what the run came to."""
        clock = self.clock()
        self._profile.end()
        self._watch.shutdown()
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


class Profile:
    """A trace of chosen steps, as TensorBoard's profile plugin (xprof) reads it."""

    def __init__(self, folder: epath.Path, first: int, steps: int):
        """The trace of ``steps`` steps from ``first`` on; of none where one of them is 0."""
        self._folder, self._steps, self._at = folder, range(first, first + steps) if first else range(0), None

    def before(self, step: int) -> None:
        """Begins with the first of the steps; where a run goes on among them, with that one."""
        if step in self._steps and self._at is None:
            # The profiler writes to local disks alone.
            self._at = pathlib.Path(tempfile.mkdtemp() if in_bucket(self._folder) else self._folder)
            jax.profiler.start_trace(self._at)

    def after(self, step: int, done: jax.Array) -> None:
        """Ends with the last of the steps, when the devices have ended it."""
        if self._at is not None and step + 1 not in self._steps:
            done.block_until_ready()
            self.end()

    def end(self) -> None:
        """Ends the trace, if there is one: a run may end before its steps do."""
        if self._at is None:
            return
        jax.profiler.stop_trace()
        if in_bucket(self._folder):
            upload(self._at, self._folder)
            shutil.rmtree(self._at)
        self._at = None


def _when_ready(done):
    done.block_until_ready()
    return time.monotonic()


def _step_of(line, otherwise):
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return otherwise
