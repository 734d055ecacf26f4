"""AI2D: multiple-choice questions about diagrams of school science (Kembhavi et al., 2016); the test split.

The protocol is lmms-eval's task ``ai2d``, version 0.7.3: lmms_eval/tasks/ai2d/{ai2d.yaml, utils.py} and ``exact_match``
in lmms_eval/api/metrics.py, in EvolvingLMMs-Lab/lmms-eval. Labels in the diagrams are covered by letters, which is the
usual form. The files are ``data/test-*.parquet`` of the data set lmms-lab-encoder/ai2d on the Hub (formerly
lmms-lab/ai2d).
"""

import re
import string
from collections.abc import Sequence
from typing import Any, ClassVar

from stf_jax.config import UserError
from stf_jax.evals.benchmark import LETTER_SUFFIX
from stf_jax.evals.hub import HubBenchmark
from stf_jax.evals.tables import Columns, Row

_LETTER = re.compile(r"\s*([A-Z])\.")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class AI2D(HubBenchmark):
    """3,088 questions with four options each."""

    name = "ai2d"
    folders = ("ai2d",)
    groups = ("general",)
    repository = "lmms-lab-encoder/ai2d"
    max_new_tokens = 16
    rule = (
        "An answer that begins with a letter and a full stop chooses that letter. Any other answer is correct if it is "
        "the gold letter itself, ignoring case and punctuation."
    )
    columns: ClassVar[Columns] = {
        "question": ("text",),
        "options": ("list of text",),
        "answer": ("text", "integer"),
        "image": ("image",),
    }

    def make_prompt(self, row: Row) -> str:
        options = "\n".join(f"{chr(ord('A') + index)}. {option}" for index, option in enumerate(row["options"]))
        return f"{row['question']}\n{options}{LETTER_SUFFIX}"

    def check_row(self, row: Row) -> None:
        if str(row["answer"]) not in map(str, range(min(len(row["options"]), 26))):
            raise UserError(f"{row.name}: answer {row['answer']!r} is not the index of one of its options.")

    def metrics(self, texts: Sequence[str]) -> dict[str, Any]:
        pairs = zip(texts, self.rows, strict=True)
        correct = [parse_choice(text) == chr(ord("a") + int(row["answer"])) for text, row in pairs]
        return {"accuracy": sum(correct) / len(correct)}


def parse_choice(text: str) -> str:
    """Returns the letter that an answer begins with, in lowercase, or else the answer without punctuation."""
    found = _LETTER.match(text)
    return (found[1] if found else text.strip()).lower().translate(_PUNCTUATION)


COMPONENTS = {AI2D.name: AI2D}
