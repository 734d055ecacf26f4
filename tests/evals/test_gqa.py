"""GQA: exact match by hand and against a reimplementation, accuracies by type, the predictions file."""

import collections
import json
import random

import pytest
from etils import epath

from stf_jax.config import UserError
from stf_jax.evals.benchmarks.gqa import GQA

WORD = "\nAnswer the question using a single word or phrase."
LABELS = "testdev_balanced_questions.json"
LABEL_PATHS = [LABELS, f"data/{LABELS}", f"data/questions1.2/{LABELS}", f"questions1.2/{LABELS}"]


def _write_questions(folder, ids):
    folder.mkdir(exist_ok=True)
    rows = [
        {"question_id": key, "image": f"n{key}.jpg", "text": f"Is it overcast?{WORD}", "category": "default"}
        for key in ids
    ]
    (folder / "llava_gqa_testdev_balanced.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _label(answer, structural, semantic):
    return {
        "question": "Is it overcast?",
        "answer": answer,
        "imageId": "n161313",
        "isBalanced": True,
        "types": {"structural": structural, "semantic": semantic, "detailed": "weather"},
    }


LABELED = {
    "201307251": _label("no", "verify", "global"),
    "201640614": _label("woman", "query", "rel"),
    "202225914": _label("no", "logical", "attr"),
    "2062325": _label("yes", "verify", "rel"),
}
TEXTS = ["No.", "the woman", "no. ", "YES..."]  # correct, wrong, wrong (trailing space), correct


def _write_labels(folder, labels, path=LABELS):
    file = folder / path
    file.parent.mkdir(exist_ok=True, parents=True)
    file.write_text(json.dumps(labels))
    return file


@pytest.mark.parametrize("path", LABEL_PATHS)
def test_accuracy_by_hand(tmp_path, path):
    _write_questions(tmp_path / "gqa", LABELED)
    others = {"1": _label("left", "choose", "rel")}
    file = _write_labels(tmp_path / "gqa", others | dict(reversed(LABELED.items())), path)
    benchmark = GQA(epath.Path(tmp_path))
    assert benchmark.labels == (epath.Path(file),)
    assert sum(score.value for score in benchmark.scores(TEXTS)) == 2
    assert benchmark.metrics(TEXTS) == {
        "accuracy": 2 / 4,
        "binary": 2 / 3,
        "open": 0.0,
        "by_structural": {
            "logical": {"accuracy": 0.0, "questions": 1},
            "query": {"accuracy": 0.0, "questions": 1},
            "verify": {"accuracy": 1.0, "questions": 2},
        },
        "by_semantic": {
            "attr": {"accuracy": 0.0, "questions": 1},
            "global": {"accuracy": 1.0, "questions": 1},
            "rel": {"accuracy": 0.5, "questions": 2},
        },
    }
    benchmark.keep_first(1)  # none of them is open
    assert benchmark.metrics(["yes"]) == {
        "accuracy": 0.0,
        "binary": 0.0,
        "by_structural": {"verify": {"accuracy": 0.0, "questions": 1}},
        "by_semantic": {"global": {"accuracy": 0.0, "questions": 1}},
    }


def _reference_metrics(texts, labels):
    """Computes the metrics as GQA's paper and LLaVA's page describe, without any of the code under test."""
    scores = collections.defaultdict(list)
    for text, label in zip(texts, labels, strict=True):
        while text[-1:] == ".":
            text = text[:-1]
        correct = 1.0 if text.lower() == label["answer"] else 0.0
        structural, semantic = label["types"]["structural"], label["types"]["semantic"]
        kind = {"query": "open"}.get(structural, "binary")
        for key in ("accuracy", kind, ("by_structural", structural), ("by_semantic", semantic)):
            scores[key].append(correct)
    found = {"by_structural": {}, "by_semantic": {}}
    for key, values in scores.items():
        mean = pytest.approx(sum(values) / len(values), abs=1e-12)
        if isinstance(key, tuple):
            found[key[0]][key[1]] = {"accuracy": mean, "questions": len(values)}
        else:
            found[key] = mean
    return found


def test_accuracy_matches_a_reimplementation(tmp_path):
    rng = random.Random(0)
    golds = ["yes", "no", "left", "t-shirt", "polo shirt", "."]
    structural, semantic = ["verify", "query", "choose", "logical", "compare"], ["rel", "attr", "obj", "cat", "global"]
    labels = {
        str(number): _label(rng.choice(golds), rng.choice(structural), rng.choice(semantic)) for number in range(4_000)
    }
    ends = ["", "", ".", "..", ". ", " .", "!", "\n", ",", ".,."]
    texts = [
        rng.choice([str.lower, str.upper, str.title])(rng.choice([label["answer"], rng.choice(golds), ""]))
        + rng.choice(ends)
        for label in labels.values()
    ]
    _write_questions(tmp_path, labels)
    _write_labels(tmp_path, labels)
    found = GQA(epath.Path(tmp_path)).metrics(texts)
    assert found == _reference_metrics(texts, labels.values())
    assert 0.1 < found["accuracy"] < 0.9


def test_predictions_need_no_labels(tmp_path):
    _write_questions(tmp_path, [201307251, "201640614"])
    benchmark = GQA(epath.Path(tmp_path))
    assert not benchmark.labels
    (file,) = benchmark.write_submission(["Yes.", "Polo Shirt.. "], epath.Path(tmp_path))
    assert file == epath.Path(tmp_path) / "testdev_balanced_predictions.json"
    assert json.loads(file.read_text()) == [
        {"questionId": "201307251", "prediction": "yes"},
        {"questionId": "201640614", "prediction": "polo shirt.. "},
    ]


def test_images_may_be_in_either_folder(tmp_path):
    _write_questions(tmp_path, LABELED)
    for folder in ("images", "data/images"):
        (tmp_path / folder).mkdir(parents=True)
        with pytest.raises(UserError, match=rf"{tmp_path.name}/{folder}/n201307251\.jpg cannot be opened"):
            GQA(epath.Path(tmp_path)).questions[0].image()


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        ([], " is not a JSON object keyed by question id; use GQA's own file."),
        ({}, " lacks 4 of the 4 questions, such as '201307251': it belongs to another split"),
        (LABELED | {"7": "yes"}, ", question 7: a label needs answer, types.structural and types.semantic."),
        (
            LABELED | {"7": {"answer": "yes"}},
            ", question 7: a label needs answer, types.structural and types.semantic.",
        ),
        (LABELED | {"7": _label("yes", "verify", None)}, ", question 7: a label needs answer, types.structural and"),
        (LABELED | {"7": _label(True, "verify", "rel")}, ", question 7: a label needs answer, types.structural and"),
    ],
)
def test_malformed_labels_are_refused(tmp_path, labels, sentence):
    _write_questions(tmp_path, LABELED)
    file = _write_labels(tmp_path, labels)
    with pytest.raises(UserError) as error:
        GQA(epath.Path(tmp_path))
    assert str(error.value).startswith(f"{file}{sentence}")
