"""TokenPacker (arXiv 2407.02392): a coarse query attends to the patches of its window."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from stf_jax.config import FusionConfig
from stf_jax.models.fusions.base import FusionSpec, Grid
from stf_jax.models.fusions.parts import CrossAttention, Projector, split_windows, window_sources, windows
from stf_jax.models.layers import LayerNorm, Linear, initializers
from stf_jax.models.tensor_names import TensorNames, name_layer, name_norm


def _taps(layers: int, deepest: int) -> tuple[int, ...]:
    """Taps of TokenPacker; its authors use 23, 22, 16 and 12 of CLIP-L, of which LLaVA reads 23."""
    depths = (deepest, deepest - 1, round(16 / 23 * deepest), round(12 / 23 * deepest))
    return tuple(sorted({max(depth, 0) for depth in depths}, reverse=True))  # fewer in a tower of three blocks


class TokenPacker(nnx.Module):
    """TokenPacker's region-to-point injection: [B, g, g, M·C] → [B, g/k, g/k, D].

    Bilinear downsampling of the deepest tap gives one query per window, which attends to the window's k² patches; two
    MLPs compute their keys and values from all taps. Bilinear downsampling without antialiasing takes the middle patch
    of each window, or the mean of the middle four. Heads have 128 channels, or the greatest common divisor of 128 and
    C. The original starts like ``init="normal"``, except for the projections to heads.
    """

    spec = FusionSpec(taps=_taps)
    torch_file = "token_packer_torch.py"

    def __init__(self, rngs: nnx.Rngs, config: FusionConfig, grid: Grid, out: int) -> None:
        width, init = grid.width, initializers(config.init, grid.width, grid.width)
        self.kernel = config.kernel
        self.coarse = Linear(rngs, [(width, "channel")], [(width, "embed")], bias=False, **init)
        self.keys = Projector(rngs, config, grid.channels, width)
        self.values = Projector(rngs, config, grid.channels, width)
        self.query_norm = LayerNorm(rngs, width, 1e-6)
        self.key_norm = LayerNorm(rngs, width, 1e-6)
        self.value_norm = LayerNorm(rngs, width, 1e-6)
        self.attention = CrossAttention(rngs, config, width, 128)
        self.projector = Projector(rngs, config, width, out)

    def __call__(self, x: Float[Array, "B g g MC"]) -> Float[Array, "B h h D"]:
        queries, keys = self._queries_keys(x)
        values = self._split(self.value_norm(self.values(x)))
        attended = self.attention(queries, keys, values)
        side = x.shape[1] // self.kernel
        return self.projector(attended.reshape(len(x), side, side, -1))

    def sources(self, x: Float[Array, "B g g MC"]) -> Float[Array, "B N P"]:
        """The attention of each token's query to the patches of its window, averaged over heads."""
        weights = self.attention.weights(*self._queries_keys(x))
        return window_sources(x, self.kernel, weights.reshape(len(x), -1, self.kernel**2))

    def _queries_keys(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The query of each window, [B·N, 1, C], and the keys of its patches, [B·N, k², C]."""
        width, k = self.coarse.inputs[0], self.kernel
        middle = slice((k - 1) // 2, k // 2 + 1)
        queries = windows(x[..., :width], k)[:, :, middle, :, middle].mean((2, 4))
        queries = self.query_norm(self.coarse(queries))
        return queries.reshape(-1, 1, width), self._split(self.key_norm(self.keys(x)))

    def _split(self, x: jax.Array) -> jax.Array:
        return split_windows(x, self.kernel).reshape(-1, self.kernel**2, x.shape[3])

    @staticmethod
    def tensor_names(config: FusionConfig) -> TensorNames:
        """Names of the parameters in exports."""
        del config
        return {
            **name_layer("coarse", "mm_projector.query"),
            **Projector.name_tensors("keys/", "mm_projector.key"),
            **Projector.name_tensors("values/", "mm_projector.value"),
            **name_norm("query_norm", "mm_projector.query_norm"),
            **name_norm("key_norm", "mm_projector.key_norm"),
            **name_norm("value_norm", "mm_projector.value_norm"),
            **CrossAttention.name_tensors("attention", "mm_projector.attention"),
            **Projector.name_tensors("projector/", "mm_projector.mlp"),
        }


COMPONENTS = {"token_packer": TokenPacker}
