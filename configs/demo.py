"""The complete method in miniature, in minutes on two cores: both stages, an evaluation and a contact sheet.

It uses the embedded miniature backbones (stf_jax/weights/miniatures) and embedded scenes. ``stage=pretrain`` or
``stage=finetune`` runs one stage, ``steps=N`` sets its steps, ``fusion=NAME`` selects another fusion. ``chooser=true``
adds a stage, ``choose``, that trains the head for ``--tokens=auto`` of a model with several budgets (docs/budgets.md).
"""

import ml_collections

from stf_jax.config import default_config, parse_arg, single_stage


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The recipe of configs/pretrain.py and configs/finetune.py on the miniatures."""
    arg = parse_arg(arg, stage="", steps=0, fusion="mbtf_stf", chooser=False)
    config = default_config()
    config.model.update(vision="clip-mini-8-96", llm="llama-mini-6")
    # CPUs compute in float32 and have enough memory not to recompute.
    config.model.update(precision="float32", remat="none", scan_layers=False)
    # Hidden sizes for a language model of width 128: smaller ones need fewer images.
    config.model.fusion.update(fusion=arg.fusion, mbtf_hidden=256, stf_hidden=1024)
    config.data.update(source="scenes", tokenizer="miniature/2", packing=True)
    config.data.scenes.size = 12_000
    # A short run needs another initialization than PyTorch's and a shorter memory of AdamW.
    config.model.fusion.init = "kaiming"
    config.optimizer.update(b2=0.98, clip_norm=1.0)
    config.checkpoint.every_steps = 200
    config.log_every_steps = 50
    config.eval.limit = 1000
    config.faults.spike = 0.0  # the loss of small batches varies
    config.run = ("pretrain", "finetune")
    config.stages = {
        "pretrain": {
            "steps": arg.steps or 1000,
            "global_batch_size": 8,
            "init_from": "miniatures/2",
            "init_missing": ("fusion/.*",),
            "objective": "",  # a study may set one for a stage
            "rules": (("fusion/.*", "train"), ("vision/.*", "freeze"), ("llm/.*", "freeze")),
            "data": {"template": "plain", "scenes": {"task": "captions"}, "max_length": 88, "images_per_row": 1},
            "optimizer": {"learning_rate": 1.5e-3},
        },
        "finetune": {
            "steps": arg.steps or 300,
            "global_batch_size": 8,
            "objective": "",
            "rules": (("fusion/.*", "train"), ("vision/.*", "freeze"), ("llm/.*", "train")),
            # Two conversations per row.
            "data": {
                "template": "v1",
                "scenes": {"task": "conversations"},
                "max_length": 400,
                "images_per_row": 2,
            },
            "optimizer": {"learning_rate": 1e-3},
            "eval": {"benchmarks": ("scenes",), "batch": 64},
        },
    }
    if arg.chooser:
        config.run = (*config.run, "choose")
        config.stages.choose = {
            **config.stages.finetune.copy_and_resolve_references(),
            "init_missing": ("chooser/.*",),
            "rules": (("chooser/.*", "train"), (".*", "freeze")),
            "model": {"chooser": True},
            "eval": {"benchmarks": ()},
        }
    return single_stage(config, arg.stage) if arg.stage else config
