"""The frozen parameters of a run, saved once or read from where it started, because no step changes them."""

import logging
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from stf_jax.checkpointing.base import Base, read_base
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
from stf_jax.files import as_user_error
from stf_jax.parallel import hosts

FROZEN = "frozen"  # the folder in a workdir, and its item with the arrays

_log = logging.getLogger(__name__)


class FrozenParams:
    """The frozen parameters of a run, in ``workdir/frozen``, for all of its checkpoints.

    The folder has the items ``frozen`` (arrays by path) and ``sums``, the checksums of all frozen parameters, of which
    each step keeps a fingerprint. It is written before the first step of a run is saved. Arrays of a base are not in
    it (:class:`stf_jax.checkpointing.base.Base`).
    """

    def __init__(self, workdir: epath.Path, on_event: Callable[..., None] = lambda kind, step, **fields: None) -> None:
        """Deletes a partly written folder.

        Args:
          workdir: the run's folder.
          on_event: called with ``"frozen_reloaded"``, the step 0, and the reason if the folder is damaged.
        """
        self._workdir, self._on_event = epath.Path(to_absolute(workdir)), on_event
        self._folder = self._workdir / FROZEN
        self._base = Base()
        self._is_saved = False  # by this process, or verified by it
        self._sums: dict[str, int] = {}
        if jax.process_index() == 0 and self._workdir.exists():
            for partial in self._workdir.glob(f"{FROZEN}{TEMPORARY}*"):
                partial.rmtree()

    def set_base(self, base: Base) -> None:
        """Sets where the run starts from, and which parameters need not be saved for that reason."""
        self._base = base

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
        items: dict[str, Any] = {"sums": ocp.args.JsonSave(self._sums)}
        if arrays := {path: value for path, value in params.items() if path not in self._base.shapes}:
            items[FROZEN] = ocp.args.StandardSave(arrays)
        try:
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
                writer.save(self._folder, args=ocp.args.Composite(**items), force=True)
            if jax.process_index() == 0:
                self._base.save(self._workdir)
        except IO_ERRORS as error:
            failure = error
        if hosts.any_process(failure is not None):
            raise failure or OSError("another host could not write")
        self._is_saved = True

    def read_shapes(self) -> dict[str, Any]:
        """Reads the shape and dtype of every parameter; empty if that is not possible."""
        try:
            base, saved = self._read_shapes()
        except IO_ERRORS:
            return {}
        return {**base.shapes, **saved}

    def _read_shapes(self) -> tuple[Base, dict[str, Any]]:
        """The base, and the shapes of the arrays in the folder."""
        base, item = read_base(self._workdir), self._folder / FROZEN
        return base, {} if base.shapes and not item.exists() else read_shapes(item)

    def restore(
        self,
        layout: dict[str, jax.ShapeDtypeStruct],
        fingerprint: int | None,
        reload: Callable[[], dict[str, jax.Array]] | None,
    ) -> dict[str, jax.Array]:
        """Reads the parameters. If the folder is damaged or missing, they are loaded from where the run started.

        Args:
          fingerprint: of the parameters, as a step has it; None if its checksums cannot be read.
          reload: returns the parameters as the run started, and calls :meth:`set_base`.

        Raises:
          DamagedCheckpoint: the folder is sound, but the step was saved with other parameters.
          UserError: ``reload`` does not give the same parameters, but the folder is damaged or they are not in it.
        """
        try:
            base, params = self._read(layout)
            sums = read_sums(self._folder)
            if len(params) < len(layout) and fingerprint not in (None, crc(sums)):
                raise DamagedCheckpoint("its checksums are not those of the step")
        except DamagedCheckpoint as error:
            return self._reload(fingerprint, reload, str(error))
        if len(params) == len(layout):
            if fingerprint not in (None, self.fingerprint(params)):
                raise DamagedCheckpoint("the frozen parameters do not match its checksum")
            self._is_saved = True
            return params
        assert reload is not None  # training always gives it
        try:
            params = reload() | params
        except UserError as error:
            raise base.missing(self._workdir, error) from None
        found, _ = compute_sums({FROZEN: params})
        if wrong := sorted(path for path in params if sums.get(f"{FROZEN}/{path}") != found[f"{FROZEN}/{path}"]):
            raise self._base.changed(self._workdir, wrong[0])
        self._sums, self._is_saved = found, bool(self._base.shapes)
        if self._base.shapes and self._base != base and jax.process_index() == 0:  # the folder was moved
            with as_user_error(self._workdir):
                self._base.save(self._workdir)
        return params

    def _read(self, layout: dict[str, jax.ShapeDtypeStruct]) -> tuple[Base, dict[str, jax.Array]]:
        """Reads the base, and the arrays that are in the folder."""
        params: dict[str, jax.Array] = {}
        with explain_read_errors(self._folder):
            # Reads files that restoring does not need, but SavedParams does.
            base, saved = self._read_shapes()
            wanted = {path: leaf for path, leaf in layout.items() if path in saved or path not in base.shapes}
            if wanted:
                items = ocp.args.Composite(**{FROZEN: ocp.args.StandardRestore(wanted)})
                with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
                    params = reader.restore(self._folder, args=items)[FROZEN]
        sums, _ = compute_sums({FROZEN: params})
        expected = read_sums(self._folder)
        wrong = sorted(name for name in sums if expected.get(name) != sums[name])
        if wrong:
            raise DamagedCheckpoint(f"{wrong[0]} does not match its checksum")
        self._sums = sums
        return base, params

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
            raise UserError(f"{message}, and init_from has others now; put back the weights that the run started from.")
        _log.warning("%s; they were loaded from init_from again.", message)
        self._on_event("frozen_reloaded", 0, reason=reason)
        return params
