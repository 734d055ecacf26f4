"""The report of preparing a data set: a summary and histograms."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from stf_jax.config import shorten
from stf_jax.data.records import REASONS, format_reasons

_BARS = " ▁▂▃▄▅▆▇█"
_EXAMPLES = 3  # dropped rows listed per reason


@dataclasses.dataclass(frozen=True)
class Report:
    """The contents of ``report.json``."""

    values: dict[str, Any]

    def reasons(self) -> str:
        """Returns the reasons why rows were dropped, with counts, as one line."""
        return format_reasons(self.values["rows_dropped"])

    def summary(self) -> str:
        """Returns a summary as text."""
        values = self.values
        lines = [
            f"{values['rows_read']:,} rows read, {values['rows_kept']:,} kept "
            f"({values['text_only_rows']:,} text-only), {sum(values['rows_dropped'].values()):,} dropped"
        ]
        for reason, count in values["rows_dropped"].items():
            lines.append(f"  {count:>9,}  {reason}: {REASONS.get(reason, reason)}")
            examples = [row for row in values["dropped"] if row["reason"] == reason][:_EXAMPLES]
            lines += [f"             row {r['row']}, {r['id'] or 'no id'}: {shorten(r['why'])}" for r in examples]
            if examples and count > _EXAMPLES:
                lines.append(f"             … and {count - _EXAMPLES:,} more; report.json lists all")
        lines += [f"{count:,} rows with {key}, which is ignored" for key, count in values.get("not_read", {}).items()]
        lines.append(f"{len(values['duplicate_ids']):,} ids occur in more than one row")
        formats = ", ".join(f"{count:,} {name}" for name, count in values["image_formats"].items())
        lines.append(f"{values['images']:,} images" + (f" ({formats})" if formats else ""))
        title = f"tokens per conversation, {values['tokens_are']}"
        lines += _format_distribution(title, values["tokens"], values["token_histogram"])
        title = "longer side of images, pixels"
        lines += _format_distribution(title, values["image_sides"], values["image_side_histogram"])
        return "\n".join(lines)


def _format_distribution(
    title: str, statistics: Mapping[str, float], histogram: Mapping[str, Sequence[float]]
) -> list[str]:
    if not statistics:
        return []
    counts = np.array(histogram["counts"])
    # Any count above zero gets a bar.
    heights = np.where(counts > 0, np.ceil(counts / counts.max() * (len(_BARS) - 1)), 0).astype(int)
    points = ", ".join(f"{name} {value:,.0f}" for name, value in statistics.items())
    edges = histogram["edges"]
    bars = "".join(_BARS[height] for height in heights)
    return [f"{title}: {points}", f"  {edges[0]:,.0f} ▕{bars}▏ {edges[-1]:,.0f}"]


def draw_histograms(tokens: np.ndarray, sizes: np.ndarray, path: epath.Path) -> None:
    """Draws a PNG of conversation lengths (int [R]) and of image widths and heights (int [M, 2], pixels)."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.hist(tokens, bins=48, color="#3b6ea8")
    left.set(title="Length of conversations", xlabel="tokens", ylabel="rows")
    if len(sizes):
        right.scatter(sizes[:, 0], sizes[:, 1], s=9, alpha=0.4, linewidths=0, color="#b0562a", rasterized=True)
    right.set(title="Size of images", xlabel="width, pixels", ylabel="height, pixels")
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=110)
