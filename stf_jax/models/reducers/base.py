"""What a reducer is: it leaves fewer image tokens at inference for a model that was trained with all of them.

A reducer is an object in a file of this folder, or in your own, named in a config as ``package.module:thing``. It acts
on the tower's states before a fusion that maps each patch by itself, on the image tokens that any fusion makes, or
inside the decoder:

    MINE = PatchReducer(reduce)                   # reduce(tower, images, taps, dtype, keep) -> states of `keep` tokens
    MINE = TokenReducer(reduce)                   # reduce(tokens, keep) -> [B, keep, D]
    MINE = DecoderReducer(score, after_layers=2)  # score(q, k, is_image, lengths) -> [B, T]; the highest are kept

or a function that returns one and whose keyword-only parameters are its options (registry.py):

    def mine(*, after: int = 2) -> DecoderReducer: ...    # --reduce=package.module:mine:after=3

What is kept must not depend on padding or on other rows, so that an answer is the same in any batch.

Axis letters: B rows or images, T positions, N image tokens per image, P patches, L decoder layers, C tower width,
D language model width, H heads, K kv heads, Dh head size.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt8

from stf_jax.config import FusionConfig, UserError
from stf_jax.models.decoders.rows import Rows, Selection
from stf_jax.models.fusions.base import FUSIONS, find_fusion, tokens_per_image
from stf_jax.models.schedules.base import Schedule, find_schedule, plan_schedule
from stf_jax.models.stages import Layout, Stage, Visible, make_selections
from stf_jax.models.towers.base import VisionConfig
from stf_jax.models.towers.vit import VisionTower
from stf_jax.registry import Registry

if TYPE_CHECKING:  # spec.py imports this file
    from stf_jax.models.spec import ModelSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Question:
    """The text around images: for each image the prompt of its row."""

    tokens: Int[Array, "B T"]
    is_text: Bool[Array, "B T"]  # neither an image token nor padding


@dataclasses.dataclass(frozen=True)
class PatchReducer:
    """Leaves fewer tokens in the tower's states, so prompts become shorter.

    Attributes:
      reduce: called with the tower, images [B, H, W, 3], taps, the compute type and ``keep``; returns one state
        [B, keep, C] per tap, as the tower's call returns states [B, P, C].
      check: raises UserError if the reducer does not fit the config of the fusion, that of the tower or ``keep``.
      reads_question: whether ``reduce`` gets one more argument, a :class:`Question`, or None where an image has none.
    """

    reduce: Callable[..., tuple[jax.Array, ...]]
    check: Callable[[FusionConfig, VisionConfig, int], None] | None = None
    reads_question: bool = False


@dataclasses.dataclass(frozen=True)
class TokenReducer:
    """Leaves fewer of the image tokens that a fusion made, so prompts become shorter.

    Attributes:
      reduce: called with image tokens [B, N, D] and ``keep``; returns [B, keep, D].
      check: raises UserError if N tokens cannot be reduced to ``keep``.
    """

    reduce: Callable[[jax.Array, int], jax.Array]
    check: Callable[[int, int], None] | None = None


Count = Literal["after", "average"]


@dataclasses.dataclass(frozen=True)
class DecoderReducer:
    """Drops image tokens inside the decoder, so later layers and their caches are shorter.

    Each row ranks the tokens of all its images together, and keeps ``keep`` times the number of its images.

    Attributes:
      score: called with queries [B, T, H, Dh] and keys [B, T, K, Dh], both with rotary positions, which positions are
        image tokens [B, T], and lengths of prompts [B]; returns scores [B, T].
      after_layers: decoder layers before the drop, at least 1; or those before each of several drops, in ascending
        order, or a function that returns them for L. Each drop keeps the same fraction of the tokens left.
      count: what ``keep`` counts: the tokens after the last drop, or their average over all layers.
      scored_by: whose queries and keys are scored: the last layer's before the drop, or those that the next layer would
        have.
      renumber: whether positions are counted from 0 again after a drop; by default they stay.
      reads_states: whether ``score`` gets two more arguments: the states [B, T, D] before the drop, with the final norm
        applied, and how many image tokens each row will keep [B].
    """

    score: Callable[..., jax.Array]
    after_layers: int | tuple[int, ...] | Callable[[int], tuple[int, ...]]
    count: Count = "after"
    scored_by: Literal["last", "next"] = "last"
    renumber: bool = False
    reads_states: bool = False

    def __post_init__(self) -> None:
        layers = (self.after_layers,) if isinstance(self.after_layers, int) else self.after_layers
        if isinstance(layers, tuple) and not (layers and all(a < b for a, b in itertools.pairwise((0, *layers)))):
            raise ValueError("the layers before a drop must be at least 1, and in ascending order.")

    def drops(self, layers: int) -> tuple[int, ...]:
        """The layers before each drop in a decoder of L layers."""
        if isinstance(self.after_layers, int):
            return (self.after_layers,)
        return self.after_layers(layers) if callable(self.after_layers) else self.after_layers


Reducer = PatchReducer | TokenReducer | DecoderReducer
REDUCERS: Registry[Reducer | Callable[..., Reducer]] = Registry("model.reduce", "stf_jax.models.reducers")


@functools.lru_cache
def find_reducer(name: str) -> Reducer:
    """The reducer of that name, with the options in it. Raises UserError for a wrong one, or what is no reducer."""
    found = REDUCERS.make(name)
    if not isinstance(found, Reducer):
        kinds = "PatchReducer, TokenReducer or DecoderReducer"
        raise UserError(f"model.reduce={name} is not a {kinds} of stf_jax.models.reducers.base.")
    return found


@dataclasses.dataclass(frozen=True)
class Reduction:
    """How many of the image tokens of an image are kept, and what drops the others."""

    name: str  # as config.reduce; "": no reduction
    tokens: int  # N, the output of the fusion: of all that it can make, what config.tokens says
    keep: int  # tokens that are kept, as config.keep; the decoder's average if the reducer counts that
    reducer: Reducer | None = None
    stages: tuple[Stage, ...] = ()  # of a DecoderReducer or a schedule
    schedule: Schedule | None = None

    @property
    def slots(self) -> int:
        """Image tokens per image in a prompt."""
        return self.keep if isinstance(self.reducer, PatchReducer | TokenReducer) else self.tokens

    @property
    def dropped(self) -> int:
        """Those of :attr:`slots` that are not among the positions of the decoder's shortest stage."""
        return max((self.slots - stage.rows for stage in self.stages), default=0)

    @property
    def rows_dropped_at_end(self) -> int:
        """Those of :attr:`slots` that are not among the positions of the decoder's last stage."""
        return self.slots - self.stages[-1].rows if self.stages else 0

    def dropped_before(self, layer: int) -> int:
        """Those of :attr:`slots` that this decoder layer, counted from 0, does not see."""
        return self.slots - next((stage.keep for stage in reversed(self.stages) if layer >= stage.after), self.slots)

    def position_shift(self, layer: int) -> int:
        """By how much positions in this decoder layer, counted from 0, are lower for each image before them."""
        how = self.schedule or self.reducer
        return self.dropped_before(layer) if isinstance(how, DecoderReducer | Schedule) and how.renumber else 0

    def average_tokens(self, layers: int) -> float:
        """Image tokens per image that a decoder layer sees, on average over L layers."""
        return self.slots - sum(map(self.dropped_before, range(layers))) / layers

    def tower_states(
        self,
        tower: VisionTower,
        images: UInt8[Array, "B H W 3"],
        taps: tuple[int, ...],
        dtype: DTypeLike,
        question: Question | None = None,
    ) -> tuple[Float[Array, "B _ C"], ...]:
        """The tower's states for the fusion: of all patches, or what a :class:`PatchReducer` leaves of them.

        Raises:
          UserError: the reducer returns another number of states or tokens than it should.
        """
        if not isinstance(self.reducer, PatchReducer):
            return tower(images, taps, dtype)
        more = (question,) if self.reducer.reads_question else ()
        states = self.reducer.reduce(tower, images, taps, dtype, self.keep, *more)
        counts, expected = [state.shape[1] for state in states], [self.keep] * len(taps)
        if counts != expected:
            raise UserError(f"{self.name} returns states of {counts} tokens, one number per tap; expected {expected}.")
        return states

    def reduce_tokens(self, tokens: Float[Array, "B N D"]) -> Float[Array, "B _ D"]:
        """What a :class:`TokenReducer` leaves of the fusion's tokens, or all of them.

        Raises:
          UserError: the reducer returns another number or width of tokens than it should.
        """
        if not isinstance(self.reducer, TokenReducer):
            return tokens
        with jax.named_scope("reduce"):
            reduced = self.reducer.reduce(tokens, self.keep)
        expected = (len(tokens), self.keep, tokens.shape[2])
        if reduced.shape != expected:
            raise UserError(f"{self.name} returns tokens of shape {reduced.shape}; expected {expected}.")
        return reduced

    def follow_schedule(self, layout: Layout, rows: Rows, images_per_row: int) -> tuple[list[Selection], Visible]:
        """What the decoder reads of complete rows, as the schedule says.

        Args:
          rows: the embeddings.
          images_per_row: M, the most that a row has.

        Returns:
          The selections for :class:`stf_jax.models.decoders.transformer.Decoder`, to be called in order; and what the
          positions are from the last of those that were called on.
        """
        visible, schedule = Visible(layout), self.schedule
        if schedule is None or not images_per_row:
            return [], visible

        def score(q: jax.Array, k: jax.Array, x: jax.Array, keep: int) -> jax.Array:
            del x, keep
            return visible.score(q, k)

        selections = make_selections(
            self.stages,
            visible,
            self.slots,
            images_per_row,
            score,
            rows=rows,
            renumber=schedule.renumber,
            soft=schedule.soft,
            silent_prefix=schedule.silent_prefix,
        )
        return selections, visible

    def select_tokens(
        self,
        is_image: Bool[Array, "B T"],
        lengths: Int[Array, " B"],
        images_per_row: int,
        norm: Callable[[jax.Array], jax.Array],
    ) -> tuple[list[Selection], Int[Array, " B"]]:
        """What the decoder drops from a batch of prompts.

        Args:
          is_image: which positions are image tokens.
          lengths: of prompts.
          images_per_row: M, the most that a row has.
          norm: the decoder's final norm.

        Returns:
          The selections for :meth:`stf_jax.models.decoders.transformer.Decoder.prefill`, to be called in order, and the
          number of positions of each prompt after the last of them.
        """
        reducer = self.reducer
        if not isinstance(reducer, DecoderReducer) or not images_per_row:
            return [], lengths
        visible = Visible(Layout(is_image, (jnp.arange(is_image.shape[1]) < lengths[:, None]).astype(jnp.int32)))
        image_counts = is_image.sum(1) // self.slots

        def score(q: jax.Array, k: jax.Array, x: jax.Array, keep: int) -> jax.Array:
            more = (norm(x), image_counts * keep) if reducer.reads_states else ()
            return reducer.score(q, k, visible.is_image, visible.used.sum(1), *more)

        how: Any = {"scored_by": reducer.scored_by, "renumber": reducer.renumber}
        selections = make_selections(self.stages, visible, self.slots, images_per_row, score, **how)
        return selections, lengths - image_counts * self.dropped


def resolve_reduction(model: "ModelSpec") -> Reduction:
    """The reduction that the model's ``reduce``, ``keep`` and ``schedule`` ask for.

    Raises:
      UserError: they do not fit each other or the model, or as :func:`stf_jax.models.fusions.base.tokens_per_image`.
    """
    reduction, name = _resolve_reducer(model), model.schedule
    if not name or model.vision_shape is None:
        return reduction
    if reduction.stages:
        raise UserError(
            f"reduce={model.reduce} drops image tokens in the decoder, where schedule={name} already does; choose a "
            "reducer that acts before the decoder."
        )
    if len(model.fusion.budgets) > 1:
        raise UserError(
            f"model.schedule={name} plans one number of image tokens per image, and model.fusion.budgets has "
            f"{len(model.fusion.budgets)}; choose one of the two."
        )
    assert model.llm_shape is not None  # a model with image tokens has one
    stages = plan_schedule(name, model.llm_shape.layers, reduction.slots)
    return dataclasses.replace(reduction, stages=stages, schedule=find_schedule(name))


def _resolve_reducer(model: "ModelSpec") -> Reduction:
    name, fusion, vision = model.reduce, model.fusion.fusion, model.vision_shape
    if vision is None:
        if name or model.keep or model.tokens:
            raise UserError("A language model alone has no image tokens to reduce.")
        return Reduction("", 0, 0)
    tokens = tokens_per_image(model.fusion, vision.grid)
    if model.tokens:
        if model.tokens not in (budgets := model.fusion.budgets or (tokens,)):
            made = ", ".join(map(str, budgets))
            raise UserError(f"tokens={model.tokens} is not a budget of the model: {fusion} makes {made} per image.")
        tokens = model.tokens
    if not name:
        if model.keep:
            names = ", ".join(REDUCERS.known)
            raise UserError(f"keep={model.keep} has no effect without reduce: set reduce to one of {names}.")
        return Reduction("", tokens, tokens)
    reducer = find_reducer(name)
    keep = model.keep or max(1, tokens // 4)
    if not 1 <= keep <= tokens:
        raise UserError(f"keep={keep} must be 1 to {tokens}, the image tokens per image of {fusion}.")
    if isinstance(reducer, DecoderReducer):
        llm = model.llm_shape
        assert llm is not None  # a model with image tokens to reduce has one
        drops = reducer.drops(llm.layers)
        if llm.layers <= drops[-1]:
            raise UserError(f"reduce={name} acts after decoder layer {drops[-1]}, but {model.llm} has no more layers.")
        return Reduction(name, tokens, keep, reducer, plan_stages(name, tokens, keep, drops, llm.layers, reducer.count))
    if isinstance(reducer, TokenReducer):
        if reducer.check is not None:
            reducer.check(tokens, keep)
    else:
        if not find_fusion(model.fusion).spec.per_patch:
            names = ", ".join(name for name, known in FUSIONS.known.items() if known.spec.per_patch)
            raise UserError(f"reduce={name} needs a fusion that keeps every patch ({names}), but {fusion} does not.")
        if model.tokens:
            raise UserError(f"reduce={name} chooses among all patches: leave out tokens={model.tokens}.")
        if reducer.check is not None:
            reducer.check(model.fusion, vision, keep)
    return Reduction(name, tokens, keep, reducer)


def plan_stages(
    name: str, tokens: int, keep: int, drops: Sequence[int], layers: int, count: Count
) -> tuple[Stage, ...]:
    """The stages of a :class:`DecoderReducer`, which all keep the same fraction of the tokens left.

    Args:
      name: of the reducer, for messages.
      tokens: N.
      keep: as ``count`` says.
      drops: layers before each stage.
      layers: L.

    Raises:
      UserError: the layers before the first drop read so many tokens that the average cannot be so low.
    """
    lengths = [b - a for a, b in itertools.pairwise((0, *drops, layers))]

    def keeps(ratio: float) -> list[float]:
        return [tokens * ratio**i for i in range(1, len(lengths))]

    def average(kept: Sequence[float]) -> float:
        return sum(n * length for n, length in zip((tokens, *kept), lengths, strict=True)) / layers

    if count == "after":
        ratio = (keep / tokens) ** (1 / len(drops))
    elif keep < (least := average([1.0] * len(drops))):
        raise UserError(
            f"reduce={name}: keep={keep} is too low for an average over {layers} layers, because the first {drops[0]} "
            f"read all {tokens} tokens; keep at least {math.ceil(least)}, or drop earlier with after=."
        )
    else:
        low, ratio = 0.0, 1.0
        for _ in range(60):  # a float64 has no more bits to settle
            middle = (low + ratio) / 2
            low, ratio = (middle, ratio) if average(keeps(middle)) < keep else (low, middle)
    return tuple(Stage(after, max(1, round(kept))) for after, kept in zip(drops, keeps(ratio), strict=True))


def grid_of(count: int, side: int) -> tuple[int, int]:
    """Rows and columns of a grid of ``count`` cells: the most nearly square one, no side above ``side``.

    Images are more often wide than high, so a grid that is not square has more columns than rows; at most twice as
    many.

    Raises:
      UserError: there is no such grid.
    """

    def find(count: int) -> tuple[int, int] | None:
        for rows in range(math.isqrt(count), 0, -1):
            if count % rows == 0 and count // rows <= min(side, 2 * rows):
                return rows, count // rows
        return None

    if (found := find(count)) is None:
        near = [str(next(filter(find, numbers))) for numbers in (range(count, 0, -1), range(count, side * side + 1))]
        raise UserError(
            f"keep={count} is not the number of cells of a grid of at most {side}×{side} with up to twice as many "
            f"columns as rows; the nearest are {near[0]} and {near[1]}."
        )
    return found
