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


def answer_line(question: Question, index: int, text: str, model: str) -> str:
    """Formats one line of an answer file.

    ``answer_id`` has LLaVA's form (a shortuuid), but is computed from the question and its index, so that the same
    answers give the same file.
    """
    value = uuid.uuid5(uuid.NAMESPACE_URL, f"{model}\n{index}\n{question.id}\n{question.prompt}").int
    digits = []
    for _ in range(22):
        value, digit = divmod(value, len(_ALPHABET))
        digits.append(_ALPHABET[digit])
    row = {"question_id": question.id, "prompt": question.prompt, "text": text, "answer_id": "".join(reversed(digits))}
    return json.dumps(row | {"model_id": model, "metadata": question.metadata}, ensure_ascii=False)


def read_answers(file: epath.Path) -> list[dict[str, Any]]:
    """Reads the rows of an answer file. Raises UserError for a malformed file, with the line number."""
    if not file.exists():
        raise UserError(f"There is no answer file {file}.")
    rows = []
    for number, row in read_jsonl(file):
        valid = isinstance(row, dict) and isinstance(row.get("question_id"), (str, int))
        if not valid or not isinstance(row.get("text"), str):
            raise UserError(f"{file}, line {number}: an answer needs question_id and text.")
        if not isinstance(row.get("prompt", ""), str):
            raise UserError(f"{file}, line {number}: prompt must be a string.")
        rows.append(row)
    return rows


def match_answers(benchmark: Benchmark, rows: Sequence[dict[str, Any]], file: epath.Path) -> list[str]:
    """Returns one text for each of the benchmark's questions, in their order.

    Rows are matched by ``question_id``, and also by ``prompt`` where several questions share an id. Rows of questions
    that :meth:`Benchmark.limit` removed are ignored.

    Raises:
      UserError: a question has no answer, or two different ones; an answer belongs to no question.
    """
    id_counts = collections.Counter(str(question.id) for question in benchmark.questions)
    if benchmark.limited:  # the other questions with an id may be among those that were removed
        id_counts |= collections.Counter(str(row["question_id"]) for row in rows)

    def make_key(question_id: str | int, prompt: str | None) -> tuple[str, str | None]:
        question_id = str(question_id)
        return (question_id, prompt) if id_counts[question_id] > 1 else (question_id, "")

    texts: dict[tuple[str, str | None], str] = {}
    unexpected = []
    wanted = {make_key(question.id, question.prompt) for question in benchmark.questions}
    for row in rows:
        key, text = make_key(row["question_id"], row.get("prompt")), row["text"].strip()
        if key not in wanted:
            unexpected.append(row["question_id"])
        elif texts.setdefault(key, text) != text:
            raise UserError(f"{file} has two different answers for question {shorten(repr(row['question_id']))}.")
    missing = [question.id for question in benchmark.questions if make_key(question.id, question.prompt) not in texts]
    if unexpected and not benchmark.limited:
        raise UserError(
            f"{file} does not match the benchmark: {len(unexpected)} of its {len(rows)} answers are to other "
            f"questions, such as {shorten(repr(unexpected[0]))}."
        )
    if missing:
        raise UserError(
            f"{file} leaves {len(missing)} of {len(benchmark.questions)} questions unanswered, such as "
            f"{shorten(repr(missing[0]))}."
        )
    return [texts[make_key(question.id, question.prompt)] for question in benchmark.questions]
