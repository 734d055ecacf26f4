"""A head that chooses how many tokens an image gets, from what it expects answers to lose with fewer.

For each budget but the first, it predicts the logarithm of a divergence: how far, in nats per answer token, the model's
answers with that budget are from its answers with the first. It sees the image and not the question, so it predicts
what nine of ten conversations about such an image stay below (training/objectives/choose.py).

Axis letters: B images, P patches, C tower width, K budgets but the first.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from stf_jax.config import UserError
from stf_jax.models.layers import LayerNorm, Linear, gelu

_HIDDEN = 256


class Chooser(nnx.Module):
    """Mean and maximum over patches of each tap, normalized; then one hidden layer. It computes in float32."""

    def __init__(self, rngs: nnx.Rngs, budgets: Sequence[int], width: int, taps: int) -> None:
        """``width``, ``taps``: C, and how many states an image has.

        Raises:
          UserError: there is nothing to choose from.
        """
        if len(budgets) < 2:
            raise UserError(f"model.chooser chooses among model.fusion.budgets, but they are {tuple(budgets)}.")
        self.norm = LayerNorm(rngs, width, 1e-5)
        self.hidden = Linear(rngs, [(2 * taps * width, "embed")], [(_HIDDEN, "mlp")])
        self.out = Linear(rngs, [(_HIDDEN, "mlp")], [(len(budgets) - 1, "channel")])

    def __call__(self, states: tuple[Float[Array, "B P C"], ...]) -> Float32[Array, "B K"]:
        """Logarithms of the expected divergences, from the tapped states of images."""
        with jax.named_scope("chooser"):
            pooled = [pool for x in states for pool in (x.astype(jnp.float32).mean(1), x.astype(jnp.float32).max(1))]
            x = self.norm(jnp.stack(pooled, axis=1))
            return self.out(gelu(self.hidden(x.reshape(len(x), -1))))


def fewest_tokens(
    log_divergences: Float[np.ndarray, "*images K"], budgets: Sequence[int], tolerance: float
) -> Int[np.ndarray, "*images"]:
    """The fewest tokens whose expected divergence is within the tolerance; the most if none is.

    Args:
      log_divergences: of :class:`Chooser`.
      budgets: most first.
      tolerance: in nats per answer token.

    Returns:
      A budget for each image. A higher tolerance never gives more tokens.
    """
    with np.errstate(divide="ignore"):  # of 0
        fits = log_divergences <= np.log(np.float64(tolerance))
    return np.where(fits, np.asarray(budgets[1:]), budgets[0]).min(-1)
