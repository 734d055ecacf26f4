"""A model small enough to compile in seconds, as presets and as a config: ``--config=tests/tiny.py:fusion=mlp``."""

import dataclasses

import ml_collections

from stf_jax.config import TrainConfig, default_config, parse_arg, resolve
from stf_jax.models import presets

presets.VISION["clip-tiny"] = dataclasses.replace(
    presets.VISION["clip-mini-12-96"], image_size=48, width=32, layers=3, heads=4, mlp=64
)
presets.LLM["llama-tiny"] = dataclasses.replace(
    presets.LLM["llama-mini"], width=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=64
)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Stage-2 training (``rules`` as in finetune.py) on embedded scenes, six steps of eight rows, in float32."""
    arg = parse_arg(arg, fusion="mbtf_stf", steps=6)
    config = default_config()
    config.model.update(vision="clip-tiny", llm="llama-tiny", precision="float32", remat="none")
    config.model.fusion.update(fusion=arg.fusion, mbtf_hidden=32, stf_hidden=64)
    config.data.update(source="scenes", tokenizer="miniature", max_length=192)
    config.update(steps=arg.steps, global_batch_size=8, log_every_steps=1)
    config.init_missing = (".*",)
    config.rules = (("vision/.*", "freeze"), (".*", "train"))
    config.checkpoint.every_steps = 2
    return config


def tiny(**changes) -> TrainConfig:
    """The config above, resolved, with dotted keys changed: ``tiny(**{"mesh.fsdp": 4})``."""
    config = get_config()
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return resolve(config)[0]
