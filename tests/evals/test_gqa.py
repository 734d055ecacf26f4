"""GQA: exact match by hand and against a plain re-implementation, accuracies by type, the predictions file."""

import collections
import json
import random

import pytest
from etils import epath

from stf_jax.config import UserError
from stf_jax.evals.gqa import GQA

WORD = "\nAnswer the question using a single word or phrase."
LABELS = "testdev_balanced_questions.json"
PLACES = [LABELS, f"data/{LABELS}", f"data/questions1.2/{LABELS}", f"questions1.2/{LABELS}"]


def _ask(folder, ids):
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


ASKED = {
    "201307251": _label("no", "verify", "global"),
    "201640614": _label("woman", "query", "rel"),
    "202225914": _label("no", "logical", "attr"),
    "2062325": _label("yes", "verify", "rel"),
}
TEXTS = ["No.", "the woman", "no. ", "YES..."]  # right, wrong, wrong (a space ends it), right


def _write(folder, labels, place=LABELS):
    file = folder / place
    file.parent.mkdir(exist_ok=True, parents=True)
    file.write_text(json.dumps(labels))
    return file


@pytest.mark.parametrize("place", PLACES)
def test_accuracy_by_hand(tmp_path, place):
    _ask(tmp_path / "gqa", ASKED)
    others = {"1": _label("left", "choose", "rel")}
    file = _write(tmp_path / "gqa", others | dict(reversed(ASKED.items())), place)
    benchmark = GQA(epath.Path(tmp_path))
    assert benchmark.labels == (epath.Path(file),)
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


def _plain(texts, labels):
    """What GQA's paper and LLaVA's page say, without any of the code under test."""
    scores = collections.defaultdict(list)
    for text, label in zip(texts, labels, strict=True):
        while text[-1:] == ".":
            text = text[:-1]
        right = 1.0 if text.lower() == label["answer"] else 0.0
        structural, semantic = label["types"]["structural"], label["types"]["semantic"]
        kind = {"query": "open"}.get(structural, "binary")
        for key in ("accuracy", kind, ("by_structural", structural), ("by_semantic", semantic)):
            scores[key].append(right)
    found = {"by_structural": {}, "by_semantic": {}}
    for key, values in scores.items():
        mean = pytest.approx(sum(values) / len(values), abs=1e-12)
        if isinstance(key, tuple):
            found[key[0]][key[1]] = {"accuracy": mean, "questions": len(values)}
        else:
            found[key] = mean
    return found


def test_accuracy_as_a_plain_computation(tmp_path):
    chance = random.Random(0)
    golds = ["yes", "no", "left", "t-shirt", "polo shirt", "."]
    structural, semantic = ["verify", "query", "choose", "logical", "compare"], ["rel", "attr", "obj", "cat", "global"]
    labels = {
        str(number): _label(chance.choice(golds), chance.choice(structural), chance.choice(semantic))
        for number in range(4_000)
    }
    ends = ["", "", ".", "..", ". ", " .", "!", "\n", ",", ".,."]
    texts = [
        chance.choice([str.lower, str.upper, str.title])(chance.choice([label["answer"], chance.choice(golds), ""]))
        + chance.choice(ends)
        for label in labels.values()
    ]
    _ask(tmp_path, labels)
    _write(tmp_path, labels)
    found = GQA(epath.Path(tmp_path)).metrics(texts)
    assert found == _plain(texts, labels.values())
    assert 0.1 < found["accuracy"] < 0.9


def test_predictions_need_no_labels(tmp_path):
    _ask(tmp_path, [201307251, "201640614"])
    benchmark = GQA(epath.Path(tmp_path))
    assert not benchmark.labels
    (file,) = benchmark.write_submission(["Yes.", "Polo Shirt.. "], epath.Path(tmp_path))
    assert file == epath.Path(tmp_path) / "testdev_balanced_predictions.json"
    assert json.loads(file.read_text()) == [
        {"questionId": "201307251", "prediction": "yes"},
        {"questionId": "201640614", "prediction": "polo shirt.. "},
    ]


def test_images_are_in_either_folder(tmp_path):
    _ask(tmp_path, ASKED)
    for folder in ("images", "data/images"):
        (tmp_path / folder).mkdir(parents=True)
        with pytest.raises(UserError, match=rf"{tmp_path.name}/{folder}/n201307251\.jpg cannot be opened"):
            GQA(epath.Path(tmp_path)).questions[0].image()


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        ([], " is no object of questions by their ids; take GQA's own file."),
        ({}, " lacks 4 of the 4 questions, such as '201307251'; it is of another split"),
        (ASKED | {"7": "yes"}, ", question 7: a label needs answer and types, structural and semantic."),
        (ASKED | {"7": {"answer": "yes"}}, ", question 7: a label needs answer and types, structural and semantic."),
        (ASKED | {"7": _label("yes", "verify", None)}, ", question 7: a label needs answer and types, structural and"),
        (ASKED | {"7": _label(True, "verify", "rel")}, ", question 7: a label needs answer and types, structural and"),
    ],
)
def test_labels_of_another_form_are_refused(tmp_path, labels, sentence):
    _ask(tmp_path, ASKED)
    file = _write(tmp_path, labels)
    with pytest.raises(UserError) as error:
        GQA(epath.Path(tmp_path))
    assert str(error.value).startswith(f"{file}{sentence}")
