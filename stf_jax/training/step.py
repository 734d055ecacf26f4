"""One optimizer step: loss over learned tokens, gradients of the trainable tree, update."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from stf_jax.data.packing import Batch
from stf_jax.training.state import Blueprint, Params, TrainState

Metrics = dict[str, jax.Array]


def loss_sum(plan: Blueprint, trainable: Params, frozen: Params, batch: Batch) -> jax.Array:
    """Cross-entropy in nats, float32, summed over the batch's learned tokens."""
    model = plan.merge(trainable, frozen)
    logits = model(batch.tokens, batch.positions, batch.segment_ids, batch.image_slots, batch.images)
    with jax.named_scope("loss"):
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
        return jnp.where(batch.loss_mask, losses, 0).sum()


def make_train_step(
    plan: Blueprint, tx: optax.GradientTransformation, accumulation_steps: int
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The step function, to be compiled by the caller.

    The loss is the mean over learned tokens of the global batch. With accumulation, each microbatch's sum is divided
    by the count of the whole batch, so that the result is that of one large batch, not a mean of means.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        learned = batch.loss_mask.sum()

        def loss(trainable, rows):
            return loss_sum(plan, trainable, state.frozen, rows) / jnp.maximum(learned, 1)

        value_and_grad = jax.value_and_grad(loss)
        if accumulation_steps == 1:
            value, grads = value_and_grad(state.trainable, batch)
        else:

            def add(total, rows):
                return jax.tree.map(jnp.add, total, value_and_grad(state.trainable, rows)), None

            zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.trainable))
            (value, grads), _ = jax.lax.scan(add, zero, _microbatches(batch, accumulation_steps))
        with jax.named_scope("update"):
            updates, moments = tx.update(grads, state.moments, state.trainable)
            trainable = optax.apply_updates(state.trainable, updates)
        after = dataclasses.replace(state, step=state.step + 1, trainable=trainable, moments=moments)
        return after, {"loss": value, "gradient_norm": optax.global_norm(grads), "learned_tokens": learned}

    return train_step


def _microbatches(batch, count):
    # Rows are dealt out in turn, so that each device's share of a microbatch is already its own.
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1), batch)
