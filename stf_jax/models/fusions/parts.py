"""Layers that several fusions share.

Widths that are 1024 in the authors' programs, as CLIP-L's, are the tower's width here. ``FusionConfig.init`` sets how
layers and convolutions start; norms, learned queries and positions start as in the authors' code.

Axis letters: B images, T queries, S keys, C tower width, D language model width.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Shaped

from stf_jax.accounting.flops import CONVOLUTION
from stf_jax.config import FusionConfig
from stf_jax.models.attention import Mask, attention_weights
from stf_jax.models.layers import Activation, Linear, gelu, initializers, parameter
from stf_jax.models.tensor_names import FROM_HEADS, HEADS, TO_HEADS, Tensor, name_layer


class Projector(nnx.Module):
    """LLaVA-1.5's ``mlp2x_gelu``, or the same with another activation: [..., C] → [..., D]."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        config: FusionConfig,
        channels: int,
        out: int,
        activation: Activation = gelu,
    ) -> None:
        self.activation = activation
        self.first = Linear(rngs, [(channels, "embed")], [(out, "mlp")], **initializers(config.init, channels, out))
        self.second = Linear(rngs, [(out, "mlp")], [(out, "embed")], **initializers(config.init, out, out))

    def __call__(self, x: Float[Array, "*axes C"]) -> Float[Array, "*axes D"]:
        return self.second(self.activation(self.first(x)))

    @staticmethod
    def name_tensors(path: str, name: str) -> dict[str, Tensor]:
        """Names the layers like those of ``nn.Sequential(nn.Linear, nn.GELU, nn.Linear)``."""
        return name_layer(f"{path}first", f"{name}.0") | name_layer(f"{path}second", f"{name}.2")


class DepthwiseConv(nnx.Module):
    """A 3×3 convolution of each channel by itself, zero-padded: [B, h, w, C] → [B, h, w, C].

    Nine shifted products, summed in float32: forward and backward, XLA's convolution takes 12 times as long on CPUs.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        config: FusionConfig,
        channels: tuple[int, str],
        *,
        bias: bool = True,
        stack: int | None = None,
    ) -> None:
        lead = [] if stack is None else [(stack, "layers")]
        init = initializers(config.init, 9, 9)
        self.kernel = parameter(rngs, [*lead, (3, "window"), (3, "window"), channels], init["kernel_init"])
        self.bias = parameter(rngs, [*lead, channels], init["bias_init"]) if bias else None

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        _, height, width, _ = x.shape
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))).astype(jnp.float32)
        kernel = self.kernel[...]
        with jax.named_scope(CONVOLUTION):
            products = (padded[:, i : i + height, j : j + width] * kernel[i, j] for i in range(3) for j in range(3))
            y = functools.reduce(jnp.add, products)
        return (y if self.bias is None else y + self.bias[...]).astype(x.dtype)


class CrossAttention(nnx.Module):
    """Multi-head attention with biases, softmax in float32, from [B, T, C] to keys and values [B, S, C].

    Its heads have ``size`` channels, or the greatest common divisor of ``size`` and C.
    """

    def __init__(
        self, rngs: nnx.Rngs, config: FusionConfig, width: int, size: int, *, stack: int | None = None
    ) -> None:
        width_axis, size = (width, "embed"), math.gcd(width, size)
        heads = [(width // size, "heads"), (size, "head_dim")]
        init = initializers(config.init, width, width)
        self.query = Linear(rngs, [width_axis], heads, stack=stack, **init)
        self.key = Linear(rngs, [width_axis], heads, stack=stack, **init)
        self.value = Linear(rngs, [width_axis], heads, stack=stack, **init)
        self.out = Linear(rngs, heads, [width_axis], stack=stack, **init)

    def __call__(
        self, query: Float[Array, "B T C"], key: Float[Array, "B S C"], value: Float[Array, "B S C"]
    ) -> Float[Array, "B T C"]:
        heads = self.query(query), self.key(key), self.value(value)
        return self.out(jax.nn.dot_product_attention(*heads, implementation="xla"))

    def weights(self, query: Float[Array, "B T C"], key: Float[Array, "B S C"]) -> Float[Array, "B T S"]:
        """The weight of each key for each query, averaged over heads."""
        return attention_weights(self.query(query), self.key(key), Mask()).mean(1)

    @staticmethod
    def name_tensors(path: str, name: str) -> dict[str, Tensor]:
        """Names the projections as transformers does."""
        table = name_layer(f"{path}/out", f"{name}.out_proj", FROM_HEADS)
        for projection, tensor in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            table |= name_layer(f"{path}/{projection}", f"{name}.{tensor}", TO_HEADS, HEADS)
        return table


def windows(x: jax.Array, k: int) -> jax.Array:
    """[B, g, g, C] → [B, g/k, k, g/k, k, C]."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // k, k, width // k, k, channels)


def average_windows(x: jax.Array, k: int) -> jax.Array:
    """The mean of each window: [B, g, g, C] → [B, g/k, g/k, C]."""
    return windows(x, k).mean((2, 4))


def split_windows(x: Shaped[Array, "B g g C"], k: int) -> Shaped[Array, "B N kk C"]:
    """The patches of each window, windows and patches in row-major order."""
    return windows(x, k).swapaxes(2, 3).reshape(len(x), -1, k * k, x.shape[3])


def window_sources(x: Float[Array, "B g g C"], k: int, weights: jax.Array | None = None) -> Float[Array, "B N P"]:
    """What a fusion's ``sources`` returns if each token reads one window.

    Args:
      x: the fusion's input.
      k: side of a window.
      weights: of the patches of each window, [B, N, k²]; by default all are equal.
    """
    batch, side = x.shape[:2]
    patches = split_windows(jnp.arange(side * side).reshape(1, side, side, 1), k)[0, :, :, 0]
    rows, tokens = jnp.arange(batch)[:, None, None], jnp.arange(len(patches))[:, None]
    shares = jnp.float32(1 / k**2) if weights is None else weights
    return jnp.zeros((batch, len(patches), side * side)).at[rows, tokens, patches].set(shares)
