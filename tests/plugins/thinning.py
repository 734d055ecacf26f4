"""Reducers of one's own: evenly spaced patches, long tokens, and tokens with short keys (arXiv 2406.11430)."""

import jax
import jax.numpy as jnp
import numpy as np

from stf_jax.models.reducers.base import DecoderReducer, PatchReducer, TokenReducer


def spaced_patches(tower, images, taps, dtype, keep):
    states = tower(images, taps, dtype)
    patches = np.arange(keep) * states[0].shape[1] // keep
    return tuple(state[:, patches] for state in states)


def strongest_tokens(tokens, keep):
    norms = jnp.linalg.norm(tokens.astype(jnp.float32), axis=-1)
    kept = jnp.sort(jax.lax.top_k(norms, keep)[1], axis=1)
    return jnp.take_along_axis(tokens, kept[:, :, None], axis=1)


def shortness_of_keys(q, k, is_image, lengths):
    return -jnp.linalg.norm(k.astype(jnp.float32), axis=-1).mean(-1)


def short_keys(*, after: int = 1):
    return DecoderReducer(shortness_of_keys, after_layers=after)


SPACED = PatchReducer(spaced_patches)
STRONGEST = TokenReducer(strongest_tokens)
SHORT_KEYS = short_keys()
