"""Plots of accuracy over cost, with the Pareto front."""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from stf_jax.comparisons.comparison import Comparison
from stf_jax.studies.figures import BLUE, annotate, error_bars, make_figure
from stf_jax.studies.page import INK, PAPER, Image
from stf_jax.studies.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_AXES = {"image_tokens": "image tokens", "first_token_ms": "ms to the first tokens"}
_Point = tuple[float, Estimate]


def draw_plots(comparison: Comparison, out: pathlib.Path) -> dict[str, list[Image]]:
    """Draws an SVG for each group and cost that at least two methods have; returns them by group."""
    import matplotlib

    images: dict[str, list[Image]] = {}
    for group, results in comparison.results.items():
        images[group] = []
        for key, label in _AXES.items():
            points = {
                method.name: (float(method.cost[key]), results[method.name].accuracy)
                for method in comparison.methods
                if key in method.cost
            }
            if len(points) < 2 or (key == "first_token_ms" and not _are_times_comparable(comparison)):
                continue
            figure = _draw(points, comparison.baseline, label)
            file = out / f"{key}_{re.sub('[^a-z0-9]+', '_', group.lower())}.svg"
            # Text stays text, and the same comparison gives the same file.
            with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": group}):
                figure.savefig(file, metadata={"Date": None}, facecolor=PAPER)
            images[group].append(Image(file, f"Accuracy over {label}, {group}; the line is the Pareto front"))
    return images


def _are_times_comparable(comparison: Comparison) -> bool:
    costs = [method.cost for method in comparison.methods if "first_token_ms" in method.cost]
    return len({(cost.get("device"), cost.get("first_token_rows")) for cost in costs}) == 1


def find_pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns the points (cost, accuracy) that no cheaper or equally cheap point exceeds, by cost."""
    front: list[tuple[float, float]] = []
    for cost, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or accuracy > front[-1][1]:
            front.append((cost, accuracy))
    return front


def _draw(points: Mapping[str, _Point], baseline: str, label: str) -> "Figure":
    figure, (axes,) = make_figure(5, 3.6)  # inches: labels stay legible on a screen of 400 pixels
    front = find_pareto_front([(x, estimate.value) for x, estimate in points.values()])
    axes.step(*zip(*front, strict=True), where="post", color=BLUE, lw=1.5, alpha=0.7)
    for name, (x, estimate) in points.items():
        color = BLUE if name == baseline else INK
        axes.errorbar(x, estimate.value, yerr=error_bars(estimate), fmt="o", color=color, ms=5, lw=1, capsize=2)
    axes.set_xlabel(label, color=INK)
    axes.set_ylabel("accuracy, %", color=INK)
    annotate(axes, {name: (x, estimate.value) for name, (x, estimate) in points.items()})
    for text in (*axes.texts, *axes.get_xticklabels(), *axes.get_yticklabels()):
        text.set_color(INK)
    axes.spines[:].set_color(INK)
    return figure
