"""Records a profile of selected steps."""

import pathlib
import shutil
import tempfile

import jax
from etils import epath

from stf_jax.files import in_bucket, upload


class Profile:
    """A trace of selected steps, in the format of TensorBoard's profile plugin (xprof)."""

    def __init__(self, folder: epath.Path, first: int, steps: int) -> None:
        """Selects ``steps`` steps, starting with ``first``; none if either is 0."""
        self._folder, self._steps = folder, range(first, first + steps) if first else range(0)
        self._trace_folder: pathlib.Path | None = None  # while a trace is recorded

    def before_step(self, step: int) -> None:
        """Starts the trace at the first selected step that this process runs."""
        if step in self._steps and self._trace_folder is None:
            # The profiler writes only to local disks.
            self._trace_folder = pathlib.Path(tempfile.mkdtemp() if in_bucket(self._folder) else self._folder)
            jax.profiler.start_trace(self._trace_folder)

    def after_step(self, step: int, output: jax.Array) -> None:
        """Stops the trace after the last selected step, once its ``output`` is ready."""
        if self._trace_folder is not None and step + 1 not in self._steps:
            output.block_until_ready()
            self.stop()

    def stop(self) -> None:
        """Stops the trace if one is being recorded: a run may end before its selected steps do."""
        if self._trace_folder is None:
            return
        jax.profiler.stop_trace()
        if in_bucket(self._folder):
            upload(self._trace_folder, self._folder)
            shutil.rmtree(self._trace_folder)
        self._trace_folder = None
