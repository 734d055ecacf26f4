"""Timing of training steps, on random batches."""

import time

import jax
import numpy as np

from stf_jax.config import TrainConfig
from stf_jax.data.packing import Batch
from stf_jax.models.spec import resolve_model
from stf_jax.parallel.mesh import compute_context, make_mesh
from stf_jax.training.optimizer import make_optimizer
from stf_jax.training.state import base_params, init_state, learning_rate_factors, state_layout, training_blueprint
from stf_jax.training.step import make_train_step
from stf_jax.weights.folder import load_params


def time_train_steps(
    config: TrainConfig, source: str, batch: Batch, steps: int
) -> tuple[list[float], list[float], int]:
    """Compiles the training step and times steps on one batch.

    Args:
      source: weights to start from, as ``config.init_from``.

    Returns:
      The loss before each step and after the last; seconds of each step; and the peak memory in bytes, as reported by
      the device, or else by the compiler.
    """
    plan, mesh = training_blueprint(config.model, config.rules), make_mesh(config.mesh)
    tx = make_optimizer(config.optimizer, steps + 1, learning_rate_factors(config.rules, plan))
    layout = state_layout(config, plan, tx, mesh)
    state = init_state(config, plan, layout, tx, load_params(source, base_params(plan, layout), ()))
    losses, seconds = [], []
    with compute_context(mesh, config.model.precision):
        step = make_train_step(config, plan, tx, layout).lower(state, batch).compile()
        batch = jax.device_put(batch, step.input_shardings[0][1])
        for _ in range(steps + 1):  # the first one is a warm-up
            begin = time.perf_counter()
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
            seconds.append(time.perf_counter() - begin)
    stats = jax.devices()[0].memory_stats()  # None on CPUs
    memory = step.memory_analysis()
    assert memory is not None  # CPUs, GPUs and TPUs report it
    planned = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    peak_bytes = stats["peak_bytes_in_use"] if stats else planned - memory.alias_size_in_bytes
    return losses, seconds[1:], peak_bytes


def make_batch(config: TrainConfig) -> Batch:
    """A global batch of random numpy arrays: one image per row, then text, which is all target tokens."""
    rng, model = np.random.default_rng(1), resolve_model(config.model)
    assert model.vision_shape is not None  # a complete model is timed
    side, slots = model.vision_shape.image_size, model.slots
    tokens = rng.integers(3, 500, (config.global_batch_size, config.data.max_length)).astype(np.int32)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return Batch(
        tokens=tokens,
        targets=np.concatenate([tokens[:, 1:], np.zeros_like(tokens[:, :1])], axis=1),
        loss_mask=(positions >= slots - 1) & (positions < tokens.shape[1] - 1),
        positions=positions,
        segment_ids=np.ones_like(tokens),
        image_slots=np.where(positions < slots, positions, -1),
        images=rng.integers(0, 256, (len(tokens), 1, side, side, 3), np.uint8),
    )
