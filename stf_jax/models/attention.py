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
import functools
import itertools
import logging

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec

from stf_jax.config import UserError
from stf_jax.models.layers import platform


@dataclasses.dataclass(frozen=True)
class Mask:
    """Which positions may see which. ``segments``: int32 [B, T], or None where a row is one whole."""

    causal: bool = False
    segments: jax.Array | None = None

    def dense(self, queries: jax.Array, length: int) -> jax.Array | None:
        """The mask as bool [B or 1, 1, Q, T], True where attention flows; None where it flows everywhere.

        Args:
          queries: int32 [Q], the positions that look.
          length: T, positions that are looked at, from the left.
        """
        allowed = None
        if self.causal:
            allowed = (queries[:, None] >= jnp.arange(length))[None, None]
        if self.segments is not None:
            same = (self.segments[:, queries, None] == self.segments[:, None, :length])[:, None]
            allowed = same if allowed is None else same & allowed
        return allowed


jax.tree_util.register_dataclass(Mask, data_fields=["segments"], meta_fields=["causal"])


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, implementation: str = "auto") -> jax.Array:
    """Scaled dot-product attention, softmax in float32.

    Args:
      q: [B, T, H, Dh].
      k, v: [B, T, K, Dh]; query head h reads kv head h·K//H.
      mask: which positions may see which.
      implementation: ``auto`` (the backend's kernel where it can do what is asked, else XLA), or by name:
        ``splash``, Pallas' on TPU (on CPU interpreted, for tests); ``cudnn``, flash attention on GPU; ``xla``;
        ``reference``. Which one it is, and why, is logged once.

    Returns:
      [B, T, H, Dh] in q's type.

    Raises:
      UserError: a kernel was asked by name for what it cannot do.
    """
    if implementation == "reference":
        return reference_attention(q, k, v, mask)
    chosen, reason = implementation, ""
    if implementation == "auto":
        kernel = {"gpu": "cudnn", "tpu": "splash"}.get(platform())
        refusal = _REFUSALS[kernel](q, mask) if kernel else None
        chosen = kernel if kernel and not refusal else "xla"
        reason = f": {kernel} {refusal}" if refusal else ""
    elif implementation in _REFUSALS and (refusal := _REFUSALS[implementation](q, mask)):
        raise UserError(f"model.attention={implementation} {refusal}; set model.attention=auto.")
    kind = f"{'causal ' * mask.causal}{'packed ' * (mask.segments is not None)}attention"
    _say(f"{kind} with heads of {q.shape[-1]} in {q.dtype}: {chosen}{reason}")
    return _KERNELS[chosen](q, k, v, mask)


def _cudnn(q, k, v, mask):
    length = q.shape[1]
    if mask.causal:  # it has no gradients of odd lengths; filling lies at the right, where a causal mask hides it
        q, k, v = (jnp.pad(x, ((0, 0), (0, length % 2), (0, 0), (0, 0))) for x in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v, is_causal=mask.causal, implementation="cudnn")[:, :length]


def _cudnn_refusal(q, mask):
    if platform() != "gpu":
        return "needs a GPU"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"does not compute in {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"does not take heads of size {q.shape[-1]}"
    if mask.segments is not None:
        # Its only form for packed rows is a dense bias, which costs the memory that flash attention is to save.
        return "does not keep packed conversations apart"
    return None


_LANES = 128  # of a TPU's vector registers: splash's blocks are multiples of it
_BLOCK = 512  # positions a side of splash's blocks, where they divide the length


def _splash(q, k, v, mask):
    """Pallas' splash attention, on each device's rows and heads."""
    length = q.shape[1]
    # Filling lies at the right, where a causal mask hides it.
    q, k, v = (jnp.pad(x, ((0, 0), (0, -length % _LANES), (0, 0), (0, 0))) for x in (q, k, v))
    whole = q.shape[1]
    block = next(size for size in range(_BLOCK, 0, -_LANES) if whole % size == 0)
    forward = dict(block_q=block, block_kv=block, block_kv_compute=block)
    backward = dict(block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block)
    sizes = splash_attention.BlockSizes(**forward, **backward, block_q_dq=block, block_kv_dq=block)
    segments = None
    if mask.segments is not None:
        segments = jnp.pad(mask.segments, ((0, 0), (0, whole - length)), constant_values=-1)

    def local(q, k, v, segments):
        heads = [splash_attention.CausalMask((whole, whole))] * q.shape[2]
        kernel = splash_attention.make_splash_mha(
            splash_attention.MultiHeadMask(heads),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            interpret=platform() == "cpu",
        )

        def row(q, k, v, segments):
            ids = None if segments is None else splash_attention.SegmentIds(segments, segments)
            return kernel(q, k, v, segment_ids=ids)

        scaled = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
        heads_first = (x.swapaxes(1, 2) for x in (scaled, k, v))
        return jax.vmap(row)(*heads_first, segments).swapaxes(1, 2)

    rows = PartitionSpec(("data", "fsdp"))
    heads = PartitionSpec(("data", "fsdp"), None, "tensor")
    if not jax.sharding.get_abstract_mesh().empty:
        # Not checked, for Pallas does not say over which axes what it writes varies.
        local = jax.shard_map(local, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
    return local(q, k, v, segments)[:, :length]


def _splash_refusal(q, mask):
    if platform() == "gpu":
        return "needs a TPU"
    if not mask.causal:
        return "is for causal attention"
    if q.shape[-1] % 64:
        return f"does not take heads of size {q.shape[-1]}"
    return None


_QUERIES = 512  # at once, of longer rows
_SPANS = 4  # of a row at most, each of 64 queries or more


def _xla(q, k, v, mask):
    rows, length, heads, size = q.shape
    kv_heads = k.shape[2]
    # Heads first, and all query heads of a kv head below each other: so both products are of plain matrices, and scores
    # are never copied into another layout (on a CPU, that and softmax would take longer than the products).
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))

    def look(queries, q, seen):  # the queries and their positions, and how many positions from the left they may see
        stacked = q.reshape(rows, kv_heads, -1, size)
        scores = jnp.einsum("bkqd,bksd->bkqs", stacked, k[:, :, :seen], preferred_element_type=jnp.float32)
        scores *= size**-0.5
        allowed = mask.dense(queries, seen)
        if allowed is not None:
            apart = scores.reshape(*q.shape[:3], seen)
            scores = jnp.where(allowed, apart, -jnp.inf).reshape(scores.shape)
        # Softmax, but divided behind the product: backward too that is then over [Q, Dh] in place of [Q, T].
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        read = jnp.einsum("bkqs,bksd->bkqd", weights.astype(v.dtype), v[:, :, :seen])
        return (read / weights.sum(-1, keepdims=True)).astype(v.dtype).reshape(q.shape)

    if length <= 2 * _QUERIES:
        # What lies to the right of a span is hidden by a causal mask and not computed: by four spans, 3/8 are spared.
        count = max(1, min(_SPANS, length // 64)) if mask.causal else 1
        bounds = [length * i // count for i in range(count + 1)]
        spans = itertools.pairwise(bounds)
        parts = [look(jnp.arange(start, stop), q[:, :, start:stop], stop) for start, stop in spans]
        return jnp.concatenate(parts, axis=2).swapaxes(1, 2)
    # Block by block of queries, backward too, so that scores of all positions with all never lie in memory.
    blocks = -(-length // _QUERIES)
    queries = jnp.minimum(jnp.arange(blocks * _QUERIES), length - 1).reshape(blocks, _QUERIES)
    block = jax.checkpoint(lambda part: look(part, q[:, :, part], length), prevent_cse=False)
    parts = jax.lax.map(block, queries)  # [blocks, B, H, Q, Dh]
    return parts.transpose(1, 0, 3, 2, 4).reshape(rows, -1, heads, size)[:, :length]


@functools.cache
def _say(sentence):
    if jax.process_index() == 0:
        logging.getLogger(__name__).info(sentence)


_KERNELS = {"cudnn": _cudnn, "splash": _splash, "xla": _xla}
_REFUSALS = {"cudnn": _cudnn_refusal, "splash": _splash_refusal}


def reference_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
    """The same by the definition, all in float32: what the kernels are tested against."""
    group = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    q, k, v32 = (x.astype(jnp.float32) for x in (q, k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision="highest") * q.shape[-1] ** -0.5
    allowed = mask.dense(jnp.arange(q.shape[1]), q.shape[1])
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
