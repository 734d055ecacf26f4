"""A saved model, ready to answer: a run's newest checkpoint, a folder of imported weights, or an export."""

import dataclasses

from etils import epath
from jax.sharding import Mesh

from stf_jax.config import UserError
from stf_jax.data.conversation import own_template
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.inference.generator import Generator
from stf_jax.weights.exports import whole
from stf_jax.weights.model import SavedModel, open_model


def load_generator(
    checkpoint: epath.Path,
    mesh: Mesh,
    precision: str = "",
    reduce: str = "",
    keep: int = 0,
    *,
    text_alone: bool = False,
) -> tuple[Generator, SavedModel]:
    """The model in that folder on a mesh, and what it is.

    Args:
      precision: as ``config.model.precision``; empty: the run's own, bfloat16 for other folders.
      reduce, keep: as ``config.model.reduce`` and ``keep``.
      text_alone: whether a language model without a vision tower will do; it answers in the template that its
        tokenizer has the control tokens of.

    Raises:
      UserError: the folder holds no model, or one that lacks a part or its tokenizer, or that cannot be reduced so.
    """
    saved = open_model(checkpoint)
    what = saved.description
    alone = text_alone and what.llm is not None and (what.vision is None or what.fusion is None)
    if not alone:
        whole(saved, checkpoint)
    elif saved.tokenizer is None:
        raise UserError(f"{checkpoint} has no tokenizer: copy the folder of one to {checkpoint / 'tokenizer'}.")
    how = dict(precision=precision or saved.config.precision, remat="none", reduce=reduce, keep=keep)
    config, tokenizer, template = saved.config, load_tokenizer(str(saved.tokenizer)), what.template
    if alone:
        config, template = dataclasses.replace(config, vision_shape=None), own_template(tokenizer)
    generator = Generator(dataclasses.replace(config, **how), tokenizer, mesh, template, what.aspect)
    return generator.take(saved.restore(generator.plan.shardings(mesh))), saved
