"""A study that compares the fusion of gated_pool.py with the paper's (docs/your-own-fusion.md)."""

from stf_jax.studies.miniature import miniature_study, row_lengths


def get_config(arg=None):
    config = miniature_study(arg, "A gated mean")
    config.question = "Does a gated mean lose less than MBTF and STF with a quarter of the image tokens?"
    config.baseline = "mbtf_stf"
    config.variants = tuple(
        (name, (f"model.fusion.fusion={fusion}", *row_lengths(36)))
        for name, fusion in (("mbtf_stf", "mbtf_stf"), ("gated_pool", "gated_pool:GatedPool"))
    )
    return config
