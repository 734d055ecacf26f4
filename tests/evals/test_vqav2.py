"""VQAv2: accuracy by hand and by type of answer, the submission for the complete test set, mismatched files."""

import json

import pytest
from etils import epath

from stf_jax.config import UserError
from stf_jax.evals.benchmarks.vqav2 import VQAv2

WORD = "\nAnswer the question using a single word or phrase."
TEST_DEV = "llava_vqav2_mscoco_test-dev2015.jsonl"
TEST = "llava_vqav2_mscoco_test2015.jsonl"
VAL = "llava_vqav2_mscoco_val2014.jsonl"
ANNOTATIONS = "v2_mscoco_val2014_annotations.json"


def _write_questions(folder, name, ids, split="val2014"):
    rows = [
        {
            "question_id": key,
            "image": f"COCO_{split}_{key // 1000:012}.jpg",
            "text": f"What is it?{WORD}",
            "category": "default",
        }
        for key in ids
    ]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def _label(key, kind, answers):
    entries = [
        {"answer": answer, "answer_confidence": "yes", "answer_id": number}
        for number, answer in enumerate(answers, start=1)
    ]
    return {
        "question_id": key,
        "image_id": key // 1000,
        "answers": entries,
        "answer_type": kind,
        "question_type": "what is",
        "multiple_choice_answer": answers[0] if answers else "",
    }


LABELS = [
    _label(262148002, "other", ["watching"] * 3 + ["spectating"] * 7),
    _label(262148000, "yes/no", ["yes"] * 10),
    _label(262148001, "number", ["2"] * 2 + ["3"] * 8),
    _label(393225000, "yes/no", ["no"] * 10),
    _label(393225001, "other", ["dont know"] * 10),
]
IDS = [262148000, 262148001, 262148002, 393225000]


def _write_annotations(folder, labels):
    (folder / ANNOTATIONS).write_text(json.dumps({"info": {}, "annotations": labels}))


def test_accuracy_by_hand(tmp_path):
    folder = tmp_path / "vqav2"
    folder.mkdir()
    _write_questions(folder, VAL, IDS)
    _write_annotations(folder, LABELS)
    benchmark = VQAv2(epath.Path(tmp_path))
    assert benchmark.labels == (epath.Path(folder) / ANNOTATIONS,)
    # All of ten: 1. Two of ten: (2·1/3 + 8·2/3)/10 = 0.6. Three of ten: (3·2/3 + 7)/10 = 0.9. None: 0.
    texts = ["Yes.", "Two", "Watching", "yes"]
    found = benchmark.metrics(texts)
    assert [score.value for score in benchmark.scores(texts)] == pytest.approx([1, 0.6, 0.9, 0])
    assert found == {
        "accuracy": pytest.approx((1 + 0.6 + 0.9 + 0) / 4, abs=1e-12),
        "by_answer_type": {
            "number": pytest.approx(0.6, abs=1e-12),
            "other": pytest.approx(0.9, abs=1e-12),
            "yes/no": (1 + 0) / 2,
        },
    }
    benchmark.keep_first(2)
    assert benchmark.metrics(["no", "3"]) == {"accuracy": 0.5, "by_answer_type": {"number": 1.0, "yes/no": 0.0}}


def test_images_come_from_the_questions_split(tmp_path):
    _write_questions(tmp_path, VAL, IDS)
    (tmp_path / "val2014").mkdir()
    (tmp_path / "test2015").mkdir()
    with pytest.raises(UserError, match=r"val2014/COCO_val2014_000000262148\.jpg cannot be opened"):
        VQAv2(epath.Path(tmp_path)).questions[0].image()
    _write_questions(tmp_path, TEST_DEV, IDS, "test2015")  # LLaVA's file takes precedence
    with pytest.raises(UserError, match=r"test2015/COCO_test2015_000000262148\.jpg cannot be opened"):
        VQAv2(epath.Path(tmp_path)).questions[0].image()


def test_the_submission_covers_the_complete_test_set(tmp_path):
    _write_questions(tmp_path, TEST_DEV, [3001, 1002], "test2015")
    _write_questions(tmp_path, TEST, [1001, 1002, 2001, 3001], "test2015")
    benchmark = VQAv2(epath.Path(tmp_path))
    assert not benchmark.labels
    (file,) = benchmark.write_submission(["The Two Dogs.", "x-ray"], epath.Path(tmp_path))
    assert file == epath.Path(tmp_path) / "vqav2_submission.json"
    assert json.loads(file.read_text()) == [
        {"question_id": 1001, "answer": ""},
        {"question_id": 1002, "answer": "x ray"},
        {"question_id": 2001, "answer": ""},
        {"question_id": 3001, "answer": "2 dogs"},
    ]
    benchmark.keep_first(1)
    benchmark.write_submission(["dont"], epath.Path(tmp_path))
    assert [entry["answer"] for entry in json.loads(file.read_text())] == ["", "", "", "don't"]


@pytest.mark.parametrize("name", [TEST_DEV, VAL])
def test_without_the_test_set_the_submission_has_only_the_write_questionsed_questions(tmp_path, name):
    _write_questions(tmp_path, name, [3001, 1002])
    if name == VAL:
        _write_questions(tmp_path, TEST, [7001], "test2015")  # ignored for validation
    (file,) = VQAv2(epath.Path(tmp_path)).write_submission(["Red", ""], epath.Path(tmp_path))
    assert json.loads(file.read_text()) == [
        {"question_id": 3001, "answer": "red"},
        {"question_id": 1002, "answer": ""},
    ]


def test_test_dev_must_be_in_the_test_set(tmp_path):
    _write_questions(tmp_path, TEST_DEV, [1001, 1002, 1003])
    _write_questions(tmp_path, TEST, [1001, 1003])
    with pytest.raises(UserError, match=rf"{TEST} lacks 1 of the 3 questions, such as '1002':"):
        VQAv2(epath.Path(tmp_path))


@pytest.mark.parametrize(("question_type", "label_type"), [(str, int), (int, str)])
def test_ids_are_compared_as_text(tmp_path, question_type, label_type):
    _write_questions(tmp_path, VAL, IDS)
    _write_annotations(tmp_path, LABELS)
    texts = ["Yes.", "Two", "Watching", "yes"]
    expected = VQAv2(epath.Path(tmp_path)).metrics(texts)
    rows = [json.loads(line) for line in (tmp_path / VAL).read_text().splitlines()]
    lines = [json.dumps(row | {"question_id": question_type(row["question_id"])}) + "\n" for row in rows]
    (tmp_path / VAL).write_text("".join(lines))
    _write_annotations(tmp_path, [label | {"question_id": label_type(label["question_id"])} for label in LABELS])
    assert VQAv2(epath.Path(tmp_path)).metrics(texts) == expected

    for name, ids, kind in ((TEST_DEV, [3001, 1002], question_type), (TEST, [1001, 1002, 3001], label_type)):
        _write_questions(tmp_path, name, ids, "test2015")
        rows = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        (tmp_path / name).write_text(
            "".join(json.dumps(row | {"question_id": kind(row["question_id"])}) + "\n" for row in rows)
        )
    (tmp_path / ANNOTATIONS).unlink()
    (file,) = VQAv2(epath.Path(tmp_path)).write_submission(["red", "blue"], epath.Path(tmp_path))
    submitted = [(row["question_id"], row["answer"]) for row in json.loads(file.read_text())]
    assert submitted == [(label_type(1001), ""), (label_type(1002), "blue"), (label_type(3001), "red")]


def test_two_annotations_of_one_question_must_agree(tmp_path):
    _write_questions(tmp_path, VAL, IDS)
    _write_annotations(tmp_path, [*LABELS, LABELS[0] | {"question_id": str(LABELS[0]["question_id"])}])
    assert VQAv2(epath.Path(tmp_path)).scored
    _write_annotations(tmp_path, [*LABELS, LABELS[1] | {"question_id": "262148000", "answer_type": "other"}])
    with pytest.raises(UserError, match=rf"{ANNOTATIONS} has two different labels for question_id '262148000'"):
        VQAv2(epath.Path(tmp_path))


def test_questions_are_required(tmp_path):
    with pytest.raises(UserError, match=rf"^vqav2: there is no {TEST_DEV} or {VAL} in "):
        VQAv2(epath.Path(tmp_path))


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (LABELS[:3], " lacks 1 of the 4 questions, such as '393225000': it belongs to another split"),
        ({}, " has no list of labels under 'annotations'"),
        (LABELS[:2] + [{"question_id": 1}], ", label 3: a label needs question_id and answer_type."),
        (
            [_label(262148000, "yes/no", []), *LABELS[2:4], LABELS[0]],
            ", question 262148000: a label needs answers, a list",
        ),
        (
            [_label(262148000, "yes/no", [None]), *LABELS[2:4], LABELS[0]],
            ", question 262148000: a label needs answers, a list",
        ),
    ],
)
def test_mismatched_annotations_are_refused(tmp_path, labels, sentence):
    _write_questions(tmp_path, VAL, IDS)
    _write_annotations(tmp_path, labels)
    with pytest.raises(UserError) as error:
        VQAv2(epath.Path(tmp_path))
    assert str(error.value).startswith(f"{tmp_path / ANNOTATIONS}{sentence}")


def test_annotations_that_are_not_json_are_refused(tmp_path):
    _write_questions(tmp_path, VAL, IDS)
    (tmp_path / ANNOTATIONS).write_text("{")
    with pytest.raises(UserError, match=f"{ANNOTATIONS} is not JSON"):
        VQAv2(epath.Path(tmp_path))
