"""Baselines for MBTF and STF: other maps from the tower's states to image tokens, each from its paper.

    name            tokens  layers
    mlp             P       projector                                        LLaVA-1.5, arXiv 2310.03744
    avg_pool        P/k²    k×k mean, projector
    pixel_shuffle   P/k²    k×k patches side by side, projector
    ldp_v2          P/k²    projector, k×k mean, depth-wise 3×3 added to it  MobileVLM V2, arXiv 2402.03766
    c_abstractor    P/k²    3 blocks, k×k mean, 3 blocks, projector          Honeybee, arXiv 2312.06742
    resampler       P/k²    learned queries through 6 blocks of attention    Honeybee, arXiv 2312.06742
    token_packer    P/k²    a coarse query attends to its k×k patches, MLP   TokenPacker, arXiv 2407.02392

All but token_packer read only the deepest tap, the same for all, whichever block their authors take. The last four
compute what the authors' published programs do. Widths that are 1024 there, as CLIP-L's, are the tower's width here.
``init`` sets how layers and convolutions start; norms, learned queries and positions start as in the authors' code.

Axis letters: B images, P patches (a grid of g×g), N tokens out, C tower width, M taps, D language model width,
H heads, Dh head size, L blocks.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from stf_jax.accounting.flops import CONVOLUTION
from stf_jax.config import FusionConfig
from stf_jax.models.layers import (
    Activation,
    LayerNorm,
    Linear,
    apply_layers,
    gelu,
    initializers,
    normal,
    parameter,
    zeros,
)

DEPTHS = {"c_abstractor": 3, "resampler": 6}  # number of blocks by default


@dataclasses.dataclass(frozen=True)
class Grid:
    """The input of a fusion: states [B, side, side, taps·width], the deepest tap's channels first."""

    side: int
    width: int
    taps: int

    @property
    def channels(self) -> int:
        """Channels of all taps together."""
        return self.taps * self.width


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


class AvgPool(nnx.Module):
    """The mean of each k×k window, then the projector: [B, g, g, C] → [B, g/k, g/k, D]."""

    def __init__(self, rngs: nnx.Rngs, config: FusionConfig, grid: Grid, out: int) -> None:
        self.kernel = config.kernel
        self.projector = Projector(rngs, config, grid.channels, out)

    def __call__(self, x: Float[Array, "B g g C"]) -> Float[Array, "B h h D"]:
        return self.projector(_average_windows(x, self.kernel))


class PixelShuffle(nnx.Module):
    """The k² patches of each window concatenated on channels, then the projector: [B, g, g, C] → [B, g/k, g/k, D]."""

    def __init__(self, rngs: nnx.Rngs, config: FusionConfig, grid: Grid, out: int) -> None:
        self.kernel = config.kernel
        self.projector = Projector(rngs, config, config.kernel**2 * grid.channels, out)

    def __call__(self, x: Float[Array, "B g g C"]) -> Float[Array, "B h h D"]:
        windows = _windows(x, self.kernel).swapaxes(2, 3)
        return self.projector(windows.reshape(*windows.shape[:3], -1))


class LDPv2(nnx.Module):
    """MobileVLM V2's second lightweight downsample projector: [B, g, g, C] → [B, g/k, g/k, D].

    The projector at every patch, the mean of each window, and a depth-wise convolution added to it (positional encoding
    generator, arXiv 2102.10882). The original pools to 12×12 whatever the grid, which for 24×24 is k = 2.
    """

    def __init__(self, rngs: nnx.Rngs, config: FusionConfig, grid: Grid, out: int) -> None:
        self.kernel = config.kernel
        self.projector = Projector(rngs, config, grid.channels, out)
        self.position = DepthwiseConv(rngs, config, (out, "embed"))

    def __call__(self, x: Float[Array, "B g g C"]) -> Float[Array, "B h h D"]:
        x = _average_windows(self.projector(x), self.kernel)
        return x + self.position(x)


class CAbstractor(nnx.Module):
    """Honeybee's C-Abstractor: [B, g, g, C] → [B, g/k, g/k, D].

    Adds learned positions [P, C], then applies L convolutional blocks, the mean of each window, L more blocks, and a
    projector with SiLU. The original reads the tower's last block (24 of CLIP-L), and pools adaptively, so it allows
    any number of windows per side.
    """

    def __init__(self, rngs: nnx.Rngs, config: FusionConfig, grid: Grid, out: int) -> None:
        depth = config.depth or DEPTHS["c_abstractor"]
        self.kernel, self.layers = config.kernel, range(depth)
        positions = [(grid.side**2, "position"), (grid.channels, "embed")]
        self.position_embed = parameter(rngs, positions, normal(0.02))
        self.before = ConvBlock(rngs, config, grid.channels, depth)
        self.after = ConvBlock(rngs, config, grid.channels, depth)
        self.projector = Projector(rngs, config, grid.channels, out, jax.nn.silu)

    def __call__(self, x: Float[Array, "B g g C"]) -> Float[Array, "B h h D"]:
        x = x + self.position_embed[...].astype(x.dtype).reshape(x.shape[1:])
        x = apply_layers(self.before, x, layers=self.layers, scan=False, remat="none")
        x = apply_layers(self.after, _average_windows(x, self.kernel), layers=self.layers, scan=False, remat="none")
        return self.projector(x)


class ConvBlock(nnx.Module):
    """RegNet-Y's residual block (arXiv 2003.13678) as Honeybee configures it: [B, h, w, C] → [B, h, w, C].

    1×1, depth-wise 3×3 (groups of one channel) and 1×1 convolutions without biases, each followed by a layer norm over
    the channels of each position; SiLU. After the second, squeeze and excitation (through C/4) weighs channels by their
    mean over all positions. Holds all blocks' parameters; a call sees one block's.
    """

    def __init__(self, rngs: nnx.Rngs, config: FusionConfig, width: int, stack: int) -> None:
        width_axis, inner_axis, squeezed_axis = (width, "embed"), (width, "mlp"), (round(width / 4), "mlp")
        conv_init = initializers(config.init, width, width)
        squeeze_init, excite_init = (
            initializers(config.init, *fans) for fans in ((width, squeezed_axis[0]), (squeezed_axis[0], width))
        )
        self.first = Linear(rngs, [width_axis], [inner_axis], bias=False, stack=stack, **conv_init)
        self.first_norm = LayerNorm(rngs, width, 1e-5, stack=stack)
        self.depthwise = DepthwiseConv(rngs, config, inner_axis, bias=False, stack=stack)
        self.depthwise_norm = LayerNorm(rngs, width, 1e-5, stack=stack)
        self.squeeze = Linear(rngs, [width_axis], [squeezed_axis], stack=stack, **squeeze_init)
        self.excite = Linear(rngs, [squeezed_axis], [width_axis], stack=stack, **excite_init)
        self.last = Linear(rngs, [inner_axis], [width_axis], bias=False, stack=stack, **conv_init)
        self.last_norm = LayerNorm(rngs, width, 1e-5, stack=stack)

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        y = jax.nn.silu(self.first_norm(self.first(x)))
        y = jax.nn.silu(self.depthwise_norm(self.depthwise(y)))
        weights = self.excite(jax.nn.silu(self.squeeze(y.mean((1, 2)))))
        y = y * jax.nn.sigmoid(weights)[:, None, None]
        return jax.nn.silu(x + self.last_norm(self.last(y)))


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
        products = (padded[:, i : i + height, j : j + width] * kernel[i, j] for i in range(3) for j in range(3))
        with jax.named_scope(CONVOLUTION):
            y = functools.reduce(jnp.add, products)
        return (y if self.bias is None else y + self.bias[...]).astype(x.dtype)


class Resampler(nnx.Module):
    """The resampler that Honeybee compares with, in the style of a Q-Former: [B, g, g, C] → [B, g/k, g/k, D].

    One learned query per token attends to the queries and patches together, in L blocks like mPLUG-Owl's (arXiv
    2304.14178). BLIP-2's Q-Former (arXiv 2301.12597), which starts from BERT's weights, alternates between the two;
    this one starts from scratch. Heads have 64 channels, or the greatest common divisor of 64 and C. Queries start at
    zero. The original has attention dropout of 0.1 in training, and 64 queries by default.
    """

    def __init__(self, rngs: nnx.Rngs, config: FusionConfig, grid: Grid, out: int) -> None:
        depth, width = config.depth or DEPTHS["resampler"], grid.channels
        self.side, self.layers = math.ceil(grid.side / config.kernel), range(depth)
        self.enter = Linear(rngs, [(width, "channel")], [(width, "embed")], **initializers(config.init, width, width))
        self.queries = parameter(rngs, [(self.side**2, "position"), (width, "embed")], zeros)
        self.blocks = ResamplerBlock(rngs, config, width, depth)
        self.exit = Linear(rngs, [(width, "embed")], [(out, "mlp")], **initializers(config.init, width, out))

    def __call__(self, x: Float[Array, "B g g C"]) -> Float[Array, "B h h D"]:
        batch, width = x.shape[0], x.shape[-1]
        patches = self.enter(x.reshape(batch, -1, width))
        queries = jnp.broadcast_to(self.queries[...].astype(x.dtype), (batch, self.side**2, width))
        queries = apply_layers(self.blocks, queries, patches, layers=self.layers, scan=False, remat="none")
        return self.exit(queries).reshape(batch, self.side, self.side, -1)


class ResamplerBlock(nnx.Module):
    """Queries [B, N, C] attend to themselves and to patches [B, P, C], then a gated MLP (SwiGLU) with an inner norm.

    The residual of attention starts from the normalized queries. Holds all blocks' parameters; a call sees one block's.
    """

    def __init__(self, rngs: nnx.Rngs, config: FusionConfig, width: int, stack: int) -> None:
        width_axis, hidden = (width, "embed"), (4 * width, "mlp")
        up_init, down_init = (initializers(config.init, *fans) for fans in ((width, 4 * width), (4 * width, width)))
        self.query_norm = LayerNorm(rngs, width, 1e-5, stack=stack)
        self.patch_norm = LayerNorm(rngs, width, 1e-5, stack=stack)
        self.attention = Attention(rngs, config, width, 64, stack=stack)
        self.mlp_norm = LayerNorm(rngs, width, 1e-5, stack=stack)
        self.gate = Linear(rngs, [width_axis], [hidden], stack=stack, **up_init)
        self.up = Linear(rngs, [width_axis], [hidden], stack=stack, **up_init)
        self.hidden_norm = LayerNorm(rngs, 4 * width, 1e-6, stack=stack)
        self.down = Linear(rngs, [hidden], [width_axis], stack=stack, **down_init)

    def __call__(self, queries: Float[Array, "B N C"], patches: Float[Array, "B P C"]) -> Float[Array, "B N C"]:
        queries = self.query_norm(queries)
        context = jnp.concatenate([queries, self.patch_norm(patches)], axis=1)
        x = queries + self.attention(queries, context, context)
        y = self.mlp_norm(x)
        return x + self.down(self.hidden_norm(jax.nn.silu(self.gate(y)) * self.up(y)))


class TokenPacker(nnx.Module):
    """TokenPacker's region-to-point injection: [B, g, g, M·C] → [B, g/k, g/k, D].

    Bilinear downsampling of the deepest tap gives one query per window, which attends to the window's k² patches; two
    MLPs compute their keys and values from all taps. Bilinear downsampling without antialiasing takes the middle patch
    of each window, or the mean of the middle four. Heads have 128 channels, or the greatest common divisor of 128 and
    C. The original starts like ``init="normal"``, except for the projections to heads.
    """

    def __init__(self, rngs: nnx.Rngs, config: FusionConfig, grid: Grid, out: int) -> None:
        width, init = grid.width, initializers(config.init, grid.width, grid.width)
        self.kernel = config.kernel
        self.coarse = Linear(rngs, [(width, "channel")], [(width, "embed")], bias=False, **init)
        self.keys = Projector(rngs, config, grid.channels, width)
        self.values = Projector(rngs, config, grid.channels, width)
        self.query_norm = LayerNorm(rngs, width, 1e-6)
        self.key_norm = LayerNorm(rngs, width, 1e-6)
        self.value_norm = LayerNorm(rngs, width, 1e-6)
        self.attention = Attention(rngs, config, width, 128)
        self.projector = Projector(rngs, config, width, out)

    def __call__(self, x: Float[Array, "B g g MC"]) -> Float[Array, "B h h D"]:
        width, k = self.coarse.inputs[0], self.kernel
        middle = slice((k - 1) // 2, k // 2 + 1)
        queries = _windows(x[..., :width], k)[:, :, middle, :, middle].mean((2, 4))
        queries = self.query_norm(self.coarse(queries))

        def in_windows(y: jax.Array) -> jax.Array:
            return _windows(y, k).swapaxes(2, 3).reshape(-1, k * k, width)

        keys, values = self.key_norm(self.keys(x)), self.value_norm(self.values(x))
        attended = self.attention(queries.reshape(-1, 1, width), in_windows(keys), in_windows(values))
        return self.projector(attended.reshape(queries.shape))


class Attention(nnx.Module):
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


def _windows(x: jax.Array, k: int) -> jax.Array:
    """[B, g, g, C] → [B, g/k, k, g/k, k, C]."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // k, k, width // k, k, channels)


def _average_windows(x: jax.Array, k: int) -> jax.Array:
    """The mean of each window: [B, g, g, C] → [B, g/k, g/k, C]."""
    return _windows(x, k).mean((2, 4))
