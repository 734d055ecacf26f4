"""How many patches make a token, how many blocks are tapped, and the authors' program against their figure."""

from stf_jax.studies.miniature import miniature, tokens


def get_config(arg=None):
    """``seeds=N``."""
    config = miniature(arg, "STF's kernel and MBTF's taps")
    config.question = (
        "`mbtf_stf` merges windows of k = 2 and reads M = 8 blocks, by the authors' program. What if windows are k×k "
        "(36, 9, 4 and, with the grid padded, 4 tokens), if fewer blocks are tapped, evenly spaced, or if it computes "
        "what the paper's figure draws?"
    )
    config.baseline = "mbtf_stf"
    variants = {"mbtf_stf": ("model.fusion.fusion=mbtf_stf", *tokens(9))}
    for name, kernel, left in (("k=1", 1, 36), ("k=3", 3, 4), ("k=4", 4, 4)):
        padded = ("model.fusion.pad_grid=True",) if 6 % kernel else ()
        variants[name] = (f"model.fusion.kernel={kernel}", *padded, *tokens(left))
    for taps in ((8, 6, 4, 2), (8, 4), (8,)):
        variants[f"M={len(taps)}"] = (f"model.fusion.taps={taps}".replace(" ", ""), *tokens(9))
    variants["paper"] = ("model.fusion.variant=paper", *tokens(9))
    config.variants = tuple(variants.items())
    return config
