"""What a study found, in words, tables and plots: ``report.md``, ``report.html``, ``report.json`` and PNGs."""

import dataclasses
import importlib.metadata
import math
import os
import pathlib
import platform
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from stf_jax.runtime.files import open_atomic, parse_json, write_json
from stf_jax.runtime.table import format_duration
from stf_jax.studies import plots
from stf_jax.studies.outcomes import BLANK, Outcome
from stf_jax.studies.page import Block, Code, Heading, Items, Table, Text, markdown, page
from stf_jax.studies.statistics import LEVEL, POWER, Difference, Estimate, deviation, difference, mean
from stf_jax.studies.study import Cell, Study

_EQUAL, _NOISE = "=", "·"  # mark a difference that is shown to be small, and one of which nothing is shown
_MORE_SEEDS = (3, 5, 8, 12)  # for which the report says what a study could find


@dataclasses.dataclass(frozen=True)
class Findings:
    """All figures of a study.

    Attributes:
      scores: of each variant by kind, float [S, Q].
      quality: of each variant by kind, over seeds.
      heights: of each variant by the height of printed capitals in pixels, over seeds.
      spread: the standard deviation between seeds of each variant's first kind.
      differences: from the baseline, of each other variant by kind.
      height_differences: the same by height.
      costs: of each variant (studies/cost.py).
    """

    study: Study
    scores: dict[str, dict[str, np.ndarray]]
    quality: dict[str, dict[str, Estimate]]
    heights: dict[str, dict[int, Estimate]]
    spread: dict[str, Estimate]
    differences: dict[str, dict[str, Difference]]
    height_differences: dict[str, dict[int, Difference]]
    costs: Mapping[str, Mapping[str, Any]]

    @property
    def kinds(self) -> list[str]:
        """Of questions, in the benchmark's order; the first is all of them together."""
        return list(next(iter(self.scores.values())))

    def margin(self, kind: str) -> float:
        """Points below which a difference of that kind counts as none."""
        return self.study.margin if kind == self.kinds[0] else self.study.kind_margin


def findings(study: Study, outcomes: Mapping[str, Outcome], costs: Mapping[str, Mapping[str, Any]]) -> Findings:
    """The figures of variants whose runs are all done."""
    scores = {name: one.scores for name, one in outcomes.items()}
    heights = {name: one.heights for name, one in outcomes.items()}
    return Findings(
        study,
        scores,
        _means(scores),
        _means(heights),
        {name: deviation(next(iter(kinds.values())).mean(1)) for name, kinds in scores.items()},
        _differences_from(study.baseline, scores),
        _differences_from(study.baseline, heights),
        costs,
    )


def _means(scores):
    return {name: {key: mean(x.mean(1)) for key, x in by_key.items()} for name, by_key in scores.items()}


def _differences_from(baseline, scores):
    base = scores.get(baseline, {})
    return {
        name: {key: difference(by_key[key], base[key]) for key in base}
        for name, by_key in scores.items()
        if name != baseline and base
    }


def write_report(found: Findings, cells: Sequence[Cell], failed: Mapping[Cell, str], command: str, out: pathlib.Path):
    """Writes the report's files to ``out``."""
    images = plots.draw(found, out)
    blocks = _blocks(found, images, cells, failed, command)
    for name, text in (
        ("report.md", markdown(found.study.title, blocks)),
        ("report.html", page(found.study.title, blocks)),
    ):
        with open_atomic(epath.Path(out / name)) as file:
            file.write(text)
    write_json(epath.Path(out / "report.json"), _figures(found, cells))


def _blocks(found, images, cells, failed, command) -> list[Block]:
    blocks: list[Block] = [Text(found.study.question), Items(verdicts(found))]
    if failed:
        blocks.append(Text("**Not all runs ended well.** Variants that lack one are left out."))
        blocks.append(Items([f"{cell.name}: {why}" for cell, why in failed.items()]))
    blocks += _quality(found, images)
    blocks += _heights(found, images) if any(found.heights.values()) else []
    blocks += _differences(found, images) + _power(found) if found.differences else []
    blocks += _cost(found, images) if found.costs else []
    differing = [[variant.name, _differs(found.study, variant)] for variant in found.study.variants]
    return [
        *blocks,
        Heading("How to repeat it"),
        Code(command),
        Text(_made(found.study, cells)),
        Text("One of its runs, as anyone may start it alone (all are in report.json):"),
        Code(_shown(cells[0].command)),
        Table(["variant", "differs by"], differing, words=2),
    ]


def _quality(found, images):
    says = (
        f"Right answers in percent (of MME, its points): the mean over seeds ({len(found.study.seeds)}) ± half of "
        f"Student's {LEVEL:.0%} interval; last, the standard deviation between seeds with its interval."
    )
    if BLANK in found.kinds:
        says += f" **{BLANK}**: the same questions of a gray image, that is, what is guessed unseen."
    rows = [
        [
            _bold(name, found.study),
            *([str(found.costs.get(name, {}).get("image_tokens", ""))] if found.costs else []),
            *(_plus_minus(by_kind[kind]) for kind in found.kinds),
            _between(found.spread[name]),
        ]
        for name, by_kind in found.quality.items()
    ]
    header = ["", *(["image tokens"] if found.costs else []), *found.kinds, "deviation"]
    return [Heading("Quality"), Text(says), Table(header, rows), *_shown_of(images, "quality", "kinds")]


def _heights(found, images):
    says = (
        "Right answers in percent to questions on printed text, by the height of its capitals in pixels: the mean over "
        f"seeds ± half of Student's {LEVEL:.0%} interval."
    )
    heights = list(next(iter(found.heights.values())))
    rows = [
        [_bold(name, found.study), *(_plus_minus(by_height[height]) for height in heights)]
        for name, by_height in found.heights.items()
    ]
    table = Table(["", *(f"{height} px" for height in heights)], rows)
    return [Heading("By height of print"), Text(says), table, *_shown_of(images, "heights")]


def _differences(found, images):
    study = found.study
    says = (
        f"In points of the table above, paired by seed and question, with the {LEVEL:.0%} interval by a bootstrap over "
        f"both. {_EQUAL}: two one-sided tests find the difference smaller than {_margin(study.margin)} over all "
        f"questions, or {study.kind_margin:g} in one kind. {_NOISE}: inconclusive, since the interval "
        "holds zero and reaches beyond the margin. Of twenty intervals one misses by chance."
    )
    rows = [
        [name, *(_difference(by_kind[kind], found.margin(kind)) for kind in found.kinds)]
        for name, by_kind in found.differences.items()
    ]
    heading = Heading(f"Differences from {study.baseline}")
    return [heading, Text(says), Table(["", *found.kinds], rows), *_shown_of(images, "differences")]


def _power(found):
    """What differences could have been found, and with how many seeds."""
    if len(found.study.seeds) < 2:
        return []
    kinds = [kind for kind in found.kinds if kind != BLANK]
    says = (
        f"The true difference that this study finds with a probability of {POWER:.0%}, in points, for the variants "
        "whose difference from the baseline is measured best, in the middle and worst. Below, the same over all "
        "questions if there were other numbers of seeds."
    )
    rows = [_three(kind, [by_kind[kind].detectable() for by_kind in found.differences.values()]) for kind in kinds]
    first = [by_kind[kinds[0]] for by_kind in found.differences.values()]
    more = [_three(f"{seeds} seeds", [one.detectable(seeds) for one in first]) for seeds in _MORE_SEEDS]
    return [
        Heading("What it could find"),
        Text(says),
        Table(["", "best", "median", "worst"], rows),
        Table([kinds[0], "best", "median", "worst"], more),
    ]


def _three(name, values):
    return [name, *(f"{value:.1f}" for value in (min(values), np.median(values), max(values)))]


def _margin(points):
    return f"{points:g} point{'s' * (points != 1)}"


def _cost(found, images):
    first = next(iter(found.costs.values()))
    says = (
        f"Measured one after the other on one share of the machine ({first['device']}): the median of 20 steps of "
        f"the last stage; and of ten times from {first['first_token_rows']} questions, their images in memory, to "
        "the first tokens of all answers. FLOPs are counted by shapes (runtime/cost.py). Memory is what a step holds, "
        "as the compiler laid it out or an accelerator counted it. What is only asked in another way has no step."
    )
    rows = [
        [
            _bold(name, found.study),
            *(shown.format(cost[key]) if key in cost else "" for key, (_, shown) in _COSTS.items()),
        ]
        for name, cost in found.costs.items()
    ]
    header = ["", *(title for title, _ in _COSTS.values())]
    return [Heading("Cost"), Text(says), Table(header, rows), *_shown_of(images, "cost")]


def _shown_of(images, *names):
    return [images[name] for name in names if name in images]


_COSTS = {
    "image_tokens": ("image tokens", "{}"),
    "fusion_parameters": ("fusion's parameters", "{:,}"),
    "step_gflops": ("GFLOP a step", "{:.2f}"),
    "step_ms": ("ms per step", "{:.0f}"),
    "step_mib": ("MiB a step", "{:.0f}"),
    "prefill_gflops": ("GFLOP a prompt", "{:.3f}"),
    "first_token_ms": ("ms to first tokens", "{:.0f}"),
}


def verdicts(found: Findings) -> list[str]:
    """A sentence for each difference from the baseline, over all questions."""
    said, baseline, margin = [], found.study.baseline, found.study.margin
    for name, by_kind in found.differences.items():
        one = next(iter(by_kind.values()))
        if math.isnan(one.low):
            said.append(f"{name} against {baseline}: one seed and one figure tell nothing of noise.")
        elif not one.noise:
            small = f", by less than {_margin(margin)}" if one.within(margin) else ""
            said.append(f"{name} is {'better' if one.value > 0 else 'worse'} than {baseline}{small}: {_points(one)}.")
        elif one.within(margin):
            said.append(f"{name} and {baseline} are **equal within {_margin(margin)}**: {_points(one)}.")
        else:
            said.append(f"{name} against {baseline}: {_points(one)}, **within noise**.")
    return said + _controls(found)


def _controls(found):
    """Whether variants that differ in name alone differ significantly."""
    said = []
    for variant in found.study.variants:
        if variant.repeats and {variant.name, variant.repeats} <= found.scores.keys():
            kinds = found.kinds
            pairs = [(found.scores[variant.name][kind], found.scores[variant.repeats][kind]) for kind in kinds]
            differing = [kind for kind, pair in zip(kinds, pairs, strict=True) if not difference(*pair).noise]
            result = f"by chance they differ in {', '.join(differing)}" if differing else "no difference is significant"
            said.append(f"Control: {variant.name} is {variant.repeats} from other seeds; {result}.")
    return said


def _made(study, cells):
    seconds = [_seconds(cell) for cell in cells if cell.needs is None]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax"))
    return (
        f"Seeds {', '.join(map(str, study.seeds))}; {len(seconds)} training runs, whose steps took "
        f"{format_duration(sum(seconds))} together and {format_duration(max(seconds, default=0))} at most. The report was made on "
        f"{_machine()}, Python {platform.python_version()}, {versions}."
    )


def _machine():
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.machine()
    return f"{os.cpu_count()} processors ({model})"


def _seconds(cell):
    """That a run's steps took, over all its stages."""
    lines = [file.read_bytes().splitlines()[-1] for file in cell.folder.glob("**/metrics.jsonl")]
    return sum(parse_json(line)["seconds"] for line in lines)


def _differs(study, variant):
    if variant.of:
        return f"runs of {variant.of}, asked with `{' '.join(variant.asked)}`"
    others = [set(other.overrides) for other in study.variants if not other.of]
    common = set.intersection(*others)
    return (
        ", ".join(f"`{override}`" for override in variant.overrides if override not in common) or "what is said above"
    )


def _shown(command):
    return shlex.join(["python", *command[1:]])


def _figures(found, cells):
    def plain(estimate):
        return {key: None if math.isnan(x) else x for key, x in dataclasses.asdict(estimate).items()}

    def compared(one, margin):
        detectable = one.detectable()
        return plain(one) | {
            "within_noise": one.noise,
            "within_margin": one.within(margin),
            "detectable": None if math.isnan(detectable) else detectable,
        }

    def nested(by_variant):
        return {name: {kind: plain(one) for kind, one in kinds.items()} for name, kinds in by_variant.items()}

    return {
        "title": found.study.title,
        "baseline": found.study.baseline,
        "seeds": list(found.study.seeds),
        "margin": found.study.margin,
        "kind_margin": found.study.kind_margin,
        "quality": nested(found.quality),
        "heights": nested(found.heights),
        "by_seed": {name: {k: x.mean(1).tolist() for k, x in kinds.items()} for name, kinds in found.scores.items()},
        "deviation": {name: plain(one) for name, one in found.spread.items()},
        "differences": {
            name: {kind: compared(one, found.margin(kind)) for kind, one in kinds.items()}
            for name, kinds in found.differences.items()
        },
        "height_differences": {
            name: {height: compared(one, found.study.kind_margin) for height, one in heights.items()}
            for name, heights in found.height_differences.items()
        },
        "cost": found.costs,
        "commands": {cell.name: _shown(cell.command) for cell in cells},
    }


def _bold(name, study):
    return f"**{name}**" if name == study.baseline else name


def _plus_minus(one):
    half = "" if math.isnan(one.low) else f" ± {one.high - one.value:.1f}"
    return f"{one.value:.1f}{half}"


def _between(one):
    return "" if math.isnan(one.value) else f"{one.value:.1f} ({one.low:.1f} to {one.high:.1f})"


def _difference(one, margin):
    if math.isnan(one.low):
        return f"{one.value:+.1f}"
    mark = _EQUAL if one.within(margin) else _NOISE if one.noise else ""
    return f"{one.value:+.1f} ({one.low:+.1f} to {one.high:+.1f}){mark}"


def _points(one: Estimate) -> str:
    return f"{one.value:+.1f} points ({one.low:+.1f} to {one.high:+.1f})"
