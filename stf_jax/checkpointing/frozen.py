"""The frozen parameters of a run, saved once, because no step changes them."""

import logging
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from stf_jax.checkpointing.items import (
    IO_ERRORS,
    TEMPORARY,
    DamagedCheckpoint,
    compute_sums,
    crc,
    explain_read_errors,
    read_shapes,
    read_sums,
    to_absolute,
)
from stf_jax.config import UserError
from stf_jax.parallel import hosts

FROZEN = "frozen"  # the folder in a workdir, and its item with the arrays

_log = logging.getLogger(__name__)


class FrozenParams:
    """The frozen parameters of a run, in ``workdir/frozen``, for all of its checkpoints.

    The folder has the items ``frozen`` (arrays by path) and ``sums``, their checksums, of which each step keeps a
    fingerprint. It is written before the first step of a run is saved.
    """

    def __init__(self, workdir: epath.Path, on_event: Callable[..., None] = lambda kind, step, **fields: None) -> None:
        """Deletes a partly written folder.

        Args:
          workdir: the run's folder.
          on_event: called with ``"frozen_reloaded"``, the step 0, and the reason if the folder is damaged.
        """
        self._folder, self._on_event = epath.Path(to_absolute(workdir)) / FROZEN, on_event
        self._is_saved = False  # by this process, or verified by it
        self._sums: dict[str, int] = {}
        if jax.process_index() == 0 and self._folder.parent.exists():
            for partial in self._folder.parent.glob(f"{FROZEN}{TEMPORARY}*"):
                partial.rmtree()

    def fingerprint(self, params: dict[str, jax.Array]) -> int:
        """Returns a checksum of all parameters, which is computed once."""
        self._sums = self._sums or compute_sums({FROZEN: params})[0]
        return crc(self._sums)

    def save(self, params: dict[str, jax.Array]) -> None:
        """Writes the folder, unless it is there already, and waits. Raises one of ``IO_ERRORS`` if it cannot."""
        if self._is_saved or not params:
            return
        self.fingerprint(params)
        failure: Exception | None = None
        items = ocp.args.Composite(**{FROZEN: ocp.args.StandardSave(params), "sums": ocp.args.JsonSave(self._sums)})
        try:
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
                writer.save(self._folder, args=items, force=True)
        except IO_ERRORS as error:
            failure = error
        if hosts.any_process(failure is not None):
            raise failure or OSError("another host could not write")
        self._is_saved = True

    def read_shapes(self) -> dict[str, Any]:
        """Reads the shape and dtype of every parameter; empty if that is not possible."""
        try:
            return read_shapes(self._folder / FROZEN)
        except IO_ERRORS:
            return {}

    def restore(
        self,
        layout: dict[str, jax.ShapeDtypeStruct],
        fingerprint: int | None,
        reload: Callable[[], dict[str, jax.Array]] | None,
    ) -> dict[str, jax.Array]:
        """Reads the parameters. If the folder is damaged or missing, they are loaded from where the run started.

        Args:
          fingerprint: of the parameters, as a step has it; None if its checksums cannot be read.
          reload: returns the parameters as the run started.

        Raises:
          DamagedCheckpoint: the folder is sound, but the step was saved with other parameters.
          UserError: the folder is damaged, and ``reload`` does not give the same parameters.
        """
        try:
            params = self._read(layout)
        except DamagedCheckpoint as error:
            return self._reload(fingerprint, reload, str(error))
        if fingerprint not in (None, self.fingerprint(params)):
            raise DamagedCheckpoint("the frozen parameters do not match its checksum")
        self._is_saved = True
        return params

    def _read(self, layout: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        with explain_read_errors(self._folder):
            read_shapes(self._folder / FROZEN)  # reads files that restoring does not need, but SavedParams does
            items = ocp.args.Composite(**{FROZEN: ocp.args.StandardRestore(layout)})
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
                params: dict[str, jax.Array] = reader.restore(self._folder, args=items)[FROZEN]
        sums, _ = compute_sums({FROZEN: params})
        saved = read_sums(self._folder)
        wrong = sorted(name for name in sums if saved.get(name) != sums[name])
        if wrong:
            raise DamagedCheckpoint(f"{wrong[0]} does not match its checksum")
        self._sums = sums
        return params

    def _reload(
        self, fingerprint: int | None, reload: Callable[[], dict[str, jax.Array]] | None, reason: str
    ) -> dict[str, jax.Array]:
        message = f"The frozen parameters in {self._folder} are damaged or missing ({reason})"
        if reload is None:
            raise UserError(f"{message}; copy that folder from a backup.")
        try:
            params = reload()
        except UserError as error:
            raise UserError(f"{message}, and those that the run started from cannot be read: {error}") from None
        self._sums = {}
        if fingerprint != self.fingerprint(params):
            raise UserError(
                f"{message}, and init_from has others now; copy the weights that the run started from there."
            )
        _log.warning("%s; they were loaded from init_from again.", message)
        self._on_event("frozen_reloaded", 0, reason=reason)
        return params
