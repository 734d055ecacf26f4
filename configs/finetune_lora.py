"""Stage 2 on one card: LoRA of the language model, and full training of the fusion, as in LLaVA's finetune_lora.

    python -m stf_jax.main --config=configs/finetune_lora.py --workdir=DIR --config.init_from=STAGE_1_WORKDIR \
        --config.data.annotations=llava_v1_5_mix665k.json --config.data.images=DIR

Checkpoints hold the adapters and the fusion; the rest is read from init_from whenever the run is resumed or opened.
With ``:base=int8`` or ``:base=nf4``, the kernels of the language model's blocks are frozen in 8 or 4 bits, for cards of
24 GB. On several cards, lower ``optimizer.accumulation_steps``, so that a microbatch has a row for each.
"""

import ml_collections

from stf_jax.config import default_config, parse_arg


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Rank 128, alpha 256, dropout 0.05; learning rate 2e-4, of the fusion 2e-5; otherwise as configs/finetune.py."""
    arg = parse_arg(arg, vision="", llm="", fusion="mbtf_stf", base="")
    config = default_config()
    config.name = "finetune_lora"
    config.model.update(vision=arg.vision, llm=arg.llm)
    config.model.fusion.fusion = arg.fusion
    config.global_batch_size = 128
    config.epochs = 1.0
    config.rules = (
        ("fusion/.*", "train*0.1"),
        ("vision/.*", "freeze"),
        ("llm/.*", "lora:rank=128,alpha=256,dropout=0.05" + (f"@{arg.base}" if arg.base else "")),
    )
    config.data.update(template="v1", aspect="pad", max_length=2048, buckets=8, records=665_298)
    config.checkpoint.save_frozen = False
    config.optimizer.update(learning_rate=2e-4, accumulation_steps=32)
    return config
