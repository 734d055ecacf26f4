"""The compiled programs that answer prompts: read a batch of prompts, then repeatedly sample a token and read it.

Prompts of unequal length are padded at the right to one length T, so that reading them needs only causal attention and
gives the same numbers as reading each by itself. New tokens take the slots from T on in all rows, whatever their
positions. So a step writes one slice of the cache, and a mask excludes the padding:

    prompt of 3 in T = 5, two new tokens    slots      a b c . . d e
                                            positions  0 1 2     3 4

Axis letters: B rows, T positions of prompts, G slots for new tokens, S = T + G, K kv heads, Dh head size, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stf_jax.checkpointing.checksum import checksum, host_checksum, is_quick_on_host
from stf_jax.models.blueprint import Blueprint
from stf_jax.models.decoders.transformer import Cache
from stf_jax.models.layers import shard_rows
from stf_jax.models.reducers.base import Reduction
from stf_jax.models.vlm import VLM
from stf_jax.parallel.mesh import BATCH

BLOCKS = "llm/blocks/"
Leaf = TypeVar("Leaf")
Weights = Mapping[str, jax.Array | tuple[jax.Array, ...]]  # by path; a tuple of one array per layer for decoder blocks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is sampled. Values may also be arrays of one number, so that no value is compiled into a program.

    The order is that of transformers: divide by the temperature, keep the ``top_k`` most likely tokens, then the fewest
    of these whose probabilities sum to ``top_p``, and draw.
    """

    temperature: float | jax.Array = 0.0  # 0: the most likely token
    top_p: float | jax.Array = 1.0  # 1: all
    top_k: int | jax.Array = 0  # 0: all
    seed: int | jax.Array = 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState(Generic[Leaf]):
    """The state of a batch of answers. Finished rows keep emitting a stop token."""

    cache: tuple[tuple[Leaf, Leaf], ...]  # [B, K, S, Dh], a pair per layer; S may be less in later layers
    lengths: Leaf  # int32 [B], of the prompts
    image_counts: Leaf  # int32 [B], of the prompts
    output_ids: Leaf  # int32 [B, G]
    count: Leaf  # int32: new tokens so far; the last of them is not in the cache yet
    done: Leaf  # bool [B]


@dataclasses.dataclass(frozen=True)
class TokenRules:
    """Token ids that end an answer, and ids that are never sampled."""

    stops: tuple[int, ...]
    suppressed_tokens: tuple[int, ...]

    def is_stop(self, tokens: jax.Array) -> jax.Array:
        """Which of the tokens end an answer."""
        return jnp.isin(tokens, jnp.array(self.stops))


def state_shardings(mesh: Mesh) -> DecodeState[NamedSharding]:
    """Shardings of a state; the cache's applies to each of its arrays."""
    rows, replicated = NamedSharding(mesh, BATCH), NamedSharding(mesh, PartitionSpec())
    cache: Any = NamedSharding(mesh, PartitionSpec(*BATCH, "tensor"))  # a prefix of the tree of caches
    # The output is replicated on every host, because all of them must make the same decision when to stop.
    return DecodeState(cache, rows, rows, output_ids=replicated, count=replicated, done=replicated)


def make_programs(
    rules: TokenRules, plan: Blueprint, mesh: Mesh
) -> tuple[jax.stages.Wrapped, jax.stages.Wrapped, jax.stages.Wrapped]:
    """Jitted :func:`prefill`, :func:`extend` and :func:`extend_capacity` for a mesh, compiled when first called.

    They take the arguments after ``rules`` and ``plan``. The state's memory is donated to ``extend``.
    """

    def jit(call: Callable[..., DecodeState[jax.Array]], *fixed: Blueprint, **jit_options: Any) -> jax.stages.Wrapped:
        return jax.jit(functools.partial(call, rules, *fixed), out_shardings=state_shardings(mesh), **jit_options)

    return (
        jit(prefill, plan, static_argnums=0),
        jit(extend, plan, donate_argnums=1),
        jit(extend_capacity, static_argnums=0),
    )


def split_layers(
    path: str, value: jax.Array, dtype: jnp.dtype, mesh: Mesh, spec: PartitionSpec
) -> tuple[jax.Array | tuple[jax.Array, ...], int]:
    """Converts a parameter to its form in :data:`Weights` and to ``dtype``; also returns its checksum.

    A stack of decoder layers is split, because slicing it at every step would copy each layer, which takes longer than
    using it.
    """
    is_stacked = path.startswith(BLOCKS)
    sharding = NamedSharding(mesh, PartitionSpec(*spec[int(is_stacked) :]))
    if is_quick_on_host(value):
        host = jax.device_get(value).astype(dtype)
        return jax.device_put(tuple(host) if is_stacked else host, sharding), host_checksum(host)
    converted, total = _compile_split(dtype, sharding, is_stacked)(value)
    return converted, int(total)


@functools.cache
def _compile_split(dtype: jnp.dtype, sharding: NamedSharding, is_stacked: bool) -> jax.stages.Wrapped:
    def split(x: jax.Array) -> tuple[jax.Array | tuple[jax.Array, ...], jax.Array]:
        x = x.astype(dtype)
        return (tuple(x) if is_stacked else x), checksum(x)

    replicated = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.jit(split, out_shardings=(sharding, replicated))


def merge_weights(plan: Blueprint, weights: Weights) -> VLM:
    """The model with these weights, inside a compiled program."""
    # The compiler replaces each slice of a stack by the array that was stacked, so nothing is copied.
    return plan.merge({path: jnp.stack(x) if isinstance(x, tuple) else x for path, x in weights.items()})


def prefill(
    rules: TokenRules,
    plan: Blueprint,
    capacity: int,
    weights: Weights,
    tokens: jax.Array,
    slots: jax.Array,
    lengths: jax.Array,
    images: jax.Array,
    sampling: Sampling,
) -> DecodeState[jax.Array]:
    """Reads prompts and samples the first token of each answer.

    Args:
      capacity: G.
      tokens, slots, lengths, images: as for :meth:`stf_jax.models.vlm.VLM.prefill`; a row of length 0 is done from the
        start.
    """
    model = merge_weights(plan, weights)
    last, cache, image_counts = model.prefill(tokens, slots, lengths, images)
    first = sample_token(rules, model.llm.logits(last), sampling, jnp.int32(0))
    output_ids = jnp.full((len(tokens), capacity), rules.stops[0], jnp.int32).at[:, 0].set(first)
    return DecodeState(
        _pad_cache(cache, capacity),
        lengths,
        image_counts,
        output_ids,
        jnp.int32(1),
        rules.is_stop(first) | (lengths == 0),
    )


def extend(
    rules: TokenRules,
    plan: Blueprint,
    weights: Weights,
    state: DecodeState[jax.Array],
    limit: jax.Array,
    sampling: Sampling,
) -> DecodeState[jax.Array]:
    """Samples further tokens, until all rows are done or ``limit`` (at most G) tokens are sampled."""
    capacity = state.output_ids.shape[1]

    def cache_lengths(reduction: Reduction, layer: int) -> jax.Array:
        """Prompt positions in the cache of that layer."""
        dropped = reduction.dropped_before(layer)
        return state.lengths - state.image_counts * dropped if dropped else state.lengths

    def find_slots(reduction: Reduction, layer: int, newest: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The slot of the new token in that layer, and the slots that it attends to."""
        slots = jnp.arange(state.cache[layer][0].shape[2])
        slot, lengths = len(slots) - capacity + newest, cache_lengths(reduction, layer)
        return slot, (slots < lengths[:, None]) | ((slots >= len(slots) - capacity) & (slots <= slot))

    def find_positions(reduction: Reduction, newest: jax.Array) -> list[jax.Array]:
        """The position of the new token in each layer: one array for all layers where it is the same."""
        by_dropped = {reduction.position_shift(layer): layer for layer in range(len(state.cache))}
        found = {
            shift: (cache_lengths(reduction, layer) if shift else state.lengths)[:, None] + newest
            for shift, layer in by_dropped.items()
        }
        return [found[reduction.position_shift(layer)] for layer in range(len(state.cache))]

    def step(state: DecodeState[jax.Array]) -> DecodeState[jax.Array]:
        model = merge_weights(plan, weights)
        newest = state.count - 1
        token = jax.lax.dynamic_slice_in_dim(state.output_ids, newest, 1, axis=1)
        x = shard_rows(model.llm.embed(token, model.dtype))
        slots = [find_slots(model.reduction, layer, newest) for layer in range(len(state.cache))]
        hidden, cache = model.llm.extend(x, find_positions(model.reduction, newest), state.cache, slots)
        next_token = sample_token(rules, model.llm.logits(hidden[:, 0]), sampling, state.count)
        next_token = jnp.where(state.done, rules.stops[0], next_token)
        output_ids = jax.lax.dynamic_update_slice(state.output_ids, next_token[:, None], (0, state.count))
        return DecodeState(
            cache,
            state.lengths,
            state.image_counts,
            output_ids,
            state.count + 1,
            state.done | rules.is_stop(next_token),
        )

    return jax.lax.while_loop(lambda state: (state.count < limit) & ~state.done.all(), step, state)


def extend_capacity(rules: TokenRules, capacity: int, state: DecodeState[jax.Array]) -> DecodeState[jax.Array]:
    """The same state with G = ``capacity``, which must be larger than before."""
    extra = capacity - state.output_ids.shape[1]
    output_ids = jnp.pad(state.output_ids, ((0, 0), (0, extra)), constant_values=rules.stops[0])
    return dataclasses.replace(state, cache=_pad_cache(state.cache, extra), output_ids=output_ids)


def _pad_cache(cache: Cache, extra: int) -> Cache:
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, extra), (0, 0))), cache)


def sample_token(rules: TokenRules, logits: jax.Array, sampling: Sampling, step: jax.Array) -> jax.Array:
    """Samples one token per row, int32 [B], from float32 logits [B, V].

    The random draws of a row depend on the seed, the step and its index in the batch.
    """
    if rules.suppressed_tokens:
        logits = jnp.where(np.isin(np.arange(logits.shape[-1]), rules.suppressed_tokens), -jnp.inf, logits)

    def draw() -> jax.Array:
        scaled = logits / jnp.maximum(sampling.temperature, 1e-6)
        order = jnp.argsort(-scaled, axis=-1)
        ranked = jnp.take_along_axis(scaled, order, axis=-1)
        top_k = jnp.where(sampling.top_k > 0, sampling.top_k, ranked.shape[-1])
        ranked = jnp.where(jnp.arange(ranked.shape[-1]) < top_k, ranked, -jnp.inf)
        probabilities = jax.nn.softmax(ranked, axis=-1)
        mass_above = jnp.cumsum(probabilities, axis=-1) - probabilities
        # It is 0 for the most likely token, which is always kept.
        ranked = jnp.where((mass_above < sampling.top_p) | (mass_above == 0), ranked, -jnp.inf)
        key = jax.random.fold_in(jax.random.key(sampling.seed), step)
        keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(logits.shape[0]))
        rank = jax.vmap(jax.random.categorical)(keys, ranked)
        return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)

    return jax.lax.cond(sampling.temperature > 0, draw, lambda: logits.argmax(-1).astype(jnp.int32))
