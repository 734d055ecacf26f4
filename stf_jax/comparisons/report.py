"""Writes a comparison as ``compare.md``, ``compare.html``, ``compare.json`` and plots."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from stf_jax.comparisons import lmms_eval
from stf_jax.comparisons.comparison import ALL, BUDGETS, Comparison, Result
from stf_jax.comparisons.plots import draw_plots
from stf_jax.comparisons.runs import Method
from stf_jax.files import open_atomic, write_json
from stf_jax.studies.formatting import estimate_to_json, format_margin, format_signed, format_verdict
from stf_jax.studies.page import (
    Block,
    Code,
    Heading,
    Image,
    Items,
    Table,
    Text,
    render_html,
    render_markdown,
)
from stf_jax.studies.statistics import CONFIDENCE, ClusteredMean

NAME = "compare"
_ABSENT = "–"
_COSTS = {
    "image_tokens": ("image tokens", "{:,.4g}"),  # a mean, where layers or images differ
    "prefill_gflops": ("GFLOP per prompt", "{:,.3f}"),
    "first_token_ms": ("ms to first tokens", "{:,.1f}"),
    "method_ms": ("ms of the method itself", "{:,.2f}"),
    "prefill_mib": ("MiB to answer", "{:,.0f}"),
    "step_mib": ("MiB per training step", "{:,.0f}"),
}


def write_report(comparison: Comparison, command: str, out: pathlib.Path) -> None:
    """Writes all files to ``out``; ``command`` is the command line that made the comparison."""
    title = f"Comparison with {comparison.baseline}"
    blocks = _make_blocks(comparison, draw_plots(comparison, out), command)
    for suffix, text in (
        ("md", render_markdown(title, blocks)),
        ("html", render_html(title, blocks)),
    ):
        with open_atomic(epath.Path(out / f"{NAME}.{suffix}")) as file:
            file.write(text)
    write_json(epath.Path(out / f"{NAME}.json"), _make_json(comparison, command))


def format_verdicts(comparison: Comparison) -> list[str]:
    """Returns a sentence about each method's difference from the baseline, over all benchmarks."""
    sentences = []
    for name, result in next(iter(comparison.results.values())).items():
        if result.difference is None:
            continue
        if math.isnan(result.difference.low):
            sentences.append(f"{name} vs. {comparison.baseline}: one question is too few to estimate the noise.")
        else:
            sentences.append(format_verdict(name, comparison.baseline, result.difference, comparison.margin))
    return sentences


def _make_blocks(comparison: Comparison, images: Mapping[str, Sequence[Image]], command: str) -> list[Block]:
    notes = _format_notes(comparison)
    blocks: list[Block] = [Items(format_verdicts(comparison))]
    for group in comparison.results:
        blocks += [Heading(_format_heading(comparison, group)), _accuracy_table(comparison, group), *images[group]]
        blocks += [_hard_table(comparison, group)] if comparison.resized else []
    blocks += _seeds_section(comparison) + _cost_section(comparison)
    blocks += [Heading("How to read the tables"), Items(_explain(comparison))]
    blocks += [Heading("What differs"), Items(notes)] if notes else []
    sources = [
        [method.name, str(seed), run.tool, run.place]
        for method in comparison.methods
        for seed, run in zip(method.seeds, method.runs, strict=True)
    ]
    header = ["method", "seed", "evaluated by", "folder"]
    return [*blocks, Heading("How to reproduce it"), Code(command), Table(header, sources, text_columns=4)]


def _explain(comparison: Comparison) -> list[str]:
    texts = [
        f"**Accuracy** is the mean score of the questions in percent, with its {CONFIDENCE:.0%} interval; "
        f"**differences** are in points from {comparison.baseline}, paired by question and seed.",
        "Intervals are those of a bootstrap over questions, in which questions about one image stay together, and over "
        "seeds where there are several. With one seed they do not say how much another training run would change. One "
        "interval in twenty misses by chance.",
        "**better**, **worse**: the interval excludes zero. **equal**: two one-sided tests find the difference smaller "
        f"than {format_margin(comparison.margin)}. **noise**: neither.",
        "**Image tokens** are those of an image that a layer of the language model reads, on average over its layers.",
        f"**Fewer tokens** is in percent of {comparison.baseline}'s; within a point of one of UniPruneBench's budgets "
        f"({', '.join(f'{budget:g}%' for budget in BUDGETS)}) it is that budget.",
        f"**Same answer** is the share of questions with the answer of {comparison.baseline}, in percent. **Blank** is "
        "the accuracy when the same questions are asked about blank images.",
    ]
    if comparison.resized:
        texts.append(
            f"**Hard** questions are those that {comparison.resized} gets wrong. VTC-Bench's **group A** are those of "
            f"them that {comparison.baseline} gets right; its **group B** are those that both get right. Compare the "
            f"other methods there, but not with {comparison.resized} or {comparison.baseline}, whose answers define "
            "the groups."
        )
    return texts


def _format_heading(comparison: Comparison, group: str) -> str:
    names = f" ({', '.join(comparison.benchmarks)})" if group == ALL else ""
    return f"{group}{names}: {comparison.questions[group]:,} questions"


def _accuracy_table(comparison: Comparison, group: str) -> Table:
    header = ["method", "accuracy", "difference", "image tokens", "fewer tokens", "seeds", "same answer", "blank"]
    rows = []
    for method in comparison.methods:
        result, budget = comparison.results[group][method.name], comparison.budget(method)
        rows.append(
            [
                _bold_baseline(method.name, comparison),
                _format_interval(result.accuracy),
                _format_difference(result.difference, comparison.margin),
                _format_cost(method, "image_tokens"),
                _ABSENT if budget is None else f"{budget:.1f}%",
                str(len(method.seeds)),
                _format_value(result.agreement),
                _format_value(result.blank),
            ]
        )
    return Table(header, rows)


def _hard_table(comparison: Comparison, group: str) -> Table:
    hard, lost, kept = comparison.hard_questions[group]
    header = ["method", f"hard ({hard:,} questions)", f"group A ({lost:,})", f"group B ({kept:,})"]
    rows = []
    for method in comparison.methods:
        result = comparison.results[group][method.name]
        cells = [_format_interval(one) for one in (result.hard, result.lost, result.kept)]
        rows.append([_bold_baseline(method.name, comparison), *cells])
    return Table(header, rows)


def _seeds_section(comparison: Comparison) -> list[Block]:
    several = [method for method in comparison.methods if len(method.seeds) > 1]
    if not several:
        return []
    group, results = next(iter(comparison.results.items()))
    seeds = sorted({seed for method in several for seed in method.seeds})
    rows = []
    for method in several:
        by_seed = dict(zip(method.seeds, results[method.name].by_seed, strict=True))
        rows.append([_bold_baseline(method.name, comparison), *(_format_value(by_seed.get(seed)) for seed in seeds)])
    header = ["method", *(f"seed {seed}" for seed in seeds)]
    return [Heading("Seeds"), Text(f"Accuracy of each seed: {group}."), Table(header, rows)]


def _cost_section(comparison: Comparison) -> list[Block]:
    known = [key for key in _COSTS if any(key in method.cost for method in comparison.methods)]
    unknown = [title for key, (title, _) in _COSTS.items() if key not in known]
    text = "Read from `cost.json` in the folders of the results, and image tokens from `results.json` too."
    has_device = any("device" in method.cost for method in comparison.methods)
    if unknown:
        text += f" Not measured in any of these folders: {', '.join(unknown)}."
    has_reduced = any(method.runs[0].reduced for method in comparison.methods)
    rows = [
        [
            _bold_baseline(method.name, comparison),
            *([method.runs[0].reduced or _ABSENT] if has_reduced else []),
            *(_format_cost(method, key) for key in known),
            *([method.cost.get("device", _ABSENT)] if has_device else []),
        ]
        for method in comparison.methods
    ]
    header = ["method", *(["reducer or schedule"] if has_reduced else [])]
    header += [*(_COSTS[key][0] for key in known), *(["device"] if has_device else [])]
    table = Table(header, rows, text_columns=1 + has_reduced)
    return [Heading("Cost"), Text(text), *([table] if known or has_reduced else [])]


def _format_notes(comparison: Comparison) -> list[str]:
    """Returns a sentence for each setting that is not the same for all methods."""
    notes = []
    unscored = dict.fromkeys(name for method in comparison.methods for run in method.runs for name in run.unscored)
    notes += [f"Not compared, because their labels are not public: {', '.join(unscored)}."] if unscored else []
    for benchmark in comparison.benchmarks:
        settings = {method.name: method.benchmark(benchmark) for method in comparison.methods}
        for key in dict.fromkeys(key for one in settings.values() for key in one.details):
            values = {name: one.details.get(key, "unknown") for name, one in settings.items()}
            notes += _describe_values(key.replace("_", " "), values)
        if any(method.runs[0].tool == lmms_eval.TOOL for method in comparison.methods) and all(
            len(set(one.clusters.tolist())) == len(one.ids) for one in settings.values()
        ):
            notes.append(
                f"{benchmark}: the samples do not say which questions are about one image, so each counts as if it had "
                "an image of its own. If some share one, the intervals are too narrow."
            )
        unknown = [name for name, one in settings.items() if len(one.protocol) < len(_largest_protocol(settings))]
        notes += [f"The decoding of {', '.join(unknown)} is unknown: existing answers were scored."] if unknown else []
        notes += [
            f"{benchmark}: the scores are `{metric}`."
            for metric in dict.fromkeys(one.metric for one in settings.values())
            if metric != "mean score of the questions"
        ]
    timed = {method.name: method.cost for method in comparison.methods if "first_token_ms" in method.cost}
    for key, title in (("device", "device of the times"), ("first_token_rows", "questions per timed batch")):
        notes += _describe_values(title, {name: cost.get(key, "unknown") for name, cost in timed.items()})
    return list(dict.fromkeys(notes))


def _largest_protocol(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    return max((one.protocol for one in settings.values()), key=len)


def _describe_values(title: str, values: Mapping[str, Any]) -> list[str]:
    if len(set(map(str, values.values()))) < 2:
        return []
    return [f"{title}: {', '.join(f'{value} ({name})' for name, value in values.items())}."]


def _bold_baseline(name: str, comparison: Comparison) -> str:
    return f"**{name}**" if name == comparison.baseline else name


def _format_cost(method: Method, key: str) -> str:
    return _COSTS[key][1].format(method.cost[key]) if key in method.cost else _ABSENT


def _format_value(value: float | None) -> str:
    return _ABSENT if value is None else f"{value:.1f}"


def _format_interval(estimate: ClusteredMean | None) -> str:
    if estimate is None:
        return _ABSENT
    if not estimate.error > 0:  # by definition, or there is a single question
        return f"{estimate.value:.1f}"
    return f"{estimate.value:.1f} ({estimate.low:.1f} to {estimate.high:.1f})"


def _format_difference(result: ClusteredMean | None, margin: float) -> str:
    if result is None:
        return _ABSENT
    return f"{result.value:+.1f}" if math.isnan(result.low) else f"{format_signed(result)} {describe(result, margin)}"


def describe(result: ClusteredMean, margin: float) -> str:
    """Returns a word for a difference: better, worse, equal or noise."""
    if not result.within_noise:
        return "better" if result.value > 0 else "worse"
    return "equal" if result.within_margin(margin) else "noise"


def _make_json(comparison: Comparison, command: str) -> dict[str, Any]:
    def result_to_json(result: Result) -> dict[str, Any]:
        difference = None
        if result.difference is not None:
            difference = estimate_to_json(result.difference) | {
                "p_value": None if math.isnan(result.difference.p_value) else result.difference.p_value,
                "verdict": describe(result.difference, comparison.margin),
            }
        estimates = {"hard": result.hard, "group_a": result.lost, "group_b": result.kept}
        return {
            "accuracy": estimate_to_json(result.accuracy),
            "by_seed": result.by_seed,
            "difference": difference,
            "agreement": result.agreement,
            **{key: None if one is None else estimate_to_json(one) for key, one in estimates.items()},
            "blank": result.blank,
        }

    return {
        "command": command,
        "baseline": comparison.baseline,
        "resized": comparison.resized or None,
        "margin": comparison.margin,
        "confidence": CONFIDENCE,
        "questions": comparison.questions,
        "hard_questions": {
            group: dict(zip(("hard", "group_a", "group_b"), counts, strict=True))
            for group, counts in comparison.hard_questions.items()
        },
        "methods": {
            method.name: {
                "seeds": list(method.seeds),
                "folders": [run.place for run in method.runs],
                "reduced": method.runs[0].reduced or None,
                "cost": dict(method.cost),
                "fewer_tokens_percent": comparison.budget(method),
                "details": {name: method.benchmark(name).details for name in comparison.benchmarks},
                "metrics": {
                    name: [run.benchmarks[name].metrics for run in method.runs] for name in comparison.benchmarks
                },
            }
            for method in comparison.methods
        },
        "results": {
            group: {name: result_to_json(result) for name, result in by_method.items()}
            for group, by_method in comparison.results.items()
        },
    }
