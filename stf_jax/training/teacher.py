"""A frozen teacher beside the model that trains: its weights, and what it computes for the same rows.

A teacher of another fusion reads another number of tokens per image, so its rows are longer or shorter than the
student's. The step makes them from the student's: each image is as many slots as the teacher has, and text is the same.

The parts that are the same in both, and frozen, exist once. Only frozen parts are shared, so no gradient reaches a
teacher.

Axis letters: B rows, T positions of the student, U of the teacher, M images per row, P patches, C tower width, D and E
widths of the language models of student and teacher.
"""

import dataclasses
from collections.abc import Collection

import jax
import jax.numpy as jnp
from etils import epath
from jaxtyping import Array, Float
from transformers import PreTrainedTokenizerFast

from stf_jax.checkpointing.frozen import FROZEN
from stf_jax.checkpointing.items import IO_ERRORS, read_shapes, to_absolute
from stf_jax.checkpointing.params import newest_step
from stf_jax.config import TrainConfig, UserError
from stf_jax.data.packing import Batch
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.files import to_path
from stf_jax.models.blueprint import TEACHER, Blueprint, Params, TeacherSpec
from stf_jax.models.spec import resolve_model
from stf_jax.models.vlm import VLM
from stf_jax.training.budgets import change_slots
from stf_jax.training.objectives.base import find_objective
from stf_jax.weights.folder import find_origin, load_params
from stf_jax.weights.model import describe_folder


def find_teacher(config: TrainConfig, own: Collection[str], workdir: epath.Path | None = None) -> TeacherSpec | None:
    """The teacher that a run's objective asks for; None if it asks for none.

    Args:
      own: the parts (``vision``, ``llm``) that the rules train or quantize, so that a teacher cannot share them.
      workdir: of the run. Its checkpoint, if any, decides what is shared: the folders of the start may be gone.

    Raises:
      UserError: the folder does not describe a complete model, or one that cannot teach the run's.
    """
    folder = getattr(find_objective(config.objective, config.model), "teacher", "")
    if not folder:
        return None
    if config.data.aspect == "tiles":
        raise UserError("Distillation does not support tiles: choose another data.aspect than tiles.")
    description, teacher, _ = describe_folder(to_path(folder))
    if description.vision is None or description.llm is None or description.fusion is None:
        raise UserError(f"The teacher {folder} is not a complete model: it needs a vision tower, a fusion and an llm.")
    student = resolve_model(config.model)
    if schedule := student.schedule or teacher.schedule:
        raise UserError(
            f"Distillation compares all positions, but model.schedule={schedule} drops some: use another objective, or "
            "a student and a teacher without a schedule."
        )
    shapes = {"vision": (student.vision_shape, description.vision), "llm": (student.llm_shape, description.llm)}
    assert student.vision_shape is not None  # only complete models are trained
    assert student.llm_shape is not None
    for name, here, there in (
        ("images of {} pixels a side", student.vision_shape.image_size, description.vision.image_size),
        ("a vocabulary of {:,} tokens", student.llm_shape.vocab, description.llm.vocab),
    ):
        if here != there:
            raise UserError(
                f"The teacher {folder} has {name.format(there)}, but the model has {name.format(here)}; choose a "
                "teacher that has the same."
            )
    if workdir is not None and newest_step(workdir) is not None and (saved := _read_frozen(workdir)):
        shared = {part for part in shapes if not any(path.startswith(f"{TEACHER}/{part}/") for path in saved)}
    else:
        shared = {
            part
            for part, (here, there) in shapes.items()
            if part not in own
            and here == there
            and (origin := find_origin(config.init_from, config.init_missing, part))
            and origin == find_origin(folder, (), part)
        }
    computed = dataclasses.replace(
        teacher,
        **{key: getattr(config.model, key) for key in ("precision", "scan_layers", "attention")},
        remat="none",  # it has no backward pass
    )
    return TeacherSpec(folder, computed, frozenset(shared))


def _read_frozen(workdir: epath.Path) -> Collection[str]:
    """The paths of a run's frozen parameters; empty if they cannot be read."""
    try:
        return read_shapes(to_absolute(workdir) / FROZEN / FROZEN).keys()
    except IO_ERRORS:
        return ()


def check_tokenizer(plan: Blueprint, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raises UserError if the plan has a teacher whose tokenizer has other tokens."""
    if plan.teacher is None:
        return
    folder = plan.teacher.folder
    _, _, other = describe_folder(to_path(folder))
    if other is None:
        raise UserError(f"The teacher {folder} has no tokenizer, so its tokens cannot be compared with the model's.")
    if load_tokenizer(str(other)).get_vocab() != tokenizer.get_vocab():
        raise UserError(f"The teacher {folder} has another tokenizer; teacher and model need the same tokens.")


def load_teacher(plan: Blueprint, layout: dict[str, jax.ShapeDtypeStruct]) -> Params:
    """Loads the parameters of the plan's teacher that it does not share, by path; none without a teacher.

    Args:
      layout: of the frozen parameters.

    Raises:
      UserError: as :func:`stf_jax.weights.folder.load_params`.
    """
    if plan.teacher is None:
        return {}
    prefix = f"{TEACHER}/"
    leaves = {path.removeprefix(prefix): leaf for path, leaf in layout.items() if path.startswith(prefix)}

    def convert(path: str, value: jax.Array) -> Params:
        return {prefix + path: value.astype(leaves[path].dtype)}

    return load_params(plan.teacher.folder, leaves, [f"{part}/.*" for part in plan.teacher.shared], convert)


def paired_hidden(
    model: VLM, batch: Batch[jax.Array], packed: bool
) -> tuple[Float[Array, "B T D"], Float[Array, "B T E"]]:
    """Hidden states of the model and of its teacher for the same rows, each position beside the same one.

    At text, both have read the same text and images. The last slots of an image are beside each other, too, because
    they may come just before the first target token.

    Args:
      model: with a teacher.
      batch, packed: as of :class:`stf_jax.training.objectives.base.Objective`.
    """
    teacher, images = model.teacher, batch.images
    states = None
    if images.shape[1] and not hasattr(teacher, "vision"):
        states = model.tower_states(images, sorted({*model.taps, *teacher.taps}, reverse=True))
    if not hasattr(teacher, "llm"):
        teacher.llm = model.llm
    segments = batch.segment_ids if packed else None
    hidden = model.hidden(batch.tokens, batch.positions, segments, batch.image_slots, images, states)
    longer = images.shape[1] * max(teacher.slots - model.slots, 0)
    rows, ends = change_slots(batch, model.slots, teacher.slots, batch.tokens.shape[1] + longer)
    segments = rows.segment_ids if packed else None
    with jax.named_scope(TEACHER):
        teacher_hidden = teacher.hidden(rows.tokens, rows.positions, segments, rows.image_slots, images, states)
    return hidden, jnp.take_along_axis(teacher_hidden, ends[:, :, None], axis=1)
