"""Draws the maps of a look over its image.

Axis letters: S tokens, Q patches of the canvas.
"""

import numpy as np
import PIL.Image

from stf_jax.looking.look import Look

_PNG_SIDE = 480  # pixels, at least
_ACCENT = (214, 0, 110)  # of what a map shows, as in page.css
_FADED = 0.6  # of the image's contrast beneath a map
_STRONGEST = 0.5  # opacity of a map, so that letters stay legible beneath it


def to_shares(values: np.ndarray) -> np.ndarray:
    """Values in shares of their sums over the last axis."""
    return values / np.maximum(values.sum(-1, keepdims=True), 1e-30)


def patch_values(look: Look, values: np.ndarray) -> np.ndarray:
    """Spreads values of tokens [S] over the patches that they are made of, float64 [Q]; their sum stays the same.

    Values of tokens without patches, those at the ends of rows of tiles, are not among them.
    """
    return values.astype(np.float64) @ look.sources


def find_owners(look: Look) -> np.ndarray:
    """The token in which each patch has its largest share, int64 [Q]; −1 for patches that no token is made of."""
    return np.where(look.sources.max(0) > 0, look.sources.argmax(0), -1)


def draw_tokens(look: Look) -> PIL.Image.Image:
    """Draws the image, with lines between tokens, faded except for the tokens that most layers read."""
    own, layers = find_owners(look), look.reads.sum(0)
    return _draw(look, np.zeros(len(own)), (own >= 0) & (layers[own] == layers.max()))


def draw_answer(look: Look) -> PIL.Image.Image:
    """Draws what the answer depends on, all its tokens with text together, over the faded image."""
    with_text = [bool(piece.strip()) for piece in look.pieces]
    shown = with_text if any(with_text) else [True] * len(with_text)
    values = patch_values(look, to_shares(look.dependence)[shown].sum(0))
    return _draw(look, values / max(values.max(), 1e-30), np.zeros(len(values), bool))


def _draw(look: Look, values: np.ndarray, shown: np.ndarray) -> PIL.Image.Image:
    """Draws a map [Q] in 0..1 over the image, which is faded except for patches that are ``shown``."""
    rows, columns = look.grid
    side = -(-_PNG_SIDE // look.pixels.shape[0]) * look.pixels.shape[0] // rows  # of a patch

    def enlarge(x: np.ndarray) -> np.ndarray:
        return x.reshape(rows, columns, 1).repeat(side, 0).repeat(side, 1)

    size = (columns * side, rows * side)
    pixels = np.asarray(PIL.Image.fromarray(look.pixels).resize(size, PIL.Image.Resampling.NEAREST), np.float64)
    gray = 128 + _FADED * (pixels.mean(-1, keepdims=True) - 128)
    pixels = np.where(enlarge(shown), pixels, gray)
    alpha = _STRONGEST * enlarge(values)
    pixels = pixels * (1 - alpha) + np.array(_ACCENT) * alpha
    own = find_owners(look).reshape(rows, columns)
    below, right = own[1:] != own[:-1], own[:, 1:] != own[:, :-1]
    for row, column in zip(*np.nonzero(below), strict=True):
        pixels[(row + 1) * side - 1 : (row + 1) * side + 1, column * side : (column + 1) * side] = 255
    for row, column in zip(*np.nonzero(right), strict=True):
        pixels[row * side : (row + 1) * side, (column + 1) * side - 1 : (column + 1) * side + 1] = 255
    return PIL.Image.fromarray(pixels.round().astype(np.uint8))
