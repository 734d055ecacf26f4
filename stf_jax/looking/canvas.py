"""Puts what the tower reads of an image on one canvas: its square, or its thumbnail and to the right its tiles.

Axis letters: M squares, P patches of a square, Q patches of the canvas, S image tokens.
"""

import dataclasses

import numpy as np

from stf_jax.data.tiles import Grid

_GAP = 1  # columns between the thumbnail and the tiles
_EMPTY = 128  # gray of patches where there is no square


@dataclasses.dataclass(frozen=True)
class Canvas:
    """Where the patches of all squares are.

    Attributes:
      grid: rows and columns of patches of the canvas.
      places: the patch of the canvas at each patch of each square, int [M, P].
    """

    grid: tuple[int, int]
    places: np.ndarray

    def spread(self, values: np.ndarray, squares: np.ndarray) -> np.ndarray:
        """Puts values [S, …, P] of patches on the canvas, [S, …, Q], with zeros elsewhere.

        Args:
          values: each of patches of one square.
          squares: which square, int [S]; M for values that belong to none.
        """
        out = np.zeros((*values.shape[:-1], self.grid[0] * self.grid[1]), values.dtype)
        for index, square in enumerate(squares):
            if square < len(self.places):
                out[index][..., self.places[square]] = values[index]
        return out

    def draw(self, pixels: np.ndarray, patch: int) -> np.ndarray:
        """Draws squares, uint8 [M, H, W, 3], without what does not fill a patch of that many pixels a side."""
        count, height, width = pixels.shape[0], pixels.shape[1] // patch, pixels.shape[2] // patch
        whole = pixels[:, : height * patch, : width * patch].reshape(count, height, patch, width, patch, 3)
        (rows, columns), out = self.grid, np.full((self.grid[0] * self.grid[1], patch, patch, 3), _EMPTY, np.uint8)
        out[self.places] = whole.swapaxes(2, 3).reshape(count, -1, patch, patch, 3)
        return out.reshape(rows, columns, patch, patch, 3).swapaxes(1, 2).reshape(rows * patch, columns * patch, 3)


def make_canvas(square: tuple[int, int], tiles: Grid | None) -> Canvas:
    """Returns the canvas of an image.

    Args:
      square: rows and columns of patches of a square.
      tiles: those of its tiles, which come after the thumbnail; None for an image of one square.
    """
    rows, columns = square
    if tiles is None:
        return Canvas(square, np.arange(rows * columns)[None])
    high, wide = tiles
    canvas = np.arange(high * rows * (columns + _GAP + wide * columns)).reshape(high * rows, -1)
    large = canvas[:, columns + _GAP :].reshape(high, rows, wide, columns).swapaxes(1, 2)
    places = np.concatenate([canvas[:rows, :columns].reshape(1, -1), large.reshape(high * wide, -1)])
    return Canvas((canvas.shape[0], canvas.shape[1]), places)
