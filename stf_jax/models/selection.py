"""Fewer image tokens without training, when a model answers that was trained with all of them.

**FastV** (arXiv 2403.06764, section 4) drops image tokens inside the decoder. After its layer K = 2 they are ranked by
the attention that the prompt's last token pays to them in that layer, the mean over heads; all later layers, and their
caches, hold the best of them and the text. What stays keeps its position. The authors' program knows one image in a
batch of one; here each row ranks the tokens of all its images together, and keeps as many as its images may.

**VisionZip** (arXiv 2412.04467, section 3) acts on the tower's states before a projector that reads them one by one.
*Dominant* are the patches that get the most of the class token's attention, the mean over heads, in the deepest block
that the fusion reads (the last but one in LLaVA, as in the authors' program); without a class token, as in SigLIP, of
all patches' on average. Of the rest, evenly spaced ones are *targets*; each of the others goes to the target that its
key, the mean over heads, is most like by its cosine; and a *contextual* token is a target plus the mean of what went to
it, for so the authors' program adds them. The dominant ones come first, row by row, then the contextual ones, as there.
54 and 10 of 64 are theirs, a proportion that is kept here; they keep the class token besides, which no projector has
learned to read and which is left out here.

**Random** keeps a sample of the patches, drawn once and the same for all images: the control that a method must beat.

Axis letters: B rows or images, T positions, M images per row, N image tokens per image, P patches, S tokens in the
tower (P, one more with a class token), C tower width, H heads, K kv heads, Dh head size.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from stf_jax.config import REDUCTIONS, ModelConfig, UserError, did_you_mean
from stf_jax.models.fusion import tapped_blocks, tokens_per_image
from stf_jax.models.presets import llm_of, vision_of
from stf_jax.models.vit import VisionTower

FULL_LAYERS = 2  # FastV's K: decoder layers that read all image tokens
_PER_PATCH = ("mlp", "mbtf")  # fusions that make each patch a token by itself
_CONTEXTUAL = 10 / 64  # of VisionZip's tokens


@dataclasses.dataclass(frozen=True)
class Reduction:
    """What becomes of an image's image tokens."""

    name: str  # "": nothing | one of REDUCTIONS
    tokens: int  # N, as the fusion gives them
    keep: int  # that remain

    @property
    def slots(self) -> int:
        """Image tokens per image in a prompt."""
        return self.tokens if self.name == "fastv" else self.keep

    @property
    def dropped(self) -> int:
        """Of these, those that decoder layers after :data:`FULL_LAYERS` do not have."""
        return self.slots - self.keep


def reduction(config: ModelConfig) -> Reduction:
    """What ``config.reduce`` and ``config.keep`` come to.

    Raises:
      UserError: they do not suit each other or the model, or as :func:`stf_jax.models.fusion.tokens_per_image`.
    """
    name, fusion, vision = config.reduce, config.fusion.fusion, vision_of(config)
    if vision is None:
        if name or config.keep:
            raise UserError("A language model alone has no image tokens to reduce.")
        return Reduction("", 0, 0)
    tokens = tokens_per_image(config.fusion, vision.grid)
    if not name:
        if config.keep:
            known = ", ".join(REDUCTIONS)
            raise UserError(f"keep={config.keep} says how many tokens reduce leaves: set reduce to one of {known}.")
        return Reduction("", tokens, tokens)
    if name not in REDUCTIONS:
        raise UserError(f"reduce={name!r} is not known; {did_you_mean(name, REDUCTIONS)}")
    keep = config.keep or max(1, tokens // 4)
    if not 1 <= keep <= tokens:
        raise UserError(f"keep={keep} should be 1 to {tokens}, the image tokens that {fusion} makes of an image.")
    if name == "fastv" and llm_of(config).layers <= FULL_LAYERS:
        raise UserError(f"reduce=fastv acts after decoder layer {FULL_LAYERS}, and {config.llm} has no more.")
    if name != "fastv" and fusion not in _PER_PATCH:
        raise UserError(
            f"reduce={name} is for fusions that keep every patch ({', '.join(_PER_PATCH)}), which {fusion} does not."
        )
    if name == "visionzip" and tapped_blocks(config.fusion, vision.layers)[0] == 0:
        raise UserError("reduce=visionzip asks the block whose state is tapped; model.fusion.taps=(0,) taps none.")
    return Reduction(name, tokens, keep)


# ---- FastV -----------------------------------------------------------------------------------------------------------


def attention_paid(q: jax.Array, k: jax.Array, lengths: jax.Array) -> jax.Array:
    """What each position gets of the attention of its prompt's last token, the mean over heads.

    Args:
      q: [B, T, H, Dh], positions turned into it; k: [B, T, K, Dh], likewise.
      lengths: int32 [B]; of a prompt of none, the first position counts as its last.

    Returns:
      Float32 [B, T], 0 beyond the prompt.
    """
    rows, length, heads, size = q.shape
    last = jnp.maximum(lengths - 1, 0)
    q = jnp.take_along_axis(q, last[:, None, None, None], axis=1).reshape(rows, k.shape[2], -1, size)
    scores = jnp.einsum("bkgd,btkd->bkgt", q, k, preferred_element_type=jnp.float32) * size**-0.5
    seen = jnp.arange(length) <= last[:, None]
    return jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), axis=-1).sum((1, 2)) / heads


def remaining(paid: jax.Array, image: jax.Array, lengths: jax.Array, keep: jax.Array, length: int) -> jax.Array:
    """The positions that later layers read: all text, and of the image tokens those with the most attention.

    Args:
      paid: float32 [B, T].
      image: bool [B, T], which positions are image tokens.
      lengths: int32 [B], of prompts.
      keep: int32 [B], image tokens that remain, at most as many as there are; of equals the first.
      length: of what comes back, no less than any row keeps.

    Returns:
      Int32 [B, length]; what is kept comes first, in its order, so that causal attention sees it alone; positions that
      nobody looks at fill up the rest.
    """
    place = jnp.arange(paid.shape[1])
    rank = jnp.argsort(jnp.argsort(jnp.where(image, -paid, jnp.inf), axis=1), axis=1)
    kept = (place < lengths[:, None]) & (~image | (rank < keep[:, None]))
    return jnp.argsort(~kept, axis=1)[:, :length]


# ---- VisionZip -------------------------------------------------------------------------------------------------------


def contextual_tokens(keep: int) -> int:
    """How many of VisionZip's tokens are contextual; the others are dominant."""
    return round(keep * _CONTEXTUAL)


def visionzip(
    tower: VisionTower, images: jax.Array, taps: tuple[int, ...], dtype: jnp.dtype, keep: int
) -> tuple[jax.Array, ...]:
    """As the tower's call, but each state has ``keep`` tokens, dominant and contextual ones: [B, keep, C].

    The deepest block decides for all taps. Its keys, and the class token's query, are computed again from what enters
    it, which costs a twelfth of a block; so the tower itself is as it is for everybody else.
    """
    deepest = max(taps)
    *states, before = tower.states(images, (*taps, deepest - 1), dtype)
    with jax.named_scope("visionzip"):
        received, keys = attention_received(tower, before, deepest)
        first = int(tower.config.class_token)
        return zipped(received, keys, tuple(state[:, first:] for state in states), keep)


def attention_received(tower: VisionTower, x: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """What each patch gets of the class token's attention in a block, or without one of all patches' on average.

    Args:
      x: [B, S, C], what enters the block.
      block: its number, from 1.

    Returns:
      Attention, float32 [B, P], the mean over heads; keys [B, P, Dh], likewise.
    """
    graph, stacked = nnx.split(tower.blocks)
    one = nnx.merge(graph, jax.tree.map(lambda p: p[block - 1], stacked))
    first = int(tower.config.class_token)
    x = one.attention_norm(x)
    q, k = one.attention.query(x[:, :1] if first else x), one.attention.key(x)
    scores = jnp.einsum("bqhd,bshd->bhqs", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    return jax.nn.softmax(scores, axis=-1).mean((1, 2))[:, first:], k.mean(2)[:, first:]


def zipped(received: jax.Array, keys: jax.Array, states: tuple[jax.Array, ...], keep: int) -> tuple[jax.Array, ...]:
    """States [B, P, C] as dominant and contextual tokens [B, keep, C], all by the same choice.

    Args:
      received: float32 [B, P], by which dominant tokens are chosen; of equals the first.
      keys: [B, P, Dh], by which the others are told alike.
    """
    contextual = contextual_tokens(keep)
    order = jnp.argsort(-received, axis=1)
    dominant, rest = (jnp.sort(part, axis=1) for part in jnp.split(order, [keep - contextual], axis=1))
    if not contextual:
        return tuple(_taken(state, dominant) for state in states)
    step = rest.shape[1] // contextual
    is_target = np.isin(np.arange(rest.shape[1]), step * np.arange(contextual))
    targets, others = rest[:, is_target], rest[:, ~is_target]
    keys = keys.astype(jnp.float32)
    keys = keys / jnp.linalg.norm(keys, axis=-1, keepdims=True)
    alike = jnp.einsum("bod,btd->bot", _taken(keys, others), _taken(keys, targets))
    goes = jax.nn.one_hot(alike.argmax(-1), contextual, dtype=states[0].dtype)
    counts = jnp.maximum(goes.sum(1, dtype=jnp.float32), 1)[:, :, None]

    def merged(state):
        total = jnp.einsum("bot,boc->btc", goes, _taken(state, others), preferred_element_type=jnp.float32)
        tokens = _taken(state, targets) + (total / counts).astype(state.dtype)
        return jnp.concatenate([_taken(state, dominant), tokens], axis=1)

    return tuple(merged(state) for state in states)


def _taken(x, places):
    return jnp.take_along_axis(x, places[:, :, None], axis=1)


# ---- Random ----------------------------------------------------------------------------------------------------------


def sampled(states: tuple[jax.Array, ...], keep: int) -> tuple[jax.Array, ...]:
    """States [B, P, C] of ``keep`` patches [B, keep, C], in their order; the same patches each time."""
    patches = np.sort(np.random.default_rng(0).permutation(states[0].shape[1])[:keep])
    return tuple(state[:, patches] for state in states)
