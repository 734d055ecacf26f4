"""Layers shared by the vision tower, the fusion and the decoder, and the one way to declare a parameter.

:func:`parameter` declares a parameter once: shape, logical axes and initializer. Sharding (parallel/mesh.py), restore
targets and exports derive from that declaration. Every parameter is float32 here; frozen parameters are cast when the
training state is built. A layer computes in the type of its input.

Axis letters: B batch, T positions, L layers, D width, H heads, K kv heads, F feed-forward.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypedDict, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from stf_jax.models.quantized import Quantization, find_quantization
from stf_jax.parallel.mesh import constrain

Init = Callable[[jax.Array, tuple[int, ...]], jax.Array]
Axis = tuple[int, str]  # size, logical name
Activation = Callable[[jax.Array], jax.Array]
_Block = TypeVar("_Block", bound=nnx.Module)


def parameter(rngs: nnx.Rngs, axes: Sequence[Axis], init: Init) -> nnx.Param:
    """Declares a float32 parameter with the given (size, logical name) axes."""
    shape = tuple(size for size, _ in axes)
    return nnx.Param(init(rngs.params(), shape), axes=tuple(name for _, name in axes))


class _CountedKeys(nnx.RngStream):
    """The keys of flax's stream. Its counter is a Python number, so tracing a model does not trace additions to it."""

    def __init__(self, key: jax.Array | int, *, tag: str) -> None:
        super().__init__(key, tag=tag)
        self.drawn = 0

    def __call__(self) -> jax.Array:
        key = jax.random.fold_in(self.key.get_value(), self.drawn)
        self.drawn += 1
        return key


def make_rngs(key: jax.Array | int) -> nnx.Rngs:
    """The keys of ``nnx.Rngs(key)``, without tracing their counter: tracing a model takes less time."""
    rngs = nnx.Rngs()
    rngs.default = _CountedKeys(key, tag="default")
    return rngs


class Noise(nnx.Variable):
    """Keys of the random numbers of a training step: uint32 [L, B, 2], one for each layer and row."""


def zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Initializer: 0."""
    del key
    return jnp.zeros(shape, jnp.float32)


def ones(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Initializer: 1."""
    del key
    return jnp.ones(shape, jnp.float32)


def normal(stddev: float) -> Init:
    """Initializer: N(0, stddev²)."""
    return lambda key, shape: stddev * jax.random.normal(key, shape, jnp.float32)


def uniform(bound: float) -> Init:
    """Initializer: U(−bound, bound)."""
    return lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound)


class Initializers(TypedDict):
    """The initializers of a layer, as keywords."""

    kernel_init: Init
    bias_init: Init


def initializers(name: str, fan_in: int, fan_out: int) -> Initializers:
    """``kernel_init`` and ``bias_init`` of a layer, by the name of the scheme.

    ``torch`` is the default of ``torch.nn.Linear`` and ``Conv2d``, weights and biases U(±1/√fan_in), which the authors'
    layers use. ``kaiming`` is N(0, 2/fan_in), ``xavier`` U(±√(6/(fan_in + fan_out))) and ``normal`` N(0, 0.02²), each
    with zero biases.
    """
    if name == "torch":
        return {"kernel_init": uniform(fan_in**-0.5), "bias_init": uniform(fan_in**-0.5)}
    kernel = {
        "kaiming": normal((2 / fan_in) ** 0.5),
        "xavier": uniform((6 / (fan_in + fan_out)) ** 0.5),
        "normal": normal(0.02),
    }[name]
    return {"kernel_init": kernel, "bias_init": zeros}


def quick_gelu(x: jax.Array) -> jax.Array:
    """CLIP's approximation of GELU: x·σ(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: jax.Array) -> jax.Array:
    """GELU by the error function, as torch's ``nn.GELU()``."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: jax.Array) -> jax.Array:
    """GELU by tanh, as SigLIP's ``gelu_pytorch_tanh``."""
    return jax.nn.gelu(x, approximate=True)


ACTIVATIONS: dict[str, Activation] = {"quick_gelu": quick_gelu, "gelu": gelu, "gelu_tanh": gelu_tanh}


class Linear(nnx.Module):
    """``y = x·kernel + bias`` over one or more trailing axes: [..., *inputs] → [..., *outputs].

    ``stack`` adds a leading axis of that many layers to the parameters. The caller scans over it, so that a call always
    sees one layer's parameters.

    ``adapter`` may be set to a module that maps the same axes (models/adapters); what it returns is added.

    After :meth:`quantize`, the kernel has few bits, and scales beside it (models/quantized.py).
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        inputs: Sequence[Axis],
        outputs: Sequence[Axis],
        *,
        bias: bool = True,
        stack: int | None = None,
        kernel_init: Init | None = None,
        bias_init: Init = zeros,
    ) -> None:
        lead = [] if stack is None else [(stack, "layers")]
        fan_in = math.prod(size for size, _ in inputs)
        self.inputs, self.outputs = (tuple(size for size, _ in axes) for axes in (inputs, outputs))
        self.axes = tuple(name for _, name in (*inputs, *outputs))
        self.kernel = parameter(rngs, [*lead, *inputs, *outputs], kernel_init or normal(fan_in**-0.5))
        self.bias = parameter(rngs, [*lead, *outputs], bias_init) if bias else None
        self.adapter: Callable[[jax.Array], jax.Array] | None = None
        self.scale: nnx.Param | None = None

    def quantize(self, kind: Quantization) -> None:
        """Quantizes the kernel of a stack of layers."""
        kernel, names = self.kernel.get_value(), self.kernel.get_metadata()["axes"]
        stack, *axes = zip(kernel.shape, names, strict=True)
        scales = [stack, *kind.scale_axes(axes[: len(self.inputs)], axes[len(self.inputs) :])]
        kernel, scale = kind.quantize(kernel, tuple(size for size, _ in scales))
        self.kernel = nnx.Param(kernel, axes=names)
        self.scale = nnx.data(nnx.Param(scale, axes=tuple(name for _, name in scales)))

    def __call__(self, x: jax.Array) -> jax.Array:
        # One product of two matrices: XLA's CPU backward pass of a product over more axes takes twice the time.
        lead = x.shape[: x.ndim - len(self.inputs)]
        fan_in, fan_out = math.prod(self.inputs), math.prod(self.outputs)
        rows, kernel = x.reshape(-1, fan_in), self.kernel[...]
        if self.scale is None:
            y = rows @ kernel.reshape(fan_in, fan_out).astype(x.dtype)
        else:
            kind = find_quantization(kernel.dtype)
            assert kind is not None
            y = kind.product(rows, kernel, self.scale[...], self.axes)
        y = y.reshape(*lead, *self.outputs)
        if self.adapter is not None:
            y = y + self.adapter(x)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class StridedConv(nnx.Module):
    """A k×k convolution of stride k without padding, as one matrix product over k×k windows.

    The kernel is HWIO, ``[k, k, in, out]``: ``[B, k·h, k·w, in]`` → ``[B, h, w, out]``.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        size: int,
        inputs: Axis,
        outputs: Axis,
        *,
        bias: bool = True,
        kernel_init: Init | None = None,
        bias_init: Init = zeros,
    ) -> None:
        self.size = size
        window = [(size, "window"), (size, "window")]
        init = kernel_init or normal((size * size * inputs[0]) ** -0.5)
        self.kernel = parameter(rngs, [*window, inputs, outputs], init)
        self.bias = parameter(rngs, [outputs], bias_init) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        k = self.size
        # Channels come before the window. Merged behind it, their sharding could no longer be expressed, and each
        # device would sum the full gradient of the kernel.
        windows = x.reshape(batch, height // k, k, width // k, k, channels).transpose(0, 1, 3, 5, 2, 4)
        kernel = self.kernel[...].astype(x.dtype).transpose(2, 0, 1, 3)
        y = windows.reshape(-1, channels * k * k) @ kernel.reshape(channels * k * k, -1)
        y = y.reshape(batch, height // k, width // k, -1)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer normalization over the last axis, with statistics in float32."""

    def __init__(self, rngs: nnx.Rngs, width: int, eps: float, *, stack: int | None = None) -> None:
        lead = [] if stack is None else [(stack, "layers")]
        self.eps = eps
        self.scale = parameter(rngs, [*lead, (width, "norm")], ones)
        self.bias = parameter(rngs, [*lead, (width, "norm")], zeros)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        mean = y.mean(-1, keepdims=True)
        variance = jnp.square(y - mean).mean(-1, keepdims=True)
        y = (y - mean) * jax.lax.rsqrt(variance + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalization over the last axis (arXiv 1910.07467), with statistics in float32."""

    def __init__(self, rngs: nnx.Rngs, width: int, eps: float, *, stack: int | None = None) -> None:
        lead = [] if stack is None else [(stack, "layers")]
        self.eps = eps
        self.scale = parameter(rngs, [*lead, (width, "norm")], ones)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * self.scale[...]).astype(x.dtype)


def platform() -> str:
    """The platform to compile for, ``cpu``, ``gpu`` or ``tpu``: that of the active mesh, else the default backend."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def shard_rows(x: jax.Array) -> jax.Array:
    """Keeps activations [B, ...] split by rows and unsplit on their other axes.

    Called where a residual stream begins, so that the compiler does not carry a parameter's layout into it.
    """
    return constrain(x, ("data", "fsdp"))


# Names (checkpoint_name) of what a block may keep for its backward pass: rotated queries and keys, values, and what an
# attention kernel keeps itself; the products before the MLP's activation function; its input.
KEPT_ATTENTION, KEPT_MLP, _KEPT_INPUT = "attention", "mlp", "input"
_keep = jax.checkpoint_policies.save_only_these_names
_REMAT: dict[str, Callable[..., bool]] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "auto": jax.checkpoint_policies.nothing_saveable,  # until training chooses (training/remat.py)
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": _keep(KEPT_ATTENTION),
    "mlp": _keep(KEPT_MLP),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=(),
        names_which_can_be_offloaded=(_KEPT_INPUT,),
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def apply_layers(
    block: Callable[..., jax.Array],
    x: jax.Array,
    *context: Any,
    layers: range,
    scan: bool,
    remat: str,
) -> jax.Array:
    """Applies ``layers`` (a step-1 range) of a stacked block to ``x``, scanned or unrolled.

    ``block`` is a module with parameters ``[L, ...]``; its call sees one layer's, takes ``(x, *context)`` and returns
    the next ``x``. ``remat`` names what the backward pass recomputes, as ``config.model.remat``.
    """
    graph, stacked = nnx.split(block)

    def apply_one(x: jax.Array, layer: nnx.State) -> jax.Array:
        return nnx.merge(graph, layer)(checkpoint_name(x, _KEPT_INPUT), *context)

    if remat != "none":
        # Inside a scan, XLA cannot merge the recomputation with the forward pass, so CSE need not be prevented.
        apply_one = jax.checkpoint(apply_one, policy=_REMAT[remat], prevent_cse=not scan)
    if scan and len(layers) > 1:
        params = jax.tree.map(lambda p: p[layers.start : layers.stop], stacked)
        return jax.lax.scan(lambda x, layer: (apply_one(x, layer), None), x, params)[0]
    if len(layers) > 1:
        apply_one = jax.jit(apply_one)  # traced once for all layers
    for layer in _split_layers(stacked, layers):
        x = apply_one(x, layer)
    return x


def split_block(block: _Block, sizes: Sequence[int]) -> list[_Block]:
    """``block`` as several, with the parameters of so many layers each, so that each is applied in its own way."""
    if len(sizes) == 1:
        return [block]
    graph, stacked = nnx.split(block)
    parts = jax.tree.map(lambda p: jax.lax.split(p, sizes), stacked)  # one split, as in _split_layers
    return [
        nnx.merge(graph, jax.tree.map(lambda _, part, i=index: part[i], stacked, parts)) for index in range(len(sizes))
    ]


def unroll_layers(block: _Block, layers: range) -> Iterator[_Block]:
    """Yields ``block`` with the parameters of one of ``layers`` (a step-1 range) at a time."""
    graph, stacked = nnx.split(block)
    for layer in _split_layers(stacked, layers):
        yield nnx.merge(graph, layer)


def _split_layers(stacked: nnx.State, layers: range) -> Iterator[nnx.State]:
    # One split: its gradient concatenates the parts' gradients. Those of slices would be padded to full size and added.
    parts = jax.tree.map(lambda p: jax.lax.split(p[layers.start : layers.stop], (1,) * len(layers)), stacked)
    for index in range(len(layers)):
        yield jax.tree.map(lambda _, part, i=index: part[i][0], stacked, parts)
