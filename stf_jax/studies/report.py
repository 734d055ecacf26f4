"""Reports of a study in sentences, tables and plots: ``report.md``, ``report.html``, ``report.json`` and PNGs."""

import dataclasses
import importlib.metadata
import math
import os
import pathlib
import platform
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from etils import epath

from stf_jax.files import open_atomic, parse_json, write_json
from stf_jax.studies import plots
from stf_jax.studies.formatting import estimate_to_json, format_margin, format_verdict
from stf_jax.studies.outcomes import BLANK, LossCurve, Outcome
from stf_jax.studies.page import Block, Code, Heading, Image, Items, Table, Text, render_html, render_markdown
from stf_jax.studies.statistics import CONFIDENCE, POWER, ClusteredMean, Estimate, deviation, difference, mean
from stf_jax.studies.study import Cell, Study, Variant
from stf_jax.table import format_duration

_EQUAL, _INCONCLUSIVE = "=", "·"  # marks of a difference shown to be small, and of one that may be large or zero
_OTHER_SEED_COUNTS = (3, 5, 8, 12)  # for which the report also gives the detectable difference
_Key = TypeVar("_Key", str, int)  # a kind of question, or a height


@dataclasses.dataclass(frozen=True)
class Findings:
    """All results of a study.

    Attributes:
      scores: the scores of each variant by kind, float [S, Q].
      quality: the mean over seeds of each variant by kind.
      heights: the mean over seeds of each variant by the height of printed capitals in pixels.
      spread: the standard deviation between seeds for each variant's first kind.
      differences: the difference of each other variant from the baseline, by kind.
      height_differences: the same by height.
      losses: the training losses of each stage, by variant.
      costs: the cost of each variant (studies/cost.py).
    """

    study: Study
    scores: dict[str, dict[str, np.ndarray]]
    quality: dict[str, dict[str, Estimate]]
    heights: dict[str, dict[int, Estimate]]
    spread: dict[str, Estimate]
    differences: dict[str, dict[str, ClusteredMean]]
    height_differences: dict[str, dict[int, ClusteredMean]]
    losses: Mapping[str, Mapping[str, LossCurve]]
    costs: Mapping[str, Mapping[str, Any]]

    @property
    def kinds(self) -> list[str]:
        """The kinds of questions in the benchmark's order; the first is all questions."""
        return list(next(iter(self.scores.values())))

    def margin(self, kind: str) -> float:
        """Returns the difference in points below which two variants count as equal for a kind."""
        return self.study.margin if kind == self.kinds[0] else self.study.kind_margin


def compute_findings(
    study: Study,
    outcomes: Mapping[str, Outcome],
    losses: Mapping[str, Mapping[str, LossCurve]],
    costs: Mapping[str, Mapping[str, Any]],
) -> Findings:
    """Computes the results of the variants whose runs are all finished."""
    scores = {name: outcome.scores for name, outcome in outcomes.items()}
    heights = {name: outcome.heights for name, outcome in outcomes.items()}
    return Findings(
        study,
        scores,
        _means(scores),
        _means(heights),
        {name: deviation(next(iter(by_kind.values())).mean(1)) for name, by_kind in scores.items()},
        _differences_from(study.baseline, scores),
        _differences_from(study.baseline, heights),
        losses,
        costs,
    )


def _means(scores: Mapping[str, Mapping[_Key, np.ndarray]]) -> dict[str, dict[_Key, Estimate]]:
    return {name: {key: mean(x.mean(1)) for key, x in by_key.items()} for name, by_key in scores.items()}


def _differences_from(
    baseline: str, scores: Mapping[str, Mapping[_Key, np.ndarray]]
) -> dict[str, dict[_Key, ClusteredMean]]:
    base = scores.get(baseline, {})
    return {
        name: {key: difference(by_key[key], base[key]) for key in base}
        for name, by_key in scores.items()
        if name != baseline and base
    }


def write_report(
    findings: Findings, cells: Sequence[Cell], failed: Mapping[Cell, str], command: str, out: pathlib.Path
) -> None:
    """Writes the report's files to ``out``.

    Args:
      findings: the results.
      cells: the cells of the variants in the report.
      failed: the reason of failure for each failed cell.
      command: the command line that made the report.
      out: the folder.
    """
    images = plots.draw_plots(findings, out)
    blocks = _make_blocks(findings, images, cells, failed, command)
    for name, text in (
        ("report.md", render_markdown(findings.study.title, blocks)),
        ("report.html", render_html(findings.study.title, blocks)),
    ):
        with open_atomic(epath.Path(out / name)) as file:
            file.write(text)
    write_json(epath.Path(out / "report.json"), _make_json(findings, cells, out))


def _make_blocks(
    findings: Findings,
    images: Mapping[str, Image],
    cells: Sequence[Cell],
    failed: Mapping[Cell, str],
    command: str,
) -> list[Block]:
    blocks: list[Block] = [Text(findings.study.question), Items(format_verdicts(findings))]
    if failed:
        blocks.append(Text("**Some runs failed.** The report leaves out their variants."))
        blocks.append(Items([f"{cell.name}: {error}" for cell, error in failed.items()]))
    blocks += _quality_section(findings, images)
    blocks += _heights_section(findings, images) if any(findings.heights.values()) else []
    blocks += _differences_section(findings, images) + _power_section(findings) if findings.differences else []
    blocks += _cost_section(findings, images) if findings.costs else []
    overrides = [[variant.name, _describe_variant(findings.study, variant)] for variant in findings.study.variants]
    return [
        *blocks,
        Heading("How to reproduce it"),
        Code(command),
        Text(_describe_runs(findings.study, cells)),
        Text("This command starts one of its runs alone (report.json lists them all):"),
        Code(_format_command(cells[0].command)),
        Table(["variant", "overrides"], overrides, text_columns=2),
    ]


def _quality_section(findings: Findings, images: Mapping[str, Image]) -> list[Block]:
    text = (
        f"Correct answers in percent (for MME, its points): the mean over {len(findings.study.seeds)} seeds ± half of "
        f"Student's {CONFIDENCE:.0%} interval. The last column is the standard deviation between seeds with its "
        "interval."
    )
    if BLANK in findings.kinds:
        text += f" **{BLANK}**: the same questions about a gray image, which the model can only guess."
    rows = [
        [
            _bold_baseline(name, findings.study),
            *([_format_tokens(findings.costs.get(name, {}))] if findings.costs else []),
            *(_format_mean(by_kind[kind]) for kind in findings.kinds),
            _format_interval(findings.spread[name]),
        ]
        for name, by_kind in findings.quality.items()
    ]
    header = ["", *(["image tokens"] if findings.costs else []), *findings.kinds, "deviation"]
    blocks: list[Block] = [Heading("Quality"), Text(text), Table(header, rows), *_existing(images, "quality")]
    if "kinds" in images:
        blocks += [Text(_EXPLAIN_KINDS.format(findings.study.baseline)), images["kinds"]]
    if "losses" in images:
        blocks += [Text(f"Training loss, the mean over seeds; blue: {findings.study.baseline}."), images["losses"]]
    return blocks


_EXPLAIN_KINDS = (
    "Correct answers by kind. Colors are differences from {0}: red is worse, blue is better, and white is within noise."
)


def _heights_section(findings: Findings, images: Mapping[str, Image]) -> list[Block]:
    text = (
        "Correct answers in percent to questions about printed text, by the height of its capitals in pixels: the mean "
        f"over seeds ± half of Student's {CONFIDENCE:.0%} interval."
    )
    explain_plot = (
        f"Black: the variant; blue: {findings.study.baseline}; gray: the others. Filled points differ from "
        f"{findings.study.baseline} by more than noise."
    )
    heights = list(next(iter(findings.heights.values())))
    rows = [
        [_bold_baseline(name, findings.study), *(_format_mean(by_height[height]) for height in heights)]
        for name, by_height in findings.heights.items()
    ]
    table = Table(["", *(f"{height} px" for height in heights)], rows)
    return [Heading("By height of print"), Text(text), table, Text(explain_plot), images["heights"]]


def _differences_section(findings: Findings, images: Mapping[str, Image]) -> list[Block]:
    study = findings.study
    text = (
        f"Differences in points of the table above, paired by seed and question, with the {CONFIDENCE:.0%} interval of "
        f"a bootstrap over both. {_EQUAL}: two one-sided tests find the difference smaller than "
        f"{format_margin(study.margin)} over all questions, or {format_margin(study.kind_margin)} for one kind. "
        f"{_INCONCLUSIVE}: inconclusive, because the interval contains zero and extends beyond the margin. One "
        "interval in twenty misses the true difference by chance."
    )
    rows = [
        [name, *(_format_difference(by_kind[kind], findings.margin(kind)) for kind in findings.kinds)]
        for name, by_kind in findings.differences.items()
    ]
    heading = Heading(f"Differences from {study.baseline}")
    return [heading, Text(text), Table(["", *findings.kinds], rows), *_existing(images, "differences")]


def _power_section(findings: Findings) -> list[Block]:
    """Makes the section about detectable differences."""
    if len(findings.study.seeds) < 2:
        return []
    kinds = [kind for kind in findings.kinds if kind != BLANK]
    text = (
        f"The true difference in points that this study detects with a probability of {POWER:.0%}. It differs between "
        "variants; the columns give the smallest, median and largest. The second table gives it over all questions for "
        "other numbers of seeds."
    )
    rows = [
        _format_range(kind, [by_kind[kind].detectable() for by_kind in findings.differences.values()]) for kind in kinds
    ]
    first = [by_kind[kinds[0]] for by_kind in findings.differences.values()]
    other_rows = [
        _format_range(f"{seeds} seeds", [result.detectable(seeds) for result in first]) for seeds in _OTHER_SEED_COUNTS
    ]
    return [
        Heading("Detectable differences"),
        Text(text),
        Table(["", "smallest", "median", "largest"], rows),
        Table([kinds[0], "smallest", "median", "largest"], other_rows),
    ]


def _format_range(name: str, values: Sequence[float]) -> list[str]:
    return [name, *(f"{value:.1f}" for value in (min(values), np.median(values), max(values)))]


def _cost_section(findings: Findings, images: Mapping[str, Image]) -> list[Block]:
    first = next(iter(findings.costs.values()))
    text = (
        f"Variants are measured one after another on one slot of the machine ({first['device']}). Step times are the "
        f"median of 20 steps of the last stage. First-token times are the median of ten runs from "
        f"{first['first_token_rows']} questions, with their images in memory, to the first tokens of all answers. "
        "FLOPs are model FLOPs (accounting/flops.py). Memory is that of a training step, as the compiler planned "
        "it or an accelerator reported it. Variants that do not train have no step."
    )
    rows = [
        [
            _bold_baseline(name, findings.study),
            _format_tokens(cost),
            *(template.format(cost[key]) if key in cost else "" for key, (_, template) in _COSTS.items()),
        ]
        for name, cost in findings.costs.items()
    ]
    header = ["", "image tokens", *(title for title, _ in _COSTS.values())]
    return [Heading("Cost"), Text(text), Table(header, rows), *_existing(images, "cost")]


def _existing(images: Mapping[str, Image], *names: str) -> list[Image]:
    return [images[name] for name in names if name in images]


def _format_tokens(cost: Mapping[str, Any]) -> str:
    """Image tokens that are kept; where the decoder drops the others, also the average that its layers read."""
    average = f" (average {cost['average_image_tokens']:.0f})" if "average_image_tokens" in cost else ""
    return f"{cost.get('image_tokens', '')}{average}"


_COSTS = {
    "fusion_parameters": ("fusion parameters", "{:,}"),
    "step_gflops": ("GFLOP per step", "{:.2f}"),
    "step_ms": ("ms per step", "{:.0f}"),
    "step_mib": ("MiB per step", "{:.0f}"),
    "prefill_gflops": ("GFLOP per prompt", "{:.3f}"),
    "first_token_ms": ("ms to first tokens", "{:.0f}"),
}


def format_verdicts(findings: Findings) -> list[str]:
    """Returns one sentence for each variant's difference from the baseline over all questions, and for each control."""
    verdicts, baseline, margin = [], findings.study.baseline, findings.study.margin
    for name, by_kind in findings.differences.items():
        result = next(iter(by_kind.values()))
        if math.isnan(result.low):
            verdicts.append(f"{name} vs. {baseline}: one seed and one value are too few to estimate the noise.")
        else:
            verdicts.append(format_verdict(name, baseline, result, margin))
    return verdicts + _format_controls(findings)


def _format_controls(findings: Findings) -> list[str]:
    """Returns a sentence for each repeated variant: whether its differences from the original are significant."""
    sentences = []
    for variant in findings.study.variants:
        if variant.repeats and {variant.name, variant.repeats} <= findings.scores.keys():
            scores, originals = findings.scores[variant.name], findings.scores[variant.repeats]
            differing = [kind for kind in findings.kinds if not difference(scores[kind], originals[kind]).within_noise]
            result = f"by chance they differ in {', '.join(differing)}" if differing else "no difference is significant"
            sentences.append(f"Control: {variant.name} is {variant.repeats} with other seeds; {result}.")
    return sentences


def _describe_runs(study: Study, cells: Sequence[Cell]) -> str:
    seconds = [_read_seconds(cell) for cell in cells if cell.source_run is None]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax"))
    return (
        f"Seeds {', '.join(map(str, study.seeds))}; {len(seconds)} training runs, whose steps took "
        f"{format_duration(sum(seconds))} in total and at most {format_duration(max(seconds, default=0))} per run. The "
        f"report was made on {_describe_machine()}, Python {platform.python_version()}, {versions}."
    )


def _describe_machine() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.machine()
    return f"{os.cpu_count()} CPUs ({model})"


def _read_seconds(cell: Cell) -> float:
    """Returns the seconds that a run's steps took, over all its stages."""
    lines = [file.read_bytes().splitlines()[-1] for file in cell.folder.glob("**/metrics.jsonl")]
    return sum(parse_json(line)["seconds"] for line in lines)


def _describe_variant(study: Study, variant: Variant) -> str:
    if variant.source:
        return f"runs of {variant.source}, evaluated with `{' '.join(variant.eval_options)}`"
    trained = [set(other.overrides) for other in study.variants if not other.source]
    common = set.intersection(*trained)
    return ", ".join(f"`{override}`" for override in variant.overrides if override not in common) or "only common ones"


def _format_command(command: Sequence[str]) -> str:
    return shlex.join(["python", *command[1:]])


def _make_json(findings: Findings, cells: Sequence[Cell], out: pathlib.Path) -> dict[str, Any]:
    def difference_to_json(result: ClusteredMean, margin: float) -> dict[str, Any]:
        detectable = result.detectable()
        return estimate_to_json(result) | {
            "within_noise": result.within_noise,
            "within_margin": result.within_margin(margin),
            "detectable": None if math.isnan(detectable) else detectable,
        }

    def nested_to_json(by_variant: Mapping[str, Mapping[Any, Estimate]]) -> dict[str, dict[Any, Any]]:
        return {
            name: {key: estimate_to_json(one) for key, one in by_key.items()} for name, by_key in by_variant.items()
        }

    return {
        "title": findings.study.title,
        "baseline": findings.study.baseline,
        "seeds": list(findings.study.seeds),
        "margin": findings.study.margin,
        "kind_margin": findings.study.kind_margin,
        "quality": nested_to_json(findings.quality),
        "heights": nested_to_json(findings.heights),
        "by_seed": {
            name: {kind: x.mean(1).tolist() for kind, x in by_kind.items()} for name, by_kind in findings.scores.items()
        },
        "deviation": {name: estimate_to_json(estimate) for name, estimate in findings.spread.items()},
        "differences": {
            name: {kind: difference_to_json(result, findings.margin(kind)) for kind, result in by_kind.items()}
            for name, by_kind in findings.differences.items()
        },
        "height_differences": {
            name: {
                height: difference_to_json(result, findings.study.kind_margin) for height, result in by_height.items()
            }
            for name, by_height in findings.height_differences.items()
        },
        "cost": findings.costs,
        "folders": {  # relative to the report's
            name: [os.path.relpath(cell.folder, out) for cell in cells if cell.variant.name == name]
            for name in findings.scores
        },
        "commands": {cell.name: _format_command(cell.command) for cell in cells},
    }


def _bold_baseline(name: str, study: Study) -> str:
    return f"**{name}**" if name == study.baseline else name


def _format_mean(estimate: Estimate) -> str:
    half_width = "" if math.isnan(estimate.low) else f"\n± {estimate.high - estimate.value:.1f}"
    return f"{estimate.value:.1f}{half_width}"


def _format_interval(estimate: Estimate) -> str:
    if math.isnan(estimate.value):
        return ""
    return f"{estimate.value:.1f}\n{estimate.low:.1f} to {estimate.high:.1f}"


def _format_difference(result: ClusteredMean, margin: float) -> str:
    if math.isnan(result.low):
        return f"{result.value:+.1f}"
    mark = _EQUAL if result.within_margin(margin) else _INCONCLUSIVE if result.within_noise else ""
    return f"{result.value:+.1f}{mark}\n{result.low:+.1f} to {result.high:+.1f}"
