"""Labels of small cells of an image: dense targets for pretraining a vision tower.

A cell has :data:`CELL`×:data:`CELL` pixels and three labels, each 0 if there is nothing to label: the color, the shape
with its size, and the printed character. The calls that draw an image also make its labels
(:func:`stf_jax.data.world.paint`), so the two cannot disagree.

Drills are images full of what is hard for a tower: lines of characters of all heights, and rows of shapes.
"""

import string
from collections.abc import Iterator

import numpy as np
import PIL.Image
import PIL.ImageDraw

from stf_jax.data.scenes import COLORS, HELD_OUT_WORDS, SHAPES, Thing, draw_thing
from stf_jax.data.world import (
    HEIGHTS,
    NUMBERS,
    RADII,
    SIDE,
    TRAINING_FONTS,
    ZONE,
    Print,
    Scene,
    Surface,
    is_held_out_number,
    make_background,
    make_rng,
    make_thing,
    paint,
    pairs_at,
    text_width,
)

CELL = 4  # pixels per side
CELLS = SIDE // CELL
COLOR_NAMES = (*COLORS,)
KINDS_OF_SHAPE = (*((size, shape) for size in RADII for shape in SHAPES), "bar")
CHARACTERS = string.ascii_uppercase + string.digits
_MIN_COVERED = 0.25  # share of a cell that a character must cover to be its label


def label_cells(scene: Scene) -> np.ndarray:
    """Labels all cells of a scene, uint8 [CELLS, CELLS, 3], each below :data:`stf_jax.models.cells.CLASSES`."""
    surface = _Labels()
    paint(surface, scene)
    return surface.labels


class _Labels(Surface):
    """A surface that records labels instead of drawing."""

    def __init__(self) -> None:
        self.labels = np.zeros((CELLS, CELLS, 3), np.uint8)
        self._covered = np.zeros((CELLS, CELLS))  # share of each cell that its character covers

    def add_thing(self, thing: Thing) -> None:
        image = PIL.Image.new("RGB", (SIDE, SIDE))
        radius = RADII[thing.size]
        draw_thing(PIL.ImageDraw.Draw(image), thing, radius, 1, (0, 0, 0))
        colored = np.asarray(image).any(-1).reshape(CELLS, CELL, CELLS, CELL).mean((1, 3)) > 0.4
        self.labels[colored, 0] = 1 + COLOR_NAMES.index(thing.color)
        middle = CELL * (np.arange(CELLS) + 0.5) - 0.5
        inside = np.hypot(middle - thing.x, middle[:, None] - thing.y) <= radius
        self.labels[inside, 1] = 1 + KINDS_OF_SHAPE.index((thing.size, thing.shape))

    def add_text(self, text: str, x: float, y: float, height: int, font: str, anchor: str = "m") -> None:
        left = x - {"l": 0, "m": 0.5, "r": 1}[anchor] * text_width(text, height, font)
        rows = _overlap(y - height / 2, y + height / 2)
        for i, character in enumerate(text):
            edges = (left + text_width(text[:n], height, font) for n in (i, i + 1))
            covered = np.outer(rows, _overlap(*edges))
            here = (covered >= _MIN_COVERED) & (covered > self._covered)
            self.labels[here, 2] = 1 + CHARACTERS.index(character)
            self._covered[here] = covered[here]

    def add_bar(self, left: float, top: float, right: float, bottom: float, color: str) -> None:
        here = np.outer(_overlap(top, bottom), _overlap(left, right)) > 0.5
        self.labels[here, 0] = 1 + COLOR_NAMES.index(color)
        self.labels[here, 1] = 1 + KINDS_OF_SHAPE.index("bar")

    def add_line(self, left: float, top: float, right: float, bottom: float) -> None:
        """Lines have no label."""


def _overlap(begin: float, end: float) -> np.ndarray:
    """Returns the share of each row (or column) of cells that is between two positions in pixels."""
    edges = CELL * np.arange(CELLS)
    return np.clip(np.minimum(edges + CELL, end) - np.maximum(edges, begin), 0, CELL) / CELL


def make_drill(seed: int, index: int) -> Scene:
    """Makes the drill of an index: each third of the image has lines of characters, or three shapes.

    It contains nothing that is held out, not even inside lines.
    """
    rng = make_rng(seed, False, index)
    background = make_background(rng)
    things: list[Thing] = []
    prints: list[Print] = []
    for row in range(3):
        if rng.random() < 0.3:
            things += [make_thing(rng, row, column, pairs_at(row, column, held_out=False)) for column in range(3)]
        else:
            prints += _make_lines(rng, ZONE * row, ZONE * (row + 1))
    return Scene(background, tuple(things), tuple(prints))


def _make_lines(rng: np.random.Generator, top: int, bottom: int) -> Iterator[Print]:
    font = TRAINING_FONTS[rng.integers(len(TRAINING_FONTS))]
    y = top + int(rng.integers(1, 5))
    while (height := int(rng.choice(HEIGHTS))) and y + height < bottom:
        characters = ""
        max_width = SIDE - 6 - int(rng.integers(0, 30))
        while text_width(longer := characters + CHARACTERS[rng.integers(len(CHARACTERS))], height, font) < max_width:
            is_held_out = longer[-2:] in NUMBERS and is_held_out_number(longer[-2:], font)
            if longer[-3:] not in HELD_OUT_WORDS and not is_held_out:
                characters = longer
        spare = SIDE - 4 - text_width(characters, height, font)
        x = SIDE // 2 + int(rng.integers(-spare // 2, spare // 2 + 1))
        yield Print(characters, x, y + height // 2, height, font)
        y += height + int(rng.integers(3, 8))
