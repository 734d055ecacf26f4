"""A fusion of one's own: the largest value of each channel in a window, then one linear layer."""

from flax import nnx

from stf_jax.models.fusions.base import FusionSpec
from stf_jax.models.layers import Linear


class MaxPool(nnx.Module):
    spec = FusionSpec()
    torch_file = "max_pool_torch.py"

    def __init__(self, rngs, config, grid, out):
        self.kernel = config.kernel
        self.out = Linear(rngs, [(grid.channels, "embed")], [(out, "mlp")])

    def __call__(self, x):
        batch, side, _, channels = x.shape
        windows = x.reshape(batch, side // self.kernel, self.kernel, side // self.kernel, self.kernel, channels)
        return self.out(windows.max((2, 4)))
