"""Rows of figures as a table to read."""

from collections.abc import Sequence
from typing import Any


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of ``what`` and figures, the columns in the order in which they first appear; gaps stay empty.

    Rows with the same columns stand under one heading.
    """
    lines, before = [], None
    for row in rows:
        columns = [key for key in row if key != "what"]
        if columns != before:
            lines += [""] * bool(lines)
            lines.append(f"{'':<40}" + "".join(f"{key.replace('_', ' '):>{_width(key)}}" for key in columns))
            before = columns
        cells = (f"{_text(row[key]):>{_width(key)}}" for key in columns)
        lines.append(f"{row['what']:<40}" + "".join(cells))
    return "\n".join(line.rstrip() for line in lines)


def _width(key):
    return max(12, len(key) + 2)


def _text(value):
    return f"{value:,.2f}" if isinstance(value, float) else str(value)
