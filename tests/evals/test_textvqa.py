"""TextVQA: labels matched by image and question, the accuracy by hand, mismatched files."""

import json

import PIL.Image
import pytest
from etils import epath

from stf_jax.config import UserError
from stf_jax.evals.benchmarks.textvqa import TextVQA

WORD = "\nAnswer the question using a single word or phrase."
QUESTIONS = [
    ("003a8ae2ef43b901", f"What is the brand of this camera?\nReference OCR token: DAKOTA, DIGITAL, Pire{WORD}"),
    ("181f00d3ee2b2076", f"What is the time?\nReference OCR token: N, u, g0{WORD}"),
    ("181f00d3ee2b2076", f"What brand of watch is that?{WORD}"),  # without OCR; the image's second question
]
LABELS = [  # in another order, with one that has no question
    ("181f00d3ee2b2076", "What brand of watch is THAT?", ["ap"] * 3 + ["unanswerable"] * 7),
    ("003a8ae2ef43b901", "what is the brand of this camera?", ["dakota digital"] * 2 + ["Dakota"] * 8),
    ("181f00d3ee2b2076", "what is the time?", ["10:08"] * 10),
    ("ffffffffffffffff", "what is the time?", ["noon"] * 10),
]


def _write(folder, questions=QUESTIONS, labels=LABELS):
    folder.mkdir(exist_ok=True, parents=True)
    rows = [
        {"question_id": image, "image": f"{image}.jpg", "text": text, "category": "default"}
        for image, text in questions
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "llava_textvqa_val_v051_ocr.jsonl").write_text(lines)
    data = [
        {"question_id": number, "image_id": image, "question": question, "answers": answers, "set_name": "val"}
        for number, (image, question, answers) in enumerate(labels, start=34602)
    ]
    (folder / "TextVQA_0.5.1_val.json").write_text(json.dumps({"dataset_type": "val", "data": data}))


def test_accuracy_by_hand(tmp_path):
    _write(tmp_path / "textvqa")
    benchmark = TextVQA(epath.Path(tmp_path))
    assert [question.text for question in benchmark.questions] == [text for _, text in QUESTIONS]
    assert benchmark.labels == (epath.Path(tmp_path) / "textvqa" / "TextVQA_0.5.1_val.json",)
    # Two of ten: (2·1/3 + 8·2/3)/10 = 0.6. None of ten: 0. Three of ten: (3·2/3 + 7·1)/10 = 0.9.
    texts = ["The Dakota-Digital.", "9:10", "AP"]
    assert benchmark.metrics(texts) == {"accuracy": pytest.approx((0.6 + 0 + 0.9) / 3, abs=1e-12)}
    assert [score.value for score in benchmark.scores(texts)] == pytest.approx([0.6, 0, 0.9])
    benchmark.keep_first(1)
    assert benchmark.metrics(["Dakota"]) == {"accuracy": 1.0}  # eight of ten


def test_images_may_be_in_the_train_folder_or_the_benchmarks(tmp_path):
    _write(tmp_path)
    PIL.Image.new("RGB", (4, 3)).save(tmp_path / "003a8ae2ef43b901.jpg")
    assert TextVQA(epath.Path(tmp_path)).questions[0].image().size == (4, 3)
    (tmp_path / "train_images").mkdir()
    PIL.Image.new("RGB", (5, 3)).save(tmp_path / "train_images" / "003a8ae2ef43b901.jpg")
    assert TextVQA(epath.Path(tmp_path)).questions[0].image().size == (5, 3)


def test_ids_are_compared_as_text(tmp_path):
    _write(tmp_path, [(12, f"What is it?{WORD}")], [("12", "what is it?", ["noon"] * 10)])
    assert TextVQA(epath.Path(tmp_path)).metrics(["noon"]) == {"accuracy": 1.0}
    _write(tmp_path, [("12", f"What is it?{WORD}")], [(12, "what is it?", ["noon"] * 10)])
    assert TextVQA(epath.Path(tmp_path)).metrics(["noon"]) == {"accuracy": 1.0}


def test_labels_are_required(tmp_path):
    _write(tmp_path)
    (tmp_path / "TextVQA_0.5.1_val.json").unlink()
    with pytest.raises(UserError, match=r"^textvqa: there is no TextVQA_0\.5\.1_val\.json in "):
        TextVQA(epath.Path(tmp_path))


def test_every_question_needs_a_label(tmp_path):
    _write(tmp_path, labels=LABELS[:2])
    with pytest.raises(UserError, match=r"lacks 1 of the 3 questions, such as .*'what is the time\?'"):
        TextVQA(epath.Path(tmp_path))


@pytest.mark.parametrize(
    ("answers", "sentence"),
    [
        (["noon"] * 9, "label 1: TextVQA has 10 answers per question, not 9."),
        (["noon"] * 9 + [12], "label 1: a label needs answers, a list of the annotators' strings."),
        (None, "label 1: a label needs answers, a list of the annotators' strings."),
    ],
)
def test_ten_answers_are_required(tmp_path, answers, sentence):
    _write(tmp_path, labels=[("ffffffffffffffff", "what is the time?", answers), *LABELS[:3]])
    with pytest.raises(UserError) as error:
        TextVQA(epath.Path(tmp_path))
    assert str(error.value) == f"{tmp_path / 'TextVQA_0.5.1_val.json'}, {sentence}"
