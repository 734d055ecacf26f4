"""The miniature backbones: the language model on text alone, then everything on captions (a plain MLP connector).

How stf_jax/weights/miniatures was made; its README.md has the commands and the scores.
"""

from stf_jax.config import default_config, parse_arg


def get_config(arg=None):
    """Stages ``sentences``, ``text`` of text, ``shapes``, ``captions`` of pictures; ``scale`` multiplies the steps.

    ``vision=siglip-mini-16-96`` makes another tower for the language model that is there already, which stays as it is.
    """
    arg = parse_arg(arg, scale=1.0, vision="clip-mini-16-96")
    config = default_config()
    config.model.update(vision=arg.vision, llm="llama-mini")
    config.model.update(precision="float32", remat="none", scan_layers=False)
    config.model.fusion.fusion = "mlp"
    config.data.update(source="scenes", tokenizer="miniature", template="plain")
    config.data.scenes.update(edition=1, size=1_000_000)
    config.optimizer.update(b2=0.98, clip_norm=1.0)
    config.run = ("sentences", "text", "shapes", "captions")
    config.stages = {
        # Few shapes first, of text as of pictures: looking one of two up is learned there in minutes.
        "sentences": {
            "steps": int(1000 * arg.scale),
            "global_batch_size": 16,
            "init_missing": (".*",),
            "rules": (("llm/.*", "train"), (".*", "freeze")),
            "data": {"scenes": {"task": "documents", "things": 2}, "max_length": 240, "images_per_row": 0},
            "optimizer": {"learning_rate": 2e-3, "schedule": "constant"},
        },
        "text": {
            "steps": int(3000 * arg.scale),
            "global_batch_size": 16,
            "rules": (("llm/.*", "train"), (".*", "freeze")),
            "data": {"scenes": {"task": "documents"}, "max_length": 256, "images_per_row": 0},
            "optimizer": {"learning_rate": 2e-3},
        },
        "shapes": {
            "steps": int(1600 * arg.scale),
            "global_batch_size": 8,
            "data": {"scenes": {"task": "mixture", "things": 1}, "max_length": 208, "images_per_row": 3},
            "optimizer": {"learning_rate": 1e-3, "schedule": "constant"},
        },
        "captions": {
            "steps": int(3200 * arg.scale),
            "global_batch_size": 8,
            "data": {"scenes": {"task": "mixture"}, "max_length": 284, "images_per_row": 4},
            "optimizer": {"learning_rate": 1e-3},
        },
    }
    for stage in ("shapes", "captions"):
        config.stages[stage].data.packing = True
    if arg.vision != "clip-mini-16-96":
        config.run = ("shapes", "captions")
        config.stages = {stage: config.stages[stage] for stage in config.run}
        config.stages.shapes.update(init_from="miniatures", init_missing=("(vision|fusion)/.*",))
        config.rules = (("llm/.*", "freeze"), (".*", "train"))
    return config
