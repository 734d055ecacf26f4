"""All fusions and all untrained reducers at a half, a quarter and a ninth of the image tokens, in miniature.

The runs of configs/ablations/fusions.py are used again if ``--cells`` names their folder. The page that compares them:

    python -m stf_jax.compare OUT --resized=resize_36 --out=DIR
"""

import ml_collections

from stf_jax.studies.miniature import fused_variants, miniature_study, row_lengths

_BUDGETS = (72, 36, 16)  # of 144
_REDUCERS = {  # by the name in tables, as --reduce
    **{name: name for name in ("resize", "uniform", "pool", "visionzip", "divprune", "fastv", "dart", "pyramiddrop")},
    "random": "random:per=question",
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """``arg``: ``seeds=N``."""
    config = miniature_study(arg, "Trained fusions and untrained reducers")
    config.question = (
        "How much quality is lost at 50, 25 and 11% of the image tokens (72, 36 and 16 of 144), with fusions trained "
        "for fewer tokens and with methods that train nothing? `mlp` keeps all tokens. Names with a number are "
        "variants with so many tokens per image; fusions without one have 36. No fusion has 72: their square windows "
        "keep a quarter or a ninth. Untrained methods evaluate the runs of `mlp`; `fastv`, `dart` and `pyramiddrop` "
        "drop inside the decoder, and the number is that after the last drop, so their earlier layers read more. "
        "`resize` without a number is trained: its tower reads the image at half the resolution."
    )
    config.baseline = "mlp"
    full, quarter = row_lengths(144), row_lengths(36)
    variants = {name: (f"model.fusion.fusion={name}", *full) for name in ("mlp", "mbtf")}
    variants |= fused_variants() | fused_variants(kernel=3)
    variants["resize"] = ("model.fusion.fusion=mlp", "model.vision=clip-mini-8-48", *quarter)
    config.variants = tuple(variants.items())
    config.repeated = (("mlp_again", ("mlp",)),)
    config.asked = tuple(
        (f"{name}_{keep}", ("mlp", f"--reduce={reduce}", f"--keep={keep}"))
        for keep in _BUDGETS
        for name, reduce in _REDUCERS.items()
    )
    return config
