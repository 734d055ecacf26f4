"""Files of questions and labels: malformed, missing and mismatched files are reported."""

import hashlib
import json
import re

import pytest
from etils import epath

from stf_jax.config import UserError
from stf_jax.evals.files import match_labels, read_json, read_jsonl, read_labels, sha256


def test_json_and_hashes(tmp_path):
    file = epath.Path(tmp_path) / "labels.json"
    file.write_bytes('\ufeff{"a": "ü"}'.encode())
    assert read_json(file) == {"a": "ü"}
    assert list(read_jsonl(file)) == [(1, {"a": "ü"})]
    assert sha256(file) == hashlib.sha256('\ufeff{"a": "ü"}'.encode()).hexdigest()
    for content in (b"{", b'"\xff"', b""):
        file.write_bytes(content)
        with pytest.raises(UserError, match=rf"^{re.escape(str(file))} is not JSON: "):
            read_json(file)
    file.unlink()
    with pytest.raises(UserError, match=rf"^{re.escape(str(file))} cannot be read: No such file"):
        read_json(file)


@pytest.mark.parametrize(
    ("content", "under", "sentence"),
    [
        ({"x": []}, "data", "has no list of labels under 'data'"),
        ([], "data", "has no list of labels under 'data'"),
        ({"data": {}}, "data", "has no list of labels under 'data'"),
        ({}, "", "has no list of labels; use the file"),
        ([{"image": "x", "id": 1}, {"image": "y"}], "", "label 2: a label needs image and id."),
        ([{"image": "x", "id": "1"}], "", "label 1: a label needs image and id."),
        (["x"], "", "label 1: a label needs image and id."),
    ],
)
def test_malformed_labels_are_refused(tmp_path, content, under, sentence):
    file = epath.Path(tmp_path) / "labels.json"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        read_labels(file, under, image=str, id=int)
    assert str(error.value).startswith(str(file))
    assert sentence in str(error.value)


@pytest.mark.parametrize("under", ["", "annotations"])
def test_labels_may_be_lines_or_an_array_under_a_key_or_not(tmp_path, under):
    file, labels = epath.Path(tmp_path) / "labels.json", [{"image": "a", "id": 1}, {"image": "b", "id": 2}]
    lines = [json.dumps(label) for label in labels]
    texts = ["\n".join(lines), "\ufeff\r\n" + "\r\n\r\n".join(lines) + "\r\n", json.dumps(labels)]
    texts += [json.dumps({under: labels}, indent=indent) for indent in (None, 1)] if under else []
    for text in texts:
        file.write_bytes(text.encode())
        assert read_labels(file, under, image=str, id=int) == labels
    file.write_text("\n".join(lines)[:-4])
    with pytest.raises(UserError, match=r"labels\.json, line 2 is not JSON: "):
        read_labels(file, under, image=str, id=int)


def test_questions_without_labels_are_counted():
    file = epath.Path("labels.json")
    assert match_labels([2, 1], {1: "a", 2: "b", 3: "c"}, file) == ["b", "a"]
    with pytest.raises(UserError) as error:
        match_labels([2, 5, 1, 4], {1: "a", 2: "b"}, file)
    assert str(error.value) == (
        "labels.json lacks 2 of the 4 questions, such as 5: it belongs to another split or version. Replace it or move "
        "it away."
    )
