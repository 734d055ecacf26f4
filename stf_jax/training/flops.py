"""Model FLOPs of a model's training step, prefill and decoding, counted in their traces (accounting/flops.py).

Axis letters: B rows, T positions, M images per row, S cache slots.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from stf_jax.accounting.flops import count_model_flops
from stf_jax.checkpointing.rules import Rules
from stf_jax.config import ModelConfig, TrainConfig
from stf_jax.data.packing import Batch, Budget
from stf_jax.models.blueprint import Params, blueprint
from stf_jax.models.cells import CLASSES
from stf_jax.models.spec import resolve_model
from stf_jax.training.budgets import mean_loss_sum
from stf_jax.training.loss import chunks_of
from stf_jax.training.objectives.base import find_objective
from stf_jax.training.state import learning_rate_factors, training_blueprint


def step_flops(
    model: ModelConfig,
    rules: Rules,
    rows: int,
    length: int,
    images_per_row: int,
    objective: str = "",
    init_from: str = "",
    budgets: tuple[Budget, ...] = (),
) -> int:
    """Counts the model FLOPs of a training step: of its loss and of the gradients of all trainable parameters.

    Args:
      model: the model; its precision, remat and kernels do not matter.
      rules: which parameters are trainable, as in the config.
      rows: B, of the global batch, all microbatches together.
      length: T, tokens per row.
      images_per_row: M.
      objective: as ``config.objective``.
      init_from: as ``config.init_from``, which decides what a teacher shares.
      budgets: those at which the batch is read, if the model is trained at several.

    Raises:
      UserError: as :func:`stf_jax.training.state.training_blueprint`.
    """
    config = TrainConfig(model=_by_definition(model), rules=rules, objective=objective, init_from=init_from)
    return rows * _row_step_flops(config, length, images_per_row, budgets)


def prefill_flops(model: ModelConfig, rows: int, length: int, images_per_row: int) -> dict[str, int]:
    """Counts the model FLOPs of reading prompts that fill T, by part: ``vision``, ``fusion``, ``llm`` and ``head``.

    The head is that of one position per row. ``reduce`` is what a TokenReducer adds.
    """
    return {part: rows * flops for part, flops in _row_prefill_flops(model, length, images_per_row).items()}


def decode_flops(model: ModelConfig, rows: int, slots: int, images_per_row: int = 0) -> int:
    """Counts the model FLOPs of decoding one token per row, which attends to S slots, including its own.

    If image tokens are dropped in the decoder, S is that of the first layers, and holds ``images_per_row`` images.
    """
    return rows * _row_decode_flops(model, slots, images_per_row)


def abstract_batch(
    model: ModelConfig, rows: int, length: int, images_per_row: int, budgets: tuple[Budget, ...] = ()
) -> Batch[jax.ShapeDtypeStruct]:
    """A training batch as abstract arrays."""
    vision = resolve_model(model).vision_shape
    assert vision is not None  # only complete models are trained
    row, side = jax.ShapeDtypeStruct((rows, length), jnp.int32), vision.image_size
    images = jax.ShapeDtypeStruct((rows, images_per_row, side, side, 3), jnp.uint8)
    cells = vision.grid * model.cells
    labels = jax.ShapeDtypeStruct((rows, images_per_row, cells, cells, len(CLASSES)), jnp.uint8) if cells else None
    return Batch(row, row, jax.ShapeDtypeStruct(row.shape, bool), row, row, row, images, labels, budgets)


# A trace of a model with billions of parameters takes a second. Everything is linear in the rows.


@functools.lru_cache(maxsize=64)
def _row_step_flops(config: TrainConfig, length: int, images_per_row: int, budgets: tuple[Budget, ...]) -> int:
    plan, model = training_blueprint(config), config.model
    names, minimized = learning_rate_factors(config.rules, plan), find_objective(config.objective, model)
    trainable, frozen = (
        {path: leaf for path, leaf in plan.shapes.items() if (path in names) == selected} for selected in (True, False)
    )

    def gradients(trainable: Params, frozen: Params, batch: Batch[jax.Array]) -> tuple[jax.Array, Params]:
        def loss(tree: Params) -> jax.Array:
            noise = plan.noise(jax.random.key(0), len(batch.tokens))
            return mean_loss_sum(minimized, plan.merge(tree, frozen, noise), batch, packed=False)

        return jax.value_and_grad(loss)(trainable)

    batch = abstract_batch(model, 1, length, images_per_row, budgets)
    with chunks_of(2**62):  # a vocabulary in one chunk needs no padding
        counts = count_model_flops(gradients, trainable, frozen, batch)
    return sum(counts.values())


@functools.lru_cache(maxsize=64)
def _row_prefill_flops(model: ModelConfig, length: int, images_per_row: int) -> dict[str, int]:
    plan = blueprint(_by_definition(model))
    vision = resolve_model(model).vision_shape
    row, side = jax.ShapeDtypeStruct((1, length), jnp.int32), vision.image_size if vision else 1
    images = jax.ShapeDtypeStruct((1, images_per_row, side, side, 3), jnp.uint8)

    def prefill(params: Params, *batch: jax.Array) -> Any:
        vlm = plan.merge(params)
        hidden, *rest = vlm.prefill(*batch)
        return vlm.llm.logits(hidden), rest

    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    return count_model_flops(prefill, plan.shapes, row, row, lengths, images)


@functools.lru_cache(maxsize=64)
def _row_decode_flops(model: ModelConfig, slots: int, images_per_row: int) -> int:
    plan, llm = blueprint(_by_definition(model)), resolve_model(model).llm_shape
    assert llm is not None  # nothing decodes with a tower alone
    reduction = resolve_model(model).reduction
    sizes = [slots - images_per_row * reduction.dropped_before(layer) for layer in range(llm.layers)]
    layers = [jax.ShapeDtypeStruct((1, llm.kv_heads, size, llm.head_dim), jnp.float32) for size in sizes]
    filled = [jax.ShapeDtypeStruct((1, size), bool) for size in sizes]

    def extend(params: Params, tokens: jax.Array, cache: Any, filled: list[jax.Array]) -> Any:
        vlm = plan.merge(params)
        embeddings = vlm.llm.embed(tokens, vlm.dtype)
        positions, slots = [tokens] * llm.layers, [(jnp.int32(0), slots) for slots in filled]
        hidden, cache = vlm.llm.extend(embeddings, positions, cache, slots)
        return vlm.llm.logits(hidden), cache

    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return sum(count_model_flops(extend, plan.shapes, token, tuple((x, x) for x in layers), filled).values())


def _by_definition(model: ModelConfig) -> ModelConfig:
    """The same model without what makes it fast: the trace has the products that the mathematics needs."""
    return dataclasses.replace(model, precision="float32", attention="reference", scan_layers=False, remat="none")
