"""LoRA (arXiv 2106.09685): ``y = x·W + s·(x·A)·B``, where only A [inputs, r] and B [r, outputs] train.

A starts as PEFT's, Kaiming uniform with a = √5, which is U(±1/√inputs), and B as 0.

Axis letters: L layers, r rank.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from stf_jax.models.adapters.base import Array
from stf_jax.models.layers import Linear, Noise, parameter, shard_rows, uniform, zeros

Scaling = Literal["lora", "rslora"]


@dataclasses.dataclass(frozen=True)
class LoRA:
    """The options of LoRA.

    Attributes:
      rank: r.
      alpha: the product x·A·B is multiplied by alpha / rank; 0: alpha is twice the rank.
      dropout: probability that an input of A is 0.
      scaling: ``rslora`` multiplies by alpha / √rank instead (arXiv 2312.03732).
    """

    rank: int
    alpha: float
    dropout: float
    scaling: Scaling

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError("rank must be at least 1.")
        if self.alpha < 0:
            raise ValueError("alpha must not be negative.")
        if not 0 <= self.dropout < 1:
            raise ValueError("dropout must be at least 0, and less than 1.")

    @property
    def scale(self) -> float:
        """The factor of the product."""
        return (self.alpha or 2 * self.rank) / (math.sqrt(self.rank) if self.scaling == "rslora" else self.rank)

    def build(self, rngs: nnx.Rngs, layer: Linear) -> nnx.Module:
        """The module for a layer, as the protocol says."""
        return LowRank(rngs, layer, self)

    def change(self, params: Mapping[str, Array]) -> Array:
        """The change of one layer's kernel, as the protocol says."""
        a, b = params["a"], params["b"]
        return self.scale * (a.reshape(-1, self.rank) @ b.reshape(self.rank, -1))


class LowRank(nnx.Module):
    """A and B of a stack of layers; a call sees one layer's."""

    def __init__(self, rngs: nnx.Rngs, layer: Linear, config: LoRA) -> None:
        shape, names = layer.kernel.get_value().shape, layer.kernel.get_metadata()["axes"]
        stack, *axes = zip(shape, names, strict=True)
        inputs, outputs = axes[: len(layer.inputs)], axes[len(layer.inputs) :]
        rank = (config.rank, "rank")
        self.config = config
        self.a = parameter(rngs, [stack, *inputs, rank], uniform(math.prod(layer.inputs) ** -0.5))
        self.b = parameter(rngs, [stack, rank, *outputs], zeros)
        self.keys = Noise(jnp.zeros((stack[0], 0, 2), jnp.uint32)) if config.dropout else None

    def __call__(self, x: jax.Array) -> jax.Array:
        a, b = (leaf[...].astype(x.dtype) for leaf in (self.a, self.b))
        lead = x.shape[: x.ndim - (a.ndim - 1)]
        if self.keys is not None:
            x = self._drop(x, self.keys[...])
        # Two products of two matrices, as in Linear.
        y = x.reshape(math.prod(lead), -1) @ a.reshape(-1, self.config.rank) @ b.reshape(self.config.rank, -1)
        return (self.config.scale * y).reshape(*lead, *b.shape[1:])

    def _drop(self, x: jax.Array, keys: jax.Array) -> jax.Array:
        """Sets values to 0 with a key for each row, so that neither the mesh nor microbatches change which."""
        rows = jax.random.wrap_key_data(keys)
        each = len(x) // len(rows)  # images of a row, in the tower
        rows = jax.vmap(lambda key: jax.random.split(key, each))(rows).reshape(-1)
        keep = 1 - self.config.dropout
        mask = jax.vmap(lambda key: jax.random.bernoulli(key, keep, x.shape[1:]))(rows)
        return jnp.where(shard_rows(mask), x / keep, 0)


def lora(*, rank: int = 128, alpha: float = 0.0, dropout: float = 0.0, scaling: Scaling = "lora") -> LoRA:
    """LoRA, by default with the rank of LLaVA's script and its alpha of 256."""
    return LoRA(rank, alpha, dropout, scaling)


COMPONENTS = {"lora": lora}
