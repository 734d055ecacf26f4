"""Tests that cell labels match the image, and that drills contain nothing that is held out."""

import itertools
import re

import numpy as np
import pytest

from stf_jax.data import world
from stf_jax.data.scenes import COLORS, HELD_OUT_WORDS, Thing
from stf_jax.data.sources.scenes import SceneRecords
from stf_jax.data.world import (
    HELD_OUT_FONTS,
    HELD_OUT_PLACES,
    NUMBERS,
    RADII,
    SIDE,
    Chart,
    Print,
    Scene,
    is_held_out_number,
    text_width,
)
from stf_jax.data.world_labels import CELL, CELLS, CHARACTERS, COLOR_NAMES, KINDS_OF_SHAPE, label_cells, make_drill
from stf_jax.models.cells import CLASSES

LIGHT = (230, 230, 230)


def scenes(count):
    yield from (world.make_scene(0, index) for index in range(count))
    yield from (make_drill(0, index) for index in range(count))


def test_number_of_classes():
    names = COLOR_NAMES, KINDS_OF_SHAPE, CHARACTERS
    assert tuple(len(some) + 1 for some in names) == CLASSES
    seen = np.zeros((3, max(CLASSES)), bool)
    for scene in scenes(200):
        found = label_cells(scene)
        assert found.shape == (CELLS, CELLS, 3)
        assert found.dtype == np.uint8
        for sort in range(3):
            seen[sort, np.unique(found[..., sort])] = True
    assert [int(row.sum()) for row in seen] == [*CLASSES]


def test_color_labels_match_the_image():
    """Compared with the color nearest to the cell's mean in the image, for cells of one color."""
    checked = 0
    for index, scene in enumerate(itertools.islice(scenes(60), 120)):
        image = np.asarray(world.draw(scene, index), np.float64)
        mean = image.reshape(CELLS, CELL, CELLS, CELL, 3).mean((1, 3))
        spread = image.reshape(CELLS, CELL, CELLS, CELL, 3).std((1, 3)).max(-1)
        colors = np.array([scene.background, *COLORS.values()], np.float64)
        nearest = np.linalg.norm(mean[:, :, None] - colors, axis=-1).argmin(-1)
        here = label_cells(scene)
        flat = (spread < 8) & (here[..., 2] == 0)  # of one color, and without print
        flat &= np.linalg.norm(mean[:, :, None] - colors, axis=-1).min(-1) < 12
        assert np.array_equal(here[..., 0][flat], nearest[flat])
        checked += int((nearest[flat] > 0).sum())
    assert checked > 1000


@pytest.mark.parametrize("height", [8, 13, 22])
def test_character_labels_are_in_reading_order(height):
    text = "K7M" if height == 22 else "K7MB2"
    found = label_cells(Scene(LIGHT, prints=(Print(text, 48, 48, height, "DejaVuSansMono"),)))[..., 2]
    rows = np.nonzero(found.any(1))[0]
    assert abs(CELL * (rows.mean() + 0.5) - 48) <= CELL
    line = found[rows[len(rows) // 2]]
    read = "".join(CHARACTERS[key - 1] for key, _ in itertools.groupby(line[line > 0]))
    assert read == text
    wide = CELL * np.ptp(np.nonzero(line)[0]) + CELL
    assert abs(wide - text_width(text, height, "DejaVuSansMono")) <= 2 * CELL


def test_shape_labels_have_size_kind_and_position():
    things = (Thing("small", "red", "star", 16, 16), Thing("large", "blue", "ring", 70, 60))
    found = label_cells(Scene(LIGHT, things))
    for thing in things:
        kind = 1 + KINDS_OF_SHAPE.index((thing.size, thing.shape))
        rows, columns = np.nonzero(found[..., 1] == kind)
        assert abs(CELL * (rows.mean() + 0.5) - thing.y) <= CELL
        assert abs(CELL * (columns.mean() + 0.5) - thing.x) <= CELL
        assert len(rows) == pytest.approx(np.pi * RADII[thing.size] ** 2 / CELL**2, rel=0.3)
    assert {*np.unique(found[..., 0])} == {0, *(1 + COLOR_NAMES.index(thing.color) for thing in things)}


def test_bar_labels_follow_values():
    chart = Chart(("B", "D"), (2, 8), ("red", "green"), 8, "DejaVuSans")
    found = label_cells(Scene(LIGHT, chart=chart))
    low, high = (int((found[..., 0] == 1 + COLOR_NAMES.index(color)).sum()) for color in chart.colors)
    assert 3 < high / low < 5
    assert ((found[..., 1] == 1 + KINDS_OF_SHAPE.index("bar")) == (found[..., 0] > 0)).all()
    assert {CHARACTERS[key - 1] for key in np.unique(found[..., 2])[1:]} == {"B", "D", "2", "8"}


def test_drills_contain_nothing_held_out():
    characters = set()
    for index in range(600):
        scene = make_drill(0, index)
        assert not any(HELD_OUT_PLACES[t.pair] == t.y // 32 * 3 + t.x // 32 for t in scene.things)
        for item in scene.prints:
            assert item.font not in HELD_OUT_FONTS
            found = {item.text[i : i + size] for size in (2, 3) for i in range(len(item.text))}
            assert not found & {*HELD_OUT_WORDS}
            assert not any(is_held_out_number(number, item.font) for number in found & {*NUMBERS})
            characters |= {*item.text}
            assert text_width(item.text, item.height, item.font) <= SIDE
            assert item.height / 2 <= item.y <= SIDE - item.height / 2
    assert characters == {*CHARACTERS}


def test_records_with_labels_are_deterministic():
    records = SceneRecords("cells", 8, seed=3, edition=2)
    for index in range(8):
        record = records[index]
        (image,) = record.images
        np.testing.assert_array_equal(np.asarray(image()), np.asarray(records[index].images[0]()))
        np.testing.assert_array_equal(record.labels(), records[index].labels())
        assert record.labels().any()
        assert not re.search("[A-Z0-9]", " ".join(turn.text for turn in record.turns))
