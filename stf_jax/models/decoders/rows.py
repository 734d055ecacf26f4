"""What the decoder's layers read: the states of rows, tokens beside them, and where later layers read others.

Axis letters: B batch, T positions, T1 positions of the layers that follow, E tokens beside, S slots of a cache,
H heads, K kv heads, Dh head size, D width.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

SelectPositions = Callable[[Any, Any, jax.Array], jax.Array]  # (q, k, x) → int32 [B, T1], see Selection


@dataclasses.dataclass(frozen=True)
class Beside:
    """Tokens that layers see as keys and values, made by each layer's own norm and kernels, and never update.

    Attributes:
      x: what the norm gets, [B, E, D].
      positions: int32 [B, E].
      visible: which positions see which tokens, bool [B, T, E].
      order: int32 [B, S], for each slot of a cache its index among the E tokens and then the T positions.
    """

    x: jax.Array
    positions: jax.Array
    visible: jax.Array
    order: jax.Array


@dataclasses.dataclass(frozen=True)
class Rows:
    """What layers read.

    Attributes:
      x: states, [B, T, D].
      positions: int32 [B, T].
      segments: the conversation of each position, int32 [B, T]; None where each row is one conversation.
      beside: what they see besides.
      silent: positions that get nothing from attention, bool [B, T]; None: there are none.
    """

    x: jax.Array
    positions: jax.Array
    segments: jax.Array | None = None
    beside: Beside | None = None
    silent: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Selection:
    """A place in the decoder from where on layers read other positions, mostly fewer.

    Attributes:
      after: number of layers before it.
      select: called with queries [B, T, H, Dh] and keys [B, T, K, Dh], both with rotary positions, and the hidden
        states [B, T, D] after those layers; returns the positions that the following layers read, int32 [B, T1], which
        attend to one another causally in the order given. None: the same as before.
      scored_by: whose queries and keys ``select`` gets: those of the last layer before it, those that the next layer
        would have without it, or None for both (``nothing``).
      renumber: whether the positions of the following layers are 0, 1, … again in each segment; by default they stay.
      joining: what ``select`` may add, as positions T, T + 1, …
      weigh: called with what ``select`` returned; returns factors of the states, [B, T1].
      beside, silent: those of the following layers.
    """

    after: int
    select: SelectPositions | None
    scored_by: Literal["last", "next", "nothing"] = "last"
    renumber: bool = False
    joining: Rows | None = None
    weigh: Callable[[jax.Array], jax.Array] | None = None
    beside: Beside | None = None
    silent: jax.Array | None = None

    def apply(self, q: jax.Array | None, k: jax.Array | None, rows: Rows) -> Rows:
        """What the following layers read, of what those before have read; ``q`` and ``k`` are those of ``select``."""
        if self.select is None:
            return dataclasses.replace(rows, beside=self.beside, silent=self.silent)
        selected, joining = self.select(q, k, rows.x), self.joining

        def take(key: str) -> Any:
            values = getattr(rows, key)
            if values is None:
                return None
            if joining is not None:
                values = jnp.concatenate([values, getattr(joining, key)], axis=1)
            return jnp.take_along_axis(values, selected.reshape(*selected.shape, *[1] * (values.ndim - 2)), axis=1)

        x, segments = take("x"), take("segments")
        if self.weigh is not None:
            x = x * self.weigh(selected)[:, :, None].astype(x.dtype)
        if not self.renumber:
            positions = take("positions")
        else:
            positions = jnp.broadcast_to(jnp.arange(selected.shape[1]), selected.shape)
            positions -= 0 if segments is None else find_starts(segments)
        return Rows(x, positions, segments, self.beside, self.silent)


def find_starts(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The first position of the segment of each position; a segment's positions are consecutive."""
    is_first = segments != jnp.pad(segments, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    return jax.lax.cummax(jnp.where(is_first, jnp.arange(segments.shape[1]), 0), axis=1)
