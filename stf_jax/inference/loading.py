"""A saved model, ready to answer: a run's newest checkpoint, a folder of imported weights, or an export."""

import dataclasses

from etils import epath
from jax.sharding import Mesh

from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.inference.generator import Generator
from stf_jax.weights.exports import whole
from stf_jax.weights.model import SavedModel, open_model


def load_generator(
    checkpoint: epath.Path, mesh: Mesh, precision: str = "", reduce: str = "", keep: int = 0
) -> tuple[Generator, SavedModel]:
    """The model in that folder on a mesh, and what it is.

    Args:
      precision: as ``config.model.precision``; empty: the run's own, bfloat16 for other folders.
      reduce, keep: as ``config.model.reduce`` and ``keep``.

    Raises:
      UserError: the folder holds no model, or one that lacks a part or its tokenizer, or that cannot be reduced so.
    """
    saved = open_model(checkpoint)
    whole(saved, checkpoint)
    how = dict(precision=precision or saved.config.precision, remat="none", reduce=reduce, keep=keep)
    config = dataclasses.replace(saved.config, **how)
    what = saved.description
    generator = Generator(config, load_tokenizer(str(saved.tokenizer)), mesh, what.template, what.aspect)
    return generator.take(saved.restore(generator.plan.shardings(mesh))), saved
