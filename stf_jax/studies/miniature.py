"""Common parts of the studies in configs/ablations/: runs of configs/demo.py with several seeds."""

import ml_collections

from stf_jax.config import parse_arg
from stf_jax.studies.study import default_study

_COMMON = ("stages.finetune.eval.benchmarks=('scenes','prints')", "eval.limit=0")  # all 2,000 questions and 700 prints


def miniature_study(arg: str | None, title: str, seeds: int = 5) -> ml_collections.ConfigDict:
    """Returns a study of configs/demo.py without variants; ``arg`` is the config file's argument (``seeds=N``)."""
    values = parse_arg(arg, seeds=seeds)
    config = default_study()
    config.update(title=title, base="demo", common=_COMMON, seeds=tuple(range(values.seeds)))
    return config.unlock()


FUSED = ("mbtf_stf", "stf", "pixel_shuffle", "avg_pool", "token_packer", "resampler", "c_abstractor", "ldp_v2")


def fused_variants(kernel: int = 2) -> dict[str, tuple[str, ...]]:
    """Returns the variants of all fusions that keep one token of each ``kernel``×``kernel`` window: 36 or 16 of 144.

    Those of the default kernel are named as the fusions.
    """
    count = (12 // kernel) ** 2
    if kernel == 2:
        return {name: (f"model.fusion.fusion={name}", *row_lengths(count)) for name in FUSED}
    options = (f"model.fusion.kernel={kernel}", *row_lengths(count))
    return {f"{name}_{count}": (f"model.fusion.fusion={name}", *options) for name in FUSED}


def row_lengths(count: int) -> tuple[str, ...]:
    """Returns overrides of the row lengths for ``count`` tokens per image, which leave the same space for text.

    So all variants see the same images in the same steps: one caption per row in the first stage and two conversations
    in the second, whatever their length.
    """
    return (f"stages.pretrain.data.max_length={52 + count}", f"stages.finetune.data.max_length={432 + 2 * count}")
