"""A head that labels small cells of an image, to train a vision tower on synthetic scenes.

Captions teach a small tower slowly: they name few things, and not where in the image each one is. For a synthetic scene
the content of every cell is known, and a linear layer on each patch can predict it. The head is dropped after training.

Axis letters: B images, P patches, S cells along a side of the image, C tower width.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from stf_jax.models.layers import Linear
from stf_jax.models.towers.base import VisionConfig

CLASSES = (7, 14, 37)  # of color, shape and character; 0 means none (data/world_labels.py)


class CellHead(nnx.Module):
    """One linear layer from a patch's state to the scores of all its cells."""

    def __init__(self, rngs: nnx.Rngs, vision: VisionConfig, cells_per_side: int) -> None:
        """``cells_per_side``: cells along each side of a patch."""
        self.grid, self.cells_per_side = vision.grid, cells_per_side
        self.scores = Linear(rngs, [(vision.width, "embed")], [(self.cells_per_side**2 * sum(CLASSES), "mlp")])

    def __call__(self, states: Float[Array, "B P C"]) -> Float32[Array, "B S S classes"]:
        """Scores of all classes of colors, shapes and characters (:data:`CLASSES`), from the states of patches."""
        with jax.named_scope("cells"):
            x = self.scores(states.astype(jnp.float32))
        x = x.reshape(-1, self.grid, self.grid, self.cells_per_side, self.cells_per_side, sum(CLASSES))
        side = self.grid * self.cells_per_side
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, side, side, sum(CLASSES))


def split_scores(scores: Float[Array, "*cells classes"]) -> list[Array]:
    """Splits the scores of :class:`CellHead` into those of colors, shapes and characters."""
    ends = [sum(CLASSES[: i + 1]) for i in range(len(CLASSES) - 1)]
    return jnp.split(scores, ends, axis=-1)
