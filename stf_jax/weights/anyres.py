"""Tiles in configs of other programs: LLaVA-NeXT's original code and transformers, which has our exports too."""

import ast
from collections.abc import Mapping
from typing import Any

from stf_jax.config import Marks, UserError
from stf_jax.data.tiles import Tiles
from stf_jax.models.towers.base import VisionConfig

_ORIGINAL = "anyres"  # the image_aspect_ratio of LLaVA-NeXT's original code
NEWLINE = "image_newline"  # the tensor, in every program
_MARKS: Mapping[str, Marks] = {"spatial_unpad": "newline", "flat": "none"}  # by mm_patch_merge_type


def read_tiles(config: Mapping[str, Any], vision: VisionConfig | None) -> Tiles | None:
    """Returns the tiles of a checkpoint with that ``config.json``; None if it reads one square per image.

    Args:
      vision: its tower.

    Raises:
      UserError: the config has grids that are not of the tower's squares, or joins tiles in another way.
    """
    marks = _find_marks(config)
    if marks is None:
        return None
    if vision is None:
        raise UserError("The size of the tiles is the tower's, which is missing: give its folder as --vision=DIR.")
    side = vision.image_size
    sizes: Any = config.get("image_grid_pinpoints")
    try:
        sizes = ast.literal_eval(sizes) if isinstance(sizes, str) else sizes
        grids = [(int(a) // side, int(b) // side) for a, b in sizes]
        if not grids or any(
            (rows * side, columns * side) != (a, b) for (rows, columns), (a, b) in zip(grids, sizes, strict=True)
        ):
            raise ValueError
        if min(map(min, grids)) < 1:
            raise ValueError
    except (ValueError, TypeError, SyntaxError):
        raise UserError(
            f"image_grid_pinpoints={sizes!r} is not a list of sizes that squares of {side} pixels fill."
        ) from None
    if config.get("image_aspect_ratio") == _ORIGINAL:  # widths and heights there
        grids = [(rows, columns) for columns, rows in grids]
    return Tiles(tuple(grids), marks)


def _find_marks(config: Mapping[str, Any]) -> Marks | None:
    """Returns the marks of a checkpoint's tiles; None if it has no tiles."""
    merged = config.get("mm_patch_merge_type") or "flat"
    if config.get("image_aspect_ratio") == _ORIGINAL:
        if merged not in list(_MARKS):
            raise UserError(f"The config says mm_patch_merge_type {merged!r}: supported: {', '.join(_MARKS)}.")
        return _MARKS[merged]
    if merged != "flat":
        raise UserError(
            f"The config says mm_patch_merge_type {merged!r}, but not image_aspect_ratio {_ORIGINAL!r}, which it needs."
        )
    if config.get("model_type") == "llava_next":
        return "newline"
    if config.get("model_type") != "llava_stf" or not (tiles := config["stf_config"].get("tiles")):
        return None
    if not isinstance(tiles, Mapping) or tiles.get("marks") not in _MARKS.values():
        raise UserError(f"config.json does not describe an STF-JAX export: its stf_config has tiles {tiles!r}.")
    return "newline" if tiles["marks"] == "newline" else "none"


def write_grids(tiles: Tiles, vision: VisionConfig) -> list[list[int]]:
    """Returns transformers' ``image_grid_pinpoints``: the height and width of each grid in pixels."""
    return [[rows * vision.image_size, columns * vision.image_size] for rows, columns in tiles.grids]
