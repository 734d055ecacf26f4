"""The paper's main table in miniature, with trained and training-free baselines and controls."""

import ml_collections

from stf_jax.studies.miniature import fused_variants, miniature_study, row_lengths


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """``arg``: ``seeds=N``."""
    full, quarter = row_lengths(144), row_lengths(36)
    config = miniature_study(arg, "Token fusion and its baselines")
    config.question = (
        "How much quality is lost with a quarter of the image tokens, and which method loses least? LLaVA-1.5's "
        "projector (`mlp`) and `mbtf` keep all 144 tokens of an image, the others 36. `resize` gives the tower the "
        "image at half the resolution. `fastv` and `visionzip` train nothing: they evaluate the projector's runs with "
        "fewer tokens. Two controls must differ from the baseline: `random`, 36 patches drawn once, and `one_token`, "
        "the mean of all patches. One control must not differ: `mlp_again`."
    )
    config.baseline = "mlp"
    variants = {name: (f"model.fusion.fusion={name}", *full) for name in ("mlp", "mbtf")}
    variants |= fused_variants()
    variants["resize"] = ("model.fusion.fusion=mlp", "model.vision=clip-mini-8-48", *quarter)
    variants["one_token"] = ("model.fusion.fusion=avg_pool", "model.fusion.kernel=12", *row_lengths(1))
    config.variants = tuple(variants.items())
    config.repeated = (("mlp_again", ("mlp",)),)
    config.asked = tuple((name, ("mlp", f"--reduce={name}")) for name in ("visionzip", "fastv", "random"))
    return config
