"""Tests that the second edition of the embedded data is deterministic, true, balanced and properly held out."""

import collections
import hashlib
import itertools
import re

import numpy as np
import pytest

from stf_jax.data import world
from stf_jax.data.conversation import count_tokens, document_items, encode, template_items
from stf_jax.data.records import IMAGE_MARK, Record, Turn
from stf_jax.data.scenes import COLORS, HELD_OUT_WORDS, SHAPES, TRAINING_WORDS
from stf_jax.data.sources.scenes import SceneRecords
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
from stf_jax.studies.miniature import row_lengths

MANY = 2400
HELD_OUT_SEED = 1_000_003
PLACES = ["top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right"]
NAMED_PLACE = re.compile(
    rf"\b({'|'.join(COLORS)}) ({'|'.join(SHAPES)})(?: at the |\? ASSISTANT: |\?\n)({'|'.join(sorted(PLACES)[::-1])})\b"
)
NAMED_PRINT = re.compile(r"\b(?:[A-Z]{3}|\d\d)\b")


@pytest.fixture(scope="module")
def scenes():
    """Scenes of both splits, by ``held_out``."""
    return {
        held_out: [make_scene(seed, index, held_out) for index in range(MANY)]
        for held_out, seed in ((False, 0), (True, HELD_OUT_SEED))
    }


@pytest.fixture(scope="module")
def questions_of(scenes):
    """Pairs of (scene, question) of both splits, by ``held_out``; more than 20,000 in all."""
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


# ---- Determinism -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "held_out", "digest"),
    [
        ("captions", False, "9cc2a8116832dcd1"),
        ("conversations", False, "fec24967eed8a8c4"),
        ("documents", False, "da617b2011daa840"),
        ("cues", False, "3d1a43523bd64acc"),
        ("conversations", True, "bdc8391f1ba2effd"),
    ],
)
def test_text_of_many_records_is_unchanged(task, held_out, digest):
    """With all versions of Python and numpy."""
    assert hashlib.sha256("\n".join(texts(task, 500, held_out)).encode()).hexdigest()[:16] == digest


def test_images_depend_only_on_their_index(scenes):
    for index in (0, 7, 11):
        one, again = (np.asarray(draw(make_scene(0, index), index)) for _ in range(2))
        np.testing.assert_array_equal(one, again)
        assert one.shape == (SIDE, SIDE, 3)
    assert len(set(scenes[False])) > 0.99 * MANY
    assert not set(scenes[False]) & set(scenes[True])


def test_captions_of_the_mixture_match_the_plain_template():
    """For any template of the run."""
    tokenizer, records = load_tokenizer("miniature/2"), SceneRecords("mixture", 800, seed=0, edition=2)
    plain = [i for i in range(800) if len(records[i].turns) == 2 and records[i].turns[0].text == IMAGE_MARK]
    assert plain == list(range(5, 800, 8))
    for index in plain[:20]:
        record = records[index]
        assert record.document
        found = encode(document_items(record.turns), tokenizer, 4)
        plain_record = Record("", record.images, (Turn("human", IMAGE_MARK), Turn("gpt", record.turns[1].text.strip())))
        expected = encode(template_items("plain", plain_record), tokenizer, 4)
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_array_equal(found.is_target, expected.is_target)


@pytest.mark.parametrize(("task", "template", "stage"), [("captions", "plain", 0), ("conversations", "v1", 1)])
def test_rows_of_studies_fit_the_same_records_for_any_tokens_per_image(task, template, stage):
    """Otherwise the variants of a study would see different images in the same steps."""
    tokenizer, records = load_tokenizer("miniature/2"), SceneRecords(task, 4000, seed=0, edition=2)
    texts = max(count_tokens([template_items(template, records[i]) for i in range(4000)], tokenizer, 0))
    for count in (1, 36, 144):
        length = int(row_lengths(count)[stage].partition("=")[2])
        assert length >= (1 + stage) * (texts + count)


# ---- Held out --------------------------------------------------------------------------------------------------------


def _is_held_out(thing):
    return HELD_OUT_PLACES[thing.pair] == thing.y // (SIDE // 3) * 3 + thing.x // (SIDE // 3)


def test_held_out_places():
    assert {*HELD_OUT_PLACES} == {(color, shape) for color in COLORS for shape in SHAPES}
    assert collections.Counter(HELD_OUT_PLACES.values()) == dict.fromkeys(range(9), 4)
    assert [zone_name(32 * (i % 3) + 16, 32 * (i // 3) + 16) for i in range(9)] == PLACES


def _prints(scene):
    """Yields printed words and numbers with their fonts."""
    yield from ((item.text, item.font) for item in scene.prints)
    if scene.form is not None:
        yield from ((number, scene.form.font) for number in itertools.chain(*scene.form.cells))


def _fonts(scene):
    return {item.font for item in (*scene.prints, scene.chart, scene.form) if item is not None}


def test_training_contains_nothing_held_out(scenes):
    for scene in scenes[False]:
        assert not any(_is_held_out(thing) for thing in scene.things)
        for text, font in _prints(scene):
            assert text in TRAINING_WORDS or not is_held_out_number(text, font)
        assert not _fonts(scene) & {*HELD_OUT_FONTS}
    for task in ("captions", "conversations", "documents", "cues"):
        text = "\n".join(texts(task, 800))
        named = [(pair, PLACES.index(place)) for *pair, place in NAMED_PLACE.findall(text)]
        assert len(named) > 500 or task == "conversations"
        assert not any(HELD_OUT_PLACES[tuple(pair)] == place for pair, place in named)
        assert len(NAMED_PRINT.findall(text)) > 500
        assert not {*NAMED_PRINT.findall(text)} & {*HELD_OUT_WORDS}


def test_held_out_images_show_held_out_things(scenes):
    for scene in scenes[True]:
        assert not scene.things or any(_is_held_out(thing) for thing in scene.things)
        for text, font in _prints(scene):
            assert text in HELD_OUT_WORDS or is_held_out_number(text, font)
    fonts = [_fonts(scene) for scene in scenes[True] if _fonts(scene)]
    assert 0.4 < np.mean([bool(one & {*HELD_OUT_FONTS}) for one in fonts]) < 0.7


def test_training_shows_every_number_letter_and_digit():
    for font in TRAINING_FONTS:
        training, new = list_numbers(font, held_out=False), list_numbers(font, held_out=True)
        assert sorted(training + new) == NUMBERS
        assert len(new) == 18
        for place in range(2):
            assert {number[place] for number in training} == {number[place] for number in NUMBERS}
    assert all(list_numbers(font, held_out=True) == NUMBERS for font in HELD_OUT_FONTS)
    assert {*itertools.chain(*(list_numbers(font, held_out=False) for font in TRAINING_FONTS))} == {*NUMBERS}
    for place in range(3):
        assert {word[place] for word in HELD_OUT_WORDS} <= {word[place] for word in TRAINING_WORDS}


# ---- True ------------------------------------------------------------------------------------------------------------


def _truth(scene, text):
    """Computes the answer from the caption alone."""
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
        return " ".join(text for text, row in printed if found[1] in (None, f"{row} "))
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
def test_answers_are_true(questions_of, held_out):
    for scene, question in questions_of[held_out]:
        assert question.answer == _truth(scene, question.text), (question, make_caption(scene))
    assert {question.kind for _, question in questions_of[held_out]} == {*KINDS}


_CUES_AS_QUESTIONS = {
    r"how many (shapes)": r"How many \1 are there?",
    rf"how many ({'|'.join(COLORS)})": r"How many \1 shapes are there?",
    r"how many (\w+)": r"How many \1s are there?",
    r"(\w+ \w+) (left of|right of|above|below) (\w+ \w+)": r"Is the \1 \2 the \3?",
    r"(highest|lowest)": r"Which bar is \1?",
}


def _fits(scene, cue, answer):
    """Whether the caption gives exactly this answer to a cue."""
    for pattern, question in _CUES_AS_QUESTIONS.items():
        if found := re.fullmatch(pattern, cue):
            return answer == _truth(scene, found.expand(question))
    facts = make_caption(scene)
    things = re.findall(r"an? (small|large) (\w+) (\w+) at the ([a-z ]+)", facts)
    if found := re.fullmatch(r"(\w+) (\w+) from (\w+) (\w+)", cue):
        (a,), (b,) = (
            [where.split() for _, color, shape, where in things if pair == (color, shape)]
            for pair in (found.groups()[:2], found.groups()[2:])
        )
        words = []
        for low, high in (("top", "bottom"), ("left", "right")):
            at = [(high in where) - (low in where) for where in (a, b)]
            words += [low] * (at[0] < at[1]) + [high] * (at[0] > at[1])
        return answer == " ".join(words)
    prints = re.findall(r"the text (\w+) at the (\w+)", facts)
    bars = re.findall(r"\b([A-Z]) (\d)\b", facts) if "a chart of" in facts else []
    lines = re.findall(r"\b([A-Z]{3,}) (\d\d)\b", facts) if "a form of" in facts else []
    if cue.startswith("any "):
        return answer == ("yes" if any(cue[4:] in (color, shape) for _, color, shape, _ in things) else "no")
    if found := re.fullmatch(r"row (\d) (\w)", cue):
        return answer == _truth_of_table(facts, *found.groups())
    found = {value for value, row in prints if cue == f"text {row}"}
    found |= {value for pair in (*bars, *lines) for known, value in (pair, pair[::-1]) if known == cue}
    for size, color, shape, where in things:
        known = {(f"{color} {shape}", where), (where, f"{size} {color} {shape}"), (f"color {shape}", color)}
        known |= {(f"shape {color}", shape), (f"size {color} {shape}", size)}
        found |= {value for key, value in known if key == cue}
    return found == {answer}


def _truth_of_table(facts, row, column):
    columns = re.search(r"a table of ([A-C ]+),", facts)[1].split()
    return re.search(rf"row {row} ([\d ]+)", facts)[1].split()[columns.index(column)]


def test_cues_are_true_and_balanced(scenes):
    answers, count = collections.defaultdict(collections.Counter), 0
    for index, scene in enumerate(scenes[False][:800]):
        for cue, answer in make_cues(scene, np.random.default_rng(index)):
            assert _fits(scene, cue, answer), (make_caption(scene), cue, answer)
            answers[cue.split()[0] == "any"][answer] += 1
            count += 1
    assert answers[True]["yes"] == answers[True]["no"] > 500
    relations = answers[False]
    assert abs(relations["yes"] - relations["no"]) < 3 * (relations["yes"] + relations["no"]) ** 0.5
    assert relations["yes"] > 200
    assert count > 5000


_RELATION = re.compile(r"(\w+ \w+) (left of|right of|above|below|from)(?: the)? (\w+ \w+)")


@pytest.mark.parametrize("task", ["cues", "conversations", "documents"])
def test_no_earlier_answer_gives_a_relation_away(task):
    """Relations are the first questions, and each pair of shapes has at most one per axis."""
    records, count = SceneRecords(task, 500, seed=0, edition=2), 0
    for index in range(500):
        texts = [turn.text for turn in records[index].turns if turn.speaker == "human"][task != "conversations" :]
        found = [_RELATION.search(text) for text in texts]
        relations = [match.groups() for match in found if match]
        assert all(found[: len(relations)])
        asked = [
            (frozenset((a, b)), axis)
            for a, relation, b in relations
            for axis in {"from": "xy", "above": "y", "below": "y"}.get(relation, "x")
        ]
        assert len(asked) == len(set(asked))
        count += len(relations)
    assert count > 200


# ---- Balanced --------------------------------------------------------------------------------------------------------


def test_guessing_without_the_image_scores_low(questions_of):
    """The best guess without the image is the most frequent answer to the question in training."""
    assert sum(map(len, questions_of.values())) > 20_000
    seen, of_kind = collections.defaultdict(collections.Counter), collections.defaultdict(collections.Counter)
    for _, question in questions_of[False]:
        seen[question.text][question.answer] += 1
        of_kind[question.kind][question.answer] += 1
    hits = collections.defaultdict(list)
    for _, question in questions_of[True]:
        guess = (seen.get(question.text) or of_kind[question.kind]).most_common(1)[0][0]
        hits[question.kind].append(guess == question.answer)
    assert np.mean(list(itertools.chain(*hits.values()))) < 0.3
    most = {"existence": 0.55, "count": 0.42, "attribute": 0.3, "position": 0.15, "relation": 0.55}
    for kind in KINDS:
        assert np.mean(hits[kind]) < most.get(kind, 0.15), kind


@pytest.mark.parametrize("held_out", [False, True])
def test_answers_are_balanced(questions_of, held_out):
    answers = collections.defaultdict(collections.Counter)
    for _, question in questions_of[held_out]:
        answers[question.kind][question.answer] += 1
    for kind in ("existence", "relation"):
        assert 0.47 < answers[kind]["yes"] / answers[kind].total() < 0.53
    assert max(answers["count"].values()) < 0.35 * answers["count"].total()
    assert max(answers["position"].values()) < 0.15 * answers["position"].total()
    # No kind is rare.
    total = sum(map(len, (questions_of[held_out],)))
    assert min(counter.total() for counter in answers.values()) > 0.05 * total


# ---- Drawing ---------------------------------------------------------------------------------------------------------


def _pixels(scene):
    return np.asarray(draw(scene), np.int16)


def _is(pixels, color, tolerance=40):
    return np.abs(pixels - np.array(color)).max(-1) < tolerance


def test_shapes_match_the_scene_and_do_not_overlap(scenes):
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


def test_print_sizes_match_the_scene(scenes):
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


def test_bar_heights_match_their_values(scenes):
    for scene in [scene for scene in scenes[False] if scene.chart is not None][:60]:
        pixels, chart = _pixels(scene), scene.chart
        pitch = (SIDE - 12) / len(chart.values)
        for i, (value, color) in enumerate(zip(chart.values, chart.colors, strict=True)):
            column = pixels[:, int(6 + (i + 0.5) * pitch)]
            assert abs(_is(column, COLORS[color]).sum() - 6.5 * value) <= 2


def test_forms_are_not_cut_and_do_not_overlap(scenes):
    for scene in [scene for scene in scenes[False] if scene.form is not None][:150]:
        unlike = ~_is(_pixels(scene), scene.background, 90)
        assert not unlike[[0, -1]].any()
        assert not unlike[:, [0, -1]].any()
        if not scene.form.is_table:
            for label, (number,) in zip(scene.form.labels, scene.form.cells, strict=True):
                widths = [world.text_width(text, scene.form.height, scene.form.font) for text in (label, number)]
                assert sum(widths) < SIDE - 16


@pytest.mark.parametrize("most", [1, 2, 3])
def test_max_things_of_each_layout(most):
    """There are at least two bars or lines, so that there is something to look up."""
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
