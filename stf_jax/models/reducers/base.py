"""What a reducer is: it leaves fewer image tokens at inference for a model that was trained with all of them.

A reducer is an object in a file of this folder, or in your own, named in a config as ``package.module:thing``. It acts
on the tower's states before a fusion that maps each patch by itself, or inside the decoder:

    MINE = PatchReducer(reduce)                   # reduce(tower, images, taps, dtype, keep) -> states of `keep` tokens
    MINE = DecoderReducer(score, after_layers=2)  # score(q, k, is_image, lengths) -> [B, T]; the highest are kept

Axis letters: B rows or images, T positions, N image tokens per image, P patches, C tower width, H heads, K kv heads,
Dh head size.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt8

from stf_jax.config import FusionConfig, UserError
from stf_jax.models.fusions.base import FUSIONS, find_fusion, tokens_per_image
from stf_jax.models.towers.base import VisionConfig
from stf_jax.models.towers.vit import VisionTower
from stf_jax.registry import Registry

if TYPE_CHECKING:  # spec.py imports this file
    from stf_jax.models.spec import ModelSpec


@dataclasses.dataclass(frozen=True)
class PatchReducer:
    """Leaves fewer tokens in the tower's states, so prompts become shorter.

    Attributes:
      reduce: called with the tower, images [B, H, W, 3], taps, the compute type and ``keep``; returns one state
        [B, keep, C] per tap, as the tower's call returns states [B, P, C].
      check: raises UserError if the reducer does not fit the config of the fusion or of the tower.
    """

    reduce: Callable[[VisionTower, jax.Array, tuple[int, ...], DTypeLike, int], tuple[jax.Array, ...]]
    check: Callable[[FusionConfig, VisionConfig], None] | None = None


@dataclasses.dataclass(frozen=True)
class DecoderReducer:
    """Drops image tokens inside the decoder, so later layers and their caches are shorter.

    Each row ranks the tokens of all its images together, and keeps ``keep`` times the number of its images. Kept tokens
    and text keep their positions.

    Attributes:
      score: called with the last full layer's queries [B, T, H, Dh] and keys [B, T, K, Dh], both with rotary positions,
        which positions are image tokens [B, T], and lengths of prompts [B]; returns scores [B, T].
      after_layers: decoder layers that read all image tokens, at least 1.
    """

    score: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
    after_layers: int

    def __post_init__(self) -> None:
        if self.after_layers < 1:
            raise ValueError("A DecoderReducer needs a layer to score its tokens: after_layers must be at least 1.")


REDUCERS: Registry[PatchReducer | DecoderReducer] = Registry("model.reduce", "stf_jax.models.reducers")


def find_reducer(name: str) -> PatchReducer | DecoderReducer:
    """The reducer of that name. Raises UserError for an unknown name, or something that is not a reducer."""
    found = REDUCERS.find(name)
    if not isinstance(found, PatchReducer | DecoderReducer):
        raise UserError(f"model.reduce={name} is not a PatchReducer or DecoderReducer of stf_jax.models.reducers.base.")
    return found


@dataclasses.dataclass(frozen=True)
class Reduction:
    """How many of the image tokens of an image are kept, and what drops the others."""

    name: str  # as config.reduce; "": no reduction
    tokens: int  # N, the output of the fusion
    keep: int  # tokens that are kept
    reducer: PatchReducer | DecoderReducer | None = None

    @property
    def slots(self) -> int:
        """Image tokens per image in a prompt."""
        return self.keep if isinstance(self.reducer, PatchReducer) else self.tokens

    @property
    def dropped(self) -> int:
        """Those of :attr:`slots` that the decoder drops."""
        return self.slots - self.keep

    def dropped_before(self, layer: int) -> int:
        """Those of :attr:`slots` that this decoder layer, counted from 0, does not read."""
        return self.dropped if isinstance(self.reducer, DecoderReducer) and layer >= self.reducer.after_layers else 0

    def tower_states(
        self, tower: VisionTower, images: UInt8[Array, "B H W 3"], taps: tuple[int, ...], dtype: DTypeLike
    ) -> tuple[Float[Array, "B _ C"], ...]:
        """The tower's states for the fusion: of all patches, or what a :class:`PatchReducer` leaves of them.

        Raises:
          UserError: the reducer returns another number of states or tokens than it should.
        """
        if not isinstance(self.reducer, PatchReducer):
            return tower(images, taps, dtype)
        states = self.reducer.reduce(tower, images, taps, dtype, self.keep)
        counts, expected = [state.shape[1] for state in states], [self.keep] * len(taps)
        if counts != expected:
            raise UserError(f"{self.name} returns states of {counts} tokens, one number per tap; expected {expected}.")
        return states


def resolve_reduction(model: "ModelSpec") -> Reduction:
    """The reduction that the model's ``reduce`` and ``keep`` ask for.

    Raises:
      UserError: they do not fit each other or the model, or as :func:`stf_jax.models.fusions.base.tokens_per_image`.
    """
    name, fusion, vision = model.reduce, model.fusion.fusion, model.vision_shape
    if vision is None:
        if name or model.keep:
            raise UserError("A language model alone has no image tokens to reduce.")
        return Reduction("", 0, 0)
    tokens = tokens_per_image(model.fusion, vision.grid)
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
        if llm.layers <= reducer.after_layers:
            raise UserError(
                f"reduce={name} acts after decoder layer {reducer.after_layers}, but {model.llm} has no more layers."
            )
    else:
        if not find_fusion(model.fusion).spec.per_patch:
            names = ", ".join(name for name, known in FUSIONS.known.items() if known.spec.per_patch)
            raise UserError(f"reduce={name} needs a fusion that keeps every patch ({names}), but {fusion} does not.")
        if reducer.check is not None:
            reducer.check(model.fusion, vision)
    return Reduction(name, tokens, keep, reducer)


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
