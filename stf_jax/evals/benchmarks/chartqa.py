"""ChartQA: questions about charts, by people and made from summaries (Masry et al., 2022); the test split.

The protocol is lmms-eval's task ``chartqa``, version 0.7.3: lmms_eval/tasks/chartqa/{chartqa.yaml, utils.py} in
EvolvingLMMs-Lab/lmms-eval. Its relaxed correctness is that of Qwen-VL's evaluate_vqa.py. The files are
``data/test-*.parquet`` of the data set lmms-lab-encoder/ChartQA on the Hub (formerly lmms-lab/ChartQA), or
``test/test_human.json``, ``test_augmented.json`` and ``png/`` of the authors' ChartQA Dataset.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from stf_jax.config import UserError, did_you_mean
from stf_jax.evals.authors import AuthorsFile
from stf_jax.evals.benchmark import accuracy_by_kind
from stf_jax.evals.hub import HubBenchmark, mean
from stf_jax.evals.matching import RELAXED_RULE, is_relaxed_match
from stf_jax.evals.tables import Columns, Row

_SPLITS = {"human_test": "human", "augmented_test": "augmented"}


class ChartQA(HubBenchmark):
    """2,500 questions about charts: 1,250 by people, 1,250 made from summaries by a model."""

    name = "chartqa"
    folders = ("chartqa", "ChartQA")
    groups = ("ocr",)
    repository = "lmms-lab-encoder/ChartQA"
    max_new_tokens = 16
    rule = RELAXED_RULE
    columns: ClassVar[Columns] = {"type": ("text",), "question": ("text",), "answer": ("text",), "image": ("image",)}
    authors = tuple(
        AuthorsFile(
            (f"test/{name}", name),
            "imgname",
            ("test/png", "png"),
            {"question": "query", "answer": "label"},
            {"type": kind},
        )
        for name, kind in (("test_human.json", "human_test"), ("test_augmented.json", "augmented_test"))
    )

    def make_prompt(self, row: Row) -> str:
        return f"{row['question']}\nAnswer the question with a single word."

    def check_row(self, row: Row) -> None:
        if row["type"] not in _SPLITS:
            raise UserError(f"{row.name}: unknown type {row['type']!r}; {did_you_mean(row['type'], _SPLITS)}")

    def score(self, text: str, row: Row) -> float:
        return float(is_relaxed_match(text, row["answer"]))

    def metrics(self, texts: Sequence[str]) -> dict[str, Any]:
        """Computes the accuracy: lmms-eval's ``relaxed_overall``, ``…_human_split`` and ``…_augmented_split``."""
        correct = self.score_rows(texts)
        splits = accuracy_by_kind([_SPLITS[row["type"]] for row in self.rows], correct)
        return {"accuracy": mean(correct), "by_split": splits}


COMPONENTS = {ChartQA.name: ChartQA}
