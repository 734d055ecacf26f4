"""Orbax checkpoints: state, data iterator and clock as one step, written while training goes on."""

import pathlib
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp

from stf_jax.config import CheckpointConfig, UserError


class Checkpoints:
    """The checkpoints of a run, in ``workdir/checkpoints``.

    A step is one folder with the items ``trainable``, ``frozen``, ``moments`` (arrays), ``data`` (the iterator) and
    ``clock``. It appears under its name only when all of it is written.
    """

    def __init__(self, workdir: pathlib.Path, config: CheckpointConfig):
        policies = ocp.checkpoint_managers.save_decision_policy
        options = ocp.CheckpointManagerOptions(
            # Orbax's default would save the first step as well.
            save_decision_policy=policies.AnySavePolicy(
                [policies.FixedIntervalPolicy(config.every_steps), policies.PreemptionCheckpointingPolicy()]
            ),
            max_to_keep=config.keep_last,
            keep_period=config.keep_every or None,
        )
        self._manager = ocp.CheckpointManager((workdir / "checkpoints").resolve(), options=options)

    @property
    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, iterator: Any, clock: dict[str, float], *, last: bool = False) -> None:
        """Saves where the interval or ``last`` asks for it; arrays are written in the background.

        Call it after a step and before the iterator moves: what is saved continues with the next batch.
        """
        if step == self.latest or not (last or self._manager.should_save(step)):
            return
        items = {name: ocp.args.StandardSave(tree) for name, tree in _trees(state).items()} | {
            "data": grain.checkpoint.CheckpointSave(iterator),
            "clock": ocp.args.JsonSave(clock),
        }
        self._manager.save(step, args=ocp.args.Composite(**items), force=last)

    def restore(self, step: int, layout: Any, iterator: Any) -> tuple[dict[str, Any], dict[str, float]]:
        """The arrays (``trainable``, ``frozen``, ``moments``) of a step as the layout wants them, and the clock.

        The iterator is moved to where it was.
        """
        trees = _trees(layout)
        items = {name: ocp.args.StandardRestore(tree) for name, tree in trees.items()} | {
            "data": grain.checkpoint.CheckpointRestore(iterator),
            "clock": ocp.args.JsonRestore(),
        }
        found = self._manager.restore(step, args=ocp.args.Composite(**items))
        return {"frozen": {}} | {name: found[name] for name in trees}, found["clock"]

    def close(self) -> None:
        """Waits for writes to finish."""
        self._manager.close()


def _trees(state):
    """The items of arrays. Orbax does not write an empty tree, which ``frozen`` is where everything learns."""
    trees = {"trainable": state.trainable, "frozen": state.frozen, "moments": state.moments}
    return {name: tree for name, tree in trees.items() if tree}


def restore_params(workdir: pathlib.Path, layout: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """All parameters of a run's newest checkpoint, those that the layout names on the devices that it names.

    Raises:
      UserError: the run has no complete checkpoint.
    """
    with ocp.CheckpointManager((workdir / "checkpoints").resolve()) as manager:
        step = manager.latest_step()
        if step is None:
            raise UserError(f"Run {workdir} holds no complete checkpoint to start from.")
        params = {}
        for item in ("trainable", "frozen"):
            folder = manager.directory / str(step) / item
            if not folder.exists():
                continue
            saved = ocp.StandardCheckpointHandler().metadata(folder).tree
            with ocp.StandardCheckpointer() as reader:
                wanted = {
                    path: layout[path].update(dtype=leaf.dtype)
                    if path in layout and layout[path].shape == leaf.shape
                    else jax.ShapeDtypeStruct(
                        leaf.shape, leaf.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
                    )
                    for path, leaf in saved.items()
                }
                params |= reader.restore(folder, wanted)
        return params
