"""What an objective is: a loss that is a mean over terms of the global batch.

An objective is an object in a file of this folder, or in your own, named in a config as ``package.module:thing``; or a
function that returns one and whose keyword-only parameters are its options (registry.py).

An objective that needs a frozen model beside the one that trains has one more attribute, ``teacher``, the folder of
that model: the workdir of a run or imported weights. Its loss gets the hidden states of both from
:func:`stf_jax.training.teacher.paired_hidden`, and finds the teacher as ``model.teacher``.

An objective that compares what a model answers at several budgets has the attribute ``compares_budgets = True``. Its
loss gets each batch as it is planned, with all its budgets, where that of others gets the rows of one.

An objective that not every config can have has a method ``check(config)``, which raises UserError.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax

from stf_jax.config import ModelConfig, UserError
from stf_jax.data.packing import Batch
from stf_jax.models.vlm import VLM
from stf_jax.registry import Registry


@runtime_checkable
class Objective(Protocol):
    """A loss, as the sum and the number of its terms, so that training can take the mean over the global batch."""

    def loss_sum(self, model: VLM, batch: Batch[jax.Array], packed: bool) -> jax.Array:
        """The loss summed over the batch's terms: float32 [].

        Args:
          model: with all its weights.
          batch: some rows of the global batch.
          packed: whether rows hold several conversations. A row that is not packed is one conversation, with padding
            behind it that no token attends to, so its attention is plainly causal, which every kernel supports.
        """
        ...

    def count_terms(self, batch: Batch[jax.Array]) -> jax.Array:
        """The number of terms of a batch: int32 []."""
        ...


OBJECTIVES: Registry[Objective | Callable[..., Objective]] = Registry("objective", "stf_jax.training.objectives")


def find_objective(name: str, model: ModelConfig) -> Objective:
    """The objective of that name, as ``config.objective``, with the options in it.

    Raises:
      UserError: an unknown name, wrong options, or something that is not an objective.
    """
    found = OBJECTIVES.make(name or ("cells" if model.cells else "choose" if model.chooser else "next_token"))
    if isinstance(found, type) or not isinstance(found, Objective):
        raise UserError(f"objective={name} is not an object with the methods loss_sum and count_terms.")
    return found
