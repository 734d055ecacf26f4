"""Where the scalars of logged steps go: ``metrics.jsonl``, TensorBoard and, if asked for, Weights & Biases."""

import os
import tempfile
from collections.abc import Mapping
from types import ModuleType
from typing import Protocol

from etils import epath
from tensorboard.summary import Writer as EventFile

from stf_jax.config import TrainConfig, UserError, WandbConfig, short_message, to_json
from stf_jax.runtime.files import in_bucket, writing
from stf_jax.runtime.journal import BOARD, Metrics


class Writer(Protocol):
    """Takes the scalars of one logged step after the other."""

    name: str  # as a warning has it

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self, status: int) -> None:
        """Nothing more comes: the run ends with that exit status."""


def open_writers(workdir: epath.Path, config: TrainConfig, first: int) -> list[Writer]:
    """All writers of a run that continues from step ``first``.

    Raises:
      UserError: the workdir cannot be written to; Weights & Biases does not take the run.
    """
    with writing(workdir):
        writers = [Metrics(workdir, first), Board(workdir)]
        return [*writers, Wandb(workdir, config)] if config.wandb.project else writers


class Board:
    """TensorBoard's event files."""

    name = "TensorBoard's event file"

    def __init__(self, workdir: epath.Path):
        self._folder = str(workdir / BOARD)
        self._file = EventFile(self._folder)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self._file is None:
            self._file = EventFile(self._folder)
        try:
            for key, value in values.items():
                self._file.add_scalar(key, value, step)
        except OSError:
            self._file = None  # one that has failed takes nothing more
            raise

    def close(self, status: int) -> None:
        if self._file is not None:
            self._file.close()


class Wandb:
    """Weights & Biases. Its mode and key are its own environment variables' (``WANDB_MODE``, ``WANDB_API_KEY``)."""

    name = "Weights & Biases"

    def __init__(self, workdir: epath.Path, config: TrainConfig):
        """Begins a run there, or goes on with that of this workdir, whose id is kept in ``wandb/id``."""
        wandb, kept = import_wandb(config.wandb), workdir / "wandb" / "id"
        try:
            self._run = wandb.init(
                project=config.wandb.project,
                entity=config.wandb.entity or None,
                name=os.fspath(workdir),
                id=kept.read_text() if kept.exists() else None,
                resume="allow",
                dir=tempfile.mkdtemp() if in_bucket(workdir) else os.fspath(workdir),
                config=to_json(config),
            )
        except wandb.Error as error:
            raise UserError(
                f"Weights & Biases does not take the run ({short_message(error)}); mend that, set WANDB_MODE=offline, "
                "or leave wandb.project empty."
            ) from None
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(self._run.id)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)  # of steps that are run again, it keeps what it had: the same

    def close(self, status: int) -> None:
        self._run.finish(status)


def import_wandb(config: WandbConfig) -> ModuleType | None:
    """The package of Weights & Biases; None where the config does not ask for it.

    Raises:
      UserError: it is not installed.
    """
    if not config.project:
        return None
    try:
        import wandb

        _ = wandb.init  # which a mere folder of that name, as it leaves behind, has not
    except (ImportError, AttributeError):
        raise UserError(
            f"wandb.project={config.project!r} needs a package that is not here: pip install wandb, or leave it empty."
        ) from None
    return wandb
