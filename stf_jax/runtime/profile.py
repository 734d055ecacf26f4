"""A profile of chosen steps."""

import pathlib
import shutil
import tempfile

import jax
from etils import epath

from stf_jax.runtime.files import in_bucket, upload


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
