"""Runs to compare: the scores of each question of each benchmark, how they were asked, and what they cost.

Axis letters: S seeds, Q questions.
"""

import dataclasses
import math
import os
import pathlib
import re
import statistics
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from stf_jax.config import UserError, flatten, shorten
from stf_jax.files import read_json

COSTS = (  # keys of cost.json that comparisons read, besides the device
    "image_tokens",
    "average_image_tokens",
    "prefill_gflops",
    "first_token_ms",
    "first_token_rows",
    "method_ms",
    "prefill_mib",
    "step_mib",
)


@dataclasses.dataclass(frozen=True)
class ScoredBenchmark:
    """A run's scores of one benchmark; questions are sorted by id and prompt.

    Attributes:
      ids: the question's id and what else identifies it, such as its prompt, for each question.
      scores: in percent, float [Q].
      answers: the answers to each question, normalized for :func:`agreement`.
      clusters: a number per question, int [Q], equal for questions about one image.
      metric: what the mean of the scores is.
      protocol: what must be equal in runs that are compared.
      details: what may differ, but should be known.
      metrics: the metrics of the benchmark's own program.
      blank: the mean score of the same questions about blank images, if they were asked.
    """

    ids: list[tuple[str, str]]
    scores: np.ndarray
    answers: list[tuple[str, ...]]
    clusters: np.ndarray
    metric: str
    protocol: dict[str, Any]
    details: dict[str, Any]
    metrics: dict[str, float]
    blank: float | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """One model's results.

    Attributes:
      tool: the program that evaluated it.
      place: the folder or file, for messages.
      benchmarks: the scores by benchmark.
      cost: those of :data:`COSTS` that are known, and ``device``. ``image_tokens`` are those that a layer of the
        language model reads, on average.
      blank: whether all its images were blank.
      chooses: whether it chose the number of tokens for each image; the cost has their mean.
      reduced: how a reducer or a schedule left fewer image tokens; empty if none did.
      unscored: benchmarks whose labels are not public.
    """

    tool: str
    place: str
    benchmarks: dict[str, ScoredBenchmark]
    cost: dict[str, Any]
    blank: bool = False
    chooses: bool = False
    reduced: str = ""
    unscored: tuple[str, ...] = ()


def make_benchmark(
    ids: Sequence[tuple[str, str]],
    scores: Sequence[float],
    answers: Sequence[Sequence[str]],
    images: Sequence[Hashable],
    metric: str,
    **others: Any,
) -> ScoredBenchmark:
    """Makes a benchmark's scores from values in 0..1 and hashable images, in any order of the questions."""
    order = sorted(range(len(ids)), key=ids.__getitem__)
    numbers: dict[Hashable, int] = {}
    return ScoredBenchmark(
        [ids[index] for index in order],
        np.array([100.0 * scores[index] for index in order]),
        [tuple(map(_normalize, answers[index])) for index in order],
        np.array([numbers.setdefault(images[index], len(numbers)) for index in order], int),
        metric,
        **others,
    )


def _normalize(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def agreement(one: ScoredBenchmark, other: ScoredBenchmark) -> np.ndarray:
    """Returns 100 for each question with the same answers in both runs and 0 for the others, float [Q].

    Case, spaces and full stops at the end do not count.
    """
    return np.array([100.0 * (first == second) for first, second in zip(one.answers, other.answers, strict=True)])


def read_cost(file: epath.Path) -> dict[str, Any]:
    """Reads the known keys of a cost file; empty if there is none. Raises UserError for a malformed one."""
    if not file.exists():
        return {}
    values = read_json(file)
    if not isinstance(values, dict):
        raise UserError(f'{file} is not a JSON object of costs, such as {{"image_tokens": 144}}.')
    for key in COSTS:
        value = values.get(key, 1)
        if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
            raise UserError(f"{file}: {key} is {shorten(repr(value))}, not a number that is at least 0.")
    cost = {key: values[key] for key in (*COSTS, "device") if key in values}
    # Where layers read different numbers of tokens, what the last of them read would make the method look cheaper.
    if (average := cost.pop("average_image_tokens", None)) is not None:
        cost["image_tokens"] = average
    return cost


def check_same(one: Run, name: str, other: Run, other_name: str) -> None:
    """Raises UserError with the difference unless two runs answered the same questions by the same protocol."""
    if one.tool != other.tool:
        raise UserError(
            f"{name} was evaluated by {one.tool} and {other_name} by {other.tool}, whose prompts and scores differ: "
            "evaluate both with the same program (docs/weights.md evaluates an export with lmms-eval)."
        )
    for run, run_name, second_run, second_name in ((one, name, other, other_name), (other, other_name, one, name)):
        missing = [benchmark for benchmark in run.benchmarks if benchmark not in second_run.benchmarks]
        if missing:
            raise UserError(f"{run_name} has results of {missing[0]}, but {second_name} ({second_run.place}) does not.")
    for benchmark, first in one.benchmarks.items():
        second = other.benchmarks[benchmark]
        if first.ids != second.ids:
            raise UserError(_describe_questions(benchmark, first, name, second, other_name))
        known = first.protocol.keys() & second.protocol.keys()
        values, others = (flatten({key: one.protocol[key] for key in sorted(known)}) for one in (first, second))
        for key in values | others:
            if values.get(key) != others.get(key):
                raise UserError(
                    f"{name} and {other_name} have different protocols of {benchmark}: {key} is "
                    f"{shorten(repr(values.get(key)))} for {name} and {shorten(repr(others.get(key)))} for "
                    f"{other_name}."
                )


def _describe_questions(
    benchmark: str, first: ScoredBenchmark, name: str, second: ScoredBenchmark, other_name: str
) -> str:
    start = f"{name} and {other_name} answered different questions of {benchmark}: "
    if len(first.ids) != len(second.ids):
        return f"{start}{len(first.ids):,} and {len(second.ids):,}."
    ids, others = {key for key, _ in first.ids}, {key for key, _ in second.ids}
    for missing, where in ((ids - others, other_name), (others - ids, name)):
        if missing:
            return f"{start}{where} has no question {shorten(repr(min(missing)))}."
    question = next(one for one, two in zip(first.ids, second.ids, strict=True) if one != two)
    return f"{start}question {shorten(repr(question[0]))} has another prompt or gold answer."


@dataclasses.dataclass(frozen=True)
class Method:
    """The runs of one method: one per seed, in the order of ``seeds``."""

    name: str
    seeds: tuple[int, ...]
    runs: tuple[Run, ...]

    @property
    def cost(self) -> Mapping[str, Any]:
        """The cost of the first run that has a measured one: seeds change only chosen numbers of tokens."""
        cost = max(self.runs, key=lambda run: len(run.cost)).cost
        if all(run.chooses for run in self.runs):
            cost = cost | {"image_tokens": statistics.fmean(run.cost["image_tokens"] for run in self.runs)}
        return cost

    def benchmark(self, name: str) -> ScoredBenchmark:
        """Returns the first seed's scores of a benchmark."""
        return self.runs[0].benchmarks[name]

    def scores(self, benchmark: str) -> np.ndarray:
        """Returns the scores of a benchmark, float [S, Q]."""
        return np.stack([run.benchmarks[benchmark].scores for run in self.runs])


_SEED = re.compile(r"seed[_-]?(\d+)")


def default_name(place: epath.Path) -> tuple[str, int | None]:
    """Returns a folder's name as a method and its seed: ablate writes ``METHOD/seed_N``."""
    folder = pathlib.Path(os.path.abspath(place))  # has a name even for "."
    folder = folder.parent if folder.suffix == ".jsonl" else folder
    if found := _SEED.fullmatch(folder.name):
        return folder.parent.name, int(found[1])
    return folder.name, None


def make_methods(runs: Sequence[tuple[str, int | None, bool, Run]]) -> list[Method]:
    """Groups runs by name.

    Args:
      runs: name, seed if it is known, whether the user chose the name, and the run.

    Raises:
      UserError: runs of one name that are no seeds of one method.
    """
    groups: dict[str, list[tuple[int | None, bool, Run]]] = {}
    for name, seed, chosen, run in runs:
        groups.setdefault(name, []).append((seed, chosen, run))
    methods = []
    for name, members in groups.items():
        first = members[0][2]
        for seed, chosen, run in members[1:]:
            if seed is None and not chosen:
                raise UserError(
                    f"Two results are named {name} ({first.place} and {run.place}): name them, as in A={first.place} "
                    f"B={run.place}; results with the same given name are seeds of one method."
                )
            tokens = run.cost.get("image_tokens"), first.cost.get("image_tokens")
            if None not in tokens and tokens[0] != tokens[1] and not (run.chooses and first.chooses):
                raise UserError(
                    f"{run.place} has {tokens[0]} image tokens and {first.place} {tokens[1]}, so they are no seeds of "
                    f"one method; give them different names."
                )
        seeds = [index if seed is None else seed for index, (seed, _, _) in enumerate(members)]
        if len(set(seeds)) < len(seeds):
            raise UserError(f"Two results of {name} have the same seed: {', '.join(run.place for *_, run in members)}.")
        order = sorted(range(len(seeds)), key=seeds.__getitem__)
        methods.append(Method(name, tuple(seeds[i] for i in order), tuple(members[i][2] for i in order)))
    return methods
