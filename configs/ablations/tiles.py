"""Images in tiles, and reduced to one square: what a tower of 48 pixels reads of images of 96."""

import ml_collections

from stf_jax.studies.miniature import miniature_study, row_lengths


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """``arg``: ``seeds=N``. The runs of ``resize`` are those of fusions.py, with the same ``--cells``."""
    config = miniature_study(arg, "Images in tiles")
    config.question = (
        "How small may print be if the tower reads an image of 96×96 pixels in tiles of 48×48, rather than reduced to "
        "48×48? `resize` has all 36 tokens of the reduced image (LLaVA-1.5's projector). The others read a thumbnail "
        "and four tiles, with MBTF and STF: `tiles` in windows of 2×2, 51 tokens with those that end rows, and "
        "`tiles_24` in windows of 3×3, 24 tokens. `resize` has more tokens than one of them, and fewer than the other."
    )
    config.baseline = "resize"
    tower = "model.vision=clip-mini-8-48"
    tiles = ("model.fusion.fusion=mbtf_stf", tower, "data.aspect=tiles")
    config.variants = (
        ("resize", ("model.fusion.fusion=mlp", tower, *row_lengths(36))),
        ("tiles", (*tiles, *row_lengths(51))),
        ("tiles_24", (*tiles, "model.fusion.kernel=3", *row_lengths(24))),
    )
    return config
