"""What a chooser learns (models/chooser.py): how far the model's own answers are from those with all image tokens.

The model reads each batch at every budget, and its distributions at the target tokens of the data's answers are
compared with those at the first budget. An image's target at a budget is the logarithm of KL(first ‖ budget), averaged
over the target tokens of its conversation. The loss is the pinball loss of :data:`QUANTILE`: it is least where the
prediction is above the target for so many conversations, and outliers pull it no more than others.

Axis letters: B rows, T positions, M images per row, N slots per image, K budgets but the first.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from stf_jax.config import TrainConfig, UserError
from stf_jax.data.packing import Batch
from stf_jax.models.vlm import VLM, States
from stf_jax.training.budgets import change_slots
from stf_jax.training.loss import divergences

QUANTILE = 0.9  # of conversations that stay within the divergence that the chooser predicts
FLOOR = 1e-4  # nats: a smaller divergence is a rounding error


class Choose:
    """The pinball loss of the chooser's predictions, averaged over budgets; a term is an image with an answer.

    Only the chooser gets a gradient.
    """

    compares_budgets = True

    def check(self, config: TrainConfig) -> None:
        """Raises UserError if there is no chooser, or a step would read only one budget."""
        if not config.model.chooser:
            raise UserError("objective=choose trains the head that model.chooser=True adds: set both.")
        if config.budgets_per_step == "one":
            raise UserError("objective=choose compares all budgets in each step: set budgets_per_step=all.")

    def loss_sum(self, model: VLM, batch: Batch[jax.Array], packed: bool) -> jax.Array:
        if not batch.budgets:  # text alone
            return jnp.zeros(())
        states = jax.lax.stop_gradient(model.tower_states(batch.images, model.taps))
        answers = find_answers(batch)
        targets = jnp.log(jnp.maximum(image_divergences(model, batch, answers, packed, states), FLOOR))
        with jax.named_scope("loss"):
            excess = targets - model.expected_divergences(batch.images, states)
            losses = jnp.maximum(QUANTILE * excess, (QUANTILE - 1) * excess).mean(-1)
            return jnp.where(answers.any(-1), losses, 0).sum()

    def count_terms(self, batch: Batch[jax.Array]) -> jax.Array:
        return find_answers(batch).any(-1).sum() if batch.budgets else jnp.int32(0)


def find_answers(batch: Batch[jax.Array]) -> Bool[Array, "B M T"]:
    """Which positions predict a target token of the conversation that an image belongs to."""
    first_slots = jnp.arange(batch.images.shape[1]) * batch.budgets[0].tokens
    is_first = batch.image_slots[:, None] == first_slots[:, None]
    segments = jnp.where(is_first, batch.segment_ids[:, None], 0).sum(-1, keepdims=True)  # 0: no image
    return (segments > 0) & (batch.segment_ids[:, None] == segments) & batch.loss_mask[:, None]


def image_divergences(
    model: VLM, batch: Batch[jax.Array], answers: jax.Array, packed: bool, states: States
) -> Float32[Array, "B M K"]:
    """KL(first ‖ budget) of next tokens, in nats, averaged over the answers of each image; without a gradient.

    The model is that of one call: its budget changes.

    Args:
      answers: of :func:`find_answers`.
      packed: as of :class:`stf_jax.training.objectives.base.Objective`.
      states: those of the tower.
    """
    slots, found = model.slots, list[jax.Array]()
    head, vocab_first, full = model.llm.head_kernel, model.llm.config.tied, None
    made = model.nested_tokens(batch.images, [budget.tokens for budget in batch.budgets], states)
    for budget, tokens in zip(batch.budgets, made, strict=True):
        model.slots, model.known_tokens = budget.tokens, tokens
        rows, ends = change_slots(batch, slots, *budget)
        segments = rows.segment_ids if packed else None
        hidden = model.hidden(rows.tokens, rows.positions, segments, rows.image_slots, rows.images)
        hidden = jnp.take_along_axis(hidden, ends[:, :, None], axis=1, mode="clip")  # beside the same position
        if full is None:
            full = hidden
            continue
        with jax.named_scope("loss"):
            each = divergences(hidden, head, batch.loss_mask, full, vocab_first)
            found.append((answers * each[:, None]).sum(-1) / jnp.maximum(answers.sum(-1), 1))
    return jnp.stack(found, axis=-1)


COMPONENTS = {"choose": Choose()}
