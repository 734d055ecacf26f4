"""Records a profile of selected steps."""

import logging
import pathlib
import shutil
import tempfile

import jax
from etils import epath

from stf_jax.config import short_message
from stf_jax.files import in_bucket, upload

_log = logging.getLogger(__name__)


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
        folder, self._trace_folder = self._trace_folder, None
        try:
            jax.profiler.stop_trace()
            if in_bucket(self._folder):
                upload(folder, self._folder)
        except Exception as error:  # disks, buckets and the profiler raise many types
            _log.warning("The profile cannot be written (%s); the run continues.", short_message(error))
        finally:
            if in_bucket(self._folder):
                shutil.rmtree(folder, ignore_errors=True)
