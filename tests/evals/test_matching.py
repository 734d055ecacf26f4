"""Scores of short answers by hand, and those of lmms-eval's own functions on random answers."""

import random
import sys
import types
from unittest import mock

import pytest
from lmms import load_module, load_task_module

from stf_jax.evals.benchmarks import ai2d, mmstar, ocrbench
from stf_jax.evals.matching import anls, edit_distance, is_relaxed_match

RUNS = 3000


def keep(*args, **kwargs):
    """A decorator that changes nothing, as lmms-eval's registries are to these tests."""
    return lambda function: function


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("abc", "abc", 0), ("ab", "ba", 2)],
)
def test_edit_distances_by_hand(first, second, distance):
    assert edit_distance(first, second) == edit_distance(second, first) == distance


def test_anls_by_hand():
    assert anls("Pinterest", ["facebook", "pinterest"]) == 1.0
    assert anls("abcd", ["abcx"]) == 0.75
    assert anls("abxy", ["abcd"]) == 0.5  # not below the threshold
    assert anls("axyz", ["abcd"]) == 0.0
    assert anls("a  b", ["A B"]) == 1.0
    assert anls("", [""]) == 1.0
    assert anls("straße", ["strasse"]) == 1 - 2 / 7


def random_text(rng, alphabet, longest):
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(0, longest)))


def test_anls_is_lmms_evals():
    registry = types.SimpleNamespace(register_aggregation=keep, register_metric=keep)
    reference, rng = load_module("api/metrics.py", api__registry=registry).anls, random.Random(0)
    scores = []
    for _ in range(RUNS):
        answers = [random_text(rng, "aB ßİ\t", 7) for _ in range(rng.randint(1, 3))]
        text = random_text(rng, "aB ßİ\t", 7).strip()
        scores.append(anls(text, answers))
        assert scores[-1] == reference(answers, [text])["anls"], (text, answers)
    assert 0 < scores.count(0) < RUNS - 500
    assert len(set(scores)) > 10


def test_relaxed_matches_by_hand():
    assert is_relaxed_match("3.15", "3")
    assert not is_relaxed_match("3.1501", "3")
    assert is_relaxed_match("12%", "0.12")
    assert not is_relaxed_match("0", "0.0")  # a gold answer of zero is compared as text
    assert is_relaxed_match("nAn", "NaN") is False  # a number that equals none
    assert is_relaxed_match("yes", "Yes")


def test_relaxed_matches_are_lmms_evals():
    reference, rng = load_task_module("chartqa/utils.py").relaxed_correctness, random.Random(0)
    matches = 0
    for _ in range(RUNS):
        gold = rng.choice(["0", "12%", "-3", "1e3", "yes", "inf", "nan", "1_0", "5%%", "", f"{rng.randint(1, 40)}"])
        text = rng.choice([gold, gold.upper(), "%", f"{rng.randint(1, 40)}", f"{rng.random():.2f}", f"{gold}0", "-2.9"])
        assert is_relaxed_match(text, gold) == reference(text, gold), (text, gold)
        matches += is_relaxed_match(text, gold)
    assert 500 < matches < RUNS - 500


def test_letters_of_mmstar_are_lmms_evals():
    extract = load_task_module("_task_utils/mcq_extract.py").extract_mcq_answer
    rng, found = random.Random(0), []
    marks = ["", "", "", ".", ",", ":", ")", "!", "'", '"']
    words = [
        "the",
        "answer is",
        "The best answer is",
        "my choice is",
        "I pick",
        "correct option is",
        "答案是",
        "정답은",
    ]
    words += ["a", "cat", "DOG", "Bird,", "not", "\n", "İ"]
    for _ in range(RUNS * 3):
        parts = [
            rng.choice(["", "", "", "(", "'"]) + rng.choice("ABCDEab") + rng.choice(marks)
            if rng.random() < 0.3
            else rng.choice(words)
            for _ in range(rng.randint(0, 6))
        ]
        text = rng.choice([" ", "  ", ""]).join(parts)
        found.append(mmstar.parse_choice(text))
        assert found[-1] == extract(text, choices=list("ABCD")), text
    assert all(found.count(letter) > 500 for letter in (*"ABCD", ""))


def test_letters_of_ai2d_are_lmms_evals():
    filters = types.SimpleNamespace(ExtendedRegexFilter=type("ExtendedRegexFilter", (), {"__init__": keep}))
    apply = load_module("tasks/ai2d/utils.py", filters__extraction=filters).MultiChoiceRegexFilter().apply
    registry = types.SimpleNamespace(register_aggregation=keep, register_metric=keep)
    match = load_module("api/metrics.py", api__registry=registry).exact_match_hf_evaluate
    rng, hits = random.Random(0), 0
    for _ in range(RUNS):
        text, gold = random_text(rng, "ABab .()\n!", 5), rng.choice("AB")
        (answer,) = apply([[text]], [None])
        wanted = match([answer.strip()], [gold], ignore_case=True, ignore_punctuation=True)["exact_match"]
        assert (ai2d.parse_choice(text) == gold.lower()) == wanted, text
        hits += bool(wanted)
    assert hits > 200


def test_answers_of_ocrbench_are_lmms_evals():
    modules = {"lmms_eval.tasks._task_utils.file_utils": mock.MagicMock()}
    with mock.patch.dict(sys.modules, modules):
        process = load_task_module("ocrbench/utils.py").ocrbench_process_results
    rng, hits = random.Random(0), 0
    for _ in range(RUNS):
        data_set, text = rng.choice(["HME100k", "IAM"]), random_text(rng, "aAＡａ \n\u3000", 9)
        answers = [random_text(rng, "aAＡ \n\u3000", 3) for _ in range(rng.randint(1, 2))]
        row = {"dataset": data_set, "answer": answers, "question_type": "x"}
        wanted = process(row, [text.strip()])["ocrbench_accuracy"]["score"]
        formula = data_set == "HME100k"
        assert any(ocrbench.contains_answer(text, answer, formula=formula) for answer in answers) == wanted, (row, text)
        hits += wanted
    assert 500 < hits < RUNS - 500
