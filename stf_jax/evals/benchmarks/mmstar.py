"""MMStar: multiple-choice questions that need the image, chosen from six benchmarks (Chen et al., 2024).

The protocol is lmms-eval's task ``mmstar``, version 0.7.3: lmms_eval/tasks/mmstar/{_default_template_yaml, mmstar.yaml,
utils.py} and lmms_eval/tasks/_task_utils/mcq_extract.py in EvolvingLMMs-Lab/lmms-eval. The file is ``mmstar.parquet``
of the data set Lin-Chen/MMStar on the Hub.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from stf_jax.config import UserError
from stf_jax.evals.benchmark import LETTER_SUFFIX
from stf_jax.evals.hub import HubBenchmark, mean
from stf_jax.evals.tables import Columns, Row

_LETTERS = "ABCD"
_ENDS = ",.!?;:'\""  # removed from both ends of an answer, each mark once, in this order
_PHRASES = (  # each counts from its first place on, so that one that contains another is not redundant
    *("the answer is", "answer is", "the correct answer is", "correct answer is", "the best answer is"),
    *("best answer is", "the correct option is", "correct option is", "the best option is", "best option is"),
    *("the choice is", "choice is", "the correct choice is", "correct choice is", "my answer is", "my choice is"),
    *("i choose", "i select", "i pick", "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)
_FORMS = ("({})", "{}.", "{}:", "{})", "{} ")  # of a letter, in order of precedence


class MMStar(HubBenchmark):
    """1,500 questions in six categories of three subcategories each."""

    name = "mmstar"
    folders = ("mmstar", "MMStar")
    groups = ("general",)
    repository = "Lin-Chen/MMStar"
    files = "mmstar.parquet"
    max_new_tokens = 1024  # lmms-eval's for LLaVA; the task has no limit
    rule = (
        "An answer chooses the letter it starts with, else the one it ends with, else the last one after a phrase such "
        "as 'the answer is' (of each letter, the first place after it), else the last one of the form (A), A., A:, A) "
        "or A before a space, in this order, else the last A, B, C or D. average is the mean over the subcategories."
    )
    columns: ClassVar[Columns] = {
        "index": ("integer", "text"),
        "question": ("text",),
        "answer": ("text",),
        "category": ("text",),
        "l2_category": ("text",),
        "image": ("image",),
    }
    id_column = "index"

    def make_prompt(self, row: Row) -> str:
        # lmms-eval's suffix has no full stop, and it removes MME's from the questions.
        return row["question"].strip().replace(" Please answer yes or no.", "") + LETTER_SUFFIX.removesuffix(".")

    def check_row(self, row: Row) -> None:
        if row["answer"].strip().upper() not in tuple(_LETTERS):
            raise UserError(f"{row.name}: the answer is {row['answer']!r}, not one of A, B, C, D.")

    def metrics(self, texts: Sequence[str]) -> dict[str, Any]:
        """Computes ``average``, lmms-eval's metric, ``accuracy`` over all questions, and both by category."""
        pairs = zip(texts, self.rows, strict=True)
        correct = [parse_choice(text) == row["answer"].strip().upper() for text, row in pairs]
        categories = sorted({row["category"] for row in self.rows})
        by_category = {name: self._score(correct, name) for name in categories}
        return self._score(correct, None) | {"by_category": by_category}

    def _score(self, correct: Sequence[bool], category: str | None) -> dict[str, Any]:
        """Scores a category, or all."""
        groups: dict[str, list[bool]] = {}
        for hit, row in zip(correct, self.rows, strict=True):
            if category in (None, row["category"]):
                groups.setdefault(row["l2_category"], []).append(hit)
        hits = [hit for group in groups.values() for hit in group]
        result = {"average": mean([mean(group) for group in groups.values()]), "accuracy": mean(hits)}
        return result if category is None else result | {"questions": len(hits)}


def parse_choice(text: str) -> str:
    """Returns the letter that an answer chooses by lmms-eval's rule, or an empty string."""
    text = text.strip()
    for mark in _ENDS:
        text = text.strip(mark)
    padded, word = f" {text} ", text.strip()
    for end, neighbor in ((word[:1], word[1:2]), (word[-1:], word[-2:-1])):
        if end and end in _LETTERS and not neighbor.isalpha():
            return end
    lower = padded.lower()
    places = [
        padded.find(letter, lower.find(phrase) + len(phrase))
        for phrase in _PHRASES
        if phrase in lower
        for letter in _LETTERS
    ]
    if places and max(places) >= 0:
        return padded[max(places)]
    for form in _FORMS + ("{}",):
        place, letter = max((padded.rfind(form.format(letter)), letter) for letter in _LETTERS)
        if place >= 0:
            return letter
    return ""


COMPONENTS = {MMStar.name: MMStar}
