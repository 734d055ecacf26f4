"""Formats numbers for people to read: tables, lists of facts, durations."""

from collections.abc import Mapping, Sequence
from typing import Any


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Formats rows, each a label (``what``) and values by column; None gives an empty cell.

    Consecutive rows with the same columns share a heading.
    """
    width = 2 + max((len(row["what"]) for row in rows), default=0)
    lines: list[str] = []
    previous: list[str] | None = None
    for row in rows:
        columns = [key for key in row if key != "what"]
        if columns != previous:
            lines += [""] * bool(lines)
            lines.append(" " * width + "".join(f"{key.replace('_', ' '):>{_width(key)}}" for key in columns))
            previous = columns
        cells = (f"{_format_cell(row[key]):>{_width(key)}}" for key in columns)
        lines.append(f"{row['what']:<{width}}" + "".join(cells))
    return "\n".join(line.rstrip() for line in lines)


def format_facts(heading: str, facts: Mapping[str, str]) -> str:
    """Formats a heading and, below it, an aligned line per name and text; empty texts are left out."""
    return "\n".join([heading, *(f"  {name:<13}{text}" for name, text in facts.items() if text)])


def format_duration(seconds: float) -> str:
    """Formats a duration: ``48 s``, ``12 min``, ``3 h 12 min``, ``2 d 3 h``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    days, hours, rest = minutes // 1440, minutes // 60 % 24, minutes % 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {rest} min" if hours else f"{rest} min"


def _width(key: str) -> int:
    return max(12, len(key) + 2)


def _format_cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,.2f}" if isinstance(value, float) else str(value)
