"""Stage 2 by LoRA, compared with stage 2 of the complete language model."""

import ml_collections

from stf_jax.studies.miniature import miniature_study, row_lengths


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """``arg``: ``seeds=N``. The runs of ``mbtf_stf`` are those of fusions.py, with the same ``--cells``."""
    config = miniature_study(arg, "LoRA in the second stage")
    config.question = (
        "How much of the second stage is lost if the language model learns by LoRA? In `lora` its linear layers have "
        "adapters of rank 16, with the learning rate of `mbtf_stf`, and its other parameters are frozen; "
        "the fusion is fully trained in both."
    )
    config.baseline = "mbtf_stf"
    whole = ("model.fusion.fusion=mbtf_stf", *row_lengths(36))
    rules = (("fusion/.*", "train"), ("vision/.*", "freeze"), ("llm/.*", "lora:rank=16"))
    config.variants = (("mbtf_stf", whole), ("lora", (*whole, f"stages.finetune.rules={rules!r}")))
    return config
