"""What all plots share: figures, intervals and names of points."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from stf_jax.studies.page import INK
from stf_jax.studies.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, GRAY = "#0b63c5", "#8c959f"


def make_figure(
    width: float, height: float, count: int = 1, columns: int = 4, share: bool = False
) -> tuple["Figure", list["Axes"]]:
    """Makes a figure, in inches, with ``count`` axes in rows of at most ``columns``.

    ``share``: all axes have the same limits.
    """
    from matplotlib.figure import Figure  # slow to import, and only used here

    figure = Figure((width, height), layout="constrained")
    columns = min(columns, count)
    grid = figure.subplots(-(-count // columns), columns, squeeze=False, sharex=share, sharey=share).ravel()
    for axes in grid[count:]:
        axes.set_axis_off()
    all_axes = list(grid[:count])
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK, length=3)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
    return figure, all_axes


def error_bars(estimate: Estimate) -> list[list[float]] | None:
    """Returns both arms of an interval in matplotlib's form, or None without an interval."""
    if math.isnan(estimate.low):
        return None
    return [[estimate.value - estimate.low], [estimate.high - estimate.value]]


def annotate(axes: "Axes", points: Mapping[str, tuple[float, float]]) -> None:
    """Writes the points' names to the right of all points, without overlaps."""
    xs, bottom, y_range = [x for x, _ in points.values()], axes.get_ylim()[0], np.ptp(axes.get_ylim())
    x_range = np.ptp(xs) or max(xs)
    axes.set_xlim(min(xs) - 0.1 * x_range, max(xs) + 0.6 * x_range)
    ordered = sorted(points.items(), key=lambda item: item[1][1])
    heights = [y for _, (_, y) in ordered]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + _LINE_HEIGHT * y_range)
    shift = (sum(heights) - sum(y for _, y in points.values())) / len(points)  # so that names move up and down equally
    shift = min(shift, heights[0] - bottom - _LINE_HEIGHT / 2 * y_range)  # but not below the axes
    for (name, point), height in zip(ordered, heights, strict=True):
        line = {"arrowstyle": "-", "color": GRAY, "lw": 0.6, "shrinkB": 3, "relpos": (0, 0.5)}
        position = (max(xs) + 0.12 * x_range, height - shift)
        axes.annotate(name, point, position, va="center", fontsize=8, arrowprops=line)


_LINE_HEIGHT = 0.045  # of a name, as a share of the axes' height
