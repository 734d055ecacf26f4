"""Cross-entropy of the next token."""

import jax

from stf_jax.data.packing import Batch
from stf_jax.models.vlm import VLM
from stf_jax.training.loss import cross_entropy_sum


class NextToken:
    """Cross-entropy in nats, over the batch's target tokens."""

    def loss_sum(self, model: VLM, batch: Batch[jax.Array], packed: bool) -> jax.Array:
        hidden, targets, loss_mask = model.predict(
            batch.tokens,
            batch.targets,
            batch.loss_mask,
            batch.positions,
            batch.segment_ids,
            batch.image_slots,
            batch.images,
            packed,
        )
        with jax.named_scope("loss"):
            return cross_entropy_sum(hidden, model.llm.head_kernel, targets, loss_mask, model.llm.config.tied)

    def count_terms(self, batch: Batch[jax.Array]) -> jax.Array:
        return batch.loss_mask.sum()


COMPONENTS = {"next_token": NextToken()}
