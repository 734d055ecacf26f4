"""The miniature backbones: the language model on text alone, then everything on captions (a plain MLP connector).

How stf_jax/weights/miniatures was made; its README.md has the commands and the scores.
"""

from stf_jax.config import default_config, parse_arg


def get_config(arg=None):
    """Stages ``text``, ``words`` (captions of single shapes), ``captions``; ``scale`` multiplies their steps."""
    arg = parse_arg(arg, scale=1.0)
    config = default_config()
    config.model.update(vision="clip-mini-16-96", llm="llama-mini")
    config.model.update(precision="float32", remat="none", scan_layers=False)
    config.model.fusion.fusion = "mlp"
    config.data.update(source="scenes", tokenizer="miniature", template="plain")
    config.data.scenes.size = 1_000_000
    config.global_batch_size = 32
    config.optimizer.update(b2=0.98, clip_norm=1.0)
    config.run = ("text", "words", "captions")
    config.stages = {
        "text": {
            "steps": int(700 * arg.scale),
            "init_missing": (".*",),
            "rules": (("llm/.*", "train"), (".*", "freeze")),
            "data": {"scenes": {"task": "documents"}, "max_length": 112, "images_per_row": 0},
            "optimizer": {"learning_rate": 2e-3},
        },
        "words": {
            "steps": int(1500 * arg.scale),
            "data": {"scenes": {"task": "captions", "things": 1}, "max_length": 56},
            "optimizer": {"learning_rate": 1e-3, "schedule": "constant"},
        },
        "captions": {
            "steps": int(2200 * arg.scale),
            "data": {"scenes": {"task": "mixture"}, "max_length": 96},
            "optimizer": {"learning_rate": 1e-3},
        },
    }
    return config
