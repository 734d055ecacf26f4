"""Loads a saved model for inference: the newest checkpoint of a run, a folder of imported weights, or an export."""

import dataclasses
from typing import Literal

from etils import epath
from jax.sharding import Mesh

from stf_jax.config import Precision, UserError, replace
from stf_jax.data.conversation import detect_template
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.inference.generator import Generator
from stf_jax.weights.exports import require_complete
from stf_jax.weights.model import SavedModel, open_model


def load_generator(
    checkpoint: epath.Path,
    mesh: Mesh,
    precision: Precision | Literal[""] = "",
    reduce: str = "",
    keep: int = 0,
    tokens: int = 0,
    *,
    allow_text_only: bool = False,
) -> tuple[Generator, SavedModel]:
    """Loads the model in a folder onto a mesh; returns it with its description.

    Args:
      precision: as ``config.model.precision``; empty: the run's own, bfloat16 for other folders.
      reduce, keep, tokens: as ``config.model.reduce``, ``keep`` and ``tokens``.
      allow_text_only: whether to accept a language model without a vision tower; its chat template is detected from the
        control tokens of its tokenizer.

    Raises:
      UserError: the folder holds no model, the model lacks a part or its tokenizer, or it cannot be reduced as
        requested.
    """
    saved = open_model(checkpoint)
    description = saved.description
    lacks_vision = description.vision is None or description.fusion is None
    without_vision = allow_text_only and description.llm is not None and lacks_vision
    if not without_vision:
        require_complete(saved, checkpoint)
    elif saved.tokenizer is None:
        raise UserError(f"{checkpoint} has no tokenizer: copy a tokenizer folder to {checkpoint / 'tokenizer'}.")
    tokenizer, template = load_tokenizer(str(saved.tokenizer)), description.template
    precision = precision or saved.config.precision
    chosen = {"reduce": reduce, "keep": keep, "tokens": tokens}
    config = replace(saved.config, "model.", precision=precision, remat="none", **chosen)
    if without_vision:
        config, template = dataclasses.replace(config, vision_shape=None), detect_template(tokenizer)
    generator = Generator(config, tokenizer, mesh, template, description.aspect, description.tiles)
    return generator.load_params(saved.restore(generator.plan.shardings(mesh))), saved
