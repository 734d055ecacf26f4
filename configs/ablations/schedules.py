"""Schedules of image tokens inside the decoder, trained on all tokens and on STF's quarter, in miniature."""

import ml_collections

from stf_jax.studies.miniature import miniature_study, row_lengths


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """``arg``: ``seeds=N``."""
    config = miniature_study(arg, "Image tokens inside the decoder")
    config.question = (
        "What does a model lose if its decoder layers read fewer image tokens than the fusion makes, and does a "
        "fusion before the schedule save more? `mlp` makes 144 tokens of an image, `mbtf_stf` 36; the other variants "
        "add a schedule to one of them. `pyramiddrop` drops tokens in three steps. `hidrop` reads all tokens in layers "
        "1 and 2 of 0 to 5, 37% in layer 3 and 2% in layer 4, the shares of the 7B model. With `vica`, layers 0 to 2 "
        "read their keys and values. `hidrop_soft` weighs the kept tokens as in the paper's formula, with λ = 0.1."
    )
    config.baseline = "mlp"
    variants = {}
    for fusion, count in (("mlp", 144), ("mbtf_stf", 36)):
        options = (f"model.fusion.fusion={fusion}", *row_lengths(count))
        keep = [max(1, round(share * count / 576)) for share in (215, 10)]
        # HiDrop's default layers would leave a decoder of six layers only one that reads more than one token.
        hidrop = f"hidrop:enter=1,layers=3+4,keep={keep[0]}+{keep[1]},exit=5"
        schedules = {"pyramiddrop": "pyramiddrop", "hidrop": hidrop, "vica": "vica"}
        if fusion == "mlp":
            schedules["hidrop_soft"] = f"{hidrop},soft=0.1"
        variants[fusion] = options
        variants |= {f"{fusion}_{name}": (*options, f"model.schedule={value}") for name, value in schedules.items()}
    config.variants = tuple(variants.items())
    return config
