"""The whole model: vision tower, fusion, and a language model that reads image tokens among its text tokens.

Axis letters: B rows, T positions, M images per row, N tokens per image, D language model width, V vocabulary.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from stf_jax.config import ModelConfig
from stf_jax.models.cells import CellHead
from stf_jax.models.fusion import Fusion, tapped_blocks
from stf_jax.models.layers import shard_rows
from stf_jax.models.llm import Cache, Decoder
from stf_jax.models.presets import llm_of, vision_of
from stf_jax.models.selection import FULL_LAYERS, attention_paid, reduction, remaining, sampled, visionzip
from stf_jax.models.vit import VisionTower


class VLM(nnx.Module):
    """Tower, fusion and decoder. Parameters lie under ``vision/``, ``fusion/`` and ``llm/``.

    With ``model.cells`` the head that a tower is trained by lies under ``cells/``.

    Of a language model alone (a ResolvedModel without ``vision_shape``) there is no tower and no fusion: it takes no
    images.
    """

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig):
        """Raises UserError for an unknown preset or fusion, a kernel that does not divide the grid, or a reduction."""
        vision, llm = vision_of(config), llm_of(config)
        how = dict(scan=config.scan_layers, remat=config.remat)
        self.dtype = jnp.dtype(config.precision)
        self.reduction = reduction(config)
        if vision is not None:
            self.taps = tapped_blocks(config.fusion, vision.layers)
            seeing = (
                "auto" if config.attention == "splash" else config.attention
            )  # splash is for causal attention alone
            self.vision = VisionTower(rngs, vision, attention=seeing, **how)
            self.fusion = Fusion(rngs, config.fusion, vision, llm.width)
            if config.cells:
                self.cells = CellHead(rngs, vision, config.cells)
        self.llm = Decoder(rngs, llm, attention=config.attention, **how)

    def image_tokens(self, images: jax.Array) -> jax.Array:
        """Image tokens [B, M·N, D] of images uint8 [B, M, H, W, 3]."""
        batch, count = images.shape[:2]
        images = images.reshape(batch * count, *images.shape[2:])
        if self.reduction.name == "visionzip":
            states = visionzip(self.vision, images, self.taps, self.dtype, self.reduction.keep)
        else:
            states = self.vision(images, self.taps, self.dtype)
        if self.reduction.name == "random":
            states = sampled(states, self.reduction.keep)
        tokens = self.fusion(states)
        return tokens.reshape(batch, -1, tokens.shape[-1])

    def cell_scores(self, images: jax.Array) -> jax.Array:
        """Scores of all cells, float32 [B·M, S, S, classes] (models/cells.py), of images uint8 [B, M, H, W, 3]."""
        images = images.reshape(-1, *images.shape[2:])
        return self.cells(self.vision(images, self.taps[:1], self.dtype)[0])

    def embed(self, tokens: jax.Array, image_slots: jax.Array, image_tokens: jax.Array | None) -> jax.Array:
        """Text embeddings with the image tokens in their slots.

        The slots were laid out by the data pipeline, so nothing is searched for here: each position gathers its token.

        Args:
          tokens: int32 [B, T].
          image_slots: int32 [B, T], index into the row's image tokens, −1 for text.
          image_tokens: [B, M·N, D], or None for rows without images.

        Returns:
          [B, T, D].
        """
        x = self.llm.embed(tokens, self.dtype)
        if image_tokens is None:
            return x
        taken = jnp.take_along_axis(image_tokens, jnp.maximum(image_slots, 0)[:, :, None], axis=1)
        return jnp.where(image_slots[:, :, None] >= 0, taken, x)

    def prefill(
        self, tokens: jax.Array, image_slots: jax.Array, lengths: jax.Array, images: jax.Array
    ) -> tuple[jax.Array, Cache, jax.Array]:
        """Reads prompts for the decoder to go on from.

        Args:
          tokens, image_slots: int32 [B, T], as :meth:`embed` takes them; beyond a prompt they are never looked at.
          lengths: int32 [B], of prompts; where image tokens are dropped in the decoder, a row has room besides for
            those that it would drop of images, up to M, that it does not have.
          images: uint8 [B, M, H, W, 3]; M may be 0.

        Returns:
          The last token's hidden state [B, D] after the final norm; the cache, one slot a position; and how many of a
          prompt's positions decoder layers after :data:`FULL_LAYERS` hold, int32 [B].
        """
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        image_tokens = self.image_tokens(images) if images.shape[1] else None
        x = shard_rows(self.embed(tokens, image_slots, image_tokens))
        held, choose = lengths, None
        if self.reduction.dropped and images.shape[1]:
            image = image_slots >= 0
            image_counts = image.sum(1) // self.reduction.tokens
            held = lengths - image_counts * self.reduction.dropped
            length = tokens.shape[1] - images.shape[1] * self.reduction.dropped

            def choose(q, k):
                paid = attention_paid(q, k, lengths)
                return remaining(paid, image, lengths, image_counts * self.reduction.keep, length)

        hidden, cache = self.llm.prefill(x, positions, FULL_LAYERS, choose)
        return jnp.take_along_axis(hidden, jnp.maximum(held - 1, 0)[:, None, None], axis=1)[:, 0], cache, held

    def hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None,
        image_slots: jax.Array,
        images: jax.Array,
    ) -> jax.Array:
        """The decoder's hidden states [B, T, D] after its final norm.

        Args:
          tokens, positions: int32 [B, T]; positions count anew in each segment.
          segment_ids: int32 [B, T], conversations of a packed row, or None where each row is one.
          image_slots: int32 [B, T], as in :meth:`embed`.
          images: uint8 [B, M, H, W, 3]; M may be 0.
        """
        image_tokens = self.image_tokens(images) if images.shape[1] else None
        x = shard_rows(self.embed(tokens, image_slots, image_tokens))
        return self.llm(x, positions, segment_ids)

    def __call__(self, *row: jax.Array | None) -> jax.Array:
        """Next-token logits, float32 [B, T, V], of what :meth:`hidden` takes."""
        return self.llm.logits(self.hidden(*row))


def slots_per_image(config: ModelConfig) -> int:
    """Image tokens per image in this model's prompts. Raises UserError as :class:`VLM` does."""
    return reduction(config).slots
