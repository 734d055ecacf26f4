"""Plots of a study's report."""

import math
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from stf_jax.studies.figures import BLUE, GRAY, annotate, error_bars, make_figure
from stf_jax.studies.outcomes import ALL, BLANK
from stf_jax.studies.page import INK, PAPER, Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from stf_jax.studies.report import Findings


def draw_plots(findings: "Findings", out: pathlib.Path) -> dict[str, Image]:
    """Draws the plots for which there are data as PNGs; returns them by name."""
    plots = {
        "quality": (_draw_quality, "Correct answers of each variant: one point per seed, and the mean's interval"),
        "kinds": (_draw_kinds, "Correct answers by kind of question"),
        "heights": (_draw_heights, "Correct answers about printed text by the height of its capitals, with intervals"),
        "losses": (_draw_losses, "The training loss of each stage, mean over seeds"),
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
    cost = findings.costs.get(name, {})
    tokens = cost.get("average_image_tokens", cost.get("image_tokens"))  # where layers read different numbers
    return name if tokens is None else f"{name} ({tokens:.4g})"


def _format_score_label(findings: "Findings") -> str:
    """Returns the axis label of the first kind: for scenes, the share of all questions; otherwise a metric."""
    return "correct answers, %" if findings.kinds[0] == ALL else findings.kinds[0]


def _draw_quality(findings: "Findings") -> "Figure":
    first, names = findings.kinds[0], list(findings.quality)
    figure, (axes,) = make_figure(7, 1 + 0.28 * len(names))
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
    """Draws a table whose colors are the differences from the baseline; those within noise stay white."""
    names, kinds = list(findings.quality), [kind for kind in findings.kinds[1:] if kind != BLANK]
    if not kinds:
        return None
    figure, (axes,) = make_figure(1.6 + 0.72 * len(kinds), 0.9 + 0.3 * len(names))
    colors = np.zeros([len(names), len(kinds)])
    for y, name in enumerate(names):
        weight = "bold" if name == findings.study.baseline else "normal"
        for x, kind in enumerate(kinds):
            difference = findings.differences.get(name, {}).get(kind)
            colors[y, x] = 0 if difference is None or difference.within_noise else difference.value
            text = f"{findings.quality[name][kind].value:.0f}"
            axes.text(x, y, text, ha="center", va="center", color=INK, fontsize=9, weight=weight)
    limit = 1.5 * max(10, np.abs(colors).max())  # so that the darkest color leaves numbers legible
    axes.imshow(colors, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")  # codespell:ignore bu
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.xaxis.tick_top()
    axes.set_xticks(range(len(kinds)), [kind.replace(" ", "\n") for kind in kinds])
    _set_variant_ticks(axes, names, findings)
    return figure


def _draw_heights(findings: "Findings") -> "Figure | None":
    """Draws a panel for each variant, with the baseline in blue and the others in gray."""
    if not any(findings.heights.values()):
        return None
    curves = {
        name: ([*by_height], [estimate.value for estimate in by_height.values()])
        for name, by_height in findings.heights.items()
    }
    baseline = findings.study.baseline
    names = [name for name in curves if name != baseline] or [baseline]
    figure, panels = make_figure(10, 0.6 + 1.9 * -(-len(names) // 4), len(names), share=True)
    for axes, name in zip(panels, names, strict=True):
        for other in curves.keys() - {name, baseline}:
            axes.plot(*curves[other], color=GRAY, lw=0.8, alpha=0.3)
        if baseline in curves:
            axes.plot(*curves[baseline], color=BLUE, lw=1.5)
        by_height = findings.heights[name]
        arms = [0 if math.isnan(estimate.low) else estimate.value - estimate.low for estimate in by_height.values()]
        axes.errorbar(*curves[name], yerr=arms, color=INK, lw=1.5, capsize=2)
        for height, estimate in by_height.items():
            difference = findings.height_differences.get(name, {}).get(height)
            differs = difference is not None and not difference.within_noise
            axes.plot(height, estimate.value, "o", ms=5, mec=INK, mfc=INK if differs else PAPER, zorder=3)
        axes.set_title(_format_label(name, findings), fontsize=10)
        axes.set_xscale("log")
        axes.set_xticks([*by_height], [str(height) for height in by_height])
        axes.minorticks_off()
        axes.set_ylim(-4, 104)
    figure.supxlabel("height of printed capitals, pixels", fontsize=10)
    figure.supylabel("correct answers, %", fontsize=10)
    return figure


def _draw_losses(findings: "Findings") -> "Figure | None":
    """Draws a panel for each stage, with the baseline in blue."""
    if not findings.losses:
        return None
    figure, panels = make_figure(10, 4.2, len(findings.losses), columns=2)
    for axes, (stage, by_variant) in zip(panels, findings.losses.items(), strict=True):
        ends = {}
        for name, curve in by_variant.items():
            is_baseline = name == findings.study.baseline
            steps, losses = _smooth(curve.steps, curve.losses.mean(0))
            axes.plot(
                steps,
                losses,
                color=BLUE if is_baseline else GRAY,
                lw=2 if is_baseline else 1,
                zorder=3 if is_baseline else 2,
            )
            ends[name] = (float(steps[-1]), float(losses[-1]))
        annotate(axes, ends)
        axes.set_xlim(left=0)
        axes.set_title(stage, fontsize=10)
        axes.set_xlabel("step")
    panels[0].set_ylabel("loss")
    return figure


def _smooth(steps: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the means of at most 25 parts of a curve, without the first part, whose loss is far above the others."""
    count = min(25, len(steps))
    parts = np.array_split(np.arange(len(steps)), count)[1 if count > 2 else 0 :]
    return np.array([steps[part].mean() for part in parts]), np.array([losses[part].mean() for part in parts])


def _draw_differences(findings: "Findings") -> "Figure | None":
    if not findings.differences:
        return None
    names = list(findings.differences)
    figure, (axes,) = make_figure(7, 1 + 0.28 * len(names))
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
    axis_labels = {"prefill_gflops": "GFLOP per prompt", "step_gflops": "GFLOP per training step"}
    keys = [key for key in axis_labels if any(key in cost for cost in findings.costs.values())]
    figure, panels = make_figure(5 * len(keys), 4.2, len(keys))
    for axes, key in zip(panels, keys, strict=True):
        points = {
            name: (cost[key], findings.quality[name][first]) for name, cost in findings.costs.items() if key in cost
        }
        for name, (x, estimate) in points.items():
            color = BLUE if name == findings.study.baseline else INK
            axes.errorbar(x, estimate.value, yerr=error_bars(estimate), fmt="none", ecolor=color, lw=1, alpha=0.25)
            axes.plot(x, estimate.value, "o", color=color, ms=5)
        axes.set_xlabel(axis_labels[key])
        annotate(axes, {name: (x, estimate.value) for name, (x, estimate) in points.items()})
    panels[0].set_ylabel(_format_score_label(findings))
    return figure
