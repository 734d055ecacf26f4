"""A random sample of the patches, drawn once and the same for all images: the control that a method must beat.

Axis letters: B images, P patches, C tower width.
"""

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from stf_jax.models.reducers.base import PatchReducer
from stf_jax.models.towers.vit import VisionTower


def random_patches(
    tower: VisionTower, images: UInt8[Array, "B H W 3"], taps: tuple[int, ...], dtype: DTypeLike, keep: int
) -> tuple[Float[Array, "B {keep} C"], ...]:
    """Like the tower's call, but each state has ``keep`` random patches, in ascending order."""
    return sample_patches(tower(images, taps, dtype), keep)


def sample_patches(states: tuple[Float[Array, "B P C"], ...], keep: int) -> tuple[Float[Array, "B {keep} C"], ...]:
    """Reduces states to random patches, in ascending order; the same patches every time."""
    patches = np.sort(np.random.default_rng(0).permutation(states[0].shape[1])[:keep])
    return tuple(state[:, patches] for state in states)


COMPONENTS = {"random": PatchReducer(random_patches)}
