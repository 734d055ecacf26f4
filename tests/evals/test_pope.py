"""POPE: labels matched by image and question, scores by hand and against lmms-eval, mismatched files."""

import json
import random
import statistics

import PIL.Image
import pytest
from etils import epath
from lmms import load_task_module

from stf_jax.config import UserError
from stf_jax.evals.benchmarks.pope import POPE, is_yes

WORD = "\nAnswer the question using a single word or phrase."
QUESTIONS = [  # split, image, thing, gold
    ("adversarial", "COCO_val2014_000000310196.jpg", "snowboard", "yes"),
    ("adversarial", "COCO_val2014_000000310196.jpg", "backpack", "yes"),
    ("adversarial", "COCO_val2014_000000210789.jpg", "backpack", "no"),
    ("adversarial", "COCO_val2014_000000210789.jpg", "car", "no"),
    ("popular", "COCO_val2014_000000310196.jpg", "car", "no"),
    ("popular", "COCO_val2014_000000310196.jpg", "snowboard", "yes"),
    ("random", "COCO_val2014_000000210789.jpg", "skis", "yes"),
    ("random", "COCO_val2014_000000210789.jpg", "dog", "no"),
]


def _write(folder, questions=QUESTIONS):
    """Writes labels in another order than the questions, numbered from 1 in each split, as in POPE."""
    (folder / "coco").mkdir(parents=True)
    rows = [
        {
            "question_id": 20_000_000 + n,
            "image": image,
            "text": f"Is there a {thing} in the image?{WORD}",
            "category": s,
        }
        for n, (s, image, thing, _) in enumerate(questions)
    ]
    (folder / "llava_pope_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split in ("adversarial", "popular", "random"):
        labels = [
            {"question_id": n, "image": image, "text": f"Is there a {thing} in the image?", "label": gold}
            for n, (_, image, thing, gold) in enumerate([q for q in questions if q[0] == split][::-1], start=1)
        ]
        file = folder / "coco" / f"coco_pope_{split}.json"
        file.write_text("".join(json.dumps(label) + "\n" for label in labels))


def test_scores_by_hand(tmp_path):
    _write(tmp_path / "pope")
    benchmark = POPE(epath.Path(tmp_path))
    assert benchmark.questions[0].text == benchmark.questions[0].prompt == f"Is there a snowboard in the image?{WORD}"
    assert [file.name for file in benchmark.labels] == [
        "coco_pope_adversarial.json",
        "coco_pope_popular.json",
        "coco_pope_random.json",
    ]
    texts = ["Yes", "No", "yes, two.", "There is not", "yes", "no", "no", "no"]
    metrics = benchmark.metrics(texts)
    # Adversarial: yes, no, yes, no for gold yes, yes, no, no: one of each kind of hit and miss.
    half = {"f1": 0.5, "accuracy": 0.5, "precision": 0.5, "recall": 0.5, "yes_ratio": 0.5, "questions": 4}
    # Popular: yes, no for gold no, yes. Random: no, no for gold yes, no.
    popular = {"f1": 0.0, "accuracy": 0.0, "precision": 0.0, "recall": 0.0, "yes_ratio": 0.5, "questions": 2}
    none = {"f1": 0.0, "accuracy": 0.5, "precision": 0.0, "recall": 0.0, "yes_ratio": 0.0, "questions": 2}
    assert metrics == {
        "f1": pytest.approx(0.5 / 3),
        "accuracy": pytest.approx(1 / 3),
        "precision": pytest.approx(0.5 / 3),
        "recall": pytest.approx(0.5 / 3),
        "yes_ratio": pytest.approx(1 / 3),
        "random": none,
        "popular": popular,
        "adversarial": half,
    }
    assert sum(score.value for score in benchmark.scores(texts)) == 2 + 0 + 1
    json.dumps(metrics)


def test_means_are_over_the_splits_within_the_limit(tmp_path):
    _write(tmp_path)
    benchmark = POPE(epath.Path(tmp_path))
    benchmark.keep_first(3)
    metrics = benchmark.metrics(["yes", "no", "yes"])  # gold: yes, yes, no
    scores = {"f1": 0.5, "accuracy": 1 / 3, "precision": 0.5, "recall": 0.5, "yes_ratio": 2 / 3}
    assert metrics == scores | {"adversarial": scores | {"questions": 3}}


def test_images(tmp_path):
    _write(tmp_path)
    (tmp_path / "val2014").mkdir()
    PIL.Image.new("RGB", (5, 3)).save(tmp_path / "val2014" / "COCO_val2014_000000310196.jpg")
    assert POPE(epath.Path(tmp_path)).questions[0].image().size == (5, 3)


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("No", False),
        ("no", False),
        ("NO", True),
        ("No.", False),
        ("Yes. No", True),  # up to the first full stop
        ("There is, no, dog", False),
        ("Nothing", True),
        ("It does not", False),
        ("It doesn't", True),
        ("Not", True),
        ("no\ndog", True),  # only spaces separate words
        ("", True),
    ],
)
def test_is_yes_by_hand(text, yes):
    assert is_yes(text) is yes


def _reference_is_yes(text):
    """Implements the rule again, character by character."""
    word, words = "", []
    for character in text:
        if character == ".":
            break
        if character == " ":
            words.append(word)
            word = ""
        elif character != ",":
            word += character
    words.append(word)
    return all(word not in ("No", "not", "no") for word in words)


def test_is_yes_matches_a_reimplementation():
    rng = random.Random(0)
    pieces = ["No", "no", "not", "NO", "Not", "none", "yes", "Yes", "n", "o", ".", ",", *[" "] * 12, "\n", "!"]
    texts = ["".join(rng.choices(pieces, k=rng.randint(0, 8))) for _ in range(20_000)]
    assert [is_yes(text) for text in texts] == [_reference_is_yes(text) for text in texts]
    assert 0.1 < statistics.fmean(map(_reference_is_yes, texts)) < 0.9


def test_scores_of_one_word_answers_match_lmms_eval(tmp_path):
    reference, rng = load_task_module("pope/utils.py"), random.Random(1)
    questions = [(rng.choice(("random", "popular")), f"{n}.jpg", "dog", rng.choice(("yes", "no"))) for n in range(1000)]
    _write(tmp_path, questions)
    (tmp_path / "coco" / "coco_pope_adversarial.json").unlink()  # no question needs it
    benchmark = POPE(epath.Path(tmp_path))
    for share in (0.0, 0.1, 0.5, 0.9, 1.0):
        texts = [rng.choice(("yes", "Yes") if rng.random() < share else ("no", "No")) for _ in questions]
        metrics = benchmark.metrics(texts)
        for split in ("random", "popular"):
            rows = [
                reference.pope_process_results({"answer": gold, "question_id": "0"}, [text])["pope_accuracy"]
                for (question_split, _, _, gold), text in zip(questions, texts, strict=True)
                if question_split == split
            ]
            assert metrics[split]["questions"] == len(rows)
            for key, count in (
                ("accuracy", reference.pope_aggregate_accuracy),
                ("precision", reference.pope_aggregate_precision),
                ("recall", reference.pope_aggregate_recall),
                ("f1", reference.pope_aggregate_f1_score),
            ):
                assert metrics[split][key] == pytest.approx(count(rows), abs=1e-12), (split, key)


def _open_error(folder):
    with pytest.raises(UserError) as error:
        POPE(epath.Path(folder))
    return str(error.value)


def test_labels_of_other_questions_are_refused(tmp_path):
    _write(tmp_path)
    file = tmp_path / "coco" / "coco_pope_adversarial.json"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[2:]))
    assert _open_error(tmp_path) == (
        f"{file} does not match the questions: 2 of 4 have no label, such as 'Is there a backpack in the image?' on "
        "COCO_val2014_000000210789.jpg; use the file that LLaVA names (POPE's repository at commit e3e39262)."
    )


def test_every_split_with_questions_needs_labels(tmp_path):
    _write(tmp_path)
    (tmp_path / "coco" / "coco_pope_popular.json").unlink()
    assert _open_error(tmp_path) == f"pope: there is no coco/coco_pope_popular.json in {tmp_path}."


def test_contradictory_labels_are_refused(tmp_path):
    _write(tmp_path)
    file = tmp_path / "coco" / "coco_pope_popular.json"
    line = file.read_text().splitlines()[0]
    with file.open("a") as opened:
        opened.write(line + "\n")
    POPE(epath.Path(tmp_path))  # a repeated label is accepted
    with file.open("a") as opened:
        opened.write(line.replace('"yes"', '"no"') + "\n")
    assert _open_error(tmp_path) == (
        f"{file}, line 4: 'Is there a snowboard in the image?' on COCO_val2014_000000310196.jpg is labeled both yes "
        "and no; use POPE's own file."
    )


@pytest.mark.parametrize(
    "label",
    [
        ["a list"],
        {"image": "0.jpg", "text": "Is there?"},
        {"image": "0.jpg", "text": "Is there?", "label": "Yes"},
        {"image": "0.jpg", "text": "Is there?", "label": ["yes"]},
        {"image": 0, "text": "Is there?", "label": "yes"},
        {"image": "0.jpg", "text": None, "label": "yes"},
    ],
)
def test_malformed_labels_are_refused(tmp_path, label):
    _write(tmp_path)
    file = tmp_path / "coco" / "coco_pope_random.json"
    with file.open("a") as opened:
        opened.write(json.dumps(label) + "\n")
    assert _open_error(tmp_path) == f"{file}, line 3: a label needs image, text, and a label of yes or no."


def test_unknown_splits_are_refused(tmp_path):
    _write(tmp_path, [("adversary", "0.jpg", "dog", "yes")])
    assert _open_error(tmp_path) == (
        f"{tmp_path}/llava_pope_test.jsonl, question 20000000: unknown category 'adversary'; "
        "did you mean 'adversarial'?"
    )
