"""Orbax checkpoints of state, data position and clock, written while training continues."""

import contextlib
import itertools
import logging
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from stf_jax.checkpointing.base import Base
from stf_jax.checkpointing.frozen import FrozenParams
from stf_jax.checkpointing.items import (
    IO_ERRORS,
    TEMPORARY,
    DamagedCheckpoint,
    Trees,
    compute_sums,
    crc,
    error_reason,
    explain_read_errors,
    read_shapes,
    read_sums,
    to_absolute,
)
from stf_jax.checkpointing.renames import current_paths, rename_keys
from stf_jax.config import CheckpointConfig, FaultsConfig, RunFailed, TrainConfig, TryAgain, UserError
from stf_jax.files import in_bucket
from stf_jax.parallel import hosts

if TYPE_CHECKING:
    from stf_jax.training.state import TrainState

_ATTEMPTS, _PAUSE = 3, 5.0  # to save the last step, and seconds between them

_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of a run, in ``workdir/checkpoints``.

    Each step is a folder with the items ``trainable`` and ``moments`` (arrays), ``data`` (the position in the stream of
    batches), ``clock``, and ``sums``, the checksums of all of these and of the frozen parameters, which are saved once
    for all steps (:class:`FrozenParams`). The folder gets its name only when it is complete. Steps of earlier versions
    have an item ``frozen``.
    """

    def __init__(
        self,
        workdir: epath.Path,
        config: CheckpointConfig,
        faults: FaultsConfig = TrainConfig.faults,
        on_event: Callable[..., None] = lambda kind, step, **fields: None,
    ) -> None:
        """Deletes partly written checkpoints, so no other run may be using the workdir.

        Args:
          workdir: the run's folder.
          config: how often to save, and which checkpoints to keep.
          faults: for how many steps saving may fail.
          on_event: called with an event, ``"save_failed"`` or ``"set_aside"``, the step, and details by name.
        """
        if in_bucket(workdir) and not os.fspath(workdir).startswith("gs://"):
            raise UserError(f"Orbax cannot write checkpoints to {workdir}; give a gs:// or a local --workdir.")
        self._folder, self._config, self._on_event = epath.Path(to_absolute(workdir)) / "checkpoints", config, on_event
        self._damaged = self._folder.parent / "damaged"
        self._frozen = FrozenParams(workdir, on_event)
        self._max_unsaved = faults.unsaved_steps or 2 * config.every_steps
        self._manager = self._open()
        self._last_saved = self.latest or 0  # the newest step known to be complete
        self._saving: int | None = None
        self._retry_step: int | None = None
        self._reason = ""

    def _open(self) -> ocp.CheckpointManager:
        if jax.process_index() == 0 and self._folder.exists():
            for partial in self._folder.glob(f"*{TEMPORARY}*"):
                _remove(partial)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._config.keep_last, keep_period=self._config.keep_every or None
        )
        return ocp.CheckpointManager(self._folder, options=options)

    @property
    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def set_base(self, base: Base) -> None:
        """Sets where the run starts from, and which frozen parameters need not be saved for that reason."""
        self._frozen.set_base(base)

    def should_save(self, step: int, *, last: bool = False) -> bool:
        """Whether to save this step: by the interval, to retry a failed save, or as the ``last``. Same on all hosts."""
        if jax.process_count() == 1 and self._saving is not None and not self._manager.is_saving_in_progress():
            # Several hosts may notice this at different steps, so they check only when the next save is due.
            self._finish_pending_save(step)
        retry = self._retry_step is not None and step >= self._retry_step
        return step != self.latest and (last or retry or step % self._config.every_steps == 0)

    def save(
        self, step: int, state: "TrainState", data: dict[str, Any], clock: dict[str, Any], *, last: bool = False
    ) -> None:
        """Saves a step. Arrays are written in the background, except for the ``last`` step, where this waits.

        Call it after a step and before taking the next batch, because ``data`` is the position in the stream of
        batches. A save that fails is retried at a later step; the last step is retried at once.

        Raises:
          RunFailed: no checkpoint could be saved for ``faults.unsaved_steps`` steps; or a trainable parameter or moment
            is not finite, in which case the earlier checkpoints are kept.
        """
        self._finish_pending_save(step)
        trees = {name: tree for name in ("trainable", "moments") if (tree := getattr(state, name))}  # none is empty
        arrays = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        values = {"data": data, "clock": clock}
        sums, not_finite = compute_sums(trees)
        if not_finite:
            raise RunFailed(
                f"Step {step} is not saved, because {not_finite[0]} has numbers that are not finite; the newest "
                f"complete checkpoint: {self._newest_name()}. Start from finite weights, with a lower "
                "optimizer.learning_rate."
            )
        values["sums"] = sums | {name: crc(value) for name, value in values.items()}
        if state.frozen:
            values["sums"]["frozen"] = self._frozen.fingerprint(state.frozen)
        items = arrays | {name: ocp.args.JsonSave(value) for name, value in values.items()}
        for attempt in range(_ATTEMPTS if last else 1):
            if attempt:
                time.sleep(_PAUSE)
            self._saving = step
            failure: Exception | None = None
            try:
                self._frozen.save(state.frozen)
                self._manager.save(step, args=ocp.args.Composite(**items), force=True)
            except IO_ERRORS as error:
                failure = error
            if (last or failure) and self._finish_pending_save(step, failure):
                return
        if last:
            raise RunFailed(f"{self._unsaved_message(step)} Run the same command to resume from there.")

    def _finish_pending_save(self, step: int, failure: Exception | None = None) -> bool:
        """Waits for the pending save and returns whether none has failed. Reports a failure and schedules a retry."""
        if self._saving is None:
            return True
        try:
            self._manager.wait_until_finished()
        except IO_ERRORS as error:
            failure = failure or error
        saving, self._saving = self._saving, None
        if not hosts.any_process(failure is not None):
            self._last_saved, self._retry_step = saving, None
            return True
        with contextlib.suppress(*IO_ERRORS):
            self._manager.close()
        self._manager = self._open()  # deletes the partly written checkpoint, which takes up space
        self._reason = reason = error_reason(failure) if failure else "another host could not write"
        self._retry_step = step + max(1, self._config.every_steps // 10)
        self._on_event("save_failed", saving, reason=reason, last=self._last_saved)
        if jax.process_index() == 0:
            _log.warning(
                "Step %d could not be saved (%s); the newest complete checkpoint: %s.",
                saving,
                reason,
                self._newest_name(),
            )
        if step - self._last_saved > self._max_unsaved:
            raise RunFailed(
                f"{self._unsaved_message(step)} Giving up: no checkpoint could be saved for {self._max_unsaved} steps "
                "(faults.unsaved_steps)."
            )
        return False

    def _newest_name(self) -> str:
        return f"step {self._last_saved}" if self._last_saved else "none"

    def _unsaved_message(self, step: int) -> str:
        return (
            f"Step {step} cannot be saved in {self._folder} ({self._reason}). Fix the cause (for example, free disk "
            f"space). The newest complete checkpoint: {self._newest_name()}."
        )

    def restore_newest(
        self, layout: "TrainState", reload: Callable[[], dict[str, Any]] | None = None
    ) -> tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]] | None:
        """Restores the newest readable step: returns its number and what :meth:`restore` returns, or None without any.

        A damaged step is moved to ``workdir/damaged`` and the one before it is restored. With several hosts, of which
        another may have read the damaged step, that is left to the next start.

        Raises:
          UserError: all steps are damaged; or as for :meth:`restore`.
          TryAgain: this host, of several, moved a damaged step; or as for :meth:`restore`.
        """
        while (step := self.latest) is not None:
            try:
                found = self.restore(step, layout, reload)
            except DamagedCheckpoint as error:
                self._set_aside(step, str(error))
                continue
            self._last_saved = step
            return step, *found
        # Includes those of an earlier start: a run trained for days must not silently restart from scratch.
        if self._damaged.exists() and any(self._damaged.iterdir()):
            raise UserError(
                f"No checkpoint of this run can be read; they are in {self._damaged}. Start in another --workdir, or "
                "move that folder away to start from scratch here."
            )
        return None

    def restore(
        self, step: int, layout: "TrainState", reload: Callable[[], dict[str, Any]] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Restores a step: arrays (``trainable``, ``frozen``, ``moments``) in the given layout, ``data`` and ``clock``.

        Args:
          reload: returns the frozen parameters as the run started, in case they were not saved, or are damaged. It
            calls :meth:`set_base`.

        Raises:
          DamagedCheckpoint: something is missing, cannot be read, or differs from what was written.
          UserError: the checkpoint is of another model, or may not be read; or the frozen parameters are damaged, or
            not saved, and ``reload`` does not give the same ones.
          TryAgain: the disk or bucket fails in a way that may be temporary.
        """
        self._manager.wait_until_finished()
        folder = self._folder / str(step)
        trees: Trees = {name: tree for name in ("trainable", "frozen", "moments") if (tree := getattr(layout, name))}
        names = ["data", "clock", "sums"] if (folder / "sums").exists() else ["data", "clock"]
        with explain_read_errors(folder):
            in_step = {name: tree for name, tree in trees.items() if name != "frozen" or (folder / name).exists()}
            shapes = {name: read_shapes(folder / name) for name in in_step.keys() - {"moments"}}
            if trees.keys() - in_step.keys():
                shapes["frozen"] = self._frozen.read_shapes() or layout.frozen
            renames = current_paths(path for tree in shapes.values() for path in tree)  # older checkpoints differ
            trees = {name: rename_keys(tree, renames) for name, tree in trees.items()}
            self._check_shapes(step, trees, shapes)
            arrays: Trees = {}
            if trees.keys() - in_step.keys():  # first, because reading them again takes memory
                arrays["frozen"] = self._frozen.restore(
                    trees["frozen"],
                    read_sums(folder).get("frozen"),
                    reload and (lambda: rename_keys(reload(), renames)),
                )
            items = {name: ocp.args.StandardRestore(trees[name]) for name in in_step}
            found = self._manager.restore(
                step, args=ocp.args.Composite(**items, **{name: ocp.args.JsonRestore() for name in names})
            )
            arrays |= {name: found[name] for name in in_step}
            if "sums" in names:
                in_step = {name: arrays[name] for name in in_step}
                sums = compute_sums(in_step)[0] | {name: crc(found[name]) for name in ("data", "clock")}
                wrong = sorted(name for name in sums if found["sums"].get(name) != sums[name])
                if wrong:
                    raise DamagedCheckpoint(f"{wrong[0]} does not match its checksum")
        current = {path: name for name, path in renames.items()}
        arrays = {name: rename_keys(tree, current) for name, tree in arrays.items()}
        return {"frozen": {}} | arrays, dict(found["data"]), dict(found["clock"])

    def _check_shapes(self, step: int, trees: Trees, shapes: Trees) -> None:
        """Raises UserError if the shapes differ, so that another model's checkpoint does not count as damaged."""
        for name, saved in sorted(shapes.items()):
            for path in sorted(saved.keys() | trees[name].keys()):
                was, now = (tuple(tree[path].shape) if path in tree else "absent" for tree in (saved, trees[name]))
                if was != now:
                    raise UserError(
                        f"Checkpoint {self._folder / str(step)} is of another model: {path} was {was}, now {now}. "
                        "Resume with the model of its config.json, or start in another --workdir with init_from."
                    )

    def _set_aside(self, step: int, reason: str) -> None:
        target = _unused_path(self._damaged, str(step))
        try:
            self._damaged.mkdir(exist_ok=True)
            (self._folder / str(step)).rename(target)
        except FileNotFoundError:  # another host has moved it
            target = self._damaged / str(step)
        except OSError as error:
            folder, reason = self._folder / str(step), error_reason(error)
            raise UserError(f"{folder} is damaged and cannot be moved: {reason}.") from None
        self._on_event("set_aside", step, folder=str(target), reason=reason)
        _log.warning("Checkpoint %d is damaged (%s) and was moved to %s.", step, reason, target)
        if jax.process_count() > 1:
            raise TryAgain(f"Checkpoint {step} was damaged; run the same command to resume from the one before.")
        self._manager.reload()

    def close(self) -> None:
        """Waits for pending writes and closes the manager."""
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closes, except after an error with several hosts: another may have died, and Orbax would wait for it."""
        if kind is None:
            self.close()
        elif jax.process_count() == 1:
            with contextlib.suppress(*IO_ERRORS):  # the first error is the one to report
                self.close()


def _unused_path(folder: epath.Path, name: str) -> epath.Path:
    """Returns a path in the folder that does not exist yet."""
    names = itertools.chain([name], (f"{name}.{number}" for number in itertools.count(2)))
    return next(folder / candidate for candidate in names if not (folder / candidate).exists())


def _remove(partial: epath.Path) -> None:
    """Deletes a partly written checkpoint, in which threads of the failed save may still add and remove files."""
    for pause in (0.1, 0.4, 1.6, 0.0):
        try:
            partial.rmtree()
        except OSError:
            if not partial.exists():
                return
            if not pause:
                raise
            time.sleep(pause)
        else:
            return
