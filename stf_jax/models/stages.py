"""Stages of decoder layers that read different positions: what reducers in the decoder and schedules are made of.

Rows may hold several conversations, each with several images. A conversation ranks the tokens of all its images
together, and keeps as many as it has images times a number per image; conversations in a row are ranked apart. So the
length of a stage depends on the shape of a batch alone: where each image has k of its N tokens, a row of M images has
T − M·(N − k) positions. A row with fewer images has unused positions at its end, and its text must fit without them.

Axis letters: B rows, T positions of complete rows, T1 positions that a stage reads, M images per row, N image tokens
per image, H heads, K kv heads, Dh head size.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from stf_jax.models.decoders.rows import Beside, Rows, Selection, find_starts

_QUERIES = 128  # queries whose attention is in memory at a time


@dataclasses.dataclass(frozen=True)
class Stage:
    """Decoder layers that see the same image tokens.

    Attributes:
      after: layers before it.
      keep: image tokens per image that its layers see.
      beside: whether they see them as keys and values only, made of the fusion's tokens.
    """

    after: int
    keep: int
    beside: bool = False

    @property
    def rows(self) -> int:
        """Image tokens per image among the positions that its layers read."""
        return 0 if self.beside else self.keep


@dataclasses.dataclass(frozen=True)
class Layout:
    """What is at each position of complete rows.

    Attributes:
      is_image: bool [B, T].
      segments: the conversation, 1, 2, … in each row, and 0 for padding at its end; int32 [B, T].
      is_target: which tokens are learned, bool [B, T]; None in prompts.
    """

    is_image: jax.Array
    segments: jax.Array
    is_target: jax.Array | None = None

    def count_images(self, slots: int) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
        """For each position, the images of its conversation, and those of the conversations before it."""
        counts = jnp.cumsum(self.is_image, axis=1)
        starts = find_starts(self.segments)
        ends = counts.shape[1] - 1 - jnp.flip(find_starts(jnp.flip(self.segments, 1)), 1)
        before = _take(counts, starts) - _take(self.is_image, starts)
        return (_take(counts, ends) - before) // slots, before // slots


class Visible:
    """Which positions of complete rows layers read, while the selections of their stages are called in order.

    Attributes:
      layout: of the complete rows.
      places: int32 [B, T1], the positions, in ascending order, and then unused ones.
      used: bool [B, T1], which are not unused.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.places = jnp.broadcast_to(jnp.arange(layout.is_image.shape[1]), layout.is_image.shape)
        self.used = layout.segments > 0

    @property
    def is_image(self) -> Bool[Array, "B T1"]:
        """Which positions are image tokens."""
        return _take(self.layout.is_image, self.places) & self.used

    @property
    def segments(self) -> Int[Array, "B T1"]:
        """The conversation of each position, 0 for unused ones."""
        return jnp.where(self.used, _take(self.layout.segments, self.places), 0)

    @property
    def comes_before_target(self) -> Bool[Array, "B T1"]:
        """Which positions are followed by a token that is learned."""
        assert self.layout.is_target is not None  # of rows to train with
        is_target = _take(self.layout.is_target, self.places) & self.used
        return _next(is_target) & (_next(self.segments) == self.segments)

    def targets(self, tokens: Int[Array, "B T"]) -> tuple[Int[Array, "B T1"], Bool[Array, "B T1"]]:
        """The token of the complete rows that follows each position, and whether it is learned."""
        return _next(_take(tokens, self.places)), self.comes_before_target

    def score(self, q: Float[Array, "B T1 H Dh"], k: Float[Array, "B T1 K Dh"]) -> Float32[Array, "B T1"]:
        """The attention that each position gets from those just before an answer, or from the end of a prompt.

        It is averaged over heads, and summed over the answers of a conversation.
        """
        if self.layout.is_target is None:
            return last_token_attention(q, k, self.is_image, self.used.sum(1))
        asks = self.comes_before_target
        is_first = ~jnp.pad(asks, ((0, 0), (1, 0)))[:, :-1]  # of an answer
        return asked_attention(q, k, asks & is_first, self.segments)

    def choose(
        self, keeps: Bool[Array, "B C"], length: int, joining: Int[Array, "B J"] | None = None
    ) -> Int[Array, "B {length}"]:
        """Goes on with fewer positions, or with some that join.

        Args:
          keeps: for each of the T1 positions, and then of those that join, whether it goes on.
          length: T1 from now on, no less than any row keeps.
          joining: positions of complete rows.

        Returns:
          The indices in ``keeps`` of the positions that go on, in ascending order of their places, so that causal
          attention sees only them; unused ones fill the rest.
        """
        places = self.places if joining is None else jnp.concatenate([self.places, joining], axis=1)
        chosen = jnp.argsort(jnp.where(keeps, places, self.layout.is_image.shape[1]), axis=1)[:, :length]
        self.places, self.used = _take(places, chosen), jnp.arange(length) < keeps.sum(1)[:, None]
        return chosen


Score = Callable[[jax.Array, jax.Array, jax.Array, int], jax.Array]  # (q, k, x, tokens per image to keep) → [B, T1]


def make_selections(
    stages: Sequence[Stage],
    visible: Visible,
    slots: int,
    images_per_row: int,
    score: Score,
    *,
    rows: Rows | None = None,
    scored_by: Literal["last", "next"] = "next",
    renumber: bool = False,
    soft: float = 0.0,
    silent_prefix: bool = False,
) -> list[Selection]:
    """The selections of a decoder for these stages.

    Args:
      stages: in ascending order of their layers. Before the first, all positions are read.
      visible: all positions of the rows; it changes as the selections are called, in order.
      slots: N.
      images_per_row: M, the most that a row has.
      score: what ranks image tokens; see :class:`Selection` for its arguments.
      rows: the embeddings of complete rows, where stages add image tokens or see them beside.
      scored_by, renumber: as of :class:`Selection`.
      soft: λ; where it is not 0, a token of rank r, from 0, of which k are kept is multiplied by σ(λ·(k − r)).
      silent_prefix: whether text before a conversation's first image gets nothing from attention. All stages must read
        text only.
    """
    layout, length = visible.layout, visible.places.shape[1]
    images, images_before = layout.count_images(slots)
    weights: jax.Array | None = None

    def select(before: Stage, stage: Stage, q: Any, k: Any, x: jax.Array) -> jax.Array:
        nonlocal weights
        total = length - images_per_row * (slots - stage.rows)
        if stage.rows > before.rows:  # they join
            everywhere = jnp.broadcast_to(jnp.arange(length), layout.is_image.shape)
            return visible.choose(jnp.concatenate([visible.used, layout.is_image], axis=1), total, everywhere)
        is_image, keeps = visible.is_image, visible.used
        if stage.rows:
            here = _take(images_before, visible.places) * before.rows
            rank = rank_tokens(score(q, k, x, stage.rows), is_image, visible.segments) - here
            ahead = _take(images, visible.places) * stage.rows - rank
            weights = jnp.where(is_image, jax.nn.sigmoid(soft * ahead.astype(jnp.float32)), 1)
            return visible.choose(keeps & (~is_image | (ahead > 0)), total)
        return visible.choose(keeps & ~is_image, total)

    def weigh(selected: jax.Array) -> jax.Array:
        assert weights is not None  # it is called after ``select``
        return _take(weights, selected)

    text = jnp.argsort(layout.is_image | (layout.segments == 0), axis=1)[:, : length - images_per_row * slots]
    silent, beside = None, None
    if silent_prefix:
        begun = jnp.cumsum(layout.is_image, axis=1) > images_before * slots
        silent = _take((images > 0) & ~begun, text)
    if rows is not None and any(stage.beside for stage in stages):
        beside = _put_beside(layout, rows, text, images_per_row * slots)
    selections: list[Selection] = []
    for before, stage in itertools.pairwise((Stage(0, slots), *stages)):
        if before == dataclasses.replace(stage, after=before.after):
            continue
        ranks = 0 < stage.rows < before.rows
        selections.append(
            Selection(
                stage.after,
                functools.partial(select, before, stage) if stage.rows != before.rows else None,
                scored_by if ranks else "nothing",
                renumber,
                rows if stage.rows > before.rows else None,
                weigh if ranks and soft else None,
                beside if stage.beside else None,
                silent,
            )
        )
    return selections


def _put_beside(layout: Layout, rows: Rows, text: Int[Array, "B T1"], count: int) -> Beside:
    """The ``count`` image tokens of each row beside its text, which is at those places."""
    image = jnp.argsort(~layout.is_image, axis=1)[:, :count]
    is_image, segments = _take(layout.is_image, image), layout.segments
    same = _take(segments, text)[:, :, None] == _take(segments, image)[:, None]
    index = jnp.where(
        layout.is_image, jnp.cumsum(layout.is_image, axis=1) - 1, count + jnp.cumsum(~layout.is_image, axis=1) - 1
    )
    return Beside(
        x=_take(rows.x, image),
        positions=_take(rows.positions, image),
        visible=is_image[:, None] & same & (image[:, None] < text[:, :, None]),
        order=jnp.minimum(index, count + text.shape[1] - 1),
    )


def quarters(layers: int) -> tuple[int, ...]:
    """A quarter, a half and three quarters of a number of layers, rounded."""
    return tuple(sorted({max(1, (2 * layers * part + 4) // 8) for part in (1, 2, 3)}))


def rank_tokens(
    scores: Float[Array, "B T"], is_image: Bool[Array, "B T"], segments: Int[Array, "B T"]
) -> Int[Array, "B T"]:
    """The rank of each image token, from 0 for the highest score, after all those of the conversations before it.

    Among equal scores the first is higher.
    """
    conversation = jnp.where(is_image, segments, jnp.iinfo(segments.dtype).max)
    order = jax.vmap(lambda score, key: jnp.lexsort((-score, key)))(scores, conversation)
    return jnp.argsort(order, axis=1)


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
    last = jnp.maximum(lengths - 1, 0)[:, None]
    visible = jnp.arange(k.shape[1]) <= last[:, :, None]
    return _attention(jnp.take_along_axis(q, last[:, :, None, None], axis=1), k, visible).sum(2).sum(1) / q.shape[2]


def asked_attention(
    q: Float[Array, "B T H Dh"], k: Float[Array, "B T K Dh"], asks: Bool[Array, "B T"], segments: Int[Array, "B T"]
) -> Float32[Array, "B T"]:
    """The attention that each position gets from those that ask in its conversation, averaged over heads and summed."""
    length = q.shape[1]

    def add(total: jax.Array, at: jax.Array) -> tuple[jax.Array, None]:
        """Adds what the queries at these positions give."""
        visible = (at[:, None] >= jnp.arange(length)) & (segments[:, at, None] == segments[:, None])
        given = _attention(q[:, at], k, visible).sum(1) / q.shape[2]
        return total + (given * asks[:, at, None]).sum(1), None

    total, whole = jnp.zeros(asks.shape, jnp.float32), length // _QUERIES * _QUERIES
    if whole:
        total, _ = jax.lax.scan(add, total, jnp.arange(whole).reshape(-1, _QUERIES))
    return add(total, jnp.arange(whole, length))[0] if length > whole else total


def _attention(
    q: Float[Array, "B Q H Dh"], k: Float[Array, "B T K Dh"], visible: Bool[Array, "B Q T"]
) -> Float32[Array, "B H Q T"]:
    """What each query gives to each visible key."""
    rows, count, heads, size = q.shape
    grouped = q.reshape(rows, count, k.shape[2], -1, size)
    scores = jnp.einsum("bqkgd,btkd->bkgqt", grouped, k, preferred_element_type=jnp.float32) * size**-0.5
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -jnp.inf), axis=-1)
    return weights.reshape(rows, heads, count, -1)


def _take(values: jax.Array, places: Int[Array, "B T1"]) -> jax.Array:
    """The values [B, T, …] at these places."""
    return jnp.take_along_axis(values, places.reshape(*places.shape, *[1] * (values.ndim - 2)), axis=1)


def _next(values: jax.Array) -> jax.Array:
    """The value of the position to the right, and 0 at the end."""
    return jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
