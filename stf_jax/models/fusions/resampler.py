"""The resampler that Honeybee compares with (arXiv 2312.06742)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from stf_jax.config import FusionConfig
from stf_jax.models.fusions.base import FusionSpec, Grid
from stf_jax.models.fusions.parts import CrossAttention
from stf_jax.models.layers import LayerNorm, Linear, apply_layers, initializers, parameter, unroll_layers, zeros
from stf_jax.models.tensor_names import MATRIX, Tensor, TensorNames, name_layer, name_norm

DEPTH = 6  # number of blocks by default


class Resampler(nnx.Module):
    """The resampler that Honeybee compares with, in the style of a Q-Former: [B, g, g, C] → [B, g/k, g/k, D].

    One learned query per token attends to the queries and patches together, in L blocks like mPLUG-Owl's (arXiv
    2304.14178). BLIP-2's Q-Former (arXiv 2301.12597), which starts from BERT's weights, alternates between the two;
    this one starts from scratch. Heads have 64 channels, or the greatest common divisor of 64 and C. Queries start at
    zero. The original has attention dropout of 0.1 in training, 64 queries by default, and all linear layers start as
    with ``init="normal"``. Qwen-VL's resampler (arXiv 2308.12966) is another one: a single cross-attention with 2-D
    sine positions and no MLP.
    """

    spec = FusionSpec(windows=False, orders=False)
    torch_file = "resampler_torch.py"

    @staticmethod
    def resolve(config: FusionConfig, grid: Grid) -> FusionConfig:
        """The config with the published depth in place of zero."""
        del grid
        return dataclasses.replace(config, depth=config.depth or DEPTH)

    def __init__(self, rngs: nnx.Rngs, config: FusionConfig, grid: Grid, out: int) -> None:
        depth, width = config.depth, grid.channels
        self.side, self.layers = math.ceil(grid.side / config.kernel), range(depth)
        self.enter = Linear(rngs, [(width, "channel")], [(width, "embed")], **initializers(config.init, width, width))
        self.queries = parameter(rngs, [(self.side**2, "position"), (width, "embed")], zeros)
        self.blocks = ResamplerBlock(rngs, config, width, depth)
        self.exit = Linear(rngs, [(width, "embed")], [(out, "mlp")], **initializers(config.init, width, out))

    def __call__(self, x: Float[Array, "B g g C"]) -> Float[Array, "B h h D"]:
        queries, patches = self._enter(x)
        queries = apply_layers(self.blocks, queries, patches, layers=self.layers, scan=False, remat="none")
        return self.exit(queries).reshape(len(x), self.side, self.side, -1)

    def sources(self, x: Float[Array, "B g g C"]) -> Float[Array, "B N P"]:
        """The attention of each query to patches, averaged over heads and blocks, as shares of that to all patches."""
        queries, patches = self._enter(x)
        total = jnp.zeros((len(x), self.side**2, patches.shape[1]))
        for block in unroll_layers(self.blocks, self.layers):
            total += block.attention.weights(*block.normalize(queries, patches))[:, :, self.side**2 :]
            queries = block(queries, patches)
        return total / total.sum(-1, keepdims=True)

    def _enter(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The queries [B, N, C] and patches [B, P, C] that the first block reads."""
        batch, width = x.shape[0], x.shape[-1]
        patches = self.enter(x.reshape(batch, -1, width))
        return jnp.broadcast_to(self.queries[...].astype(x.dtype), (batch, self.side**2, width)), patches

    @staticmethod
    def tensor_names(config: FusionConfig) -> TensorNames:
        """Names of the parameters in exports."""
        del config
        blocks = "mm_projector.layers.{layer}"
        return {
            "queries": Tensor("mm_projector.query_tokens", MATRIX),
            **name_layer("enter", "mm_projector.input"),
            **name_norm("blocks/query_norm", f"{blocks}.query_norm"),
            **name_norm("blocks/patch_norm", f"{blocks}.patch_norm"),
            **CrossAttention.name_tensors("blocks/attention", f"{blocks}.attention"),
            **name_norm("blocks/mlp_norm", f"{blocks}.mlp_norm"),
            **name_layer("blocks/gate", f"{blocks}.gate_proj"),
            **name_layer("blocks/up", f"{blocks}.up_proj"),
            **name_norm("blocks/hidden_norm", f"{blocks}.hidden_norm"),
            **name_layer("blocks/down", f"{blocks}.down_proj"),
            **name_layer("exit", "mm_projector.output"),
        }


class ResamplerBlock(nnx.Module):
    """Queries [B, N, C] attend to themselves and to patches [B, P, C], then a gated MLP (SwiGLU) with an inner norm.

    The residual of attention starts from the normalized queries. Holds all blocks' parameters; a call sees one block's.
    """

    def __init__(self, rngs: nnx.Rngs, config: FusionConfig, width: int, stack: int) -> None:
        width_axis, hidden = (width, "embed"), (4 * width, "mlp")
        up_init, down_init = (initializers(config.init, *fans) for fans in ((width, 4 * width), (4 * width, width)))
        self.query_norm = LayerNorm(rngs, width, 1e-5, stack=stack)
        self.patch_norm = LayerNorm(rngs, width, 1e-5, stack=stack)
        self.attention = CrossAttention(rngs, config, width, 64, stack=stack)
        self.mlp_norm = LayerNorm(rngs, width, 1e-5, stack=stack)
        self.gate = Linear(rngs, [width_axis], [hidden], stack=stack, **up_init)
        self.up = Linear(rngs, [width_axis], [hidden], stack=stack, **up_init)
        self.hidden_norm = LayerNorm(rngs, 4 * width, 1e-6, stack=stack)
        self.down = Linear(rngs, [hidden], [width_axis], stack=stack, **down_init)

    def __call__(self, queries: Float[Array, "B N C"], patches: Float[Array, "B P C"]) -> Float[Array, "B N C"]:
        queries, context = self.normalize(queries, patches)
        x = queries + self.attention(queries, context, context)
        y = self.mlp_norm(x)
        return x + self.down(self.hidden_norm(jax.nn.silu(self.gate(y)) * self.up(y)))

    def normalize(self, queries: jax.Array, patches: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The normalized queries, and what they attend to: themselves, then the normalized patches."""
        queries = self.query_norm(queries)
        return queries, jnp.concatenate([queries, self.patch_norm(patches)], axis=1)


COMPONENTS = {"resampler": Resampler}
