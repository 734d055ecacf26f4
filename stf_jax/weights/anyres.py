"""Tiles in configs of other programs: LLaVA-NeXT's original code and transformers, which has our exports too."""

import ast
from collections.abc import Mapping
from typing import Any

from stf_jax.config import UserError
from stf_jax.data.tiles import Tiles
from stf_jax.models.towers.base import VisionConfig

NEWLINE = "image_newline"  # the tensor, in every program
_MARKS = {"spatial_unpad": "newline", "flat": "none"}  # by mm_patch_merge_type


def read_tiles(config: Mapping[str, Any], vision: VisionConfig | None) -> Tiles | None:
    """Returns the tiles of a checkpoint with that ``config.json``; None if it reads one square per image.

    Args:
      vision: its tower.

    Raises:
      UserError: the config has grids that are not of the tower's squares, or joins tiles in another way.
    """
    kind, original = config.get("model_type"), config.get("image_aspect_ratio") == "anyres"
    merged = config.get("mm_patch_merge_type", "flat")
    marks = "newline"
    if kind == "llava_stf":  # our export
        try:
            marks = config["stf_config"].get("tiles", {"marks": ""})["marks"]
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"config.json does not describe an STF-JAX export: {error!r}.") from None
    if original:
        if merged not in _MARKS:
            raise UserError(f"The config says mm_patch_merge_type {merged!r}: supported: {', '.join(_MARKS)}.")
        marks = _MARKS[merged]
    elif kind != "llava_next" and not (kind == "llava_stf" and marks):
        if merged != "flat":
            raise UserError(
                f"The config says mm_patch_merge_type {merged!r}, but not image_aspect_ratio 'anyres', which it needs."
            )
        return None
    if vision is None:
        raise UserError("The config has tiles of the tower's size: give the tower's folder as --vision=DIR.")
    sizes = config.get("image_grid_pinpoints") or []
    try:
        sizes = ast.literal_eval(sizes) if isinstance(sizes, str) else sizes
        grids = [(int(a) // vision.image_size, int(b) // vision.image_size) for a, b in sizes]
        exact = [[rows * vision.image_size, columns * vision.image_size] for rows, columns in grids]
        if not grids or exact != [list(size) for size in sizes] or marks not in _MARKS.values():
            raise ValueError
    except (ValueError, TypeError, SyntaxError):
        raise UserError(
            f"image_grid_pinpoints={sizes!r} is not a list of sizes that squares of {vision.image_size} pixels fill."
        ) from None
    if original:  # widths and heights there
        grids = [(rows, columns) for columns, rows in grids]
    return Tiles(tuple(grids), marks)


def write_grids(tiles: Tiles, vision: VisionConfig) -> list[list[int]]:
    """Returns transformers' ``image_grid_pinpoints``: the height and width of each grid in pixels."""
    return [[rows * vision.image_size, columns * vision.image_size] for rows, columns in tiles.grids]
