"""Writers of the scalars of logged steps: ``metrics.jsonl``, TensorBoard and, optionally, Weights & Biases."""

import os
import tempfile
from collections.abc import Mapping
from types import ModuleType
from typing import Protocol

from etils import epath
from tensorboard.summary import Writer as EventFile

from stf_jax.config import TrainConfig, UserError, WandbConfig, short_message, to_json
from stf_jax.files import AppendOnlyFile, as_user_error, in_bucket
from stf_jax.runs.events import METRICS, TENSORBOARD, read_lines, to_json_line


class Writer(Protocol):
    """Receives the scalars of each logged step."""

    name: str  # for warnings

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self, status: int) -> None:
        """Closes the writer; the run ends with this exit status."""


def open_writers(workdir: epath.Path, config: TrainConfig, first: int) -> list[Writer]:
    """Opens all writers of a run that continues from step ``first``.

    Raises:
      UserError: the workdir cannot be written to, or Weights & Biases rejects the run.
    """
    with as_user_error(workdir):
        writers: list[Writer] = [Metrics(workdir, first), TensorBoard(workdir)]
        return [*writers, Wandb(workdir, config)] if config.wandb.project else writers


class Metrics:
    """``metrics.jsonl``: one object per logged step."""

    name = METRICS

    def __init__(self, workdir: epath.Path, first: int) -> None:
        """Drops lines after step ``first``: a run that was killed may have gone past its last checkpoint."""
        path = workdir / METRICS
        kept = [line for line, value in read_lines(path) if value.get("step", first + 1) <= first]
        self._file = AppendOnlyFile(path, kept)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._file.append(to_json_line({"step": step, **values}))

    def close(self, status: int) -> None:
        self._file.close()


class TensorBoard:
    """TensorBoard's event files."""

    name = "TensorBoard's event file"

    def __init__(self, workdir: epath.Path) -> None:
        self._folder = str(workdir / TENSORBOARD)
        self._file: EventFile | None = EventFile(self._folder)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self._file is None:
            self._file = EventFile(self._folder)
        try:
            for key, value in values.items():
                self._file.add_scalar(key, value, step)
        except OSError:
            self._file = None  # a file that has failed once accepts nothing more
            raise

    def close(self, status: int) -> None:
        if self._file is not None:
            self._file.close()


class Wandb:
    """Weights & Biases. Its own environment variables set mode and key (``WANDB_MODE``, ``WANDB_API_KEY``)."""

    name = "Weights & Biases"

    def __init__(self, workdir: epath.Path, config: TrainConfig) -> None:
        """Starts a W&B run, or resumes this workdir's, whose id is stored in ``wandb/id``."""
        wandb, id_file = import_wandb(config.wandb), workdir / "wandb" / "id"
        assert wandb is not None  # only a config that uses it gets here
        try:
            self._run = wandb.init(
                project=config.wandb.project,
                entity=config.wandb.entity or None,
                name=os.fspath(workdir),
                id=id_file.read_text() if id_file.exists() else None,
                resume="allow",
                dir=tempfile.mkdtemp() if in_bucket(workdir) else os.fspath(workdir),
                config=to_json(config),
            )
        except wandb.Error as error:
            raise UserError(
                f"Weights & Biases rejected the run ({short_message(error)}). Fix the cause, set WANDB_MODE=offline, "
                "or leave wandb.project empty."
            ) from None
        id_file.parent.mkdir(exist_ok=True)
        id_file.write_text(self._run.id)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)  # for steps logged before, W&B keeps the earlier values, which are equal

    def close(self, status: int) -> None:
        self._run.finish(status)


def import_wandb(config: WandbConfig) -> ModuleType | None:
    """Imports the package of Weights & Biases; returns None if the config does not use it.

    Raises:
      UserError: it is not installed.
    """
    if not config.project:
        return None
    try:
        import wandb

        _ = wandb.init  # missing if `wandb` is only a folder of that name, which W&B itself creates
    except (ImportError, AttributeError):
        raise UserError(
            f"wandb.project={config.project!r} needs a package that is not installed: pip install wandb, or leave "
            "wandb.project empty."
        ) from None
    return wandb
