"""EvalAI's normalization and the consensus accuracy, against lmms-eval's; malformed labels."""

import random
import sys
from unittest import mock

import lmms
import pytest

from stf_jax.config import UserError
from stf_jax.evals import vqa
from stf_jax.evals.vqa import accuracy, normalize


@pytest.fixture(scope="module")
def lmms_eval():
    """lmms-eval's normalizer, and its TextVQA scoring function."""
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
        ("a-b", "b"),  # the hyphen becomes a space, and then "a" is an article
        ("x-ray", "x ray"),
        ("x-ray - y-ray", "xray yray"),  # one hyphen next to a space, so all are removed
        ("x-ray/y - z", "xray y z"),  # other marks are not affected
        ("really?", "really"),
        ("john's", "john 's"),
        ("dont", "don't"),
        ("Im", "im"),  # the table has "Im", which never matches lowercase text
        ("somebody'd", "somebodyd"),
        ("couldntve", "couldntve"),  # two missing apostrophes
        ("couldn'tve", "couldn't've"),
        ("red\tgreen\nblue", "red green blue"),
        ("red\n- blue", "red blue"),
        (" -x-y- ", "x y"),  # spaces at the ends are stripped first
        ("." * 33 + "x", ".x"),  # 32 are removed
        ("", ""),
    ],
)
def test_normalize_by_hand(text, expected, lmms_eval):
    assert normalize(text) == lmms_eval[0](text) == expected


def test_contractions_match_lmms_eval(lmms_eval):
    effective = {key: word for key, word in lmms_eval[0].CONTRACTIONS.items() if key != word and "I" not in key}
    assert effective == vqa._CONTRACTIONS
    assert len(lmms_eval[0].CONTRACTIONS) == len(effective) + len(["let's", "she's", "Id've", "I'dve", "Im", "Ive"])


def test_normalize_matches_lmms_eval(lmms_eval):
    reference_normalize, _ = lmms_eval
    rng = random.Random(0)
    # Characters that lower, split or digit handling changes, and those in the normalizer's tables.
    odd = [c for c in map(chr, range(0x11000)) if c.lower() != c or c.isspace() or c.isdigit()]
    marks = list(";/[]\"{}()=+\\_-><@`,?!.'*#:&")
    words = [
        *reference_normalize.CONTRACTIONS,
        *reference_normalize.CONTRACTIONS.values(),
        *reference_normalize.ARTICLES,
    ]
    words += ["one", "Two", "none", "ten", "eleven", "cat", "'s", "1,000", "2.5", "0", "7", "." * 12, "ΑΣ"]
    spaces = [" ", " ", " ", "\t", "\n", "", "", ""]
    for _ in range(30_000):
        pool = rng.choice([words, marks, words + marks, odd, odd + marks])
        parts = [rng.choice(pool) + rng.choice(spaces) for _ in range(rng.randrange(12))]
        text = "".join(part.upper() if rng.random() < 0.1 else part for part in parts)
        assert normalize(text) == reference_normalize(text), repr(text)


@pytest.mark.parametrize(
    ("same", "expected"),
    # n of ten agree: each of them has n - 1 agreeing others, each of the other 10 - n has n.
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


def test_accuracy_matches_lmms_eval(lmms_eval):
    rng = random.Random(1)
    pool = ["yes", "Yes.", "no", "two", "2", "the 2", "", "a", "x-ray", "x ray", "dont", "don't", "unanswerable"]
    for _ in range(5_000):
        answers = rng.choices(rng.sample(pool, 4), k=rng.choice([1, 2, 3, 9, 10, 10, 10]))
        text = rng.choice([*answers, *pool])
        reference = lmms_eval[1]({"answers": list(answers), "question_id": 0}, [text])
        assert accuracy(text, answers) == pytest.approx(reference["exact_match"], abs=1e-12)
        assert normalize(text) == reference["submission"]["answer"]


def test_each_text_is_scored_against_its_own_answers():
    assert vqa.accuracies(["yes", "no"], [["yes"] * 10, ["yes"] * 10]) == [1.0, 0.0]
    with pytest.raises(ValueError, match="argument 2 is longer"):
        vqa.accuracies(["yes"], [["yes"] * 10, ["yes"] * 10])


@pytest.mark.parametrize("answers", [None, [], "yes", {"answer": "yes"}, [1], [{"answer": 1}], [{}], ["yes", None]])
def test_malformed_annotator_answers_are_refused(answers):
    assert vqa.annotator_answers({"answers": [{"answer": "a"}, {"answer": "b"}]}, "x") == ["a", "b"]
    assert vqa.annotator_answers({"answers": ["a", "b"]}, "x") == ["a", "b"]
    with pytest.raises(UserError, match=r"^label 3: a label needs answers, a list of the annotators' strings\.$"):
        vqa.annotator_answers({"answers": answers}, "label 3")
    with pytest.raises(UserError, match="needs answers"):
        vqa.annotator_answers({}, "label 3")
