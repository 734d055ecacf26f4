"""Training steps by the clock."""

import time

import jax

from stf_jax.config import TrainConfig
from stf_jax.data.packing import Batch
from stf_jax.runtime.mesh import computing, make_mesh
from stf_jax.training.optimizer import make_optimizer
from stf_jax.training.state import blueprint, init_state, state_layout
from stf_jax.training.step import make_train_step
from stf_jax.weights.folder import load_params


def time_train_steps(config: TrainConfig, source: str, batch: Batch, steps: int) -> tuple[list[float], list[float], int]:
    """Takes steps as training does, all on that batch; the program is compiled before.

    Args:
      source: weights to start from, as ``config.init_from``.

    Returns:
      The loss before each step and after the last; seconds of each step; and the bytes that the program holds at once:
      the most that the device held where it tells, else as the compiler laid it out.
    """
    plan, mesh, tx = blueprint(config.model), make_mesh(config.mesh), make_optimizer(config.optimizer, steps + 1)
    layout = state_layout(config, plan, tx, mesh)
    state = init_state(config, layout, tx, load_params(source, layout.params, ()))
    losses, seconds = [], []
    with computing(mesh, config.model.precision):
        step = make_train_step(config, plan, tx, layout).lower(state, batch).compile()
        batch = jax.device_put(batch, step.input_shardings[0][1])
        for _ in range(steps + 1):  # the first wakes threads
            begin = time.perf_counter()
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
            seconds.append(time.perf_counter() - begin)
    stats = jax.devices()[0].memory_stats()  # None of a CPU
    laid = step.memory_analysis()
    planned = laid.argument_size_in_bytes + laid.output_size_in_bytes + laid.temp_size_in_bytes
    held = stats["peak_bytes_in_use"] if stats else planned - laid.alias_size_in_bytes
    return losses, seconds[1:], held
