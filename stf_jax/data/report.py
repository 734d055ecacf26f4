"""What preparing a data set came to: a summary to read, and histograms to look at."""

import dataclasses
from typing import Any

import numpy as np
from etils import epath

from stf_jax.config import shorten
from stf_jax.data.records import REASONS, format_reasons

_BARS = " ▁▂▃▄▅▆▇█"
_SHOWN = 3  # dropped rows a reason


@dataclasses.dataclass(frozen=True)
class Report:
    """The contents of ``report.json``."""

    values: dict[str, Any]

    def reasons(self) -> str:
        """How many rows were dropped for what, in a line."""
        return format_reasons(self.values["rows_dropped"])

    def summary(self) -> str:
        """All that matters, for people."""
        values = self.values
        lines = [
            f"{values['rows_read']:,} rows read, {values['rows_kept']:,} kept "
            f"({values['text_only_rows']:,} of text alone), {sum(values['rows_dropped'].values()):,} dropped"
        ]
        for reason, count in values["rows_dropped"].items():
            lines.append(f"  {count:>9,}  {reason}: {REASONS.get(reason, reason)}")
            some = [row for row in values["dropped"] if row["reason"] == reason][:_SHOWN]
            lines += [f"             row {row['row']}, {row['id'] or 'no id'}: {shorten(row['why'])}" for row in some]
            if count > _SHOWN:
                lines.append(f"             … and {count - _SHOWN:,} more, all in report.json")
        lines += [f"{count:,} rows with {key}, not read" for key, count in values.get("not_read", {}).items()]
        lines.append(f"{len(values['duplicate_ids']):,} ids stand on more than one row")
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in values["image_formats"].items())
        lines.append(f"{values['images']:,} images" + (f" ({kinds})" if kinds else ""))
        lines += _spread("tokens a conversation, " + values["tokens_are"], values["tokens"], values["token_histogram"])
        lines += _spread("longer side of images, pixels", values["image_sides"], values["image_side_histogram"])
        return "\n".join(lines)


def _spread(what, spread, histogram):
    if not spread:
        return []
    counts = np.array(histogram["counts"])
    # The smallest bar is kept for what is there at all.
    heights = np.where(counts > 0, np.ceil(counts / counts.max() * (len(_BARS) - 1)), 0).astype(int)
    points = ", ".join(f"{name} {value:,.0f}" for name, value in spread.items())
    edges = histogram["edges"]
    bars = "".join(_BARS[height] for height in heights)
    return [f"{what}: {points}", f"  {edges[0]:,.0f} ▕{bars}▏ {edges[-1]:,.0f}"]


def draw_histograms(tokens: np.ndarray, sizes: np.ndarray, path: epath.Path) -> None:
    """A PNG of the lengths of conversations (int [R]) and of the images' widths and heights (int [M, 2], pixels)."""
    from matplotlib.figure import Figure  # slow to import, and only wanted here

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.hist(tokens, bins=48, color="#3b6ea8")
    left.set(title="Length of conversations", xlabel="tokens", ylabel="rows")
    if len(sizes):
        right.scatter(sizes[:, 0], sizes[:, 1], s=9, alpha=0.4, linewidths=0, color="#b0562a", rasterized=True)
    right.set(title="Size of images", xlabel="width, pixels", ylabel="height, pixels")
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=110)
