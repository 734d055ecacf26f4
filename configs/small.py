"""Stage 2 on a small data set of a hundred to ten thousand rows, with a smaller batch and more epochs.

    python -m stf_jax.main --config=configs/small.py --workdir=DIR --config.init_from=MODEL \
        --config.data.annotations=rows.json --config.data.images=DIR

MODEL is a model that already answers questions about images: a run, or an imported folder. The paper's recipes,
configs/pretrain.py and configs/finetune.py, are for half a million rows: with 300 rows, a batch of 256 gives 2 updates
per epoch, and the first of them has learning rate 0.
"""

import ml_collections

from stf_jax.config import default_config, parse_arg


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Batch 16, three epochs, 10 % warm-up: 57 updates for 300 rows, 1,875 for 10,000. Trains what stage 2 trains.

    For fewer than a hundred rows increase ``epochs``. The number of devices must divide the global batch of 16.
    """
    arg = parse_arg(arg, vision="clip-l-14-336", llm="vicuna-7b", fusion="mbtf_stf")
    config = default_config()
    config.name = "small"
    config.model.update(vision=arg.vision, llm=arg.llm)
    config.model.fusion.fusion = arg.fusion
    config.global_batch_size = 16
    config.epochs = 3.0
    config.log_every_steps = 1
    config.checkpoint.every_steps = 100
    config.rules = (("fusion/.*", "train"), ("vision/.*", "freeze"), ("llm/.*", "train"))
    config.data.update(template="v1", aspect="pad", max_length=2048, buckets=2)
    # The learning rate of the paper, with a longer warm-up and clipping, because gradients of small batches vary.
    config.optimizer.update(learning_rate=2e-5, warmup_ratio=0.1, clip_norm=1.0)
    return config
