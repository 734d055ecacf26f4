"""What a token fusion is: it turns the tapped states of the vision tower into image tokens of the language model.

A fusion is a class in a file of this folder, or in your own, named in a config as ``package.module:Class``:

    class Mine(nnx.Module):
        spec = FusionSpec()

        def __init__(self, rngs, config, grid, out): ...  # FusionConfig, Grid and D
        def __call__(self, x): ...                        # [B, g, g, M·C] -> [B, ..., D]

It may also have

    @staticmethod
    def resolve(config, grid): ...       # FusionConfig -> the same with sizes in place of zeros, before it is built
    @staticmethod
    def tensor_names(config): ...        # parameter path -> Tensor (models/tensor_names.py); default: by convention
    def sources(self, x): ...            # [B, g, g, M·C] -> [B, N, P], the share of each patch in each token
    def nested(self, x, budgets): ...    # [B, g, g, M·C] -> tokens [B, ..., D] for each of some numbers N of tokens
    @staticmethod
    def fitting_budgets(config, side): ...  # which numbers nested can make of side×side patches, highest first
    def nested_sources(self, x, tokens): ...  # sources of nested's tokens
    torch_file = "mine_torch.py"         # beside its file, for export --format=hf: a class Connector in PyTorch

Without ``nested``, any fusion can make fewer tokens: means of windows of its own (M3, arXiv 2405.17430).

Axis letters: B images, P patches (a grid of g×g), N image tokens per image, M taps, C tower width, D language model
width, k side of a window in patches.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from stf_jax.config import FusionConfig, UserError
from stf_jax.models.fusions.parts import average_windows
from stf_jax.models.layers import normal, parameter
from stf_jax.models.towers.base import VisionConfig
from stf_jax.registry import Registry

TAPS = 8  # blocks that MBTF reads by default


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


@dataclasses.dataclass(frozen=True)
class FusionSpec:
    """Properties of a fusion that are known before it is built."""

    taps: Callable[[int, int], tuple[int, ...]] | None = None  # (layers, deepest) → taps; None: the deepest alone
    merges: bool = True  # whether each token stands for k×k patches
    windows: bool = True  # if it merges, whether it merges windows, so that the grid may need padding
    orders: bool = True  # whether its tokens are a grid over the image, in row-major order
    per_patch: bool = False  # whether it maps each patch by itself: [B, P, M·C] → [B, P, D] for any P

    def __post_init__(self) -> None:
        if self.per_patch and self.merges:
            raise ValueError("A fusion that maps each patch by itself does not merge: FusionSpec(merges=False, …).")


@runtime_checkable
class FusionClass(Protocol):
    """A class that builds a fusion."""

    spec: ClassVar[FusionSpec]

    def __call__(
        self, rngs: nnx.Rngs, config: FusionConfig, grid: Grid, out: int
    ) -> Callable[[jax.Array], jax.Array]: ...


FUSIONS: Registry[FusionClass] = Registry("model.fusion.fusion", "stf_jax.models.fusions")


def find_fusion(config: FusionConfig) -> FusionClass:
    """The class of a fusion. Raises UserError for an unknown name, or something that is not a fusion."""
    found = FUSIONS.find(config.fusion)
    if not isinstance(getattr(found, "spec", None), FusionSpec):
        raise UserError(f"model.fusion.fusion={config.fusion} has no class attribute `spec = FusionSpec(...)`.")
    return found


def input_grid(config: FusionConfig, vision: VisionConfig) -> Grid:
    """The input that a fusion gets from a tower: its grid, padded if windows do not divide it."""
    spec = find_fusion(config).spec
    window = config.kernel if spec.merges and spec.windows else 1
    side = math.ceil(vision.grid / window) * window
    return Grid(side, vision.width, len(tapped_blocks(config, vision.layers)))


def resolve_sizes(config: FusionConfig, vision: VisionConfig) -> FusionConfig:
    """The config with the sizes that the fusion's class chooses for zeros, if it reads this tower."""
    resolve = getattr(find_fusion(config), "resolve", None)
    return config if resolve is None else resolve(config, input_grid(config, vision))


def tapped_blocks(config: FusionConfig, layers: int) -> tuple[int, ...]:
    """The blocks that this fusion reads, deepest first.

    If the config names none, MBTF reads eight evenly spaced blocks: for CLIP-L's 24 layers 24, 21, …, 3. The authors'
    code takes the last but one layer instead of the last (23, 21, …, 3), as LLaVA does, and so does ``variant="code"``
    unless that layer is already among the eight. A fusion of one tap reads the deepest of these. TokenPacker reads the
    deepest, the one before it, and two at about 2/3 and 1/2 of its depth (23, 22, 16, 12).

    Raises:
      UserError: taps that the tower does not have, or that are not in descending order.
    """
    spec, taps = find_fusion(config).spec, config.taps
    if not all(0 <= tap <= layers for tap in taps) or any(a <= b for a, b in itertools.pairwise(taps)):
        raise UserError(
            f"model.fusion.taps={taps} must be distinct blocks of the tower, 0 to {layers}, in descending order."
        )
    before_last = config.variant == "code" and layers - 1 not in evenly_spaced(layers)
    deepest = taps[0] if taps else layers - before_last
    if spec.taps is None:
        return (deepest,)
    return taps or spec.taps(layers, deepest)


def evenly_spaced(layers: int) -> tuple[int, ...]:
    """Up to eight evenly spaced blocks, deepest first."""
    count = min(TAPS, layers)
    return tuple(math.ceil(layers * i / count) for i in range(count, 0, -1))


def tokens_per_image(config: FusionConfig, grid: int) -> int:
    """N, the image tokens per image of ``grid``×``grid`` patches: the first of the config's budgets, if it has any.

    Raises:
      UserError: the kernel does not divide the grid and ``pad_grid`` is off, or a budget does not fit.
    """
    if not config.budgets:
        return own_side(config, grid) ** 2
    budgets = config.budgets
    if any(a <= b for a, b in itertools.pairwise(budgets)):
        raise UserError(f"model.fusion.budgets={budgets} must be distinct numbers in descending order.")
    find_fitting = getattr(find_fusion(config), "fitting_budgets", _fitting_pools)
    fitting: Sequence[int] = find_fitting(config, grid)
    for budget in budgets:
        if budget not in fitting:
            higher, lower = [n for n in fitting if n > budget], [n for n in fitting if n < budget]
            near = " and ".join(str(n) for n in (*higher[-1:], *lower[:1]))
            raise UserError(
                f"model.fusion.budgets: {config.fusion} cannot make {budget} tokens of {grid}×{grid} patches; the "
                f"nearest that it can are {near}."
            )
    return budgets[0]


def _fitting_pools(config: FusionConfig, grid: int) -> list[int]:
    """The numbers of windows that divide the grid of a fusion's tokens."""
    side = own_side(config, grid)
    return [n**2 for n in range(side, 0, -1) if side % n == 0]


def own_side(config: FusionConfig, grid: int) -> int:
    """Tokens along a side of the grid that a fusion makes of ``grid``×``grid`` patches, whatever its budgets.

    Raises:
      UserError: the kernel does not divide the grid and ``pad_grid`` is off.
    """
    if not find_fusion(config).spec.merges:
        return grid
    if grid % config.kernel and not config.pad_grid:
        fitting = [str(k) for k in range(1, grid + 1) if grid % k == 0]
        raise UserError(
            f"model.fusion.kernel={config.kernel} does not divide the tower's {grid}×{grid} grid; "
            f"choose {', '.join(fitting)}, or set model.fusion.pad_grid=True to pad the grid with zeros."
        )
    return math.ceil(grid / config.kernel)


def pad_grid(x: Float[Array, "B g g C"], window: int) -> Float[Array, "B G G C"]:
    """Adds zeros at the right and bottom, so that windows of that side divide the grid."""
    pad = -x.shape[1] % window
    return jnp.pad(x, ((0, 0), (0, pad), (0, pad), (0, 0))) if pad else x


def pool_tokens(x: Float[Array, "B *N D"], budgets: Sequence[int]) -> list[Float[Array, "B n n D"]]:
    """The means of windows of a square grid of tokens, at each of some numbers of windows."""
    side = math.isqrt(math.prod(x.shape[1:-1]))
    x = x.reshape(len(x), side, side, x.shape[-1])
    windows = (side // math.isqrt(budget) for budget in budgets)
    return [x if window == 1 else average_windows(x, window) for window in windows]


class Fusion(nnx.Module):
    """A fusion built by name: ``connector`` is an instance of its class."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        config: FusionConfig,
        vision: VisionConfig,
        out: int,
        tokens: int = 0,
        newline: bool = False,
    ) -> None:
        """Builds the fusion.

        Args:
          out: D.
          tokens: N, one of the config's budgets; 0: the first of them, or what the fusion makes without budgets.
          newline: whether to declare ``newline``, the token that ends each row of tiles (data/tiles.py).

        Raises:
          UserError: an unknown name, or as :func:`tokens_per_image`.
        """
        self.name, self.out = config.fusion, out
        self.tokens, self.has_budgets = tokens or tokens_per_image(config, vision.grid), bool(config.budgets)
        fusion, grid = find_fusion(config), input_grid(config, vision)
        self.side, self.padded_side, self.per_patch = vision.grid, grid.side, fusion.spec.per_patch
        self.connector = fusion(rngs, resolve_sizes(config, vision), grid, out)
        if newline:
            self.newline = parameter(rngs, [(out, "embed")], normal(out**-0.5))

    def __call__(self, states: tuple[Float[Array, "B P C"], ...]) -> Float[Array, "B N D"]:
        """Image tokens, in row-major order, of tapped states, deepest first.

        A fusion that maps each patch by itself accepts any number of them.

        Raises:
          UserError: the fusion's class returns another number or width of tokens than it should.
        """
        patches = states[0].shape[1]
        if self.has_budgets and patches == self.side**2:
            return self.nested(states, (self.tokens,))[0]
        with jax.named_scope("fusion"):
            x = self.connector(self._join(states))
            return self._check(x, patches if self.per_patch else self.tokens)

    def nested(
        self, states: tuple[Float[Array, "B P C"], ...], budgets: Sequence[int]
    ) -> tuple[Float[Array, "B _ D"], ...]:
        """Image tokens at each of some budgets. What is common to all of them is computed once.

        Raises:
          UserError: as for a call.
        """
        with jax.named_scope("fusion"):
            x = self._join(states)
            if hasattr(self.connector, "nested"):
                made = self.connector.nested(x, budgets)
            else:
                made = pool_tokens(self.connector(x), budgets)
            return tuple(self._check(x, budget) for x, budget in zip(made, budgets, strict=True))

    def _check(self, x: jax.Array, count: int) -> jax.Array:
        """The tokens as [B, N, D], if they are that many."""
        x = x.reshape(len(x), -1, x.shape[-1])
        if x.shape[1:] != (count, self.out):
            raise UserError(
                f"{self.name} returns {x.shape[1]} tokens of width {x.shape[2]} per image; its spec and the model need "
                f"{count} of width {self.out}."
            )
        return x

    def sources(self, states: tuple[Float[Array, "B P C"], ...]) -> Float[Array, "B N P"] | None:
        """The share of each patch in each token: rows sum to one. None if the fusion's class has no ``sources``.

        Patches that pad the grid are left out.
        """
        batch, patches = states[0].shape[:2]
        is_nested = self.has_budgets and patches == self.side**2
        if is_nested and hasattr(self.connector, "nested"):
            if (read_nested := getattr(self.connector, "nested_sources", None)) is None:
                return None
            shares = read_nested(self._join(states), self.tokens)
        elif self.per_patch:
            shares = jnp.broadcast_to(jnp.eye(patches), (batch, patches, patches))
        elif (read := getattr(self.connector, "sources", None)) is None:
            return None
        else:
            shares = read(self._join(states))
        if is_nested and not hasattr(self.connector, "nested"):
            (shares,) = pool_tokens(shares, (self.tokens,))
        if self.per_patch:
            return shares.reshape(batch, -1, patches)
        padded = math.isqrt(shares.shape[-1])
        shares = shares.reshape(batch, -1, padded, padded)[:, :, : self.side, : self.side].reshape(batch, -1, patches)
        return shares / shares.sum(-1, keepdims=True)

    def _join(self, states: tuple[Float[Array, "B P C"], ...]) -> jax.Array:
        """The input of the connector: [B, g, g, M·C], or [B, P, M·C] if it maps each patch by itself."""
        x = jnp.concatenate(states, axis=-1)
        if self.per_patch:
            return x
        return pad_grid(x.reshape(len(x), self.side, self.side, -1), self.padded_side)
