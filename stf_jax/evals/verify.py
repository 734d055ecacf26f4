"""Compares an export in PyTorch with the model that it was made from, on the same questions.

Tools build a prompt in different ways: with transformers' ``apply_chat_template``, or by rendering the chat template
and tokenizing the text, either with the processor or as servers do, which add no special tokens. Each must give the
same tokens as training.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import tqdm
from etils import epath
from safetensors import SafetensorError

from stf_jax.config import MeshConfig, UserError, short_message
from stf_jax.data.conversation import encode, template_items
from stf_jax.data.records import Record, Turn
from stf_jax.data.tiles import ImageLayout
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.evals.benchmark import SHORT_ANSWER_SUFFIX, Question
from stf_jax.evals.benchmarks.scenes import held_out_questions
from stf_jax.inference.loading import load_generator
from stf_jax.parallel.mesh import make_mesh
from stf_jax.weights.foreign import open_checkpoint
from stf_jax.weights.model import open_model

_BATCH_SIZE = 16


@dataclasses.dataclass(frozen=True)
class AnswerPair:
    """A question and the answers of both models."""

    question: str
    jax: str
    pytorch: str


def verify(checkpoint: epath.Path, export: pathlib.Path, num_questions: int, max_new_tokens: int) -> list[AnswerPair]:
    """Asks both models about held-out scenes, with greedy decoding in float32 on the CPU.

    They share no code: the export's own processor prepares its images and prompts.

    Args:
      checkpoint: workdir of a run, or a folder of imported weights.
      export: folder that ``convert export --format=hf`` wrote; the code in it is run.
      num_questions: number of questions.
      max_new_tokens: maximum number of new tokens per answer.

    Raises:
      UserError: a folder cannot be read; some way of building prompts for the export does not give the tokens of
        training; PyTorch is not installed.
    """
    if num_questions < 1 or max_new_tokens < 1:
        raise UserError("--questions and --tokens must be at least 1.")
    try:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor
    except ImportError:
        raise UserError("Verifying an export runs it in PyTorch: install torch beside transformers.") from None
    open_checkpoint(str(export))  # reports damaged files early
    questions = [
        Question(scene.index, scene.question.text + SHORT_ANSWER_SUFFIX, scene.image, scene.question.text)
        for scene in held_out_questions()[:num_questions]
    ]
    try:
        processor = AutoProcessor.from_pretrained(export, trust_remote_code=True, local_files_only=True)
        model: Any = AutoModelForImageTextToText.from_pretrained(
            export, trust_remote_code=True, local_files_only=True, dtype=torch.float32
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{export} cannot be loaded with transformers: {short_message(error)}.") from None
    check_prompts(checkpoint, processor, questions)
    answers = _answer_in_jax(checkpoint, questions, max_new_tokens)
    pairs = []
    for question, answer in zip(tqdm.tqdm(questions, "PyTorch", unit="question"), answers, strict=True):
        assert question.image is not None  # every scene has one
        inputs = processor.apply_chat_template(
            _turns(question.text, question.image()),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        text = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        pairs.append(AnswerPair(question.prompt, answer, text))
    return pairs


def check_prompts(checkpoint: epath.Path, processor: Any, questions: Sequence[Question]) -> None:
    """Compares the prompts of questions, and of the first one without its image, with those of training.

    Args:
      checkpoint: as for :func:`verify`.
      processor: the export's processor, loaded by ``AutoProcessor``.
      questions: the questions.

    Raises:
      UserError: a prompt differs; the message names how it was built and the first differing tokens.
    """
    saved = open_model(checkpoint)
    tokenizer, model, description = load_tokenizer(str(saved.tokenizer)), saved.config, saved.description
    assert model.vision_shape is not None  # an export is a complete model
    layout = ImageLayout(model.vision_shape, description.aspect, model.slots, description.tiles)
    records = [question.to_record() for question in questions]
    records.append(Record("text alone", (), (Turn("human", questions[0].text),)))
    texts = [question.text for question in questions] + [questions[0].text]
    for record, text in zip(records, texts, strict=True):
        images = [image() for image in record.images]
        slots = layout.slots([image.size for image in images])
        prompt = encode(template_items(description.template, record), tokenizer, slots)
        expected = np.where(prompt.is_image, processor.image_token_id, prompt.tokens).tolist()
        for method, ids in _build_prompts(processor, _turns(text, *images), images, sum(map(len, slots))).items():
            if ids != expected:
                pairs = enumerate(itertools.zip_longest(ids, expected))
                first = next(i for i, (one, other) in pairs if one != other)
                got, want = (tokenizer.convert_ids_to_tokens(row[first : first + 4]) for row in (ids, expected))
                raise UserError(
                    f"The export's prompts differ from those of training: {method} gives {got} where training has "
                    f"{want} (token {first} of {len(expected)}); export {checkpoint} again."
                )


def _build_prompts(
    processor: Any, turns: list[dict[str, Any]], images: list[PIL.Image.Image], slots: int
) -> dict[str, list[int]]:
    """Returns the token ids of a prompt by the method that builds it; ``slots`` are those of its image, if any."""
    text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    applied = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True)
    rendered = processor(text=[text], images=images or None)
    expanded = text.replace(processor.image_token, processor.image_token * slots)
    return {
        "apply_chat_template": applied["input_ids"][0],
        "the processor, called with the rendered template,": rendered["input_ids"][0],
        "a server (the rendered template, no special tokens added)": processor.tokenizer(
            expanded, add_special_tokens=False
        ).input_ids,
    }


def _turns(text: str, *images: PIL.Image.Image) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def format_table(pairs: list[AnswerPair]) -> str:
    """Formats the answers side by side."""
    width = max(len(pair.question) for pair in pairs) + 2
    lines = [f"{'question':<{width}}{'JAX':<16}PyTorch"]
    lines += [f"{pair.question:<{width}}{pair.jax:<16}{pair.pytorch}" for pair in pairs]
    same = sum(pair.jax == pair.pytorch for pair in pairs)
    return "\n".join([*lines, f"{same} of {len(pairs)} answers are the same."])


def _answer_in_jax(checkpoint: epath.Path, questions: Sequence[Question], max_new_tokens: int) -> list[str]:
    generator, _ = load_generator(checkpoint, make_mesh(MeshConfig(1, 1, 1)), "float32")
    return list(generator.generate([question.to_record() for question in questions], max_new_tokens, _BATCH_SIZE))
