"""Timing of training steps, on random batches."""

import dataclasses
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np

from stf_jax.accounting.memory import compiled_bytes, peak_bytes
from stf_jax.config import TrainConfig
from stf_jax.data.packing import Batch
from stf_jax.data.sampling import plan_budgets
from stf_jax.data.tiles import ImageLayout, find_tiles, place_slots
from stf_jax.models.blueprint import Params
from stf_jax.models.spec import resolve_model
from stf_jax.parallel.mesh import compute_context, make_mesh
from stf_jax.training.optimizer import make_optimizer
from stf_jax.training.state import (
    TrainState,
    base_params,
    init_state,
    learning_rate_factors,
    state_layout,
    training_blueprint,
)
from stf_jax.training.step import make_train_step


@dataclasses.dataclass(frozen=True)
class StepTiming:
    """Figures of training steps on one batch."""

    losses: list[float]  # before each step and after the last
    seconds: list[float]  # of each step
    compile_seconds: float
    planned_bytes: int  # the peak memory that plan reports
    peak_bytes: int  # the peak memory as reported by the device, or else by the compiler
    state: TrainState[jax.Array]  # after the last step


def time_train_steps(
    config: TrainConfig, load: Callable[[Mapping[str, jax.ShapeDtypeStruct]], Params], batch: Batch, steps: int
) -> StepTiming:
    """Compiles the training step and times steps on one batch.

    Args:
      load: returns weights to start from, given those of the model with types and shardings; the others are random.
    """
    plan, mesh = training_blueprint(config), make_mesh(config.mesh)
    tx = make_optimizer(config.optimizer, steps + 1, learning_rate_factors(config.rules, plan))
    layout = state_layout(config, plan, tx, mesh)
    state = init_state(config, plan, layout, tx, load(base_params(plan, layout)))
    losses, seconds = [], []
    with compute_context(mesh, config.model.precision):
        begin = time.perf_counter()
        step = make_train_step(config, plan, tx, layout).lower(state, batch).compile()
        compile_seconds = time.perf_counter() - begin
        batch = jax.device_put(batch, step.input_shardings[0][1])
        for _ in range(steps + 1):  # the first one is a warm-up
            begin = time.perf_counter()
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
            seconds.append(time.perf_counter() - begin)
    stats = jax.devices()[0].memory_stats()  # None on CPUs
    in_use = stats["peak_bytes_in_use"] if stats else compiled_bytes(step)
    return StepTiming(losses, seconds[1:], compile_seconds, peak_bytes(step), in_use, state)


def make_batch(config: TrainConfig) -> Batch:
    """A global batch of random numpy arrays: one image per row, then text, which is all target tokens.

    There are no images if ``config.data.images_per_row`` is 0. With ``data.aspect=tiles``, an image fills two by two
    tiles if ``data.tiles.most`` allows it.
    """
    rng, model = np.random.default_rng(1), resolve_model(config.model)
    assert model.vision_shape is not None  # a complete model is timed
    side, data = model.vision_shape.image_size, config.data
    data = dataclasses.replace(data, images_per_row=min(data.images_per_row, 1))
    layout = ImageLayout(model.vision_shape, data.aspect, model.slots, find_tiles(data))
    image_slots = np.concatenate([np.zeros(0, np.int32), *layout.slots([(2 * side, 2 * side)] * data.images_per_row)])
    image_slots, slots = place_slots(image_slots, 0, data.image_places * model.slots), len(image_slots)
    image_slots = np.concatenate([image_slots, np.full(data.max_length, -1, np.int32)])[: data.max_length]
    tokens = rng.integers(3, 500, (config.global_batch_size, config.data.max_length)).astype(np.int32)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return Batch(
        tokens=tokens,
        targets=np.concatenate([tokens[:, 1:], np.zeros_like(tokens[:, :1])], axis=1),
        loss_mask=(positions >= slots - 1) & (positions < tokens.shape[1] - 1),
        positions=positions,
        segment_ids=np.ones_like(tokens),
        image_slots=np.broadcast_to(image_slots, tokens.shape),
        images=rng.integers(0, 256, (len(tokens), data.image_places, side, side, 3), np.uint8),
        budgets=plan_budgets(config, tokens.shape[1], data.image_places),
    )
