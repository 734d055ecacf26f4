"""Estimates and differences in text and JSON."""

import dataclasses
import math
from typing import Any

from stf_jax.studies.statistics import ClusteredMean, Estimate


def format_margin(points: float) -> str:
    """Formats a margin: ``1 point``, ``2.5 points``."""
    return f"{points:g} point{'s' * (points != 1)}"


def format_signed(estimate: Estimate) -> str:
    """Formats a difference with its interval: ``-1.2 (-3.0 to +0.6)``."""
    return f"{estimate.value:+.1f} ({estimate.low:+.1f} to {estimate.high:+.1f})"


def format_points(estimate: Estimate) -> str:
    """Formats a difference as :func:`format_signed` does, with its unit."""
    return f"{estimate.value:+.1f} points ({estimate.low:+.1f} to {estimate.high:+.1f})"


def format_verdict(name: str, baseline: str, result: ClusteredMean, margin: float) -> str:
    """Returns a sentence about a difference from a baseline; equal if it is smaller than ``margin`` points."""
    points = format_points(result)
    if not result.within_noise:
        small = f", by less than {format_margin(margin)}" if result.within_margin(margin) else ""
        return f"{name} is {'better' if result.value > 0 else 'worse'} than {baseline}{small}: {points}."
    if result.within_margin(margin):
        return f"{name} and {baseline} are **equal within {format_margin(margin)}**: {points}."
    return f"{name} vs. {baseline}: {points}, **within noise**."


def estimate_to_json(estimate: Estimate) -> dict[str, Any]:
    """Returns the fields of an estimate; None for bounds that do not exist."""
    return {key: x if math.isfinite(x) else None for key, x in dataclasses.asdict(estimate).items()}
