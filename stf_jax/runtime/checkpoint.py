"""Orbax checkpoints: state, data iterator and clock as one step, written while training goes on."""

import contextlib
import errno
import functools
import itertools
import json
import logging
import os
import pathlib
import re
import time
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from stf_jax.config import CheckpointConfig, FaultsConfig, RunFailed, TrainConfig, TryAgain, UserError, short_message
from stf_jax.runtime import hosts
from stf_jax.runtime.checksum import checksum
from stf_jax.runtime.files import in_bucket

_HALF = ".orbax-checkpoint-tmp"  # Orbax's mark of what is still being written
_ATTEMPTS, _PAUSE = 3, 5.0  # to save the last step, and seconds between them
UNREADABLE = OSError, ValueError, KeyError, TypeError, AttributeError, IndexError  # of Orbax and tensorstore
# Not of a checkpoint, but of the disk or bucket that it lies on.
_REFUSED = re.compile("PERMISSION_DENIED|UNAUTHENTICATED")
_AWAY = re.compile("UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|os_error_code='(5|12|23|24|110|116)'")
_ERRNO_AWAY = errno.EIO, errno.ENOMEM, errno.ENFILE, errno.EMFILE, errno.ETIMEDOUT, errno.ESTALE

_log = logging.getLogger(__name__)


class Damaged(Exception):
    """A checkpoint that cannot be read, or reads other than it was written; says how."""


class Checkpoints:
    """The checkpoints of a run, in ``workdir/checkpoints``.

    A step is one folder with the items ``trainable``, ``frozen``, ``moments`` (arrays), ``data`` (where the
    stream of batches stands), ``clock``, and ``sums``, the checksums of all these. It appears under its name only when
    all of it is written.
    """

    def __init__(
        self,
        workdir: epath.Path,
        config: CheckpointConfig,
        faults: FaultsConfig = TrainConfig.faults,
        tell: Callable[..., None] = lambda kind, step, **facts: None,
    ):
        """``tell`` is called with what befalls: ``"save_failed"`` or ``"set_aside"``, the step, and facts by name.

        No other run may be at work in the workdir, for what is half-written is cleared away.
        """
        if in_bucket(workdir) and not os.fspath(workdir).startswith("gs://"):
            raise UserError(f"Orbax writes no checkpoints to {workdir}; give a gs:// or a local --workdir.")
        self._folder, self._config, self._tell = epath.Path(absolute(workdir)) / "checkpoints", config, tell
        self._damaged = self._folder.parent / "damaged"
        self._most = faults.unsaved_steps or 2 * config.every_steps
        self._manager = self._open()
        self._whole = self.latest or 0  # the newest step that is known to be complete
        self._saving: int | None = None
        self._again: int | None = None  # when to try again
        self._reason = ""

    def _open(self):
        if jax.process_index() == 0 and self._folder.exists():
            for half in self._folder.glob(f"*{_HALF}*"):
                half.rmtree()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._config.keep_last, keep_period=self._config.keep_every or None
        )
        return ocp.CheckpointManager(self._folder, options=options)

    @property
    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def due(self, step: int, *, last: bool = False) -> bool:
        """Whether the interval, a save that failed, or ``last`` asks for this step to be saved; on all hosts alike."""
        if jax.process_count() == 1 and self._saving is not None and not self._manager.is_saving_in_progress():
            self._settle(step)  # hosts may see that at different steps, so several look only when the next is due
        again = self._again is not None and step >= self._again
        return step != self.latest and (last or again or step % self._config.every_steps == 0)

    def save(self, step: int, state: Any, data: dict[str, Any], clock: dict[str, Any], *, last: bool = False) -> None:
        """Saves a step; arrays are written in the background, unless it is the ``last``, which is waited for.

        Call it after a step and before the next batch is taken: ``data`` says where the stream of batches stands. What
        cannot be written is tried again, by a later step or, for the last, by itself.

        Raises:
          RunFailed: nothing could be saved for longer than the config bears; or a trained number is not finite, and the
            checkpoints before stay as they are.
        """
        self._settle(step)
        trees = _trees(state)
        arrays = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        facts = {"data": data, "clock": clock}
        sums, wrong = _sums(trees)
        if wrong:
            raise RunFailed(
                f"Step {step} is not saved, because {wrong[0]} has numbers that are not finite; the newest whole "
                f"checkpoint: {self._name()}. Start from weights that are finite, with a lower optimizer.learning_rate."
            )
        facts["sums"] = sums | {name: _crc(value) for name, value in facts.items()}
        items = arrays | {name: ocp.args.JsonSave(value) for name, value in facts.items()}
        for attempt in range(_ATTEMPTS if last else 1):
            if attempt:
                time.sleep(_PAUSE)
            self._saving = step
            failure = None
            try:
                self._manager.save(step, args=ocp.args.Composite(**items), force=True)
            except UNREADABLE as error:
                failure = error
            if (last or failure) and self._settle(step, failure):
                return
        if last:
            raise RunFailed(f"{self._unsaved(step)} The same command goes on from there.")

    def _settle(self, step, failure=None):
        """Waits for the save under way; says whether there is none that failed, and of one that did tells why."""
        if self._saving is None:
            return True
        try:
            self._manager.wait_until_finished()
        except UNREADABLE as error:
            failure = failure or error
        saving, self._saving = self._saving, None
        if not hosts.any_says(failure is not None):
            self._whole, self._again = saving, None
            return True
        with contextlib.suppress(*UNREADABLE):
            self._manager.close()
        self._manager = self._open()  # which clears away what is half-written, and takes up room
        self._reason = reason = why(failure) if failure else "another host could not write"
        self._again = step + max(1, self._config.every_steps // 10)
        self._tell("save_failed", saving, reason=reason, last=self._whole)
        if jax.process_index() == 0:
            _log.warning(
                "Step %d could not be saved (%s); the newest whole checkpoint: %s.", saving, reason, self._name()
            )
        if step - self._whole > self._most:
            raise RunFailed(f"{self._unsaved(step)} Training unsaved for longer is not borne (faults.unsaved_steps).")
        return False

    def _name(self):
        return f"step {self._whole}" if self._whole else "none"

    def _unsaved(self, step):
        return (
            f"Step {step} cannot be saved in {self._folder} ({self._reason}): mend that, by making room where there is "
            f"none. The newest whole checkpoint: {self._name()}."
        )

    def newest(self, layout: Any) -> tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]] | None:
        """The newest step that can be read, with what :meth:`restore` gives of it; None where there is no step at all.

        A damaged one is moved to ``workdir/damaged``, and the one before is taken. Where there are other hosts, which
        may have read it, that is for the next start.

        Raises:
          UserError: all were damaged; or as :meth:`restore`.
          TryAgain: this host, of several, has set one aside; or as :meth:`restore`.
        """
        while (step := self.latest) is not None:
            try:
                found = self.restore(step, layout)
            except Damaged as error:
                self._set_aside(step, str(error))
                continue
            self._whole = step
            return step, *found
        # Also those of an earlier start: a run that was trained for days does not begin anew in silence.
        if self._damaged.exists() and any(self._damaged.iterdir()):
            raise UserError(
                f"No checkpoint of this run can be read; they are in {self._damaged}. Start in another --workdir, or "
                "move that folder away to begin anew here."
            )
        return None

    def restore(self, step: int, layout: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """The arrays (``trainable``, ``frozen``, ``moments``) of a step as the layout wants them, data and clock.

        Raises:
          Damaged: something is not there, cannot be read, or is not what was written.
          UserError: it is of another model, or may not be read.
          TryAgain: the disk, or the bucket, does not answer as it should.
        """
        self._manager.wait_until_finished()
        trees = _trees(layout)
        items = {name: ocp.args.StandardRestore(tree) for name, tree in trees.items()}
        facts = ["data", "clock", "sums"] if (self._folder / str(step) / "sums").exists() else ["data", "clock"]
        try:
            self._check_shapes(step, trees)
            found = self._manager.restore(
                step, args=ocp.args.Composite(**items, **{name: ocp.args.JsonRestore() for name in facts})
            )
            arrays = {name: found[name] for name in trees}
            if "sums" in facts:
                mine = _sums(arrays)[0] | {name: _crc(found[name]) for name in ("data", "clock")}
                wrong = sorted(name for name in mine if found["sums"].get(name) != mine[name])
                if wrong:
                    raise Damaged(f"{wrong[0]} is not as it was written")
            return {"frozen": {}} | arrays, dict(found["data"]), dict(found["clock"])
        except (UserError, Damaged, MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # of many kinds, and some are no kind at all
            place, reason = self._folder / str(step), why(error)
            if _REFUSED.search(str(error)) or isinstance(error, PermissionError):
                raise UserError(f"Checkpoint {place} may not be read ({reason}); mend its permissions.") from None
            if _AWAY.search(str(error)) or getattr(error, "errno", None) in _ERRNO_AWAY:
                raise TryAgain(f"Checkpoint {place} cannot be read now ({reason}); start again later.") from None
            raise Damaged(reason) from error

    def _check_shapes(self, step, trees):
        """Sees to it that what cannot fit is not taken for damage."""
        for name in trees.keys() - {"moments"}:
            there = dict(ocp.StandardCheckpointHandler().metadata(self._folder / str(step) / name).tree)
            for path in sorted(there.keys() | trees[name].keys()):
                was, now = (tuple(tree[path].shape) if path in tree else "nothing" for tree in (there, trees[name]))
                if was != now:
                    raise UserError(
                        f"Checkpoint {self._folder / str(step)} is of another model: {path} was {was}, now {now}. "
                        "Continue with what its config.json says, or start in another --workdir with init_from."
                    )

    def _set_aside(self, step, reason):
        target = _free(self._damaged, str(step))
        try:
            self._damaged.mkdir(exist_ok=True)
            (self._folder / str(step)).rename(target)
        except FileNotFoundError:  # another host did
            target = self._damaged / str(step)
        except OSError as error:
            raise UserError(f"{self._folder / str(step)} is damaged, and cannot be moved: {why(error)}.") from None
        self._tell("set_aside", step, folder=str(target), reason=reason)
        _log.warning("Checkpoint %d is damaged (%s), and was moved to %s.", step, reason, target)
        if jax.process_count() > 1:
            raise TryAgain(f"Checkpoint {step} was damaged; start the same command again, and it takes the one before.")
        self._manager.reload()

    def close(self) -> None:
        """Waits for writes to finish."""
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        """Closes; but where something failed that another host may have died of, for whom Orbax would wait."""
        if kind is None:
            self.close()
        elif jax.process_count() == 1:
            with contextlib.suppress(*UNREADABLE):  # what was raised first is to be told
                self.close()


def _free(folder, name):
    """A path in a folder that nothing has yet."""
    names = itertools.chain([name], (f"{name}.{number}" for number in itertools.count(2)))
    return next(folder / one for one in names if not (folder / one).exists())


def why(error: BaseException) -> str:
    """Why a read or a write failed, in a few words."""
    system = re.search(r"([^:]+) \[os_error_code", str(error))  # tensorstore names every file on the way to it
    return system[1].strip() if system else getattr(error, "strerror", None) or short_message(error)


def read_sums(step: epath.Path) -> dict[str, int]:
    """The checksums that a step was written with; none of one that was not, or that are damaged themselves."""
    try:
        return dict(json.loads((step / "sums" / "metadata").read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _crc(value):
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _sums(trees):
    """Checksums of all arrays of a state, by item and path, and which of those that learn are not finite."""
    named = {
        f"{name}/{jax.tree_util.keystr(path, simple=True, separator='/')}": leaf
        for name, tree in trees.items()
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
    mesh = next((leaf.sharding.mesh for leaf in named.values() if isinstance(leaf.sharding, NamedSharding)), None)
    found = jax.device_get(_summing(mesh and NamedSharding(mesh, PartitionSpec()))(named))
    wrong = [name for name, (_, finite) in found.items() if not finite and not name.startswith("frozen/")]
    return {name: int(value) for name, (value, _) in found.items()}, wrong


@functools.cache
def _summing(whole):
    def read(leaf):
        return checksum(leaf), jnp.isfinite(leaf).all()

    return jax.jit(lambda named: {name: read(leaf) for name, leaf in named.items()}, out_shardings=whole)


def absolute(path: epath.Path | pathlib.Path) -> epath.Path | pathlib.Path:
    """As Orbax wants paths; resolving would take a URI for the name of a folder here."""
    return path if in_bucket(path) else path.resolve()


def _trees(state):
    """The items of arrays. Orbax does not write an empty tree, which ``frozen`` is where everything learns."""
    trees = {"trainable": state.trainable, "frozen": state.frozen, "moments": state.moments}
    return {name: tree for name, tree in trees.items() if tree}
