"""STF's window size, the number of tapped blocks, and the authors' code against the paper's figure."""

import ml_collections

from stf_jax.studies.miniature import miniature_study, row_lengths


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """``arg``: ``seeds=N``."""
    config = miniature_study(arg, "STF's kernel and MBTF's taps")
    config.question = (
        "Like the authors' code, `mbtf_stf` merges windows of k = 2 and reads M = 8 blocks. How do results change with "
        "other k×k windows (144, 36, 16 and 9 tokens), with fewer, evenly spaced taps, or with the computation in the "
        "paper's figure?"
    )
    config.baseline = "mbtf_stf"
    variants = {"mbtf_stf": ("model.fusion.fusion=mbtf_stf", *row_lengths(36))}
    for kernel in (1, 3, 4):
        variants[f"k={kernel}"] = (f"model.fusion.kernel={kernel}", *row_lengths((12 // kernel) ** 2))
    for taps in ((8, 6, 4, 2), (8, 4), (8,)):
        variants[f"M={len(taps)}"] = (f"model.fusion.taps={taps}".replace(" ", ""), *row_lengths(36))
    variants["paper"] = ("model.fusion.variant=paper", *row_lengths(36))
    config.variants = tuple(variants.items())
    config.repeated = (("mbtf_stf_again", ("mbtf_stf",)),)
    return config
