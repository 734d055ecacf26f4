"""Figures as text to read."""

from collections.abc import Mapping, Sequence
from typing import Any


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of ``what`` and figures, the columns in the order in which they first appear; what is None stays empty.

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


def facts(heading: str, named: Mapping[str, str]) -> str:
    """A heading, and below it a line for each name whose text is not empty, the texts below each other."""
    return "\n".join([heading, *(f"  {name:<13}{text}" for name, text in named.items() if text)])


def span(seconds: float) -> str:
    """A time for people: ``48 s``, ``12 min``, ``3 h 12 min``, ``2 d 3 h``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    days, hours, rest = minutes // 1440, minutes // 60 % 24, minutes % 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {rest} min" if hours else f"{rest} min"


def _width(key):
    return max(12, len(key) + 2)


def _text(value):
    if value is None:
        return ""
    return f"{value:,.2f}" if isinstance(value, float) else str(value)
