"""An export beside the model that it was made from: the same questions, asked of one in PyTorch, of the other here.

Tools put a question to an export in different ways: through transformers' ``apply_chat_template``, or by rendering the
chat template and tokenising the text, as the processor does or as servers do, which add no special tokens. Each must
give the tokens that training gave.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import tqdm
from etils import epath
from safetensors import SafetensorError

from stf_jax.config import MeshConfig, UserError, short_message
from stf_jax.data.conversation import encode, template_items
from stf_jax.data.records import Record, Turn
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.evals.benchmark import WORD, Question
from stf_jax.evals.scenes import held_out_questions
from stf_jax.inference.loading import load_generator
from stf_jax.models.vlm import slots_per_image
from stf_jax.runtime.mesh import make_mesh
from stf_jax.weights.model import open_model
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

    Nothing is shared between them: the export's own processor prepares its images and prompts.

    Args:
      checkpoint: workdir of a run, or a folder of imported weights.
      export: folder that ``convert export --format=hf`` wrote; the code in it is run.
      questions: how many.
      limit: new tokens per answer at most.

    Raises:
      UserError: a folder that cannot be read; an export whose prompts are not those of training in every way that
        tools make them; PyTorch is not installed.
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
        Question(asked.index, asked.question.text + WORD, asked.image, asked.question.text)
        for asked in held_out_questions()[:questions]
    ]
    try:
        processor = AutoProcessor.from_pretrained(export, trust_remote_code=True, local_files_only=True)
        model = AutoModelForImageTextToText.from_pretrained(
            export, trust_remote_code=True, local_files_only=True, dtype=torch.float32
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{export} cannot be loaded with transformers: {short_message(error)}.") from None
    check_prompts(checkpoint, processor, asked)
    ours = _ours(checkpoint, asked, limit)
    pairs = []
    for question, answer in zip(tqdm.tqdm(asked, "PyTorch", unit="question"), ours, strict=True):
        inputs = processor.apply_chat_template(
            _turns(question.text, question.image()),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            said = model.generate(**inputs, max_new_tokens=limit, do_sample=False)
        said = processor.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        pairs.append(Pair(question.prompt, answer, said))
    return pairs


def check_prompts(checkpoint: epath.Path, processor: Any, asked: Sequence[Question]) -> None:
    """Compares the prompts of questions, and of the first without its image, with those of training.

    Args:
      processor: of the export, as ``AutoProcessor`` loads it.

    Raises:
      UserError: one that differs, with the way it is made and the first tokens of both.
    """
    saved = open_model(checkpoint)
    tokenizer, slots = load_tokenizer(str(saved.tokenizer)), slots_per_image(saved.config)
    records = [question.record() for question in asked]
    records.append(Record("text alone", (), (Turn("human", asked[0].text),)))
    texts = [question.text for question in asked] + [asked[0].text]
    for record, text in zip(records, texts, strict=True):
        images = [image() for image in record.images]
        prompt = encode(template_items(saved.description.template, record), tokenizer, slots)
        ours = np.where(prompt.is_image, processor.image_token_id, prompt.tokens).tolist()
        for way, theirs in _prompts(processor, _turns(text, *images), images, slots).items():
            if theirs != ours:
                at = next((i for i, pair in enumerate(zip(theirs, ours, strict=False)) if len(set(pair)) > 1), 0)
                found, wanted = (tokenizer.convert_ids_to_tokens(ids[at : at + 4]) for ids in (theirs, ours))
                raise UserError(
                    f"The export's prompts are not those of training: {way} gives {found} where training has {wanted} "
                    f"(token {at} of {len(ours)}); export {checkpoint} again."
                )


def _prompts(processor, turns, images, slots):
    """Token ids of a prompt by the way that makes them."""
    text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    applied = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True)
    rendered = processor(text=[text], images=images or None)
    filled = text.replace(processor.image_token, processor.image_token * slots)
    return {
        "apply_chat_template": applied["input_ids"][0],
        "the processor, called with the rendered template,": rendered["input_ids"][0],
        "a server (the rendered template, no special tokens added)": processor.tokenizer(
            filled, add_special_tokens=False
        ).input_ids,
    }


def _turns(text, *images):
    content = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


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
