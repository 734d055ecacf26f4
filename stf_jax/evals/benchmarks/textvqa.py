"""TextVQA: questions answered by text in the image (Singh et al., 2019); the validation split, version 0.5.1."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from stf_jax.config import UserError
from stf_jax.evals import vqa
from stf_jax.evals.benchmark import Benchmark
from stf_jax.evals.files import match_labels, read_labels

_ANNOTATORS = 10


class TextVQA(Benchmark):
    """LLaVA's ``llava_textvqa_val_v051_ocr.jsonl`` with TextVQA's ``TextVQA_0.5.1_val.json``."""

    name = "textvqa"
    folders = ("textvqa",)
    groups = ("paper",)
    rule = vqa.RULE

    def __init__(self, data: epath.Path) -> None:
        super().__init__(data)
        rows = self.read_rows(self.find("llava_textvqa_val_v051_ocr.jsonl"))
        self.questions = [self.make_question(row, "train_images") for row in rows]
        file = self.find("TextVQA_0.5.1_val.json")
        self.labels = (file,)
        labels = read_labels(file, "data", image_id=(str, int), question=str)
        # LLaVA's file has the image's id as question id, so labels are matched by image and question text.
        answers = {
            (str(label["image_id"]), label["question"].lower()): _read_ten_answers(label, f"{file}, label {number}")
            for number, label in enumerate(labels, start=1)
        }
        keys = [(str(row["question_id"]), row["text"].split("\n")[0].lower()) for row in rows]
        self._answers = match_labels(keys, answers, file)

    def metrics(self, texts: Sequence[str]) -> dict[str, Any]:
        return {"accuracy": statistics.fmean(vqa.accuracies(texts, self._answers[: len(self.questions)]))}


def _read_ten_answers(label: Mapping[str, Any], name: str) -> list[str]:
    answers = vqa.annotator_answers(label, name)
    if len(answers) != _ANNOTATORS:
        raise UserError(f"{name}: TextVQA has {_ANNOTATORS} answers per question, not {len(answers)}.")
    return answers


COMPONENTS = {TextVQA.name: TextVQA}
