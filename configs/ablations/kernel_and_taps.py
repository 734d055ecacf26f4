"""How many patches make a token, how many blocks are tapped, and the authors' program against their figure."""

from stf_jax.studies.miniature import miniature, tokens


def get_config(arg=None):
    """``seeds=N``."""
    config = miniature(arg, "STF's kernel and MBTF's taps")
    config.question = (
        "`mbtf_stf` merges windows of k = 2 and reads M = 8 blocks, by the authors' program. What if windows are k×k "
        "(144, 36, 16 and 9 tokens), if fewer blocks are tapped, evenly spaced, or if it computes what the paper's "
        "figure draws?"
    )
    config.baseline = "mbtf_stf"
    variants = {"mbtf_stf": ("model.fusion.fusion=mbtf_stf", *tokens(36))}
    for kernel in (1, 3, 4):
        variants[f"k={kernel}"] = (f"model.fusion.kernel={kernel}", *tokens((12 // kernel) ** 2))
    for taps in ((8, 6, 4, 2), (8, 4), (8,)):
        variants[f"M={len(taps)}"] = (f"model.fusion.taps={taps}".replace(" ", ""), *tokens(36))
    variants["paper"] = ("model.fusion.variant=paper", *tokens(36))
    config.variants = tuple(variants.items())
    config.repeated = (("mbtf_stf_again", ("mbtf_stf",)),)
    return config
