"""Maps of one image and one answer: what image tokens are made of, what moves them, and what the answer depends on.

All maps are computed from the model's own modules, in its own precision; attention weights are float32. They are
functions of a model, to be compiled by :meth:`stf_jax.inference.generator.Generator.apply`.

A *movement* is the length of a gradient times the length of what it is the gradient with respect to: how fast an output
changes, at most, while an input changes by a share of its own length.

Axis letters: T positions, S image tokens in the prompt, N those that the fusion makes, P patches, M taps, A tokens of
the answer, L decoder layers, C tower width, D language model width.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int, UInt8

from stf_jax.models.attention import Mask, attention_weights
from stf_jax.models.decoders.rows import Rows, Selection
from stf_jax.models.reducers.base import PatchReducer, Question, TokenReducer
from stf_jax.models.stages import Layout
from stf_jax.models.towers.vit import VisionTower
from stf_jax.models.vlm import VLM

_BATCH = 16  # gradients computed at a time, at most


class TokenMaps(NamedTuple):
    """What the image tokens of an image are made of.

    Attributes:
      tokens: as the language model reads them.
      sources: the share of each patch in each token, rows sum to one; None if the fusion's class does not say.
      movement: of each token's length, by the state of each tap at each patch.
      pixels: the image that the tower reads.
    """

    tokens: Float[Array, "S D"]
    sources: Float32[Array, "S P"] | None
    movement: Float32[Array, "S M P"]
    pixels: UInt8[Array, "H W 3"]


class AnswerMaps(NamedTuple):
    """What an answer is made from.

    Attributes:
      log_probs: of each token of the answer, given those before it.
      attention: of the position that predicts each token, in each layer, averaged over heads, to all positions of the
        prompt and the answer; rows sum to one, and what a layer does not read gets zero.
      movement: of each token's logit, by each image token.
      reads: which image tokens each layer reads.
    """

    log_probs: Float32[Array, " A"]
    attention: Float32[Array, "L A T"]
    movement: Float32[Array, "A S"]
    reads: Bool[Array, "L S"]


class _ShiftedTower:
    """A tower whose states at taps are shifted, so that derivatives with respect to them can be taken anywhere.

    It stands for the tower, under its type, in calls of reducers.

    Attributes:
      pixels: images that the first call reads.
      states_at: the first image's states of that call, without shifts, by tap.
    """

    def __init__(self, tower: VisionTower, shifts: Mapping[int, jax.Array]) -> None:
        """``shifts``: by tap, [P, C], or what broadcasts to it."""
        self._tower, self._shifts = tower, shifts
        self.pixels: jax.Array | None = None
        self.states_at: dict[int, jax.Array] = {}

    @property  # type: ignore[misc]  # isinstance takes it for the tower that it stands for
    def __class__(self) -> type:
        return type(self._tower)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tower, name)

    def __call__(self, images: jax.Array, taps: tuple[int, ...], dtype: DTypeLike) -> tuple[jax.Array, ...]:
        return self._shift(images, taps, self._tower(images, taps, dtype), 0)

    def states(self, images: jax.Array, taps: tuple[int, ...], dtype: DTypeLike) -> tuple[jax.Array, ...]:
        return self._shift(images, taps, self._tower.states(images, taps, dtype), int(self.config.class_token))

    def _shift(
        self, images: jax.Array, taps: tuple[int, ...], states: Sequence[jax.Array], first: int
    ) -> tuple[jax.Array, ...]:
        if self.pixels is None:
            self.pixels = images
            self.states_at = {tap: state[0, first:] for tap, state in zip(taps, states, strict=True)}
        return tuple(
            state.at[:, first:].add(self._shifts[tap].astype(state.dtype)) if tap in self._shifts else state
            for tap, state in zip(taps, states, strict=True)
        )


def map_tokens(
    model: VLM, pixels: UInt8[Array, "H W 3"], prompt: Int[Array, " T"], is_text: Bool[Array, " T"]
) -> TokenMaps:
    """Maps the image tokens of an image.

    Args:
      model: with a vision tower.
      pixels: a square image of the tower's size.
      prompt: tokens of the prompt, which some reducers read.
      is_text: which positions of the prompt are text.
    """
    reduction, question = model.reduction, Question(prompt[None], is_text[None])

    def compute(shifts: jax.Array) -> Any:
        tower: Any = _ShiftedTower(model.vision, dict(zip(model.taps, shifts, strict=True)))
        states = reduction.tower_states(tower, pixels[None], model.taps, model.dtype, question)
        made = model.fusion(states)
        full = jnp.stack([tower.states_at[tap] for tap in model.taps])
        return (reduction.reduce_tokens(made)[0], states[0][0]), (full, tower.pixels[0], states, made)

    # A reducer may give the tower another image, so the number of patches follows from its call.
    _, (full, *_) = jax.eval_shape(compute, jnp.zeros((len(model.taps), 1, 1)))
    (tokens, reduced), pull_back, (full, seen, states, made) = jax.vjp(
        compute, jnp.zeros(full.shape, jnp.float32), has_aux=True
    )
    lengths = _length(full)

    def move(direction: jax.Array, index: jax.Array) -> jax.Array:
        (gradient,) = pull_back((jnp.zeros_like(tokens).at[index].set(direction), jnp.zeros_like(reduced)))
        return _length(gradient) * lengths

    units = tokens / jnp.maximum(_length(tokens)[:, None], jnp.finfo(jnp.float32).tiny).astype(tokens.dtype)
    movement = _map(move, units, jnp.arange(len(tokens)))
    sources = model.fusion.sources(states)
    if sources is None:
        return TokenMaps(tokens, None, movement, seen)
    shares = sources[0]
    if isinstance(reduction.reducer, TokenReducer):
        _, pull_tokens = jax.vjp(lambda x: reduction.reduce_tokens(x)[0], made)
        shares = _weights(lambda cotangent: pull_tokens(cotangent)[0][0], tokens) @ shares
    if isinstance(reduction.reducer, PatchReducer):
        # The share of each patch in a reduced state, read from the deepest tap: reducers choose alike for all.
        shares = shares @ _weights(lambda cotangent: pull_back((jnp.zeros_like(tokens), cotangent))[0][0], reduced)
    shares = jnp.abs(shares)
    return TokenMaps(tokens, shares / jnp.maximum(shares.sum(-1, keepdims=True), 1e-30), movement, seen)


def map_answer(
    model: VLM,
    image_tokens: Float[Array, "S D"],
    prompt: Int[Array, " T"],
    is_image: Bool[Array, " T"],
    answer: Int[Array, " A"],
) -> AnswerMaps:
    """Maps an answer, which the decoder reads token by token as if it had chosen each.

    Args:
      model: its decoder reads.
      image_tokens: of one image.
      prompt: tokens of the prompt, ignored at image slots.
      is_image: which positions of the prompt are image slots, S of them.
      answer: tokens of the answer. What follows a token does not change its maps.
    """
    reduction, length, count = model.reduction, len(prompt), len(answer)
    tokens = jnp.concatenate([prompt, answer])[None]
    slots = jnp.pad(jnp.where(is_image, jnp.cumsum(is_image) - 1, -1), (0, count), constant_values=-1)[None]
    positions = jnp.arange(tokens.shape[1])[None]
    image_positions = jnp.nonzero(is_image, size=len(image_tokens))[0]
    predicting = slice(-count - 1, -1)  # of the positions, which end with the answer

    def read(image_tokens: jax.Array) -> Any:
        at, attention, reads = positions, list[jax.Array](), list[jax.Array]()

        def observe(rows: Rows, q: jax.Array, k: jax.Array) -> None:
            beside, seen = rows.beside, at[0] if reduction.schedule is None else visible.places[0]
            if beside is not None:
                seen = jnp.concatenate([image_positions, seen])
            mask = Mask(causal=True, beside=None if beside is None else beside.visible)
            weights = attention_weights(q, k, mask)[0, :, predicting].mean(0)
            attention.append(jnp.zeros((count, tokens.shape[1])).at[:, seen].set(weights))
            reads.append(jnp.zeros(tokens.shape[1], bool).at[seen].set(True))

        def with_answer(selection: Selection) -> Selection:
            """The selection of the prompt's positions, followed by those of the answer."""

            def select(q: jax.Array, k: jax.Array, x: jax.Array) -> jax.Array:
                nonlocal at
                end = x.shape[1] - count
                assert selection.select is not None  # those of reducers have it
                kept = selection.select(q[:, :end], k[:, :end], x[:, :end])
                kept = jnp.concatenate([kept, jnp.arange(end, x.shape[1])[None]], axis=1)
                at = jnp.take_along_axis(at, kept, axis=1)
                return kept

            return dataclasses.replace(selection, select=select)

        x = model.embed(tokens, slots, image_tokens[None])
        # A schedule ranks by the position before a token that is learned, which is the prompt's last.
        layout = Layout(slots >= 0, jnp.ones_like(tokens), positions >= length)
        selections, visible = reduction.follow_schedule(layout, Rows(x, positions), 1)
        if reduction.schedule is None:
            dropping, _ = reduction.select_tokens(is_image[None], jnp.array([length]), 1, model.llm.norm)
            selections = [*map(with_answer, dropping)]
        hidden, _ = model.llm.prefill(x, positions, selections, observe=observe)
        logits = model.llm.logits(hidden[0, predicting])
        chosen = logits[jnp.arange(count), answer]
        return chosen, (chosen - jax.nn.logsumexp(logits, axis=-1), jnp.stack(attention), jnp.stack(reads))

    _, pull_back, (log_probs, attention, reads) = jax.vjp(read, image_tokens, has_aux=True)

    def move(cotangent: jax.Array) -> jax.Array:
        return _length(pull_back(cotangent)[0]) * _length(image_tokens)

    return AnswerMaps(log_probs, attention, _map(move, jnp.eye(count)), reads[:, image_positions])


def _length(x: jax.Array) -> jax.Array:
    return jnp.linalg.norm(x.astype(jnp.float32), axis=-1)


def _map(function: Callable[..., jax.Array], *inputs: jax.Array) -> jax.Array:
    count = len(inputs[0])
    batch = max(size for size in range(1, _BATCH + 1) if count % size == 0)  # a remainder would be compiled by itself
    return jax.lax.map(lambda values: function(*values), inputs, batch_size=batch)


def _weights(pull_back: Callable[[jax.Array], jax.Array], outputs: jax.Array) -> jax.Array:
    """The weight of each input in each output, where outputs [I, C] are weighted sums of inputs [J, C]: [I, J]."""
    cotangents = jnp.ones(outputs.shape[1], outputs.dtype)
    return _map(
        lambda index: pull_back(jnp.zeros_like(outputs).at[index].set(cotangents)).astype(jnp.float32).mean(-1),
        jnp.arange(len(outputs)),
    )
