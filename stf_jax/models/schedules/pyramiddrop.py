"""PyramidDrop (arXiv 2410.17247), trained with its drops; untrained it is models/reducers/pyramiddrop.py.

At each drop image tokens are ranked by the attention that the positions just before an answer would pay to them in the
next layer, averaged over heads and answers; in a prompt, that of its last token. Ranking has no gradient. Positions are
counted from 0 again after each drop, as in the authors' program.

- ``after`` lists the layers before the drops, as ``after=8+16+24``; by default a quarter, a half and three quarters of
  the layers, which is 8, 16 and 24 of 32.
- ``keep`` lists the tokens of an image after each drop, as ``keep=288+144+72``; by default each drop keeps half,
  rounded down, at least 1.
- The authors' program keeps all tokens of rows without an answer. Here these keep the first, as shapes are static.

Axis letters: L decoder layers, N image tokens per image.
"""

import functools

from stf_jax.models.schedules.base import Schedule
from stf_jax.models.stages import Stage, quarters


def pyramiddrop(*, after: tuple[int, ...] = (), keep: tuple[int, ...] = ()) -> Schedule:
    """PyramidDrop with drops after these layers to these numbers of tokens; none: the default ones."""
    return Schedule(functools.partial(_plan, after, keep), renumber=True)


def _plan(after: tuple[int, ...], keep: tuple[int, ...], layers: int, tokens: int) -> list[Stage]:
    after = after or quarters(layers)
    keep = keep or tuple(max(1, tokens >> drop) for drop in range(1, len(after) + 1))
    if len(keep) != len(after):
        raise ValueError(f"it drops {len(after)} times, but keep has {len(keep)} numbers.")
    return [Stage(layer, count) for layer, count in zip(after, keep, strict=True)]


COMPONENTS = {"pyramiddrop": pyramiddrop}
