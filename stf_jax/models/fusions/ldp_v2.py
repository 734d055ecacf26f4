"""MobileVLM V2's lightweight downsample projector (arXiv 2402.03766)."""

from flax import nnx
from jaxtyping import Array, Float

from stf_jax.config import FusionConfig
from stf_jax.models.fusions.base import FusionSpec, Grid
from stf_jax.models.fusions.parts import DepthwiseConv, Projector, average_windows
from stf_jax.models.tensor_names import DEPTHWISE, TensorNames, name_layer


class LDPv2(nnx.Module):
    """MobileVLM V2's second lightweight downsample projector: [B, g, g, C] → [B, g/k, g/k, D].

    The projector at every patch, the mean of each window, and a depth-wise convolution added to it (positional encoding
    generator, arXiv 2102.10882). The original pools to 12×12 whatever the grid, which for 24×24 is k = 2.
    """

    spec = FusionSpec()
    torch_file = "ldp_v2_torch.py"

    def __init__(self, rngs: nnx.Rngs, config: FusionConfig, grid: Grid, out: int) -> None:
        self.kernel = config.kernel
        self.projector = Projector(rngs, config, grid.channels, out)
        self.position = DepthwiseConv(rngs, config, (out, "embed"))

    def __call__(self, x: Float[Array, "B g g C"]) -> Float[Array, "B h h D"]:
        x = average_windows(self.projector(x), self.kernel)
        return x + self.position(x)

    @staticmethod
    def tensor_names(config: FusionConfig) -> TensorNames:
        """Names of the parameters in exports."""
        del config
        position = name_layer("position", "mm_projector.peg", DEPTHWISE)
        return Projector.name_tensors("projector/", "mm_projector.mlp") | position


COMPONENTS = {"ldp_v2": LDPv2}
