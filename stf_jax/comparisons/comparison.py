"""Compares methods: accuracy, differences from a baseline, agreement with it, hard questions, and budgets.

Axis letters: S seeds, Q questions.
"""

import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from stf_jax.comparisons import lmms_eval, ours
from stf_jax.comparisons.runs import Method, Run, ScoredBenchmark, agreement, check_same, default_name, make_methods
from stf_jax.config import UserError, did_you_mean
from stf_jax.evals.files import RESULTS
from stf_jax.evals.registry import benchmark_groups
from stf_jax.files import read_json, to_path
from stf_jax.studies.statistics import ClusteredMean, clustered_mean

ALL = "Mean of the benchmarks"
BUDGETS = (66.7, 77.8, 88.9)  # UniPruneBench's, in percent fewer tokens: 192, 128 and 64 of 576
_STUDY = "report.json"  # in the output folder of ablate
_NEAR_BUDGET = 1.0  # percentage points
_RIGHT = 50.0  # an answer with at least this score counts as right, as in VTC-Bench


@dataclasses.dataclass(frozen=True)
class Result:
    """A method's results on one benchmark or on several; all values are in percent or points.

    Attributes:
      accuracy: the mean score.
      by_seed: the mean score of each seed.
      difference: from the baseline; None for the baseline itself.
      agreement: the share of questions with the baseline's answer ("loyalty"); None for the baseline itself.
      hard: the mean score on questions that the resized image gets wrong.
      lost: the same on those of them that the baseline gets right: VTC-Bench's group A.
      kept: the mean score on questions that both get right: its group B.
      blank: the mean score with blank images.
    """

    accuracy: ClusteredMean
    by_seed: list[float]
    difference: ClusteredMean | None
    agreement: float | None
    hard: ClusteredMean | None
    lost: ClusteredMean | None
    kept: ClusteredMean | None
    blank: float | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All results.

    Attributes:
      methods: in the order of the table: the most tokens first.
      baseline: the method that others are compared with.
      resized: the method that defines hard questions; empty if there is none.
      margin: the difference in points below which two methods count as equal.
      results: by group of benchmarks and method: all, groups such as ``ocr`` of which several are there, and each.
      questions: the number of questions by group.
      hard_questions: the number of questions that the resized image gets wrong, and of VTC-Bench's groups A and B.
    """

    methods: list[Method]
    baseline: str
    resized: str
    margin: float
    results: dict[str, dict[str, Result]]
    questions: dict[str, int]
    hard_questions: dict[str, tuple[int, int, int]]

    @property
    def benchmarks(self) -> list[str]:
        """The benchmarks."""
        return list(self.methods[0].runs[0].benchmarks)

    def budget(self, method: Method) -> float | None:
        """Returns how many percent fewer tokens than the baseline a method has, as one of :data:`BUDGETS` if near."""
        full = next(one for one in self.methods if one.name == self.baseline).cost.get("image_tokens")
        tokens = method.cost.get("image_tokens")
        if not full or tokens is None:
            return None
        fewer = 100 * (1 - tokens / full)
        return next((budget for budget in BUDGETS if abs(budget - fewer) < _NEAR_BUDGET), fewer)


def read_results(arguments: Sequence[str]) -> list[Method]:
    """Reads results, each ``PATH`` or ``NAME=PATH``, and groups the seeds of methods.

    Raises:
      UserError: a path has no results, or results of one name are no seeds of one method.
    """
    runs, places = [], set()
    for argument in itertools.chain.from_iterable(map(_expand_study, arguments)):
        chosen, place = split_name(argument)
        name, seed = default_name(place)
        if (real := os.path.realpath(place)) in places:
            raise UserError(f"{place} is named twice.")
        places.add(real)
        run = read_run(place)
        if run.blank:
            raise UserError(f"{place} has answers about blank images; pass it as --blank=NAME={place}.")
        runs.append((chosen or name, seed, bool(chosen), run))
    return make_methods(runs)


def _expand_study(argument: str) -> list[str]:
    """Returns the folders of the runs in the report of a study, or the argument if it names no such report.

    Raises:
      UserError: the report lists no folders, as those of earlier versions.
    """
    name, place = split_name(argument)
    if name or (place / RESULTS).exists() or not (place / _STUDY).exists():
        return [argument]
    try:
        folders = [folder for runs in read_json(place / _STUDY)["folders"].values() for folder in runs]
        # Earlier reports have paths from the folder in which the study ran.
        return [str(place / folder if (place / folder).exists() else folder) for folder in folders]
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{place / _STUDY} lists no folders of runs; run the study's command again.") from None


def split_name(argument: str) -> tuple[str, epath.Path]:
    """Splits ``NAME=PATH``; the name is empty if there is none, or if the whole is a path that exists."""
    name, separator, rest = argument.partition("=")
    if not separator or "/" in name or to_path(argument).exists():
        name, rest = "", argument
    return name, to_path(rest)


def read_run(place: epath.Path) -> Run:
    """Reads a result folder of ours, or a sample file or folder of lmms-eval."""
    if (place / RESULTS).exists():
        return ours.read_folder(place)
    if place.exists() and (files := lmms_eval.find_samples(place)):
        return lmms_eval.read_samples(place, files)
    raise UserError(
        f"{place} has no results: neither {RESULTS} of stf_jax.evaluate nor *{lmms_eval.SAMPLES}*.jsonl of lmms-eval."
    )


def compare(
    methods: Sequence[Method],
    *,
    baseline: str = "",
    resized: str = "",
    blank: Mapping[str, Run] | None = None,
    margin: float = 1.0,
) -> Comparison:
    """Compares methods.

    Args:
      methods: the methods, all of the same benchmarks.
      baseline: the name of the method that the others are compared with; by default the first.
      resized: the name of the method that only resizes images, for the hard questions.
      blank: runs with blank images, by the name of their method.
      margin: the difference in points below which two methods count as equal.

    Raises:
      UserError: an unknown name; different questions, protocols or seeds.
    """
    by_name, blank = {method.name: method for method in methods}, blank or {}
    baseline = baseline or methods[0].name
    for option, name in (("baseline", baseline), ("resized", resized), *(("blank", name) for name in blank)):
        if name and name not in by_name:
            raise UserError(f"--{option} names no result {name!r}; {did_you_mean(name, by_name)}")
    first = methods[0]
    for method in methods:
        for run in method.runs:
            check_same(first.runs[0], first.name, run, method.name)
        if method.name in blank:
            dark = blank[method.name]
            check_same(method.runs[0], method.name, dark, f"its blank run {dark.place}")
            if dark.tool == ours.TOOL and not dark.blank:
                raise UserError(
                    f"--blank={method.name}={dark.place} has answers about the images themselves: evaluate with "
                    "--blank."
                )
    base = by_name[baseline]
    for method in methods:
        for other in (method, by_name[resized]) if resized else (method,):
            if len(other.seeds) > 1 and len(base.seeds) > 1 and other.seeds != base.seeds:
                raise UserError(
                    f"{other.name} has seeds {_join(other.seeds)}, but {base.name} {_join(base.seeds)}: differences "
                    "are paired by seed, so give the same seeds of both, or one."
                )
    benchmarks = list(first.runs[0].benchmarks)
    groups = {ALL: benchmarks} | {
        f"Mean of {group}": members
        for group, names in benchmark_groups().items()
        if 1 < len(members := [name for name in benchmarks if name in names]) < len(benchmarks)
    }
    groups = (groups if len(benchmarks) > 1 else {}) | {name: [name] for name in benchmarks}
    masks = {name: _make_masks(base, by_name.get(resized), name) for name in benchmarks}
    results = {
        group: {method.name: _compute_result(method, base, names, masks, blank.get(method.name)) for method in methods}
        for group, names in groups.items()
    }
    order = sorted(methods, key=lambda method: -method.cost.get("image_tokens", -1))  # a stable sort
    counts = {
        group: (_count(masks, names, 0), _count(masks, names, 1), _count(masks, names, 2))
        for group, names in groups.items()
        if resized
    }
    questions = {group: sum(len(first.benchmark(name).ids) for name in names) for group, names in groups.items()}
    return Comparison(order, baseline, resized, margin, results, questions, counts)


def _count(masks: Mapping[str, Sequence[np.ndarray]], names: Sequence[str], index: int) -> int:
    return sum(int(masks[name][index].sum()) for name in names)


def _join(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def _make_masks(base: Method, resized: Method | None, benchmark: str) -> list[np.ndarray]:
    """Returns which questions the resized image gets wrong, and which of these and of the others the baseline does not.

    With several seeds, a question counts as right if the mean score over the seeds is at least half.
    """
    if resized is None:
        return []
    right, base_right = (one.scores(benchmark).mean(0) >= _RIGHT for one in (resized, base))
    return [~right, ~right & base_right, right & base_right]


def _compute_result(
    method: Method, base: Method, names: Sequence[str], masks: Mapping[str, Sequence[np.ndarray]], blank: Run | None
) -> Result:
    clusters = [method.benchmark(name).clusters for name in names]
    scores = [method.scores(name) for name in names]

    def mean_where(index: int) -> ClusteredMean | None:
        parts = [
            (one[:, masks[name][index]], numbers[masks[name][index]])
            for one, numbers, name in zip(scores, clusters, names, strict=True)
            if masks[name] and masks[name][index].any()
        ]
        return clustered_mean(*zip(*parts, strict=True)) if len(parts) == len(names) else None

    difference = agreed = None
    if method is not base:
        difference = clustered_mean([one - base.scores(n) for one, n in zip(scores, names, strict=True)], clusters)
        agreed = float(np.mean([_mean_agreement(method, base, name) for name in names]))
    blanks = [_find_blank(method.benchmark(name), blank.benchmarks[name] if blank else None) for name in names]
    return Result(
        clustered_mean(scores, clusters),
        np.mean([one.mean(1) for one in scores], 0).tolist(),
        difference,
        agreed,
        mean_where(0),
        mean_where(1),
        mean_where(2),
        None if None in blanks else float(np.mean([one for one in blanks if one is not None])),
    )


def _find_blank(own: ScoredBenchmark, blank: ScoredBenchmark | None) -> float | None:
    """Returns the mean score with blank images. A benchmark that asks both shows images in a blank run too."""
    if blank is None:
        return own.blank
    return float(np.mean(blank.scores)) if blank.blank is None else blank.blank


def _mean_agreement(method: Method, base: Method, benchmark: str) -> float:
    """Returns the mean agreement over pairs of seeds, or over the seeds of one if the other has a single one."""
    count = max(len(method.runs), len(base.runs))
    pairs = ((method.runs[i % len(method.runs)], base.runs[i % len(base.runs)]) for i in range(count))
    return float(np.mean([agreement(one.benchmarks[benchmark], two.benchmarks[benchmark]) for one, two in pairs]))
