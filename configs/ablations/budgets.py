"""One model for every number of image tokens: M3, nested STF and MQT beside models of one number, in miniature."""

import ml_collections

from stf_jax.studies.miniature import miniature_study, row_lengths

BUDGETS = (36, 9, 4, 1)
_METHODS = {"m3": "mlp", "stf": "mbtf_stf", "mqt": "mqt"}  # by the name in tables


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """``arg``: ``seeds=N``."""
    config = miniature_study(arg, "One model for every number of image tokens")
    config.question = (
        "What does a model lose at each number of tokens that also answers with the others? Names with `alone` and a "
        "number are models trained for that number only; the others are trained for 36, 9, 4 and 1, and are asked with "
        "each. `m3` averages the tokens of LLaVA-1.5's projector, `stf` is nested MBTF and STF, and `mqt` reads the "
        "first queries. `drawn` trains with one number per step instead of the mean over all."
    )
    config.baseline = "stf"
    variants: dict[str, tuple[str, ...]] = {}
    for name, fusion in _METHODS.items():
        shared = (f"model.fusion.fusion={fusion}", f"model.fusion.budgets={BUDGETS}", *row_lengths(BUDGETS[0]))
        variants |= {name: shared, f"{name}_drawn": (*shared, "budgets_per_step=one")}
        for budget in BUDGETS:
            alone = (f"model.fusion.fusion={fusion}", f"model.fusion.budgets=({budget},)", *row_lengths(budget))
            variants[f"{name}_alone_{budget}"] = alone
    config.variants = tuple(variants.items())
    config.asked = tuple(
        (f"{name}_{budget}", (name, f"--tokens={budget}"))
        for name in variants
        if "alone" not in name
        for budget in BUDGETS[1:]
    )
    return config
