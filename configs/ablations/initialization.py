"""Initialization of the fusion's layers, and its effect on results and their spread."""

import ml_collections

from stf_jax.studies.miniature import miniature_study, row_lengths


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """``arg``: ``seeds=N``."""
    config = miniature_study(arg, "Initialization of the fusion")
    config.question = (
        "Does the initialization of MBTF and STF affect the result or its spread over seeds? The miniatures use "
        "`kaiming`, the authors' code `torch`."
    )
    config.baseline = "mbtf_stf"
    others = [(init, (f"model.fusion.init={init}", *row_lengths(36))) for init in ("torch", "xavier", "normal")]
    config.variants = (("mbtf_stf", ("model.fusion.fusion=mbtf_stf", *row_lengths(36))), *others)
    config.repeated = (("mbtf_stf_again", ("mbtf_stf",)),)
    return config
