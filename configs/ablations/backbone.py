"""The same fusions with a SigLIP-style vision tower in place of CLIP's, on the world's first edition."""

import ml_collections

from stf_jax.studies.miniature import miniature_study

# There is no SigLIP-style tower for the second edition.
_FIRST_EDITION = (
    "model.llm=llama-mini",
    "data.tokenizer=miniature",
    "data.scenes.edition=1",
    "data.scenes.things=2",
    "stages.finetune.eval.benchmarks=('shapes',)",
)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """``arg``: ``seeds=N``. ``configs/backbones.py:vision=siglip-mini-16-96`` trains ``miniatures/siglip``."""
    config = miniature_study(arg, "Another backbone")
    config.question = (
        "Do the results with a CLIP-style tower also hold with a SigLIP-style one (no class token, tanh-GELU, no norm "
        "before the blocks)? It was trained like the other miniatures, with the same language model."
    )
    siglip = ("model.vision=siglip-mini-16-96", "stages.pretrain.init_from=miniatures/siglip")
    config.baseline = "mlp"
    config.common = (*_FIRST_EDITION, *siglip)
    config.variants = tuple(
        (name, (f"model.fusion.fusion={name}", *_row_lengths(count)))
        for name, count in (("mlp", 36), ("mbtf_stf", 9), ("stf", 9), ("avg_pool", 9))
    )
    return config


def _row_lengths(count: int) -> tuple[str, ...]:
    """Like studies/miniature.py's, for rows of four captions or one conversation with ``count`` tokens per image."""
    lengths = {"pretrain": 124 + 4 * count, "finetune": 199 + count}
    return tuple(f"stages.{stage}.data.max_length={length}" for stage, length in lengths.items())
