"""A student with a quarter of the image tokens, with and without a teacher that reads all of them."""

import ml_collections

from stf_jax.config import parse_arg
from stf_jax.studies.miniature import miniature_study, row_lengths


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """``arg``: ``seeds=N,teacher=FOLDER``; by default the teacher is seed 0 of ``mlp`` in runs/fusions/cells.

    First run fusions.py with ``--out=runs/fusions``, which trains the teacher and the student without one, and then
    this study with ``--cells=runs/fusions/cells``.
    """
    values = parse_arg(arg, seeds=5, teacher="runs/fusions/cells/mlp/seed_0")
    config = miniature_study(f"seeds={values.seeds}", "A teacher with all image tokens")
    config.question = (
        "Does a student with 36 image tokens answer better if it also learns from the distribution over tokens of a "
        "frozen teacher with 144? In both stages the loss of `mbtf_stf_taught` is half cross-entropy and half "
        "divergence from the teacher at temperature 2. All seeds have one teacher, the run of `mlp` with seed 0, so "
        "the intervals are over students."
    )
    config.baseline = "mbtf_stf"
    objective = f"distill:teacher={values.teacher}/{{}},temperature=2,weight=0.5"
    taught = tuple(f"stages.{stage}.objective={objective.format(stage)}" for stage in ("pretrain", "finetune"))
    student = ("model.fusion.fusion=mbtf_stf", *row_lengths(36))
    config.variants = (("mbtf_stf", student), ("mbtf_stf_taught", (*student, *taught)))
    return config
