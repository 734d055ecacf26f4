"""Multi-block token fusion (arXiv 2506.07138): mixes the tapped states of several blocks by 1×1 convolutions.

``variant="code"`` computes what the authors' program does, linear-GELU-linear; ``variant="paper"`` what their figure
shows, with a GELU after the second layer too.
"""

import dataclasses

from flax import nnx
from jaxtyping import Array, Float

from stf_jax.config import FusionConfig
from stf_jax.models.fusions.base import FusionSpec, Grid, evenly_spaced
from stf_jax.models.fusions.mlp import MLP
from stf_jax.models.fusions.parts import Projector
from stf_jax.models.layers import Linear, gelu, initializers
from stf_jax.models.tensor_names import Tensor, TensorNames, name_layer


def mbtf_taps(layers: int, deepest: int) -> tuple[int, ...]:
    """Evenly spaced taps for MBTF, with the deepest replaced by ``deepest``."""
    return (deepest, *evenly_spaced(layers)[1:])


class MBTF(nnx.Module):
    """Multi-block token fusion: taps [..., M·C] → [..., C'] by two 1×1 convolutions."""

    def __init__(self, rngs: nnx.Rngs, config: FusionConfig, channels: int, out: int) -> None:
        hidden = config.mbtf_hidden
        self.last_gelu = config.variant == "paper"
        self.first = Linear(
            rngs, [(channels, "embed")], [(hidden, "mlp")], **initializers(config.init, channels, hidden)
        )
        self.second = Linear(rngs, [(hidden, "mlp")], [(out, "embed")], **initializers(config.init, hidden, out))

    def __call__(self, x: Float[Array, "*axes MC"]) -> Float[Array, "*axes width"]:
        x = self.second(gelu(self.first(x)))
        return gelu(x) if self.last_gelu else x

    @staticmethod
    def resolve(config: FusionConfig, grid: Grid) -> FusionConfig:
        """The config with MBTF's sizes in place of zeros."""
        hidden, width = config.mbtf_hidden or grid.channels // 2, config.mbtf_width or grid.width
        return dataclasses.replace(config, mbtf_hidden=hidden, mbtf_width=width)

    @staticmethod
    def name_tensors() -> dict[str, Tensor]:
        """Names the layers as the authors' code does: "crosslayer" is MBTF."""
        return {
            **name_layer("mbtf/first", "mm_projector_crosslayer.0"),
            **name_layer("mbtf/second", "mm_projector_crosslayer.2"),
        }


class MBTFProjector(nnx.Module):
    """MBTF, then LLaVA's projector at each patch: [B, P, M·C] → [B, P, D]."""

    spec = FusionSpec(taps=mbtf_taps, merges=False, per_patch=True)
    torch_file = MLP.torch_file
    resolve = MBTF.resolve

    def __init__(self, rngs: nnx.Rngs, config: FusionConfig, grid: Grid, out: int) -> None:
        self.mbtf = MBTF(rngs, config, grid.channels, config.mbtf_width)
        self.mlp = Projector(rngs, config, config.mbtf_width, out)

    def __call__(self, x: Float[Array, "*axes MC"]) -> Float[Array, "*axes D"]:
        return self.mlp(self.mbtf(x))

    @staticmethod
    def tensor_names(config: FusionConfig) -> TensorNames:
        """Names of the parameters in exports."""
        del config
        return MBTF.name_tensors() | Projector.name_tensors("mlp/", "mm_projector")


COMPONENTS = {"mbtf": MBTFProjector}
