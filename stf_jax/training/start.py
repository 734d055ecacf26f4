"""The parameters that a run starts from."""

import functools
import re

from stf_jax.checkpointing.base import Base
from stf_jax.config import TrainConfig
from stf_jax.models.blueprint import Blueprint, Params
from stf_jax.models.spec import resolve_model
from stf_jax.training.state import Layout, base_params, quantize_loaded, saved_by_base
from stf_jax.weights.adapters import load_adapter, split_adapters
from stf_jax.weights.folder import absolute_sources, find_unchanged, load_params


def load_start(config: TrainConfig, plan: Blueprint, layout: Layout) -> tuple[Params, Base]:
    """Loads the parameters in ``init_from``, quantized as the rules say.

    Args:
      config: with the model's shapes (:func:`stf_jax.weights.origin.complete_config`).
      plan: of :func:`stf_jax.training.state.training_blueprint`.

    Returns:
      The parameters; and the folders that have them, with those that need not be saved for that reason.

    Raises:
      UserError: as :func:`load_params` and :func:`load_adapter`.
    """
    folders, adapters = split_adapters(config.init_from)
    adapted: Params = {}
    for name in adapters:
        for path, value in load_adapter(name, resolve_model(config.model), plan, layout.params).items():
            adapted |= quantize_loaded(plan, layout, path, value)
    source = folders, base_params(plan, layout), (*config.init_missing, *map(re.escape, adapted))
    unchanged = set() if config.checkpoint.save_frozen else find_unchanged(*source)
    base = Base(absolute_sources(folders), saved_by_base(plan, layout, unchanged))
    return load_params(*source, functools.partial(quantize_loaded, plan, layout)) | adapted, base
