"""The embedded benchmark: questions on held-out scenes, by kind, beside the same model shown a blank picture."""

import dataclasses
import json
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import tqdm
from etils import epath

from stf_jax.config import TrainConfig
from stf_jax.data.conversation import Encoded, encode, template_items
from stf_jax.data.image import to_square
from stf_jax.data.records import IMAGE_MARK, Record, Turn
from stf_jax.data.scenes import KINDS, MOST_THINGS, SHORT_ANSWER, Question, draw, make_scene, questions
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.inference.greedy import GreedyAnswers
from stf_jax.models.presets import vision_preset
from stf_jax.models.vlm import slots_per_image
from stf_jax.runtime.mesh import make_mesh
from stf_jax.training.state import Blueprint, Params

SEED = 1_000_003  # of the held-out pictures, whatever a run trained on
_ANSWER_TOKENS = 6  # the longest answer is a word spelt in letters, and its end


@dataclasses.dataclass(frozen=True)
class Answered:
    """A question on a picture, with the model's answer to it and to the same question on a blank picture."""

    picture: PIL.Image.Image
    question: Question
    answer: str
    blank_answer: str

    @property
    def right(self) -> bool:
        """Whether the answer is the truth, letter case aside."""
        return self.answer.lower() == self.question.answer.lower()

    @property
    def blank_right(self) -> bool:
        """The same for the blank picture."""
        return self.blank_answer.lower() == self.question.answer.lower()


def held_out_questions(pictures: int, most: int = MOST_THINGS) -> list[tuple[PIL.Image.Image, Question]]:
    """One question of each kind that the picture allows, for so many held-out pictures of up to ``most`` things."""
    asked = []
    for index in range(pictures):
        scene = make_scene(SEED, index, held_out=True, most=most)
        picture = draw(scene, index)
        asked += [(picture, question) for question in questions(scene, np.random.default_rng([SEED, index]), True)]
    return asked


def measure(config: TrainConfig, plan: Blueprint, params: Params, workdir: epath.Path) -> dict[str, Any]:
    """Answers the held-out questions; writes ``results.json``, ``answers.jsonl`` and ``contact_sheet.png``.

    Returns:
      What ``results.json`` holds: ``benchmark``, ``metrics`` (shares of right answers in 0..1: ``accuracy``,
      ``blank_image_accuracy``, ``by_kind``), ``questions``, ``model``.
    """
    tokenizer, vision = load_tokenizer(config.data.tokenizer), vision_preset(config.model.vision)
    slots = slots_per_image(config.model)
    asked = held_out_questions(config.benchmark_pictures, config.data.scenes.things)
    prompts = [_prompt(config, tokenizer, slots, *item) for item in asked]
    images = [to_square(picture, vision, config.data.aspect)[None] for picture, _ in asked]
    blank = np.broadcast_to(np.uint8(np.array(vision.mean) * 255), images[0].shape)
    answers = GreedyAnswers(plan, params, tokenizer, make_mesh(config.mesh), _ANSWER_TOKENS, config.data.template)
    said = list(tqdm.tqdm(answers(prompts, images), "answers", len(prompts), unit="question"))
    said_blank = list(tqdm.tqdm(answers(prompts, [blank] * len(images)), "blank", len(prompts), unit="question"))
    answered = [Answered(*item, *pair) for item, pair in zip(asked, zip(said, said_blank, strict=True), strict=True)]

    name = f"{config.model.vision} + {config.model.fusion.fusion} ({slots} tokens) + {config.model.llm}"
    results = {"benchmark": "scenes", "metrics": score(answered), "questions": len(answered), "model": name}
    with (workdir / "answers.jsonl").open("w") as file:
        for item in answered:
            row = {"kind": item.question.kind, "question": item.question.text, "truth": item.question.answer}
            file.write(json.dumps(row | {"answer": item.answer, "blank_image_answer": item.blank_answer}) + "\n")
    with (workdir / "contact_sheet.png").open("wb") as file:
        contact_sheet(answered).save(file, "PNG")
    (workdir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return results


def _prompt(config, tokenizer, slots, picture, question) -> Encoded:
    text = f"{IMAGE_MARK}\n{question.text}\n{SHORT_ANSWER}"
    record = Record("held-out", (picture.copy,), (Turn("human", text),))
    return encode(template_items(config.data.template, record), tokenizer, slots)


def score(answered: Sequence[Answered]) -> dict[str, Any]:
    """Shares of right answers, over all questions and by kind, with the picture and with a blank one."""

    def shares(items):
        return {
            "accuracy": sum(item.right for item in items) / len(items),
            "blank_image_accuracy": sum(item.blank_right for item in items) / len(items),
        }

    by_kind = {kind: [item for item in answered if item.question.kind == kind] for kind in KINDS}
    table = {kind: shares(items) | {"questions": len(items)} for kind, items in by_kind.items() if items}
    return shares(answered) | {"by_kind": table}


def table(results: dict[str, Any]) -> str:
    """The results for people to read, in percent."""
    metrics = results["metrics"]
    lines = [results["model"], f"{'question':<12}{'n':>6}{'accuracy':>11}{'blank picture':>16}"]
    rows = metrics["by_kind"] | {"all": metrics | {"questions": results["questions"]}}
    for kind, row in rows.items():
        shares = f"{row['accuracy']:>10.1%} {row['blank_image_accuracy']:>15.1%}"
        lines.append(f"{kind:<12}{row['questions']:>6}{shares}")
    return "\n".join(lines)


def contact_sheet(answered: Sequence[Answered], columns: int = 6, rows: int = 4) -> PIL.Image.Image:
    """Pictures with question, answer and truth; right answers green, wrong ones red.

    Dealt evenly over the kinds, each from further down its list, so that few pictures come twice.
    """
    by_kind = [[item for item in answered if item.question.kind == kind] for kind in KINDS]
    by_kind = [items for items in by_kind if items]
    rounds = range(-(-columns * rows // len(by_kind)))
    dealt = [items[(i * len(by_kind) + j) % len(items)] for i in rounds for j, items in enumerate(by_kind)]
    width, picture_side, text_height = 232, 208, 92
    cell_height = picture_side + text_height
    sheet = PIL.Image.new("RGB", (columns * width, rows * cell_height), "white")
    canvas = PIL.ImageDraw.Draw(sheet)
    font = PIL.ImageFont.load_default(size=14)
    for i, item in enumerate(dealt[: columns * rows]):
        x, y = i % columns * width + 12, i // columns * cell_height + 12
        sheet.paste(item.picture.resize((picture_side, picture_side), PIL.Image.Resampling.NEAREST), (x, y))
        y += picture_side + 4
        canvas.text((x, y), textwrap.fill(item.question.text, 32), fill="black", font=font)
        canvas.text((x, y + 36), f"answer: {item.answer}", fill="#0a7d28" if item.right else "#c01818", font=font)
        canvas.text((x, y + 54), f"truth: {item.question.answer}", fill="#555555", font=font)
    return sheet
