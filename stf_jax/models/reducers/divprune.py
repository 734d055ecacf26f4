"""DivPrune (arXiv 2503.02175): the tokens that are least alike, a greedy solution of the max-min diversity problem.

The distance of two tokens is 1 − cosine of the projector's outputs. The first pick is the token whose nearest neighbor
is farthest away; each further pick is the token that is farthest from its nearest pick. All are in row-major order in
the prompt. Among equals the first is picked. A token is never picked twice; the authors' program may do so where tokens
are equal.

It acts before the decoder, after any fusion, and needs neither attention nor the question. Its own cost is one product
of all pairs of tokens, 2·N²·D FLOPs an image, and ``keep`` steps of a minimum over N, one after another.

Axis letters: B images, N image tokens per image, D language model width.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from stf_jax.models.reducers.base import TokenReducer


def divprune(tokens: Float[Array, "B N D"], keep: int) -> Float[Array, "B {keep} D"]:
    """Reduces tokens to the ``keep`` that are least alike."""
    return jnp.take_along_axis(tokens, pick_diverse(tokens, keep)[:, :, None], axis=1)


def pick_diverse(tokens: Float[Array, "B N D"], keep: int) -> Int[Array, "B {keep}"]:
    """Indices of the ``keep`` tokens that are least alike, in ascending order."""
    x = tokens.astype(jnp.float32)
    x = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    distances = 1 - jnp.einsum("bnd,bmd->bnm", x, x, precision="highest")
    nearest = -jax.lax.top_k(-distances, min(2, tokens.shape[1]))[0][:, :, -1]  # the nearest of all is the token itself
    rows = jnp.arange(len(tokens))

    def pick(step: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        picks, nearest = state
        index = nearest.argmax(1)
        # Of the first pick all distances count, not those to other nearest neighbors.
        others = jnp.where(step == 0, jnp.inf, nearest)
        return picks.at[:, step].set(index), jnp.minimum(others, distances[rows, index]).at[rows, index].set(-jnp.inf)

    picks = jnp.zeros((len(tokens), keep), jnp.int32)
    return jnp.sort(jax.lax.fori_loop(0, keep, pick, (picks, nearest))[0], axis=1)


COMPONENTS = {"divprune": TokenReducer(divprune)}
