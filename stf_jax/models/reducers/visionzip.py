"""VisionZip (arXiv 2412.04467, section 3): patches are selected and merged in the tower, before a per-patch projector.

*Dominant* patches get the most attention from the class token, averaged over heads, in the deepest block that the
fusion reads (the last but one in LLaVA, as in the authors' program). Without a class token, as in SigLIP, attention
from all patches is averaged. Among the other patches, evenly spaced ones are *targets*, and each of the rest is
assigned to the target with the most similar key (averaged over heads, by cosine). A *contextual* token is a target plus
the mean of the patches assigned to it, added as in the authors' program. The dominant tokens come first, in row-major
order, then the contextual ones, also as there. The authors use 54 and 10 of 64, and this proportion is kept here. In
their program the class token is one of the 54; here a 54th patch takes its place, because no projector was trained to
read the class token. One patch fewer is left for the rest, so most contextual tokens differ too.

It acts before the decoder and needs attention of one block of the tower. Its own cost is the keys of that block, and
the queries of the class token: a twelfth of a block. Without a class token it is the queries of all patches and their
scores, about a fifth of a block of SigLIP so400m.

Axis letters: B images, P patches, S tokens in the tower (P, one more with a class token), C tower width, H heads,
Dh head size.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, UInt8

from stf_jax.config import FusionConfig, UserError
from stf_jax.models.fusions.base import tapped_blocks
from stf_jax.models.reducers.base import PatchReducer
from stf_jax.models.towers.base import VisionConfig, find_tower_class
from stf_jax.models.towers.vit import VisionTower

_CONTEXTUAL = 10 / 64  # fraction of the tokens


def contextual_tokens(keep: int) -> int:
    """The number of tokens that are contextual; the others are dominant."""
    return round(keep * _CONTEXTUAL)


def visionzip(
    tower: VisionTower, images: UInt8[Array, "B H W 3"], taps: tuple[int, ...], dtype: DTypeLike, keep: int
) -> tuple[Float[Array, "B {keep} C"], ...]:
    """Like the tower's call, but each state has ``keep`` tokens, dominant and contextual ones.

    The deepest block decides for all taps. Its keys and queries are recomputed from its input, which leaves the tower
    itself unchanged.
    """
    deepest = max(taps)
    *states, block_input = tower.states(images, (*taps, deepest - 1), dtype)
    with jax.named_scope("vision"), jax.named_scope("visionzip"):
        received, keys = attention_received(tower, block_input, deepest)
        first = int(tower.config.class_token)
        return merge_visionzip(received, keys, tuple(state[:, first:] for state in states), keep)


def attention_received(
    tower: VisionTower, x: Float[Array, "B S C"], block: int
) -> tuple[Float32[Array, "B P"], Float[Array, "B P Dh"]]:
    """The attention that each patch gets in a block from the class token, or without one from all patches on average.

    Args:
      x: the input of the block.
      block: its number, from 1.

    Returns:
      Attention and keys, both averaged over heads.
    """
    graph, stacked = nnx.split(tower.blocks)
    layer = nnx.merge(graph, jax.tree.map(lambda p: p[block - 1], stacked))
    first = int(tower.config.class_token)
    x = layer.attention_norm(x)
    q, k = layer.attention.query(x[:, :1] if first else x), layer.attention.key(x)
    scores = jnp.einsum("bqhd,bshd->bhqs", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    return jax.nn.softmax(scores, axis=-1).mean((1, 2))[:, first:], k.mean(2)[:, first:]


def merge_visionzip(
    received: Float[Array, "B P"],
    keys: Float[Array, "B P Dh"],
    states: tuple[Float[Array, "B P C"], ...],
    keep: int,
) -> tuple[Float[Array, "B {keep} C"], ...]:
    """Reduces states to dominant and contextual tokens, with the same choice for all states.

    Args:
      received: the attention by which dominant tokens are chosen; among equals the first are chosen.
      keys: measure the similarity of the other patches.
      states: of all tapped blocks.
      keep: tokens in the result.
    """
    contextual = contextual_tokens(keep)
    order = jnp.argsort(-received, axis=1)
    dominant, remainder = (jnp.sort(part, axis=1) for part in jnp.split(order, [keep - contextual], axis=1))
    if not contextual:
        return tuple(_gather_tokens(state, dominant) for state in states)
    step = remainder.shape[1] // contextual
    is_target = np.isin(np.arange(remainder.shape[1]), step * np.arange(contextual))
    targets, others = remainder[:, is_target], remainder[:, ~is_target]
    keys = keys.astype(jnp.float32)
    keys = keys / jnp.linalg.norm(keys, axis=-1, keepdims=True)
    similarity = jnp.einsum("bod,btd->bot", _gather_tokens(keys, others), _gather_tokens(keys, targets))
    assignment = jax.nn.one_hot(similarity.argmax(-1), contextual, dtype=states[0].dtype)
    counts = jnp.maximum(assignment.sum(1, dtype=jnp.float32), 1)[:, :, None]

    def merge_state(state: jax.Array) -> jax.Array:
        total = jnp.einsum(
            "bot,boc->btc", assignment, _gather_tokens(state, others), preferred_element_type=jnp.float32
        )
        tokens = _gather_tokens(state, targets) + (total / counts).astype(state.dtype)
        return jnp.concatenate([_gather_tokens(state, dominant), tokens], axis=1)

    return tuple(merge_state(state) for state in states)


def _gather_tokens(x: jax.Array, indices: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, indices[:, :, None], axis=1)


def check_tower(config: FusionConfig, vision: VisionConfig, keep: int) -> None:
    """Raises UserError if the tower's attention cannot be read, or the fusion reads no block of it."""
    del keep
    if not issubclass(find_tower_class(vision), VisionTower):
        raise UserError(f"reduce=visionzip reads the attention of a VisionTower, which {vision.family} is not.")
    if tapped_blocks(config, vision.layers)[0] == 0:
        raise UserError("reduce=visionzip needs a tapped block, but model.fusion.taps=(0,) taps only the embedding.")


COMPONENTS = {"visionzip": PatchReducer(visionzip, check_tower)}
