"""The miniature backbones, for both editions of the embedded world.

Edition 1 produced stf_jax/weights/miniatures (its README.md has the commands and the scores): it trains the language
model on text only, then everything on captions, with an MLP connector.

In edition 2 the vision tower learns to label small cells of drawn images (models/cells.py), which teaches a small tower
more than captions do. The language model learns to look things up in captions, as text, and then in images, with the
tower frozen and an MLP connector on all 144 tokens. Stage ``answers`` ends with an evaluation.
"""

import ml_collections

from stf_jax.config import default_config, parse_arg


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Stages ``sentences`` and ``text`` on text, ``shapes`` and ``captions`` on images; ``scale`` multiplies the steps.

    ``vision=siglip-mini-16-96`` trains another tower for the existing language model, which stays frozen. ``edition=2``
    has stages ``cells``, ``cues`` and ``answers``; its tower is ``clip-mini-8-96`` by default. With another tower, only
    ``cells`` runs.
    """
    arg = parse_arg(arg, scale=1.0, edition=1, vision="")
    config = default_config()
    config.model.update(vision=arg.vision or ("clip-mini-16-96" if arg.edition == 1 else "clip-mini-8-96"))
    config.model.llm = "llama-mini" if arg.edition == 1 else "llama-mini-6"
    config.model.update(precision="float32", remat="none", scan_layers=False)
    config.model.fusion.fusion = "mlp"
    config.data.update(source="scenes", tokenizer="miniature" if arg.edition == 1 else "miniature/2")
    config.data.scenes.edition = arg.edition
    config.optimizer.update(b2=0.98, clip_norm=1.0)
    if arg.edition == 2:
        return _second_edition(config, arg.scale)
    config.data.template = "plain"
    config.data.scenes.size = 1_000_000
    config.run = ("sentences", "text", "shapes", "captions")
    config.stages = {
        # Few shapes first, in text and in images: the model learns to look up one of two in minutes.
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
    if config.model.vision != "clip-mini-16-96":
        config.run = ("shapes", "captions")
        config.stages = {stage: config.stages[stage] for stage in config.run}
        config.stages.shapes.update(init_from="miniatures", init_missing=("(vision|fusion)/.*",))
        config.rules = (("llm/.*", "freeze"), (".*", "train"))
    return config


def _second_edition(config: ml_collections.ConfigDict, scale: float) -> ml_collections.ConfigDict:
    """Trains the tower and the language model separately, then the model on images. No record is repeated."""
    frozen = (".*", "freeze")
    steps = {"cells": int(5000 * scale), "cues": int(2500 * scale), "answers": int(20_000 * scale)}
    config.run = tuple(steps)
    config.checkpoint.every_steps = 200
    config.stages = {
        "cells": {
            "steps": steps["cells"],
            "global_batch_size": 32,
            "init_missing": (".*",),
            "rules": (("(vision|cells)/.*", "train"), frozen),
            "model": {"cells": 2},
            "data": {
                "template": "plain",
                "scenes": {"task": "cells", "size": 32 * steps["cells"]},
                "max_length": 160,
            },
            "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.01},
        },
        # Many short questions teach lookup faster than few full sentences.
        "cues": {
            "steps": steps["cues"],
            "global_batch_size": 16,
            "init_missing": ("(llm|fusion|cells)/.*",),
            "rules": (("llm/.*", "train"), frozen),
            "data": {
                "scenes": {"task": "cues", "size": 60 * steps["cues"]},
                "max_length": 256,
                "images_per_row": 0,
            },
            "optimizer": {"learning_rate": 2e-3, "schedule": "constant"},
        },
        "answers": {
            "steps": steps["answers"],
            "global_batch_size": 8,
            "init_missing": ("fusion/.*",),
            "rules": (("(llm|fusion)/.*", "train"), frozen),
            "data": {
                "scenes": {"task": "mixture", "size": 20 * steps["answers"]},
                "max_length": 480,
                "images_per_row": 2,
            },
            "optimizer": {"learning_rate": 1e-3},
            "eval": {"benchmarks": ("scenes",), "batch": 64},
        },
    }
    for stage in ("cues", "answers"):
        config.stages[stage].data.packing = True
    if config.model.vision != "clip-mini-8-96":
        config.run, config.stages = ("cells",), {"cells": config.stages.cells}
    return config
