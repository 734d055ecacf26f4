"""Stage 1 of the paper: trains MBTF and STF on captions of LCS-558K; everything else is frozen.

    python -m stf_jax.main --config=configs/pretrain.py --workdir=DIR --config.init_from=WEIGHTS \
        --config.data.annotations=blip_laion_cc_sbu_558k.json --config.data.images=DIR
"""

import ml_collections

from stf_jax.config import default_config, parse_arg


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Batch 256, learning rate 1e-3, cosine with 3 % warm-up, no weight decay, one epoch, bf16, 2048 tokens."""
    arg = parse_arg(arg, vision="", llm="", fusion="mbtf_stf")
    config = default_config()
    config.name = "pretrain"
    config.model.update(vision=arg.vision, llm=arg.llm)
    config.model.fusion.fusion = arg.fusion
    config.global_batch_size = 256
    config.epochs = 1.0
    config.init_missing = ("fusion/.*",)
    config.rules = (("fusion/.*", "train"), ("vision/.*", "freeze"), ("llm/.*", "freeze"))
    config.data.update(template="plain", aspect="square", max_length=2048, buckets=8, records=558_128)
    config.optimizer.learning_rate = 1e-3
    return config
