"""The embedded world's second edition: the same each time, true, balanced, and held out."""

import collections
import hashlib
import itertools
import re

import numpy as np
import pytest

from stf_jax.data import world
from stf_jax.data.conversation import document_items, encode, template_items
from stf_jax.data.records import IMAGE_MARK, Record, Turn
from stf_jax.data.scene_records import SceneRecords
from stf_jax.data.scenes import COLORS, HELD_OUT_WORDS, SHAPES, TRAINING_WORDS
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.data.world import (
    HELD_OUT_FONTS,
    HELD_OUT_PLACES,
    NUMBERS,
    RADII,
    SIDE,
    TRAINING_FONTS,
    draw,
    is_held_out_number,
    list_numbers,
    make_scene,
)
from stf_jax.data.world_text import KINDS, make_caption, make_cues, make_questions, zone_name
from stf_jax.studies.miniature import tokens

MANY = 2400
HELD_OUT_SEED = 1_000_003
PLACES = ["top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right"]
NAMED_PLACE = re.compile(
    rf"\b({'|'.join(COLORS)}) ({'|'.join(SHAPES)})(?: at the |\? ASSISTANT: |\?\n)({'|'.join(sorted(PLACES)[::-1])})\b"
)
NAMED_PRINT = re.compile(r"\b(?:[A-Z]{3}|\d\d)\b")


@pytest.fixture(scope="module")
def scenes():
    """Scenes by whether they are held out."""
    return {
        held_out: [make_scene(seed, index, held_out) for index in range(MANY)]
        for held_out, seed in ((False, 0), (True, HELD_OUT_SEED))
    }


@pytest.fixture(scope="module")
def asked(scenes):
    """(scene, question) of both splits, more than 20,000 in all."""
    return {
        held_out: [
            (scene, question)
            for index, scene in enumerate(some)
            for turn in range(3)
            for question in make_questions(scene, np.random.default_rng([index, turn]), held_out)
        ]
        for held_out, some in scenes.items()
    }


def texts(task, count, held_out=False):
    records = SceneRecords(task, count, seed=HELD_OUT_SEED if held_out else 0, held_out=held_out, edition=2)
    return [turn.text for index in range(count) for turn in records[index].turns]


# ---- The same each time ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "held_out", "digest"),
    [
        ("captions", False, "9cc2a8116832dcd1"),
        ("conversations", False, "ef14337a8a7e7c3f"),
        ("documents", False, "3c758ff2fcc6654c"),
        ("conversations", True, "ad58f139799f0078"),
    ],
)
def test_text_of_many_records_is_what_it_always_was(task, held_out, digest):
    """On every version of Python and numpy."""
    assert hashlib.sha256("\n".join(texts(task, 500, held_out)).encode()).hexdigest()[:16] == digest


def test_an_image_is_the_same_each_time_and_of_its_index_alone(scenes):
    for index in (0, 7, 11):
        one, again = (np.asarray(draw(make_scene(0, index), index)) for _ in range(2))
        np.testing.assert_array_equal(one, again)
        assert one.shape == (SIDE, SIDE, 3)
    assert len(set(scenes[False])) > 0.99 * MANY
    assert not set(scenes[False]) & set(scenes[True])


def test_the_mixture_has_captions_as_the_plain_template_has_them():
    """Whatever the template of the run that trains on it."""
    tokenizer, records = load_tokenizer("miniature/2"), SceneRecords("mixture", 800, seed=0, edition=2)
    plain = [i for i in range(800) if len(records[i].turns) == 2 and records[i].turns[0].text == IMAGE_MARK]
    assert plain == list(range(5, 800, 8))
    for index in plain[:20]:
        record = records[index]
        assert record.document
        found = encode(document_items(record.turns), tokenizer, 4)
        shown = Record("", record.images, (Turn("human", IMAGE_MARK), Turn("gpt", record.turns[1].text.strip())))
        wanted = encode(template_items("plain", shown), tokenizer, 4)
        np.testing.assert_array_equal(found.tokens, wanted.tokens)
        np.testing.assert_array_equal(found.is_target, wanted.is_target)


@pytest.mark.parametrize(("task", "template", "stage"), [("captions", "plain", 0), ("conversations", "v1", 1)])
def test_rows_of_studies_hold_as_many_records_whatever_an_image_takes(task, template, stage):
    """Else variants of a study would see other images in the same steps."""
    tokenizer, records = load_tokenizer("miniature/2"), SceneRecords(task, 4000, seed=0, edition=2)
    texts = max(len(encode(template_items(template, records[i]), tokenizer, 0).tokens) for i in range(4000))
    for count in (1, 36, 144):
        length = int(tokens(count)[stage].partition("=")[2])
        assert length >= (1 + stage) * (texts + count)


# ---- Held out --------------------------------------------------------------------------------------------------------


def _is_held_out(thing):
    return HELD_OUT_PLACES[thing.pair] == thing.y // (SIDE // 3) * 3 + thing.x // (SIDE // 3)


def test_each_color_and_each_shape_is_held_out_at_several_places_and_never_everywhere():
    assert {*HELD_OUT_PLACES} == {(color, shape) for color in COLORS for shape in SHAPES}
    assert collections.Counter(HELD_OUT_PLACES.values()) == dict.fromkeys(range(9), 4)
    assert [zone_name(32 * (i % 3) + 16, 32 * (i // 3) + 16) for i in range(9)] == PLACES


def _prints(scene):
    """Printed words and numbers, each with its font."""
    yield from ((item.text, item.font) for item in scene.prints)
    if scene.form is not None:
        yield from ((number, scene.form.font) for number in itertools.chain(*scene.form.cells))


def _fonts(scene):
    return {item.font for item in (*scene.prints, scene.chart, scene.form) if item is not None}


def test_training_shows_and_names_nothing_held_out(scenes):
    for scene in scenes[False]:
        assert not any(_is_held_out(thing) for thing in scene.things)
        for text, font in _prints(scene):
            assert text in TRAINING_WORDS or not is_held_out_number(text, font)
        assert not _fonts(scene) & {*HELD_OUT_FONTS}
    for task in ("captions", "conversations", "documents", "cues"):
        said = "\n".join(texts(task, 800))
        named = [(pair, PLACES.index(place)) for *pair, place in NAMED_PLACE.findall(said)]
        assert len(named) > 500 or task == "conversations"
        assert not any(HELD_OUT_PLACES[tuple(pair)] == place for pair, place in named)
        assert len(NAMED_PRINT.findall(said)) > 500
        assert not {*NAMED_PRINT.findall(said)} & {*HELD_OUT_WORDS}


def test_held_out_images_show_what_is_held_out(scenes):
    for scene in scenes[True]:
        assert not scene.things or any(_is_held_out(thing) for thing in scene.things)
        for text, font in _prints(scene):
            assert text in HELD_OUT_WORDS or is_held_out_number(text, font)
    fonts = [_fonts(scene) for scene in scenes[True] if _fonts(scene)]
    assert 0.4 < np.mean([bool(one & {*HELD_OUT_FONTS}) for one in fonts]) < 0.7


def test_training_shows_every_color_shape_letter_and_digit():
    for font in TRAINING_FONTS:
        shown, new = list_numbers(font, held_out=False), list_numbers(font, held_out=True)
        assert sorted(shown + new) == NUMBERS
        assert len(new) == 18
        for place in range(2):
            assert {number[place] for number in shown} == {number[place] for number in NUMBERS}
    assert all(list_numbers(font, held_out=True) == NUMBERS for font in HELD_OUT_FONTS)
    assert {*itertools.chain(*(list_numbers(font, held_out=False) for font in TRAINING_FONTS))} == {*NUMBERS}
    for place in range(3):
        assert {word[place] for word in HELD_OUT_WORDS} <= {word[place] for word in TRAINING_WORDS}


# ---- True ------------------------------------------------------------------------------------------------------------


def _truth(scene, text):
    """The answer, from the caption's facts alone."""
    facts = make_caption(scene)
    things = re.findall(r"an? (small|large) (\w+) (\w+) at the ([a-z ]+)", facts)
    if found := re.fullmatch(r"Is there an? (\w+) shape\?", text):
        return "yes" if any(found[1] == color for _, color, _, _ in things) else "no"
    if found := re.fullmatch(r"Is there an? (\w+)\?", text):
        return "yes" if any(found[1] == shape for _, _, shape, _ in things) else "no"
    if found := re.fullmatch(r"Is there an? (\w+) (\w+)\?", text):
        return "yes" if any(found.groups() == (color, shape) for _, color, shape, _ in things) else "no"
    if found := re.fullmatch(r"How many (?:(\w+) )?(\w+) are there\?", text):
        color, noun = found.groups()
        return str(sum((color in (None, c)) and (noun in ("shapes", f"{s}s", f"{s}es")) for _, c, s, _ in things))
    if found := re.fullmatch(r"What color is the (\w+)\?", text):
        return " ".join(color for _, color, shape, _ in things if shape == found[1])
    if found := re.fullmatch(r"What shape is (\w+)\?", text):
        return " ".join(shape for _, color, shape, _ in things if color == found[1])
    if found := re.fullmatch(r"Is the (\w+) (\w+) small or large\?", text):
        return " ".join(size for size, color, shape, _ in things if found.groups() == (color, shape))
    if found := re.fullmatch(r"Where is the (\w+) (\w+)\?", text):
        return " ".join(where for _, color, shape, where in things if found.groups() == (color, shape))
    if found := re.fullmatch(r"Is the (\w+) (\w+) (left of|right of|above|below) the (\w+) (\w+)\?", text):
        (a,), (b,) = (
            [where for _, color, shape, where in things if pair == (color, shape)]
            for pair in (found.groups()[:2], found.groups()[3:])
        )
        words = ("left", "", "right") if found[3].endswith("of") else ("top", "", "bottom")
        at = [next((i for i, word in enumerate(words) if word and word in where.split()), 1) for where in (a, b)]
        return "yes" if (at[0] < at[1]) == (found[3] in ("left of", "above")) and at[0] != at[1] else "no"
    if found := re.fullmatch(r"What does the (\w+ )?text say\?", text):
        printed = re.findall(r"the text (\w+) at the (\w+)", facts)
        return " ".join(said for said, row in printed if found[1] in (None, f"{row} "))
    if found := re.fullmatch(r"(?:Which bar is (highest|lowest)|What is the value of (\w))\?", text):
        bars = {label: int(value) for label, value in re.findall(r"\b([A-Z]) (\d)\b", facts)}
        return str(bars[found[2]]) if found[2] else (max if found[1] == "highest" else min)(bars, key=bars.get)
    if found := re.fullmatch(r"What is in row (\d) of column (\w)\?", text):
        return _truth_of_table(facts, *found.groups())
    lines = dict(re.findall(r"\b([A-Z]{3,}) (\d\d)\b", facts))
    if found := re.fullmatch(r"What is the ([A-Z]+)\?", text):
        return lines[found[1]]
    found = re.fullmatch(r"Which line says (\d\d)\?", text)
    return {number: label for label, number in lines.items()}[found[1]]


@pytest.mark.parametrize("held_out", [False, True])
def test_answers_are_true(asked, held_out):
    for scene, question in asked[held_out]:
        assert question.answer == _truth(scene, question.text), (question, make_caption(scene))
    assert {question.kind for _, question in asked[held_out]} == {*KINDS}


_CUES_AS_QUESTIONS = {
    r"how many (shapes)": r"How many \1 are there?",
    rf"how many ({'|'.join(COLORS)})": r"How many \1 shapes are there?",
    r"how many (\w+)": r"How many \1s are there?",
    r"(\w+ \w+) (left of|right of|above|below) (\w+ \w+)": r"Is the \1 \2 the \3?",
    r"(highest|lowest)": r"Which bar is \1?",
}


def _fits(scene, cue, answer):
    """Whether a caption's facts alone give that answer to a cue, and no other."""
    for pattern, question in _CUES_AS_QUESTIONS.items():
        if found := re.fullmatch(pattern, cue):
            return answer == _truth(scene, found.expand(question))
    facts = make_caption(scene)
    things = re.findall(r"an? (small|large) (\w+) (\w+) at the ([a-z ]+)", facts)
    prints = re.findall(r"the text (\w+) at the (\w+)", facts)
    bars = re.findall(r"\b([A-Z]) (\d)\b", facts) if "a chart of" in facts else []
    lines = re.findall(r"\b([A-Z]{3,}) (\d\d)\b", facts) if "a form of" in facts else []
    if cue.startswith("any "):
        return answer == ("yes" if any(cue[4:] in (color, shape) for _, color, shape, _ in things) else "no")
    if found := re.fullmatch(r"row (\d) (\w)", cue):
        return answer == _truth_of_table(facts, *found.groups())
    found = {said for said, row in prints if cue == f"text {row}"}
    found |= {said for pair in (*bars, *lines) for known, said in (pair, pair[::-1]) if known == cue}
    for size, color, shape, where in things:
        known = {(f"{color} {shape}", where), (where, f"{size} {color} {shape}"), (f"color {shape}", color)}
        known |= {(f"shape {color}", shape), (f"size {color} {shape}", size)}
        found |= {value for key, value in known if key == cue}
    return found == {answer}


def _truth_of_table(facts, row, column):
    columns = re.search(r"a table of ([A-C ]+),", facts)[1].split()
    return re.search(rf"row {row} ([\d ]+)", facts)[1].split()[columns.index(column)]


def test_cues_are_true_and_say_yes_as_often_as_no(scenes):
    answers, count = collections.Counter(), 0
    for index, scene in enumerate(scenes[False][:800]):
        for cue, answer in make_cues(scene, np.random.default_rng(index)):
            assert _fits(scene, cue, answer), (make_caption(scene), cue, answer)
            answers[answer] += 1
            count += 1
    assert answers["yes"] == answers["no"] > 500
    assert count > 5000


# ---- Balanced --------------------------------------------------------------------------------------------------------


def test_a_blank_image_earns_little(asked):
    """The best that text alone allows: for each question, the answer that training gives most often."""
    assert sum(map(len, asked.values())) > 20_000
    seen, of_kind = collections.defaultdict(collections.Counter), collections.defaultdict(collections.Counter)
    for _, question in asked[False]:
        seen[question.text][question.answer] += 1
        of_kind[question.kind][question.answer] += 1
    hits = collections.defaultdict(list)
    for _, question in asked[True]:
        guess = (seen.get(question.text) or of_kind[question.kind]).most_common(1)[0][0]
        hits[question.kind].append(guess == question.answer)
    assert np.mean(list(itertools.chain(*hits.values()))) < 0.3
    most = {"existence": 0.55, "count": 0.42, "attribute": 0.3, "position": 0.15, "relation": 0.55}
    for kind in KINDS:
        assert np.mean(hits[kind]) < most.get(kind, 0.15), kind


@pytest.mark.parametrize("held_out", [False, True])
def test_answers_are_spread(asked, held_out):
    answers = collections.defaultdict(collections.Counter)
    for _, question in asked[held_out]:
        answers[question.kind][question.answer] += 1
    for kind in ("existence", "relation"):
        assert 0.47 < answers[kind]["yes"] / answers[kind].total() < 0.53
    assert max(answers["count"].values()) < 0.35 * answers["count"].total()
    assert max(answers["position"].values()) < 0.15 * answers["position"].total()
    # No kind is rare.
    total = sum(map(len, (asked[held_out],)))
    assert min(counter.total() for counter in answers.values()) > 0.05 * total


# ---- Drawn -----------------------------------------------------------------------------------------------------------


def _pixels(scene):
    return np.asarray(draw(scene), np.int16)


def _is(pixels, color, tolerance=40):
    return np.abs(pixels - np.array(color)).max(-1) < tolerance


def test_shapes_are_where_the_scene_says_and_apart(scenes):
    for scene in scenes[True][:300]:
        pixels = _pixels(scene)
        for thing in scene.things:
            radius = RADII[thing.size]
            assert radius <= min(thing.x, thing.y, SIDE - 1 - thing.x, SIDE - 1 - thing.y)
            around = pixels[thing.y - radius : thing.y + radius + 1, thing.x - radius : thing.x + radius + 1]
            assert _is(around, COLORS[thing.color]).mean() > 0.2
        assert len({zone_name(thing.x, thing.y) for thing in scene.things}) == len(scene.things)
        rows = [item.row for item in scene.prints]
        assert len({*rows}) == len(rows)
        assert not {world.ROWS[thing.y // world.ZONE] for thing in scene.things} & {*rows}


def test_prints_are_as_high_and_wide_as_the_scene_says(scenes):
    seen = collections.Counter()
    for scene in scenes[False][:600]:
        pixels = _pixels(scene)
        unlike = ~_is(pixels, scene.background, 90)
        for item in scene.prints:
            rows = slice(item.y // world.ZONE * world.ZONE, item.y // world.ZONE * world.ZONE + world.ZONE)
            down, across = np.nonzero(unlike[rows])
            assert abs(np.ptp(down) + 1 - item.height) <= 2, item
            most = world.text_width(item.text, item.height, item.font)  # with the fonts' margins
            assert 0.75 * most - 2 <= np.ptp(across) + 1 <= most + 2, item
            assert 0 < across.min() <= across.max() < SIDE - 1
            seen[item.height] += 1
    assert {*seen} == {*world.HEIGHTS}


def test_bars_are_as_high_as_their_values(scenes):
    for scene in [scene for scene in scenes[False] if scene.chart is not None][:60]:
        pixels, chart = _pixels(scene), scene.chart
        pitch = (SIDE - 12) / len(chart.values)
        for i, (value, color) in enumerate(zip(chart.values, chart.colors, strict=True)):
            column = pixels[:, int(6 + (i + 0.5) * pitch)]
            assert abs(_is(column, COLORS[color]).sum() - 6.5 * value) <= 2


def test_nothing_of_a_form_is_cut_or_overlaps(scenes):
    for scene in [scene for scene in scenes[False] if scene.form is not None][:150]:
        unlike = ~_is(_pixels(scene), scene.background, 90)
        assert not unlike[[0, -1]].any()
        assert not unlike[:, [0, -1]].any()
        if not scene.form.is_table:
            for label, (number,) in zip(scene.form.labels, scene.form.cells, strict=True):
                widths = [world.text_width(text, scene.form.height, scene.form.font) for text in (label, number)]
                assert sum(widths) < SIDE - 16


@pytest.mark.parametrize("most", [1, 2, 3])
def test_as_many_things_of_a_sort_as_are_asked_for(most):
    """Of bars and lines two at least, or there would be nothing to look up."""
    counts = collections.defaultdict(set)
    for index in range(600):
        scene = make_scene(0, index, max_things=most)
        counts["shapes"].add(len(scene.things))
        counts["prints"].add(len(scene.prints))
        if scene.chart is not None:
            counts["bars"].add(len(scene.chart.labels))
        if scene.form is not None:
            counts["lines"] |= {len(scene.form.cells), len(scene.form.labels)}
    assert counts["shapes"] == counts["prints"] == {*range(most + 1)}
    assert counts["bars"] == {*range(2, max(most, 2) + 1)}
    assert counts["lines"] == {*range(2, max(most, 2) + 1)}
