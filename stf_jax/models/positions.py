"""Interpolates the learned position embeddings of a ViT to another grid."""

import numpy as np


def interpolate_positions(table: np.ndarray, positions: int) -> np.ndarray:
    """Position embeddings [S, C] of a square grid, interpolated to ``positions`` [S', C], in the table's type.

    If S is one more than a square, the first position is the class token's and stays unchanged. The rest is bicubic
    interpolation in float64, as transformers does with ``interpolate_pos_encoding=True``: the cubic kernel with a =
    −0.75, aligned pixel centers, no antialiasing when the grid gets smaller, edges repeated.

    Raises:
      ValueError: the numbers of positions are not both squares, or both a square plus one.
    """
    old_grid, new_grid = _grid(len(table)), _grid(positions)
    if old_grid is None or new_grid is None or old_grid[0] != new_grid[0]:
        raise ValueError(f"{len(table)} and {positions} positions do not both belong to square grids")
    (class_tokens, old), (_, new) = old_grid, new_grid
    grid = table[class_tokens:].astype(np.float64).reshape(old, old, -1)
    weights = interpolation_weights(old, new)
    grid = np.einsum("yi,xj,ijc->yxc", weights, weights, grid).reshape(new * new, -1)
    return np.concatenate([table[:class_tokens], grid.astype(table.dtype)])


def same_grid_kind(positions: int, others: int) -> bool:
    """Whether both numbers of positions are of square grids, with a class token in both or in neither."""
    first, second = _grid(positions), _grid(others)
    return first is not None and second is not None and first[0] == second[0]


def _grid(positions: int) -> tuple[int, int] | None:
    """The number of class tokens, 0 or 1, and the side of the grid; None if it is not square."""
    for class_tokens in (0, 1):
        side = round((positions - class_tokens) ** 0.5)
        if side >= 1 and side * side == positions - class_tokens:
            return class_tokens, side
    return None


def interpolation_weights(old: int, new: int) -> np.ndarray:
    """Weights, as :func:`interpolate_positions` uses them, of each of ``old`` points in each of ``new`` points.

    Returns:
      float64 [new, old], for one axis of the grid.
    """
    centers = (np.arange(new) + 0.5) * old / new - 0.5
    weights = np.zeros((new, old))
    for offset in range(-1, 3):
        source = np.floor(centers).astype(int) + offset
        distance = np.abs(centers - source)
        np.add.at(weights, (np.arange(new), source.clip(0, old - 1)), _cubic(distance))
    return weights


def _cubic(x: np.ndarray, a: float = -0.75) -> np.ndarray:
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, far)
