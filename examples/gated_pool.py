"""A fusion of one's own: a weighted mean of each window, with trained weights (docs/your-own-fusion.md)."""

import jax
import jax.numpy as jnp
from flax import nnx

from stf_jax.config import FusionConfig
from stf_jax.models.fusions.base import FusionSpec, Grid
from stf_jax.models.layers import Linear, gelu


class GatedPool(nnx.Module):
    spec = FusionSpec()
    torch_file = "gated_pool_torch.py"

    def __init__(self, rngs: nnx.Rngs, config: FusionConfig, grid: Grid, out: int):
        self.kernel, channels = config.kernel, grid.channels
        self.score = Linear(rngs, [(channels, "embed")], [(1, "norm")])
        self.first = Linear(rngs, [(channels, "embed")], [(out, "mlp")])
        self.second = Linear(rngs, [(out, "mlp")], [(out, "embed")])

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, side, _, channels = x.shape
        k = self.kernel
        windows = x.reshape(batch, side // k, k, side // k, k, channels)
        weights = jax.nn.softmax(self.score(windows).astype(jnp.float32), axis=(2, 4)).astype(x.dtype)
        return self.second(gelu(self.first((weights * windows).sum((2, 4)))))
