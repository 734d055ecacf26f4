"""The same fusions behind another tower: SigLIP's kind in place of CLIP's."""

from stf_jax.studies.miniature import miniature, tokens


def get_config(arg=None):
    """``seeds=N``. ``miniatures/siglip`` is what ``configs/backbones.py:vision=siglip-mini-16-96`` makes."""
    every, quarter = tokens(36), tokens(9)
    config = miniature(arg, "Another backbone")
    config.question = (
        "Does what holds behind a CLIP-style tower hold behind a SigLIP-style one (no class token, tanh-GELU, no norm "
        "before the blocks)? It was made as the miniatures were, for the same language model."
    )
    siglip = ("model.vision=siglip-mini-16-96", "stages.pretrain.init_from=miniatures/siglip")
    config.baseline = "mlp"
    lengths = {"mlp": every} | dict.fromkeys(("mbtf_stf", "stf", "avg_pool"), quarter)
    config.variants = tuple((name, (f"model.fusion.fusion={name}", *siglip, *n)) for name, n in lengths.items())
    return config
