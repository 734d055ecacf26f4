"""What runs on the devices to answer prompts: read them once, then choose a token, read it, choose the next.

Prompts of unequal length are filled up at their right to one length T, so that reading them is plain causal attention,
the same numbers as alone. New tokens share the slots from T on in all rows, whatever their positions; so a step writes
one slice of the cache, and a mask leaves the filling out:

    prompt of 3 in T = 5, two new tokens    slots      a b c . . d e
                                            positions  0 1 2     3 4

Axis letters: B rows, T positions of prompts, G slots for new tokens, S = T + G, K kv heads, Dh head size, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stf_jax.models.layers import shard_rows
from stf_jax.models.llm import Cache
from stf_jax.models.selection import FULL_LAYERS
from stf_jax.models.vlm import VLM
from stf_jax.runtime.checksum import checksum
from stf_jax.runtime.mesh import BATCH
from stf_jax.training.state import Blueprint

BLOCKS = "llm/blocks/"
Weights = Mapping[str, jax.Array | tuple[jax.Array, ...]]  # by path; those of decoder layers one array a layer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is chosen; numbers, or arrays of one number, so that none of them is compiled in.

    The order is transformers': divide by the temperature, keep the ``top_k`` most likely, of these the fewest whose
    probabilities sum to ``top_p``, draw.
    """

    temperature: float = 0.0  # 0: the most likely token
    top_p: float = 1.0  # 1: all
    top_k: int = 0  # 0: all
    seed: int = 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Where a batch of answers stands. A row that is done says nothing but a stop token."""

    cache: Cache  # [B, K, S, Dh], a pair a layer; S may be less after FULL_LAYERS
    lengths: jax.Array  # int32 [B], of the prompts
    held: jax.Array  # int32 [B], what decoder layers after FULL_LAYERS hold of them
    said: jax.Array  # int32 [B, G]
    count: jax.Array  # int32: tokens said; the last of them is not in the cache yet
    done: jax.Array  # bool [B]


@dataclasses.dataclass(frozen=True)
class Rules:
    """What of the tokenizer matters here: ids that end an answer, and ids that are never said."""

    stops: tuple[int, ...]
    unsayable: tuple[int, ...]

    def ends(self, tokens: jax.Array) -> jax.Array:
        """Which of the tokens end an answer."""
        return jnp.isin(tokens, jnp.array(self.stops))


def places(mesh: Mesh) -> State:
    """Where the parts of a state lie, the cache's as each of its arrays."""
    rows, whole = NamedSharding(mesh, BATCH), NamedSharding(mesh, PartitionSpec())
    cache = NamedSharding(mesh, PartitionSpec(*BATCH, "tensor"))
    # What is said is whole on every host, for all of them decide alike when to end.
    return State(cache, rows, rows, said=whole, count=whole, done=whole)


def programs(rules: Rules, plan: Blueprint, mesh: Mesh) -> tuple[Callable, Callable, Callable]:
    """:func:`prefill`, :func:`extend` and :func:`grow` for that mesh, to be compiled when they are called.

    They take what those take after ``rules`` and ``plan``; ``extend`` takes the state's memory over.
    """

    def compiled(call, *fixed, **how):
        return jax.jit(functools.partial(call, rules, *fixed), out_shardings=places(mesh), **how)

    return (
        compiled(prefill, plan, static_argnums=0),
        compiled(extend, plan, donate_argnums=1),
        compiled(grow, static_argnums=0),
    )


def layerwise(
    path: str, value: jax.Array, dtype: jnp.dtype, mesh: Mesh, spec: PartitionSpec
) -> tuple[jax.Array | tuple[jax.Array, ...], int]:
    """A parameter as :data:`Weights` hold it (of a decoder block, layer by layer), in that type; and its checksum.

    Layers that lie in one array would be copied out of it at every step, which takes longer than to use them.
    """
    apart = path.startswith(BLOCKS)
    place = NamedSharding(mesh, PartitionSpec(*spec[int(apart) :]))
    value, total = _taken(dtype, place, apart)(value)
    return value, int(total)


@functools.cache
def _taken(dtype, place, apart):
    def take(x):
        x = x.astype(dtype)
        return (tuple(x) if apart else x), checksum(x)

    whole = NamedSharding(place.mesh, PartitionSpec())
    return jax.jit(take, out_shardings=(place, whole))


def merged(plan: Blueprint, weights: Weights) -> VLM:
    """The model with those weights, inside a compiled program."""
    # The compiler takes each layer's slice of a stack for the array that was stacked, and stacks nothing.
    return plan.merge({path: jnp.stack(x) if isinstance(x, tuple) else x for path, x in weights.items()})


def prefill(
    rules: Rules, plan: Blueprint, room: int, weights: Weights, tokens, slots, lengths, images, sampling: Sampling
) -> State:
    """Reads prompts and says the first token of each answer.

    Args:
      room: G.
      tokens, slots, lengths, images: as :meth:`stf_jax.models.vlm.VLM.prefill` takes them; a row of none is done from
        the start.
    """
    model = merged(plan, weights)
    last, cache, held = model.prefill(tokens, slots, lengths, images)
    first = choose(rules, model.llm.logits(last), sampling, jnp.int32(0))
    said = jnp.full((len(tokens), room), rules.stops[0], jnp.int32).at[:, 0].set(first)
    return State(_longer(cache, room), lengths, held, said, jnp.int32(1), rules.ends(first) | (lengths == 0))


def extend(rules: Rules, plan: Blueprint, weights: Weights, state: State, most: jax.Array, sampling: Sampling) -> State:
    """Says further tokens, until all rows are done or ``most`` (at most G) are said."""
    room = state.said.shape[1]

    def place(layer, last):
        """The new token's slot in that layer, and the slots that it looks at."""
        slots = jnp.arange(state.cache[layer][0].shape[2])
        slot = len(slots) - room + last
        held = state.lengths if layer < FULL_LAYERS else state.held
        return slot, (slots < held[:, None]) | ((slots >= len(slots) - room) & (slots <= slot))

    def step(state: State) -> State:
        model = merged(plan, weights)
        last = state.count - 1
        token = jax.lax.dynamic_slice_in_dim(state.said, last, 1, axis=1)
        x = shard_rows(model.llm.embed(token, model.dtype))
        places = [place(layer, last) for layer in range(len(state.cache))]
        hidden, cache = model.llm.extend(x, state.lengths[:, None] + last, state.cache, places)
        chosen = choose(rules, model.llm.logits(hidden[:, 0]), sampling, state.count)
        chosen = jnp.where(state.done, rules.stops[0], chosen)
        said = jax.lax.dynamic_update_slice(state.said, chosen[:, None], (0, state.count))
        return State(cache, state.lengths, state.held, said, state.count + 1, state.done | rules.ends(chosen))

    return jax.lax.while_loop(lambda state: (state.count < most) & ~state.done.all(), step, state)


def grow(rules: Rules, room: int, state: State) -> State:
    """The same state with G = ``room``, more than it had."""
    more = room - state.said.shape[1]
    said = jnp.pad(state.said, ((0, 0), (0, more)), constant_values=rules.stops[0])
    return dataclasses.replace(state, cache=_longer(state.cache, more), said=said)


def _longer(cache, more):
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))), cache)


def choose(rules: Rules, logits: jax.Array, sampling: Sampling, step: jax.Array) -> jax.Array:
    """A token a row, int32 [B], of float32 logits [B, V].

    A row's draws depend on the seed, the step and its place in the batch.
    """
    if rules.unsayable:
        logits = jnp.where(np.isin(np.arange(logits.shape[-1]), rules.unsayable), -jnp.inf, logits)

    def draw():
        kept = logits / jnp.maximum(sampling.temperature, 1e-6)
        order = jnp.argsort(-kept, axis=-1)
        ranked = jnp.take_along_axis(kept, order, axis=-1)
        top_k = jnp.where(sampling.top_k > 0, sampling.top_k, ranked.shape[-1])
        ranked = jnp.where(jnp.arange(ranked.shape[-1]) < top_k, ranked, -jnp.inf)
        shares = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(shares, axis=-1) - shares  # nought for the most likely, which always stays
        ranked = jnp.where((before < sampling.top_p) | (before == 0), ranked, -jnp.inf)
        key = jax.random.fold_in(jax.random.key(sampling.seed), step)
        keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(logits.shape[0]))
        rank = jax.vmap(jax.random.categorical)(keys, ranked)
        return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)

    return jax.lax.cond(sampling.temperature > 0, draw, lambda: logits.argmax(-1).astype(jnp.int32))
