"""LLaVA's answer files: JSON lines of ``question_id, prompt, text, answer_id, model_id, metadata``."""

import collections
import json
import uuid
from collections.abc import Sequence
from typing import Any

from etils import epath

from stf_jax.config import UserError, shorten
from stf_jax.evals.benchmark import Benchmark, Question
from stf_jax.evals.files import read_jsonl

_ALPHABET = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"  # shortuuid's


def answer_line(question: Question, place: int, text: str, model: str) -> str:
    """A line of an answer file.

    ``answer_id`` has the form that LLaVA's has (a shortuuid), but follows from the question and its place, so that the
    same answers make the same file.
    """
    value = uuid.uuid5(uuid.NAMESPACE_URL, f"{model}\n{place}\n{question.id}\n{question.prompt}").int
    digits = []
    for _ in range(22):
        value, digit = divmod(value, len(_ALPHABET))
        digits.append(_ALPHABET[digit])
    row = {"question_id": question.id, "prompt": question.prompt, "text": text, "answer_id": "".join(reversed(digits))}
    return json.dumps(row | {"model_id": model, "metadata": question.metadata}, ensure_ascii=False)


def read_answers(file: epath.Path) -> list[dict[str, Any]]:
    """The rows of an answer file. Raises UserError for one that is none, naming the line."""
    if not file.exists():
        raise UserError(f"There is no answer file {file}.")
    rows = []
    for number, row in read_jsonl(file):
        fits = isinstance(row, dict) and isinstance(row.get("question_id"), (str, int))
        if not fits or not isinstance(row.get("text"), str):
            raise UserError(f"{file}, line {number}: an answer needs question_id and text.")
        rows.append(row)
    return rows


def match_answers(benchmark: Benchmark, rows: Sequence[dict[str, Any]], file: epath.Path) -> list[str]:
    """One text for each of the benchmark's questions, in their order.

    Rows are told by ``question_id`` and, where a question shares its with others, by ``prompt`` too. Rows of questions
    that :meth:`Benchmark.first` left out are passed over where there are such.

    Raises:
      UserError: a question has no answer, or two that differ; an answer is of no question.
    """
    shared = collections.Counter(str(question.id) for question in benchmark.questions)
    if benchmark.limited:  # the others of an id may be among those that were left out
        shared |= collections.Counter(str(row["question_id"]) for row in rows)

    def key(identity, prompt):
        identity = str(identity)
        return (identity, prompt) if shared[identity] > 1 else (identity, "")

    found: dict[tuple, str] = {}
    strangers = []
    wanted = {key(question.id, question.prompt) for question in benchmark.questions}
    for row in rows:
        name, text = key(row["question_id"], row.get("prompt")), row["text"].strip()
        if name not in wanted:
            strangers.append(row["question_id"])
        elif found.setdefault(name, text) != text:
            raise UserError(f"{file} answers question {shorten(repr(row['question_id']))} twice, and not alike.")
    lacking = [q.id for q in benchmark.questions if key(q.id, q.prompt) not in found]
    if strangers and not benchmark.limited:
        raise UserError(
            f"{file} is not of these questions: {len(strangers)} of its {len(rows)} answers are of none of them, such "
            f"as {shorten(repr(strangers[0]))}."
        )
    if lacking:
        raise UserError(
            f"{file} leaves {len(lacking)} of {len(benchmark.questions)} questions unanswered, such as "
            f"{shorten(repr(lacking[0]))}."
        )
    return [found[key(question.id, question.prompt)] for question in benchmark.questions]
