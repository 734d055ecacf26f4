"""What a study found, in words, tables and pictures: ``report.md``, ``report.html``, ``report.json`` and four PNGs."""

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

from stf_jax.runtime.files import new_text, parse_json, write_json
from stf_jax.runtime.table import span
from stf_jax.studies import plots
from stf_jax.studies.outcomes import BLANK
from stf_jax.studies.page import Block, Code, Heading, Items, Table, Text, markdown, page
from stf_jax.studies.statistics import LEVEL, Estimate, deviation, difference, mean
from stf_jax.studies.study import Cell, Study

Scores = Mapping[str, Mapping[str, np.ndarray]]  # of each variant by kind, float [S, Q]
_NOISE = "·"  # marks a difference that is within noise


@dataclasses.dataclass(frozen=True)
class Findings:
    """All figures of a study.

    Attributes:
      quality: of each variant by kind, over seeds.
      spread: the standard deviation between seeds of each variant's first kind.
      differences: from the baseline, of each other variant by kind.
      costs: of each variant (studies/cost.py).
    """

    study: Study
    scores: Scores
    quality: dict[str, dict[str, Estimate]]
    spread: dict[str, Estimate]
    differences: dict[str, dict[str, Estimate]]
    costs: Mapping[str, Mapping[str, Any]]

    @property
    def kinds(self) -> list[str]:
        """Of questions, in the benchmark's order; the first is all of them together."""
        return list(next(iter(self.scores.values())))


def findings(study: Study, scores: Scores, costs: Mapping[str, Mapping[str, Any]]) -> Findings:
    """The figures of variants whose runs are all done."""
    base = scores.get(study.baseline, {})
    return Findings(
        study,
        scores,
        {name: {kind: mean(x.mean(1)) for kind, x in kinds.items()} for name, kinds in scores.items()},
        {name: deviation(next(iter(kinds.values())).mean(1)) for name, kinds in scores.items()},
        {
            name: {kind: difference(kinds[kind], base[kind]) for kind in base}
            for name, kinds in scores.items()
            if name != study.baseline and base
        },
        costs,
    )


def write_report(found: Findings, cells: Sequence[Cell], failed: Mapping[Cell, str], command: str, out: pathlib.Path):
    """Writes the report's files to ``out``."""
    pictures = plots.draw(found, out)
    blocks = _blocks(found, pictures, cells, failed, command)
    for name, text in (
        ("report.md", markdown(found.study.title, blocks)),
        ("report.html", page(found.study.title, blocks)),
    ):
        with new_text(epath.Path(out / name)) as file:
            file.write(text)
    write_json(epath.Path(out / "report.json"), _figures(found, cells))


def _blocks(found, pictures, cells, failed, command) -> list[Block]:
    blocks: list[Block] = [Text(found.study.question), Items(verdicts(found))]
    if failed:
        blocks.append(Text("**Not all runs ended well.** Variants that lack one are left out."))
        blocks.append(Items([f"{cell.name}: {why}" for cell, why in failed.items()]))
    blocks += _quality(found, pictures)
    blocks += _differences(found, pictures) if found.differences else []
    blocks += _cost(found, pictures) if found.costs else []
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


def _quality(found, pictures):
    says = (
        f"Right answers in percent (of MME, its points): the mean over seeds ({len(found.study.seeds)}) ± half of "
        f"Student's {LEVEL:.0%} interval; last, the standard deviation between seeds with its interval."
    )
    if BLANK in found.kinds:
        says += f" **{BLANK}**: the same questions of a grey picture, that is, what is guessed unseen."
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
    return [Heading("Quality"), Text(says), Table(header, rows), *_shown_of(pictures, "quality", "kinds")]


def _differences(found, pictures):
    says = (
        f"In points of the table above, paired by seed and question, with the {LEVEL:.0%} interval by a bootstrap over "
        f"both; {_NOISE} where that holds nought: the difference is within noise. Of twenty such intervals one misses "
        "by chance."
    )
    rows = [
        [name, *(_difference(by_kind[kind]) for kind in found.kinds)] for name, by_kind in found.differences.items()
    ]
    heading = Heading(f"Differences from {found.study.baseline}")
    return [heading, Text(says), Table(["", *found.kinds], rows), *_shown_of(pictures, "differences")]


def _cost(found, pictures):
    first = next(iter(found.costs.values()))
    says = (
        f"Measured one after the other on one share of the machine ({first['device']}): the median of 20 steps of "
        f"the last stage; and of ten times from {first['first_token_rows']} questions, their pictures in memory, to "
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
    return [Heading("Cost"), Text(says), Table(header, rows), *_shown_of(pictures, "cost")]


def _shown_of(pictures, *names):
    return [pictures[name] for name in names if name in pictures]


_COSTS = {
    "image_tokens": ("image tokens", "{}"),
    "fusion_parameters": ("fusion's parameters", "{:,}"),
    "step_gflops": ("GFLOP a step", "{:.2f}"),
    "step_ms": ("ms a step", "{:.0f}"),
    "step_mib": ("MiB a step", "{:.0f}"),
    "prefill_gflops": ("GFLOP a prompt", "{:.3f}"),
    "first_token_ms": ("ms to first tokens", "{:.0f}"),
}


def verdicts(found: Findings) -> list[str]:
    """A sentence for each difference from the baseline, over all questions."""
    said, baseline = [], found.study.baseline
    for name, by_kind in found.differences.items():
        one = next(iter(by_kind.values()))
        if math.isnan(one.low):
            said.append(f"{name} against {baseline}: one seed and one figure tell nothing of noise.")
        elif one.noise:
            said.append(f"{name} against {baseline}: {_points(one)}, **within noise**.")
        else:
            said.append(f"{name} is {'better' if one.value > 0 else 'worse'} than {baseline}: {_points(one)}.")
    return said


def _made(study, cells):
    seconds = [_seconds(cell) for cell in cells if cell.needs is None]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax"))
    return (
        f"Seeds {', '.join(map(str, study.seeds))}; {len(seconds)} training runs, whose steps took "
        f"{span(sum(seconds))} together and {span(max(seconds, default=0))} at most. The report was made on "
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

    def nested(by_variant):
        return {name: {kind: plain(one) for kind, one in kinds.items()} for name, kinds in by_variant.items()}

    return {
        "title": found.study.title,
        "baseline": found.study.baseline,
        "seeds": list(found.study.seeds),
        "quality": nested(found.quality),
        "by_seed": {name: {k: x.mean(1).tolist() for k, x in kinds.items()} for name, kinds in found.scores.items()},
        "deviation": {name: plain(one) for name, one in found.spread.items()},
        "differences": {
            name: {kind: plain(one) | {"within_noise": one.noise} for kind, one in kinds.items()}
            for name, kinds in found.differences.items()
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


def _difference(one):
    if math.isnan(one.low):
        return f"{one.value:+.1f}"
    return f"{one.value:+.1f} ({one.low:+.1f} to {one.high:+.1f}){_NOISE if one.noise else ''}"


def _points(one: Estimate) -> str:
    return f"{one.value:+.1f} points ({one.low:+.1f} to {one.high:+.1f})"
