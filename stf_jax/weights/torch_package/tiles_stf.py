"""Images in tiles, as in LLaVA-NeXT: a thumbnail, then a grid of tiles that depends on the image's size."""

import math

import torch
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import unpad_image


def choose_grid(size, pinpoints, side):
    """Returns the rows and columns of tiles of ``side`` pixels for an image of that height and width."""
    height, width = select_best_resolution(size, pinpoints)
    return height // side, width // side


def join_tiles(tokens, grid, size, newline):
    """Joins the tokens of a thumbnail and its tiles [S, N, D] to those of the image [T, D].

    Args:
      tokens: those of the thumbnail come first.
      grid: rows and columns of tiles.
      size: height and width of the image.
      newline: the token that ends each row [D], or None for the tokens of one tile after another.
    """
    if newline is None:
        return tokens.flatten(0, 1)
    side = math.isqrt(tokens.shape[1])
    rows = tokens[1:].unflatten(1, (side, side)).unflatten(0, grid).permute(4, 0, 2, 1, 3)
    rows = unpad_image(rows.flatten(1, 2).flatten(2, 3), size)
    ends = newline.to(rows.dtype)[:, None, None].expand(-1, rows.shape[1], 1)
    return torch.cat([tokens[0], torch.cat([rows, ends], dim=2).flatten(1).T])


def count_tokens(size, tokens, marks, pinpoints, side):
    """Returns how many tokens an image of that height and width has, if each tile has ``tokens``."""
    rows, columns = grid = choose_grid(size, pinpoints, side)
    newline = torch.zeros(1) if marks == "newline" else None
    return len(join_tiles(torch.zeros(1 + rows * columns, tokens, 1), grid, size, newline))
