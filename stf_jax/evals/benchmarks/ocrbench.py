"""OCRBench: reading text, from words to formulas, in 29 data sets (Liu et al., 2023).

The protocol is lmms-eval's task ``ocrbench``, version 0.7.3: lmms_eval/tasks/ocrbench/{ocrbench.yaml, utils.py} in
EvolvingLMMs-Lab/lmms-eval, which reads fullwidth letters and digits as normal ones. The files are
``data/test-*.parquet`` of the data set echo840/OCRBench on the Hub, or the authors' ``OCRBench.json`` with
``OCRBench_Images/``.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from stf_jax.config import UserError
from stf_jax.evals.authors import AuthorsFile
from stf_jax.evals.benchmark import accuracy_by_kind
from stf_jax.evals.hub import HubBenchmark, mean
from stf_jax.evals.tables import Columns, Row

TYPES = (
    "Regular Text Recognition",
    "Irregular Text Recognition",
    "Artistic Text Recognition",
    "Handwriting Recognition",
    "Digit String Recognition",
    "Non-Semantic Text Recognition",
    "Scene Text-centric VQA",
    "Doc-oriented VQA",
    "Key Information Extraction",
    "Handwritten Mathematical Expression Recognition",
)
_FORMULAS = "HME100k"  # its answers are formulas, where case matters and spaces do not
_HALF_WIDTH: Mapping[int, int] = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: ord(" ")}


class OCRBench(HubBenchmark):
    """1,000 questions of ten types."""

    name = "ocrbench"
    folders = ("ocrbench", "OCRBench")
    groups = ("ocr",)
    repository = "echo840/OCRBench"
    rule = (
        "An answer is correct if it contains one of the gold answers, ignoring case and the width of letters; a line "
        f"break counts as a space. In questions of {_FORMULAS} case matters, and spaces do not. score is the number of "
        "correct answers; of all 1,000 questions, it is the one in papers."
    )
    columns: ClassVar[Columns] = {
        "dataset": ("text",),
        "question": ("text",),
        "question_type": ("text",),
        "answer": ("list of text",),
        "image": ("image",),
    }
    authors = (
        AuthorsFile(
            ("OCRBench.json", "OCRBench/OCRBench.json"),
            "image_path",
            ("OCRBench_Images",),
            {"dataset": "dataset_name", "question_type": "type", "answer": "answers"},
        ),
    )

    def make_prompt(self, row: Row) -> str:
        return row["question"].strip()

    def check_row(self, row: Row) -> None:
        if row["question_type"] not in TYPES:
            raise UserError(f"{row.name}: {row['question_type']!r} is none of OCRBench's types of questions.")

    def score(self, text: str, row: Row) -> float:
        is_formula = row["dataset"] == _FORMULAS
        return float(any(contains_answer(text, answer, formula=is_formula) for answer in row["answer"]))

    def metrics(self, texts: Sequence[str]) -> dict[str, Any]:
        correct = self.score_rows(texts)
        by_type = accuracy_by_kind([row["question_type"] for row in self.rows], correct)
        return {"accuracy": mean(correct), "score": sum(correct), "by_type": by_type}


def contains_answer(text: str, answer: str, *, formula: bool) -> bool:
    """Whether an answer contains the gold answer; ``formula``: whether both are formulas."""
    if formula:
        text, answer = (part.strip().replace("\n", "").replace(" ", "") for part in (text, answer))
    else:
        text, answer = (part.translate(_HALF_WIDTH).lower().strip().replace("\n", " ") for part in (text, answer))
    return answer in text


COMPONENTS = {OCRBench.name: OCRBench}
