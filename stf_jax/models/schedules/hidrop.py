"""HiDrop (ICLR 2026): image tokens enter late, are dropped along a concave pyramid, and leave early.

The first layers read text only. Before layer ``enter`` the fusion's tokens join, as the projector made them. Then they
are dropped, ranked as in PyramidDrop (models/schedules/pyramiddrop.py), and before layer ``exit`` the last of them
leave. All positions stay those of the complete row.

- For 32 layers and 576 tokens, ``hidrop`` is the authors' schedule for 7B of 64 tokens per layer on average: layers 8
  and 9 read all, layers 10 to 13 215, then 10, 5 and 1, and the last 8 layers text only. ``keep=87+10+5+1`` is the one
  of 48.
- ``enter``, ``layers`` (those before the drops) and ``exit`` count layers; 0 or none: those of 7B in proportion to the
  depth, where at least one layer reads all tokens, and of several drops at one layer the last counts. For 40 layers
  they are 10, 13, 18, 20, 23 and 30. ``keep`` has the tokens after each drop; none: those above, in proportion to N.
- ``soft`` is λ of the soft top-k of the paper: a token of rank r, from 0, of which k are kept, is multiplied by
  y = σ(λ·(k − r)), which is above ½ where it is kept. The released program keeps the same tokens and does not multiply
  them, which is ``soft=0``. The rank has no derivative, so y passes no gradient to the scores in either.

Axis letters: L decoder layers, N image tokens per image.
"""

import functools

from stf_jax.models.schedules.base import Schedule, scale_layers
from stf_jax.models.stages import Stage

_ENTER, _DROPS, _EXIT, _DEPTH = 8, (10, 14, 16, 18), 24, 32  # of 7B
_KEEP, _TOKENS = (215, 10, 5, 1), 576


def hidrop(
    *, enter: int = 0, layers: tuple[int, ...] = (), keep: tuple[int, ...] = (), exit: int = 0, soft: float = 0.0
) -> Schedule:
    """HiDrop with these layers and numbers of tokens; none: those of 7B, in proportion."""
    if soft < 0:
        raise ValueError("soft must be at least 0.")
    return Schedule(functools.partial(_plan, enter, layers, keep, exit), soft=soft)


def _plan(
    enter: int, drops: tuple[int, ...], keep: tuple[int, ...], leave: int, layers: int, tokens: int
) -> list[Stage]:
    (own_enter, *own_drops, own_leave) = scale_layers((_ENTER, *_DROPS, _EXIT), _DEPTH, layers)
    enter, leave = enter or max(1, own_enter), leave or own_leave
    after = drops or tuple(max(enter + 1, layer) for layer in own_drops)
    keep = keep or tuple(max(1, (2 * count * tokens + _TOKENS) // (2 * _TOKENS)) for count in _KEEP)
    if len(keep) != len(after):
        raise ValueError(f"it drops {len(after)} times, but keep has {len(keep)} numbers.")
    kept = dict(zip(after, keep, strict=True))
    if not enter < min(kept) or not max(kept) < leave:
        raise ValueError(
            f"image tokens enter before layer {enter}, are dropped before {', '.join(map(str, kept))}, and leave "
            f"before {leave}; these must ascend."
        )
    return [Stage(0, 0), Stage(enter, tokens), *(Stage(layer, count) for layer, count in kept.items()), Stage(leave, 0)]


COMPONENTS = {"hidrop": hidrop}
