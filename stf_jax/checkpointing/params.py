"""Reads parameters one by one from a run's checkpoint or an imported folder, and writes imported folders."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
import orbax.checkpoint.experimental.v1 as v1
from etils import epath

from stf_jax.checkpointing.base import BASE, Base, read_base
from stf_jax.checkpointing.checksum import compute_checksum, host_checksum
from stf_jax.checkpointing.frozen import FROZEN
from stf_jax.checkpointing.items import IO_ERRORS, crc, error_reason, read_shapes, read_sums, to_absolute
from stf_jax.checkpointing.renames import current_paths
from stf_jax.config import UserError
from stf_jax.files import in_bucket, local_copy
from stf_jax.models.blueprint import TEACHER

_CHUNK = 4 * 2**20  # bytes
_GROUP = 16 * 2**20  # bytes of small parameters per write; each write reads all that was written before
IMPORTED = "params"  # the Orbax checkpoint in a folder of imported weights

_Array = TypeVar("_Array", np.ndarray, jax.Array)


class ParamSource(Protocol):
    """Parameters of a model that are read when they are asked for."""

    @property
    def shapes(self) -> Mapping[str, Any]:
        """What has the shape of each parameter, by path."""
        ...

    def read(self, path: str) -> np.ndarray:
        """Reads one parameter into host memory. Raises UserError if that fails."""
        ...

    def restore(self, shardings: Mapping[str, jax.sharding.Sharding]) -> Iterator[tuple[str, jax.Array]]:
        """Yields paths and parameters with these shardings, in their order. Raises UserError if that fails."""
        ...


class SavedParams:
    """The parameters, by path, of a run's newest checkpoint or of a folder that ``convert`` imported.

    Attributes:
      shapes: shape and dtype of every parameter that the folder has, without those of a teacher.
      frozen: the paths of those that the run did not train; empty for an imported folder.
      step: the run's step; None for an imported folder.
      base: the frozen parameters of the run that the folder does not have.
      frozen_sums: checksums of frozen parameters, by path, unless each step saved them.
    """

    def __init__(self, folder: epath.Path) -> None:
        """Reads shapes, but no values yet. Raises UserError if the folder has no complete checkpoint."""
        if in_bucket(folder) and not os.fspath(folder).startswith("gs://"):
            folder = epath.Path(local_copy(folder))  # Orbax reads only gs:// buckets
        self.step: int | None = None
        self._items = [to_absolute(folder) / IMPORTED / "state"]
        self._sums: dict[str, int] = {}
        self.base, self.frozen_sums = Base(), dict[str, int]()
        if not self._items[0].exists():
            self.step = newest_step(folder)
            if self.step is None:
                raise UserError(f"Run {folder} has no complete checkpoint to start from.")
            step = to_absolute(folder) / "checkpoints" / str(self.step)
            self._items = [item for item in (step / "trainable", step / FROZEN) if item.exists()]  # old runs have both
            self._sums = read_sums(step)
            if FROZEN in self._sums:
                self._add_frozen(to_absolute(folder))
        try:
            trees = [read_shapes(item) for item in self._items]
        except IO_ERRORS as error:
            raise UserError(
                f"The checkpoint in {folder} is damaged ({error_reason(error)}); {self._remedy()}."
            ) from None
        leaves = {
            path: (item, leaf)
            for item, tree in zip(self._items, trees, strict=True)
            for path, leaf in tree.items()
            if not path.startswith(f"{TEACHER}/")
        }
        self._saved_path = current_paths(leaves)
        self._item_of = {path: leaves[saved][0] for path, saved in self._saved_path.items()}
        self.shapes = {
            path: jax.ShapeDtypeStruct(leaves[saved][1].shape, leaves[saved][1].dtype)
            for path, saved in self._saved_path.items()
        }
        self.frozen = frozenset(path for path, item in self._item_of.items() if item.name == FROZEN)
        outside = {path: leaf for path, leaf in self.base.shapes.items() if path not in self.shapes}
        self.base = dataclasses.replace(self.base, shapes=outside)
        if lost := sorted(self.frozen_sums.keys() - set().union(*trees) - outside.keys()):
            raise UserError(
                f"{folder / BASE}, which says where the run did not save {lost[0]}, is damaged or missing; "
                f"{self._remedy()}."
            )

    def _add_frozen(self, workdir: epath.Path) -> None:
        folder = workdir / FROZEN
        sums = read_sums(folder)
        if crc(sums) != self._sums[FROZEN]:
            problem = "is damaged, or of another run" if folder.exists() else "is missing"
            raise UserError(f"{folder}, which holds the frozen parameters of the run, {problem}; {self._remedy()}.")
        self.base = read_base(workdir)
        self.frozen_sums = {name.removeprefix(f"{FROZEN}/"): value for name, value in sums.items()}
        if (folder / FROZEN).exists() or not self.base.shapes:
            self._items.append(folder / FROZEN)
        self._sums |= sums

    def _remedy(self) -> str:
        return (
            "import it again"
            if self.step is None
            else "resume the run, which repairs it or falls back to an earlier step"
        )

    @staticmethod
    def exists_in(folder: epath.Path) -> bool:
        """Whether the folder is a run's workdir or an imported folder."""
        return (folder / "checkpoints").is_dir() or (folder / IMPORTED / "state").is_dir()

    def read(self, path: str) -> np.ndarray:
        """Reads one parameter into host memory. Raises UserError if it is damaged."""
        with ocp.PyTreeCheckpointer() as reader:
            return self._read(reader, path, ocp.RestoreArgs(restore_type=np.ndarray), host_checksum)

    def _read(
        self,
        reader: ocp.PyTreeCheckpointer,
        path: str,
        restore_args: ocp.RestoreArgs,
        checksum: Callable[[_Array], int],
    ) -> _Array:
        saved = self._saved_path[path]
        args = ocp.args.PyTreeRestore(
            item={saved: self.shapes[path]}, restore_args={saved: restore_args}, partial_restore=True
        )
        try:
            value = reader.restore(self._item_of[path], args=args)[saved]
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # Orbax raises many types, some of them bare Exception
            raise UserError(
                f"{self._item_of[path]}: parameter {path} cannot be read ({error_reason(error)}); {self._remedy()}."
            ) from None
        written = self._sums.get(f"{self._item_of[path].name}/{saved}")
        if written is not None and checksum(value) != written:
            raise UserError(
                f"{self._item_of[path]} is damaged: parameter {path} does not match its checksum; {self._remedy()}."
            )
        return value

    def restore(self, shardings: Mapping[str, jax.sharding.Sharding]) -> Iterator[tuple[str, jax.Array]]:
        """Yields paths and parameters with these shardings, one at a time, so that host memory holds only one.

        Raises UserError if one is damaged.
        """
        with ocp.PyTreeCheckpointer() as reader:
            for path, sharding in shardings.items():
                yield path, self._read(reader, path, ocp.ArrayRestoreArgs(sharding=sharding), compute_checksum)


def newest_step(workdir: epath.Path) -> int | None:
    """Returns the step of a run's newest complete checkpoint, or None."""
    if not (workdir / "checkpoints").is_dir():
        return None
    with ocp.CheckpointManager(to_absolute(workdir) / "checkpoints") as manager:
        return manager.latest_step()


def write_params(folder: pathlib.Path, params: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes an imported folder's parameters as they are produced, holding one, or a few MiB of small ones, in memory.

    They appear in ``folder`` once the last is written.
    """
    target = to_absolute(folder) / IMPORTED
    context = v1.Context()
    # Small chunks: a device that reads its shard of a parameter decompresses every chunk that the shard touches.
    context.array.saving.storage_options.chunk_byte_size = _CHUNK
    with context:
        group: dict[str, np.ndarray] = {}
        size = 0
        for path, value in params:
            group[path] = value
            size += value.nbytes
            del value  # before the next one is produced
            if size >= _GROUP:
                v1.partial.save(target, group)
                group, size = {}, 0
        if group:
            v1.partial.save(target, group)
        v1.partial.finalize(target)
