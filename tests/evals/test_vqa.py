"""EvalAI's normaliser and the accuracy among annotators, against lmms-eval's; labels that are not as they should be."""

import random
import sys
from unittest import mock

import lmms
import pytest

from stf_jax.config import UserError
from stf_jax.evals import vqa
from stf_jax.evals.vqa import accuracy, normalize


@pytest.fixture(scope="module")
def theirs():
    """lmms-eval's normaliser, and how its TextVQA scores an answer."""
    utils = "lmms_eval.tasks._task_utils"
    metric = lmms.load_task_module("_task_utils/vqa_eval_metric.py")
    modules = {f"{utils}.vqa_eval_metric": metric, f"{utils}.file_utils": mock.MagicMock()}
    with mock.patch.dict(sys.modules, modules):
        textvqa = lmms.load_task_module("textvqa/utils.py")
    return metric.EvalAIAnswerProcessor(), textvqa.textvqa_process_results


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "yes"),
        ("  The  CAT.\n", "cat"),
        ("A, an, the", ""),
        ("two dogs", "2 dogs"),
        ("None", "0"),
        ("TEN", "10"),
        ("eleven", "eleven"),
        ("1,000", "1000"),
        ("2.5", "2.5"),
        ("5.", "5"),
        (".5", ".5"),
        ("U.S.A.", "usa"),
        ("a-b", "b"),  # the hyphen is a space, and "a" then an article
        ("x-ray", "x ray"),
        ("x-ray - y-ray", "xray yray"),  # one hyphen beside a space, and all are dropped
        ("x-ray/y - z", "xray y z"),  # which says nothing of other marks
        ("really?", "really"),
        ("john's", "john 's"),
        ("dont", "don't"),
        ("Im", "im"),  # the table has "Im", which no text in lower case is
        ("somebody'd", "somebodyd"),
        ("couldntve", "couldntve"),  # two apostrophes are missing
        ("couldn'tve", "couldn't've"),
        ("red\tgreen\nblue", "red green blue"),
        ("red\n- blue", "red blue"),
        (" -x-y- ", "x y"),  # spaces at the ends do not count
        ("." * 33 + "x", ".x"),  # 32 go
        ("", ""),
    ],
)
def test_normalize_by_hand(text, expected, theirs):
    assert normalize(text) == theirs[0](text) == expected


def test_contractions_are_those_of_lmms_eval(theirs):
    effective = {key: word for key, word in theirs[0].CONTRACTIONS.items() if key != word and "I" not in key}
    assert effective == vqa._CONTRACTIONS
    assert len(theirs[0].CONTRACTIONS) == len(effective) + len(["let's", "she's", "Id've", "I'dve", "Im", "Ive"])


def test_normalize_as_lmms_eval_does(theirs):
    their_normalize, _ = theirs
    chance = random.Random(0)
    # Characters to which lower, split and digits mean something, and those that the normaliser names.
    odd = [c for c in map(chr, range(0x11000)) if c.lower() != c or c.isspace() or c.isdigit()]
    marks = list(";/[]\"{}()=+\\_-><@`,?!.'*#:&")
    words = [*their_normalize.CONTRACTIONS, *their_normalize.CONTRACTIONS.values(), *their_normalize.ARTICLES]
    words += ["one", "Two", "none", "ten", "eleven", "cat", "'s", "1,000", "2.5", "0", "7", "." * 12, "ΑΣ"]
    spaces = [" ", " ", " ", "\t", "\n", "", "", ""]
    for _ in range(30_000):
        pool = chance.choice([words, marks, words + marks, odd, odd + marks])
        parts = [chance.choice(pool) + chance.choice(spaces) for _ in range(chance.randrange(12))]
        text = "".join(part.upper() if chance.random() < 0.1 else part for part in parts)
        assert normalize(text) == their_normalize(text), repr(text)


@pytest.mark.parametrize(
    ("same", "expected"),
    # n of ten agree: for each of them n - 1 others do, for the other 10 - n all n.
    [
        (0, 0.0),
        (1, (1 * 0 + 9 * 1 / 3) / 10),  # 0.3
        (2, (2 * 1 / 3 + 8 * 2 / 3) / 10),  # 0.6
        (3, (3 * 2 / 3 + 7 * 1) / 10),  # 0.9
        (4, 1.0),
        (10, 1.0),
    ],
)
def test_accuracy_by_hand(same, expected):
    answers = ["Two"] * same + ["three"] * (10 - same)
    assert accuracy("2.", answers) == pytest.approx(expected, abs=1e-12)


def test_accuracy_as_lmms_eval_computes_it(theirs):
    chance = random.Random(1)
    pool = ["yes", "Yes.", "no", "two", "2", "the 2", "", "a", "x-ray", "x ray", "dont", "don't", "unanswerable"]
    for _ in range(5_000):
        answers = chance.choices(chance.sample(pool, 4), k=chance.choice([1, 2, 3, 9, 10, 10, 10]))
        text = chance.choice([*answers, *pool])
        their_result = theirs[1]({"answers": list(answers), "question_id": 0}, [text])
        assert accuracy(text, answers) == pytest.approx(their_result["exact_match"], abs=1e-12)
        assert normalize(text) == their_result["submission"]["answer"]


def test_each_text_has_its_own_answers():
    assert vqa.accuracies(["yes", "no"], [["yes"] * 10, ["yes"] * 10]) == [1.0, 0.0]
    with pytest.raises(ValueError, match="argument 2 is longer"):
        vqa.accuracies(["yes"], [["yes"] * 10, ["yes"] * 10])


@pytest.mark.parametrize("answers", [None, [], "yes", {"answer": "yes"}, [1], [{"answer": 1}], [{}], ["yes", None]])
def test_annotators_without_texts_are_refused(answers):
    assert vqa.annotator_answers({"answers": [{"answer": "a"}, {"answer": "b"}]}, "x") == ["a", "b"]
    assert vqa.annotator_answers({"answers": ["a", "b"]}, "x") == ["a", "b"]
    with pytest.raises(UserError, match=r"^label 3: a label needs answers, a list of the annotators' texts\.$"):
        vqa.annotator_answers({"answers": answers}, "label 3")
    with pytest.raises(UserError, match="needs answers"):
        vqa.annotator_answers({}, "label 3")
