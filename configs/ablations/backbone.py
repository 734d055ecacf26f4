"""The same fusions behind another tower: SigLIP's kind in place of CLIP's. On the world's first edition."""

from stf_jax.studies.miniature import miniature

# There is no such tower of the second edition.
_FIRST_EDITION = (
    "model.llm=llama-mini",
    "data.tokenizer=miniature",
    "data.scenes.edition=1",
    "data.scenes.things=2",
    "stages.finetune.eval.benchmarks=('shapes',)",
)


def get_config(arg=None):
    """``seeds=N``. ``miniatures/siglip`` is what ``configs/backbones.py:vision=siglip-mini-16-96`` makes."""
    config = miniature(arg, "Another backbone")
    config.question = (
        "Does what holds behind a CLIP-style tower hold behind a SigLIP-style one (no class token, tanh-GELU, no norm "
        "before the blocks)? It was made as the miniatures were, for the same language model."
    )
    siglip = ("model.vision=siglip-mini-16-96", "stages.pretrain.init_from=miniatures/siglip")
    config.baseline = "mlp"
    config.common = (*_FIRST_EDITION, *siglip)
    config.variants = tuple(
        (name, (f"model.fusion.fusion={name}", *_rows(count)))
        for name, count in (("mlp", 36), ("mbtf_stf", 9), ("stf", 9), ("avg_pool", 9))
    )
    return config


def _rows(count):
    """As studies/miniature.py: the same text beside images of ``count`` tokens, four captions or one conversation."""
    lengths = {"pretrain": 124 + 4 * count, "finetune": 199 + count}
    return tuple(f"stages.{stage}.data.max_length={length}" for stage, length in lengths.items())
