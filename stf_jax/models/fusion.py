"""Token fusion: the tapped states of the tower become a few image tokens of the language model.

**MBTF** (multi-block token fusion, arXiv 2506.07138) concatenates the taps on channels and mixes them with 1×1
convolutions. **STF** (spatial token fusion) merges each k×k neighbourhood by a k×k convolution of stride k, then maps
to the language model's width by a 1×1 convolution: 24×24 = 576 tokens become 144 for k = 2. Their rivals stand under
the same interface.

    name            reads        tokens     layers
    mlp             deepest tap  P          projector                          LLaVA-1.5 (arXiv 2310.03744)
    avg_pool        deepest tap  P/k²       k×k mean, projector
    pixel_shuffle   deepest tap  P/k²       k×k patches side by side, projector
    stf             deepest tap  P/k²       STF
    mbtf            all taps     P          MBTF, projector
    mbtf_stf        all taps     P/k²       MBTF, STF                          the paper's

``variant="code"`` computes what the authors' program does: MBTF is linear-GELU-linear, STF is conv-GELU-linear.
``variant="paper"`` computes what their figure draws: a GELU after MBTF's second layer too, and in STF three
convolutions, each with a GELU, the first of which keeps all k²·C values of a window (the paper calls this lossless).

Axis letters: B pictures, P patches (a grid of g×g), N tokens out, C tower width, D language model width.
"""

import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from stf_jax.config import FusionConfig, UserError, nearest
from stf_jax.models.layers import Init, Linear, StridedConv, gelu, normal, uniform, zeros
from stf_jax.models.vit import VisionConfig

TAPS = 8  # blocks that MBTF reads unless told otherwise


def tapped_blocks(config: FusionConfig, layers: int) -> tuple[int, ...]:
    """The blocks that this fusion reads, deepest first.

    Where the config names none, eight evenly spaced ones: for CLIP-L's 24 layers 24, 21, …, 3. The authors' code takes
    the last but one layer in place of the last (23, 21, …, 3), as LLaVA does, and so does ``variant="code"`` where that
    layer is not among the eight already. A fusion of one tap reads the deepest.

    Raises:
      UserError: taps that the tower does not have, or that are not in descending order.
    """
    taps = config.taps
    if not all(0 <= tap <= layers for tap in taps) or any(a <= b for a, b in itertools.pairwise(taps)):
        raise UserError(
            f"model.fusion.taps={taps} should name blocks of the tower, 0 to {layers}, each once, the deepest first."
        )
    if not taps:
        count = min(TAPS, layers)
        taps = tuple(math.ceil(layers * i / count) for i in range(count, 0, -1))
        if config.variant == "code" and layers - 1 not in taps:
            taps = (layers - 1, *taps[1:])
    return taps if _parts(config)[0] else taps[:1]


def tokens_per_image(config: FusionConfig, grid: int) -> int:
    """N, the image tokens that one picture of ``grid``×``grid`` patches becomes.

    Raises:
      UserError: the kernel does not divide the grid and ``pad_grid`` is off.
    """
    if not _parts(config)[1].merges:
        return grid * grid
    if grid % config.kernel and not config.pad_grid:
        fitting = [str(k) for k in range(1, grid + 1) if grid % k == 0]
        raise UserError(
            f"model.fusion.kernel={config.kernel} does not divide the tower's {grid}×{grid} grid; "
            f"choose {', '.join(fitting)}, or set model.fusion.pad_grid=True to pad the grid with zeros."
        )
    return math.ceil(grid / config.kernel) ** 2


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


class MBTF(nnx.Module):
    """Multi-block token fusion: taps [..., M·C] → [..., C'] by two 1×1 convolutions."""

    def __init__(self, rngs: nnx.Rngs, config: FusionConfig, channels: int, out: int):
        hidden = config.mbtf_hidden or channels // 2
        self.last_gelu = config.variant == "paper"
        self.first = Linear(
            rngs, [(channels, "embed")], [(hidden, "mlp")], **initialisers(config.init, channels, hidden)
        )
        self.second = Linear(rngs, [(hidden, "mlp")], [(out, "embed")], **initialisers(config.init, hidden, out))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.second(gelu(self.first(x)))
        return gelu(x) if self.last_gelu else x


class STF(nnx.Module):
    """Spatial token fusion: [B, g, g, C] → [B, g/k, g/k, D]."""

    merges = True

    def __init__(self, rngs: nnx.Rngs, config: FusionConfig, channels: int, out: int):
        k = config.kernel
        window = k * k * channels
        hidden = config.stf_hidden or 4 * window
        self.paper = config.variant == "paper"
        if self.paper:
            wide = initialisers(config.init, window, window)
            self.conv = StridedConv(rngs, k, (channels, "channel"), (window, "embed"), **wide)
            self.mix = Linear(rngs, [(window, "embed")], [(hidden, "mlp")], **initialisers(config.init, window, hidden))
        else:
            wide = initialisers(config.init, window, hidden)
            self.conv = StridedConv(rngs, k, (channels, "embed"), (hidden, "mlp"), **wide)
        self.out = Linear(rngs, [(hidden, "mlp")], [(out, "embed")], **initialisers(config.init, hidden, out))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = gelu(self.conv(x))
        return gelu(self.out(gelu(self.mix(x)))) if self.paper else self.out(x)


class Projector(nnx.Module):
    """LLaVA-1.5's ``mlp2x_gelu``: [..., C] → [..., D]."""

    merges = False

    def __init__(self, rngs: nnx.Rngs, config: FusionConfig, channels: int, out: int):
        self.first = Linear(rngs, [(channels, "embed")], [(out, "mlp")], **initialisers(config.init, channels, out))
        self.second = Linear(rngs, [(out, "mlp")], [(out, "embed")], **initialisers(config.init, out, out))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(gelu(self.first(x)))


class AvgPool(nnx.Module):
    """The mean of each k×k window, then the projector: [B, g, g, C] → [B, g/k, g/k, D]."""

    merges = True

    def __init__(self, rngs: nnx.Rngs, config: FusionConfig, channels: int, out: int):
        self.kernel = config.kernel
        self.projector = Projector(rngs, config, channels, out)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.projector(_windows(x, self.kernel).mean((2, 4)))


class PixelShuffle(nnx.Module):
    """The k² patches of each window side by side on channels, then the projector: [B, g, g, C] → [B, g/k, g/k, D]."""

    merges = True

    def __init__(self, rngs: nnx.Rngs, config: FusionConfig, channels: int, out: int):
        self.kernel = config.kernel
        self.projector = Projector(rngs, config, config.kernel**2 * channels, out)

    def __call__(self, x: jax.Array) -> jax.Array:
        windows = _windows(x, self.kernel).transpose(0, 1, 3, 2, 4, 5)
        return self.projector(windows.reshape(*windows.shape[:3], -1))


def _windows(x, k):
    """[B, g, g, C] → [B, g/k, k, g/k, k, C]."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // k, k, width // k, k, channels)


FUSIONS: dict[str, tuple[bool, Callable]] = {  # name → (whether MBTF mixes all taps first, what makes the tokens)
    "mlp": (False, Projector),
    "avg_pool": (False, AvgPool),
    "pixel_shuffle": (False, PixelShuffle),
    "stf": (False, STF),
    "mbtf": (True, Projector),
    "mbtf_stf": (True, STF),
}


def _parts(config):
    if config.fusion not in FUSIONS:
        raise UserError(f"Config key model.fusion.fusion is {config.fusion!r}: {nearest(config.fusion, FUSIONS)}")
    return FUSIONS[config.fusion]


class Fusion(nnx.Module):
    """Any of the fusions above, by name."""

    def __init__(self, rngs: nnx.Rngs, config: FusionConfig, vision: VisionConfig, out: int):
        """``out`` is D. Raises UserError for an unknown name or a kernel that does not divide the grid."""
        tokens_per_image(config, vision.grid)
        mixes, tokens = _parts(config)
        self.grid = vision.grid
        self.pad = -vision.grid % config.kernel if tokens.merges else 0
        width = (mixes and config.mbtf_width) or vision.width
        tapped = len(tapped_blocks(config, vision.layers)) * vision.width
        self.mbtf = MBTF(rngs, config, tapped, width) if mixes else None
        self.tokens = tokens(rngs, config, width, out)

    def __call__(self, states: tuple[jax.Array, ...]) -> jax.Array:
        """Image tokens [B, N, D], row by row, of tapped states, each [B, P, C], deepest first."""
        with jax.named_scope("fusion"):
            x = jnp.concatenate(states, axis=-1)
            if self.mbtf is not None:
                x = self.mbtf(x)
            x = x.reshape(x.shape[0], self.grid, self.grid, -1)
            if self.pad:
                x = jnp.pad(x, ((0, 0), (0, self.pad), (0, self.pad), (0, 0)))
            x = self.tokens(x)
            return x.reshape(x.shape[0], -1, x.shape[-1])
