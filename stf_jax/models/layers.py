"""The parts that the tower, the fusion and the decoder share, and the one way to declare a parameter.

A parameter is declared once, by :func:`parameter`: shape, logical axes and initialiser. Sharding (runtime/mesh.py),
restore targets and exports derive from that declaration. Every parameter is float32 here; what is frozen is cast when
the training state is made. A layer computes in the type of its input.

Axis letters: B batch, T positions, L layers, D width, H heads, K kv heads, F feed-forward.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

Init = Callable[[jax.Array, tuple[int, ...]], jax.Array]
Axis = tuple[int, str]  # size, logical name


def parameter(rngs: nnx.Rngs, axes: Sequence[Axis], init: Init) -> nnx.Param:
    """Declares a float32 parameter with the given (size, logical name) axes."""
    shape = tuple(size for size, _ in axes)
    return nnx.Param(init(rngs.params(), shape), axes=tuple(name for _, name in axes))


def zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Initialiser: 0."""
    del key
    return jnp.zeros(shape, jnp.float32)


def ones(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Initialiser: 1."""
    del key
    return jnp.ones(shape, jnp.float32)


def normal(stddev: float) -> Init:
    """Initialiser: N(0, stddev²)."""
    return lambda key, shape: stddev * jax.random.normal(key, shape, jnp.float32)


def uniform(bound: float) -> Init:
    """Initialiser: U(−bound, bound)."""
    return lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def initialisers(name: str, fan_in: int, fan_out: int) -> dict[str, Init]:
    """``kernel_init`` and ``bias_init`` of a layer, by the name of the scheme.

    ``torch`` is how ``torch.nn.Linear`` and ``Conv2d`` start, weights and biases U(±1/√fan_in), and so how the
    authors' layers do; ``kaiming`` is N(0, 2/fan_in), ``xavier`` U(±√(6/(fan_in + fan_out))), ``normal`` N(0, 0.02²),
    these with biases at 0.
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


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu, "gelu_tanh": gelu_tanh}


class Linear(nnx.Module):
    """``y = x·kernel + bias`` over one or more trailing axes.

    ``stack`` puts a leading axis of that many layers on the parameters; the caller scans over it, so that a call
    always sees one layer's parameters. Takes ``[..., *inputs]`` and gives ``[..., *outputs]``.
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
    ):
        lead = [] if stack is None else [(stack, "layers")]
        fan_in = math.prod(size for size, _ in inputs)
        self.inputs, self.outputs = (tuple(size for size, _ in axes) for axes in (inputs, outputs))
        self.kernel = parameter(rngs, [*lead, *inputs, *outputs], kernel_init or normal(fan_in**-0.5))
        self.bias = parameter(rngs, [*lead, *outputs], bias_init) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        # As one product of two matrices: XLA's CPU backward pass of a product over more axes takes twice the time.
        lead = x.shape[: x.ndim - len(self.inputs)]
        fan_in, fan_out = math.prod(self.inputs), math.prod(self.outputs)
        y = x.reshape(-1, fan_in) @ self.kernel[...].astype(x.dtype).reshape(fan_in, fan_out)
        y = y.reshape(*lead, *self.outputs)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class StridedConv(nnx.Module):
    """A k×k convolution of stride k without padding, as one matrix product over k×k windows.

    The kernel is HWIO, ``[k, k, in, out]``. Takes ``[B, k·h, k·w, in]`` and gives ``[B, h, w, out]``.
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
    ):
        self.size = size
        window = [(size, "window"), (size, "window")]
        init = kernel_init or normal((size * size * inputs[0]) ** -0.5)
        self.kernel = parameter(rngs, [*window, inputs, outputs], init)
        self.bias = parameter(rngs, [outputs], bias_init) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        k = self.size
        # Channels first in a row: merged behind the window, their split over devices could not be told any more, and
        # the kernel's gradient would be summed whole on each of them.
        windows = x.reshape(batch, height // k, k, width // k, k, channels).transpose(0, 1, 3, 5, 2, 4)
        kernel = self.kernel[...].astype(x.dtype).transpose(2, 0, 1, 3)
        y = windows.reshape(-1, channels * k * k) @ kernel.reshape(channels * k * k, -1)
        y = y.reshape(batch, height // k, width // k, -1)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, with statistics in float32."""

    def __init__(self, rngs: nnx.Rngs, width: int, eps: float, *, stack: int | None = None):
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
    """Root-mean-square normalisation over the last axis (arXiv 1910.07467), with statistics in float32."""

    def __init__(self, rngs: nnx.Rngs, width: int, eps: float, *, stack: int | None = None):
        lead = [] if stack is None else [(stack, "layers")]
        self.eps = eps
        self.scale = parameter(rngs, [*lead, (width, "norm")], ones)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * self.scale[...]).astype(x.dtype)


def platform() -> str:
    """What is compiled for, ``cpu``, ``gpu`` or ``tpu``: the devices of the mesh in use, which need not be here."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def constrain(x: jax.Array, *spec: str | tuple[str, ...] | None) -> jax.Array:
    """Asks for a layout of ``x`` on the mesh in use, by mesh axis; without a mesh, ``x`` as it is."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, jax.sharding.PartitionSpec(*spec))


def shard_rows(x: jax.Array) -> jax.Array:
    """Keeps activations [B, ...] split by rows and whole on their other axes.

    Said where a residual stream begins, so that the compiler does not carry a parameter's layout into it.
    """
    return constrain(x, ("data", "fsdp"))


_REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def apply_layers(
    block: nnx.Module,
    x: jax.Array,
    *context,
    layers: range,
    scan: bool,
    remat: str,
) -> jax.Array:
    """Runs ``layers`` (a step-1 range) of a stacked block on ``x``, scanned or written out.

    ``block`` holds parameters ``[L, ...]``; its call sees one layer's, takes ``(x, *context)`` and gives the next
    ``x``. ``remat`` names what the backward pass recomputes: ``none``, ``dots`` (all but matrix products), ``full``.
    """
    graph, stacked = nnx.split(block)

    def one(x, layer):
        return nnx.merge(graph, layer)(x, *context)

    if remat != "none":
        # Inside a scan, XLA cannot merge the recomputation with the forward pass, so CSE need not be prevented.
        one = jax.checkpoint(one, policy=_REMAT[remat], prevent_cse=not scan)
    if scan and len(layers) > 1:
        taken = jax.tree.map(lambda p: p[layers.start : layers.stop], stacked)
        return jax.lax.scan(lambda x, layer: (one(x, layer), None), x, taken)[0]
    # Split at once: so the parts' gradients are laid behind each other, and not each padded to the whole and added.
    parts = jax.tree.map(lambda p: jax.lax.split(p[layers.start : layers.stop], (1,) * len(layers)), stacked)
    for index in range(len(layers)):
        x = one(x, jax.tree.map(lambda _, part, i=index: part[i][0], stacked, parts))
    return x
