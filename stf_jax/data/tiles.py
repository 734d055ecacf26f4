"""Images as a thumbnail and a grid of tiles, each of the tower's size: LLaVA-NeXT's any-resolution scheme.

The geometry follows from an image's size alone: which grid its tiles have, how its pixels are scaled and padded, and
which image tokens the language model reads in which order. Sizes are (width, height) in pixels, as in Pillow; a grid is
(rows, columns) of tiles. Places count squares that the tower reads.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
import PIL.Image

from stf_jax.config import DataConfig, Marks, UserError
from stf_jax.data.image import to_rgb, to_square
from stf_jax.models.fusions.base import find_fusion
from stf_jax.models.reducers.base import DecoderReducer
from stf_jax.models.spec import ModelSpec
from stf_jax.models.towers.base import VisionConfig

Size = tuple[int, int]
Grid = tuple[int, int]
NEWLINE = -2  # stands for the newline token among an image's slots, until the row is known that it belongs to


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Which grids of tiles images may have, and what marks the ends of their rows."""

    grids: tuple[Grid, ...]  # of two grids that fit an image equally well, the first is chosen
    marks: Marks

    @property
    def places(self) -> int:
        """The most places of an image: its thumbnail and its tiles."""
        return 1 + max(rows * columns for rows, columns in self.grids)


def find_tiles(data: DataConfig) -> Tiles | None:
    """Returns the tiles of a config, with all grids of 2 to ``data.tiles.most`` tiles; None for another aspect."""
    if data.aspect != "tiles":
        return None
    sides = range(1, data.tiles.most + 1)
    grids = ((rows, columns) for rows in sides for columns in sides if 2 <= rows * columns <= data.tiles.most)
    return Tiles(tuple(sorted(grids, key=math.prod)), data.tiles.marks)


def with_newline(model: ModelSpec, tiles: Tiles | None) -> ModelSpec:
    """Returns the model with the newline token that the tiles need, or without one."""
    return dataclasses.replace(model, newline=tiles is not None and tiles.marks == "newline")


def check_tiles(tiles: Tiles | None, model: ModelSpec) -> None:
    """Raises UserError if the model cannot read the tiles."""
    if tiles is None:
        return
    if model.schedule or isinstance(model.reduction.reducer, DecoderReducer):
        name = f"model.schedule={model.schedule}" if model.schedule else f"reduce={model.reduce}"
        raise UserError(
            f"{name} drops the same number of tokens of every image in the decoder, but images in tiles "
            "(data.aspect=tiles) have different numbers: choose a method that does not act in the decoder."
        )
    if len(model.fusion.budgets) > 1:
        raise UserError("model.fusion.budgets are for square images: choose another data.aspect than tiles.")
    if model.cells:
        raise UserError("model.cells has labels of square images: choose another data.aspect than tiles.")
    if tiles.marks == "none":
        return
    if not find_fusion(model.fusion).spec.orders:
        made = f"the tokens of model.fusion.fusion={model.fusion.fusion} are none"
    elif model.reduce:
        made = f"reduce={model.reduce} leaves none"
    else:
        return
    raise UserError(f"data.tiles.marks=newline needs tokens that form a grid, but {made}: use data.tiles.marks=none.")


@functools.lru_cache(2**14)  # most images of a data set have one of few sizes
def choose_grid(size: Size, grids: tuple[Grid, ...], side: int) -> Grid:
    """Returns the grid that keeps most of an image's pixels and, of several, wastes the fewest.

    Args:
      size: of the image.
      grids: the grids to choose from.
      side: of a tile in pixels.
    """
    width, height = size

    def rate(grid: Grid) -> tuple[int, int]:
        rows, columns = grid
        scale = min(columns * side / width, rows * side / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - rows * columns * side**2

    return max(grids, key=rate)


def fit_size(size: Size, grid: Grid, side: int) -> Size:
    """Returns the size of an image that is scaled to fill its grid in one direction."""
    (width, height), (rows, columns) = size, grid
    wide, high = columns * side, rows * side
    if wide / width < high / height:
        return wide, min(math.ceil(height * (wide / width)), high)
    return min(math.ceil(width * (high / height)), wide), high


def cut_tiles(image: PIL.Image.Image, grid: Grid, side: int) -> np.ndarray:
    """Returns an image's thumbnail and its tiles, row by row, uint8 [1 + rows·columns, side, side, 3].

    The thumbnail is the complete image, stretched to a square. The tiles are cut from the image, centered on black.
    """
    image, (rows, columns) = to_rgb(image), grid
    thumbnail = image.resize((side, side), PIL.Image.Resampling.BICUBIC)
    scaled = image.resize(fit_size(image.size, grid, side), PIL.Image.Resampling.BICUBIC)
    canvas = PIL.Image.new("RGB", (columns * side, rows * side))
    canvas.paste(scaled, ((canvas.width - scaled.width) // 2, (canvas.height - scaled.height) // 2))
    tiles = np.asarray(canvas).reshape(rows, side, columns, side, 3).swapaxes(1, 2)
    return np.concatenate([np.asarray(thumbnail)[None], tiles.reshape(-1, side, side, 3)])


@functools.lru_cache(2**10)
def order_tokens(size: Size, grid: Grid, tokens: int, marks: Marks) -> np.ndarray:
    """Returns which image tokens the language model reads of an image, in order, int32.

    The thumbnail's come first. With ``newline`` the tiles' tokens are read as the rows of one large grid, without the
    rows or columns that only padding has made, and :data:`NEWLINE` ends each row. With ``none`` the tokens of the tiles
    follow each other.

    Args:
      size: of the image.
      grid: of its tiles.
      tokens: of the thumbnail and of each tile; a square number if there are marks.
      marks: as ``data.tiles.marks``.
    """
    rows, columns = grid
    if marks == "none":
        return np.arange((1 + rows * columns) * tokens, dtype=np.int32)
    side = math.isqrt(tokens)
    tiles = np.arange(tokens, (1 + rows * columns) * tokens, dtype=np.int32).reshape(rows, columns, side, side)
    large = tiles.swapaxes(1, 2).reshape(rows * side, columns * side)
    above, left = _find_padding(size, *large.shape)
    kept = large[above : len(large) - above, left : large.shape[1] - left]
    marked = np.pad(kept, ((0, 0), (0, 1)), constant_values=NEWLINE)
    return np.concatenate([np.arange(tokens, dtype=np.int32), marked.ravel()])


def _find_padding(size: Size, rows: int, columns: int) -> tuple[int, int]:
    """Returns how many rows of tokens are only padding, above and below each, and columns, left and right each."""
    width, height = size
    if width / height > columns / rows:
        return (rows - int(round(height * (columns / width), 7))) // 2, 0
    return 0, (columns - int(round(width * (rows / height), 7))) // 2


@dataclasses.dataclass(frozen=True)
class ImageLayout:
    """What the tower reads of an image, and which of the tokens the language model reads: for any ``data.aspect``."""

    vision: VisionConfig
    aspect: str  # as config.data.aspect
    tokens: int  # N, of each place
    tiles: Tiles | None = None  # with the aspect ``tiles``

    def squares(self, image: PIL.Image.Image) -> np.ndarray:
        """Returns what the tower reads of an image, one square per place, uint8 [M, H, W, 3]."""
        if self.tiles is None:
            return to_square(image, self.vision, self.aspect)[None]
        side = self.vision.image_size
        return cut_tiles(image, choose_grid(image.size, self.tiles.grids, side), side)

    def count_places(self, sizes: Sequence[Size]) -> int:
        """Returns how many places images of these sizes take."""
        return sum(1 + math.prod(self._grid(size)) for size in sizes)

    def slots(self, sizes: Sequence[Size]) -> list[np.ndarray]:
        """Returns the slots of images of these sizes, one int32 array per image.

        A slot is an index into the tokens of the images' places, one place after another, or :data:`NEWLINE`.
        """
        slots: list[np.ndarray] = []
        first = 0
        for size in sizes:
            grid = self._grid(size)
            own = np.arange(self.tokens, dtype=np.int32)
            if self.tiles is not None:
                own = order_tokens(size, grid, self.tokens, self.tiles.marks)
            slots.append(np.where(own == NEWLINE, NEWLINE, own + first).astype(np.int32))
            first += (1 + math.prod(grid)) * self.tokens
        return slots

    def _grid(self, size: Size) -> Grid:
        """The grid of an image's tiles; empty without tiles."""
        return (0, 0) if self.tiles is None else choose_grid(size, self.tiles.grids, self.vision.image_size)


def place_slots(slots: np.ndarray, first: int, newline: int) -> np.ndarray:
    """Returns a conversation's slots as indices into its row's image tokens; −1, for text, stays.

    Args:
      slots: as of :meth:`ImageLayout.slots`, −1 for text.
      first: the index of the conversation's first image token.
      newline: the index of the newline token, behind the image tokens.
    """
    return np.where(slots == NEWLINE, newline, np.where(slots < 0, slots, slots + first)).astype(np.int32)
