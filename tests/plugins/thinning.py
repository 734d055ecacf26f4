"""Reducers of one's own: evenly spaced patches, and tokens whose keys are short (arXiv 2406.11430)."""

import jax.numpy as jnp
import numpy as np

from stf_jax.models.reducers.base import DecoderReducer, PatchReducer


def spaced_patches(tower, images, taps, dtype, keep):
    states = tower(images, taps, dtype)
    patches = np.arange(keep) * states[0].shape[1] // keep
    return tuple(state[:, patches] for state in states)


def shortness_of_keys(q, k, is_image, lengths):
    return -jnp.linalg.norm(k.astype(jnp.float32), axis=-1).mean(-1)


SPACED = PatchReducer(spaced_patches)
SHORT_KEYS = DecoderReducer(shortness_of_keys, after_layers=1)
