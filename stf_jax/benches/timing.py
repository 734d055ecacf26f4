"""Timing of training steps."""

import time

import jax

from stf_jax.config import TrainConfig
from stf_jax.data.packing import Batch
from stf_jax.parallel.mesh import compute_context, make_mesh
from stf_jax.training.optimizer import make_optimizer
from stf_jax.training.state import blueprint, init_state, state_layout
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
    plan, mesh, tx = blueprint(config.model), make_mesh(config.mesh), make_optimizer(config.optimizer, steps + 1)
    layout = state_layout(config, plan, tx, mesh)
    state = init_state(config, layout, tx, load_params(source, layout.params, ()))
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
