"""Kernels frozen in few bits, with scales beside them: ``int8`` and ``nf4``.

**int8** has a scale for each output channel: ``y = (x·K)·scale``. With m, the largest magnitude of a channel, K is the
kernel times 127/m, rounded half to even, and the scale is m times 1/127, all in float32. The kernel is multiplied,
because compilers may replace a division and round differently. Int8 values are exact in bfloat16, and the scale is
applied to the product.

**nf4** is the 4-bit NormalFloat of QLoRA (arXiv 2305.14314): 64 consecutive inputs of an output channel are a block
with one scale, m, and each input is the nearest of 16 values times m. Two codes are in a byte, the first in its upper
half, so a weight takes 4.5 bits with its share of a float32 scale. Blocks run along the last input axis, whose last
block may be shorter.

A converted kernel exists for one layer at a time, in the forward pass and again in the backward pass.

Axis letters: L layers, B rows.
"""

import abc
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from stf_jax.parallel.mesh import BLOCKS, gather

SCALE = "scale"  # the attribute of a layer, and so the end of paths: llm/blocks/mlp/up/scale
_SMALL = 1e-30  # of channels and blocks below it, the kernel becomes 0
_STEPS = 127
_BLOCK = 64
# Quantiles of a normal distribution, the largest of magnitude 1: table in appendix E of the paper.
_VALUES = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334]
    + [-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
    + [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
    np.float32,
)
# Above bound i, value i + 1 is nearer than value i.
_BOUNDS = ((_VALUES[1:].astype(np.float64) + _VALUES[:-1].astype(np.float64)) / 2).tolist()

Axes = Sequence[tuple[int, str]]  # sizes and logical names
_Array = TypeVar("_Array", np.ndarray, jax.Array)


class Quantization(abc.ABC):
    """A type that kernels are frozen in.

    Attributes:
      name: in rules.
      dtype: of quantized kernels. No parameter of a plain model has it.
      multiple: the size of a kernel's last input axis must be a multiple of it.
    """

    name: str
    dtype: np.dtype
    multiple: int

    @abc.abstractmethod
    def scale_axes(self, inputs: Axes, outputs: Axes) -> Axes:
        """The axes of the scales of kernels with these axes, without those of layers."""

    @abc.abstractmethod
    def kernel_shape(self, kernel: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the kernels that quantized ones and their scales stand for, given their shapes."""

    @abc.abstractmethod
    def quantize(self, kernel: jax.Array, scale: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        """Quantizes stacked kernels [L, *inputs, *outputs].

        Args:
          scale: the shape of their scales.

        Returns:
          The quantized kernels, and the scales in float32.
        """

    @abc.abstractmethod
    def dequantize(self, kernel: _Array, scale: _Array) -> _Array:
        """The kernel of one layer that a quantized one stands for, float32 [*inputs, *outputs]."""

    @abc.abstractmethod
    def product(self, x: jax.Array, kernel: jax.Array, scale: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        """The product of ``x`` with the quantized kernel of one layer: [B, inputs] → [B, outputs].

        Args:
          axes: the logical axes of the kernel.

        It is in the type of ``x`` and differentiable in ``x`` only. The backward pass keeps the quantized kernel.
        """


class _Int8(Quantization):
    """See the top of the file. The scales of [L, *inputs, *outputs] are [L, *outputs]."""

    name, dtype, multiple = "int8", np.dtype("int8"), 1

    def scale_axes(self, inputs: Axes, outputs: Axes) -> Axes:
        del inputs
        return outputs

    def kernel_shape(self, kernel: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, ...]:
        del scale
        return kernel

    def quantize(self, kernel: jax.Array, scale: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        values = kernel.astype(jnp.float32)
        inputs = tuple(range(1, kernel.ndim - len(scale) + 1))
        largest = jnp.abs(values).max(inputs)
        inverse = _STEPS / jnp.maximum(largest, _SMALL)
        rounded = jnp.round(values * jnp.expand_dims(inverse, inputs)).clip(-_STEPS, _STEPS)
        return rounded.astype(jnp.int8), largest * jnp.float32(1 / _STEPS)

    def dequantize(self, kernel: _Array, scale: _Array) -> _Array:
        return kernel.astype(np.float32) * scale

    def product(self, x: jax.Array, kernel: jax.Array, scale: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        del axes  # a compiler gathers int8 before it converts it
        y = _product(_cast, x, kernel)
        return (y * scale.reshape(-1)).astype(x.dtype)


class _NF4(Quantization):
    """See the top of the file. With n the size of the last input axis, kernels have n/2 there, scales ⌈n/64⌉."""

    name, dtype = "nf4", np.dtype("uint8")
    multiple = 4  # an axis of two would be as long in the kernels as in the scales

    def scale_axes(self, inputs: Axes, outputs: Axes) -> Axes:
        *others, (size, name) = inputs
        return [*others, (-(-size // _BLOCK), BLOCKS + name), *outputs]

    def kernel_shape(self, kernel: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, ...]:
        axis = _find_axis(kernel, scale)
        return (*kernel[:axis], 2 * kernel[axis], *kernel[axis + 1 :])

    def quantize(self, kernel: jax.Array, scale: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        axis = _find_axis(kernel.shape, scale)
        values, padding = kernel.astype(jnp.float32), [(0, 0)] * kernel.ndim
        padding[axis] = (0, scale[axis] * _BLOCK - kernel.shape[axis])
        blocks = jnp.pad(jnp.abs(values), padding).reshape(*scale[: axis + 1], _BLOCK, *scale[axis + 1 :])
        largest = blocks.max(axis + 1)
        # Compared with products, because compilers may replace a division and round differently.
        unit = _spread(jnp.maximum(largest, _SMALL), axis, kernel.shape[axis])
        codes = jnp.zeros(kernel.shape, jnp.uint8)
        for bound in _BOUNDS:
            codes += (values > bound * unit).astype(jnp.uint8)
        pairs = codes.reshape(*kernel.shape[:axis], -1, 2, *kernel.shape[axis + 1 :])
        first, second = (jax.lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in range(2))
        return first << 4 | second, largest

    def dequantize(self, kernel: _Array, scale: _Array) -> _Array:
        axis = _find_axis(kernel.shape, scale.shape)
        size = 2 * kernel.shape[axis]
        stack = np.stack if isinstance(kernel, np.ndarray) else jnp.stack
        pairs = stack([kernel >> np.uint8(4), kernel & np.uint8(15)], axis + 1)
        codes = pairs.reshape(*kernel.shape[:axis], size, *kernel.shape[axis + 1 :])
        values: _Array = _VALUES[codes] if isinstance(codes, np.ndarray) else _look_up(codes)
        return values * _spread(scale, axis, size)

    def product(self, x: jax.Array, kernel: jax.Array, scale: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        def convert(dtype: Any, kernel: jax.Array, scale: jax.Array) -> jax.Array:
            axis = _find_axis(kernel.shape, scale.shape)
            blocks = *axes[:axis], BLOCKS + axes[axis], *axes[axis + 1 :]
            return self.dequantize(gather(kernel, axes), gather(scale, blocks)).astype(dtype)

        return _product(convert, x, kernel, scale)


QUANTIZATIONS: dict[str, Quantization] = {kind.name: kind for kind in (_Int8(), _NF4())}


def find_quantization(dtype: Any) -> Quantization | None:
    """What kernels of a type are quantized as; None if a parameter of that type is not quantized."""
    return next((kind for kind in QUANTIZATIONS.values() if kind.dtype == dtype), None)


def scale_path(kernel: str) -> str:
    """The path of the scales of a kernel, given the kernel's."""
    return f"{kernel.rpartition('/')[0]}/{SCALE}"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(convert: Callable[..., jax.Array], x: jax.Array, *parts: jax.Array) -> jax.Array:
    """``x`` times what ``convert`` makes of a type and the parts of a kernel."""
    return _forward(convert, x, *parts)[0]


def _forward(
    convert: Callable[..., jax.Array], x: jax.Array, *parts: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    # Not by a call of ``_product``, in which rematerialization would not find the product to keep.
    return x @ convert(x.dtype, *parts).reshape(x.shape[1], -1), parts


def _backward(
    convert: Callable[..., jax.Array], parts: tuple[jax.Array, ...], gradient: jax.Array
) -> tuple[jax.Array | None, ...]:
    whole = convert(gradient.dtype, *parts).reshape(-1, gradient.shape[1])
    return gradient @ whole.T, *[None] * len(parts)


_product.defvjp(_forward, _backward)


def _cast(dtype: Any, kernel: jax.Array) -> jax.Array:
    return kernel.astype(dtype)


def _find_axis(kernel: Sequence[int], scale: Sequence[int]) -> int:
    """The axis that is divided into blocks."""
    return next(axis for axis, (first, second) in enumerate(zip(kernel, scale, strict=True)) if first != second)


def _spread(scale: _Array, axis: int, size: int) -> _Array:
    """Repeats scales along the axis of blocks, for each of ``size`` inputs."""
    repeat = np.repeat if isinstance(scale, np.ndarray) else jnp.repeat
    return repeat(scale, _BLOCK, axis)[(slice(None),) * axis + (slice(size),)]


def _look_up(codes: jax.Array) -> jax.Array:
    """The values of codes, by 15 selections: vector units have no table of 16 numbers.

    The first 8, between two numbers each, are made with bits. ``jnp.where`` would make an array of each number, and jax
    would keep these 16 arrays, as large as a layer's kernel, outside a scan over layers.
    """
    numbers, wide = _VALUES.view(np.uint32), codes.astype(jnp.uint32)
    mask = -(wide & np.uint32(1))
    values = [mask & (low ^ high) ^ low for low, high in zip(numbers[::2], numbers[1::2], strict=True)]
    for bit in range(1, 4):
        is_set = wide & np.uint32(1 << bit) != 0
        values = [jnp.where(is_set, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return jax.lax.bitcast_convert_type(values[0], jnp.float32)
