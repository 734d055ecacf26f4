"""Fine-tuning on hundreds to ten thousand rows of your own: stage 2, with a batch and epochs that such data fill.

    python -m stf_jax.main --config=configs/small.py --workdir=DIR --config.init_from=MODEL \
        --config.data.tokenizer=TOKENIZER --config.data.annotations=rows.json --config.data.images=DIR

MODEL is a model that answers about images already: a run, or an imported folder. The paper's own recipes
(configs/pretrain.py, configs/finetune.py) are for half a million rows: of 300 rows their batch of 256 makes two updates
an epoch, of which the first has learning rate 0.
"""

from stf_jax.config import default_config, parse_arg


def get_config(arg=None):
    """Batch 16, three epochs, 10 % warm-up: 57 updates of 300 rows, 1,875 of 10,000. Learns what stage 2 learns.

    For fewer than a hundred rows raise ``epochs``. A global batch of 16 needs a number of devices that divides it.
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
    # The paper's rate. A longer warm-up and clipping, for small batches have uneven gradients.
    config.optimizer.update(learning_rate=2e-5, warmup_ratio=0.1, clip_norm=1.0)
    return config
