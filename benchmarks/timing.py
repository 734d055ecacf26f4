"""The timing loops of the benchmarks."""

import statistics
import time
from collections.abc import Callable
from typing import Any

_MAX_CALLS, _MAX_SECONDS = 3, 10.0  # measurements, for the median; fewer once they took this long


def median_figures(measure: Callable[[], tuple[float, ...]]) -> tuple[float, ...]:
    """Medians of the seconds that repeated measurements return, after a warm-up.

    The warm-up compiles, starts threads and touches memory for the first time.
    """
    measure()
    results: list[tuple[float, ...]] = []
    while len(results) < _MAX_CALLS and sum(map(sum, results)) < _MAX_SECONDS:
        results.append(measure())
    return tuple(map(statistics.median, zip(*results, strict=True)))


def median_seconds(call: Callable[[], object]) -> float:
    """The median time of a call, which returns when its work is done."""

    def measure() -> tuple[float, ...]:
        begin = time.perf_counter()
        call()
        return (time.perf_counter() - begin,)

    return median_figures(measure)[0]


def time_torch_steps(compute_loss: Callable[[], Any], optimizer: Any, steps: int) -> tuple[list[float], list[float]]:
    """Takes optimizer steps in PyTorch, after one as a warm-up.

    Returns:
      The loss before each step and after the last, and the seconds of each step.
    """
    losses, seconds = [], []
    for _ in range(steps + 1):
        begin = time.perf_counter()
        loss = compute_loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begin)
    return losses, seconds[1:]
