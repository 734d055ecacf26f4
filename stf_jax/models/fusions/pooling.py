"""Baselines that merge windows without learning to: the mean of a window, and its patches side by side."""

from flax import nnx
from jaxtyping import Array, Float

from stf_jax.config import FusionConfig
from stf_jax.models.fusions.base import FusionSpec, Grid
from stf_jax.models.fusions.parts import Projector, average_windows, window_sources, windows
from stf_jax.models.tensor_names import TensorNames


class AvgPool(nnx.Module):
    """The mean of each k×k window, then the projector: [B, g, g, C] → [B, g/k, g/k, D].

    It pools before the projector, as DeCo does (arXiv 2405.20985). M3 and LLaVA-OneVision pool after it.
    """

    spec = FusionSpec()
    torch_file = "pooling_torch.py"

    def __init__(self, rngs: nnx.Rngs, config: FusionConfig, grid: Grid, out: int) -> None:
        self.kernel = config.kernel
        self.projector = Projector(rngs, config, grid.channels, out)

    def __call__(self, x: Float[Array, "B g g C"]) -> Float[Array, "B h h D"]:
        return self.projector(average_windows(x, self.kernel))

    def sources(self, x: Float[Array, "B g g C"]) -> Float[Array, "B N P"]:
        """The window of each token."""
        return window_sources(x, self.kernel)

    @staticmethod
    def tensor_names(config: FusionConfig) -> TensorNames:
        """Names of the parameters in exports."""
        del config
        return Projector.name_tensors("projector/", "mm_projector")


class PixelShuffle(nnx.Module):
    """The k² patches of each window concatenated on channels, then the projector: [B, g, g, C] → [B, g/k, g/k, D].

    The channels are in the order of Idefics3 and InternVL; the projector is LLaVA's. Idefics3 has one linear layer
    without a bias instead, InternVL a norm and two linear layers.
    """

    spec = FusionSpec()
    torch_file = "pooling_torch.py"

    def __init__(self, rngs: nnx.Rngs, config: FusionConfig, grid: Grid, out: int) -> None:
        self.kernel = config.kernel
        self.projector = Projector(rngs, config, config.kernel**2 * grid.channels, out)

    def __call__(self, x: Float[Array, "B g g C"]) -> Float[Array, "B h h D"]:
        x = windows(x, self.kernel).swapaxes(2, 3)
        return self.projector(x.reshape(*x.shape[:3], -1))

    def sources(self, x: Float[Array, "B g g C"]) -> Float[Array, "B N P"]:
        """The window of each token."""
        return window_sources(x, self.kernel)

    @staticmethod
    def tensor_names(config: FusionConfig) -> TensorNames:
        """Names of the parameters in exports."""
        del config
        return Projector.name_tensors("projector/", "mm_projector")


COMPONENTS = {"avg_pool": AvgPool, "pixel_shuffle": PixelShuffle}
