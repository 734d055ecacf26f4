"""SEED-Bench: multiple-choice questions of nine types about photographs (Li et al., 2023); without its videos.

The protocol is lmms-eval's task ``seedbench`` and its metric ``seed_image``, version 0.7.3: lmms_eval/tasks/seedbench/
{seedbench.yaml, utils.py} in EvolvingLMMs-Lab/lmms-eval. The files are ``data/test-*.parquet`` of the data set
lmms-lab-encoder/SEED-Bench on the Hub (formerly lmms-lab/SEED-Bench), which also contain the videos' frames, or the
authors' ``SEED-Bench.json`` with ``SEED-Bench-image/``.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from stf_jax.config import UserError
from stf_jax.evals.authors import AuthorsFile
from stf_jax.evals.benchmark import LETTER_SUFFIX, accuracy_by_kind
from stf_jax.evals.hub import HubBenchmark, mean
from stf_jax.evals.tables import Columns, Row

_TYPES: Mapping[int, str] = {  # of questions about images, as SEED-Bench.json numbers them
    1: "Scene Understanding",
    2: "Instance Identity",
    3: "Instance Attributes",
    4: "Instance Location",
    5: "Instances Counting",
    6: "Spatial Relation",
    7: "Instance Interaction",
    8: "Visual Reasoning",
    9: "Text Understanding",
}


class SEEDBench(HubBenchmark):
    """The 14,233 questions about images."""

    name = "seedbench"
    folders = ("seedbench", "seed_bench", "SEED-Bench")
    groups = ("general",)
    repository = "lmms-lab-encoder/SEED-Bench"
    max_new_tokens = 1024  # lmms-eval's for LLaVA; the task has no limit
    rule = "An answer chooses its first letter. It is correct if that is the gold letter, ignoring case."
    columns: ClassVar[Columns] = {
        "question_id": ("text", "integer"),
        "question_type_id": ("integer",),
        "data_type": ("text",),
        "question": ("text",),
        "choice_a": ("text",),
        "choice_b": ("text",),
        "choice_c": ("text",),
        "choice_d": ("text",),
        "answer": ("text",),
        "image": ("list of image",),
    }
    authors = (AuthorsFile(("SEED-Bench.json",), "data_id", ("SEED-Bench-image",), under="questions"),)
    id_column = "question_id"

    def is_asked(self, row: Row) -> bool:
        return row["data_type"] == "image"

    def make_prompt(self, row: Row) -> str:
        options = "".join(f"\n{letter}. {row[f'choice_{letter.lower()}']}" for letter in "ABCD")
        return row["question"] + options + LETTER_SUFFIX

    def check_row(self, row: Row) -> None:
        if row["answer"] not in tuple("ABCD"):
            raise UserError(f"{row.name}: the answer is {row['answer']!r}, not one of A, B, C, D.")
        if row["question_type_id"] not in _TYPES:
            raise UserError(f"{row.name}: {row['question_type_id']} is not a type of questions about images.")

    def score(self, text: str, row: Row) -> float:
        return float(text.strip()[:1].lower() == row["answer"].lower())

    def metrics(self, texts: Sequence[str]) -> dict[str, Any]:
        """Computes the accuracy, lmms-eval's ``seed_image``, and that of each type."""
        correct = self.score_rows(texts)
        by_type = accuracy_by_kind([_TYPES[row["question_type_id"]] for row in self.rows], correct)
        return {"accuracy": mean(correct), "by_type": by_type}


COMPONENTS = {SEEDBench.name: SEEDBench}
