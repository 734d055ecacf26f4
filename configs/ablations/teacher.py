"""Students with a quarter of the image tokens, with and without a teacher that reads all of them."""

import ml_collections

from stf_jax.config import parse_arg
from stf_jax.studies.miniature import miniature_study, row_lengths


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """``arg``: ``seeds=N,teacher=FOLDER``; by default the teacher is the run of ``mlp`` with seed 0 in runs/cells.

    Run fusions.py first, with ``--cells=runs/cells``: it trains the teacher and the students without one.
    """
    values = parse_arg(arg, seeds=5, teacher="runs/cells/mlp/seed_0")
    config = miniature_study(f"seeds={values.seeds}", "A teacher with all image tokens")
    config.question = (
        "Does a student with 36 image tokens answer better if it also learns from the distribution over tokens of a "
        "frozen teacher with 144? In both stages the loss of `mbtf_stf_taught` and `avg_pool_taught` is half "
        "cross-entropy and half divergence from the teacher at temperature 2. All students have one teacher, the run "
        "of `mlp` with seed 0, so the intervals are over students."
    )
    config.baseline = "mbtf_stf"
    objective = f"distill:teacher={values.teacher}/{{}},temperature=2,weight=0.5"
    taught = tuple(f"stages.{stage}.objective={objective.format(stage)}" for stage in ("pretrain", "finetune"))
    variants = {"mlp": ("model.fusion.fusion=mlp", *row_lengths(144))}
    variants |= {name: (f"model.fusion.fusion={name}", *row_lengths(36)) for name in ("mbtf_stf", "avg_pool")}
    variants |= {f"{name}_taught": (*variants[name], *taught) for name in ("mbtf_stf", "avg_pool")}
    config.variants = tuple(variants.items())
    return config
