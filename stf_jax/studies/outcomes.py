"""What the runs of a study came to: scores by variant, seed, kind and question."""

import dataclasses
import json
from collections.abc import Sequence

import numpy as np
from etils import epath

from stf_jax.config import UserError
from stf_jax.data import scenes, world_text
from stf_jax.evals.runner import ANSWERS, RESULTS, flatten_metrics, in_display_units
from stf_jax.runtime.files import read_json
from stf_jax.studies.study import Cell

ALL = "all"
BLANK = "blank image"
KINDS = tuple(dict.fromkeys((*world_text.KINDS, *scenes.KINDS)))  # of either edition


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of one cell, or of all cells of a variant, whose arrays have a leading axis of seeds.

    Attributes:
      scores: by kind of question, :data:`ALL` first: of each question 100 if it was right, else 0, float [Q]; where
        that is not known one by one, the metric alone, float [1], in percent (MME's in its points).
      heights: the same of questions on printed text, by the height of its capitals in pixels.
    """

    scores: dict[str, np.ndarray]
    heights: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)


def outcome(cell: Cell) -> Outcome:
    """Reads a cell that is done.

    Answers to the embedded benchmarks are taken one by one; beside ``scenes`` or ``shapes``, ``prints`` gives scores by
    height. Of other benchmarks the metrics are taken, as their published scripts have them, of several side by side.

    Raises:
      UserError: there is no metric.
    """
    results = read_json(epath.Path(cell.folder / RESULTS))
    if isinstance(results, dict):
        folders = {results["benchmark"]: cell.folder}
    else:
        folders = {one["benchmark"]: cell.folder / one["benchmark"] for one in results}
    if folders.keys() <= {"scenes", "shapes", "prints"}:
        return _embedded(folders)
    scores = {}
    for one in results if isinstance(results, list) else [results]:
        figures = {name: value for name, value in flatten_metrics(one).items() if isinstance(value, float)}
        scores |= {name: np.array([in_display_units(name, value)]) for name, value in figures.items()}
    if not scores:
        raise UserError(f"{cell.folder} has answers, but no metric: the labels of its benchmarks are not there.")
    return Outcome(scores)


def _embedded(folders):
    read = {name: _right(folder) for name, folder in folders.items()}
    first = next(iter(sorted(read, key="prints".__eq__)))  # any other before prints
    return Outcome(read[first][0], read.get("prints", read[first])[1])


def _right(folder):
    """By kind and by height, of each question 100 where the answer is right, else 0."""
    lines = [json.loads(line) for line in (folder / ANSWERS).read_text().splitlines()]
    right: dict[str, list[float]] = {}
    by_height: dict[int, list[float]] = {}
    for line in lines:
        about = line["metadata"]
        hit = 100.0 * (line["text"].lower() == about["truth"].lower())
        for kind in (BLANK,) if about["shown"] == "blank" else (ALL, about["kind"]):
            right.setdefault(kind, []).append(hit)
        if about.get("height") and about["shown"] != "blank":
            by_height.setdefault(about["height"], []).append(hit)
    return (
        {kind: np.array(right[kind]) for kind in (ALL, *KINDS, BLANK) if kind in right},
        {height: np.array(hits) for height, hits in sorted(by_height.items())},
    )


def by_variant(cells: Sequence[Cell]) -> dict[str, Outcome]:
    """What each variant came to whose cells are all here: scores float [S, Q], seeds in their order."""
    outcomes: dict[str, list[Outcome]] = {}
    for cell in cells:
        outcomes.setdefault(cell.variant.name, []).append(outcome(cell))
    return {
        name: Outcome(_stacked([one.scores for one in several]), _stacked([one.heights for one in several]))
        for name, several in outcomes.items()
    }


def _stacked(scores):
    return {key: np.stack([one[key] for one in scores]) for key in scores[0]}
