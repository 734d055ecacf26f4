"""Spatial token fusion (arXiv 2506.07138): merges each window of patches by a convolution. Alone, and after MBTF.

A k×k convolution of stride k, then a 1×1 convolution to the language model's width: 24×24 = 576 tokens become 144 for
k = 2. ``variant="code"`` computes what the authors' program does, conv-GELU-linear; ``variant="paper"`` what their
figure shows: three convolutions, each with a GELU, the first of which keeps all k²·C values of a window (the paper
calls this lossless).
"""

import dataclasses

from flax import nnx
from jaxtyping import Array, Float

from stf_jax.config import FusionConfig
from stf_jax.models.fusions.base import FusionSpec, Grid, pad_grid
from stf_jax.models.fusions.mbtf import MBTF, mbtf_taps
from stf_jax.models.fusions.parts import window_sources
from stf_jax.models.layers import Linear, StridedConv, gelu, initializers
from stf_jax.models.tensor_names import UNFOLDED, TensorNames, name_layer


class STF(nnx.Module):
    """Spatial token fusion: [B, g, g, C] → [B, g/k, g/k, D]."""

    spec = FusionSpec()
    torch_file = "stf_torch.py"

    @staticmethod
    def resolve(config: FusionConfig, grid: Grid) -> FusionConfig:
        """The config with STF's size in place of zero."""
        hidden = config.stf_hidden or 4 * config.kernel**2 * grid.channels
        return dataclasses.replace(config, stf_hidden=hidden)

    def __init__(self, rngs: nnx.Rngs, config: FusionConfig, grid: Grid, out: int) -> None:
        k, channels = config.kernel, grid.channels
        window = k * k * channels
        hidden = config.stf_hidden
        self.paper = config.variant == "paper"
        if self.paper:
            conv_init = initializers(config.init, window, window)
            self.conv = StridedConv(rngs, k, (channels, "channel"), (window, "embed"), **conv_init)
            self.mix = Linear(rngs, [(window, "embed")], [(hidden, "mlp")], **initializers(config.init, window, hidden))
        else:
            conv_init = initializers(config.init, window, hidden)
            self.conv = StridedConv(rngs, k, (channels, "embed"), (hidden, "mlp"), **conv_init)
        self.out = Linear(rngs, [(hidden, "mlp")], [(out, "embed")], **initializers(config.init, hidden, out))

    def __call__(self, x: Float[Array, "B g g C"]) -> Float[Array, "B h h D"]:
        x = gelu(self.conv(x))
        return gelu(self.out(gelu(self.mix(x)))) if self.paper else self.out(x)

    def sources(self, x: Float[Array, "B g g C"]) -> Float[Array, "B N P"]:
        """The window of each token."""
        return window_sources(x, self.conv.size)

    @staticmethod
    def tensor_names(config: FusionConfig) -> TensorNames:
        """Names of the parameters in exports, as in the authors' code.

        There the convolution is a linear layer over the values of a window, channel by channel.
        """
        conv = name_layer("conv", "mm_projector.0", UNFOLDED)
        if config.variant == "paper":
            return conv | name_layer("mix", "mm_projector.2") | name_layer("out", "mm_projector.4")
        return conv | name_layer("out", "mm_projector.2")


class MBTFSTF(nnx.Module):
    """The paper's fusion, MBTF then STF: [B, g, g, M·C] → [B, g/k, g/k, D]."""

    spec = FusionSpec(taps=mbtf_taps, windows=False)  # padded after MBTF
    torch_file = STF.torch_file

    @staticmethod
    def resolve(config: FusionConfig, grid: Grid) -> FusionConfig:
        """The config with MBTF's and STF's sizes in place of zeros."""
        config = MBTF.resolve(config, grid)
        return STF.resolve(config, dataclasses.replace(grid, width=config.mbtf_width, taps=1))

    def __init__(self, rngs: nnx.Rngs, config: FusionConfig, grid: Grid, out: int) -> None:
        self.mbtf = MBTF(rngs, config, grid.channels, config.mbtf_width)
        self.stf = STF(rngs, config, dataclasses.replace(grid, width=config.mbtf_width, taps=1), out)

    def __call__(self, x: Float[Array, "B g g MC"]) -> Float[Array, "B h h D"]:
        return self.stf(pad_grid(self.mbtf(x), self.stf.conv.size))

    def sources(self, x: Float[Array, "B g g MC"]) -> Float[Array, "B N P"]:
        """The window of each token."""
        return self.stf.sources(pad_grid(x, self.stf.conv.size))

    @staticmethod
    def tensor_names(config: FusionConfig) -> TensorNames:
        """Names of the parameters in exports."""
        return {**MBTF.name_tensors(), **{f"stf/{path}": name for path, name in STF.tensor_names(config).items()}}


COMPONENTS = {"stf": STF, "mbtf_stf": MBTFSTF}
