"""Position embeddings of another resolution: the learned grid of a ViT, interpolated."""

import numpy as np


def interpolated(table: np.ndarray, positions: int) -> np.ndarray:
    """Position embeddings [S, C] of a square grid, interpolated to ``positions`` [S', C], in the table's type.

    Where one position more than a square is there, it is the class token's, which stays as it is. The rest is bicubic
    interpolation in float64, as transformers does with ``interpolate_pos_encoding=True``: the cubic kernel with
    a = −0.75, pixel centres aligned, no smoothing where the grid gets smaller, edges repeated.

    Raises:
      ValueError: the numbers of positions are not both squares, or both a square and one.
    """
    if not same_kind(len(table), positions):
        raise ValueError(f"{len(table)} and {positions} positions are not of two square grids")
    (first, old), (_, new) = _grid(len(table)), _grid(positions)
    grid = table[first:].astype(np.float64).reshape(old, old, -1)
    weights = _weights(old, new)
    grid = np.einsum("yi,xj,ijc->yxc", weights, weights, grid).reshape(new * new, -1)
    return np.concatenate([table[:first], grid.astype(table.dtype)])


def same_kind(positions: int, others: int) -> bool:
    """Whether both numbers of positions are of square grids, with a class token in both or in neither."""
    one, other = _grid(positions), _grid(others)
    return one is not None and other is not None and one[0] == other[0]


def _grid(positions):
    """Class tokens, 0 or 1, and the grid's side; None where there is no square."""
    for first in (0, 1):
        side = round((positions - first) ** 0.5)
        if side >= 1 and side * side == positions - first:
            return first, side
    return None


def _weights(old, new):
    """What each of ``new`` points takes from each of ``old``: float64 [new, old]."""
    at = (np.arange(new) + 0.5) * old / new - 0.5
    weights = np.zeros((new, old))
    for offset in range(-1, 3):
        source = np.floor(at).astype(int) + offset
        distance = np.abs(at - source)
        np.add.at(weights, (np.arange(new), source.clip(0, old - 1)), _cubic(distance))
    return weights


def _cubic(x, a=-0.75):
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, far)
