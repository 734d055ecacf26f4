"""The plots of a report."""

import math
import pathlib
from typing import TYPE_CHECKING

import numpy as np

from stf_jax.studies.outcomes import ALL, BLANK
from stf_jax.studies.page import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from stf_jax.studies.report import Findings

_INK, _BLUE, _GREY = "#1f2328", "#0b63c5", "#8c959f"


def draw(found: "Findings", out: pathlib.Path) -> dict[str, Image]:
    """Draws ``quality``, ``kinds``, ``heights``, ``differences`` and ``cost``: a PNG each where there are figures."""
    plots = {
        "quality": (_quality, "Right answers of each variant, a point a seed, with the interval of the mean"),
        "kinds": (_kinds, "Right answers by kind of question"),
        "heights": (_heights, "Right answers to printed text by the height of its capitals, with intervals"),
        "differences": (_differences, f"Differences from {found.study.baseline}, with intervals"),
        "cost": (_cost, "Right answers against FLOPs of a prompt and of a training step"),
    }
    drawn = {}
    for name, (call, says) in plots.items():
        figure = call(found)
        if figure is not None:
            figure.savefig(out / f"{name}.png", dpi=150, bbox_inches="tight", metadata={"Software": None})
            drawn[name] = Image(out / f"{name}.png", says)
    return drawn


def _figure(width, height, columns=1, sharey=False):
    from matplotlib.figure import Figure  # slow to import, and only wanted here

    figure = Figure((width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, sharey=sharey)[0]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(colors=_INK, length=3)
        one.grid(alpha=0.25)
        one.set_axisbelow(True)
    return figure, axes


def _names_down(axes: "Axes", names, found):
    axes.set_yticks(range(len(names)), [_label(name, found) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)


def _label(name, found):
    tokens = found.costs.get(name, {}).get("image_tokens")
    return name if tokens is None else f"{name} ({tokens})"


def _first(found):
    """What the first kind's figures are: of scenes, shares of all questions; of other benchmarks, a metric."""
    return "right answers, %" if found.kinds[0] == ALL else found.kinds[0]


def _reach(one):
    """Both arms of an interval, as matplotlib takes them; none where nothing can be said."""
    if math.isnan(one.low):
        return None
    return [[one.value - one.low], [one.high - one.value]]


def _quality(found):
    first, names = found.kinds[0], list(found.quality)
    figure, (axes,) = _figure(7, 1 + 0.36 * len(names))
    for place, name in enumerate(names):
        one, color = found.quality[name][first], _BLUE if name == found.study.baseline else _INK
        axes.plot(
            found.scores[name][first].mean(1), [place] * len(found.study.seeds), "o", color=_GREY, ms=4, alpha=0.7
        )
        axes.errorbar(one.value, place, xerr=_reach(one), fmt="D", color=color, ms=5, capsize=3)
        if BLANK in found.kinds:
            axes.plot(found.quality[name][BLANK].value, place, "x", color=_GREY, ms=6)
    _names_down(axes, names, found)
    axes.set_xlabel(_first(found) + "; ×: of a blank image" * (BLANK in found.kinds))
    return figure


def _kinds(found):
    names, kinds = list(found.quality), [kind for kind in found.kinds[1:] if kind != BLANK]
    if not kinds:
        return None
    figure, columns = _figure(2.2 * len(kinds) + 1.5, 1 + 0.32 * len(names), len(kinds), sharey=True)
    for axes, kind in zip(columns, kinds, strict=True):
        for place, name in enumerate(names):
            one, color = found.quality[name][kind], _BLUE if name == found.study.baseline else _INK
            axes.errorbar(one.value, place, xerr=_reach(one), fmt="D", color=color, ms=4, capsize=2)
        low, high = axes.get_xlim()
        low, high = min(low, high - 4), max(high, low + 4)  # so that nothing is made of tenths
        axes.set_xlim(max(low, -2), min(high, 102) if low < 100 else high)  # shares are; MME's points are not
        axes.set_title(kind, fontsize=10)
        axes.set_xlabel("%" * (found.kinds[0] == ALL))
    _names_down(columns[0], names, found)
    return figure


def _heights(found):
    if not any(found.heights.values()):
        return None
    figure, (axes,) = _figure(8, 4.5)
    colors = _colors(len(found.heights))
    for place, (name, by_height) in enumerate(found.heights.items()):
        base = name == found.study.baseline
        color = _BLUE if base else colors[place]
        # Shifted a little, so that intervals at one height do not overlap.
        shift = 1 + 0.008 * (place - (len(found.heights) - 1) / 2)
        xs = [height * shift for height in by_height]
        ys = [one.value for one in by_height.values()]
        reach = [0 if math.isnan(one.low) else one.value - one.low for one in by_height.values()]
        label = _label(name, found)
        axes.errorbar(xs, ys, yerr=reach, fmt="o-", color=color, ms=4, lw=2.5 if base else 1.2, capsize=2, label=label)
    heights = list(next(iter(found.heights.values())))
    axes.set_xscale("log")
    axes.set_xticks(heights, [str(height) for height in heights])
    axes.minorticks_off()
    axes.set_ylim(-2, 102)
    axes.set_xlabel("height of printed capitals, pixels")
    axes.set_ylabel("read right, %")
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _colors(count):
    from matplotlib import colormaps

    return [colormaps["tab20"](i % 20) for i in range(count)]


def _differences(found):
    if not found.differences:
        return None
    names = list(found.differences)
    figure, (axes,) = _figure(7, 1 + 0.36 * len(names))
    margin = found.study.margin
    axes.axvspan(-margin, margin, color=_BLUE, alpha=0.1, lw=0)
    for place, name in enumerate(names):
        one = next(iter(found.differences[name].values()))
        color = _BLUE if one.within(margin) else _GREY if one.noise else _INK
        axes.errorbar(one.value, place, xerr=_reach(one), fmt="D", color=color, ms=5, capsize=3)
    axes.axvline(0, color=_BLUE, lw=1)
    _names_down(axes, names, found)
    axes.set_xlabel(f"points more than {found.study.baseline}; blue: equal within {margin:g}; grey: within noise")
    return figure


def _cost(found):
    if not found.costs:
        return None
    first = found.kinds[0]
    figure, columns = _figure(10, 4.2, 2, sharey=True)
    for axes, key, what in (
        (columns[0], "prefill_gflops", "GFLOP to read a prompt"),
        (columns[1], "step_gflops", "GFLOP a training step"),
    ):
        points = {name: (cost[key], found.quality[name][first]) for name, cost in found.costs.items() if key in cost}
        for name, (x, one) in points.items():
            color = _BLUE if name == found.study.baseline else _INK
            axes.errorbar(x, one.value, yerr=_reach(one), fmt="none", ecolor=color, lw=1, alpha=0.25)
            axes.plot(x, one.value, "o", color=color, ms=5)
        axes.set_xlabel(what)
        if points:
            _annotate(axes, {name: (x, one.value) for name, (x, one) in points.items()})
    columns[0].set_ylabel(_first(found))
    return figure


def _annotate(axes, points):
    """A name for each point, right of them all and none above another."""
    xs, high = [x for x, _ in points.values()], np.ptp(axes.get_ylim())
    spread = np.ptp(xs) or max(xs)
    axes.set_xlim(min(xs) - 0.1 * spread, max(xs) + 0.6 * spread)
    ordered = sorted(points.items(), key=lambda item: item[1][1])
    heights = [y for _, (_, y) in ordered]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + _NAME * high)
    down = (sum(heights) - sum(y for _, y in points.values())) / len(points)  # spread both ways
    for (name, point), height in zip(ordered, heights, strict=True):
        line = {"arrowstyle": "-", "color": _GREY, "lw": 0.6, "shrinkB": 3, "relpos": (0, 0.5)}
        place = (max(xs) + 0.12 * spread, height - down)
        axes.annotate(name, point, place, va="center", fontsize=8, arrowprops=line)


_NAME = 0.045  # that a name takes of the height
