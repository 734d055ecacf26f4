"""The embedded benchmarks: questions on held-out images by kind, beside the same model shown a blank image."""

import dataclasses
import functools
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from etils import epath

from stf_jax.data import scenes, world_text
from stf_jax.data.scenes import SIDE
from stf_jax.data.world import HEIGHTS, LARGE
from stf_jax.evals.benchmark import SHORT_ANSWER_SUFFIX, Benchmark, Question

SEED = 1_000_003  # of the held-out images, whatever a run trained on
QUESTIONS_PER_KIND = 250  # questions of each kind
QUESTIONS_PER_HEIGHT = 100  # questions on print of each height
_BLANK = (122, 116, 104)  # CLIP's mean colour


@dataclasses.dataclass(frozen=True)
class HeldOutQuestion:
    """A question on the held-out image of that index, which ``image`` draws."""

    image: Callable[[], PIL.Image.Image]
    index: int
    question: scenes.Question


@dataclasses.dataclass(frozen=True)
class AnsweredQuestion:
    """A question on an image, with the model's answer to it and to the same question on a blank image."""

    asked: HeldOutQuestion
    answer: str
    blank_answer: str

    @property
    def right(self) -> bool:
        """Whether the answer is the truth, letter case aside."""
        return self.answer.lower() == self.asked.question.answer.lower()

    @property
    def blank_right(self) -> bool:
        """The same for the blank image."""
        return self.blank_answer.lower() == self.asked.question.answer.lower()


@functools.cache
def held_out_questions(each: int = QUESTIONS_PER_KIND) -> tuple[HeldOutQuestion, ...]:
    """So many questions of each kind on held-out images of the second edition, the kinds in turn."""
    return _in_turn(lambda asked: asked.question.kind, world_text.KINDS, each)


@functools.cache
def held_out_print_questions(each: int = QUESTIONS_PER_HEIGHT) -> tuple[HeldOutQuestion, ...]:
    """So many questions on printed text of each height on held-out images, the heights in turn."""
    return _in_turn(lambda asked: asked.question.height, HEIGHTS, each)


def _in_turn(key, values, each):
    """The first ``each`` questions of the second edition for which the key has each of the values."""
    groups: dict[Any, list[HeldOutQuestion]] = {value: [] for value in values}
    index = 0
    while any(len(some) < each for some in groups.values()):
        for asked in _on(world_text, index, world_text.MAX_THINGS):
            if len(groups.get(key(asked), [None] * each)) < each:
                groups[key(asked)].append(asked)
        index += 1
    return tuple(asked for turn in zip(*groups.values(), strict=True) for asked in turn)


def _on(world, index, most):
    """A question of each kind that the image of that index allows."""
    scene = world.make_scene(SEED, index, held_out=True, max_things=most)
    image = functools.partial(world.draw, scene, index)
    return [
        HeldOutQuestion(image, index, q) for q in world.make_questions(scene, np.random.default_rng([SEED, index]), True)
    ]


class Scenes(Benchmark):
    """:data:`QUESTIONS_PER_KIND` questions of each kind on held-out images of the world's second edition, each asked twice."""

    name = "scenes"
    folders = ()
    max_new_tokens = 8  # the longest answer is a word spelt in letters, and its end
    rule = "Right is the one gold word, letter case aside. Every question is asked of a blank image, too."
    scored = True
    kinds = world_text.KINDS

    def __init__(self, data: epath.Path | None = None):
        """It needs no files."""
        self._asked = self._questions()
        self.questions = []
        for asked in self._asked:
            question = asked.question
            text = question.text + SHORT_ANSWER_SUFFIX
            # The blank one comes next to it, so that a part of the questions is a part of either.
            for shown, opens in (
                ("scene", asked.image),
                ("blank", functools.partial(PIL.Image.new, "RGB", (SIDE, SIDE), _BLANK)),
            ):
                about = {"kind": question.kind, "shown": shown, "truth": question.answer}
                if question.height:
                    about["height"] = question.height
                self.questions.append(Question(f"{asked.index}/{question.kind}/{shown}", text, opens, text, about))

    def _questions(self) -> Sequence[HeldOutQuestion]:
        return held_out_questions()

    @property
    def count(self) -> int:
        return len(self.questions) // 2

    def check_images(self) -> None:
        """Nothing: they are drawn."""

    def keep_first(self, count: int) -> None:
        self.questions, self._asked = self.questions[: 2 * count], self._asked[:count]

    def metrics(self, texts: Sequence[str]) -> dict[str, Any]:
        """``accuracy``, ``blank_image_accuracy``, both ``by_kind``, and ``by_print``, large and small."""
        answered = self._answered(texts)
        metrics = _shares(answered) | {"by_kind": _table(_by_kind(answered, self.kinds))}
        prints = _table(self._prints(answered))
        return metrics | ({"by_print": prints} if prints else {})

    def write_submission(self, texts: Sequence[str], out: epath.Path) -> list[epath.Path]:
        """Writes ``contact_sheet.png``: images with question, answer and truth, to look at."""
        file = out / "contact_sheet.png"
        with file.open("wb") as opened:
            contact_sheet(self._grouped(self._answered(texts))).save(opened, "PNG")
        return [file]

    def _prints(self, answered: Sequence[AnsweredQuestion]) -> dict[str, list[AnsweredQuestion]]:
        """Questions on print by its size."""
        sizes = {"large print": range(LARGE, SIDE), "small print": range(1, LARGE)}
        groups = {name: [i for i in answered if i.asked.question.height in sizes[name]] for name in sizes}
        return {name: items for name, items in groups.items() if items}

    def _grouped(self, answered: Sequence[AnsweredQuestion]) -> dict[str, list[AnsweredQuestion]]:
        """Groups of the contact sheet, each with its title."""
        return _by_kind(answered, self.kinds)

    def _answered(self, texts):
        pairs = zip(texts[::2], texts[1::2], strict=True)
        return [AnsweredQuestion(asked, *pair) for asked, pair in zip(self._asked, pairs, strict=True)]


class Prints(Scenes):
    """:data:`QUESTIONS_PER_HEIGHT` questions on printed text of each height, on held-out images of the second edition."""

    name = "prints"
    kinds = ("reading",)

    def _questions(self) -> Sequence[HeldOutQuestion]:
        return held_out_print_questions()

    def _prints(self, answered: Sequence[AnsweredQuestion]) -> dict[str, list[AnsweredQuestion]]:
        groups = {h: [item for item in answered if item.asked.question.height == h] for h in HEIGHTS}
        return {f"letters of {h} pixels": items for h, items in groups.items() if items}

    def _grouped(self, answered: Sequence[AnsweredQuestion]) -> dict[str, list[AnsweredQuestion]]:
        return self._prints(answered)


class Shapes(Scenes):
    """The world's first edition: a question of each kind on each of 128 images of up to two shapes."""

    name = "shapes"
    max_new_tokens = 6
    kinds = scenes.KINDS

    def _questions(self) -> Sequence[HeldOutQuestion]:
        return [asked for index in range(128) for asked in _on(scenes, index, 2)]


def _by_kind(answered, kinds):
    groups = {kind: [item for item in answered if item.asked.question.kind == kind] for kind in kinds}
    return {kind: items for kind, items in groups.items() if items}


def _table(groups):
    return {name: _shares(items) | {"questions": len(items)} for name, items in groups.items()}


def _shares(items):
    return {
        "accuracy": sum(item.right for item in items) / len(items),
        "blank_image_accuracy": sum(item.blank_right for item in items) / len(items),
    }


_COLUMNS, _OF_EACH = 4, 2  # images side by side, and of a kind
_CELL, _IMAGE, _TEXT, _HEAD, _EDGE = 212, 192, 78, 26, 10  # pixels


def contact_sheet(groups: Mapping[str, Sequence[AnsweredQuestion]]) -> PIL.Image.Image:
    """Two questions of each group with image, answer and, where that is wrong and red, the truth.

    Each group starts further down its list than the one before, so that groups rarely share an image.
    """
    across, height = _COLUMNS // _OF_EACH, _HEAD + _IMAGE + _TEXT
    sheet = PIL.Image.new("RGB", (_COLUMNS * _CELL, -(-len(groups) // across) * height), "white")
    pen, font, bold = PIL.ImageDraw.Draw(sheet), *(PIL.ImageFont.load_default(size=size) for size in (13, 15))
    for place, (title, items) in enumerate(groups.items()):
        left, top = place % across * _OF_EACH * _CELL + _EDGE, place // across * height
        share = f"{100 * _shares(items)['accuracy']:.0f} % of {len(items)} right"
        pen.text((left, top + 6), f"{title}: {share}", fill="black", font=bold)
        for i in range(_OF_EACH):
            item = items[(place * _OF_EACH + i) % len(items)]
            x, y = left + i * _CELL, top + _HEAD
            image = item.asked.image().resize((_IMAGE, _IMAGE), PIL.Image.Resampling.NEAREST)
            sheet.paste(image, (x, y))
            y += _IMAGE + 3
            pen.text((x, y), textwrap.fill(item.asked.question.text, 30), fill="black", font=font)
            pen.text((x, y + 36), item.answer, fill="#0a7d28" if item.right else "#c01818", font=bold)
            if not item.right:
                pen.text((x, y + 54), f"truth: {item.asked.question.answer}", fill="#555555", font=font)
    return sheet
