"""The embedded benchmarks: scoring by hand, held-out questions in pairs, what is written to look at."""

import collections
import hashlib
import json

import numpy as np
import PIL.Image
import pytest
from etils import epath

from stf_jax.data.conversation import encode, template_items
from stf_jax.data.records import Record, Turn
from stf_jax.data.scenes import HELD_OUT_WORDS
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.data.world import HEIGHTS, NUMBERS
from stf_jax.evals.registry import open_benchmarks
from stf_jax.evals.scenes import QUESTIONS_PER_HEIGHT, QUESTIONS_PER_KIND, Prints, Scenes, Shapes


@pytest.fixture(scope="module", params=[Scenes, Prints, Shapes])
def whole(request):
    return request.param()


def right(benchmark):
    """The truth about each scene, and nothing about each blank image."""
    return [q.metadata["truth"] if q.metadata["shown"] == "scene" else "" for q in benchmark.questions]


def pixels(question):
    return np.asarray(question.image())


# ---- Questions -------------------------------------------------------------------------------------------------------


def test_held_out_questions_are_the_same_each_time_and_of_every_kind(whole):
    def told(benchmark):
        return [(q.id, q.text, q.prompt, q.metadata) for q in benchmark.questions]

    again = type(whole)()
    assert told(whole) == told(again)
    for first, second in zip(whole.questions[:40], again.questions[:40], strict=True):
        np.testing.assert_array_equal(pixels(first), pixels(second))
    assert {q.metadata["kind"] for q in whole.questions} == ({"reading"} if type(whole) is Prints else {*whole.kinds})
    read = [q.metadata["truth"] for q in whole.questions if q.metadata["kind"] == "reading"]
    assert {*read} <= {*HELD_OUT_WORDS, *(() if type(whole) is Shapes else NUMBERS)}
    assert len({q.id for q in whole.questions}) == len(whole.questions)
    assert whole.scored


def test_the_first_edition_asks_what_it_always_asked():
    whole = Shapes()
    assert {q.id.split("/")[0] for q in whole.questions} == {str(n) for n in range(128)}
    lines = "\n".join(f"{q.id} {q.text} {q.metadata['truth']}" for q in whole.questions)
    assert (whole.count, hashlib.sha256(lines.encode()).hexdigest()[:16]) == (568, "cc9f049170c53686")


def test_kinds_take_turns_so_that_any_part_of_the_questions_is_even():
    whole = Scenes()
    assert whole.count == QUESTIONS_PER_KIND * len(whole.kinds)
    kinds = [q.metadata["kind"] for q in whole.questions[::2]]
    assert kinds == [*whole.kinds] * QUESTIONS_PER_KIND


def test_prints_of_every_height_are_asked_for():
    whole = Scenes()
    heights = collections.Counter(q.metadata.get("height") for q in whole.questions if q.metadata["kind"] == "reading")
    assert {*heights} == {*HEIGHTS}
    assert min(heights.values()) >= 2 * 20
    assert not any("height" in q.metadata for q in whole.questions if q.metadata["kind"] != "reading")
    table = whole.metrics(right(whole))["by_print"]
    assert list(table) == ["large print", "small print"]
    assert sum(entry["questions"] for entry in table.values()) == QUESTIONS_PER_KIND
    for height, shares in ((13, (True, False)), (10, (False, True))):
        only = [q.metadata["truth"] if q.metadata.get("height") == height else "" for q in whole.questions]
        assert tuple(entry["accuracy"] > 0 for entry in whole.metrics(only)["by_print"].values()) == shares


def test_prints_are_of_every_height_in_turn():
    whole = Prints()
    assert [q.metadata["height"] for q in whole.questions[::2]] == [*HEIGHTS] * QUESTIONS_PER_HEIGHT
    table = whole.metrics(right(whole))["by_print"]
    assert list(table) == [f"letters of {height} pixels" for height in HEIGHTS]
    assert {entry["questions"] for entry in table.values()} == {QUESTIONS_PER_HEIGHT}


def test_each_is_asked_of_its_scene_and_of_a_blank_image_next_to_it(whole):
    for scene, blank in zip(whole.questions[::2], whole.questions[1::2], strict=True):
        index, kind, _ = scene.id.split("/")
        assert (scene.id, blank.id) == (f"{index}/{kind}/scene", f"{index}/{kind}/blank")
        height = {"height": scene.metadata["height"]} if "height" in scene.metadata else {}
        assert scene.metadata == {"kind": kind, "shown": "scene", "truth": blank.metadata["truth"]} | height
        assert blank.metadata == scene.metadata | {"shown": "blank"}
        assert scene.text == scene.prompt == blank.text == blank.prompt
        assert scene.text.endswith("?\nAnswer the question using a single word or phrase.")
    for scene, blank in zip(whole.questions[:40:2], whole.questions[1:40:2], strict=True):
        assert pixels(scene).shape == pixels(blank).shape == (96, 96, 3)
        assert pixels(scene).std() > 1
        assert (pixels(blank) == (122, 116, 104)).all()
    # Questions of an image show the same, others another.
    if type(whole) is Prints:
        return
    first, *others = whole.questions[::2]

    def about(question):
        return question.id.split("/")[0] == first.id.split("/")[0]

    (same, *_), (other, *_) = ([q for q in others if about(q) == here] for here in (True, False))
    np.testing.assert_array_equal(pixels(first), pixels(same))
    assert (pixels(first) != pixels(other)).any()


def test_every_truth_can_be_said_in_full_with_its_end(whole):
    tokenizer = load_tokenizer("miniature" if isinstance(whole, Shapes) else "miniature/2")
    for truth in {q.metadata["truth"] for q in whole.questions}:
        turns = (Turn("human", "What?"), Turn("gpt", truth))
        assert encode(template_items("v1", Record("", (), turns)), tokenizer, 0).is_target.sum() <= whole.max_new_tokens


def test_a_limit_keeps_pairs_together(whole):
    (three,) = open_benchmarks([whole.name], "", limit=3)
    assert [q.id for q in three.questions] == [q.id for q in whole.questions[:6]]
    assert (three.count, three.limited, whole.count) == (3, True, len(whole.questions) // 2)
    assert three.metrics(right(three))["accuracy"] == 1.0


# ---- Scores ----------------------------------------------------------------------------------------------------------


def test_score_by_hand(whole):
    """Of the first nine questions: two right on their scenes, three on blank images."""
    (benchmark,) = open_benchmarks([whole.name], "", limit=9)
    kinds = [q.metadata["kind"] for q in benchmark.questions[::2]]
    truths = [q.metadata["truth"] for q in benchmark.questions[::2]]
    answers = ["wrong"] * 9
    blanks = ["wrong"] * 9
    answers[0], answers[4] = truths[0].upper(), truths[4]
    answers[1] = f"{truths[1]}."  # one word is asked for: what is not the word is wrong
    blanks[0], blanks[2], blanks[8] = truths[0], truths[2].title(), truths[8]
    metrics = benchmark.metrics([text for pair in zip(answers, blanks, strict=True) for text in pair])
    table = metrics.pop("by_kind")
    metrics.pop("by_print", None)
    assert metrics == {"accuracy": 2 / 9, "blank_image_accuracy": 3 / 9}
    assert set(table) == set(kinds)
    for kind, entry in table.items():
        mine = [place for place in range(9) if kinds[place] == kind]
        assert entry == {
            "accuracy": len({0, 4} & set(mine)) / len(mine),
            "blank_image_accuracy": len({0, 2, 8} & set(mine)) / len(mine),
            "questions": len(mine),
        }


def test_answers_are_of_the_questions_beside_them(whole):
    metrics = whole.metrics(right(whole))
    assert (metrics["accuracy"], metrics["blank_image_accuracy"]) == (1.0, 0.0)
    assert list(metrics["by_kind"]) == list(whole.kinds)
    assert sum(entry["questions"] for entry in metrics["by_kind"].values()) == whole.count == len(whole.questions) // 2
    json.dumps(metrics)
    texts = ["no"] * len(whole.questions)
    noes = sum(q.metadata["truth"] == "no" for q in whole.questions) / len(whole.questions)
    assert whole.metrics(texts)["accuracy"] == whole.metrics(texts)["blank_image_accuracy"] == noes
    assert noes > 0 or whole.kinds == ("reading",)


# ---- To look at ------------------------------------------------------------------------------------------------------


def test_a_contact_sheet_is_written(whole, tmp_path):
    def sheet(texts):
        (file,) = whole.write_submission(texts, epath.Path(tmp_path))
        assert file == epath.Path(tmp_path) / "contact_sheet.png"
        with PIL.Image.open(file) as image:
            assert image.format == "PNG"
            return np.asarray(image.convert("RGB"))

    def coloured(image, colour):
        return (image == colour).all(-1).sum()

    green, red = (0x0A, 0x7D, 0x28), (0xC0, 0x18, 0x18)
    all_right, all_wrong = sheet(right(whole)), sheet(["wrong"] * len(whole.questions))
    assert min(all_right.shape[:2]) > 500
    assert coloured(all_right, green) > 100
    assert coloured(all_wrong, red) > 100
    assert coloured(all_right, red) == coloured(all_wrong, green) == 0
    # The first cell is of the first kind's, or height's, first question.
    place = next(q for q in whole.questions if q.metadata["kind"] == whole.kinds[0])
    corner = np.asarray(place.image().resize((192, 192), PIL.Image.Resampling.NEAREST))
    np.testing.assert_array_equal(all_right[26 : 26 + 192, 10 : 10 + 192], corner)


def test_a_sheet_of_few_questions_repeats_them(tmp_path):
    (one,) = open_benchmarks(["shapes"], "", limit=1)
    (file,) = one.write_submission(["a", "b"], epath.Path(tmp_path))
    assert file.exists()
