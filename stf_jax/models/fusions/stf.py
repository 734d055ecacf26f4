"""Spatial token fusion (arXiv 2506.07138): merges each window of patches by a convolution. Alone, and after MBTF.

A k×k convolution of stride k, then a 1×1 convolution to the language model's width: 24×24 = 576 tokens become 144 for
k = 2. ``variant="code"`` computes what the authors' program does, conv-GELU-linear; ``variant="paper"`` what their
figure shows: three convolutions, each with a GELU, the first of which keeps all k²·C values of a window (the paper
calls this lossless).

At a budget of n² tokens (``model.fusion.budgets``), windows are as large as they must be, and all budgets share all
parameters: a kernel of a larger window repeats each entry of the k×k kernel, divided by how often it does; that of a
smaller one adds entries up. This equals the k×k convolution of a grid with kn patches a side, of which each is the mean
of a few patches, or a copy.
"""

import dataclasses
import math
from collections.abc import Sequence

from flax import nnx
from jaxtyping import Array, Float

from stf_jax.config import FusionConfig
from stf_jax.models.fusions.base import FusionSpec, Grid, own_side, pad_grid
from stf_jax.models.fusions.mbtf import MBTF, mbtf_taps
from stf_jax.models.fusions.parts import average_windows, window_sources
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

    def nested(self, x: Float[Array, "B g g C"], budgets: Sequence[int]) -> list[Float[Array, "B n n D"]]:
        """The tokens at each budget n²."""
        return [self(_resize(x, self.conv.size * math.isqrt(budget))) for budget in budgets]

    @staticmethod
    def fitting_budgets(config: FusionConfig, side: int) -> list[int]:
        """The numbers of windows of whole patches, for whose side k is a multiple or a divisor."""
        own = own_side(config, side)
        patches = own * config.kernel  # with those that pad the grid
        return [n**2 for n in range(patches, 0, -1) if patches % n == 0 and (n % own == 0 or own % n == 0)]

    def sources(self, x: Float[Array, "B g g C"]) -> Float[Array, "B N P"]:
        """The window of each token."""
        return window_sources(x, self.conv.size)

    def nested_sources(self, x: Float[Array, "B g g C"], tokens: int) -> Float[Array, "B N P"]:
        """The window of each token at a budget."""
        return window_sources(x, x.shape[1] // math.isqrt(tokens))

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
        return self.stf(self._pad(self.mbtf(x)))

    def nested(self, x: Float[Array, "B g g MC"], budgets: Sequence[int]) -> list[Float[Array, "B n n D"]]:
        """The tokens at each budget n²; MBTF runs once."""
        return self.stf.nested(self._pad(self.mbtf(x)), budgets)

    fitting_budgets = STF.fitting_budgets

    def sources(self, x: Float[Array, "B g g MC"]) -> Float[Array, "B N P"]:
        """The window of each token."""
        return self.stf.sources(self._pad(x))

    def nested_sources(self, x: Float[Array, "B g g MC"], tokens: int) -> Float[Array, "B N P"]:
        """The window of each token at a budget."""
        return self.stf.nested_sources(self._pad(x), tokens)

    def _pad(self, x: Float[Array, "B g g C"]) -> Float[Array, "B G G C"]:
        return pad_grid(x, self.stf.conv.size)

    @staticmethod
    def tensor_names(config: FusionConfig) -> TensorNames:
        """Names of the parameters in exports."""
        return {**MBTF.name_tensors(), **{f"stf/{path}": name for path, name in STF.tensor_names(config).items()}}


def _resize(x: Float[Array, "B g g C"], side: int) -> Float[Array, "B {side} {side} C"]:
    """The means of windows, or each patch several times, so that there are ``side`` a side."""
    if side > x.shape[1]:
        return x.repeat(side // x.shape[1], axis=1).repeat(side // x.shape[1], axis=2)
    return average_windows(x, x.shape[1] // side) if side < x.shape[1] else x


COMPONENTS = {"stf": STF, "mbtf_stf": MBTFSTF}
