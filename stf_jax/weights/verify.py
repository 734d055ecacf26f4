"""An export beside the model that it was made from: the same questions, asked of one in PyTorch, of the other here."""

import dataclasses
import pathlib

import tqdm
from safetensors import SafetensorError

from stf_jax.config import MeshConfig, UserError, one_line
from stf_jax.evals.benchmark import WORD, Question
from stf_jax.evals.scenes import held_out_questions
from stf_jax.inference.loading import load_generator
from stf_jax.runtime.mesh import make_mesh
from stf_jax.weights.theirs import open_theirs

_ROWS = 16  # questions at once


@dataclasses.dataclass(frozen=True)
class Pair:
    """A question, and what both models answer."""

    question: str
    ours: str
    theirs: str


def verify(checkpoint: pathlib.Path, export: pathlib.Path, questions: int, limit: int) -> list[Pair]:
    """Asks both models about held-out scenes, greedily, in float32 on the CPU.

    Nothing is shared between them: the export's own processor prepares its pictures and prompts.

    Args:
      checkpoint: workdir of a run, or a folder of imported weights.
      export: folder that ``convert export --format=hf`` wrote; the code in it is run.
      questions: how many.
      limit: new tokens an answer at most.

    Raises:
      UserError: a folder that cannot be read; PyTorch is not installed.
    """
    if questions < 1 or limit < 1:
        raise UserError("--questions and --tokens must be at least 1.")
    try:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor
    except ImportError:
        raise UserError("Verifying an export runs it in PyTorch: install torch beside transformers.") from None
    open_theirs(str(export))  # what is wrong with its files is said before anything is asked
    asked = [
        Question(index, question.text + WORD, picture, question.text)
        for picture, index, question in held_out_questions(questions)
    ][:questions]
    ours = _ours(checkpoint, asked, limit)

    try:
        processor = AutoProcessor.from_pretrained(export, trust_remote_code=True, local_files_only=True)
        model = AutoModelForImageTextToText.from_pretrained(
            export, trust_remote_code=True, local_files_only=True, dtype=torch.float32
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{export} cannot be loaded with transformers: {one_line(error)}.") from None
    pairs = []
    for question, answer in zip(tqdm.tqdm(asked, "PyTorch", unit="question"), ours, strict=True):
        turn = {
            "role": "user",
            "content": [{"type": "image", "image": question.picture()}, {"type": "text", "text": question.text}],
        }
        inputs = processor.apply_chat_template(
            [turn], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            said = model.generate(**inputs, max_new_tokens=limit, do_sample=False)
        said = processor.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        pairs.append(Pair(question.prompt, answer, said))
    return pairs


def table(pairs: list[Pair]) -> str:
    """The answers side by side, for people to read."""
    width = max(len(pair.question) for pair in pairs) + 2
    lines = [f"{'question':<{width}}{'here':<16}PyTorch"]
    lines += [f"{pair.question:<{width}}{pair.ours:<16}{pair.theirs}" for pair in pairs]
    same = sum(pair.ours == pair.theirs for pair in pairs)
    return "\n".join([*lines, f"{same} of {len(pairs)} answers are the same."])


def _ours(checkpoint, asked, limit):
    generator, _ = load_generator(checkpoint, make_mesh(MeshConfig(1, 1, 1)), "float32")
    return list(generator.answers([question.record() for question in asked], limit, _ROWS))
