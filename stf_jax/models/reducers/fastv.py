"""FastV (arXiv 2403.06764, section 4): image tokens with little attention are dropped inside the decoder.

After layer K = 2 it ranks them by the attention that the prompt's last token pays to them in that layer, averaged over
heads; all later layers, and their caches, hold only the best of them and the text. The authors' program handles one
image in a batch of one; here each row ranks the tokens of all its images together.

Axis letters: B rows, T positions, H heads, K kv heads, Dh head size.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from stf_jax.models.reducers.base import DecoderReducer


def last_token_attention(
    q: Float[Array, "B T H Dh"],
    k: Float[Array, "B T K Dh"],
    is_image: Bool[Array, "B T"],
    lengths: Int[Array, " B"],
) -> Float32[Array, "B T"]:
    """The attention that each position gets from the last token of its prompt, averaged over heads.

    Args:
      q, k: queries and keys, with rotary positions applied.
      is_image: not used; text gets attention too.
      lengths: of prompts; for an empty prompt the first position counts as its last.

    Returns:
      The attention, 0 beyond the prompt.
    """
    del is_image
    rows, length, heads, size = q.shape
    last = jnp.maximum(lengths - 1, 0)
    q = jnp.take_along_axis(q, last[:, None, None, None], axis=1).reshape(rows, k.shape[2], -1, size)
    scores = jnp.einsum("bkgd,btkd->bkgt", q, k, preferred_element_type=jnp.float32) * size**-0.5
    visible = jnp.arange(length) <= last[:, None]
    return jax.nn.softmax(jnp.where(visible[:, None, None], scores, -jnp.inf), axis=-1).sum((1, 2)) / heads


COMPONENTS = {"fastv": DecoderReducer(last_token_attention, after_layers=2)}
