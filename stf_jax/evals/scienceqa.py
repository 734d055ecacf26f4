"""ScienceQA: school science with a choice of answers, half of it about images (Lu et al., 2022); the test split."""

import re
import statistics
from collections.abc import Sequence
from typing import Any

from etils import epath

from stf_jax.config import UserError
from stf_jax.data.records import IMAGE_MARK
from stf_jax.evals.benchmark import LETTER_SUFFIX, Benchmark, Question
from stf_jax.evals.files import match_labels, read_json, read_list

_LETTERS = ("A", "B", "C", "D", "E")


class ScienceQA(Benchmark):
    """LLaVA's ``llava_test_CQM-A.json``, with ScienceQA's ``problems.json`` or the answers that LLaVA's file has."""

    name = "scienceqa"
    folders = ("scienceqa",)
    max_new_tokens = 1024
    rule = (
        "An answer is the letter that it is, or that it begins with before a full stop and a space, or that follows "
        "the only 'The answer is' in it; it is right where that is the gold letter. image_accuracy is of the questions "
        "with an image."
    )

    def __init__(self, data: epath.Path):
        super().__init__(data)
        asked = self.find("llava_test_CQM-A.json")
        rows = _read(asked)
        self.questions = [self._question(row) for row in rows]
        file = self.find_any("problems.json")
        if file is not None:
            problems = read_json(file)
            if not isinstance(problems, dict):
                raise UserError(f"{file} is no object of problems by their ids; take ScienceQA's own file.")
            own = match_labels([str(row["id"]) for row in rows], problems, file)
            self._labels = [_label(file, row, problem) for row, problem in zip(rows, own, strict=True)]
        else:
            self._labels = [_own_label(asked, row) for row in rows]
        self.labels = (file or asked,)

    def metrics(self, texts: Sequence[str]) -> dict[str, Any]:
        labels = self._labels[: len(self.questions)]
        right = [parse_choice(text) == gold for text, gold in zip(texts, labels, strict=True)]
        with_image = [own for own, question in zip(right, self.questions, strict=True) if question.image is not None]
        images = {"image_accuracy": statistics.fmean(with_image)} if with_image else {}
        return {"accuracy": statistics.fmean(right)} | images

    def _question(self, row):
        text = _asked(row) + LETTER_SUFFIX
        if row.get("image") is None:
            return Question(row["id"], text, None, text)
        image = self.image_opener(("images/test", "images"), row["image"])
        return Question(row["id"], text, image, f"{IMAGE_MARK}\n{text}")


def parse_choice(text: str) -> str | None:
    """The letter, A to E, that an answer chooses, as LLaVA's ``eval_science_qa.py`` reads it; None where it does not.

    It may be beyond the question's choices, which is wrong as any other that is not the gold letter.
    """
    if len(text) >= 3 and text[1:3] == ". ":
        text = text[0]
    elif text not in _LETTERS:
        # The last "." is any character, but there must be one: "The answer is B" alone is no answer, in LLaVA's count.
        found = re.findall(r"The answer is ([A-Z]).", text)
        text = found[0] if len(found) == 1 else ""
    return text if text in _LETTERS else None


def _read(file):
    rows = read_list(file)
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{file} is no list of questions; take it from LLaVA's evaluation files.")
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
            raise UserError(f"{file}, question {number}: it needs id and conversations, the first human's.") from None
        image = row.get("image")  # null, as pandas writes it, is no image
        if not isinstance(image, (str, type(None))):
            raise UserError(f"{file}, question {number}: image must be the name of a file, or null.")
        if image is None and IMAGE_MARK in texts[0]:
            raise UserError(f"{file}, question {number}: it has {IMAGE_MARK}, but names no image.")
    return rows


def _asked(row):
    return row["conversations"][0]["value"].replace(IMAGE_MARK, "").strip()


def _answer(row):
    """The letter that the question's own row gives for right, if it does."""
    answers = [turn["value"].strip() for turn in row["conversations"] if turn.get("from") == "gpt"]
    return answers[0] if answers and re.fullmatch("[A-Z]", answers[0]) else None


def _label(file, row, problem):
    try:
        choices, index = len(problem["choices"]), problem["answer"]
        if not isinstance(problem["choices"], list) or type(index) is not int or not 0 <= index < choices:
            raise TypeError
    except (KeyError, TypeError):
        raise UserError(f"{file}, problem {row['id']}: it needs choices and answer, the number of one.") from None
    gold = chr(ord("A") + index)
    if _answer(row) not in (None, gold):
        raise UserError(
            f"{file}, problem {row['id']}: its answer is {gold}, but {_answer(row)} in LLaVA's question file; "
            "one of the two is of another version."
        )
    return gold


def _own_label(file, row):
    lines = _asked(row).split("\n")
    starts = [place for place, line in enumerate(lines) if line.startswith("A. ")]
    choices = 0
    for line in lines[starts[-1] :] if starts else ():  # the last of them: a text may list things, too
        choices += line.startswith(f"{chr(ord('A') + choices)}. ")
    gold = _answer(row)
    if gold is None or ord(gold) - ord("A") >= choices:
        raise UserError(
            f"{file}, question {row['id']}: gpt's answer is not the letter of one of its choices; put ScienceQA's "
            "problems.json beside the file."
        )
    return gold
