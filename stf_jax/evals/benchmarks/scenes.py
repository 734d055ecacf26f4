"""The embedded benchmarks: questions about held-out images, each also asked about a blank image."""

import dataclasses
import functools
import textwrap
import types
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from etils import epath

from stf_jax.data import scenes, world_text
from stf_jax.data.scenes import SIDE
from stf_jax.data.world import HEIGHTS, LARGE
from stf_jax.evals.benchmark import BLANK_COLOR, SHORT_ANSWER_SUFFIX, Benchmark, Question

SEED = 1_000_003  # for held-out images, independent of a run's seed
QUESTIONS_PER_KIND = 250
QUESTIONS_PER_HEIGHT = 100  # of printed text, per height of its capitals


@dataclasses.dataclass(frozen=True)
class HeldOutQuestion:
    """A question about the held-out image with index ``index``; ``image`` draws it."""

    image: Callable[[], PIL.Image.Image]
    index: int
    question: scenes.Question


@dataclasses.dataclass(frozen=True)
class AnsweredQuestion:
    """A question with the model's answer, and its answer to the same question about a blank image."""

    held_out: HeldOutQuestion
    answer: str
    blank_answer: str

    @property
    def question(self) -> scenes.Question:
        """The question and its gold answer."""
        return self.held_out.question

    @property
    def correct(self) -> bool:
        """Whether the answer equals the gold answer, ignoring case."""
        return self.answer.lower() == self.question.answer.lower()

    @property
    def blank_correct(self) -> bool:
        """Whether the answer about the blank image equals the gold answer, ignoring case."""
        return self.blank_answer.lower() == self.question.answer.lower()


@functools.cache
def held_out_questions(each: int = QUESTIONS_PER_KIND) -> tuple[HeldOutQuestion, ...]:
    """Returns ``each`` questions of each kind about held-out images of the second edition, alternating kinds."""
    return _collect_in_turn(lambda item: item.question.kind, world_text.KINDS, each)


@functools.cache
def held_out_print_questions(each: int = QUESTIONS_PER_HEIGHT) -> tuple[HeldOutQuestion, ...]:
    """Returns ``each`` questions about printed text of each height in held-out images, alternating heights."""
    return _collect_in_turn(lambda item: item.question.height, HEIGHTS, each)


def _collect_in_turn(
    get_key: Callable[[HeldOutQuestion], Hashable], keys: Iterable[Hashable], each: int
) -> tuple[HeldOutQuestion, ...]:
    """Returns the first ``each`` questions of the second edition for each key, alternating keys."""
    groups: dict[Hashable, list[HeldOutQuestion]] = {key: [] for key in keys}
    index = 0
    while any(len(group) < each for group in groups.values()):
        for item in _make_questions(world_text, index, world_text.MAX_THINGS):
            if len(groups.get(get_key(item), [None] * each)) < each:
                groups[get_key(item)].append(item)
        index += 1
    return tuple(item for turn in zip(*groups.values(), strict=True) for item in turn)


def _make_questions(world: types.ModuleType, index: int, max_things: int) -> list[HeldOutQuestion]:
    """Makes a question of each kind that the image with this index allows; ``world`` is the edition's module."""
    scene = world.make_scene(SEED, index, held_out=True, max_things=max_things)
    image = functools.partial(world.draw, scene, index)
    return [
        HeldOutQuestion(image, index, q)
        for q in world.make_questions(scene, np.random.default_rng([SEED, index]), True)
    ]


class Scenes(Benchmark):
    """:data:`QUESTIONS_PER_KIND` questions of each kind about held-out images of the world's second edition."""

    name = "scenes"
    folders = ()
    max_new_tokens = 8  # the longest answer is a word with one token per letter, and the stop token
    rule = (
        "An answer is correct if it equals the gold word, ignoring case. Every question is also asked about a blank "
        "image."
    )
    scored = True
    kinds: ClassVar[Sequence[str]] = world_text.KINDS

    def __init__(self, data: epath.Path | None = None) -> None:
        """``data`` is ignored: these benchmarks need no files."""
        self._held_out = self._collect()
        self.questions = []
        for item in self._held_out:
            question = item.question
            text = question.text + SHORT_ANSWER_SUFFIX
            # The blank image comes directly after, so that any even number of questions has both images of each.
            for shown, opener in (
                ("scene", item.image),
                ("blank", functools.partial(PIL.Image.new, "RGB", (SIDE, SIDE), BLANK_COLOR)),
            ):
                metadata: dict[str, Any] = {"kind": question.kind, "shown": shown, "truth": question.answer}
                if question.height:
                    metadata["height"] = question.height
                self.questions.append(Question(f"{item.index}/{question.kind}/{shown}", text, opener, text, metadata))

    def _collect(self) -> Sequence[HeldOutQuestion]:
        return held_out_questions()

    @property
    def count(self) -> int:
        return len(self.questions) // 2

    def check_images(self) -> None:
        """Does nothing: the images are drawn."""

    def hide_images(self) -> None:
        """Does nothing: every question is asked about a blank image as well."""

    def keep_first(self, count: int) -> None:
        self.questions, self._held_out = self.questions[: 2 * count], self._held_out[:count]

    def metrics(self, texts: Sequence[str]) -> dict[str, Any]:
        """Computes ``accuracy`` and ``blank_image_accuracy``, in total, ``by_kind`` and ``by_print`` (large, small)."""
        answered = self._pair_answers(texts)
        metrics: dict[str, Any] = _accuracies(answered) | {
            "by_kind": _score_groups(_group_by_kind(answered, self.kinds))
        }
        by_print = _score_groups(self._group_by_print(answered))
        return metrics | ({"by_print": by_print} if by_print else {})

    def write_submission(self, texts: Sequence[str], out: epath.Path) -> list[epath.Path]:
        """Writes ``contact_sheet.png``: example images with question, answer and gold answer."""
        file = out / "contact_sheet.png"
        with file.open("wb") as opened:
            draw_contact_sheet(self._group_for_sheet(self._pair_answers(texts))).save(opened, "PNG")
        return [file]

    def _group_by_print(self, answered: Sequence[AnsweredQuestion]) -> dict[str, list[AnsweredQuestion]]:
        """Groups the questions about printed text by its size."""
        sizes = {"large print": range(LARGE, SIDE), "small print": range(1, LARGE)}
        groups = {name: [item for item in answered if item.question.height in sizes[name]] for name in sizes}
        return {name: items for name, items in groups.items() if items}

    def _group_for_sheet(self, answered: Sequence[AnsweredQuestion]) -> dict[str, list[AnsweredQuestion]]:
        """Groups the questions for the contact sheet, by title."""
        return _group_by_kind(answered, self.kinds)

    def _pair_answers(self, texts: Sequence[str]) -> list[AnsweredQuestion]:
        pairs = zip(texts[::2], texts[1::2], strict=True)
        return [AnsweredQuestion(item, *pair) for item, pair in zip(self._held_out, pairs, strict=True)]


class Prints(Scenes):
    """:data:`QUESTIONS_PER_HEIGHT` questions about printed text of each height in images of the second edition."""

    name = "prints"
    kinds = ("reading",)

    def _collect(self) -> Sequence[HeldOutQuestion]:
        return held_out_print_questions()

    def _group_by_print(self, answered: Sequence[AnsweredQuestion]) -> dict[str, list[AnsweredQuestion]]:
        groups = {h: [item for item in answered if item.question.height == h] for h in HEIGHTS}
        return {f"letters of {h} pixels": items for h, items in groups.items() if items}

    def _group_for_sheet(self, answered: Sequence[AnsweredQuestion]) -> dict[str, list[AnsweredQuestion]]:
        return self._group_by_print(answered)


class Shapes(Scenes):
    """The first edition's benchmark: questions of each kind about each of 128 images of up to two shapes."""

    name = "shapes"
    max_new_tokens = 6
    kinds = scenes.KINDS

    def _collect(self) -> Sequence[HeldOutQuestion]:
        return [item for index in range(128) for item in _make_questions(scenes, index, 2)]


def _group_by_kind(answered: Sequence[AnsweredQuestion], kinds: Iterable[str]) -> dict[str, list[AnsweredQuestion]]:
    groups = {kind: [item for item in answered if item.question.kind == kind] for kind in kinds}
    return {kind: items for kind, items in groups.items() if items}


def _score_groups(groups: Mapping[str, Sequence[AnsweredQuestion]]) -> dict[str, dict[str, float]]:
    return {name: _accuracies(items) | {"questions": len(items)} for name, items in groups.items()}


def _accuracies(items: Sequence[AnsweredQuestion]) -> dict[str, float]:
    return {
        "accuracy": sum(item.correct for item in items) / len(items),
        "blank_image_accuracy": sum(item.blank_correct for item in items) / len(items),
    }


_COLUMNS, _PER_GROUP = 4, 2  # images per row, and per group
_CELL, _IMAGE, _TEXT, _HEAD, _EDGE = 212, 192, 78, 26, 10  # pixels


def draw_contact_sheet(groups: Mapping[str, Sequence[AnsweredQuestion]]) -> PIL.Image.Image:
    """Draws two questions of each group with image and answer; wrong answers are red, with the gold answer below.

    Each group starts later in its list than the group before, so that groups rarely share an image.
    """
    groups_per_row, height = _COLUMNS // _PER_GROUP, _HEAD + _IMAGE + _TEXT
    sheet = PIL.Image.new("RGB", (_COLUMNS * _CELL, -(-len(groups) // groups_per_row) * height), "white")
    pen, font, bold = PIL.ImageDraw.Draw(sheet), *(PIL.ImageFont.load_default(size=size) for size in (13, 15))
    for number, (title, items) in enumerate(groups.items()):
        left, top = number % groups_per_row * _PER_GROUP * _CELL + _EDGE, number // groups_per_row * height
        share = f"{100 * _accuracies(items)['accuracy']:.0f}% of {len(items)} correct"
        pen.text((left, top + 6), f"{title}: {share}", fill="black", font=bold)
        for i in range(_PER_GROUP):
            item = items[(number * _PER_GROUP + i) % len(items)]
            x, y = left + i * _CELL, top + _HEAD
            image = item.held_out.image().resize((_IMAGE, _IMAGE), PIL.Image.Resampling.NEAREST)
            sheet.paste(image, (x, y))
            y += _IMAGE + 3
            pen.text((x, y), textwrap.fill(item.question.text, 30), fill="black", font=font)
            pen.text((x, y + 36), item.answer, fill="#0a7d28" if item.correct else "#c01818", font=bold)
            if not item.correct:
                pen.text((x, y + 54), f"correct: {item.question.answer}", fill="#555555", font=font)
    return sheet


COMPONENTS = {kind.name: kind for kind in (Scenes, Prints, Shapes)}
