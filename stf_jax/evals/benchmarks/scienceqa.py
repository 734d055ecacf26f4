"""ScienceQA: multiple-choice school science, half of it with images (Lu et al., 2022); the test split."""

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from stf_jax.config import UserError
from stf_jax.data.records import IMAGE_MARK
from stf_jax.evals.benchmark import LETTER_SUFFIX, Benchmark, Question
from stf_jax.evals.files import match_labels, read_json, read_list

_LETTERS = ("A", "B", "C", "D", "E")


class ScienceQA(Benchmark):
    """LLaVA's ``llava_test_CQM-A.json``, with ScienceQA's ``problems.json`` or the answers in LLaVA's file."""

    name = "scienceqa"
    folders = ("scienceqa",)
    groups = ("paper",)
    max_new_tokens = 1024
    rule = (
        "An answer chooses a letter if it is that letter, or starts with it followed by a full stop and a space, or "
        "contains 'The answer is' once, before it. It is correct if that is the gold letter. image_accuracy covers the "
        "questions with an image."
    )

    def __init__(self, data: epath.Path) -> None:
        super().__init__(data)
        question_file = self.find("llava_test_CQM-A.json")
        rows = _read_questions(question_file)
        self.questions = [self._make_question(row) for row in rows]
        file = self.find_any("problems.json")
        if file is not None:
            problems = read_json(file)
            if not isinstance(problems, dict):
                raise UserError(f"{file} is not a JSON object keyed by problem id; use ScienceQA's own file.")
            matched = match_labels([str(row["id"]) for row in rows], problems, file)
            self._labels = [_read_problem_label(file, row, problem) for row, problem in zip(rows, matched, strict=True)]
        else:
            self._labels = [_read_row_label(question_file, row) for row in rows]
        self.labels = (file or question_file,)

    def metrics(self, texts: Sequence[str]) -> dict[str, Any]:
        labels = self._labels[: len(self.questions)]
        correct = [parse_choice(text) == gold for text, gold in zip(texts, labels, strict=True)]
        with_image = [hit for hit, question in zip(correct, self.questions, strict=True) if question.image is not None]
        image_metrics = {"image_accuracy": statistics.fmean(with_image)} if with_image else {}
        return {"accuracy": statistics.fmean(correct)} | image_metrics

    def _make_question(self, row: Mapping[str, Any]) -> Question:
        text = _get_question_text(row) + LETTER_SUFFIX
        if row.get("image") is None:
            return Question(row["id"], text, None, text)
        image = self.image_opener(("images/test", "images"), row["image"])
        return Question(row["id"], text, image, f"{IMAGE_MARK}\n{text}")


def parse_choice(text: str) -> str | None:
    """Returns the letter A to E that LLaVA's ``eval_science_qa.py`` reads from an answer, or None.

    The letter may be beyond the question's choices; then it is as wrong as any other letter but the gold one.
    """
    if len(text) >= 3 and text[1:3] == ". ":
        text = text[0]
    elif text not in _LETTERS:
        # The last "." matches any character, but there must be one: LLaVA does not count "The answer is B" alone.
        found = re.findall(r"The answer is ([A-Z]).", text)
        text = found[0] if len(found) == 1 else ""
    return text if text in _LETTERS else None


def _read_questions(file: epath.Path) -> list[dict[str, Any]]:
    rows = read_list(file)
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{file} is not a list of questions; use the one in LLaVA's evaluation files.")
    for number, row in enumerate(rows, start=1):
        try:
            turns = row["conversations"]
            speaker, texts = turns[0]["from"], [turn["value"] for turn in turns]
            if (
                speaker != "human"
                or not isinstance(row["id"], (str, int))
                or not all(isinstance(text, str) for text in texts)
            ):
                raise TypeError
        except (KeyError, IndexError, TypeError, AttributeError):
            raise UserError(
                f"{file}, question {number}: it needs id and conversations that start with a human turn."
            ) from None
        image = row.get("image")  # null, as pandas writes it, means no image
        if not isinstance(image, (str, type(None))):
            raise UserError(f"{file}, question {number}: image must be the name of a file, or null.")
        if image is None and IMAGE_MARK in texts[0]:
            raise UserError(f"{file}, question {number}: it contains {IMAGE_MARK}, but names no image.")
    return rows


def _get_question_text(row: Mapping[str, Any]) -> str:
    return row["conversations"][0]["value"].replace(IMAGE_MARK, "").strip()


def _get_answer(row: Mapping[str, Any]) -> str | None:
    """Returns the gold letter in the question's row, or None."""
    answers = [turn["value"].strip() for turn in row["conversations"] if turn.get("from") == "gpt"]
    return answers[0] if answers and re.fullmatch("[A-Z]", answers[0]) else None


def _read_problem_label(file: epath.Path, row: Mapping[str, Any], problem: Any) -> str:
    try:
        choices, index = len(problem["choices"]), problem["answer"]
        if not isinstance(problem["choices"], list) or type(index) is not int or not 0 <= index < choices:
            raise TypeError
    except (KeyError, TypeError):
        raise UserError(
            f"{file}, problem {row['id']}: it needs choices, and answer, the index of one of them."
        ) from None
    gold = chr(ord("A") + index)
    if _get_answer(row) not in (None, gold):
        raise UserError(
            f"{file}, problem {row['id']}: its answer is {gold}, but {_get_answer(row)} in LLaVA's question file; "
            "the two files are of different versions."
        )
    return gold


def _read_row_label(file: epath.Path, row: Mapping[str, Any]) -> str:
    lines = _get_question_text(row).split("\n")
    starts = [index for index, line in enumerate(lines) if line.startswith("A. ")]
    choices = 0
    for line in lines[starts[-1] :] if starts else ():  # the last list: the text may contain other lists
        choices += line.startswith(f"{chr(ord('A') + choices)}. ")
    gold = _get_answer(row)
    if gold is None or ord(gold) - ord("A") >= choices:
        raise UserError(
            f"{file}, question {row['id']}: gpt's answer is not the letter of one of its choices; put ScienceQA's "
            "problems.json into the same folder."
        )
    return gold


COMPONENTS = {ScienceQA.name: ScienceQA}
