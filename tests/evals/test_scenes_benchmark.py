"""The embedded benchmarks: scoring by hand, held-out questions in pairs, the contact sheet."""

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
from stf_jax.evals.benchmarks.scenes import QUESTIONS_PER_HEIGHT, QUESTIONS_PER_KIND, Prints, Scenes, Shapes
from stf_jax.evals.registry import open_benchmarks


@pytest.fixture(scope="module", params=[Scenes, Prints, Shapes])
def benchmark(request):
    return request.param()


def correct_answers(benchmark):
    """The gold answer for each scene, and an empty answer for each blank image."""
    return [q.metadata["truth"] if q.metadata["shown"] == "scene" else "" for q in benchmark.questions]


def pixels(question):
    return np.asarray(question.image())


# ---- Questions -------------------------------------------------------------------------------------------------------


def test_held_out_questions_are_reproducible_and_of_every_kind(benchmark):
    def contents(benchmark):
        return [(q.id, q.text, q.prompt, q.metadata) for q in benchmark.questions]

    again = type(benchmark)()
    assert contents(benchmark) == contents(again)
    for first, second in zip(benchmark.questions[:40], again.questions[:40], strict=True):
        np.testing.assert_array_equal(pixels(first), pixels(second))
    assert {q.metadata["kind"] for q in benchmark.questions} == (
        {"reading"} if type(benchmark) is Prints else {*benchmark.kinds}
    )
    read = [q.metadata["truth"] for q in benchmark.questions if q.metadata["kind"] == "reading"]
    assert {*read} <= {*HELD_OUT_WORDS, *(() if type(benchmark) is Shapes else NUMBERS)}
    assert len({q.id for q in benchmark.questions}) == len(benchmark.questions)
    assert benchmark.scored


def test_the_first_editions_questions_never_change():
    benchmark = Shapes()
    assert {q.id.split("/")[0] for q in benchmark.questions} == {str(n) for n in range(128)}
    lines = "\n".join(f"{q.id} {q.text} {q.metadata['truth']}" for q in benchmark.questions)
    assert (benchmark.count, hashlib.sha256(lines.encode()).hexdigest()[:16]) == (568, "cc9f049170c53686")


def test_kinds_alternate():
    benchmark = Scenes()
    assert benchmark.count == QUESTIONS_PER_KIND * len(benchmark.kinds)
    kinds = [q.metadata["kind"] for q in benchmark.questions[::2]]
    assert kinds == [*benchmark.kinds] * QUESTIONS_PER_KIND


def test_scenes_ask_about_prints_of_every_height():
    benchmark = Scenes()
    heights = collections.Counter(
        q.metadata.get("height") for q in benchmark.questions if q.metadata["kind"] == "reading"
    )
    assert {*heights} == {*HEIGHTS}
    assert min(heights.values()) >= 2 * 20
    assert not any("height" in q.metadata for q in benchmark.questions if q.metadata["kind"] != "reading")
    table = benchmark.metrics(correct_answers(benchmark))["by_print"]
    assert list(table) == ["large print", "small print"]
    assert sum(entry["questions"] for entry in table.values()) == QUESTIONS_PER_KIND
    for height, shares in ((13, (True, False)), (10, (False, True))):
        only = [q.metadata["truth"] if q.metadata.get("height") == height else "" for q in benchmark.questions]
        assert tuple(entry["accuracy"] > 0 for entry in benchmark.metrics(only)["by_print"].values()) == shares


def test_prints_alternate_between_heights():
    benchmark = Prints()
    assert [q.metadata["height"] for q in benchmark.questions[::2]] == [*HEIGHTS] * QUESTIONS_PER_HEIGHT
    table = benchmark.metrics(correct_answers(benchmark))["by_print"]
    assert list(table) == [f"letters of {height} pixels" for height in HEIGHTS]
    assert {entry["questions"] for entry in table.values()} == {QUESTIONS_PER_HEIGHT}


def test_each_question_is_asked_about_its_scene_and_then_a_blank_image(benchmark):
    for scene, blank in zip(benchmark.questions[::2], benchmark.questions[1::2], strict=True):
        index, kind, _ = scene.id.split("/")
        assert (scene.id, blank.id) == (f"{index}/{kind}/scene", f"{index}/{kind}/blank")
        height = {"height": scene.metadata["height"]} if "height" in scene.metadata else {}
        assert scene.metadata == {"kind": kind, "shown": "scene", "truth": blank.metadata["truth"]} | height
        assert blank.metadata == scene.metadata | {"shown": "blank"}
        assert scene.text == scene.prompt == blank.text == blank.prompt
        assert scene.text.endswith("?\nAnswer the question using a single word or phrase.")
    for scene, blank in zip(benchmark.questions[:40:2], benchmark.questions[1:40:2], strict=True):
        assert pixels(scene).shape == pixels(blank).shape == (96, 96, 3)
        assert pixels(scene).std() > 1
        assert (pixels(blank) == (122, 116, 104)).all()
    # Questions with the same index show the same image, other questions another one.
    if type(benchmark) is Prints:
        return
    first, *others = benchmark.questions[::2]

    def has_same_index(question):
        return question.id.split("/")[0] == first.id.split("/")[0]

    (same, *_), (other, *_) = ([q for q in others if has_same_index(q) == expected] for expected in (True, False))
    np.testing.assert_array_equal(pixels(first), pixels(same))
    assert (pixels(first) != pixels(other)).any()


def test_every_gold_answer_fits_into_max_new_tokens(benchmark):
    tokenizer = load_tokenizer("miniature" if isinstance(benchmark, Shapes) else "miniature/2")
    for truth in {q.metadata["truth"] for q in benchmark.questions}:
        turns = (Turn("human", "What?"), Turn("gpt", truth))
        assert (
            encode(template_items("v1", Record("", (), turns)), tokenizer, 0).is_target.sum()
            <= benchmark.max_new_tokens
        )


def test_a_limit_keeps_pairs_together(benchmark):
    (three,) = open_benchmarks([benchmark.name], "", limit=3)
    assert [q.id for q in three.questions] == [q.id for q in benchmark.questions[:6]]
    assert (three.count, three.limited, benchmark.count) == (3, True, len(benchmark.questions) // 2)
    assert three.metrics(correct_answers(three))["accuracy"] == 1.0


# ---- Scores ----------------------------------------------------------------------------------------------------------


def test_score_by_hand(benchmark):
    """Of the first nine questions, two are correct for their scenes and three for blank images."""
    (benchmark,) = open_benchmarks([benchmark.name], "", limit=9)
    kinds = [q.metadata["kind"] for q in benchmark.questions[::2]]
    truths = [q.metadata["truth"] for q in benchmark.questions[::2]]
    answers = ["wrong"] * 9
    blanks = ["wrong"] * 9
    answers[0], answers[4] = truths[0].upper(), truths[4]
    answers[1] = f"{truths[1]}."  # anything but the one word is wrong
    blanks[0], blanks[2], blanks[8] = truths[0], truths[2].title(), truths[8]
    texts = [text for pair in zip(answers, blanks, strict=True) for text in pair]
    scores = benchmark.scores(texts)
    assert [score.value for score in scores if not score.blank] == [1, 0, 0, 0, 1, 0, 0, 0, 0]
    assert [score.value for score in scores if score.blank] == [1, 0, 1, 0, 0, 0, 0, 0, 1]
    assert [benchmark.questions[score.asked[0]].metadata["shown"] == "blank" for score in scores] == [False, True] * 9
    metrics = benchmark.metrics(texts)
    table = metrics.pop("by_kind")
    metrics.pop("by_print", None)
    assert metrics == {"accuracy": 2 / 9, "blank_image_accuracy": 3 / 9}
    assert set(table) == set(kinds)
    for kind, entry in table.items():
        indices = [index for index in range(9) if kinds[index] == kind]
        assert entry == {
            "accuracy": len({0, 4} & set(indices)) / len(indices),
            "blank_image_accuracy": len({0, 2, 8} & set(indices)) / len(indices),
            "questions": len(indices),
        }


def test_correct_answers_score_one_and_equal_answers_score_the_same(benchmark):
    metrics = benchmark.metrics(correct_answers(benchmark))
    assert (metrics["accuracy"], metrics["blank_image_accuracy"]) == (1.0, 0.0)
    assert list(metrics["by_kind"]) == list(benchmark.kinds)
    assert (
        sum(entry["questions"] for entry in metrics["by_kind"].values())
        == benchmark.count
        == len(benchmark.questions) // 2
    )
    json.dumps(metrics)
    texts = ["no"] * len(benchmark.questions)
    noes = sum(q.metadata["truth"] == "no" for q in benchmark.questions) / len(benchmark.questions)
    assert benchmark.metrics(texts)["accuracy"] == benchmark.metrics(texts)["blank_image_accuracy"] == noes
    assert noes > 0 or benchmark.kinds == ("reading",)


# ---- Contact sheet ---------------------------------------------------------------------------------------------------


def test_a_contact_sheet_is_written(benchmark, tmp_path):
    def sheet(texts):
        (file,) = benchmark.write_submission(texts, epath.Path(tmp_path))
        assert file == epath.Path(tmp_path) / "contact_sheet.png"
        with PIL.Image.open(file) as image:
            assert image.format == "PNG"
            return np.asarray(image.convert("RGB"))

    def count_pixels(image, color):
        return (image == color).all(-1).sum()

    green, red = (0x0A, 0x7D, 0x28), (0xC0, 0x18, 0x18)
    all_correct, all_wrong = sheet(correct_answers(benchmark)), sheet(["wrong"] * len(benchmark.questions))
    assert min(all_correct.shape[:2]) > 500
    assert count_pixels(all_correct, green) > 100
    assert count_pixels(all_wrong, red) > 100
    assert count_pixels(all_correct, red) == count_pixels(all_wrong, green) == 0
    # The first cell has the first question of the first kind or height.
    first = next(q for q in benchmark.questions if q.metadata["kind"] == benchmark.kinds[0])
    corner = np.asarray(first.image().resize((192, 192), PIL.Image.Resampling.NEAREST))
    np.testing.assert_array_equal(all_correct[26 : 26 + 192, 10 : 10 + 192], corner)


def test_a_sheet_with_few_questions_repeats_them(tmp_path):
    (one,) = open_benchmarks(["shapes"], "", limit=1)
    (file,) = one.write_submission(["a", "b"], epath.Path(tmp_path))
    assert file.exists()
