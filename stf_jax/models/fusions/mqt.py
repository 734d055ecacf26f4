"""The Matryoshka Query Transformer (arXiv 2405.19315): queries of which the first make the tokens of every budget."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from stf_jax.config import FusionConfig
from stf_jax.models.fusions.base import FusionSpec, Grid, own_side
from stf_jax.models.fusions.parts import CrossAttention
from stf_jax.models.layers import LayerNorm, Linear, initializers, normal, parameter
from stf_jax.models.positions import interpolate_positions
from stf_jax.models.tensor_names import MATRIX, Tensor, TensorNames, name_layer, name_norm


class MQT(nnx.Module):
    """The Matryoshka Query Transformer: [B, g, g, C] → [B, N, D], or the first m of these N tokens.

    Learned queries with fixed sine positions attend once to the patches, then a linear layer without a bias. As in the
    authors' code, keys are the positions of the patches alone: each head of a query weighs places, whatever is in the
    image. A query does not see the others, so its token is the same at every budget. Heads have 64 channels, or the
    greatest common divisor of 64 and C.

    N is the first of the config's budgets, a square number, or one query for each window without budgets. The original
    has 256 for 24×24 patches; its second stage draws an even number of them per step.
    """

    spec = FusionSpec(windows=False, orders=False)
    torch_file = "mqt_torch.py"

    def __init__(self, rngs: nnx.Rngs, config: FusionConfig, grid: Grid, out: int) -> None:
        width = grid.channels
        init = initializers(config.init, width, out)
        self.side = math.isqrt(config.budgets[0]) if config.budgets else own_side(config, grid.side)
        self.queries = parameter(rngs, [(self.side**2, "position"), (width, "embed")], normal(0.02))
        self.query_norm = LayerNorm(rngs, width, 1e-6)
        self.key_norm = LayerNorm(rngs, width, 1e-6)
        self.value_norm = LayerNorm(rngs, width, 1e-6)
        self.attention = CrossAttention(rngs, config, width, 64)
        self.exit = Linear(rngs, [(width, "embed")], [(out, "mlp")], bias=False, **init)

    def __call__(self, x: Float[Array, "B g g C"]) -> Float[Array, "B N D"]:
        return self.nested(x, (self.side**2,))[0]

    def nested(self, x: Float[Array, "B g g C"], budgets: Sequence[int]) -> list[Float[Array, "B m D"]]:
        """The first tokens, as many as each budget."""
        values = self.value_norm(x.reshape(len(x), -1, x.shape[-1]))
        tokens = self.exit(self.attention(*self._queries_keys(x, max(budgets)), values))
        return [tokens[:, :budget] for budget in budgets]

    @staticmethod
    def fitting_budgets(config: FusionConfig, side: int) -> Sequence[int]:
        """All numbers up to that of the queries, which is a square."""
        first, squares = config.budgets[0], [n**2 for n in range(side, 0, -1)]
        return range(first, 0, -1) if first in squares else squares

    def sources(self, x: Float[Array, "B g g C"]) -> Float[Array, "B N P"]:
        """The attention of each query to the patches, averaged over heads."""
        return self.nested_sources(x, self.side**2)

    def nested_sources(self, x: Float[Array, "B g g C"], tokens: int) -> Float[Array, "B N P"]:
        """Those of the first queries."""
        return self.attention.weights(*self._queries_keys(x, tokens))

    def _queries_keys(self, x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
        """The first queries [B, count, C] and the keys [B, P, C], the same for all images."""
        batch, side, _, width = x.shape
        positions = sine_positions(self.side, width)
        queries = self.query_norm((self.queries[...] + positions)[:count].astype(x.dtype))
        keys = self.key_norm(jnp.asarray(interpolate_positions(positions, side**2), x.dtype))
        return jnp.broadcast_to(queries, (batch, *queries.shape)), jnp.broadcast_to(keys, (batch, *keys.shape))

    @staticmethod
    def tensor_names(config: FusionConfig) -> TensorNames:
        """Names of the parameters in exports."""
        del config
        return {
            "queries": Tensor("mm_projector.query_tokens", MATRIX),
            **name_norm("query_norm", "mm_projector.query_norm"),
            **name_norm("key_norm", "mm_projector.key_norm"),
            **name_norm("value_norm", "mm_projector.value_norm"),
            **CrossAttention.name_tensors("attention", "mm_projector.attention"),
            **name_layer("exit", "mm_projector.output"),
        }


def sine_positions(side: int, width: int) -> np.ndarray:
    """Fixed embeddings of the cells of a grid, float32 [side², width].

    The first half of the channels is of the column, the second of the row: sines, then cosines, of wavelengths from
    2π to 2π·10000.
    """
    frequencies = 1e4 ** -(np.arange(width // 4) / (width / 4))
    angles = np.arange(side)[:, None] * frequencies
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    rows, columns = np.repeat(line, side, axis=0), np.tile(line, (side, 1))
    return np.concatenate([columns, rows], axis=1).astype(np.float32)


COMPONENTS = {"mqt": MQT}
