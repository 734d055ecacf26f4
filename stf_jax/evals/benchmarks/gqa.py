"""GQA: questions composed from scene graphs (Hudson and Manning, 2019); the balanced testdev split."""

import statistics
from collections.abc import Sequence
from typing import Any

from etils import epath

from stf_jax.config import UserError
from stf_jax.evals.benchmark import Benchmark, accuracy_by_kind
from stf_jax.evals.files import match_labels, read_json
from stf_jax.files import write_json

_LABELS = "testdev_balanced_questions.json"
_Label = tuple[str, str, str]  # the gold answer, the structural and the semantic type


class GQA(Benchmark):
    """LLaVA's ``llava_gqa_testdev_balanced.jsonl`` with GQA's ``testdev_balanced_questions.json``.

    The metrics are those of GQA's ``eval.py``: accuracy over all, binary and open questions, and by structural and
    semantic type.
    """

    name = "gqa"
    folders = ("gqa",)
    groups = ("paper",)
    rule = (
        "An answer, in lower case and without full stops at its end, is correct if it equals the gold answer. "
        "Questions of structural type query are open; all others are binary."
    )

    def __init__(self, data: epath.Path) -> None:
        super().__init__(data)
        rows = self.read_rows(self.find("llava_gqa_testdev_balanced.jsonl"))
        self.questions = [self.make_question(row, "data/images", "images") for row in rows]
        folders = ("", "data/", "data/questions1.2/", "questions1.2/")
        file = self.find_any(*(f"{folder}{_LABELS}" for folder in folders))
        if file is not None:
            self.labels = (file,)
            self._labels = match_labels([str(question.id) for question in self.questions], _read_labels(file), file)

    def metrics(self, texts: Sequence[str]) -> dict[str, Any]:
        labels = self._labels[: len(self.questions)]
        correct = [normalize_answer(text) == gold for text, (gold, _, _) in zip(texts, labels, strict=True)]
        _, structural, semantic = zip(*labels, strict=True)
        by_answer = accuracy_by_kind(["open" if kind == "query" else "binary" for kind in structural], correct)
        return {
            "accuracy": statistics.fmean(correct),
            **{kind: entry["accuracy"] for kind, entry in by_answer.items()},
            "by_structural": accuracy_by_kind(structural, correct),
            "by_semantic": accuracy_by_kind(semantic, correct),
        }

    def write_submission(self, texts: Sequence[str], out: epath.Path) -> list[epath.Path]:
        """Writes ``testdev_balanced_predictions.json`` for GQA's ``eval.py``."""
        file = out / "testdev_balanced_predictions.json"
        pairs = zip(self.questions, texts, strict=True)
        write_json(file, [{"questionId": str(q.id), "prediction": normalize_answer(text)} for q, text in pairs])
        return [file]


def normalize_answer(text: str) -> str:
    """Lowercases an answer and strips full stops at its end."""
    return text.rstrip(".").lower()  # exactly LLaVA's rule: "yes. ." becomes "yes. "


def _read_labels(file: epath.Path) -> dict[str, _Label]:
    labels = read_json(file)
    if not isinstance(labels, dict):
        raise UserError(f"{file} is not a JSON object keyed by question id; use GQA's own file.")
    found = {}
    for key, label in labels.items():
        try:
            found[key] = label["answer"], label["types"]["structural"], label["types"]["semantic"]
            if not all(isinstance(text, str) for text in found[key]):
                raise TypeError
        except (KeyError, TypeError):
            raise UserError(
                f"{file}, question {key}: a label needs answer, types.structural and types.semantic."
            ) from None
    return found


COMPONENTS = {GQA.name: GQA}
