"""One optimizer step: loss over target tokens, gradients of the trainable tree, update."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from stf_jax.config import TrainConfig
from stf_jax.data.packing import Batch
from stf_jax.models.blueprint import Blueprint, Params
from stf_jax.parallel.mesh import BATCH
from stf_jax.training.budgets import mean_loss_sum
from stf_jax.training.objectives.base import find_objective
from stf_jax.training.optimizer import scale_layers
from stf_jax.training.state import Layout, TrainState, learning_rate_factors

Metrics = dict[str, jax.Array]

# Options of the program and not of XLA_FLAGS, which XLA reads once per process: so they can never be set too late. The
# first also makes XLA choose kernels by rule instead of by timing them, which may choose others at the next start. XLA
# of jax 0.11 has no such rule for Triton's matrix products, at least where it compiles for a GPU that it does not have,
# and ends with an error. So cuBLAS takes these products.
_DETERMINISTIC = {"xla_gpu_deterministic_ops": True, "xla_gpu_enable_triton_gemm": False}


def make_train_step(
    config: TrainConfig, plan: Blueprint, tx: optax.GradientTransformation, layout: Layout
) -> jax.stages.Wrapped:
    """Creates the jitted step (state, batch) → (state, metrics), compiled at its first call for the layout's mesh.

    The state's memory is donated to it.

    With ``config.deterministic``, the same state and batch give the same bits on GPUs too, in every process.

    The loss is the mean over target tokens of the global batch. With accumulation, each microbatch's sum is divided by
    the count of the whole batch, so that the result is that of one large batch instead of a mean of means.

    Parameters and moments stay unchanged, and ``skipped`` is 1, if the loss, a gradient, or a parameter or moment after
    the update is not finite, or if the batch has no target token. So a bad batch does not spoil them.

    Random numbers, of which dropout needs some, depend on the seed, the step and the row of the batch alone.
    """
    accumulation_steps, packed = config.optimizer.accumulation_steps, config.data.packing
    objective = find_objective(config.objective, config.model)
    factors = learning_rate_factors(config.rules, plan)
    partly_frozen = {path: [float(x > 0) for x in values] for path, values in factors.items() if not all(values)}

    def update(grads: Params, moments: optax.OptState, params: Params) -> tuple[Params, optax.OptState]:
        updates, moments = tx.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments

    def train_step(state: TrainState[jax.Array], batch: Batch[jax.Array]) -> tuple[TrainState[jax.Array], Metrics]:
        target_count = objective.count_terms(batch)

        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        noise = plan.noise(key, len(batch.tokens))

        def loss(trainable: Params, rows: Batch[jax.Array], noise: Params) -> jax.Array:
            model = plan.merge(trainable, state.frozen, noise)
            return mean_loss_sum(objective, model, rows, packed) / jnp.maximum(target_count, 1)

        value_and_grad = jax.value_and_grad(loss)
        if accumulation_steps == 1:
            value, grads = value_and_grad(state.trainable, batch, noise)
        else:

            def add(total: tuple[jax.Array, Params], part: tuple[Any, Params]) -> tuple[tuple[jax.Array, Params], None]:
                return jax.tree.map(jnp.add, total, value_and_grad(state.trainable, *part)), None

            zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.trainable))
            (value, grads), _ = jax.lax.scan(add, zeros, _microbatches(batch, noise, accumulation_steps))
        grads |= {path: scale_layers(grads[path], values) for path, values in partly_frozen.items()}
        with jax.named_scope("update"):
            norm = optax.global_norm(grads)
            # The update is computed twice: whether to apply it depends on all of it, and keeping it would take memory.
            bad_count = _count_not_finite(
                update(*jax.lax.optimization_barrier((grads, state.moments, state.trainable)))
            )
            is_applied = jnp.isfinite(value) & jnp.isfinite(norm) & (bad_count == 0) & (target_count > 0)
            new = update(grads, state.moments, state.trainable)
            new_or_old = jax.tree.map(
                lambda x, old: jnp.where(is_applied, x, old), new, (state.trainable, state.moments)
            )
        next_state = dataclasses.replace(state, step=state.step + 1, trainable=new_or_old[0], moments=new_or_old[1])
        return next_state, {
            "loss": value,
            "gradient_norm": norm,
            "learned_tokens": target_count,
            "skipped": ~is_applied,
        }

    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, layout)
    mesh = layout.step.sharding.mesh
    return jax.jit(
        train_step,
        in_shardings=(state_shardings, NamedSharding(mesh, BATCH)),
        out_shardings=(state_shardings, None),
        donate_argnums=0,
        compiler_options=_DETERMINISTIC if config.deterministic and mesh.devices.flat[0].platform == "gpu" else None,
    )


def _count_not_finite(tree: Any) -> jax.Array | int:
    """The number of values in a tree that are not finite, float32."""
    return sum(jnp.sum(~jnp.isfinite(leaf), dtype=jnp.float32) for leaf in jax.tree.leaves(tree))


def _microbatches(batch: Batch[jax.Array], noise: Params, count: int) -> tuple[Batch[jax.Array], Params]:
    # Rows are assigned round-robin, so that each device already holds its share of every microbatch.
    def split(x: jax.Array, axis: int) -> jax.Array:
        parts = x.reshape(*x.shape[:axis], x.shape[axis] // count, count, *x.shape[axis + 1 :])
        return jnp.moveaxis(parts, axis + 1, 0)

    return jax.tree.map(lambda x: split(x, 0), batch), jax.tree.map(lambda x: split(x, 1), noise)
