"""How the fusion's layers start, and how much results vary with it."""

from stf_jax.studies.miniature import miniature, tokens


def get_config(arg=None):
    """``seeds=N``."""
    config = miniature(arg, "How the fusion starts")
    config.question = (
        "Does it matter how MBTF and STF are initialised, for the result or for its spread over seeds? The miniatures "
        "start by `kaiming`; the authors' program by `torch`."
    )
    config.baseline = "mbtf_stf"
    others = [(init, (f"model.fusion.init={init}", *tokens(36))) for init in ("torch", "xavier", "normal")]
    config.variants = (("mbtf_stf", ("model.fusion.fusion=mbtf_stf", *tokens(36))), *others)
    return config
