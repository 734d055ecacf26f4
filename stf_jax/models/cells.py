"""A head that labels small cells of an image, by which a tower learns to see from drawn scenes.

Captions teach a small tower slowly: they name few things, and not where in the image each is. Of a drawn image it is
known what every cell shows, and a linear layer on each patch can predict it. The head is dropped after training.

Axis letters: B images, P patches, S cells a side of the image, C tower width.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from stf_jax.models.layers import Linear
from stf_jax.models.vit import VisionConfig

CLASSES = (7, 14, 37)  # of color, shape and character, 0 of each for none (data/world_labels.py)


class CellHead(nnx.Module):
    """One linear layer: the scores of all cells of a patch from the patch's state."""

    def __init__(self, rngs: nnx.Rngs, vision: VisionConfig, each: int):
        """``each``: cells along a side of a patch."""
        self.grid, self.each = vision.grid, each
        self.scores = Linear(rngs, [(vision.width, "embed")], [(self.each**2 * sum(CLASSES), "mlp")])

    def __call__(self, states: jax.Array) -> jax.Array:
        """Scores, float32 [B, S, S, sum(CLASSES)], of patch states [B, P, C]."""
        x = self.scores(states.astype(jnp.float32))
        x = x.reshape(-1, self.grid, self.grid, self.each, self.each, sum(CLASSES))
        side = self.grid * self.each
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, side, side, sum(CLASSES))


def split_scores(scores: jax.Array) -> list[jax.Array]:
    """The scores of colors, of shapes and of characters, as :class:`CellHead` gives them side by side."""
    ends = [sum(CLASSES[: i + 1]) for i in range(len(CLASSES) - 1)]
    return jnp.split(scores, ends, axis=-1)
