"""Token fusion: turns the tapped states of the vision tower into a few image tokens of the language model.

**MBTF** (multi-block token fusion, arXiv 2506.07138) concatenates the taps on channels and mixes them with 1×1
convolutions. **STF** (spatial token fusion) merges each k×k neighborhood by a k×k convolution of stride k, then maps
to the language model's width by a 1×1 convolution: 24×24 = 576 tokens become 144 for k = 2. The baselines
(models/baselines.py) have the same interface.

    name            reads           tokens  layers
    mlp             deepest tap     P       projector
    avg_pool        deepest tap     P/k²    this and the next five: models/baselines.py
    pixel_shuffle   deepest tap     P/k²
    ldp_v2          deepest tap     P/k²
    c_abstractor    deepest tap     P/k²
    resampler       deepest tap     P/k²
    token_packer    4 taps          P/k²
    stf             deepest tap     P/k²    STF
    mbtf            8 taps          P       MBTF, projector
    mbtf_stf        8 taps          P/k²    MBTF, STF: the paper's

``variant="code"`` computes what the authors' program does: MBTF is linear-GELU-linear, STF is conv-GELU-linear.
``variant="paper"`` computes what their figure shows: a GELU after MBTF's second layer too, and in STF three
convolutions, each with a GELU, the first of which keeps all k²·C values of a window (the paper calls this lossless).

Axis letters: B images, P patches (a grid of g×g), N tokens out, C tower width, D language model width.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from stf_jax.config import FusionConfig, UserError, did_you_mean
from stf_jax.models.baselines import (
    AvgPool,
    CAbstractor,
    Grid,
    LDPv2,
    PixelShuffle,
    Projector,
    Resampler,
    TokenPacker,
)
from stf_jax.models.layers import Linear, StridedConv, gelu, initializers
from stf_jax.models.vit import VisionConfig

TAPS = 8  # blocks that MBTF reads by default


def tapped_blocks(config: FusionConfig, layers: int) -> tuple[int, ...]:
    """The blocks that this fusion reads, deepest first.

    If the config names none, MBTF reads eight evenly spaced blocks: for CLIP-L's 24 layers 24, 21, …, 3. The authors'
    code takes the last but one layer instead of the last (23, 21, …, 3), as LLaVA does, and so does ``variant="code"``
    unless that layer is already among the eight. A fusion of one tap reads the deepest of these. TokenPacker reads the
    deepest, the one before it, and two at about 2/3 and 1/2 of its depth (23, 22, 16, 12).

    Raises:
      UserError: taps that the tower does not have, or that are not in descending order.
    """
    spec, taps = _fusion_spec(config), config.taps
    if not all(0 <= tap <= layers for tap in taps) or any(a <= b for a, b in itertools.pairwise(taps)):
        raise UserError(
            f"model.fusion.taps={taps} must be distinct blocks of the tower, 0 to {layers}, in descending order."
        )
    before_last = config.variant == "code" and layers - 1 not in _evenly_spaced(layers)
    deepest = taps[0] if taps else layers - before_last
    if spec.taps is None:
        return (deepest,)
    return taps or spec.taps(layers, deepest)


def _evenly_spaced(layers: int) -> tuple[int, ...]:
    count = min(TAPS, layers)
    return tuple(math.ceil(layers * i / count) for i in range(count, 0, -1))


def tokens_per_image(config: FusionConfig, grid: int) -> int:
    """N, the image tokens per image of ``grid``×``grid`` patches.

    Raises:
      UserError: the kernel does not divide the grid and ``pad_grid`` is off.
    """
    if not _fusion_spec(config).merges:
        return grid * grid
    if grid % config.kernel and not config.pad_grid:
        fitting = [str(k) for k in range(1, grid + 1) if grid % k == 0]
        raise UserError(
            f"model.fusion.kernel={config.kernel} does not divide the tower's {grid}×{grid} grid; "
            f"choose {', '.join(fitting)}, or set model.fusion.pad_grid=True to pad the grid with zeros."
        )
    return math.ceil(grid / config.kernel) ** 2


class MBTF(nnx.Module):
    """Multi-block token fusion: taps [..., M·C] → [..., C'] by two 1×1 convolutions."""

    def __init__(self, rngs: nnx.Rngs, config: FusionConfig, channels: int, out: int) -> None:
        hidden = config.mbtf_hidden or channels // 2
        self.last_gelu = config.variant == "paper"
        self.first = Linear(
            rngs, [(channels, "embed")], [(hidden, "mlp")], **initializers(config.init, channels, hidden)
        )
        self.second = Linear(rngs, [(hidden, "mlp")], [(out, "embed")], **initializers(config.init, hidden, out))

    def __call__(self, x: Float[Array, "*axes MC"]) -> Float[Array, "*axes width"]:
        x = self.second(gelu(self.first(x)))
        return gelu(x) if self.last_gelu else x


class STF(nnx.Module):
    """Spatial token fusion: [B, g, g, C] → [B, g/k, g/k, D]."""

    def __init__(self, rngs: nnx.Rngs, config: FusionConfig, grid: Grid, out: int) -> None:
        k, channels = config.kernel, grid.channels
        window = k * k * channels
        hidden = config.stf_hidden or 4 * window
        self.paper = config.variant == "paper"
        if self.paper:
            conv_init = initializers(config.init, window, window)
            self.conv = StridedConv(rngs, k, (channels, "channel"), (window, "embed"), **conv_init)
            self.mix = Linear(rngs, [(window, "embed")], [(hidden, "mlp")], **initializers(config.init, window, hidden))
        else:
            conv_init = initializers(config.init, window, hidden)
            self.conv = StridedConv(rngs, k, (channels, "embed"), (hidden, "mlp"), **conv_init)
        self.out = Linear(rngs, [(hidden, "mlp")], [(out, "embed")], **initializers(config.init, hidden, out))

    def __call__(self, x: Float[Array, "B g g C"]) -> Float[Array, "B h h D"]:
        x = gelu(self.conv(x))
        return gelu(self.out(gelu(self.mix(x)))) if self.paper else self.out(x)


def _patch_projector(rngs: nnx.Rngs, config: FusionConfig, grid: Grid, out: int) -> Projector:
    return Projector(rngs, config, grid.channels, out)


def _mbtf_taps(layers: int, deepest: int) -> tuple[int, ...]:
    """Evenly spaced taps for MBTF, with the deepest replaced by ``deepest``."""
    return (deepest, *_evenly_spaced(layers)[1:])


def _token_packer_taps(layers: int, deepest: int) -> tuple[int, ...]:
    """Taps of TokenPacker; its authors use 23, 22, 16 and 12 of CLIP-L, of which LLaVA reads 23."""
    depths = (deepest, deepest - 1, round(16 / 23 * deepest), round(12 / 23 * deepest))
    return tuple(sorted({max(depth, 0) for depth in depths}, reverse=True))  # fewer in a tower of three blocks


@dataclasses.dataclass(frozen=True)
class FusionSpec:
    """Properties of a fusion that are known before it is built."""

    # (rngs, config, grid, D) → a module [B, g, g, channels] → [B, …, D]
    connector: Callable[[nnx.Rngs, FusionConfig, Grid, int], Callable[[jax.Array], jax.Array]]
    uses_mbtf: bool = False  # whether MBTF first mixes all taps into one state
    taps: Callable[[int, int], tuple[int, ...]] | None = None  # (layers, deepest) → taps; None: one tap
    merges: bool = True  # whether each token stands for k×k patches
    windows: bool = True  # whether these are windows, so that the grid may need padding


FUSIONS: dict[str, FusionSpec] = {
    "mlp": FusionSpec(_patch_projector, merges=False, windows=False),
    "avg_pool": FusionSpec(AvgPool),
    "pixel_shuffle": FusionSpec(PixelShuffle),
    "ldp_v2": FusionSpec(LDPv2),
    "c_abstractor": FusionSpec(CAbstractor),
    "resampler": FusionSpec(Resampler, windows=False),
    "token_packer": FusionSpec(TokenPacker, taps=_token_packer_taps),
    "stf": FusionSpec(STF),
    "mbtf": FusionSpec(_patch_projector, uses_mbtf=True, taps=_mbtf_taps, merges=False, windows=False),
    "mbtf_stf": FusionSpec(STF, uses_mbtf=True, taps=_mbtf_taps),
}


def _fusion_spec(config: FusionConfig) -> FusionSpec:
    if config.fusion not in FUSIONS:
        raise UserError(f"Config key model.fusion.fusion is {config.fusion!r}: {did_you_mean(config.fusion, FUSIONS)}")
    return FUSIONS[config.fusion]


class Fusion(nnx.Module):
    """A fusion of the table above, built by name."""

    def __init__(self, rngs: nnx.Rngs, config: FusionConfig, vision: VisionConfig, out: int) -> None:
        """``out`` is D. Raises UserError for an unknown name or a kernel that does not divide the grid."""
        tokens_per_image(config, vision.grid)
        spec = _fusion_spec(config)
        self.side, self.merges = vision.grid, spec.merges
        self.pad = -vision.grid % config.kernel if spec.windows else 0
        grid = Grid(self.side + self.pad, vision.width, len(tapped_blocks(config, vision.layers)))
        mbtf_grid = dataclasses.replace(grid, width=config.mbtf_width or vision.width, taps=1)
        self.mbtf = MBTF(rngs, config, grid.channels, mbtf_grid.width) if spec.uses_mbtf else None
        self.tokens = spec.connector(rngs, config, mbtf_grid if spec.uses_mbtf else grid, out)

    def __call__(self, states: tuple[Float[Array, "B P C"], ...]) -> Float[Array, "B N D"]:
        """Image tokens, in row-major order, of tapped states, deepest first.

        A fusion that does not merge patches accepts any number of them.
        """
        with jax.named_scope("fusion"):
            x = jnp.concatenate(states, axis=-1)
            if self.mbtf is not None:
                x = self.mbtf(x)
            if not self.merges:
                return self.tokens(x)
            x = x.reshape(x.shape[0], self.side, self.side, -1)
            if self.pad:
                x = jnp.pad(x, ((0, 0), (0, self.pad), (0, self.pad), (0, 0)))
            x = self.tokens(x)
            return x.reshape(x.shape[0], -1, x.shape[-1])
