"""Tests that the embedded data are deterministic and true, and that held-out data do not occur in training."""

import hashlib
import itertools
import re

import numpy as np
import PIL.ImageFont
import pytest

from stf_jax.data import scenes
from stf_jax.data.records import IMAGE_MARK
from stf_jax.data.scenes import (
    COLORS,
    HELD_OUT_PAIRS,
    HELD_OUT_WORDS,
    KINDS,
    RADII,
    SHAPES,
    SHORT_ANSWER,
    SIDE,
    TRAINING_PAIRS,
    TRAINING_WORDS,
    Scene,
    Thing,
    draw,
    make_caption,
    make_questions,
    make_scene,
)
from stf_jax.data.sources.scenes import SceneRecords

MANY = 3000
TASKS = ("documents", "captions", "mixture", "conversations")
PLURALS = {shape: shape + ("es" if shape == "cross" else "s") for shape in SHAPES}
NAMED_PAIR = re.compile(rf"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})")
NAMED_WORD = re.compile(r"\b[A-Z]{3}\b")


@pytest.fixture(scope="module")
def world() -> dict[bool, list[Scene]]:
    """Scenes of both splits, by ``held_out``."""
    return {held_out: [make_scene(0, index, held_out) for index in range(MANY)] for held_out in (False, True)}


@pytest.fixture(scope="module")
def questions_of(world):
    """Pairs of (scene, question) of both splits, by ``held_out``."""
    return {
        held_out: [(s, q) for i, s in enumerate(some) for q in make_questions(s, np.random.default_rng(i), held_out)]
        for held_out, some in world.items()
    }


def caption_parts(text):
    """Returns the sorted parts of a caption."""
    return sorted(text.split(", "))


def texts(record):
    return [turn.text for turn in record.turns]


# ---- Determinism -----------------------------------------------------------------------------------------------------


# The miniatures were trained on these texts; if they change, the miniatures must be trained again.
DIGESTS = {
    ("documents", False): "12325ad87bbbf222",
    ("captions", False): "8e175f2b004c5488",
    ("mixture", False): "07331d702fefb38b",
    ("conversations", False): "444196c786723b2f",
    ("conversations", True): "cc6f1fa2f4c2d1c7",
}


def test_text_of_a_record_is_unchanged():
    assert texts(SceneRecords("conversations", 10, seed=0)[7]) == [
        "<image>\nIs the purple square left of the green square?\n" + SHORT_ANSWER,
        "no",
        "What does the word say?",
        "BAS",
        "How many shapes are there?",
        "4",
        "Is the purple square small or large?",
        "large",
        "Is there a red shape?",
        "no",
        "How many circles are there?",
        "1",
        "Is the orange circle above the green square?",
        "yes",
        "What color is the circle?",
        "orange",
        "Is there a green shape?",
        "yes",
        "Is the green square small or large?",
        "small",
        "Is the blue star above the orange circle?",
        "no",
        "How many stars are there?",
        "1",
    ]
    assert make_caption(make_scene(0, 7)) == (
        "a small orange circle at the top left, a large purple square at the top right, "
        "a small green square at the left, a small blue star at the center, the word BAS at the bottom"
    )


@pytest.mark.parametrize(("task", "held_out"), DIGESTS)
def test_text_of_many_records_is_unchanged(task, held_out):
    records = SceneRecords(task, 64, seed=3, held_out=held_out)
    joined = "\n".join(text for index in range(64) for text in texts(records[index]))
    assert hashlib.sha256(joined.encode()).hexdigest()[:16] == DIGESTS[task, held_out]


def test_records_do_not_depend_on_the_order_of_reading():
    one, other = (SceneRecords("conversations", 50, seed=5) for _ in range(2))
    forward = {index: one[index] for index in range(50)}
    for index in np.random.default_rng(0).permutation(50):
        again = other[int(index)]
        assert (again.id, again.turns) == (forward[index].id, forward[index].turns)
        assert np.array_equal(np.asarray(again.images[0]()), np.asarray(forward[index].images[0]()))


def test_seeds_indices_and_splits_differ():
    variants = [(seed, index, held_out) for seed in range(5) for index in range(20) for held_out in (False, True)]
    assert len({make_scene(*variant) for variant in variants}) == len(variants)


@pytest.mark.parametrize("most", [1, 2, 4, 6])
def test_scenes_have_at_most_max_things(most):
    counts = [len(make_scene(0, index, max_things=most).things) for index in range(300)]
    assert set(counts) == set(range(1, most + 1))
    records = SceneRecords("captions", 300, seed=0, max_things=most)
    for index in range(20):
        scene = make_scene(0, index, max_things=most)
        assert caption_parts(records[index].turns[1].text) == caption_parts(make_caption(scene))


# ---- Held out --------------------------------------------------------------------------------------------------------


def test_pairs_and_words_are_split():
    assert sorted(HELD_OUT_PAIRS) + sorted(TRAINING_PAIRS) == sorted(
        itertools.product(COLORS, SHAPES), key=lambda pair: (pair not in HELD_OUT_PAIRS, pair)
    )
    # One per color and per shape.
    assert {color for color, _ in HELD_OUT_PAIRS} == set(COLORS)
    assert {shape for _, shape in HELD_OUT_PAIRS} == set(SHAPES)
    assert len(HELD_OUT_PAIRS) == 6
    assert not set(HELD_OUT_WORDS) & set(TRAINING_WORDS)
    assert len(set(HELD_OUT_WORDS + TRAINING_WORDS)) == len(HELD_OUT_WORDS + TRAINING_WORDS) == 12 * 5 * 12


def test_every_letter_stands_at_every_place_in_training_words():
    for place in range(3):
        letters = {word[place] for word in TRAINING_WORDS}
        assert letters == set("AEIOU" if place == 1 else "BDHLMNPRSTVZ")
        assert letters == {word[place] for word in HELD_OUT_WORDS}


def test_held_out_scenes_show_held_out_things(world):
    for scene in world[True]:
        assert any(thing.pair in HELD_OUT_PAIRS for thing in scene.things)
        assert not scene.word or scene.word in HELD_OUT_WORDS
    assert {scene.word for scene in world[True]} == {"", *HELD_OUT_WORDS}
    assert {thing.pair for scene in world[True] for thing in scene.things} >= HELD_OUT_PAIRS


def test_training_scenes_show_nothing_held_out(world):
    for scene in world[False]:
        assert scene.things
        assert all(thing.pair in TRAINING_PAIRS for thing in scene.things)
        assert not scene.word or scene.word in TRAINING_WORDS
    assert {thing.pair for scene in world[False] for thing in scene.things} == set(TRAINING_PAIRS)


@pytest.mark.parametrize("task", TASKS)
def test_training_texts_name_nothing_held_out(task, monkeypatch):
    monkeypatch.setattr(scenes, "draw", lambda *_: None)  # drawing is slow and not needed
    records = SceneRecords(task, MANY, seed=1)
    joined = "\n".join(text for index in range(MANY) for text in texts(records[index]))
    pairs, words = set(NAMED_PAIR.findall(joined)), set(NAMED_WORD.findall(joined))
    assert pairs == set(TRAINING_PAIRS)
    assert words <= set(TRAINING_WORDS)
    assert len(words) > 500


# ---- Answers ---------------------------------------------------------------------------------------------------------


def zone_of(x, y):
    rows, columns = ("top", "", "bottom"), ("left", "", "right")
    return " ".join(filter(None, (rows[int(y // 32)], columns[int(x // 32)]))) or "center"


def matching(things, **wanted):
    """Returns the things with the given attributes; some questions are only valid if there is exactly one."""
    return [thing for thing in things if all(getattr(thing, key) == value for key, value in wanted.items())]


def true_answer(scene: Scene, question: str) -> str:
    """Computes the answer from the text of the question and the things in the scene."""
    if question == "What does the word say?":
        assert scene.word
        return scene.word
    if found := re.fullmatch(r"Is there an? (?:(\w+) )?(\w+)\?", question):
        wanted = ({"color": found[1]} if found[1] else {}) | ({"shape": found[2]} if found[2] != "shape" else {})
        assert wanted
        return "yes" if matching(scene.things, **wanted) else "no"
    if found := re.fullmatch(r"Where is the (\w+) (\w+)\?", question):
        (thing,) = matching(scene.things, color=found[1], shape=found[2])
        return zone_of(thing.x, thing.y)
    if found := re.fullmatch(r"How many (?:(\w+) )?(\w+) are there\?", question):
        wanted = {"color": found[1]} if found[1] else {}
        singular = {plural: shape for shape, plural in PLURALS.items()}
        if found[2] != "shapes":
            wanted["shape"] = singular[found[2]]
        return str(len(matching(scene.things, **wanted)))
    if found := re.fullmatch(r"What color is the (\w+)\?", question):
        (thing,) = matching(scene.things, shape=found[1])
        return thing.color
    if found := re.fullmatch(r"What shape is (\w+)\?", question):
        (thing,) = matching(scene.things, color=found[1])
        return thing.shape
    if found := re.fullmatch(r"Is the (\w+) (\w+) small or large\?", question):
        (thing,) = matching(scene.things, color=found[1], shape=found[2])
        return thing.size
    found = re.fullmatch(r"Is the (\w+) (\w+) (left of|right of|above|below) the (\w+) (\w+)\?", question)
    (a,), (b,) = (matching(scene.things, color=found[i], shape=found[i + 1]) for i in (1, 4))
    along = "x" if found[3] in ("left of", "right of") else "y"
    distance = getattr(b, along) - getattr(a, along)
    assert abs(distance) >= SIDE / 6, "too close to tell"
    return "yes" if (distance > 0) == (found[3] in ("left of", "above")) else "no"


@pytest.mark.parametrize("held_out", [False, True])
def test_answers_are_true(questions_of, held_out):
    for scene, question in questions_of[held_out]:
        assert question.answer == true_answer(scene, question.text), (scene, question)
    assert {question.kind for _, question in questions_of[held_out]} == set(KINDS)
    assert len(questions_of[held_out]) > 3 * MANY


def test_true_answer_on_a_known_scene():
    """Checks true_answer against answers by a person."""
    ring, star = Thing("large", "red", "ring", 20, 30), Thing("small", "blue", "star", 70, 34)
    scene = Scene((ring, star), "BAD", 50, 80, (220, 220, 220))
    answers = {
        "What does the word say?": "BAD",
        "Is there a red ring?": "yes",
        "Is there an orange ring?": "no",
        "Is there a blue shape?": "yes",
        "Is there a green shape?": "no",
        "Is there a ring?": "yes",
        "Is there a circle?": "no",
        "Where is the red ring?": "top left",
        "Where is the blue star?": "right",
        "How many shapes are there?": "2",
        "How many red shapes are there?": "1",
        "How many crosses are there?": "0",
        "What color is the star?": "blue",
        "What shape is red?": "ring",
        "Is the red ring small or large?": "large",
        "Is the red ring left of the blue star?": "yes",
        "Is the red ring right of the blue star?": "no",
    }
    assert {question: true_answer(scene, question) for question in answers} == answers
    with pytest.raises(AssertionError, match="too close"):
        true_answer(scene, "Is the red ring above the blue star?")


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("kind", ["existence", "spatial"])
def test_yes_and_no_are_equally_likely(questions_of, held_out, kind):
    answers = [q.answer for _, q in questions_of[held_out] if q.kind == kind and q.text.startswith("Is")]
    assert set(answers) == {"yes", "no"}
    assert len(answers) > MANY / 4
    assert abs(answers.count("yes") / len(answers) - 0.5) < 0.04


def test_at_most_one_question_of_each_kind(questions_of):
    for scene, group in itertools.groupby(questions_of[False], key=lambda item: item[0]):
        kinds = [question.kind for _, question in group]
        assert len(kinds) == len(set(kinds))
        assert ("reading" in kinds) == bool(scene.word)
        assert {"existence", "count"} <= set(kinds)


def test_guessing_the_most_common_answer_scores_low(questions_of):
    for kind in KINDS:
        answers = [question.answer for _, question in questions_of[False] if question.kind == kind]
        most = max(answers.count(answer) for answer in set(answers))
        assert most / len(answers) < 0.65, kind


def test_existence_questions_ask_for_colors_shapes_and_pairs(questions_of):
    asks = [question.text for _, question in questions_of[False] if question.kind == "existence"]
    for form in (
        r"Is there an? \w+ shape\?",
        rf"Is there a ({'|'.join(SHAPES)})\?",
        rf"Is there an? {NAMED_PAIR.pattern}\?",
    ):
        assert abs(sum(bool(re.fullmatch(form, text)) for text in asks) / len(asks) - 1 / 3) < 0.04


def test_existence_questions_in_held_out_scenes_ask_for_held_out_pairs(questions_of):
    yes = [q for _, q in questions_of[True] if (q.kind, q.answer) == ("existence", "yes")]
    named = [pair.groups() for question in yes if (pair := NAMED_PAIR.search(question.text))]
    assert len(named) > MANY / 12
    assert set(named) <= HELD_OUT_PAIRS


@pytest.mark.parametrize("held_out", [False, True])
def test_captions_name_everything_with_its_position(world, held_out):
    for scene in world[held_out]:
        expected = [(f"{t.size} {t.color} {t.shape}", t.x, t.y) for t in scene.things]
        expected += [(f"word {scene.word}", scene.word_x, scene.word_y)] if scene.word else []
        parts = make_caption(scene).split(", ")
        assert len(parts) == len(expected)
        for part, (what, x, y) in zip(parts, expected, strict=True):
            assert part in (f"a {what} at the {zone_of(x, y)}", f"the {what} at the {zone_of(x, y)}")


# ---- Positions -------------------------------------------------------------------------------------------------------


def ink_box(scene):
    """Returns the bounding box of the printed word in pixels, measured by the font."""
    font = PIL.ImageFont.load_default(size=60)
    left, top, right, bottom = (edge / 3 for edge in font.getbbox(scene.word, anchor="mm"))
    return scene.word_x + left, scene.word_y + top, scene.word_x + right, scene.word_y + bottom


@pytest.mark.parametrize("held_out", [False, True])
def test_things_are_inside_and_do_not_overlap(world, held_out):
    for scene in world[held_out]:
        boxes = [(t.x - r, t.y - r, t.x + r, t.y + r) for t in scene.things for r in [RADII[t.size]]]
        for box in boxes:
            assert min(box) >= 0
            assert max(box) <= SIDE - 1
        if scene.word:
            boxes.append(ink_box(scene))
            assert min(boxes[-1]) >= -1  # the widest letters may touch the edge of the image
            assert max(boxes[-1]) <= SIDE
        for a, b in itertools.combinations(boxes, 2):
            assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1], scene


# ---- Drawing ---------------------------------------------------------------------------------------------------------

GRAIN = 6


# shape → points inside and points outside, in radii from its center, mirrored left and right.
OUTLINES = {
    "circle": ([(0, -0.85), (0, 0.85), (0.85, 0), (0.6, 0.6), (0.6, -0.6)], [(0.85, 0.85), (0.85, -0.85)]),
    "square": ([(0.7, 0.7), (0.7, -0.7), (0.7, 0)], [(1, 0), (0, 1), (0, -1)]),
    "triangle": ([(0, -0.6), (0.5, 0.3), (0, 0.3)], [(0.6, -0.6), (0, 0.8), (1, 0)]),
    "star": ([(0, -0.5), (0.5, -0.2), (0, 0.2)], [(0.6, -0.75), (0, 0.75), (0.9, 0.5)]),
    "cross": ([(0, -0.85), (0, 0.85), (0.85, 0)], [(0.7, 0.7), (0.7, -0.7)]),
    "ring": ([(0, -0.75), (0, 0.75), (0.75, 0)], [(0.25, 0), (0, 0.25), (0.85, 0.85), (0.85, -0.85)]),
}


def near(pixels, color):
    return np.abs(pixels.astype(int) - color).max(axis=-1) <= GRAIN


def around(pixels, thing, points):
    radius = RADII[thing.size]
    places = [(thing.y + round(y * radius), thing.x + round(side * x * radius)) for x, y in points for side in (-1, 1)]
    return np.array([pixels[place] for place in places])


@pytest.mark.parametrize("held_out", [False, True])
def test_the_image_matches_the_scene(world, held_out):
    for index, scene in enumerate(world[held_out][:300]):
        image = draw(scene, seed=index)
        assert (image.mode, image.size) == ("RGB", (SIDE, SIDE))
        pixels = np.asarray(image)
        empty = np.ones((SIDE, SIDE), bool)
        for thing in scene.things:
            radius = RADII[thing.size]
            box = (slice(thing.y - radius, thing.y + radius + 1), slice(thing.x - radius, thing.x + radius + 1))
            empty[box] = False
            center = pixels[thing.y - 1 : thing.y + 2, thing.x - 1 : thing.x + 2]
            color = scene.background if thing.shape == "ring" else COLORS[thing.color]
            assert near(center, color).all(), (index, thing)
            inside, outside = (around(pixels, thing, points) for points in OUTLINES[thing.shape])
            assert near(inside, COLORS[thing.color]).all(), (index, thing)
            assert near(outside, scene.background).all(), (index, thing)
        if scene.word:
            left, top, right, bottom = (int(np.clip(edge, 0, SIDE)) for edge in ink_box(scene))
            ink = (15, 15, 15) if sum(scene.background) > 384 else (245, 245, 245)
            share = near(pixels[top : bottom + 1, left : right + 1], ink).mean()
            assert 0.05 < share < 0.6, (index, scene.word, share)
            empty[max(top - 1, 0) : bottom + 2, max(left - 1, 0) : right + 2] = False
        assert near(pixels[empty], scene.background).all(), index


def test_words_are_drawn_letter_by_letter():
    """Images of two words differ only where the words are."""
    blank = Scene((), "", 48, 48, (220, 220, 220))
    bad, bid = (draw(Scene((), word, 48, 48, blank.background)) for word in ("BAD", "BID"))
    rows, columns = np.nonzero((np.asarray(bad) != np.asarray(bid)).any(axis=-1))
    assert len(rows) > 20
    assert abs(rows - 48).max() <= 11
    assert abs(columns - 48).max() <= 24


# ---- Records ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held_out", [False, True])
def test_conversations(held_out):
    records = SceneRecords("conversations", 300, seed=2, held_out=held_out)
    assert len(records) == 300
    for index in range(300):
        record, scene = records[index], make_scene(2, index, held_out)
        assert [turn.speaker for turn in record.turns] == ["human", "gpt"] * (len(record.turns) // 2)
        first, *rest = texts(record)
        assert first.startswith(f"{IMAGE_MARK}\n")
        assert first.endswith(f"\n{SHORT_ANSWER}")
        assert IMAGE_MARK not in "".join(rest)
        asks = [first.split("\n")[1], *rest[1::2]]
        assert len(set(asks)) == len(asks)
        assert [true_answer(scene, question) for question in asks] == rest[::2]
        (image,) = record.images
        assert np.array_equal(np.asarray(image()), np.asarray(draw(scene, index)))


def test_captions_and_documents():
    shuffled = 0
    for task in ("captions", "documents", "mixture"):
        records = SceneRecords(task, 40, seed=2)
        for index in range(40):
            record, scene = records[index], make_scene(2, index)
            if task == "captions" or (task == "mixture" and index % 8):
                assert len(record.images) == 1
                assert [turn.speaker for turn in record.turns] == ["human", "gpt"]
                assert record.turns[0].text.count(IMAGE_MARK) == 1
                assert caption_parts(record.turns[1].text) == caption_parts(make_caption(scene))
                shuffled += record.turns[1].text != make_caption(scene)
            else:
                assert record.images == ()
                first, *rest = record.turns
                assert (first.speaker, first.text) == ("human", make_caption(scene) + "\n")
                assert [turn.speaker for turn in rest] == ["human", "gpt"] * (len(rest) // 2)
                answers = {}
                for question, answer in zip(rest[::2], rest[1::2], strict=True):
                    question = re.fullmatch(r"USER: (.*) ASSISTANT:", question.text).group(1)
                    answers[question] = re.fullmatch(r" (.*)\n", answer.text).group(1)
                assert answers.pop("Describe the picture.") == make_caption(scene)
                assert answers == {question: true_answer(scene, question) for question in answers}
                assert answers
    assert shuffled > 20


def test_ids_are_unique():
    records = SceneRecords("documents", 100, seed=2)
    assert len({records[index].id for index in range(100)}) == 100
