"""One model at several budgets of image tokens in one step: the tower runs once, and rows are laid out for each budget.

Axis letters: B rows, T positions, U of rows with other slots, M images per row, N slots per image, D language model
width.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int

from stf_jax.data.packing import Batch
from stf_jax.models.vlm import VLM
from stf_jax.training.objectives.base import Objective


def mean_loss_sum(objective: Objective, model: VLM, batch: Batch[jax.Array], packed: bool) -> Float32[Array, ""]:
    """The objective's sum of losses of a batch, or the mean of those at the batch's budgets.

    All have the same terms. The model is that of one call: its budget changes. An objective that compares budgets gets
    the batch as it is.
    """
    if not batch.budgets or getattr(objective, "compares_budgets", False):
        return objective.loss_sum(model, batch, packed)
    slots, losses = model.slots, []
    made = model.nested_tokens(batch.images, [budget.tokens for budget in batch.budgets])
    for budget, tokens in zip(batch.budgets, made, strict=True):
        model.slots, model.known_tokens = budget.tokens, tokens
        rows, _ = change_slots(batch, slots, *budget)
        losses.append(objective.loss_sum(model, rows, packed))
    return jnp.stack(losses).mean()


def change_slots(
    batch: Batch[jax.Array], slots: int, wanted: int, length: int
) -> tuple[Batch[jax.Array], Int[Array, "B T"]]:
    """The rows with another number of slots per image.

    Args:
      batch: with ``slots`` slots per image.
      wanted: slots per image of the result.
      length: U, which all rows of the result must fit.

    Returns:
      The rows. And for each position of the batch, its position there: for a slot of an image, that of the image's last
      slot.
    """
    is_image = batch.image_slots >= 0
    # How many positions each position becomes: those of an image are all at its first slot.
    widths = jnp.where(is_image, jnp.where(batch.image_slots % slots == 0, wanted, 0), 1)
    ends = jnp.cumsum(widths, axis=1)
    places = jnp.arange(length)
    source = jax.vmap(lambda row: jnp.searchsorted(row, places, side="right"))(ends)  # T at the end of short rows

    def take(x: jax.Array, fill: int, source: jax.Array = source) -> jax.Array:
        return jnp.take_along_axis(x, source, axis=1, mode="fill", fill_value=fill)

    began = jnp.take_along_axis(ends - widths, jnp.arange(ends.shape[1]) - batch.positions, axis=1)  # conversations
    segment_ids, is_slot = take(batch.segment_ids, 0), take(batch.image_slots, -1) >= 0
    last = source + jnp.where(is_slot, slots - 1, 0)  # the target of an image's last slot is the text after it
    is_last = places == take(ends, 0) - 1
    rows = dataclasses.replace(
        batch,
        tokens=take(batch.tokens, 0),
        targets=jnp.where(is_last, take(batch.targets, 0, last), take(batch.tokens, 0)),
        loss_mask=is_last & take(batch.loss_mask, False, last),
        positions=jnp.where(segment_ids > 0, places - take(began, 0), 0),
        segment_ids=segment_ids,
        image_slots=jnp.where(is_slot, jnp.cumsum(is_slot, axis=1) - 1, -1),
        budgets=(),
    )
    return rows, ends - 1


def count_tokens(batch: Batch[np.ndarray], slots: int) -> int:
    """The tokens that a step reads of a batch with ``slots`` slots per image, at all its budgets together."""
    count, images = int((batch.segment_ids > 0).sum()), int((batch.image_slots >= 0).sum()) // slots
    return sum(count - images * (slots - tokens) for tokens, _ in batch.budgets) if batch.budgets else count
