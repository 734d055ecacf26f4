"""DART (arXiv 2502.11494): tokens that are unlike a few pivots are kept, inside the decoder.

After layer K = 2 the pivots are the 4 image tokens and the 4 text tokens with the largest L1 norm of that layer's keys,
rotary positions included and heads joined. One pivot after another keeps, of the image tokens not taken yet, those
whose states, with the decoder's final norm applied, are least similar to its own by cosine. The image pivots are kept
too. Positions stay.

- ``keep`` is exact here: the 8 pivots share ``keep`` − 4 tokens, the first ones one more where 8 does not divide it.
  The authors' program rounds down for each pivot; its ratios 0.889, 0.778 and 0.667 of 576 keep 60, 124 and 188.
- Pivots take turns in the order of their positions. In the authors' program it is the order of a Python set.
- Text pivots are those after the row's last image, as there. A row with several images ranks the tokens of all of them
  together; the authors' program handles one.
- ``after`` and ``count`` are as for fastv.

It acts in the decoder and needs no attention, only states and keys of one layer; it depends on the question through its
pivots. Its own cost is 8 products of a vector with all states.

Axis letters: B rows, T positions, H heads, K kv heads, Dh head size, D language model width.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from stf_jax.models.reducers.base import Count, DecoderReducer

_PIVOTS = 4  # of images, and as many of the text


def score_dissimilar(
    q: Float[Array, "B T H Dh"],
    k: Float[Array, "B T K Dh"],
    is_image: Bool[Array, "B T"],
    lengths: Int[Array, " B"],
    states: Float[Array, "B T D"],
    keep: Int[Array, " B"],
) -> Float32[Array, "B T"]:
    """Scores whose ``keep`` highest per row are the tokens that DART keeps.

    Args:
      q: not used.
      k: keys, with rotary positions applied.
      is_image: which positions are image tokens.
      lengths: of prompts.
      states: hidden states with the decoder's final norm applied.
      keep: image tokens to keep in each row.
    """
    del q
    positions = jnp.arange(k.shape[1])
    norms = jnp.abs(k.astype(jnp.float32)).sum((2, 3))
    last_image = jnp.where(is_image, positions, -1).max(1, keepdims=True)
    is_text = (positions > last_image) & (positions < lengths[:, None])
    image_pivots, text_pivots = (
        jax.lax.top_k(jnp.where(among, norms, -jnp.inf), _PIVOTS)[1] for among in (is_image, is_text)
    )
    is_pivot = (positions == image_pivots[:, :, None]).any(1) & is_image
    pivots = jnp.sort(jnp.concatenate([image_pivots, text_pivots], axis=1), axis=1)
    unit = states.astype(jnp.float32)
    unit = unit / jnp.linalg.norm(unit, axis=-1, keepdims=True)
    taken, rest = is_pivot, jnp.maximum(keep - _PIVOTS, 0)
    for turn in range(2 * _PIVOTS):
        pivot = jnp.take_along_axis(unit, pivots[:, turn, None, None], axis=1)[:, 0]
        similarity = jnp.einsum("btd,bd->bt", unit, pivot, precision="highest")
        rank = jnp.argsort(jnp.argsort(jnp.where(is_image & ~taken, similarity, jnp.inf), axis=1), axis=1)
        share = rest // (2 * _PIVOTS) + (turn < rest % (2 * _PIVOTS))
        taken |= is_image & (rank < share[:, None])
    return jnp.where(is_pivot, 1 + norms, taken.astype(jnp.float32))


def dart(*, after: int = 2, count: Count = "after") -> DecoderReducer:
    """DART with K = ``after``."""
    return DecoderReducer(score_dissimilar, after, count, reads_states=True)


COMPONENTS = {"dart": dart}
