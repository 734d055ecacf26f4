"""VQAv2: open questions about COCO images (Goyal et al., 2017); test-dev for the server, validation scored locally."""

import statistics
from collections.abc import Sequence
from typing import Any

from etils import epath

from stf_jax.evals import vqa
from stf_jax.evals.benchmark import Benchmark, accuracy_by_kind
from stf_jax.evals.files import index_by_id, match_labels, read_labels
from stf_jax.files import write_json

_TEST = "llava_vqav2_mscoco_test-dev2015.jsonl"
_IMAGES = {_TEST: "test2015", "llava_vqav2_mscoco_val2014.jsonl": "val2014"}


class VQAv2(Benchmark):
    """LLaVA's ``llava_vqav2_mscoco_test-dev2015.jsonl``, or ``…_val2014.jsonl`` with VQA's own annotations.

    The server only accepts answers to the complete test set; ``llava_vqav2_mscoco_test2015.jsonl`` lists its questions.
    """

    name = "vqav2"
    folders = ("vqav2",)
    groups = ("paper",)
    rule = vqa.RULE

    def __init__(self, data: epath.Path) -> None:
        super().__init__(data)
        file = self.find(*_IMAGES)
        self.questions = [self.make_question(row, _IMAGES[file.name]) for row in self.read_rows(file)]
        ids = [str(question.id) for question in self.questions]  # one file may have numbers, another strings
        self._all_ids: dict[str, str | int] | None = None
        test_set = self.find_any("llava_vqav2_mscoco_test2015.jsonl")
        if test_set is not None and file.name == _TEST:
            self._all_ids = {str(row["question_id"]): row["question_id"] for row in self.read_rows(test_set)}
            match_labels(ids, self._all_ids, test_set)
        annotations = self.find_any("v2_mscoco_val2014_annotations.json")
        if annotations is not None:
            self.labels = (annotations,)
            rows = read_labels(annotations, "annotations", question_id=(int, str), answer_type=str)
            labels = match_labels(ids, index_by_id(rows, "question_id", annotations), annotations)
            self._types = [label["answer_type"] for label in labels]
            self._answers = [
                vqa.annotator_answers(label, f"{annotations}, question {label['question_id']}") for label in labels
            ]

    def metrics(self, texts: Sequence[str]) -> dict[str, Any]:
        count = len(self.questions)
        scores = vqa.accuracies(texts, self._answers[:count])
        by_type = accuracy_by_kind(self._types[:count], scores)
        return {
            "accuracy": statistics.fmean(scores),
            "by_answer_type": {kind: entry["accuracy"] for kind, entry in by_type.items()},
        }

    def write_submission(self, texts: Sequence[str], out: epath.Path) -> list[epath.Path]:
        """Writes ``vqav2_submission.json``; questions that were not asked get empty answers."""
        answers = {str(question.id): vqa.normalize(text) for question, text in zip(self.questions, texts, strict=True)}
        ids = self._all_ids or {str(question.id): question.id for question in self.questions}
        file = out / "vqav2_submission.json"
        write_json(file, [{"question_id": value, "answer": answers.get(key, "")} for key, value in ids.items()])
        return [file]


COMPONENTS = {VQAv2.name: VQAv2}
