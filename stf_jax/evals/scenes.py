"""The embedded benchmark: questions on held-out scenes, by kind, beside the same model shown a blank picture."""

import dataclasses
import functools
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from etils import epath

from stf_jax.data import scenes
from stf_jax.data.scenes import KINDS, SIDE, draw, make_scene
from stf_jax.evals.benchmark import WORD, Benchmark, Question

SEED = 1_000_003  # of the held-out pictures, whatever a run trained on
PICTURES = 128
THINGS = 2  # in a picture at most: what a miniature can tell after minutes of training
_BLANK = (122, 116, 104)  # CLIP's mean colour


@dataclasses.dataclass(frozen=True)
class Answered:
    """A question on a picture, with the model's answer to it and to the same question on a blank picture."""

    picture: PIL.Image.Image
    question: scenes.Question
    answer: str
    blank_answer: str

    @property
    def right(self) -> bool:
        """Whether the answer is the truth, letter case aside."""
        return self.answer.lower() == self.question.answer.lower()

    @property
    def blank_right(self) -> bool:
        """The same for the blank picture."""
        return self.blank_answer.lower() == self.question.answer.lower()


class Scenes(Benchmark):
    """One question of each kind that a picture allows, on :data:`PICTURES` held-out pictures, each asked twice."""

    name = "scenes"
    folders = ()
    tokens = 6  # the longest answer is a word spelt in letters, and its end
    rule = "Right is the one gold word, letter case aside. Every question is asked of a blank picture, too."
    scored = True

    def __init__(self, data: epath.Path | None = None):
        """It needs no files."""
        self._asked = held_out_questions(PICTURES)
        self.questions = []
        for picture, index, question in self._asked:
            text = question.text + WORD
            # The blank one comes next to it, so that a part of the questions is a part of either.
            for shown, opens in (
                ("scene", picture),
                ("blank", functools.partial(PIL.Image.new, "RGB", (SIDE, SIDE), _BLANK)),
            ):
                about = {"kind": question.kind, "picture": shown, "truth": question.answer}
                self.questions.append(Question(f"{index}/{question.kind}/{shown}", text, opens, text, about))

    @property
    def count(self) -> int:
        return len(self.questions) // 2

    def check_images(self) -> None:
        """Nothing: they are drawn."""

    def first(self, count: int) -> None:
        self.questions, self._asked = self.questions[: 2 * count], self._asked[:count]

    def metrics(self, texts: Sequence[str]) -> dict[str, Any]:
        """``accuracy``, ``blank_image_accuracy``, and both ``by_kind``."""
        answered = self._answered(texts)
        by_kind = {kind: [item for item in answered if item.question.kind == kind] for kind in KINDS}
        table = {kind: _shares(items) | {"questions": len(items)} for kind, items in by_kind.items() if items}
        return _shares(answered) | {"by_kind": table}

    def submission(self, texts: Sequence[str], out: epath.Path) -> list[epath.Path]:
        """Writes ``contact_sheet.png``: pictures with question, answer and truth, to look at."""
        file = out / "contact_sheet.png"
        with file.open("wb") as opened:
            contact_sheet(self._answered(texts)).save(opened, "PNG")
        return [file]

    def _answered(self, texts):
        pairs = zip(texts[::2], texts[1::2], strict=True)
        return [
            Answered(picture(), question, *pair)
            for (picture, _, question), pair in zip(self._asked, pairs, strict=True)
        ]


def held_out_questions(pictures: int) -> list[tuple[functools.partial, int, scenes.Question]]:
    """One question of each kind that the picture allows, for so many held-out pictures.

    With each, what draws its picture, and the picture's number.
    """
    asked = []
    for index in range(pictures):
        scene = make_scene(SEED, index, held_out=True, most=THINGS)
        for question in scenes.questions(scene, np.random.default_rng([SEED, index]), True):
            asked.append((functools.partial(draw, scene, index), index, question))
    return asked


def _shares(items):
    return {
        "accuracy": sum(item.right for item in items) / len(items),
        "blank_image_accuracy": sum(item.blank_right for item in items) / len(items),
    }


def contact_sheet(answered: Sequence[Answered], columns: int = 6, rows: int = 4) -> PIL.Image.Image:
    """Pictures with question, answer and truth; right answers green, wrong ones red.

    Dealt evenly over the kinds, each from further down its list, so that few pictures come twice.
    """
    by_kind = [[item for item in answered if item.question.kind == kind] for kind in KINDS]
    by_kind = [items for items in by_kind if items]
    rounds = range(-(-columns * rows // len(by_kind)))
    dealt = [items[(i * len(by_kind) + j) % len(items)] for i in rounds for j, items in enumerate(by_kind)]
    width, picture_side, text_height = 232, 208, 92
    cell_height = picture_side + text_height
    sheet = PIL.Image.new("RGB", (columns * width, rows * cell_height), "white")
    canvas = PIL.ImageDraw.Draw(sheet)
    font = PIL.ImageFont.load_default(size=14)
    for i, item in enumerate(dealt[: columns * rows]):
        x, y = i % columns * width + 12, i // columns * cell_height + 12
        sheet.paste(item.picture.resize((picture_side, picture_side), PIL.Image.Resampling.NEAREST), (x, y))
        y += picture_side + 4
        canvas.text((x, y), textwrap.fill(item.question.text, 32), fill="black", font=font)
        canvas.text((x, y + 36), f"answer: {item.answer}", fill="#0a7d28" if item.right else "#c01818", font=font)
        canvas.text((x, y + 54), f"truth: {item.question.answer}", fill="#555555", font=font)
    return sheet
