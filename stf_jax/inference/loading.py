"""Loads a saved model for inference: the newest checkpoint of a run, a folder of imported weights, or an export."""

import dataclasses
from typing import Literal

from etils import epath
from jax.sharding import Mesh

from stf_jax.config import Precision, UserError, replace
from stf_jax.data.conversation import detect_template
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.inference.choosing import AUTO, ChoosingGenerator
from stf_jax.inference.generator import Generator
from stf_jax.weights.exports import require_complete
from stf_jax.weights.model import SavedModel, open_model


def load_generator(
    checkpoint: epath.Path,
    mesh: Mesh,
    precision: Precision | Literal[""] = "",
    reduce: str = "",
    keep: int = 0,
    tokens: int | Literal["auto"] = 0,
    tolerance: float | None = None,
    *,
    allow_text_only: bool = False,
) -> tuple[Generator, SavedModel]:
    """Loads the model in a folder onto a mesh; returns it with its description.

    Args:
      precision: as ``config.model.precision``; empty: the run's own, bfloat16 for other folders.
      reduce, keep, tokens: as ``config.model.reduce``, ``keep`` and ``tokens``; ``auto`` chooses tokens per image.
      tolerance: how far answers may be from those with the most tokens, in nats per answer token, if tokens are chosen.
      allow_text_only: whether to accept a language model without a vision tower; its chat template is detected from the
        control tokens of its tokenizer.

    Raises:
      UserError: the folder holds no model, the model lacks a part or its tokenizer, or it cannot be reduced as
        requested.
    """
    _check_choice(tokens, tolerance, reduce)
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
    chosen = {"reduce": reduce, "keep": keep, "tokens": 0 if tokens == AUTO else tokens}
    config = replace(saved.config, "model.", precision=precision, remat="none", **chosen)
    if without_vision:
        config, template = dataclasses.replace(config, vision_shape=None), detect_template(tokenizer)
    if tolerance is None:
        generator = Generator(config, tokenizer, mesh, template, description.aspect, description.tiles)
    else:
        generator = ChoosingGenerator(config, tokenizer, mesh, template, description.aspect, tolerance)
    return generator.load_params(saved.restore(generator.plan.shardings(mesh))), saved


def _check_choice(tokens: int | str, tolerance: float | None, reduce: str) -> None:
    """Raises UserError unless a tolerance is given just where the tokens of each image are chosen."""
    if tokens != AUTO:
        if tolerance is not None:
            raise UserError("tolerance has no effect without tokens=auto.")
        return
    if tolerance is None:
        raise UserError("tokens=auto needs a tolerance, in nats per answer token: for example, tolerance=0.05.")
    if not tolerance >= 0:
        raise UserError(f"tolerance={tolerance} must be at least 0.")
    if reduce:
        raise UserError(f"tokens=auto and reduce={reduce} both say how many image tokens are read: leave one out.")
