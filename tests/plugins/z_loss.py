"""An objective of one's own: next-token cross-entropy plus z-loss (PaLM, arXiv 2204.02311, section 5)."""

import jax
import jax.numpy as jnp


class ZLoss:
    def loss_sum(self, model, batch, packed):
        segments = batch.segment_ids if packed else None
        logits = model(batch.tokens, batch.positions, segments, batch.image_slots, batch.images)
        normalizer = jax.nn.logsumexp(logits, -1)
        target = jnp.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]
        return jnp.where(batch.loss_mask, normalizer - target + 1e-4 * normalizer**2, 0).sum()

    def count_terms(self, batch):
        return batch.loss_mask.sum()


Z_LOSS = ZLoss()
