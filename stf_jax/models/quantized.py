"""Frozen kernels in int8, with a scale for each output channel: ``y = (x·K)·scale``.

With m, the largest magnitude of a channel, K is the kernel times 127/m, rounded half to even, and the scale is m times
1/127, all in float32. The kernel is multiplied, because compilers may replace a division and round differently. Int8
values are exact in bfloat16, and the scale is applied to the product, so a converted kernel exists for one layer at a
time.

Axis letters: L layers.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

SCALE = "scale"  # the attribute of a layer, and so the end of paths: llm/blocks/mlp/up/scale
_STEPS = 127
_SMALL = 1e-30  # channels below it become 0
_Array = TypeVar("_Array", np.ndarray, jax.Array)


def scale_path(kernel: str) -> str:
    """The path of the scales of a kernel, given the kernel's."""
    return f"{kernel.rpartition('/')[0]}/{SCALE}"


def quantize(kernel: jax.Array, outputs: int) -> tuple[jax.Array, jax.Array]:
    """Quantizes stacked kernels [L, *inputs, *outputs].

    Args:
      outputs: the number of output axes.

    Returns:
      int8 of the same shape, and scales, float32 [L, *outputs].
    """
    values = kernel.astype(jnp.float32)
    inputs = tuple(range(1, kernel.ndim - outputs))
    largest = jnp.abs(values).max(inputs)
    inverse = _STEPS / jnp.maximum(largest, _SMALL)
    rounded = jnp.round(values * jnp.expand_dims(inverse, inputs)).clip(-_STEPS, _STEPS)
    return rounded.astype(jnp.int8), largest * jnp.float32(1 / _STEPS)


def dequantize(kernel: _Array, scale: _Array) -> _Array:
    """The kernel of one layer that a quantized one stands for, float32: [*inputs, *outputs] times [*outputs]."""
    return kernel.astype(np.float32) * scale


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The product of ``x`` with an int8 kernel, [B, inputs] × [inputs, outputs], in the type of ``x``.

    It is differentiable in ``x`` only. The backward pass keeps the kernel and not its conversion, which would take
    twice the memory for every layer.
    """
    return x @ kernel.astype(x.dtype)


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Not by a call of ``product``, in which rematerialization would not find the product to keep.
    return x @ kernel.astype(x.dtype), kernel


def _backward(kernel: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None]:
    return gradient @ kernel.astype(gradient.dtype).T, None


product.defvjp(_forward, _backward)
