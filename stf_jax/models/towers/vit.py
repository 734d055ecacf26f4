"""The vision tower: CLIP's and SigLIP's ViT in one module, read through taps.

CLIP (arXiv 2103.00020): class token, layer norm before the blocks, quick-GELU, patches without bias.
SigLIP (arXiv 2303.15343): no class token, no layer norm before the blocks, tanh-GELU, patches with bias.

Axis letters: B images, P patches, S tokens in the tower (P, one more with a class token), D width, H heads.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from stf_jax.config import UserError
from stf_jax.models.attention import Mask, attention
from stf_jax.models.layers import (
    ACTIVATIONS,
    KEPT_ATTENTION,
    KEPT_MLP,
    Init,
    LayerNorm,
    Linear,
    StridedConv,
    apply_layers,
    normal,
    parameter,
    shard_rows,
)
from stf_jax.models.positions import interpolation_weights
from stf_jax.models.towers.base import VisionConfig


def _residual_init(config: VisionConfig, fan_in: int) -> Init:
    # As in CLIP, the sum of what all blocks add to the residual stream starts no larger than its input.
    return normal((2 * config.layers * fan_in) ** -0.5)


class Attention(nnx.Module):
    """Bidirectional multi-head self-attention with biases."""

    def __init__(self, rngs: nnx.Rngs, config: VisionConfig, implementation: str) -> None:
        width, heads = (config.width, "embed"), (config.heads, "heads")
        head_dim = (config.width // config.heads, "head_dim")
        stack = config.layers
        self.implementation = implementation
        self.query = Linear(rngs, [width], [heads, head_dim], stack=stack)
        self.key = Linear(rngs, [width], [heads, head_dim], stack=stack)
        self.value = Linear(rngs, [width], [heads, head_dim], stack=stack)
        self.out = Linear(
            rngs, [heads, head_dim], [width], stack=stack, kernel_init=_residual_init(config, config.width)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = (checkpoint_name(y, KEPT_ATTENTION) for y in (self.query(x), self.key(x), self.value(x)))
        return self.out(attention(q, k, v, Mask(), self.implementation))


class MLP(nnx.Module):
    """Two linear layers with an activation between."""

    def __init__(self, rngs: nnx.Rngs, config: VisionConfig) -> None:
        width, hidden = (config.width, "embed"), (config.mlp, "mlp")
        self.activation = config.activation
        self.up = Linear(rngs, [width], [hidden], stack=config.layers)
        self.down = Linear(rngs, [hidden], [width], stack=config.layers, kernel_init=_residual_init(config, config.mlp))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(ACTIVATIONS[self.activation](checkpoint_name(self.up(x), KEPT_MLP)))


class Block(nnx.Module):
    """A pre-norm transformer block, [B, S, D] → [B, S, D]. Holds all layers' parameters; a call sees one layer's."""

    def __init__(self, rngs: nnx.Rngs, config: VisionConfig, implementation: str) -> None:
        self.attention_norm = LayerNorm(rngs, config.width, config.norm_eps, stack=config.layers)
        self.attention = Attention(rngs, config, implementation)
        self.mlp_norm = LayerNorm(rngs, config.width, config.norm_eps, stack=config.layers)
        self.mlp = MLP(rngs, config)

    def __call__(self, x: jax.Array) -> jax.Array:
        with jax.named_scope("attention"):
            x = x + self.attention(self.attention_norm(x))
        with jax.named_scope("mlp"):
            return x + self.mlp(self.mlp_norm(x))


class VisionTower(nnx.Module):
    """A ViT that returns the hidden states after chosen blocks."""

    block: Callable[[nnx.Rngs, VisionConfig, str], Block] = Block  # another family may have its own

    def __init__(
        self,
        rngs: nnx.Rngs,
        config: VisionConfig,
        *,
        scan: bool = True,
        remat: str = "none",
        attention: str = "auto",
    ) -> None:
        self.config, self.scan, self.remat = config, scan, remat
        width = config.width
        patches, embed = config.grid**2, (width, "embed")
        self.patch_embed = StridedConv(rngs, config.patch_size, (3, "channel"), embed, bias=config.patch_bias)
        self.class_token = parameter(rngs, [(width, "norm")], normal(width**-0.5)) if config.class_token else None
        positions = patches + config.class_token
        # As large as the patch embeddings, so that a tower trained from scratch distinguishes positions from the start.
        self.position_embed = parameter(rngs, [(positions, "position"), embed], normal(0.5))
        self.pre_norm = LayerNorm(rngs, width, config.norm_eps) if config.pre_norm else None
        self.blocks = self.block(rngs, config, attention)

    def __call__(
        self, images: UInt8[Array, "B H W 3"], taps: tuple[int, ...], dtype: DTypeLike
    ) -> tuple[Float[Array, "B P D"], ...]:
        """Hidden states after the tapped blocks, in the order of ``taps``.

        Blocks above the highest tap are not computed, states between taps are not kept, no final norm is applied (as in
        ``hidden_states`` of transformers' CLIPVisionModel), and the class token is dropped.

        Args:
          images: uint8 [B, H, W, 3], H = W = ``config.image_size``; normalized here. For another number of whole
            patches, the position embeddings are interpolated (models/positions.py).
          taps: 1-based block numbers; 0 is the embedding that enters the first block.
          dtype: the compute type.

        Returns:
          For each tap, [B, P, D] in ``dtype``, patches in row-major order.

        Raises:
          UserError: a tap that the tower does not have.
        """
        return tuple(state[:, int(self.config.class_token) :] for state in self.states(images, taps, dtype))

    def states(
        self, images: UInt8[Array, "B H W 3"], taps: tuple[int, ...], dtype: DTypeLike
    ) -> tuple[Float[Array, "B S D"], ...]:
        """Like a call, but keeps the class token, if any, before the patches."""
        for tap in taps:
            if not 0 <= tap <= self.config.layers:
                raise UserError(f"Tap {tap} is outside the vision tower, whose blocks are 1 to {self.config.layers}.")
        with jax.named_scope("vision"):
            x = shard_rows(self._embed(images, dtype))
            states, depth = {}, 0
            for tap in sorted(set(taps)):
                x = apply_layers(self.blocks, x, layers=range(depth, tap), scan=self.scan, remat=self.remat)
                states[tap] = x
                depth = tap
            return tuple(states[tap] for tap in taps)

    def _embed(self, images: jax.Array, dtype: DTypeLike) -> jax.Array:
        config = self.config
        mean, std = (jnp.asarray(value, jnp.float32) for value in (config.mean, config.std))
        pixels = ((images.astype(jnp.float32) / 255 - mean) / std).astype(dtype)
        rows, columns = (length // config.patch_size for length in images.shape[1:3])
        x = self.patch_embed(pixels[:, : rows * config.patch_size, : columns * config.patch_size])
        x = x.reshape(x.shape[0], -1, config.width)
        if self.class_token is not None:
            class_token = jnp.broadcast_to(self.class_token[...].astype(dtype), (x.shape[0], 1, config.width))
            x = jnp.concatenate([class_token, x], axis=1)
        x = x + self._positions(rows, columns).astype(dtype)
        return x if self.pre_norm is None else self.pre_norm(x)

    def _positions(self, rows: int, columns: int) -> jax.Array:
        table, side = self.position_embed[...], self.config.grid
        if (rows, columns) == (side, side):
            return table
        first = int(self.config.class_token)
        weights = (jnp.asarray(interpolation_weights(side, length), jnp.float32) for length in (rows, columns))
        grid = table[first:].astype(jnp.float32).reshape(side, side, -1)
        grid = jnp.einsum("yi,xj,ijd->yxd", *weights, grid, precision="highest").reshape(rows * columns, -1)
        return jnp.concatenate([table[:first], grid.astype(table.dtype)])
