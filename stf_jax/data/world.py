"""Embedded data, second edition: the contents of images, and how they are drawn.

Images have :data:`SIDE`×:data:`SIDE` pixels and four layouts: colored shapes, printed texts, bar charts and forms.
They contain what token reduction is known to lose: small print, numbers in charts and forms, counts and positions.
Everything follows from (seed, split, index), through numpy's generators alone.

Held-out images use another seed and show what training never shows: each image with shapes has at least one whose
color and shape training never puts in that zone, all printed words are new, half of the prints use new fonts, and each
two-digit number is in a font in which training never prints it.
"""

import dataclasses
import functools
import importlib.util
import pathlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from stf_jax.data.scenes import (
    COLORS,
    HELD_OUT_WORDS,
    SHAPES,
    TRAINING_WORDS,
    Pair,
    Thing,
    draw_thing,
)

SIDE = 96  # pixels
ZONE = SIDE // 3
LAYOUTS = {"shapes": 0.4, "texts": 0.25, "chart": 0.175, "form": 0.175}  # shares of the images
RADII = {"small": 8, "large": 13}  # pixels from a shape's center to its edge
MAX_THINGS = 4
HEIGHTS = (5, 6, 8, 10, 13, 17, 22)  # pixels, of printed capitals
LARGE = 13  # the smallest height of large print
TRAINING_FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif", "STIXGeneralBol")
HELD_OUT_FONTS = ("DejaVuSerif-Bold", "cmss10")
NUMBERS = [str(n) for n in range(10, 100)]
BAR_LABELS = "BDHKLMNPRSTV"
FORM_LABELS = ("TOTAL", "TAX", "TIP", "ROOM", "AGE", "CODE", "SIZE", "SEAT", "LINE", "UNIT")
ROWS = ("top", "middle", "bottom")
PAIRS = [(color, shape) for color in COLORS for shape in SHAPES]
# For each pair, the one of the nine zones where training never shows it. If pairs were held out everywhere, a small
# model would learn that they do not exist, and call a yellow ring anything but yellow.
HELD_OUT_PLACES = {pair: index % 9 for index, pair in enumerate(PAIRS)}
_SCALE = 3  # drawn larger, then reduced, for smooth edges


def is_held_out_number(number: str, font: str) -> bool:
    """Whether training never prints a number in a font: one number in five per training font, and all in new fonts.

    If numbers were held out in all fonts, a language model would learn that no 1 follows a 4, and read 41 as 47.
    """
    return font in HELD_OUT_FONTS or (int(number[0]) + int(number[1])) % 5 == TRAINING_FONTS.index(font)


@functools.cache
def list_numbers(font: str, held_out: bool) -> list[str]:
    """Lists the two-digit numbers that are printed in a font, in training or in held-out images."""
    return [number for number in NUMBERS if is_held_out_number(number, font) == held_out]


@dataclasses.dataclass(frozen=True)
class Print:
    """A printed word or number; x and y are its center in pixels, ``height`` is that of its capitals."""

    text: str
    x: int
    y: int
    height: int
    font: str

    @property
    def row(self) -> str:
        """The third of the image that it is in, one of :data:`ROWS`."""
        return ROWS[self.y // ZONE]


@dataclasses.dataclass(frozen=True)
class Chart:
    """A bar chart with a letter below each bar and its value, 1 to 9, above it; all values differ."""

    labels: tuple[str, ...]
    values: tuple[int, ...]
    colors: tuple[str, ...]
    height: int
    font: str


@dataclasses.dataclass(frozen=True)
class Form:
    """Rows of cells. A receipt has a label and a number per row; a table has lettered columns and numbered rows."""

    labels: tuple[str, ...]  # of rows in a receipt, of columns in a table
    cells: tuple[tuple[str, ...], ...]  # by row
    height: int
    font: str

    @property
    def is_table(self) -> bool:
        """Whether it is a table rather than a receipt."""
        return len(self.cells[0]) > 1


@dataclasses.dataclass(frozen=True)
class Scene:
    """The contents of an image: shapes and prints in reading order, a chart, or a form."""

    background: tuple[int, int, int]
    things: tuple[Thing, ...] = ()
    prints: tuple[Print, ...] = ()
    chart: Chart | None = None
    form: Form | None = None


def make_rng(seed: int, held_out: bool, index: int) -> np.random.Generator:
    """Makes the random generator of an index and split."""
    return np.random.default_rng([seed, int(held_out), index, 2])


def make_scene(seed: int, index: int, held_out: bool = False, max_things: int = MAX_THINGS) -> Scene:
    """Makes the scene of an index.

    ``max_things`` limits its shapes, prints, bars and form lines, but charts and forms have at least two bars or lines.
    """
    rng = make_rng(seed, held_out, index)
    background = make_background(rng)
    layout = str(rng.choice(list(LAYOUTS), p=list(LAYOUTS.values())))
    if layout == "chart":
        return Scene(background, chart=_make_chart(rng, held_out, max_things))
    if layout == "form":
        return Scene(background, form=_make_form(rng, held_out, max_things))
    if layout == "shapes":
        rows = rng.choice(3, int(rng.random() < 0.4), replace=False)
        count = int(rng.integers(1, max_things + 1))
    else:
        rows = rng.choice(3, rng.integers(1, min(max_things, 3) + 1), replace=False)
        count = int(len(rows) < 3 and rng.random() < 0.5)
    prints = tuple(_make_print(rng, held_out, int(row)) for row in sorted(rows))
    free = [(row, column) for row in range(3) for column in range(3) if row not in rows]
    return Scene(background, _make_things(rng, held_out, count, free), prints)


def make_background(rng: np.random.Generator) -> tuple[int, int, int]:
    """Makes a light or dark RGB color."""
    light = rng.integers(205, 250) if rng.random() < 0.5 else rng.integers(10, 60)
    red, green, blue = (int(np.clip(light + rng.integers(-12, 13), 0, 255)) for _ in range(3))
    return red, green, blue


def make_thing(rng: np.random.Generator, row: int, column: int, pairs: list[Pair]) -> Thing:
    """Makes a shape of random size inside one of the nine zones, with its color and shape from ``pairs``."""
    color, shape = pairs[rng.integers(len(pairs))]
    size = str(rng.choice(list(RADII)))
    reach = ZONE // 2 - RADII[size] - 1
    x, y = (ZONE * zone + ZONE // 2 + int(rng.integers(-reach, reach + 1)) for zone in (column, row))
    return Thing(size, color, shape, x, y)


def pairs_at(row: int, column: int, held_out: bool) -> list[Pair]:
    """Returns the (color, shape) pairs that are held out in a zone, or those that training may show there."""
    return [pair for pair, place in HELD_OUT_PLACES.items() if (place == 3 * row + column) == held_out]


def _make_things(
    rng: np.random.Generator, held_out: bool, count: int, free: Sequence[tuple[int, int]]
) -> tuple[Thing, ...]:
    """Makes shapes in separate zones. Half of the time some share a color or a shape, so there is more to count."""
    zones = sorted(free[i] for i in rng.permutation(len(free))[:count])
    shared, value = int(rng.integers(2)), int(rng.integers(6))
    same = int(rng.integers(2, count + 1)) if count > 1 and rng.random() < 0.5 else 0
    held_out_index = int(rng.integers(count)) if count else 0
    things: list[Thing] = []
    for number, (row, column) in enumerate(zones):
        pairs = pairs_at(row, column, held_out and number == held_out_index)
        if number < same:
            pairs = [pair for pair in pairs if pair[shared] == ((*COLORS,), SHAPES)[shared][value]] or pairs
        things.append(make_thing(rng, row, column, pairs))
    return tuple(things)


def _make_print(rng: np.random.Generator, held_out: bool, row: int) -> Print:
    font, height = _choose_font(rng, held_out), int(rng.choice(HEIGHTS))
    words = HELD_OUT_WORDS if held_out else TRAINING_WORDS
    text = str(rng.choice(words if rng.random() < 0.5 else list_numbers(font, held_out)))
    spare = SIDE - text_width(text, height, font) - 4
    x = SIDE // 2 + int(rng.integers(-spare // 2, spare // 2 + 1))
    reach = max(0, ZONE // 2 - height // 2 - 2)
    return Print(text, x, ZONE * row + ZONE // 2 + int(rng.integers(-reach, reach + 1)), height, font)


def _choose_font(rng: np.random.Generator, held_out: bool) -> str:
    new = held_out and rng.random() < 0.5
    return str(rng.choice(HELD_OUT_FONTS if new else TRAINING_FONTS))


def _make_chart(rng: np.random.Generator, held_out: bool, max_things: int) -> Chart:
    count = int(rng.integers(2, max(max_things, 2) + 1))
    labels = tuple(BAR_LABELS[i] for i in rng.permutation(len(BAR_LABELS))[:count])
    values = tuple(int(value) for value in rng.permutation(9)[:count] + 1)
    colors = tuple(str(color) for color in rng.choice(list(COLORS), count))
    return Chart(labels, values, colors, int(rng.integers(6, 10)), _choose_font(rng, held_out))


def _make_form(rng: np.random.Generator, held_out: bool, max_things: int) -> Form:
    max_things, font = max(max_things, 2), _choose_font(rng, held_out)
    numbers = list_numbers(font, held_out)
    if rng.random() < 0.5:
        rows, columns = int(rng.integers(2, max_things + 1)), 1
        labels = tuple(FORM_LABELS[i] for i in rng.permutation(len(FORM_LABELS))[:rows])
    else:
        rows, columns = (int(rng.integers(2, min(max_things, 3) + 1)) for _ in range(2))
        labels = tuple("ABC"[:columns])
    picked = [numbers[i] for i in rng.permutation(len(numbers))[: rows * columns]]
    cells = tuple(tuple(picked[i : i + columns]) for i in range(0, len(picked), columns))
    return Form(labels, cells, int(rng.integers(6, 10)), font)


# ---- Drawing ---------------------------------------------------------------------------------------------------------


@functools.cache
def _load_font(font: str, height: int) -> PIL.ImageFont.FreeTypeFont:
    """Loads a font in the size that makes capitals ``height`` pixels high."""
    package = importlib.util.find_spec("matplotlib")  # the fonts are in its folder; it is not imported
    assert package is not None  # it is a requirement
    assert package.submodule_search_locations is not None  # it is a package
    file = pathlib.Path(package.submodule_search_locations[0]) / "mpl-data" / "fonts" / "ttf" / f"{font}.ttf"
    top, bottom = PIL.ImageFont.truetype(file, 200).getbbox("H", anchor="ls")[1::2]
    return PIL.ImageFont.truetype(file, 200 * height / (bottom - top))


@functools.cache
def text_width(text: str, height: int, font: str) -> int:
    """The width of printed text in pixels."""
    return -int(-_load_font(font, height * _SCALE).getlength(text) // _SCALE)


class Surface(Protocol):
    """A surface for a scene; all positions and sizes are in pixels of the image."""

    def add_thing(self, thing: Thing) -> None:
        """Adds a shape."""

    def add_text(self, text: str, x: float, y: float, height: int, font: str, anchor: str = "m") -> None:
        """Adds a text, its capitals centered at y; ``anchor`` says whether x is its l(eft), m(iddle) or r(ight)."""

    def add_bar(self, left: float, top: float, right: float, bottom: float, color: str) -> None:
        """Adds a filled rectangle in one of :data:`COLORS`."""

    def add_line(self, left: float, top: float, right: float, bottom: float) -> None:
        """Adds a filled rectangle in the text color."""


class Canvas(Surface):
    """A surface that draws an image."""

    def __init__(self, background: tuple[int, int, int]) -> None:
        """Starts with a plain background."""
        self.background = background
        self.ink = (15, 15, 15) if sum(background) > 384 else (245, 245, 245)
        self._image = PIL.Image.new("RGB", (SIDE * _SCALE, SIDE * _SCALE), background)
        self._pen = PIL.ImageDraw.Draw(self._image)

    def add_thing(self, thing: Thing) -> None:
        """Draws a shape."""
        draw_thing(self._pen, thing, RADII[thing.size], _SCALE, self.background)

    def add_text(self, text: str, x: float, y: float, height: int, font: str, anchor: str = "m") -> None:
        """Draws a text, its capitals centered at y; ``anchor`` says whether x is its l(eft), m(iddle) or r(ight)."""
        position = x * _SCALE, y * _SCALE + height * _SCALE / 2
        self._pen.text(position, text, fill=self.ink, font=_load_font(font, height * _SCALE), anchor=f"{anchor}s")

    def add_bar(self, left: float, top: float, right: float, bottom: float, color: str) -> None:
        """Draws a filled rectangle in one of :data:`COLORS`."""
        self._draw_box(left, top, right, bottom, COLORS[color])

    def add_line(self, left: float, top: float, right: float, bottom: float) -> None:
        """Draws a filled rectangle in the text color."""
        self._draw_box(left, top, right, bottom, self.ink)

    def _draw_box(self, left: float, top: float, right: float, bottom: float, color: tuple[int, int, int]) -> None:
        corners = (left * _SCALE, top * _SCALE, right * _SCALE - 1, bottom * _SCALE - 1)
        self._pen.rectangle(corners, fill=color)

    def finish(self, seed: int) -> PIL.Image.Image:
        """Returns the image, with noise."""
        small = np.asarray(self._image.reduce(_SCALE), np.int16)
        grain = np.random.default_rng(seed).integers(-6, 7, small.shape)
        return PIL.Image.fromarray(np.clip(small + grain, 0, 255).astype(np.uint8))


def draw(scene: Scene, seed: int = 0) -> PIL.Image.Image:
    """Draws a scene in RGB; ``seed`` is for its noise."""
    canvas = Canvas(scene.background)
    paint(canvas, scene)
    return canvas.finish(seed)


def paint(canvas: Surface, scene: Scene) -> None:
    """Adds everything in a scene to a surface."""
    for thing in scene.things:
        canvas.add_thing(thing)
    for item in scene.prints:
        canvas.add_text(item.text, item.x, item.y, item.height, item.font)
    if scene.chart is not None:
        _draw_chart(canvas, scene.chart)
    if scene.form is not None:
        _draw_form(canvas, scene.form)


def _draw_chart(canvas: Surface, chart: Chart) -> None:
    floor, unit, pitch = SIDE - 16, 6.5, (SIDE - 12) / len(chart.labels)
    for i, (label, value, color) in enumerate(zip(chart.labels, chart.values, chart.colors, strict=True)):
        middle = 6 + (i + 0.5) * pitch
        canvas.add_bar(middle - 0.32 * pitch, floor - unit * value, middle + 0.32 * pitch, floor, color)
        canvas.add_text(label, middle, floor + 8, chart.height, chart.font)
        canvas.add_text(str(value), middle, floor - unit * value - 2 - chart.height / 2, chart.height, chart.font)
    canvas.add_line(4, floor, SIDE - 4, floor + 1)


def _draw_form(canvas: Surface, form: Form) -> None:
    rows = len(form.cells) + form.is_table
    pitch = (SIDE - 16) / rows
    texts: list[tuple[str, float, str]]  # each with its x and anchor
    for row in range(rows):
        y = 8 + (row + 0.5) * pitch
        if not form.is_table:
            texts = [(form.labels[row], 6, "l"), (form.cells[row][0], SIDE - 6, "r")]
        else:
            columns = [26 + (i + 0.5) * (SIDE - 30) / len(form.labels) for i in range(len(form.labels))]
            texts = [] if row == 0 else [(str(row), 12, "m")]
            line = form.labels if row == 0 else form.cells[row - 1]
            texts += [(text, x, "m") for text, x in zip(line, columns, strict=True)]
            if row == 0:
                canvas.add_line(4, y + pitch / 2, SIDE - 4, y + pitch / 2 + 1)
        for text, x, anchor in texts:
            canvas.add_text(text, x, y, form.height, form.font, anchor)
    if form.is_table:
        canvas.add_line(22, 4, 23, SIDE - 4)
