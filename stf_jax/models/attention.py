"""One ``attention(q, k, v, mask)`` for the vision tower and the decoder.

A mask is a description instead of an array, so that each kernel can receive it in its own form:

    Mask(causal=True)              position i sees 0..i
    Mask(segments=s)               i sees j where s[i] == s[j]: keeps conversations packed in one row apart
    Mask(causal=True, segments=s)  both, e.g. for s = 1 1 2 2:   1 0 0 0
                                                                 1 1 0 0
                                                                 0 0 1 0
                                                                 0 0 1 1

:func:`cached_attention` attends from one position to a partly filled cache.

Axis letters: B batch, T positions, S slots of a cache, H heads, K kv heads (K divides H), Dh head size.
"""

import contextlib
import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Int

from stf_jax.accounting.flops import CAUSAL
from stf_jax.config import UserError
from stf_jax.models.layers import KEPT_ATTENTION, platform


@dataclasses.dataclass(frozen=True)
class Mask:
    """Which positions may attend to which.

    Attributes:
      causal: whether a position sees none to its right.
      segments: int32 [B, T], or None where each row is one segment.
      beside: bool [B, T, E], which positions see which of E keys that come before the T of the positions; None: E is 0.
    """

    causal: bool = False
    segments: jax.Array | None = None
    beside: jax.Array | None = None

    @property
    def keys_beside(self) -> int:
        """E."""
        return 0 if self.beside is None else self.beside.shape[2]

    def dense(self, queries: Int[Array, " Q"], length: int) -> Bool[Array, "#B 1 Q S"] | None:
        """The mask as an array, True where attention is allowed; None where it is allowed everywhere.

        Args:
          queries: the query positions.
          length: the number of key positions, counted from the left; S is E more.
        """
        allowed = None
        if self.causal:
            allowed = (queries[:, None] >= jnp.arange(length))[None, None]
        if self.segments is not None:
            same = (self.segments[:, queries, None] == self.segments[:, None, :length])[:, None]
            allowed = same if allowed is None else same & allowed
        if self.beside is None:
            return allowed
        beside = self.beside[:, None, queries]
        own = jnp.broadcast_to(True if allowed is None else allowed, (*beside.shape[:3], length))
        return jnp.concatenate([beside, own], axis=-1)


jax.tree_util.register_dataclass(Mask, data_fields=["segments", "beside"], meta_fields=["causal"])


def attention(
    q: Float[Array, "B T H Dh"],
    k: Float[Array, "B S K Dh"],
    v: Float[Array, "B S K Dh"],
    mask: Mask,
    implementation: str = "auto",
) -> Float[Array, "B T H Dh"]:
    """Scaled dot-product attention, softmax in float32.

    Args:
      q: queries.
      k, v: keys and values, those beside first (S = E + T); query head h reads kv head h·K//H.
      mask: which positions may attend to which.
      implementation: ``auto`` (the backend's kernel where it supports the inputs, else XLA), or a kernel by name:
        ``splash``, Pallas' on TPU (interpreted on CPU, for tests); ``cudnn``, flash attention on GPU; ``xla``;
        ``reference``. The chosen kernel and the reason are logged once.

    Returns:
      The output in q's type.

    Raises:
      UserError: the kernel named by ``implementation`` does not support the inputs.
    """
    if implementation == "reference":
        return reference_attention(q, k, v, mask)
    kernel_name, reason = implementation, ""
    if implementation == "auto":
        kernel = {"gpu": "cudnn", "tpu": "splash"}.get(platform())
        refusal = _REFUSALS[kernel](q, mask) if kernel else None
        kernel_name = kernel if kernel and not refusal else "xla"
        reason = f": {kernel} {refusal}" if refusal else ""
    elif implementation in _REFUSALS and (refusal := _REFUSALS[implementation](q, mask)):
        raise UserError(f"model.attention={implementation} {refusal}; set model.attention=auto.")
    kind = f"{'causal ' * mask.causal}{'packed ' * (mask.segments is not None)}attention"
    kind += " with keys beside" * bool(mask.keys_beside)
    _log_once(f"{kind} with heads of {q.shape[-1]} in {q.dtype}: {kernel_name}{reason}")
    return _KERNELS[kernel_name](q, k, v, mask)


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
    if mask.causal or mask.segments is not None or q.shape[1] % 2 == 0:
        # Per device, because jax refuses queries, keys, values and masks that XLA has split in different ways.
        return _by_device(functools.partial(_cudnn_even, causal=mask.causal), q, k, v, mask.segments)
    return _cudnn_odd(q, k, v)


def _cudnn_even(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, causal: bool = False
) -> jax.Array:
    """cuDNN's attention, padded to an even length, because jax refuses gradients at odd ones."""
    length = q.shape[1]
    padding = (0, 0), (0, length % 2)
    q, k, v = (jnp.pad(x, (*padding, (0, 0), (0, 0))) for x in (q, k, v))
    # Padding at the right is hidden by the causal mask, a segment of its own, or the number of keys.
    allowed = lengths = None
    if segments is not None:
        segments = jnp.pad(segments, padding, constant_values=-1)
        allowed = Mask(segments=segments).dense(jnp.arange(q.shape[1]), q.shape[1])
    elif length % 2 and not causal:
        lengths = jnp.full(len(q), length, jnp.int32)
    out = jax.nn.dot_product_attention(
        q, k, v, mask=allowed, is_causal=causal, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return out[:, :length]


@jax.custom_vjp
def _cudnn_odd(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """cuDNN's attention without a mask, padded only where gradients are needed (a trainable tower)."""

    def local(q: jax.Array, k: jax.Array, v: jax.Array, segments: None) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")

    return _by_device(local, q, k, v, None)


_cudnn_odd.defvjp(
    lambda q, k, v: jax.vjp(lambda q, k, v: _by_device(_cudnn_even, q, k, v, None), q, k, v),
    lambda pull_back, cotangent: pull_back(cotangent),
)


def _cudnn_refusal(q: jax.Array, mask: Mask) -> str | None:
    if platform() != "gpu":
        return "needs a GPU"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"does not compute in {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"does not support heads of size {q.shape[-1]}"
    if mask.segments is not None and jax.__version_info__ < (0, 11, 2):
        # Conversations are kept apart by a mask [B, 1, T, T]. Older versions have cuDNN compute its gradient, for which
        # it takes scratch memory for all scores, [B, H, T, T].
        return "needs jax 0.11.2 for packed conversations"
    if mask.keys_beside:
        return "does not support keys beside a row"
    return None


def _by_device(
    kernel: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None
) -> jax.Array:
    """Applies a kernel to each device's rows and heads."""
    rows = PartitionSpec(("data", "fsdp"))
    heads = PartitionSpec(("data", "fsdp"), None, "tensor")
    if not jax.sharding.get_abstract_mesh().empty:
        # check_vma is off because Pallas does not declare over which mesh axes its outputs vary.
        kernel = jax.shard_map(kernel, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
    return kernel(q, k, v, segments)


_LANES = 128  # lanes of a TPU's vector registers; splash's blocks are multiples of it
_BLOCKS = 512, 384, 640, 768, 896, 256  # sides of splash's blocks, in positions, in order of preference


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
    """Pallas' splash attention on each device's rows and heads."""
    from jax.experimental.pallas.ops.tpu import splash_attention  # takes a third of a second to import

    length = q.shape[1]
    padded, block = _splash_blocks(length)
    # Padding at the right is hidden by the causal mask.
    q, k, v = (jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0))) for x in (q, k, v))
    sizes = splash_attention.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    segments = None
    if mask.segments is not None:
        segments = jnp.pad(mask.segments, ((0, 0), (0, padded - length)), constant_values=-1)

    def local(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None) -> jax.Array:
        heads = [splash_attention.CausalMask((padded, padded))] * q.shape[2]
        kernel = splash_attention.make_splash_mha(
            splash_attention.MultiHeadMask(heads),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=KEPT_ATTENTION,
            interpret=platform() == "cpu",
        )

        def row(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None) -> jax.Array:
            ids = None if segments is None else splash_attention.SegmentIds(segments, segments)
            return kernel(q, k, v, segment_ids=ids)

        scaled = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
        q, k, v = (x.swapaxes(1, 2) for x in (scaled, k, v))
        return jax.vmap(row)(q, k, v, segments).swapaxes(1, 2)

    return _by_device(local, q, k, v, segments)[:, :length]


def _splash_blocks(length: int) -> tuple[int, int]:
    """Chooses the padded length of rows and the side of the blocks that divide it.

    Small blocks leave a TPU's matrix units idle. Lengths that only they divide, such as 1,408 (11 × 128), are padded.
    """
    padded = -(-length // _LANES) * _LANES
    if padded <= min(_BLOCKS):
        return padded, padded
    return next((p, block) for p in itertools.count(padded, _LANES) for block in _BLOCKS if p % block == 0)


def _splash_refusal(q: jax.Array, mask: Mask) -> str | None:
    if platform() == "gpu":
        return "needs a TPU"
    if not mask.causal:
        return "supports only causal attention"
    if mask.keys_beside:
        return "does not support keys beside a row"
    if q.shape[-1] % 64:
        return f"does not support heads of size {q.shape[-1]}"
    return None


_QUERY_BLOCK = 512  # queries per block of a long row
_MAX_SPANS = 4  # spans of a short row, each of at least 64 queries


def _xla(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
    rows, length, heads, size = q.shape
    kv_heads, beside = k.shape[2], mask.keys_beside
    # Heads come first, and the query heads of a kv head are stacked. Both products are then of plain matrices, and
    # scores are never copied into another layout (on a CPU, that and softmax would take longer than the products).
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))

    def attend_span(positions: jax.Array, q: jax.Array, visible: int) -> jax.Array:
        """Attends from the queries at these positions to the keys beside and those of the first ``visible`` ones."""
        allowed = mask.dense(positions, visible)
        visible += beside
        stacked = q.reshape(rows, kv_heads, -1, size)
        scores = jnp.einsum("bkqd,bksd->bkqs", stacked, k[:, :, :visible], preferred_element_type=jnp.float32)
        scores *= size**-0.5
        if allowed is not None:
            by_head = scores.reshape(*q.shape[:3], visible)
            scores = jnp.where(allowed, by_head, -jnp.inf).reshape(scores.shape)
        # Softmax with the division after the product, so that it is over [Q, Dh] instead of [Q, T], backward too.
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        output = jnp.einsum("bkqs,bksd->bkqd", weights.astype(v.dtype), v[:, :, :visible])
        return (output / weights.sum(-1, keepdims=True)).astype(v.dtype).reshape(q.shape)

    if length <= 2 * _QUERY_BLOCK:
        # Keys to the right of a span are hidden by the causal mask and not computed: four spans save 3/8 of the work.
        count = max(1, min(_MAX_SPANS, length // 64)) if mask.causal else 1
        bounds = [length * i // count for i in range(count + 1)]
        spans = itertools.pairwise(bounds)
        parts = [attend_span(jnp.arange(start, stop), q[:, :, start:stop], stop) for start, stop in spans]
        return jnp.concatenate(parts, axis=2).swapaxes(1, 2)
    # One block of queries at a time, backward too, so that the full [T, T] scores are never in memory.
    blocks = -(-length // _QUERY_BLOCK)
    queries = jnp.minimum(jnp.arange(blocks * _QUERY_BLOCK), length - 1).reshape(blocks, _QUERY_BLOCK)
    block = jax.checkpoint(lambda part: attend_span(part, q[:, :, part], length), prevent_cse=False)
    parts = jax.lax.map(block, queries)  # [blocks, B, H, Q, Dh]
    return parts.transpose(1, 0, 3, 2, 4).reshape(rows, -1, heads, size)[:, :length]


@functools.cache
def _log_once(message: str) -> None:
    if jax.process_index() == 0:
        logging.getLogger(__name__).info(message)


_KERNELS: dict[str, Callable[[jax.Array, jax.Array, jax.Array, Mask], jax.Array]] = {
    "cudnn": _cudnn,
    "splash": _splash,
    "xla": _xla,
}
_REFUSALS: dict[str, Callable[[jax.Array, Mask], str | None]] = {"cudnn": _cudnn_refusal, "splash": _splash_refusal}


def reference_attention(
    q: Float[Array, "B T H Dh"], k: Float[Array, "B S K Dh"], v: Float[Array, "B S K Dh"], mask: Mask
) -> Float[Array, "B T H Dh"]:
    """Attention by its definition, all in float32, which the kernels are tested against."""
    values = jnp.repeat(v, q.shape[2] // k.shape[2], axis=2).astype(jnp.float32)
    weights = attention_weights(q, k, mask)

    def product(weights: jax.Array, values: jax.Array) -> jax.Array:
        return jnp.einsum("bhqk,bkhd->bqhd", weights, values, precision="highest")

    with _causal_scope(mask):
        out = product(weights[..., mask.keys_beside :], values[:, mask.keys_beside :])
    if mask.keys_beside:
        out += product(weights[..., : mask.keys_beside], values[:, : mask.keys_beside])
    return out.astype(v.dtype)


def attention_weights(
    q: Float[Array, "B T H Dh"], k: Float[Array, "B S K Dh"], mask: Mask
) -> Float32[Array, "B H T S"]:
    """The weight that each query gives to each key, by definition: rows sum to one. S = E + T where there is a mask."""
    q, k = q.astype(jnp.float32), jnp.repeat(k, q.shape[2] // k.shape[2], axis=2).astype(jnp.float32)

    def product(k: jax.Array) -> jax.Array:
        return jnp.einsum("bqhd,bkhd->bhqk", q, k, precision="highest") * q.shape[-1] ** -0.5

    with _causal_scope(mask):
        scores = product(k[:, mask.keys_beside :])
    if mask.keys_beside:
        scores = jnp.concatenate([product(k[:, : mask.keys_beside]), scores], axis=-1)
    allowed = mask.dense(jnp.arange(q.shape[1]), q.shape[1])
    if allowed is not None:
        scores = jnp.where(allowed, scores, -jnp.inf)
    return jax.nn.softmax(scores, axis=-1)


def _causal_scope(mask: Mask) -> contextlib.AbstractContextManager[Any]:
    """The scope of products of which half counts: all keys beside count."""
    return jax.named_scope(CAUSAL) if mask.causal else contextlib.nullcontext()


def cached_attention(
    q: Float[Array, "B 1 H Dh"],
    keys: Float[Array, "B K S Dh"],
    values: Float[Array, "B K S Dh"],
    filled: Bool[Array, "B S"],
) -> Float[Array, "B 1 H Dh"]:
    """Attention from one position per row to the filled slots of a cache, softmax in float32.

    The cache is read at every step, so its layout is one that neither product has to transpose.

    Args:
      q: queries.
      keys, values: the cache.
      filled: the slots to attend to, at least one True per row.

    Returns:
      The output in q's type.
    """
    rows, _, heads, size = q.shape
    groups = q.reshape(rows, keys.shape[1], -1, size)
    scores = jnp.einsum("bkgd,bksd->bkgs", groups, keys, preferred_element_type=jnp.float32) * size**-0.5
    weights = jax.nn.softmax(jnp.where(filled[:, None, None], scores, -jnp.inf), axis=-1)
    output = jnp.einsum("bkgs,bksd->bkgd", weights.astype(values.dtype), values)
    return output.reshape(rows, 1, heads, size)
