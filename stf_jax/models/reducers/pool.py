"""The mean of neighboring image tokens, after the projector, without training (UniPruneBench, arXiv 2511.02650).

For a quarter of the tokens it is the mean of 2×2. In general it is PyTorch's adaptive average pooling to a grid of
``keep`` cells, as for :func:`stf_jax.models.reducers.base.grid_of`. The fusion ``avg_pool`` is another method: it pools
the tower's states, before the projector, and is trained.

It acts before the decoder, needs neither attention nor the question, and costs next to nothing.

Axis letters: B images, N image tokens per image, D language model width.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from stf_jax.config import UserError
from stf_jax.models.reducers.base import TokenReducer, grid_of


def pool(tokens: Float[Array, "B N D"], keep: int) -> Float[Array, "B {keep} D"]:
    """Averages tokens in a grid to ``keep`` tokens in a grid."""
    batch, count, width = tokens.shape
    side = math.isqrt(count)
    rows, columns = (jnp.asarray(pooling_weights(side, cells), jnp.float32) for cells in grid_of(keep, side))
    grid = tokens.astype(jnp.float32).reshape(batch, side, side, width)
    pooled = jnp.einsum("yi,xj,bijd->byxd", rows, columns, grid, precision="highest")
    return pooled.reshape(batch, keep, width).astype(tokens.dtype)


def pooling_weights(side: int, cells: int) -> np.ndarray:
    """The weight of each of ``side`` places in the mean of each of ``cells``, float64 [cells, side].

    The places of a cell are those that it touches, so neighboring cells share places where ``cells`` does not divide
    ``side``.
    """
    weights = np.zeros((cells, side))
    for cell in range(cells):
        first, end = cell * side // cells, -(-(cell + 1) * side // cells)
        weights[cell, first:end] = 1 / (end - first)
    return weights


def check_grid(tokens: int, keep: int) -> None:
    """Raises UserError if the tokens do not form a square grid, or those that are kept no grid."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise UserError(f"reduce=pool averages tokens in a square grid, which {tokens} tokens do not form.")
    grid_of(keep, side)


COMPONENTS = {"pool": TokenReducer(pool, check_grid)}
