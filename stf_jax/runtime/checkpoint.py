"""Orbax checkpoints: state, data iterator and clock as one step, written while training goes on."""

import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import orbax.checkpoint.experimental.v1 as v1
from etils import epath

from stf_jax.config import CheckpointConfig, UserError
from stf_jax.runtime.files import fetched, in_bucket

_CHUNK = 4 * 2**20  # bytes
IMPORTED = "params"  # the Orbax checkpoint in a folder of imported weights


class Checkpoints:
    """The checkpoints of a run, in ``workdir/checkpoints``.

    A step is one folder with the items ``trainable``, ``frozen``, ``moments`` (arrays), ``data`` (where the
    stream of batches stands) and ``clock``. It appears under its name only when all of it is written.
    """

    def __init__(self, workdir: epath.Path, config: CheckpointConfig):
        policies = ocp.checkpoint_managers.save_decision_policy
        options = ocp.CheckpointManagerOptions(
            # Orbax's default would save the first step as well.
            save_decision_policy=policies.AnySavePolicy(
                [policies.FixedIntervalPolicy(config.every_steps), policies.PreemptionCheckpointingPolicy()]
            ),
            max_to_keep=config.keep_last,
            keep_period=config.keep_every or None,
        )
        if in_bucket(workdir) and not os.fspath(workdir).startswith("gs://"):
            raise UserError(f"Orbax writes no checkpoints to {workdir}; give a gs:// or a local --workdir.")
        self._manager = ocp.CheckpointManager(_absolute(workdir) / "checkpoints", options=options)

    @property
    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def due(self, step: int, *, last: bool = False) -> bool:
        """Whether the interval, a pre-emption or ``last`` asks for this step to be saved; on all hosts alike."""
        return step != self.latest and (last or self._manager.should_save(step))

    def save(self, step: int, state: Any, data: dict[str, Any], clock: dict[str, float]) -> None:
        """Saves a step; arrays are written in the background.

        Call it after a step and before the next batch is taken: ``data`` says where the stream of batches stands.
        """
        items = {name: ocp.args.StandardSave(tree) for name, tree in _trees(state).items()} | {
            "data": ocp.args.JsonSave(data),
            "clock": ocp.args.JsonSave(clock),
        }
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, step: int, layout: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, float]]:
        """The arrays (``trainable``, ``frozen``, ``moments``) of a step as the layout wants them, data and clock."""
        trees = _trees(layout)
        items = {name: ocp.args.StandardRestore(tree) for name, tree in trees.items()} | {
            "data": ocp.args.JsonRestore(),
            "clock": ocp.args.JsonRestore(),
        }
        found = self._manager.restore(step, args=ocp.args.Composite(**items))
        return {"frozen": {}} | {name: found[name] for name in trees}, found["data"], found["clock"]

    def close(self) -> None:
        """Waits for writes to finish."""
        self._manager.close()


def _absolute(path):
    """As Orbax wants paths; resolving would take a URI for the name of a folder here."""
    return path if in_bucket(path) else path.resolve()


def _trees(state):
    """The items of arrays. Orbax does not write an empty tree, which ``frozen`` is where everything learns."""
    trees = {"trainable": state.trainable, "frozen": state.frozen, "moments": state.moments}
    return {name: tree for name, tree in trees.items() if tree}


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
        self._items = [_absolute(folder) / IMPORTED / "state"]
        if not self._items[0].exists():
            with ocp.CheckpointManager(_absolute(folder) / "checkpoints") as manager:
                self.step = manager.latest_step()
                if self.step is None:
                    raise UserError(f"Run {folder} holds no complete checkpoint to start from.")
                items = (manager.directory / str(self.step) / item for item in ("trainable", "frozen"))
                self._items = [item for item in items if item.exists()]
        try:
            trees = [dict(ocp.StandardCheckpointHandler().metadata(item).tree) for item in self._items]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"The checkpoint in {folder} is damaged: {' '.join(str(error).split())[:200]}") from None
        self._where = {path: item for item, tree in zip(self._items, trees, strict=True) for path in tree}
        self.shapes = {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for tree in trees for path, leaf in tree.items()
        }

    @staticmethod
    def at(folder: epath.Path) -> bool:
        """Whether the folder is a run's or an imported one."""
        return (folder / "checkpoints").is_dir() or (folder / IMPORTED / "state").is_dir()

    def read(self, path: str) -> np.ndarray:
        """One parameter, into host memory."""
        with ocp.PyTreeCheckpointer() as reader:
            return self._read(reader, path, ocp.RestoreArgs(restore_type=np.ndarray))

    def _read(self, reader, path, how):
        how = ocp.args.PyTreeRestore(item={path: self.shapes[path]}, restore_args={path: how}, partial_restore=True)
        try:
            return reader.restore(self._where[path], args=how)[path]
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{self._where[path]}: parameter {path} cannot be read: {reason}") from None

    def restore(self, places: Mapping[str, jax.sharding.Sharding]) -> Iterator[tuple[str, jax.Array]]:
        """Parameters on the devices named, with their paths.

        One after the other, so that what is read and not yet on its devices is never more than one.
        """
        with ocp.PyTreeCheckpointer() as reader:
            for path, where in places.items():
                yield path, self._read(reader, path, ocp.ArrayRestoreArgs(sharding=where))


def write_params(folder: pathlib.Path, params: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes an imported folder's parameters one by one, so that one at a time is in memory.

    They appear in ``folder`` when the last is written.
    """
    target = _absolute(folder) / IMPORTED
    how = v1.Context()
    # In small chunks: a device that reads its share of a parameter expands every chunk that the share touches.
    how.array.saving.storage_options.chunk_byte_size = _CHUNK
    with how:
        for path, value in params:
            v1.partial.save(target, {path: value})
            del value  # before the next one is made
        v1.partial.finalize(target)
