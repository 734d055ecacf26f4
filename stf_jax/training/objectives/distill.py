"""Distillation (arXiv 1503.02531): the model learns from the answers and from a frozen teacher of another fusion.

The loss is (1 − w)·cross-entropy + w·t²·KL(teacher ‖ model) over target tokens, with both distributions at the
temperature t. The teacher reads the same rows with its own number of tokens per image (training/teacher.py).
"""

import dataclasses

import jax

from stf_jax.checkpointing.params import SavedParams
from stf_jax.data.packing import Batch
from stf_jax.files import to_path
from stf_jax.models.vlm import VLM
from stf_jax.training.loss import Teaching, distillation_sum
from stf_jax.training.teacher import paired_hidden


@dataclasses.dataclass(frozen=True)
class Distill:
    """Cross-entropy mixed with the divergence from a teacher, in nats, over the batch's target tokens.

    Attributes:
      teacher: the workdir of a run, or a folder of imported weights.
      temperature: t.
      weight: w.
    """

    teacher: str
    temperature: float
    weight: float

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError("temperature must be above 0.")
        if not 0 <= self.weight <= 1:
            raise ValueError("weight must be at least 0, and at most 1.")
        if not self.teacher:
            raise ValueError("name the teacher, teacher=FOLDER.")
        if not SavedParams.exists_in(to_path(self.teacher)):
            raise ValueError(f"{self.teacher} is neither the workdir of a run nor a folder of imported weights.")

    def loss_sum(self, model: VLM, batch: Batch[jax.Array], packed: bool) -> jax.Array:
        hidden, teacher_hidden = paired_hidden(model, batch, packed)
        llm, teacher = model.llm, model.teacher.llm
        teaching = Teaching(self.temperature, self.weight, teacher.config.tied)
        student = hidden, llm.head_kernel, batch.targets, batch.loss_mask
        with jax.named_scope("loss"):
            return distillation_sum(*student, teacher_hidden, teacher.head_kernel, teaching, llm.config.tied)

    def count_terms(self, batch: Batch[jax.Array]) -> jax.Array:
        return batch.loss_mask.sum()


def distill(*, teacher: str = "", temperature: float = 1.0, weight: float = 0.5) -> Distill:
    """Distillation from the model in the folder ``teacher``."""
    return Distill(teacher, temperature, weight)


COMPONENTS = {"distill": distill}
