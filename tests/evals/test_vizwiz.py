"""VizWiz: choice of the label file by the questions' images, accuracy by hand, the submission."""

import json

import pytest
from etils import epath

from stf_jax.config import UserError
from stf_jax.evals.benchmarks.vizwiz import VizWiz

SUFFIX = (
    "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    "\nAnswer the question using a single word or phrase."
)


def _write_questions(folder, split, numbers):
    rows = [
        {
            "question_id": number,
            "image": f"VizWiz_{split}_{number:08}.jpg",
            "text": f"What is this?{SUFFIX}",
            "category": "default",
        }
        for number in numbers
    ]
    (folder / f"llava_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _label(split, number, answers=None):
    label = {"image": f"VizWiz_{split}_{number:08}.jpg", "question": "What is this?"}
    if answers is None:
        return label  # as in VizWiz's test.json
    entries = [{"answer": answer, "answer_confidence": "yes"} for answer in answers]
    return label | {"answers": entries, "answer_type": "other", "answerable": 1}


VAL = [
    _label("val", 1, ["basil"] * 2 + ["basil leaves"] * 8),
    _label("val", 0, ["unanswerable"] * 10),
    _label("val", 2, ["soda"] * 3 + ["coke"] * 7),
]
TEST = [_label("test", number) for number in range(3)]


def _write(folder, name, labels):
    (folder / name).write_text(json.dumps(labels))


def test_accuracy_by_hand(tmp_path):
    folder = tmp_path / "vizwiz"
    folder.mkdir()
    _write_questions(folder, "val", [0, 1, 2])
    _write(folder, "val.json", VAL)
    _write(folder, "test.json", TEST)
    benchmark = VizWiz(epath.Path(tmp_path))
    assert benchmark.labels == (epath.Path(folder) / "val.json",)
    # All of ten: 1. Two of ten: (2·1/3 + 8·2/3)/10 = 0.6. Three of ten: (3·2/3 + 7)/10 = 0.9.
    texts = ["Unanswerable", "Basil.", "a soda"]
    found = benchmark.metrics(texts)
    assert [score.value for score in benchmark.scores(texts)] == pytest.approx([1, 0.6, 0.9])
    assert found == {"accuracy": pytest.approx((1 + 0.6 + 0.9) / 3, abs=1e-12)}
    benchmark.keep_first(1)
    assert benchmark.metrics(["basil"]) == {"accuracy": 0.0}


@pytest.mark.parametrize("files", [{}, {"test.json": TEST}, {"test.json": TEST, "val.json": VAL}])
def test_the_test_split_has_a_submission_and_no_labels(tmp_path, files):
    _write_questions(tmp_path, "test", [2, 0, 1])
    for name, labels in files.items():
        _write(tmp_path, name, labels)
    benchmark = VizWiz(epath.Path(tmp_path))
    assert not benchmark.labels
    (file,) = benchmark.write_submission(["Unanswerable", "Two dogs.", "x-ray"], epath.Path(tmp_path))
    assert file == epath.Path(tmp_path) / "vizwiz_submission.json"
    assert json.loads(file.read_text()) == [
        {"image": "VizWiz_test_00000002.jpg", "answer": "unanswerable"},
        {"image": "VizWiz_test_00000000.jpg", "answer": "2 dogs"},
        {"image": "VizWiz_test_00000001.jpg", "answer": "x ray"},
    ]
    benchmark.keep_first(1)
    benchmark.write_submission(["Cat"], epath.Path(tmp_path))
    assert json.loads(file.read_text()) == [{"image": "VizWiz_test_00000002.jpg", "answer": "cat"}]


def test_labels_of_the_test_split_are_used_if_they_have_answers(tmp_path):
    _write_questions(tmp_path, "test", [0])
    _write(tmp_path, "val.json", VAL)
    _write(tmp_path, "test.json", [_label("test", 0, ["red"] * 10)])
    assert VizWiz(epath.Path(tmp_path)).metrics(["red"]) == {"accuracy": 1.0}


def test_images_come_from_the_questions_split(tmp_path):
    (tmp_path / "val").mkdir()
    (tmp_path / "test").mkdir()
    for split in ("val", "test"):  # LLaVA's file, test, takes precedence
        _write_questions(tmp_path, split, [0])
        with pytest.raises(UserError, match=rf"/{split}/VizWiz_{split}_00000000\.jpg cannot be opened"):
            VizWiz(epath.Path(tmp_path)).questions[0].image()


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (VAL[:2], " lacks 1 of the 3 questions, such as 'VizWiz_val_00000002.jpg': it belongs to another split"),
        ([_label("train", 0, ["x"])], " lacks 3 of the 3 questions, such as 'VizWiz_val_00000000.jpg': it belongs"),
        ([*VAL[:2], _label("val", 2)], ", VizWiz_val_00000002.jpg: a label needs answers, a list of"),
        ([*VAL, {"image": 1}], ", label 4: a label needs image."),
        ({"0": VAL[0]}, " has no list of labels; use the file"),
    ],
)
def test_mismatched_labels_are_refused(tmp_path, labels, sentence):
    _write_questions(tmp_path, "val", [0, 1, 2])
    _write(tmp_path, "val.json", labels)
    with pytest.raises(UserError) as error:
        VizWiz(epath.Path(tmp_path))
    assert str(error.value).startswith(f"{tmp_path / 'val.json'}{sentence}")
