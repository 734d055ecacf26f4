"""Outcomes of a study's runs: scores by variant, seed, kind and question."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
from etils import epath

from stf_jax.config import UserError
from stf_jax.data import scenes, world_text
from stf_jax.evals.runner import ANSWERS, RESULTS, flatten_metrics, in_display_units
from stf_jax.files import parse_json, read_json
from stf_jax.studies.study import Cell
from stf_jax.training.stages import stage_workdir

ALL = "all"
BLANK = "blank image"
KINDS = tuple(dict.fromkeys((*world_text.KINDS, *scenes.KINDS)))  # of both editions
_Key = TypeVar("_Key", str, int)  # a kind of question, or a height


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Scores of one cell, or of all cells of a variant, whose arrays then have a leading axis of seeds.

    Attributes:
      scores: scores by kind of question, :data:`ALL` first: 100 for each correct answer and 0 for each wrong one,
        float [Q]. Where single answers are not scored, the metric, float [1], in percent (MME: in points).
      heights: the same for questions about printed text, by the height of its capitals in pixels.
    """

    scores: dict[str, np.ndarray]
    heights: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)


def read_outcome(cell: Cell) -> Outcome:
    """Reads the outcome of a finished cell.

    For the embedded benchmarks, single answers are read; if ``prints`` was evaluated with ``scenes`` or ``shapes``, it
    only gives the scores by height. For other benchmarks, the metrics of their published scripts are read.

    Raises:
      UserError: there are no metrics.
    """
    results = read_json(epath.Path(cell.folder / RESULTS))
    if isinstance(results, dict):
        folders = {results["benchmark"]: cell.folder}
    else:
        folders = {one["benchmark"]: cell.folder / one["benchmark"] for one in results}
    if folders.keys() <= {"scenes", "shapes", "prints"}:
        return _read_embedded(folders)
    scores: dict[str, np.ndarray] = {}
    for one in results if isinstance(results, list) else [results]:
        metrics = {name: value for name, value in flatten_metrics(one).items() if isinstance(value, float)}
        scores |= {name: np.array([in_display_units(name, value)]) for name, value in metrics.items()}
    if not scores:
        raise UserError(f"{cell.folder} has answers but no metrics, because its benchmarks have no labels.")
    return Outcome(scores)


def _read_embedded(folders: Mapping[str, pathlib.Path]) -> Outcome:
    scores = {name: _read_scores(folder) for name, folder in folders.items()}
    first = next(iter(sorted(scores, key="prints".__eq__)))  # prints only if there is no other
    return Outcome(scores[first][0], scores.get("prints", scores[first])[1])


def _read_scores(folder: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[int, np.ndarray]]:
    """Returns the scores by kind and by height: 100 for each correct answer, 0 for each wrong one."""
    lines = [json.loads(line) for line in (folder / ANSWERS).read_text().splitlines()]
    by_kind: dict[str, list[float]] = {}
    by_height: dict[int, list[float]] = {}
    for line in lines:
        metadata = line["metadata"]
        blank = metadata.get("shown", metadata.get("picture")) == "blank"  # older runs' key; codespell:ignore picture
        score = 100.0 * (line["text"].lower() == metadata["truth"].lower())
        for kind in (BLANK,) if blank else (ALL, metadata["kind"]):
            by_kind.setdefault(kind, []).append(score)
        if metadata.get("height") and not blank:
            by_height.setdefault(metadata["height"], []).append(score)
    return (
        {kind: np.array(by_kind[kind]) for kind in (ALL, *KINDS, BLANK) if kind in by_kind},
        {height: np.array(scores) for height, scores in sorted(by_height.items())},
    )


def read_outcomes(cells: Sequence[Cell]) -> dict[str, Outcome]:
    """Reads the outcomes of finished cells, by variant: scores float [S, Q], seeds in the order of the cells."""
    outcomes: dict[str, list[Outcome]] = {}
    for cell in cells:
        outcomes.setdefault(cell.variant.name, []).append(read_outcome(cell))
    return {
        name: Outcome(_stack([seed.scores for seed in seeds]), _stack([seed.heights for seed in seeds]))
        for name, seeds in outcomes.items()
    }


def _stack(scores: Sequence[dict[_Key, np.ndarray]]) -> dict[_Key, np.ndarray]:
    return {key: np.stack([seed_scores[key] for seed_scores in scores]) for key in scores[0]}


@dataclasses.dataclass(frozen=True)
class LossCurve:
    """The logged training losses of a variant in one stage: ``steps`` int [K], ``losses`` float [S, K]."""

    steps: np.ndarray
    losses: np.ndarray


def read_losses(cells: Sequence[Cell]) -> dict[str, dict[str, LossCurve]]:
    """Reads the losses of the cells that were trained, by stage and variant, at the steps that all seeds logged."""
    logged: dict[str, dict[str, list[dict[int, float]]]] = {}
    for cell in cells:
        if cell.source_run is None:
            stages = cell.study.resolve_stages(cell.variant, cell.seed)
            for stage in stages:
                file = stage_workdir(cell.folder, stages, stage) / "metrics.jsonl"
                lines = map(parse_json, file.read_bytes().splitlines())
                # A loss that is not finite is null.
                losses = {line["step"]: line["loss"] for line in lines if line.get("loss") is not None}
                logged.setdefault(stage.name, {}).setdefault(cell.variant.name, []).append(losses)
    curves = {stage: {name: _align(seeds) for name, seeds in by_name.items()} for stage, by_name in logged.items()}
    found = {
        stage: {name: curve for name, curve in by_name.items() if curve.steps.size} for stage, by_name in curves.items()
    }
    return {stage: by_name for stage, by_name in found.items() if by_name}


def _align(seeds: Sequence[dict[int, float]]) -> LossCurve:
    steps = sorted(set.intersection(*map(set, seeds)))
    return LossCurve(np.array(steps), np.array([[losses[step] for step in steps] for losses in seeds]))
