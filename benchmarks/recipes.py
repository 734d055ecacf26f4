"""The configs that the benchmarks measure: the stages of the recipe, on rows of one image and a mean amount of text."""

import dataclasses

from stf_jax.cli import parse
from stf_jax.config import FusionConfig, TrainConfig, resolve
from stf_jax.models.spec import resolve_model

TEXT = {"pretrain": 64, "finetune": 304, "prefill": 64}  # mean text tokens per row (benchmarks/mixture.py)


def load_recipe(name: str, llm: str) -> TrainConfig:
    """Loads the config of that name in configs/ with another language model."""
    (config,) = resolve(parse([f"--config={name}:llm={llm}"], "", workdir=False)[1])
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
