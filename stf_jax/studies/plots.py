"""Plots of a study's report."""

import math
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stf_jax.studies.figures import BLUE, GRAY, annotate, error_bars, make_figure
from stf_jax.studies.outcomes import ALL, BLANK
from stf_jax.studies.page import INK, Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from stf_jax.studies.report import Findings


def draw_plots(findings: "Findings", out: pathlib.Path) -> dict[str, Image]:
    """Draws ``quality``, ``kinds``, ``heights``, ``differences`` and ``cost`` as PNGs, where there are data."""
    plots = {
        "quality": (_draw_quality, "Correct answers of each variant: one point per seed, and the mean's interval"),
        "kinds": (_draw_kinds, "Correct answers by kind of question"),
        "heights": (_draw_heights, "Correct answers about printed text by the height of its capitals, with intervals"),
        "differences": (_draw_differences, f"Differences from {findings.study.baseline}, with intervals"),
        "cost": (_draw_cost, "Correct answers against FLOPs per prompt and per training step"),
    }
    images = {}
    for name, (draw, alt) in plots.items():
        figure = draw(findings)
        if figure is not None:
            figure.savefig(out / f"{name}.png", dpi=150, bbox_inches="tight", metadata={"Software": None})
            images[name] = Image(out / f"{name}.png", alt)
    return images


def _set_variant_ticks(axes: "Axes", names: Sequence[str], findings: "Findings") -> None:
    axes.set_yticks(range(len(names)), [_format_label(name, findings) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)


def _format_label(name: str, findings: "Findings") -> str:
    tokens = findings.costs.get(name, {}).get("image_tokens")
    return name if tokens is None else f"{name} ({tokens})"


def _format_score_label(findings: "Findings") -> str:
    """Returns the axis label of the first kind: for scenes, the share of all questions; otherwise a metric."""
    return "correct answers, %" if findings.kinds[0] == ALL else findings.kinds[0]


def _draw_quality(findings: "Findings") -> "Figure":
    first, names = findings.kinds[0], list(findings.quality)
    figure, (axes,) = make_figure(7, 1 + 0.36 * len(names))
    for y, name in enumerate(names):
        estimate, color = findings.quality[name][first], BLUE if name == findings.study.baseline else INK
        axes.plot(
            findings.scores[name][first].mean(1), [y] * len(findings.study.seeds), "o", color=GRAY, ms=4, alpha=0.7
        )
        axes.errorbar(estimate.value, y, xerr=error_bars(estimate), fmt="D", color=color, ms=5, capsize=3)
        if BLANK in findings.kinds:
            axes.plot(findings.quality[name][BLANK].value, y, "x", color=GRAY, ms=6)
    _set_variant_ticks(axes, names, findings)
    axes.set_xlabel(_format_score_label(findings) + "; ×: blank image" * (BLANK in findings.kinds))
    return figure


def _draw_kinds(findings: "Findings") -> "Figure | None":
    names, kinds = list(findings.quality), [kind for kind in findings.kinds[1:] if kind != BLANK]
    if not kinds:
        return None
    figure, columns = make_figure(2.2 * len(kinds) + 1.5, 1 + 0.32 * len(names), len(kinds), sharey=True)
    for axes, kind in zip(columns, kinds, strict=True):
        for y, name in enumerate(names):
            estimate, color = findings.quality[name][kind], BLUE if name == findings.study.baseline else INK
            axes.errorbar(estimate.value, y, xerr=error_bars(estimate), fmt="D", color=color, ms=4, capsize=2)
        low, high = axes.get_xlim()
        low, high = min(low, high - 4), max(high, low + 4)  # at least 4 points, so that tenths do not look large
        axes.set_xlim(max(low, -2), min(high, 102) if low < 100 else high)  # percents end at 100; MME's points do not
        axes.set_title(kind, fontsize=10)
        axes.set_xlabel("%" * (findings.kinds[0] == ALL))
    _set_variant_ticks(columns[0], names, findings)
    return figure


def _draw_heights(findings: "Findings") -> "Figure | None":
    if not any(findings.heights.values()):
        return None
    figure, (axes,) = make_figure(8, 4.5)
    colors = _make_colors(len(findings.heights))
    for index, (name, by_height) in enumerate(findings.heights.items()):
        is_baseline = name == findings.study.baseline
        color, width = (BLUE, 2.5) if is_baseline else (colors[index], 1.2)
        # Shifted slightly, so that intervals at one height do not overlap.
        shift = 1 + 0.008 * (index - (len(findings.heights) - 1) / 2)
        xs = [height * shift for height in by_height]
        ys = [estimate.value for estimate in by_height.values()]
        arms = [0 if math.isnan(estimate.low) else estimate.value - estimate.low for estimate in by_height.values()]
        label = _format_label(name, findings)
        axes.errorbar(xs, ys, yerr=arms, fmt="o-", color=color, ms=4, lw=width, capsize=2, label=label)
    heights = list(next(iter(findings.heights.values())))
    axes.set_xscale("log")
    axes.set_xticks(heights, [str(height) for height in heights])
    axes.minorticks_off()
    axes.set_ylim(-2, 102)
    axes.set_xlabel("height of printed capitals, pixels")
    axes.set_ylabel("correct answers, %")
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _make_colors(count: int) -> list[tuple[float, float, float, float]]:
    from matplotlib import colormaps

    return [colormaps["tab20"](i % 20) for i in range(count)]


def _draw_differences(findings: "Findings") -> "Figure | None":
    if not findings.differences:
        return None
    names = list(findings.differences)
    figure, (axes,) = make_figure(7, 1 + 0.36 * len(names))
    margin = findings.study.margin
    axes.axvspan(-margin, margin, color=BLUE, alpha=0.1, lw=0)
    for y, name in enumerate(names):
        difference = next(iter(findings.differences[name].values()))
        color = BLUE if difference.within_margin(margin) else GRAY if difference.within_noise else INK
        axes.errorbar(difference.value, y, xerr=error_bars(difference), fmt="D", color=color, ms=5, capsize=3)
    axes.axvline(0, color=BLUE, lw=1)
    _set_variant_ticks(axes, names, findings)
    axes.set_xlabel(f"points above {findings.study.baseline}; blue: equal within {margin:g}; gray: within noise")
    return figure


def _draw_cost(findings: "Findings") -> "Figure | None":
    if not findings.costs:
        return None
    first = findings.kinds[0]
    figure, columns = make_figure(10, 4.2, 2, sharey=True)
    for axes, key, label in (
        (columns[0], "prefill_gflops", "GFLOP per prompt"),
        (columns[1], "step_gflops", "GFLOP per training step"),
    ):
        points = {
            name: (cost[key], findings.quality[name][first]) for name, cost in findings.costs.items() if key in cost
        }
        for name, (x, estimate) in points.items():
            color = BLUE if name == findings.study.baseline else INK
            axes.errorbar(x, estimate.value, yerr=error_bars(estimate), fmt="none", ecolor=color, lw=1, alpha=0.25)
            axes.plot(x, estimate.value, "o", color=color, ms=5)
        axes.set_xlabel(label)
        if points:
            annotate(axes, {name: (x, estimate.value) for name, (x, estimate) in points.items()})
    columns[0].set_ylabel(_format_score_label(findings))
    return figure
