"""One ``attention(q, k, v, mask)`` for the tower and the decoder.

The mask is a description, not an array, so that each kernel takes it in its own form:

    Mask(causal=True)              position i sees 0..i
    Mask(segments=s)               i sees j where s[i] == s[j]: conversations packed in one row stay apart
    Mask(causal=True, segments=s)  both, e.g. for s = 1 1 2 2:   1 0 0 0
                                                                 1 1 0 0
                                                                 0 0 1 0
                                                                 0 0 1 1

:func:`cached_attention` is the same for one position over a cache that is partly filled.

Axis letters: B batch, T positions, S slots of a cache, H heads, K kv heads (K divides H), Dh head size.
"""

import dataclasses

import jax
import jax.numpy as jnp

from stf_jax.config import UserError


@dataclasses.dataclass(frozen=True)
class Mask:
    """Which positions may see which. ``segments``: int32 [B, T], or None where a row is one whole."""

    causal: bool = False
    segments: jax.Array | None = None

    def dense(self, length: int) -> jax.Array | None:
        """The mask as bool [B or 1, 1, T, T], True where attention flows; None where it flows everywhere."""
        allowed = None
        if self.causal:
            allowed = jnp.tril(jnp.ones((length, length), bool))[None, None]
        if self.segments is not None:
            same = (self.segments[:, :, None] == self.segments[:, None, :])[:, None]
            allowed = same if allowed is None else same & allowed
        return allowed


jax.tree_util.register_dataclass(Mask, data_fields=["segments"], meta_fields=["causal"])


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, implementation: str = "auto") -> jax.Array:
    """Scaled dot-product attention, softmax in float32.

    Args:
      q: [B, T, H, Dh].
      k, v: [B, T, K, Dh]; query head h reads kv head h·K//H.
      mask: which positions may see which.
      implementation: ``auto`` (cuDNN's flash attention for bfloat16 on a GPU where it can do what is asked, else XLA),
        ``cudnn``, ``xla`` or ``reference``.

    Returns:
      [B, T, H, Dh] in q's type.

    Raises:
      UserError: cuDNN was asked by name for what it cannot do.
    """
    if implementation == "reference":
        return reference_attention(q, k, v, mask)
    refusal = _cudnn_refusal(q, mask)
    if implementation == "cudnn" and refusal:
        raise UserError(f"cuDNN attention {refusal}; set model.attention=xla.")
    if implementation == "cudnn" or (implementation == "auto" and not refusal):
        return jax.nn.dot_product_attention(q, k, v, is_causal=mask.causal, implementation="cudnn")
    return jax.nn.dot_product_attention(q, k, v, mask=mask.dense(q.shape[1]), implementation="xla")


def _cudnn_refusal(q, mask):
    if jax.default_backend() != "gpu":
        return "needs a GPU"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"does not compute in {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"does not take heads of size {q.shape[-1]}"
    if mask.segments is not None:
        # Its only form for packed rows is a dense bias, which costs the memory that flash attention is to save.
        return "does not keep packed conversations apart"
    return None


def reference_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
    """The same by the definition, all in float32: what the kernels are tested against."""
    group = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    q, k, v32 = (x.astype(jnp.float32) for x in (q, k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision="highest") * q.shape[-1] ** -0.5
    allowed = mask.dense(q.shape[1])
    if allowed is not None:
        scores = jnp.where(allowed, scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v32, precision="highest").astype(v.dtype)


def cached_attention(q: jax.Array, keys: jax.Array, values: jax.Array, filled: jax.Array) -> jax.Array:
    """Attention of one position a row over what is filled of a cache, softmax in float32.

    Written for the cache's layout, in which neither product has to turn it round: it is read at every step.

    Args:
      q: [B, 1, H, Dh].
      keys, values: [B, K, S, Dh].
      filled: bool [B, S], at least one a row.

    Returns:
      [B, 1, H, Dh] in q's type.
    """
    rows, _, heads, size = q.shape
    groups = q.reshape(rows, keys.shape[1], -1, size)
    scores = jnp.einsum("bkgd,bksd->bkgs", groups, keys, preferred_element_type=jnp.float32) * size**-0.5
    weights = jax.nn.softmax(jnp.where(filled[:, None, None], scores, -jnp.inf), axis=-1)
    read = jnp.einsum("bkgs,bksd->bkgd", weights.astype(values.dtype), values)
    return read.reshape(rows, 1, heads, size)
