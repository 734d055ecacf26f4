"""The paper's main table in miniature, beside rivals that are trained and rivals that are not."""

from stf_jax.studies.miniature import miniature, tokens


def get_config(arg=None):
    """``seeds=N``."""
    every, quarter = tokens(36), tokens(9)
    config = miniature(arg, "Token fusion against its rivals")
    config.question = (
        "What does a quarter of the image tokens cost, and who loses least? LLaVA-1.5's projector (`mlp`) and `mbtf` "
        "keep all 36 tokens of a picture, the others 9. `fastv` and `visionzip` train nothing: they ask the "
        "projector's own runs with fewer tokens."
    )
    config.baseline = "mlp"
    lengths = dict.fromkeys(("mlp", "mbtf"), every)
    lengths |= dict.fromkeys(("mbtf_stf", "stf", "pixel_shuffle", "avg_pool"), quarter)
    lengths |= dict.fromkeys(("token_packer", "resampler", "c_abstractor", "ldp_v2"), quarter)
    config.variants = tuple((name, (f"model.fusion.fusion={name}", *length)) for name, length in lengths.items())
    config.asked = tuple((name, ("mlp", f"--reduce={name}")) for name in ("visionzip", "fastv"))
    return config
