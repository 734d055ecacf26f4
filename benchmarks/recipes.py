"""The configs that the benchmarks measure: the stages of the recipe, on rows of one image and a mean amount of text."""

import dataclasses

from stf_jax.config import DataConfig, FusionConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig, resolve
from stf_jax.models.spec import resolve_model

LEARNING_RATE = 1e-3  # constant, in make_stage
LLM_RULE = {"pretrain": "freeze", "finetune": "train"}  # by stage
TEXT = {"pretrain": 64, "finetune": 304, "prefill": 64}  # mean text tokens per row (benchmarks/mixture.py)


def load_recipe(name: str, llm: str) -> TrainConfig:
    """Loads the config of that name in configs/ with another language model, rematerialized in full."""
    from stf_jax.cli import parse  # needs ml_collections, which device_check runs without

    # With auto, each model would get the setting that it has memory for.
    options = [f"--config={name}:llm={llm}", "--config.model.remat=full"]
    (config,) = resolve(parse(options, "", workdir=False)[1])
    return config


def make_task(task: str, fusion: str, recipe: str = "vicuna-7b", vision: str = "", llm: str = "") -> TrainConfig:
    """The config of a task of :data:`TEXT` with a fusion; prefill is that of the second stage.

    ``recipe`` is the language model of the recipe; ``vision`` and ``llm`` replace its backbones.
    """
    config = load_recipe("finetune" if task == "prefill" else task, recipe)
    vision, llm = vision or config.model.vision, llm or config.model.llm
    model = dataclasses.replace(config.model, vision=vision, llm=llm, fusion=FusionConfig(fusion))
    data = dataclasses.replace(config.data, max_length=resolve_model(model).slots + TEXT[task], images_per_row=1)
    return dataclasses.replace(config, model=model, data=data)


def make_stage(model: ModelConfig, stage: str, rows: int, text: int) -> TrainConfig:
    """The config of a stage on one device, with rows of one image and ``text`` tokens, at a constant learning rate."""
    return TrainConfig(
        global_batch_size=rows,
        rules=(("fusion/.*", "train"), ("vision/.*", "freeze"), ("llm/.*", LLM_RULE[stage])),
        model=model,
        data=DataConfig(max_length=resolve_model(model).slots + text),
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, schedule="constant", warmup_ratio=0.0),
        mesh=MeshConfig(1, 1, 1),
    )
