"""Evenly spaced patches: a stride over the grid, the same for all images (M3, arXiv 2405.17430, "spatial sampling").

It keeps the patches at the centers of an even grid of ``keep`` cells: for 144 of 576 the odd ones of every second row.
``keep`` must be the number of cells of such a grid, as for :func:`stf_jax.models.reducers.base.grid_of`.

It acts before the decoder, needs neither attention nor the question, and costs nothing.

Axis letters: B images, P patches, C tower width.
"""

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from stf_jax.config import FusionConfig
from stf_jax.models.reducers.base import PatchReducer, grid_of
from stf_jax.models.towers.base import VisionConfig
from stf_jax.models.towers.vit import VisionTower


def uniform_patches(
    tower: VisionTower, images: UInt8[Array, "B H W 3"], taps: tuple[int, ...], dtype: DTypeLike, keep: int
) -> tuple[Float[Array, "B {keep} C"], ...]:
    """Like the tower's call, but each state has ``keep`` evenly spaced patches."""
    patches = spaced_cells(tower.config.grid, keep)
    return tuple(state[:, patches] for state in tower(images, taps, dtype))


def spaced_cells(side: int, keep: int) -> np.ndarray:
    """Indices of ``keep`` evenly spaced cells of a grid of ``side``×``side``, in row-major order."""
    rows, columns = ((2 * np.arange(count) + 1) * side // (2 * count) for count in grid_of(keep, side))
    return (rows[:, None] * side + columns).reshape(-1)


def check_grid(config: FusionConfig, vision: VisionConfig, keep: int) -> None:
    """Raises UserError if ``keep`` patches do not form a grid."""
    del config
    grid_of(keep, vision.grid)


COMPONENTS = {"uniform": PatchReducer(uniform_patches, check_grid)}
