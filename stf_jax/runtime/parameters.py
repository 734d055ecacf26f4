"""Parameters as Orbax keeps them, by path: read one by one from a run or an imported folder, and written to one."""

import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp
import orbax.checkpoint.experimental.v1 as v1
from etils import epath

from stf_jax.config import UserError
from stf_jax.runtime.checkpoint import UNREADABLE, absolute, read_sums, why
from stf_jax.runtime.checksum import checksum as device_checksum
from stf_jax.runtime.checksum import host_checksum
from stf_jax.runtime.files import fetched, in_bucket

_CHUNK = 4 * 2**20  # bytes
_GROUP = 16 * 2**20  # bytes of small parameters that are written together, for every write reads all that was written
IMPORTED = "params"  # the Orbax checkpoint in a folder of imported weights


class SavedParams:
    """Parameters as Orbax keeps them, by path: of a run's newest checkpoint, or of a folder that ``convert`` imported.

    Attributes:
      shapes: shape and dtype of every parameter.
      step: of the run; None for an imported folder.
    """

    def __init__(self, folder: epath.Path):
        """Reads no values yet. Raises UserError where the folder has no complete checkpoint."""
        if in_bucket(folder) and not os.fspath(folder).startswith("gs://"):
            folder = epath.Path(fetched(folder))  # Orbax reads no other buckets
        self.step = None
        self._items, self._sums = [absolute(folder) / IMPORTED / "state"], {}
        if not self._items[0].exists():
            self.step = newest_step(folder)
            if self.step is None:
                raise UserError(f"Run {folder} holds no complete checkpoint to start from.")
            step = absolute(folder) / "checkpoints" / str(self.step)
            self._items = [item for item in (step / "trainable", step / "frozen") if item.exists()]
            self._sums = read_sums(step)
        try:
            trees = [dict(ocp.StandardCheckpointHandler().metadata(item).tree) for item in self._items]
        except UNREADABLE as error:
            raise UserError(f"The checkpoint in {folder} is damaged, {self._mend()}: {why(error)}.") from None
        self._where = {path: item for item, tree in zip(self._items, trees, strict=True) for path in tree}
        self.shapes = {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for tree in trees for path, leaf in tree.items()
        }

    def _mend(self):
        return "import it again" if self.step is None else "take a checkpoint before it, as the run does that goes on"

    @staticmethod
    def at(folder: epath.Path) -> bool:
        """Whether the folder is a run's or an imported one."""
        return (folder / "checkpoints").is_dir() or (folder / IMPORTED / "state").is_dir()

    def read(self, path: str) -> np.ndarray:
        """One parameter, into host memory. Raises UserError where it is damaged."""
        with ocp.PyTreeCheckpointer() as reader:
            return self._read(reader, path, ocp.RestoreArgs(restore_type=np.ndarray), host_checksum)

    def _read(self, reader, path, how, checksum):
        how = ocp.args.PyTreeRestore(item={path: self.shapes[path]}, restore_args={path: how}, partial_restore=True)
        try:
            value = reader.restore(self._where[path], args=how)[path]
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # of many kinds, and some are no kind at all
            raise UserError(
                f"{self._where[path]}: parameter {path} cannot be read, {self._mend()}: {why(error)}."
            ) from None
        written = self._sums.get(f"{self._where[path].name}/{path}")
        if written is not None and int(checksum(value)) != written:
            raise UserError(
                f"{self._where[path]} is damaged: parameter {path} is not as it was written; {self._mend()}."
            )
        return value

    def restore(self, places: Mapping[str, jax.sharding.Sharding]) -> Iterator[tuple[str, jax.Array]]:
        """Parameters on the devices named, with their paths.

        One after the other, so that what is read and not yet on its devices is never more than one. Raises UserError
        where one is damaged.
        """
        checksum = jax.jit(device_checksum)
        with ocp.PyTreeCheckpointer() as reader:
            for path, where in places.items():
                yield path, self._read(reader, path, ocp.ArrayRestoreArgs(sharding=where), checksum)


def newest_step(workdir: epath.Path) -> int | None:
    """The step of a run's newest complete checkpoint; None where it has none."""
    if not (workdir / "checkpoints").is_dir():
        return None
    with ocp.CheckpointManager(absolute(workdir) / "checkpoints") as manager:
        return manager.latest_step()


def write_params(folder: pathlib.Path, params: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes an imported folder's parameters as they come: one large one, or some MiB of small ones, is in memory.

    They appear in ``folder`` when the last is written.
    """
    target = absolute(folder) / IMPORTED
    how = v1.Context()
    # In small chunks: a device that reads its share of a parameter expands every chunk that the share touches.
    how.array.saving.storage_options.chunk_byte_size = _CHUNK
    with how:
        group, size = {}, 0
        for path, value in params:
            group[path] = value
            size += value.nbytes
            del value  # before the next one is made
            if size >= _GROUP:
                v1.partial.save(target, group)
                group, size = {}, 0
        if group:
            v1.partial.save(target, group)
        v1.partial.finalize(target)
