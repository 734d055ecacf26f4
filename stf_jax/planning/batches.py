"""The steps of a run and the shapes of their batches, for `plan`."""

import collections
import functools
import math

from stf_jax.config import TrainConfig
from stf_jax.data.pipeline import Preprocessor, load_training_records, plan_rows
from stf_jax.data.sampling import BatchShape, Plan
from stf_jax.data.sources.base import DataNotNamed
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.models.spec import resolve_model
from stf_jax.training.remat import with_remat


def count_batches(config: TrainConfig) -> collections.Counter[BatchShape] | None:
    """Counts the batches of a run by their shapes, as training plans them.

    Every record is tokenized, which takes minutes for half a million.

    Returns:
      None if the config does not name data or a tokenizer, or if all batches have the largest shape.

    Raises:
      UserError: as :func:`stf_jax.data.pipeline.load_training_records` and :func:`stf_jax.data.pipeline.plan_rows`.
    """
    if not config.data.tokenizer or (config.data.packing and config.steps):
        return None
    model = with_remat(config, "auto").model
    base = TrainConfig(seed=config.seed, global_batch_size=config.global_batch_size, model=model, data=config.data)
    try:
        plan = _plan(base)
    except DataNotNamed:
        return None
    return plan.count_shapes(config.steps or plan.steps(config.epochs))


@functools.lru_cache(maxsize=1)  # for all candidates of a search
def _plan(config: TrainConfig) -> Plan:
    records, model = load_training_records(config), resolve_model(config.model)
    vision, llm = model.vision_shape, model.llm_shape
    assert vision is not None  # a run trains a complete model
    assert llm is not None
    tokenizer = load_tokenizer(config.data.tokenizer)
    dropped = model.reduction.dropped
    return plan_rows(config, records, Preprocessor(config.data, tokenizer, vision, model.slots, llm.vocab, dropped))


def count_steps(config: TrainConfig) -> int | None:
    """Counts the steps of a run by its number of records; None if that requires their lengths."""
    if config.steps:
        return config.steps
    if config.data.packing or config.data.tokens_per_batch:
        return None
    try:
        records = len(load_training_records(config))
    except DataNotNamed:
        records = config.data.records
    batches = -(-records // config.global_batch_size)  # per epoch; the last batch is padded with empty rows
    return max(1, math.ceil(config.epochs * batches - 1e-6)) if records else None
