"""Scores of single questions: ``scores.jsonl``, which comparisons read (comparisons/)."""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence

import PIL.Image
from etils import epath

from stf_jax.config import UserError
from stf_jax.evals.benchmark import Benchmark
from stf_jax.evals.files import read_jsonl
from stf_jax.files import open_atomic

SCORES = "scores.jsonl"


@dataclasses.dataclass(frozen=True)
class ScoredQuestion:
    """One line of the file: a question with its score.

    Attributes:
      question_id: the question's id, as text.
      prompt: the prompt, as in the answer file.
      image: the same for questions about the same image; None for a question without an image.
      answers: the answers: several if the question was asked repeatedly, with its options rotated.
      score: in 0..1.
      blank: whether it was asked about a blank image.
    """

    question_id: str
    prompt: str
    image: str | int | None
    answers: tuple[str, ...]
    score: float
    blank: bool = False


def write_scores(benchmark: Benchmark, texts: Sequence[str], file: epath.Path) -> None:
    """Writes the scores of a benchmark's questions; removes the file if the benchmark does not score them singly."""
    rows = score_questions(benchmark, texts)
    if not rows:
        file.unlink(missing_ok=True)
        return
    with open_atomic(file) as opened:
        for row in rows:
            opened.write(json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n")


def score_questions(benchmark: Benchmark, texts: Sequence[str]) -> list[ScoredQuestion]:
    """Scores single questions; empty if the benchmark does not, or has no labels."""
    numbers: dict[Callable[[], PIL.Image.Image], int] = {}
    rows = []
    for score in benchmark.scores(texts) if benchmark.scored else []:
        first = benchmark.questions[score.asked[0]]
        image = None if first.image is None else numbers.setdefault(first.image, len(numbers))
        answers = tuple(texts[index] for index in score.asked)
        rows.append(ScoredQuestion(str(first.id), first.prompt, image, answers, score.value, score.blank))
    return rows


def read_scores(file: epath.Path) -> list[ScoredQuestion]:
    """Reads the scores of a finished evaluation. Raises UserError for a malformed file, with the line number."""
    questions = []
    for number, row in read_jsonl(file):
        try:
            question = ScoredQuestion(**row)
            valid = (
                isinstance(question.question_id, str)
                and isinstance(question.prompt, str)
                and isinstance(question.image, str | int | None)
                and isinstance(question.answers, list)
                and all(isinstance(answer, str) for answer in question.answers)
                and type(question.score) in (int, float)
                and math.isfinite(question.score)
                and isinstance(question.blank, bool)
            )
        except TypeError:
            valid = False
        if not valid:
            raise UserError(f"{file}, line {number} is not a question's score; evaluate again to replace the file.")
        questions.append(dataclasses.replace(question, answers=tuple(question.answers)))
    return questions
