"""Embedded data, first edition: procedural images of colored shapes and printed words.

Each record follows from (seed, split, index) alone, so the source has random access and needs no files. The five kinds
of questions test what merging tokens may lose: whether a thing exists, how many there are, an attribute of one, where
one is or how two relate in space, and what a short printed word says.

Held-out images use another seed. Each shows a color-and-shape pair that no training image shows and no training text
names, and their words never occur in training; only the letters do.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

SIDE = 96  # pixels
MAX_THINGS = 4
KINDS = ("existence", "count", "attribute", "spatial", "reading")
COLORS = {
    "red": (214, 40, 40),
    "green": (44, 160, 44),
    "blue": (38, 92, 220),
    "yellow": (240, 200, 20),
    "purple": (140, 50, 170),
    "orange": (245, 125, 20),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
RADII = {"small": 10, "large": 16}  # pixels from a shape's center to its edge
DESCRIBE = "Describe the picture."
SHORT_ANSWER = "Answer the question using a single word or phrase."  # LLaVA's instruction, in the first turn

Pair = tuple[str, str]  # a color and a shape
_PAIRS = [(color, shape) for color in COLORS for shape in SHAPES]
# One pair per color and per shape, so that only the combination is new.
HELD_OUT_PAIRS = frozenset((color, SHAPES[(i + 2) % len(SHAPES)]) for i, color in enumerate(COLORS))
TRAINING_PAIRS = [pair for pair in _PAIRS if pair not in HELD_OUT_PAIRS]

_CONSONANTS, _VOWELS = "BDHLMNPRSTVZ", "AEIOU"  # with F, G and K some would be rude
_LETTERS = list(itertools.product(enumerate(_CONSONANTS), enumerate(_VOWELS), enumerate(_CONSONANTS)))
# One word in five; training words still have every letter at every position.
HELD_OUT_WORDS = [a + v + b for (i, a), (j, v), (k, b) in _LETTERS if (i + j + k) % 5 == 0]
TRAINING_WORDS = [a + v + b for (i, a), (j, v), (k, b) in _LETTERS if (i + j + k) % 5]


@dataclasses.dataclass(frozen=True)
class Thing:
    """A shape in a scene; x and y are its center in pixels from the top left."""

    size: str
    color: str
    shape: str
    x: int
    y: int

    @property
    def pair(self) -> Pair:
        """Color and shape."""
        return self.color, self.shape


@dataclasses.dataclass(frozen=True)
class Scene:
    """The contents of an image, in reading order; ``word`` may be empty."""

    things: tuple[Thing, ...]
    word: str
    word_x: int
    word_y: int
    background: tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Question:
    """A question of one of :data:`KINDS`, its answer, and the height in pixels of the printed text, if known."""

    kind: str
    text: str
    answer: str
    height: int = 0


def make_rng(seed: int, held_out: bool, index: int) -> np.random.Generator:
    """Makes the random generator of an index and split."""
    return np.random.default_rng([seed, int(held_out), index])


def make_scene(seed: int, index: int, held_out: bool = False, max_things: int = MAX_THINGS) -> Scene:
    """Makes the scene of an index, with 1 to ``max_things`` things.

    Held-out scenes have at least one held-out pair, and only held-out words.
    """
    rng = make_rng(seed, held_out, index)
    boxes: list[_Box] = []
    word, word_x, word_y = "", 0, 0
    if rng.random() < 0.5:
        word = str(rng.choice(HELD_OUT_WORDS if held_out else TRAINING_WORDS))
        word_x, word_y = int(rng.integers(24, SIDE - 24)), int(rng.integers(11, SIDE - 11))
        boxes.append((word_x, word_y, 24, 11))
    things: list[Thing] = []
    for position in range(rng.integers(1, max_things + 1)):
        pairs = sorted(HELD_OUT_PAIRS) if held_out and position == 0 else TRAINING_PAIRS
        color, shape = pairs[rng.integers(len(pairs))]
        size = str(rng.choice(list(RADII)))
        # There is always room for the first thing; others are left out if there is none.
        place = _find_place(rng, boxes, RADII[size], tries=20 if things else 100_000)
        if place is not None:
            boxes.append((*place, RADII[size], RADII[size]))
            things.append(Thing(size, color, shape, *place))
    things.sort(key=lambda thing: (thing.y * 3 // SIDE, thing.x))
    light = rng.integers(205, 250) if rng.random() < 0.5 else rng.integers(10, 60)
    red, green, blue = (int(np.clip(light + rng.integers(-12, 13), 0, 255)) for _ in range(3))
    return Scene(tuple(things), word, word_x, word_y, (red, green, blue))


_Box = tuple[int, int, int, int]  # x and y of its center, half its width, half its height


def _find_place(rng: np.random.Generator, boxes: Sequence[_Box], radius: int, tries: int) -> tuple[int, int] | None:
    for _ in range(tries):
        x, y = (int(value) for value in rng.integers(radius + 1, SIDE - radius - 1, 2))
        if all(abs(x - bx) > radius + w + 1 or abs(y - by) > radius + h + 1 for bx, by, w, h in boxes):
            return x, y
    return None


def draw(scene: Scene, seed: int = 0) -> PIL.Image.Image:
    """Draws a scene as an RGB image of :data:`SIDE`×:data:`SIDE` pixels; ``seed`` is for its noise."""
    scale = 3  # drawn larger, then reduced, for smooth edges
    image = PIL.Image.new("RGB", (SIDE * scale, SIDE * scale), scene.background)
    canvas = PIL.ImageDraw.Draw(image)
    for thing in scene.things:
        draw_thing(canvas, thing, RADII[thing.size], scale, scene.background)
    if scene.word:
        ink = (15, 15, 15) if sum(scene.background) > 384 else (245, 245, 245)
        font = PIL.ImageFont.load_default(size=20 * scale)
        canvas.text((scene.word_x * scale, scene.word_y * scale), scene.word, fill=ink, font=font, anchor="mm")
    small = np.asarray(image.reduce(scale), np.int16)
    grain = np.random.default_rng(seed).integers(-6, 7, small.shape)
    return PIL.Image.fromarray(np.clip(small + grain, 0, 255).astype(np.uint8))


def draw_thing(
    canvas: PIL.ImageDraw.ImageDraw, thing: Thing, radius: int, scale: int, background: tuple[int, int, int]
) -> None:
    """Draws a shape of a given radius on a canvas that is ``scale`` times as large as the image."""
    x, y, r = (value * scale for value in (thing.x, thing.y, radius))
    box, color = (x - r, y - r, x + r, y + r), COLORS[thing.color]
    if thing.shape == "circle":
        canvas.ellipse(box, fill=color)
    elif thing.shape == "ring":
        canvas.ellipse(box, fill=color)
        canvas.ellipse((x - r * 0.5, y - r * 0.5, x + r * 0.5, y + r * 0.5), fill=background)
    elif thing.shape == "square":
        canvas.rectangle((x - r * 0.85, y - r * 0.85, x + r * 0.85, y + r * 0.85), fill=color)
    elif thing.shape == "cross":
        canvas.rectangle((x - r, y - r * 0.33, x + r, y + r * 0.33), fill=color)
        canvas.rectangle((x - r * 0.33, y - r, x + r * 0.33, y + r), fill=color)
    else:
        corners, inner = (3, 1.0) if thing.shape == "triangle" else (5, 0.42)
        points = []
        for i in range(2 * corners):
            if i % 2 and thing.shape == "triangle":
                continue
            angle, reach = math.pi * (i / corners - 0.5), r * (inner if i % 2 else 1.0)
            points.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
        canvas.polygon(points, fill=color)


def zone_name(x: int, y: int) -> str:
    """Returns the name of the ninth of the image that contains a point: ``top left``, ``top``, …, ``center``, …"""
    row = ("top", "", "bottom")[y * 3 // SIDE]
    column = ("left", "", "right")[x * 3 // SIDE]
    return f"{row} {column}".strip() or "center"


def make_caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """Describes the scene in one sentence: its things, in reading order or shuffled by ``rng``, and its word."""
    order = range(len(scene.things)) if rng is None else rng.permutation(len(scene.things))
    things = [scene.things[i] for i in order]
    parts = [f"a {t.size} {t.color} {t.shape} at the {zone_name(t.x, t.y)}" for t in things]
    if scene.word:
        parts.append(f"the word {scene.word} at the {zone_name(scene.word_x, scene.word_y)}")
    return ", ".join(parts)


def make_questions(scene: Scene, rng: np.random.Generator, held_out: bool = False) -> list[Question]:
    """Makes one question of each kind that the scene allows, in random order.

    Training questions name training pairs only. The answers yes and no are equally likely.
    """
    pairs = _PAIRS if held_out else TRAINING_PAIRS
    makers = (_existence, _count, _attribute, _spatial, _reading)
    made = [maker(scene, rng, pairs) for maker in makers]
    questions = [question for question in made if question is not None]
    return [questions[i] for i in rng.permutation(len(questions))]


def _existence(scene: Scene, rng: np.random.Generator, pairs: Sequence[Pair]) -> Question:
    """Asks for a color, a shape, or a pair of both, which is the hardest."""
    choice = rng.integers(3)
    present: set[Any]  # what is asked for: names or pairs
    known: Sequence[Any]
    if choice == 2:
        present, known = {thing.pair for thing in scene.things}, pairs
    else:
        key = ("color", "shape")[choice]
        present, known = {getattr(thing, key) for thing in scene.things}, (tuple(COLORS), SHAPES)[choice]
    if rng.random() < 0.5:
        # Prefer held-out pairs: they are what a held-out scene tests.
        candidates, answer = sorted(present & HELD_OUT_PAIRS) or sorted(present), "yes"
    else:
        candidates, answer = [value for value in known if value not in present], "no"
        if choice == 2 and rng.random() < 0.7:
            # Harder: a pair with a color or a shape that is present.
            candidates = [(c, s) for c, s in candidates if any(c == a or s == b for a, b in present)] or candidates
    value = candidates[rng.integers(len(candidates))]
    noun = (f"{value} shape", value, " ".join(value))[choice]
    return Question("existence", f"Is there {'an' if noun.startswith('orange') else 'a'} {noun}?", answer)


def _count(scene: Scene, rng: np.random.Generator, pairs: Sequence[Pair]) -> Question:
    del pairs
    choice = rng.integers(3)
    if choice == 0:
        return Question("count", "How many shapes are there?", str(len(scene.things)))
    key = ("color", "shape")[choice - 1]
    values = [getattr(thing, key) for thing in scene.things]
    options = list(COLORS) if key == "color" else list(SHAPES)
    value = str(rng.choice(values if rng.random() < 0.7 else options))
    noun = f"{value} shapes" if key == "color" else {"cross": "crosses"}.get(value, f"{value}s")
    return Question("count", f"How many {noun} are there?", str(values.count(value)))


def _attribute(scene: Scene, rng: np.random.Generator, pairs: Sequence[Pair]) -> Question | None:
    del pairs
    things = scene.things
    possible: list[Question] = []
    for thing in things:
        if sum(t.shape == thing.shape for t in things) == 1:
            possible.append(Question("attribute", f"What color is the {thing.shape}?", thing.color))
        if sum(t.color == thing.color for t in things) == 1:
            possible.append(Question("attribute", f"What shape is {thing.color}?", thing.shape))
        if sum(t.pair == thing.pair for t in things) == 1:
            text = f"Is the {thing.color} {thing.shape} small or large?"
            possible.append(Question("attribute", text, thing.size))
    return possible[rng.integers(len(possible))] if possible else None


def _spatial(scene: Scene, rng: np.random.Generator, pairs: Sequence[Pair]) -> Question | None:
    """Asks where a thing is in the image, or how two things relate in space."""
    del pairs
    unique = [t for t in scene.things if sum(o.pair == t.pair for o in scene.things) == 1]
    relations: list[tuple[Thing, Thing, str]] = []
    for a in unique:
        for b in unique:
            if abs(a.x - b.x) >= SIDE // 6:
                relations.append((a, b, "left of" if a.x < b.x else "right of"))
            if abs(a.y - b.y) >= SIDE // 6:
                relations.append((a, b, "above" if a.y < b.y else "below"))
    if unique and (not relations or rng.random() < 0.5):
        thing = unique[rng.integers(len(unique))]
        return Question("spatial", f"Where is the {thing.color} {thing.shape}?", zone_name(thing.x, thing.y))
    if not relations:
        return None
    a, b, relation = relations[rng.integers(len(relations))]
    answer = "yes"
    if rng.random() < 0.5:
        opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
        relation, answer = opposite[relation], "no"
    text = f"Is the {a.color} {a.shape} {relation} the {b.color} {b.shape}?"
    return Question("spatial", text, answer)


def _reading(scene: Scene, rng: np.random.Generator, pairs: Sequence[Pair]) -> Question | None:
    del rng, pairs
    return Question("reading", "What does the word say?", scene.word) if scene.word else None
