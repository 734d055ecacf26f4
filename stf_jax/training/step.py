"""One optimizer step: loss over learned tokens, gradients of the trainable tree, update."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from stf_jax.config import TrainConfig
from stf_jax.data.packing import Batch
from stf_jax.runtime.mesh import BATCH
from stf_jax.training.loss import cross_entropy_sum, labels_loss_sum
from stf_jax.training.state import Blueprint, Params, TrainState

Metrics = dict[str, jax.Array]


def loss_sum(plan: Blueprint, trainable: Params, frozen: Params, batch: Batch, packed: bool) -> jax.Array:
    """Cross-entropy in nats, float32, summed over the batch's learned tokens, or over its labelled cells.

    Rows that are not packed are one conversation, and what fills them up lies behind it, where no one looks; so their
    attention is plainly causal, which every backend's kernel can do.
    """
    model = plan.merge(trainable, frozen)
    if batch.labels is not None:
        scores = model.cell_scores(batch.images)
        with jax.named_scope("loss"):
            return labels_loss_sum(scores, batch.labels.reshape(*scores.shape[:3], -1))
    segments = batch.segment_ids if packed else None
    hidden = model.hidden(batch.tokens, batch.positions, segments, batch.image_slots, batch.images)
    with jax.named_scope("loss"):
        tied = model.llm.config.tied
        return cross_entropy_sum(hidden, model.llm.head_kernel, batch.targets, batch.loss_mask, tied)


def count_targets(batch: Batch) -> jax.Array:
    """What a batch's loss is the mean over: its learned tokens or, where images have labels, their cells."""
    return batch.loss_mask.sum() if batch.labels is None else jnp.int32(math.prod(batch.labels.shape[:-1]))


def make_train_step(
    config: TrainConfig, plan: Blueprint, tx: optax.GradientTransformation, layout: TrainState
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The step, to be compiled for the layout's mesh when it is first called; it takes the state's memory over.

    The loss is the mean over learned tokens of the global batch. With accumulation, each microbatch's sum is divided
    by the count of the whole batch, so that the result is that of one large batch, not a mean of means.

    Parameters and moments stay as they were, and ``skipped`` is 1, where a number of the loss, the gradients, or the
    parameters and moments that the update would give is not finite, or where the batch has no target token: one bad
    batch does not spoil them.
    """
    accumulation_steps, packed = config.optimizer.accumulation_steps, config.data.packing

    def update(grads, moments, params):
        updates, moments = tx.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        learned = count_targets(batch)

        def loss(trainable, rows):
            return loss_sum(plan, trainable, state.frozen, rows, packed) / jnp.maximum(learned, 1)

        value_and_grad = jax.value_and_grad(loss)
        if accumulation_steps == 1:
            value, grads = value_and_grad(state.trainable, batch)
        else:

            def add(total, rows):
                return jax.tree.map(jnp.add, total, value_and_grad(state.trainable, rows)), None

            zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.trainable))
            (value, grads), _ = jax.lax.scan(add, zero, _microbatches(batch, accumulation_steps))
        with jax.named_scope("update"):
            norm = optax.global_norm(grads)
            # Computed twice: whether it is made depends on all of it, and keeping it until then would take memory.
            wrong = _not_finite(update(*jax.lax.optimization_barrier((grads, state.moments, state.trainable))))
            made = jnp.isfinite(value) & jnp.isfinite(norm) & (wrong == 0) & (learned > 0)
            new = update(grads, state.moments, state.trainable)
            kept = jax.tree.map(lambda x, old: jnp.where(made, x, old), new, (state.trainable, state.moments))
        after = dataclasses.replace(state, step=state.step + 1, trainable=kept[0], moments=kept[1])
        return after, {"loss": value, "gradient_norm": norm, "learned_tokens": learned, "skipped": ~made}

    places = jax.tree.map(lambda leaf: leaf.sharding, layout)
    rows = NamedSharding(layout.step.sharding.mesh, BATCH)
    return jax.jit(train_step, in_shardings=(places, rows), out_shardings=(places, None), donate_argnums=0)


def _not_finite(tree):
    """How many numbers of a tree are not finite, float32."""
    return sum(jnp.sum(~jnp.isfinite(leaf), dtype=jnp.float32) for leaf in jax.tree.leaves(tree))


def _microbatches(batch, count):
    # Rows are dealt out in turn, so that each device's share of a microbatch is already its own.
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1), batch)
