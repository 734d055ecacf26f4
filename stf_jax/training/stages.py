"""The stages of a run in order, each from the end of the one before."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections
from etils import epath

from stf_jax.config import TrainConfig, UserError, resolve
from stf_jax.runtime.files import check_paths


def checked_stages(config: ml_collections.ConfigDict, workdir: epath.Path) -> list[TrainConfig]:
    """The config's stages, resolved. Imports nothing that takes long.

    Raises:
      UserError: a key, value or path that cannot be used.
    """
    stages = resolve(config)
    for stage in stages:
        check_paths(stage)
    if len(stages) > 1 and "," in str(workdir):
        raise UserError(
            f"--workdir={workdir} has a comma in its name, and the stages of a run pass on their weights by init_from, "
            "where commas separate folders; choose another name."
        )
    return stages


def run_stages(stages: Sequence[TrainConfig], workdir: epath.Path) -> Iterator[list[dict[str, Any]]]:
    """Trains one stage after the other, and yields what each was evaluated to at its end.

    A run of one stage lies in ``workdir`` itself, of several each in a folder there. Raises as
    :func:`stf_jax.training.loop.train`.
    """
    from stf_jax.training.loop import train  # which takes seconds

    for before, stage in zip([None, *stages], stages, strict=False):
        if before is not None:
            stage = dataclasses.replace(stage, init_from=str(workdir / before.name))
        yield train(stage, workdir / stage.name if len(stages) > 1 else workdir, workdir)
