"""Cross-entropy of the next token."""

import jax

from stf_jax.data.packing import Batch
from stf_jax.models.vlm import VLM
from stf_jax.training.loss import cross_entropy_sum


class NextToken:
    """Cross-entropy in nats, over the batch's target tokens."""

    def loss_sum(self, model: VLM, batch: Batch[jax.Array], packed: bool) -> jax.Array:
        segments = batch.segment_ids if packed else None
        hidden = model.hidden(batch.tokens, batch.positions, segments, batch.image_slots, batch.images)
        with jax.named_scope("loss"):
            tied = model.llm.config.tied
            return cross_entropy_sum(hidden, model.llm.head_kernel, batch.targets, batch.loss_mask, tied)

    def count_terms(self, batch: Batch[jax.Array]) -> jax.Array:
        return batch.loss_mask.sum()


COMPONENTS = {"next_token": NextToken()}
