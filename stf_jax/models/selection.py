"""Training-free token reduction: fewer image tokens at inference for a model trained with all of them.

**FastV** (arXiv 2403.06764, section 4) drops image tokens inside the decoder. After layer K = 2 it ranks them by the
attention that the prompt's last token pays to them in that layer, averaged over heads; all later layers, and their
caches, hold only the best of them and the text. Kept tokens keep their positions. The authors' program handles one
image in a batch of one; here each row ranks the tokens of all its images together, and keeps ``keep`` times the number
of its images.

**VisionZip** (arXiv 2412.04467, section 3) acts on the tower's states, before a projector that reads them one by one.
*Dominant* patches get the most attention from the class token, averaged over heads, in the deepest block that the
fusion reads (the last but one in LLaVA, as in the authors' program). Without a class token, as in SigLIP, attention
from all patches is averaged. Among the other patches, evenly spaced ones are *targets*, and each of the rest is
assigned to the target with the most similar key (averaged over heads, by cosine). A *contextual* token is a target plus
the mean of the patches assigned to it, added as in the authors' program. The dominant tokens come first, in row-major
order, then the contextual ones, also as there. The authors use 54 and 10 of 64, and this proportion is kept here. They
also keep the class token, which is left out here because no projector was trained to read it.

**Random** keeps a sample of the patches, drawn once and the same for all images: the control that a method must beat.

Axis letters: B rows or images, T positions, M images per row, N image tokens per image, P patches, S tokens in the
tower (P, one more with a class token), C tower width, H heads, K kv heads, Dh head size.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int, UInt8

from stf_jax.config import REDUCTIONS, ModelConfig, UserError, did_you_mean
from stf_jax.models.fusions.base import FUSIONS, find_fusion, tapped_blocks, tokens_per_image
from stf_jax.models.spec import resolve_model
from stf_jax.models.towers.vit import VisionTower

FULL_LAYERS = 2  # FastV's K: decoder layers that read all image tokens
_CONTEXTUAL = 10 / 64  # fraction of VisionZip's tokens


@dataclasses.dataclass(frozen=True)
class Reduction:
    """How many of the image tokens of an image are kept, and where they are dropped."""

    name: str  # "": no reduction | one of REDUCTIONS
    tokens: int  # N, the output of the fusion
    keep: int  # tokens that are kept

    @property
    def slots(self) -> int:
        """Image tokens per image in a prompt."""
        return self.tokens if self.name == "fastv" else self.keep

    @property
    def dropped(self) -> int:
        """Those of :attr:`slots` that decoder layers after :data:`FULL_LAYERS` drop."""
        return self.slots - self.keep


def resolve_reduction(config: ModelConfig) -> Reduction:
    """The reduction that ``config.reduce`` and ``config.keep`` ask for.

    Raises:
      UserError: they do not fit each other or the model, or as :func:`stf_jax.models.fusions.base.tokens_per_image`.
    """
    name, fusion, vision = config.reduce, config.fusion.fusion, resolve_model(config).vision_shape
    if vision is None:
        if name or config.keep:
            raise UserError("A language model alone has no image tokens to reduce.")
        return Reduction("", 0, 0)
    tokens = tokens_per_image(config.fusion, vision.grid)
    if not name:
        if config.keep:
            names = ", ".join(REDUCTIONS)
            raise UserError(f"keep={config.keep} has no effect without reduce: set reduce to one of {names}.")
        return Reduction("", tokens, tokens)
    if name not in REDUCTIONS:
        raise UserError(f"reduce={name!r} is unknown; {did_you_mean(name, REDUCTIONS)}")
    keep = config.keep or max(1, tokens // 4)
    if not 1 <= keep <= tokens:
        raise UserError(f"keep={keep} must be 1 to {tokens}, the image tokens per image of {fusion}.")
    if name == "fastv":
        llm = resolve_model(config).llm_shape
        assert llm is not None  # a model with image tokens to reduce has one
        if llm.layers <= FULL_LAYERS:
            raise UserError(
                f"reduce=fastv acts after decoder layer {FULL_LAYERS}, but {config.llm} has no more layers."
            )
    if name != "fastv" and not find_fusion(config.fusion).spec.per_patch:
        names = ", ".join(name for name, known in FUSIONS.known.items() if known.spec.per_patch)
        raise UserError(f"reduce={name} needs a fusion that keeps every patch ({names}), but {fusion} does not.")
    if name == "visionzip" and tapped_blocks(config.fusion, vision.layers)[0] == 0:
        raise UserError("reduce=visionzip needs a tapped block, but model.fusion.taps=(0,) taps only the embedding.")
    return Reduction(name, tokens, keep)


# ---- FastV -----------------------------------------------------------------------------------------------------------


def last_token_attention(
    q: Float[Array, "B T H Dh"], k: Float[Array, "B T K Dh"], lengths: Int[Array, " B"]
) -> Float32[Array, "B T"]:
    """The attention that each position gets from the last token of its prompt, averaged over heads.

    Args:
      q, k: queries and keys, with rotary positions applied.
      lengths: of prompts; for an empty prompt the first position counts as its last.

    Returns:
      The attention, 0 beyond the prompt.
    """
    rows, length, heads, size = q.shape
    last = jnp.maximum(lengths - 1, 0)
    q = jnp.take_along_axis(q, last[:, None, None, None], axis=1).reshape(rows, k.shape[2], -1, size)
    scores = jnp.einsum("bkgd,btkd->bkgt", q, k, preferred_element_type=jnp.float32) * size**-0.5
    visible = jnp.arange(length) <= last[:, None]
    return jax.nn.softmax(jnp.where(visible[:, None, None], scores, -jnp.inf), axis=-1).sum((1, 2)) / heads


def kept_positions(
    scores: Float[Array, "B T"],
    is_image: Bool[Array, "B T"],
    lengths: Int[Array, " B"],
    keep: Int[Array, " B"],
    length: int,
) -> Int[Array, "B {length}"]:
    """The positions that later layers read: all text, and the image tokens with the highest scores.

    Args:
      scores: of all positions.
      is_image: which positions are image tokens.
      lengths: of prompts.
      keep: image tokens to keep, at most as many as there are; among equal scores the first are kept.
      length: the length of the result, no less than any row keeps.

    Returns:
      Kept positions come first, in ascending order, so that causal attention sees only them; unused
      positions fill the rest.
    """
    positions = jnp.arange(scores.shape[1])
    rank = jnp.argsort(jnp.argsort(jnp.where(is_image, -scores, jnp.inf), axis=1), axis=1)
    keeps = (positions < lengths[:, None]) & (~is_image | (rank < keep[:, None]))
    return jnp.argsort(~keeps, axis=1)[:, :length]


# ---- VisionZip -------------------------------------------------------------------------------------------------------


def contextual_tokens(keep: int) -> int:
    """The number of VisionZip's tokens that are contextual; the others are dominant."""
    return round(keep * _CONTEXTUAL)


def visionzip(
    tower: VisionTower, images: UInt8[Array, "B H W 3"], taps: tuple[int, ...], dtype: DTypeLike, keep: int
) -> tuple[Float[Array, "B {keep} C"], ...]:
    """Like the tower's call, but each state has ``keep`` tokens, dominant and contextual ones.

    The deepest block decides for all taps. Its keys, and the class token's query, are recomputed from its input, which
    costs a twelfth of a block and leaves the tower itself unchanged.
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


# ---- Random ----------------------------------------------------------------------------------------------------------


def sample_patches(states: tuple[Float[Array, "B P C"], ...], keep: int) -> tuple[Float[Array, "B {keep} C"], ...]:
    """Reduces states to random patches, in ascending order; the same patches every time."""
    patches = np.sort(np.random.default_rng(0).permutation(states[0].shape[1])[:keep])
    return tuple(state[:, patches] for state in states)
