"""The paper's main table in miniature, beside rivals that are trained, rivals that are not, and controls."""

from stf_jax.studies.miniature import miniature, tokens


def get_config(arg=None):
    """``seeds=N``."""
    every, quarter = tokens(144), tokens(36)
    config = miniature(arg, "Token fusion against its rivals")
    config.question = (
        "What does a quarter of the image tokens cost, and who loses least? LLaVA-1.5's projector (`mlp`) and `mbtf` "
        "keep all 144 tokens of an image, the others 36. `resize` shows the tower the image at half the resolution. "
        "`fastv` and `visionzip` train nothing: they ask the projector's own runs with fewer tokens. Controls that a "
        "study must tell from the baseline are `random`, 36 patches drawn once, and `one_token`, the mean of all "
        "patches; one that it must not is `mlp_again`."
    )
    config.baseline = "mlp"
    fused = ("mbtf_stf", "stf", "pixel_shuffle", "avg_pool", "token_packer", "resampler", "c_abstractor", "ldp_v2")
    variants = {name: (f"model.fusion.fusion={name}", *every) for name in ("mlp", "mbtf")}
    variants |= {name: (f"model.fusion.fusion={name}", *quarter) for name in fused}
    variants["resize"] = ("model.fusion.fusion=mlp", "model.vision=clip-mini-8-48", *quarter)
    variants["one_token"] = ("model.fusion.fusion=avg_pool", "model.fusion.kernel=12", *tokens(1))
    config.variants = tuple(variants.items())
    config.repeated = (("mlp_again", ("mlp",)),)
    config.asked = tuple((name, ("mlp", f"--reduce={name}")) for name in ("visionzip", "fastv", "random"))
    return config
