"""A random sample of the patches: the control that a method must beat.

``per=run``, the default, draws one sample for a seed and uses it for all images, so its result is that of one set of
places, lucky or not: repeat it with a few seeds. ``per=question`` draws again for each pair of image and question,
so one evaluation averages over many samples. The draw depends on the pixels, the text of the prompt and the seed alone:
it is the same in any batch, on any mesh and in any order of questions. Each image of a row has its own draw.

It acts before the decoder; ``per=question`` reads the question, but only as a seed. It costs nothing.

Axis letters: B images, P patches, C tower width, T text positions.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Integer, UInt8, UInt32

from stf_jax.models.reducers.base import PatchReducer, Question
from stf_jax.models.towers.vit import VisionTower


def random_patches(
    seed: int,
    tower: VisionTower,
    images: UInt8[Array, "B H W 3"],
    taps: tuple[int, ...],
    dtype: DTypeLike,
    keep: int,
) -> tuple[Float[Array, "B {keep} C"], ...]:
    """Like the tower's call, but each state has ``keep`` random patches, in ascending order."""
    return sample_patches(tower(images, taps, dtype), keep, seed)


def sample_patches(
    states: tuple[Float[Array, "B P C"], ...], keep: int, seed: int = 0
) -> tuple[Float[Array, "B {keep} C"], ...]:
    """Reduces states to random patches, in ascending order; the same patches every time."""
    patches = np.sort(np.random.default_rng(seed).permutation(states[0].shape[1])[:keep])
    return tuple(state[:, patches] for state in states)


def random_patches_per_question(
    seed: int,
    tower: VisionTower,
    images: UInt8[Array, "B H W 3"],
    taps: tuple[int, ...],
    dtype: DTypeLike,
    keep: int,
    question: Question | None,
) -> tuple[Float[Array, "B {keep} C"], ...]:
    """Like :func:`random_patches`, with a draw for each image and question."""
    hashes = hash_values(images.reshape(len(images), -1))
    if question is not None:
        hashes += hash_values(question.tokens, question.is_text)
    states = tower(images, taps, dtype)
    patches = draw_patches(hashes, states[0].shape[1], keep, seed)
    return tuple(jnp.take_along_axis(state, patches[:, :, None], axis=1) for state in states)


def draw_patches(hashes: UInt32[Array, " B"], patches: int, keep: int, seed: int) -> Int[Array, "B {keep}"]:
    """Draws ``keep`` of the patches for each hash, in ascending order."""
    key = jax.random.key(seed)
    draws = jax.vmap(lambda value: jax.random.permutation(jax.random.fold_in(key, value), patches)[:keep])(hashes)
    return jnp.sort(draws, axis=1)


def hash_values(values: Integer[Array, "B T"], counted: Bool[Array, "B T"] | None = None) -> UInt32[Array, " B"]:
    """Hashes rows of integers with their places, so that padding after them does not matter.

    Args:
      values: at least 0.
      counted: which of them count; None: all.
    """
    x = (values.astype(jnp.uint32) + 1) * jnp.uint32(0x9E3779B1)
    x ^= jnp.arange(values.shape[1], dtype=jnp.uint32) * jnp.uint32(0x85EBCA77)
    x = (x ^ (x >> 15)) * jnp.uint32(0x2C1B3C6D)
    x = (x ^ (x >> 12)) * jnp.uint32(0x297A2D39)
    x ^= x >> 15
    return jnp.where(True if counted is None else counted, x, 0).sum(1, dtype=jnp.uint32)


def random(*, per: Literal["run", "question"] = "run", seed: int = 0) -> PatchReducer:
    """Random patches, drawn once or for each question."""
    if per == "run":
        return PatchReducer(functools.partial(random_patches, seed))
    return PatchReducer(functools.partial(random_patches_per_question, seed), reads_question=True)


COMPONENTS = {"random": random}
