"""Cross-entropy of the labels of image cells, which trains a vision tower (models/cells.py).

Axis letters: B images, S cells along a side of the image.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from stf_jax.data.packing import Batch
from stf_jax.models.cells import split_scores
from stf_jax.models.vlm import VLM

_WEIGHTS = (1.0, 1.0, 2.0)  # of the losses of colors, shapes and characters
_UNLABELED = 0.1  # weight of cells without a label, which are the majority


def labels_loss_sum(scores: Float[Array, "B S S classes"], labels: UInt8[Array, "B S S 3"]) -> Float[Array, ""]:
    """Weighted sum of the cross-entropy of all cells' labels, in nats, float32.

    Args:
      scores: float32, the output of :class:`stf_jax.models.cells.CellHead`.
      labels: color, shape and character of each cell, 0 for none.
    """
    total = jnp.zeros(())
    for index, (part, weight) in enumerate(zip(split_scores(scores), _WEIGHTS, strict=True)):
        label = labels[..., index].astype(jnp.int32)
        losses = jax.nn.logsumexp(part, -1) - jnp.take_along_axis(part, label[..., None], -1)[..., 0]
        total += weight * (losses * jnp.where(label > 0, 1, _UNLABELED)).sum()
    return total


class Cells:
    """Weighted cross-entropy in nats, over all cells."""

    def loss_sum(self, model: VLM, batch: Batch[jax.Array], packed: bool) -> jax.Array:
        del packed
        assert batch.labels is not None  # data.scenes.task=cells gives them
        scores = model.cell_scores(batch.images)
        with jax.named_scope("loss"):
            return labels_loss_sum(scores, batch.labels.reshape(*scores.shape[:3], -1))

    def count_terms(self, batch: Batch[jax.Array]) -> jax.Array:
        assert batch.labels is not None  # data.scenes.task=cells gives them
        return jnp.int32(math.prod(batch.labels.shape[:-1]))


COMPONENTS = {"cells": Cells()}
