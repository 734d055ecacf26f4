"""Stage 2 of the paper: trains MBTF, STF and the language model on LLaVA-1.5's 665K mixture; the ViT is frozen.

    python -m stf_jax.main --config=configs/finetune.py --workdir=DIR --config.init_from=STAGE_1_WORKDIR \
        --config.data.annotations=llava_v1_5_mix665k.json --config.data.images=DIR
"""

import ml_collections

from stf_jax.config import default_config, parse_arg


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Batch 128, learning rate 2e-5, cosine with 3 % warm-up, no weight decay, one epoch, bf16, 2048 tokens."""
    arg = parse_arg(arg, vision="", llm="", fusion="mbtf_stf")
    config = default_config()
    config.name = "finetune"
    config.model.update(vision=arg.vision, llm=arg.llm)
    config.model.fusion.fusion = arg.fusion
    config.global_batch_size = 128
    config.epochs = 1.0
    config.rules = (("fusion/.*", "train"), ("vision/.*", "freeze"), ("llm/.*", "train"))
    config.data.update(template="v1", aspect="pad", max_length=2048, buckets=8, records=665_298)
    config.optimizer.learning_rate = 2e-5
    return config
