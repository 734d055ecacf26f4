"""LLaVA-1.5's projector (arXiv 2310.03744), the baseline that keeps every patch."""

from flax import nnx

from stf_jax.config import FusionConfig
from stf_jax.models.fusions.base import FusionSpec, Grid
from stf_jax.models.fusions.parts import Projector
from stf_jax.models.tensor_names import TensorNames


class MLP(Projector):
    """Two linear layers with a GELU between, at each patch: [B, P, C] → [B, P, D]."""

    spec = FusionSpec(merges=False, per_patch=True)
    torch_file = "mlp_torch.py"  # with budgets; transformers' own LLaVA has one

    def __init__(self, rngs: nnx.Rngs, config: FusionConfig, grid: Grid, out: int) -> None:
        super().__init__(rngs, config, grid.channels, out)

    @staticmethod
    def tensor_names(config: FusionConfig) -> TensorNames:
        """Names of the parameters in exports."""
        del config
        return Projector.name_tensors("", "mm_projector")


COMPONENTS = {"mlp": MLP}
