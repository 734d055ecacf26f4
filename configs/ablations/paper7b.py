"""The table of configs/ablations/reducers.py at full size: LLaVA-1.5 7B, the paper's fusions, and untrained reducers.

For whoever has the weights, the data and a machine (docs/comparing.md). Each run uses all its devices: ``--jobs=1``.
"""

import ml_collections

from stf_jax.config import parse_arg
from stf_jax.studies.study import default_study

_BUDGETS = (192, 144, 128, 64)  # of 576: UniPruneBench's, and STF's own
# Drops in the decoder keep so many tokens on average over its layers, as published tables count them. PyramidDrop's own
# drops cannot keep so few, so it drops earlier here.
_REDUCERS = {  # by the name in tables, as --reduce
    **{name: name for name in ("resize", "uniform", "pool", "visionzip", "divprune")},
    "random": "random:per=question",
    **{name: f"{name}:count=average" for name in ("fastv", "dart")},
    "pyramiddrop": "pyramiddrop:after=2+8+16,count=average",
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """``arg``: ``seeds=N`` (1), ``llm=NAME``."""
    arg = parse_arg(arg, seeds=1, llm="")
    config = default_study().unlock()
    config.update(title="Trained fusions and untrained reducers, 7B", baseline="mlp", seeds=tuple(range(arg.seeds)))
    config.question = (
        "Which way of spending 192, 144, 128 or 64 of 576 image tokens loses least on LLaVA-1.5? `mlp` keeps all "
        "tokens. Fusions without a number are trained with 144, those with one with 64; square windows give neither "
        "192 nor 128. The others train nothing: they evaluate the run of `mlp`. In `fastv`, `dart` and `pyramiddrop` "
        "the number is the average over the decoder's layers."
    )
    config.base = f"paper:llm={arg.llm}" if arg.llm else "paper"
    fused = {name: (f"model.fusion.fusion={name}",) for name in ("mbtf_stf", "stf", "avg_pool")}
    variants = {name: (f"model.fusion.fusion={name}",) for name in ("mlp", "mbtf")} | fused
    variants |= {f"{name}_64": (*options, "model.fusion.kernel=3") for name, options in fused.items()}
    config.variants = tuple(variants.items())
    config.asked = tuple(
        (f"{name}_{keep}", ("mlp", f"--reduce={reduce}", f"--keep={keep}"))
        for keep in _BUDGETS
        for name, reduce in _REDUCERS.items()
    )
    return config
