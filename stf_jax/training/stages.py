"""The stages of a run in order, each starting from the end of the previous one."""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import ml_collections
from etils import epath

from stf_jax.config import TrainConfig, UserError, resolve
from stf_jax.data.sources.base import find_source
from stf_jax.files import check_paths

_Path = TypeVar("_Path", bound=pathlib.PurePath)


def resolve_stages(config: ml_collections.ConfigDict, workdir: epath.Path) -> list[TrainConfig]:
    """Resolves the config's stages and checks their paths and data sources, without slow imports.

    Raises:
      UserError: a key, value, path or data source that cannot be used.
    """
    stages = resolve(config)
    for stage in stages:
        check_paths(stage)
        find_source(stage.data.source)
    if len(stages) > 1 and "," in str(workdir):
        raise UserError(
            f"--workdir={workdir} has a comma in its name, but stages pass on their weights by init_from, where commas "
            "separate folders; choose another name."
        )
    return stages


def stage_workdir(workdir: _Path, stages: Sequence[TrainConfig], stage: TrainConfig) -> _Path:
    """Returns the folder of a stage of a run: a subfolder with its name, or the workdir if it is the only one."""
    return workdir / stage.name if len(stages) > 1 else workdir


def run_stages(stages: Sequence[TrainConfig], workdir: epath.Path) -> Iterator[tuple[epath.Path, list[dict[str, Any]]]]:
    """Trains one stage after the other; yields the evaluation results of each at its end, and the folder with them.

    A single stage runs in ``workdir`` itself, each of several in a subfolder with its name. The results of the last
    stage with benchmarks are in ``workdir``, those of others in their subfolder. Names of components are checked for
    all stages before the first. Raises as :func:`stf_jax.training.loop.train`.
    """
    from stf_jax.checkpointing.rules import parse_rules  # these take seconds to import
    from stf_jax.data.conversation import check_template
    from stf_jax.evals.registry import find_benchmarks
    from stf_jax.models.fusions.base import find_fusion
    from stf_jax.training.loop import train
    from stf_jax.training.objectives.base import find_objective
    from stf_jax.training.programs import keep_programs

    keep_programs(workdir)
    for stage in stages:  # before the first one trains
        find_fusion(stage.model.fusion)
        find_objective(stage.objective, stage.model)
        parse_rules(stage.rules)
        check_template(stage.data.template, None)
        find_benchmarks(stage.eval.benchmarks)
    last_evaluated = next((stage.name for stage in reversed(stages) if stage.eval.benchmarks), None)
    for previous, stage in zip([None, *stages], stages, strict=False):
        if previous is not None:
            stage = dataclasses.replace(stage, init_from=str(workdir / previous.name))
        own = stage_workdir(workdir, stages, stage)
        results_dir = workdir if stage.name == last_evaluated else own
        yield results_dir, train(stage, own, results_dir)
