"""Helpers for tests of evaluation: a tiny model, a small GQA, and a benchmark with fixed questions."""

import json
import pathlib
import shutil
from collections.abc import Sequence

import numpy as np
import PIL.Image
from tiny import large_params, tiny

from stf_jax.checkpointing.params import write_params
from stf_jax.data.tokenizer import MINIATURE
from stf_jax.evals.benchmark import SHORT_ANSWER_SUFFIX, Benchmark, Question
from stf_jax.models.blueprint import blueprint
from stf_jax.models.spec import llm_preset, vision_preset
from stf_jax.weights.model import Description

COLORS = ("red", "grün", "blue", "紺")
QUESTIONS = 44  # not a multiple of the batch size of eight


class FixedBenchmark(Benchmark):
    """A benchmark with the questions that a test passes; the correct answer is always yes."""

    name = "given"
    folders = ("given",)
    rule = "Yes is correct."
    scored = True

    def __init__(self, questions: Sequence[Question], labels=()):
        self.questions, self.labels = list(questions), tuple(labels)

    def metrics(self, texts):
        correct = [text == "yes" for text in texts]
        assert len(correct) == len(self.questions)
        return {"accuracy": sum(correct) / len(correct)}


def make_model(folder: pathlib.Path, seed: int = 0, **changes) -> pathlib.Path:
    """Writes a tiny model with random weights, as an import does; its answers depend on the images.

    ``changes``: changes to the tiny config, by dotted keys.
    """
    folder.mkdir()
    config = tiny(**changes).model
    shapes = vision_preset(config.vision), llm_preset(config.llm), config.fusion
    Description(*shapes, schedule=config.schedule).save(folder)
    shutil.copytree(MINIATURE, folder / "tokenizer")
    write_params(folder, large_params(blueprint(config).shapes, seed).items())
    return folder


def make_gqa(folder: pathlib.Path) -> list[str]:
    """Writes LLaVA's and GQA's files of :data:`QUESTIONS` questions to ``folder/gqa``; returns the gold answers."""
    images = folder / "gqa" / "images"
    images.mkdir(parents=True)
    rng, rows, labels = np.random.default_rng(3), [], {}
    for number in range(QUESTIONS):
        PIL.Image.fromarray(rng.integers(0, 256, (40, 56, 3), np.uint8)).save(images / f"n{number}.png")
        key, gold = f"20{number:04}", COLORS[number % 4]
        text = f"Is the thing on the {'left' if number % 3 else 'right'} {gold}?{SHORT_ANSWER_SUFFIX}"
        rows.append({"question_id": key, "image": f"n{number}.png", "text": text, "category": "default"})
        types = {"structural": ("query", "verify")[number % 2], "semantic": "attr"}
        labels[key] = {"question": text, "answer": gold, "types": types}
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "gqa" / "llava_gqa_testdev_balanced.jsonl").write_text(lines, encoding="utf-8")
    (folder / "gqa" / "testdev_balanced_questions.json").write_text(json.dumps(labels))
    return [label["answer"] for label in labels.values()]
