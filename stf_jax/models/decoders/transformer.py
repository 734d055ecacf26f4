"""The language model: one Llama-family decoder for Llama, Vicuna, Mistral, Qwen2, Qwen3 and SmolLM2.

RMSNorm, rotary positions, grouped-query attention, SwiGLU (arXiv 2302.13971); optional biases on query, key and value
(Qwen2), norms on query and key heads (Qwen3), and an output head tied to the embedding.

It reads a complete text (:meth:`Decoder.__call__`, for training), or a prompt and then token by token with a cache of
keys and values (:meth:`Decoder.prefill`, :meth:`Decoder.extend`, for inference/).

Axis letters: B batch, T positions, S slots of a cache, L layers, D width, H heads, K kv heads, Dh head size,
F feed-forward, V vocabulary.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from stf_jax.models.attention import Mask, attention, cached_attention
from stf_jax.models.decoders.base import LLMConfig
from stf_jax.models.decoders.rows import Rows, Selection
from stf_jax.models.layers import (
    KEPT_ATTENTION,
    KEPT_MLP,
    Linear,
    RMSNorm,
    apply_layers,
    normal,
    parameter,
    split_block,
    unroll_layers,
)
from stf_jax.parallel.mesh import constrain


def rope_angles(
    config: LLMConfig, positions: Int[Array, "B T"]
) -> tuple[Float32[Array, "B T 1 half"], Float32[Array, "B T 1 half"]]:
    """Cosines and sines of rotary positions (arXiv 2104.09864), with Llama 3's scaling where configured.

    Always float32: bfloat16 has eight significant bits, so position 257 would become 256. ``half`` is Dh/2.
    """
    half = config.head_dim // 2
    frequencies = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling is not None:
        turns = scaling.original_length * frequencies / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = jnp.clip((turns - low) / (high - low), 0, 1)
        frequencies = keep * frequencies + (1 - keep) * frequencies / scaling.factor
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B T H Dh"], cos: Float32[Array, "B T 1 half"], sin: Float32[Array, "B T 1 half"]
) -> Float[Array, "B T H Dh"]:
    """Applies rotary positions to heads, pairing channel i with i + Dh/2 as transformers does."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def sharded_embedding_lookup(
    table: Float[Array, "V D"], tokens: Int[Array, "B T"], dtype: DTypeLike
) -> Float[Array, "B T D"]:
    """Looks up the embeddings of tokens, in ``dtype``, zeros for −1; the table's gradients are summed in its own type.

    On the active mesh each device looks up its own slice of the widths for the rows of all its ``fsdp`` peers, followed
    by an all-to-all: a batch of embeddings crosses the mesh instead of the table.
    """
    mesh = jax.sharding.get_abstract_mesh()

    def look_up(table: jax.Array, ids: jax.Array) -> jax.Array:
        return table.at[ids].get(mode="fill", fill_value=0, wrap_negative_indices=False).astype(dtype)

    if mesh.empty:
        return look_up(table, tokens)

    def local(table: jax.Array, tokens: jax.Array) -> jax.Array:
        tokens = jax.lax.all_gather(tokens, "fsdp", axis=0, tiled=True)
        rows = look_up(table, tokens - jax.lax.axis_index("tensor") * table.shape[0])
        rows = jax.lax.psum(rows, "tensor")  # zeros from all devices but the one that has the token
        return jax.lax.all_to_all(rows, "fsdp", split_axis=0, concat_axis=2, tiled=True)

    row_spec = PartitionSpec(("data", "fsdp"))
    return jax.shard_map(local, in_specs=(PartitionSpec("tensor", "fsdp"), row_spec), out_specs=row_spec)(table, tokens)


Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (q, k, v) of a layer → [B, T, H, Dh]
BesideLayer = tuple[jax.Array, jax.Array, jax.Array]  # x, cos and sin of the tokens beside, see Beside
Cache = tuple[tuple[jax.Array, jax.Array], ...]  # keys and values of each layer, [B, K, S, Dh]


class Attention(nnx.Module):
    """Grouped-query self-attention; the caller's ``attend`` decides what the queries attend to."""

    def __init__(self, rngs: nnx.Rngs, config: LLMConfig) -> None:
        width, head_dim = (config.width, "embed"), (config.head_dim, "head_dim")
        heads, kv_heads = (config.heads, "heads"), (config.kv_heads, "kv_heads")
        stack, bias = config.layers, config.qkv_bias
        self.query = Linear(rngs, [width], [heads, head_dim], bias=bias, stack=stack)
        self.key = Linear(rngs, [width], [kv_heads, head_dim], bias=bias, stack=stack)
        self.value = Linear(rngs, [width], [kv_heads, head_dim], bias=bias, stack=stack)
        self.out = Linear(rngs, [heads, head_dim], [width], bias=False, stack=stack)
        self.query_norm = RMSNorm(rngs, config.head_dim, config.norm_eps, stack=stack) if config.qk_norm else None
        self.key_norm = RMSNorm(rngs, config.head_dim, config.norm_eps, stack=stack) if config.qk_norm else None

    def __call__(
        self, x: jax.Array, cos: jax.Array, sin: jax.Array, attend: Attend, beside: BesideLayer | None = None
    ) -> jax.Array:
        q, k, v = (checkpoint_name(x, KEPT_ATTENTION) for x in (*self.query_key(x, cos, sin), self.value(x)))
        if beside is not None:
            own, y = (k, v), beside[0]
            more = (checkpoint_name(x, KEPT_ATTENTION) for x in (self.rotated_key(*beside), self.value(y)))
            k, v = (jnp.concatenate(pair, axis=1) for pair in zip(more, own, strict=True))
        return self.out(attend(q, k, v))

    def query_key(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Queries [B, T, H, Dh] and keys [B, T, K, Dh], with rotary positions."""
        q = self.query(x)
        if self.query_norm is not None:
            q = self.query_norm(q)
        return rotate(q, cos, sin), self.rotated_key(x, cos, sin)

    def rotated_key(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        """Keys [B, T, K, Dh], with rotary positions."""
        k = self.key(x)
        return rotate(k if self.key_norm is None else self.key_norm(k), cos, sin)


class MLP(nnx.Module):
    """SwiGLU: ``down(silu(gate(x))·up(x))`` (arXiv 2002.05202)."""

    def __init__(self, rngs: nnx.Rngs, config: LLMConfig) -> None:
        width, hidden = (config.width, "embed"), (config.mlp, "mlp")
        self.gate = Linear(rngs, [width], [hidden], bias=False, stack=config.layers)
        self.up = Linear(rngs, [width], [hidden], bias=False, stack=config.layers)
        self.down = Linear(rngs, [hidden], [width], bias=False, stack=config.layers)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = checkpoint_name(self.gate(x), KEPT_MLP), checkpoint_name(self.up(x), KEPT_MLP)
        return self.down(jax.nn.silu(gate) * up)


class Block(nnx.Module):
    """A pre-norm decoder block, [B, T, D] → [B, T, D]. Holds all layers' parameters; a call sees one layer's."""

    def __init__(self, rngs: nnx.Rngs, config: LLMConfig) -> None:
        self.attention_norm = RMSNorm(rngs, config.width, config.norm_eps, stack=config.layers)
        self.attention = Attention(rngs, config)
        self.mlp_norm = RMSNorm(rngs, config.width, config.norm_eps, stack=config.layers)
        self.mlp = MLP(rngs, config)

    def __call__(
        self, x: jax.Array, cos: jax.Array, sin: jax.Array, attend: Attend, beside: BesideLayer | None = None
    ) -> jax.Array:
        with jax.named_scope("attention"):
            if beside is not None:
                beside = (self.attention_norm(beside[0]), *beside[1:])
            x = x + self.attention(self.attention_norm(x), cos, sin, attend, beside)
        with jax.named_scope("mlp"):
            return x + self.mlp(self.mlp_norm(x))


class Decoder(nnx.Module):
    """A decoder from embeddings to next-token logits; the caller may place image tokens among the embeddings."""

    block: Callable[[nnx.Rngs, LLMConfig], Block] = Block  # another family may have its own

    def __init__(
        self,
        rngs: nnx.Rngs,
        config: LLMConfig,
        *,
        scan: bool = True,
        remat: str = "none",
        attention: str = "auto",
    ) -> None:
        self.config, self.scan, self.remat, self.attention = config, scan, remat, attention
        vocab, width = (config.vocab, "vocab"), (config.width, "embed")
        self.embedding = parameter(rngs, [vocab, width], normal(0.02))
        self.blocks = self.block(rngs, config)
        self.norm = RMSNorm(rngs, config.width, config.norm_eps)
        self.head = None if config.tied else Linear(rngs, [width], [vocab], bias=False, kernel_init=normal(0.02))

    def embed(self, tokens: Int[Array, "B T"], dtype: DTypeLike) -> Float[Array, "B T D"]:
        """Embeddings of tokens in ``dtype``; zeros for −1."""
        return sharded_embedding_lookup(self.embedding[...], tokens, dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"] | None,
        selections: Sequence[Selection] = (),
    ) -> Float[Array, "B T1 D"]:
        """Hidden states after the final norm.

        Args:
          x: embeddings.
          positions: starting at 0 in each segment.
          segments: the conversation of each position; None where each row is one conversation.
          selections: in ascending order of their layers.

        Returns:
          Hidden states, in x's type, of the positions that the last layer reads; :meth:`logits` converts them.
        """

        bounds = [0, *(selection.after for selection in selections if selection.after), self.config.layers]
        sizes = [stop - start for start, stop in itertools.pairwise(bounds)]

        def read(rows: Rows, block: nnx.Module, size: int) -> Rows:
            context = *rope_angles(self.config, rows.positions), self._attend(rows), *self._beside(rows)
            x = apply_layers(block, rows.x, *context, layers=range(size), scan=self.scan, remat=self.remat)
            return dataclasses.replace(rows, x=x)

        with jax.named_scope("llm"):
            rows, parts = Rows(x, positions, segments), zip(split_block(self.blocks, sizes), sizes, strict=True)
            for selection in selections:
                rows = read(rows, *next(parts)) if selection.after else rows
                rows = selection.apply(*self._next_queries_keys(selection, rows), rows)
            return self.norm(read(rows, *next(parts)).x)

    def _attend(self, rows: Rows) -> Attend:
        """What the queries of these rows attend to."""
        visible, silent = None if rows.beside is None else rows.beside.visible, rows.silent
        mask = Mask(causal=True, segments=rows.segments, beside=visible)

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            out = attention(q, k, v, mask, self.attention)
            return out if silent is None else jnp.where(silent[:, :, None, None], 0, out)

        return attend

    def _beside(self, rows: Rows) -> tuple[BesideLayer, ...]:
        """The last argument of a block, if there is one."""
        if rows.beside is None:
            return ()
        return ((rows.beside.x, *rope_angles(self.config, rows.beside.positions)),)

    def _next_queries_keys(self, selection: Selection, rows: Rows) -> tuple[Any, Any]:
        """The queries and keys of the next layer, if they decide a selection, without gradients; else None, twice."""
        if selection.scored_by != "next":
            return None, None
        q, k = self.query_key(rows.x, rows.positions, selection.after)
        return jax.lax.stop_gradient(q), jax.lax.stop_gradient(k)

    def prefill(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        selections: Sequence[Selection] = (),
        *,
        observe: Callable[[Rows, jax.Array, jax.Array], None] | None = None,
    ) -> tuple[Float[Array, "B T1 D"], Cache]:
        """Reads prompts like a call without segments, and keeps each layer's keys and values, one slot per position.

        Args:
          selections: in ascending order of their layers.
          observe: called for each layer with what it reads, and its queries and keys, those beside first.

        Returns:
          Hidden states after the final norm of the positions that the last layer read, and the cache (S = T). Where a
          layer sees tokens beside, its slots are in the order of :attr:`Beside.order`.
        """
        cache: list[tuple[jax.Array, jax.Array]] = []
        last_qk: tuple[Any, Any] = None, None

        def read(rows: Rows, layers: range) -> Rows:
            inner, beside = self._attend(rows), rows.beside

            def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
                nonlocal last_qk
                kept = k, v
                if beside is not None:
                    order = beside.order[:, :, None, None]
                    kept = jnp.take_along_axis(k, order, axis=1), jnp.take_along_axis(v, order, axis=1)
                keys, values = (_constrain_cache(x.swapaxes(1, 2)) for x in kept)
                cache.append((keys, values))
                last_qk = q, k
                if observe is not None:
                    observe(rows, q, k)
                return inner(q, k, v)

            x = self._unroll(rows.x, rows.positions, attend, layers, *self._beside(rows))
            return dataclasses.replace(rows, x=x)

        with jax.named_scope("llm"):
            rows = Rows(x, positions)
            for selection in selections:
                rows = read(rows, range(len(cache), selection.after)) if selection.after > len(cache) else rows
                qk = last_qk if selection.scored_by == "last" else self._next_queries_keys(selection, rows)
                rows = selection.apply(*qk, rows)
            return self.norm(read(rows, range(len(cache), self.config.layers)).x), tuple(cache)

    def extend(
        self,
        x: Float[Array, "B 1 D"],
        positions: Sequence[Int[Array, "B 1"]],
        cache: Cache,
        slots: Iterable[tuple[jax.Array, jax.Array]],
    ) -> tuple[Float[Array, "B 1 D"], Cache]:
        """Reads one more token per row, and writes it to one slot of each layer's cache, the same in all rows.

        A slot is not a position (rotary positions are already applied to the keys), so rows may have gaps.

        Args:
          x: embeddings.
          positions: of the new tokens, for each layer; the same array where they are the same.
          cache: of S slots; S may differ between layers.
          slots: for each layer the slot to write, int32, below S, and the slots to attend to, bool [B, S], the new one
            included.

        Returns:
          Hidden states after the final norm, and the cache.
        """
        layers = zip(cache, slots, strict=True)
        new_cache: list[tuple[jax.Array, jax.Array]] = []

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            layer_cache, (slot, filled) = next(layers)
            pair = zip(layer_cache, (k, v), strict=True)
            keys, values = (
                jax.lax.dynamic_update_slice(old, new.swapaxes(1, 2).astype(old.dtype), (0, 0, slot, 0))
                for old, new in pair
            )
            new_cache.append((_constrain_cache(keys), _constrain_cache(values)))
            return cached_attention(q, keys, values, filled)

        with jax.named_scope("llm"):
            for _, group in itertools.groupby(range(self.config.layers), lambda layer: id(positions[layer])):
                first, *others = group
                x = self._unroll(x, positions[first], attend, range(first, first + 1 + len(others)))
            return self.norm(x), tuple(new_cache)

    def _unroll(
        self, x: jax.Array, positions: jax.Array, attend: Attend, layers: range, *beside: BesideLayer
    ) -> jax.Array:
        """Applies layers one by one, each with its own call of ``attend``, which may keep what it receives."""
        cos, sin = rope_angles(self.config, positions)
        for block in unroll_layers(self.blocks, layers):
            x = block(x, cos, sin, attend, *beside)
        return x

    def query_key(self, x: jax.Array, positions: jax.Array, layer: int) -> tuple[jax.Array, jax.Array]:
        """Queries [B, T, H, Dh] and keys [B, T, K, Dh] of a layer for the hidden states before it."""
        (block,) = unroll_layers(self.blocks, range(layer, layer + 1))
        return block.attention.query_key(block.attention_norm(x), *rope_angles(self.config, positions))

    @property
    def head_kernel(self) -> Float[Array, "_ _"]:
        """The kernel of the output head: [D, V], or for a tied head the embedding, [V, D]."""
        return self.embedding[...] if self.head is None else self.head.kernel[...]

    def logits(self, x: Float[Array, "*axes D"]) -> Float32[Array, "*axes V"]:
        """Logits of hidden states."""
        with jax.named_scope("head"):
            if self.head is None:
                return jnp.einsum("...d,vd->...v", x, self.embedding[...].astype(x.dtype)).astype(jnp.float32)
            return self.head(x).astype(jnp.float32)


def _constrain_cache(x: jax.Array) -> jax.Array:
    """Constrains keys or values of a cache to be split by rows and heads."""
    return constrain(x, ("data", "fsdp"), "tensor")
