"""Benchmarks from the Hub: lmms-eval's prompts and scores, images read on demand, submissions, defective files."""

import json
import shutil
import sys
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath
from make_hub import CASES, FOLDERS, SCHEMAS, make_image, make_rows, write_authors_files, write_rows

from stf_jax.config import UserError
from stf_jax.data.records import BadRow
from stf_jax.evals.hub import HubBenchmark
from stf_jax.evals.registry import BENCHMARKS, open_benchmarks
from stf_jax.evals.scores import read_scores, write_scores

IDS = {  # else the rows' numbers
    "docvqa": "questionId",
    "infovqa": "questionId",
    "mmstar": "index",
    "seedbench": "question_id",
    "textvqa_no_ocr": "question_id",
}
LIMITS = {"ai2d": 16, "chartqa": 16, "docvqa": 32, "infovqa": 32, "ocrbench": 128}  # of the tasks; else LLaVA's, 1024


def open_one(folder, name) -> HubBenchmark:
    (benchmark,) = open_benchmarks([name], str(folder))
    return benchmark


def rename(name, metrics):
    """Returns our metrics as lmms-eval names them."""
    match name:
        case "chartqa":
            splits = {f"relaxed_{key}_split": value["accuracy"] for key, value in metrics["by_split"].items()}
            return {"relaxed_overall": metrics["accuracy"]} | splits
        case "mmstar":
            categories = {key: value["average"] for key, value in metrics["by_category"].items()}
            return {"average": metrics["average"]} | categories
        case "ocrbench":
            return {"ocrbench_accuracy": metrics["score"] / 1000}
        case "seedbench":
            return {"seed_image": metrics["accuracy"]}
        case "docvqa" | "infovqa":
            return metrics
        case _:
            return {"exact_match": metrics["accuracy"]}


# ---- Prompts and scores ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("name", SCHEMAS)
def test_prompts_and_scores_are_lmms_evals(name, shards, tmp_path):
    rows = make_rows(name)
    write_rows(tmp_path, name, rows, 1 if name == "mmstar" else shards)
    benchmark, scores = open_one(tmp_path, name), dict(CASES[name]["scores"])
    numbers = [n for n, (row, *_) in enumerate(CASES[name]["cases"]) if row.get("data_type") != "video"]
    cases = [CASES[name]["cases"][n] for n in numbers]
    assert [question.text for question in benchmark.questions] == [prompt for *_, prompt in cases]
    assert [question.prompt for question in benchmark.questions] == [prompt for *_, prompt in cases]
    ids = [row[IDS[name]] for row, *_ in cases] if name in IDS else numbers
    assert [question.id for question in benchmark.questions] == ids
    assert [question.metadata for question in benchmark.questions] == [{"doc_id": n} for n in numbers]
    assert benchmark.max_new_tokens == LIMITS.get(name, 1024)
    texts = [answer.strip() for _, answer, _ in cases]
    if name == "seedbench":  # of the videos, and of both
        del scores["seed_video"], scores["seed_all"]
    metrics, single = benchmark.metrics(texts), benchmark.scores(texts)
    assert rename(name, metrics) == scores  # to the last digit
    assert [score.asked for score in single] == [(n,) for n in range(len(texts))]
    whole = metrics["anls"] if "anls" in metrics else metrics["accuracy"]
    assert sum(score.value for score in single) / len(single) == whole
    benchmark.limit(2)
    json.dumps(benchmark.metrics(texts[:2]))


@pytest.mark.parametrize("name", SCHEMAS)
def test_images_are_read_on_demand_in_any_order(name, tmp_path):
    rows = make_rows(name)
    write_rows(tmp_path, name, rows, 1 if name == "mmstar" else 2)
    benchmark = open_one(tmp_path, name)
    benchmark.check_images()
    for question in (*benchmark.questions[::-1], *benchmark.questions):
        image, number = question.image(), question.metadata["doc_id"]
        # Without its transparency, as with Pillow's convert("RGB"), which lmms-eval's tasks call.
        assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (5 + number, 4), (number, 0, 90))


AUTHORS = ["chartqa", "docvqa", "infovqa", "ocrbench", "seedbench", "textvqa_no_ocr"]


@pytest.mark.parametrize("name", [*AUTHORS, "docvqa_test", "infovqa_test"])
def test_the_authors_files_have_the_same_questions(name, tmp_path):
    write_rows(tmp_path / "hub", name, make_rows(name))
    write_authors_files(tmp_path / "authors" / name.removesuffix("_test"), name)
    hub, authors = (open_one(tmp_path / place, name) for place in ("hub", "authors"))
    assert [q.text for q in authors.questions] == [q.text for q in hub.questions]
    assert [str(q.id) for q in authors.questions] == [str(q.id) for q in hub.questions]
    assert [q.image().tobytes() for q in authors.questions] == [q.image().tobytes() for q in hub.questions]
    assert bool(authors.labels) == hub.has_labels == authors.scored
    if hub.scored:
        texts = [answer.strip() for row, answer, _ in CASES[name]["cases"] if row.get("data_type") != "video"]
        assert authors.metrics(texts) == hub.metrics(texts)


def test_scores_by_group(tmp_path):
    for name in ("chartqa", "mmstar", "ocrbench", "seedbench"):
        write_rows(tmp_path, name, make_rows(name))

    def score(name):
        benchmark = open_one(tmp_path, name)
        cases = {n: answer for n, (_, answer, _) in enumerate(CASES[name]["cases"])}
        return benchmark.metrics([cases[question.metadata["doc_id"]] for question in benchmark.questions])

    assert score("chartqa")["by_split"]["human"] == {"accuracy": 3 / 6, "questions": 6}
    assert score("ocrbench")["by_type"]["Digit String Recognition"] == {"accuracy": 0.0, "questions": 1}
    assert score("ocrbench")["accuracy"] == 7 / 11
    assert score("seedbench")["by_type"]["Instances Counting"] == {"accuracy": 1.0, "questions": 2}
    star = score("mmstar")
    assert star["by_category"]["coarse perception"] == {"average": 2 / 3, "accuracy": 3 / 5, "questions": 5}
    assert star["accuracy"] == 6 / 11


@pytest.mark.parametrize("name", ["docvqa_test", "infovqa_test"])
def test_the_submission_of_a_test_split(name, tmp_path):
    rows = make_rows(name)
    write_rows(tmp_path, name, rows)
    benchmark = open_one(tmp_path, name)
    assert not benchmark.scored
    texts = [f"é {n}" for n in range(len(rows))]
    (file,) = benchmark.write_submission(texts, epath.Path(tmp_path))
    assert file.name == f"{name}_for_submission.json"
    assert json.loads(file.read_text()) == [
        {"questionId": int(row["questionId"]), "answer": text} for row, text in zip(rows, texts, strict=True)
    ]
    rows[1]["questionId"] = "x1"
    write_rows(tmp_path, name, rows)
    assert open_error(tmp_path, name).endswith(".parquet, row 2: questionId 'x1' is not an integer.")


def test_the_folder_of_one_benchmark(tmp_path):
    for name in ("chartqa", "docvqa", "infovqa", "textvqa_no_ocr"):
        write_rows(tmp_path, name, make_rows(name))
    assert len(open_one(tmp_path / "chartqa", "chartqa").questions) == 11
    assert len(open_one(tmp_path / "chartqa" / "data", "chartqa").questions) == 11
    # Both have files of the same name in one data set.
    for folder in ("docvqa", "DocVQA"):
        (tmp_path / "docvqa").rename(tmp_path / "moved")
        (tmp_path / "moved").rename(tmp_path / folder)
        for data in (tmp_path, tmp_path / folder):
            assert [len(open_one(data, name).questions) for name in ("docvqa", "infovqa")] == [8, 5]
        (tmp_path / folder).rename(tmp_path / "docvqa")


# ---- Defective files -------------------------------------------------------------------------------------------------


def open_error(folder, name):
    with pytest.raises(UserError) as error:
        open_one(folder, name)
    return str(error.value)


def test_missing_columns_are_named(tmp_path):
    for name in SCHEMAS:
        for column in BENCHMARKS.find(name).columns:
            rows = [{key: value for key, value in row.items() if key != column} for row in make_rows(name)]
            write_rows(tmp_path, name, rows, drop=column)
            assert f".parquet has no column {column!r}; it has " in open_error(tmp_path, name)


@pytest.mark.parametrize(
    ("column", "kind", "values", "found", "wanted"),
    [
        ("answer", pa.float64(), [1.5, 2.5], "double", "text"),
        ("answer", pa.list_(pa.string()), [["a"], ["b"]], "list of text", "text"),
        ("image", pa.string(), ["a.png", "b.png"], "text", "image"),
        ("image", pa.struct([("path", pa.string())]), [{"path": "a"}] * 2, "struct<path: string>", "image"),
    ],
)
def test_columns_of_another_type_are_named(column, kind, values, found, wanted, tmp_path):
    file = tmp_path / "test-00000-of-00001.parquet"
    columns = {
        name: pa.array([row[name] for row in make_rows("chartqa")[:2]], type_) for name, type_ in SCHEMAS["chartqa"]
    }
    pq.write_table(pa.table(columns | {column: pa.array(values, kind)}), file)
    assert open_error(tmp_path, "chartqa") == f"{file}: column '{column}' is of type {found}, not {wanted}."


def test_images_may_be_plain_bytes_and_texts_large(tmp_path):
    rows = make_rows("chartqa")
    columns = {
        name: pa.array([row[name] for row in rows], pa.large_string()) for name in ("type", "question", "answer")
    }
    images = pa.array([row["image"]["bytes"] for row in rows], pa.large_binary())
    pq.write_table(pa.table(columns | {"image": images}), tmp_path / "test-00000-of-00001.parquet")
    benchmark = open_one(tmp_path, "chartqa")
    assert [question.image().width for question in benchmark.questions] == [*range(5, 16)]


def test_empty_and_truncated_files(tmp_path):
    file = tmp_path / "chartqa" / "data" / "test-00000-of-00001.parquet"
    write_rows(tmp_path, "chartqa", [])
    assert open_error(tmp_path, "chartqa") == f"{file} contains no questions."
    write_rows(tmp_path, "chartqa", make_rows("chartqa"))
    content = file.read_bytes()
    for cut in (b"", content[:100], content[:-20]):
        file.write_bytes(cut)
        assert open_error(tmp_path, "chartqa").startswith(f"{file} cannot be read as Parquet: ")
    file.write_bytes(content[:4] + bytes(len(content) // 3) + content[4 + len(content) // 3 :])  # the end is whole
    assert open_error(tmp_path, "chartqa").startswith(f"{file} cannot be read: ")
    write_rows(tmp_path, "seedbench", [row for row in make_rows("seedbench") if row["data_type"] == "video"])
    assert open_error(tmp_path, "seedbench").startswith("seedbench: no row of ")


def test_incomplete_and_mixed_uploads(tmp_path):
    write_rows(tmp_path, "ocrbench", make_rows("ocrbench"), shards=3)
    folder = tmp_path / "ocrbench" / "data"
    files = [folder / f"test-0000{n}-of-00003.parquet" for n in range(3)]
    old = folder / "test-00001-of-00003-0123456789abcdef.parquet"
    shutil.copy(files[1], old)
    assert "are not those of one upload, 3 in number: " in open_error(tmp_path, "ocrbench")
    files[1].unlink()
    open_one(tmp_path, "ocrbench")
    old.unlink()
    assert open_error(tmp_path, "ocrbench") == (
        f"ocrbench: the files test-*.parquet in {folder} are not those of one upload, 3 in number: "
        "test-00000-of-00003.parquet, test-00002-of-00003.parquet. Download the data set again."
    )
    shutil.rmtree(folder)
    assert open_error(tmp_path, "ocrbench") == (
        f"ocrbench: there is no data/test-*.parquet or OCRBench.json in {tmp_path}/ocrbench; get the files with: "
        f"hf download echo840/OCRBench --repo-type=dataset --local-dir={tmp_path}/ocrbench"
    )
    assert open_error(tmp_path, "infovqa") == (  # not all in one folder
        "infovqa: there is no InfographicVQA/validation-*.parquet or infographicsVQA_val_v1.0_withQT.json in "
        f"{tmp_path}; get the files with: "
        f"hf download lmms-lab-encoder/DocVQA --repo-type=dataset --local-dir={tmp_path}/infovqa"
    )


@pytest.mark.parametrize(
    ("name", "row", "sentence"),
    [
        ("ai2d", {"answer": "4"}, "answer '4' is not the index of one of its options."),
        ("ai2d", {"answer": "B"}, "answer 'B' is not the index of one of its options."),
        ("ai2d", {"options": []}, " has no options."),
        ("ai2d", {"options": ["a", None]}, " has no options."),
        ("chartqa", {"type": "human"}, "unknown type 'human'; did you mean 'human_test'?"),
        ("chartqa", {"answer": None}, " has no answer."),
        ("docvqa", {"answers": []}, " has no answers."),
        ("infovqa", {"answers": None}, " has no answers."),
        ("mmstar", {"answer": "E"}, "the answer is 'E', not one of A, B, C, D."),
        ("ocrbench", {"question_type": "x"}, "'x' is none of OCRBench's types of questions."),
        ("seedbench", {"answer": "a"}, "the answer is 'a', not one of A, B, C, D."),
        ("seedbench", {"question_type_id": 10}, "10 is not a type of questions about images."),
        ("textvqa_no_ocr", {"question": None}, " has no question."),
    ],
)
def test_bad_rows_are_named(name, row, sentence, tmp_path):
    rows = make_rows(name)
    rows[1] |= row
    write_rows(tmp_path, name, rows)
    (file,) = (tmp_path / FOLDERS[name]).parent.iterdir()
    where = f"{file}, row 2"
    assert open_error(tmp_path, name) == (where + sentence if sentence.startswith(" has") else f"{where}: {sentence}")


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("chartqa", {"label": 3}, "label 2: label is 3, not text."),
        ("chartqa", {"imgname": None}, "label 2: a label needs imgname."),
        ("docvqa", {"questionId": 1.5}, "label 2: questionId is 1.5, not text or integer."),
        ("docvqa", {"answers": ["a", 1]}, "label 2: answers is ['a', 1], not list of text."),
        ("infovqa", {"answers": []}, "label 2 has no answers."),
        ("ocrbench", {"type": "x"}, "label 2: 'x' is none of OCRBench's types of questions."),
        ("seedbench", {"question_type_id": True}, "label 2: question_type_id is True, not integer."),
    ],
)
def test_bad_questions_of_authors_files_are_named(name, changes, sentence, tmp_path):
    file, *_ = write_authors_files(tmp_path / name, name, changes)
    assert open_error(tmp_path, name) == f"{file}, {sentence}"


def test_other_forms_of_authors_files(tmp_path):
    human, augmented = write_authors_files(tmp_path / "chartqa", "chartqa")
    augmented.unlink()
    assert open_error(tmp_path, "chartqa") == f"{augmented} is missing next to {human}: the benchmark needs both."
    augmented.write_text("[]")
    assert open_error(tmp_path, "chartqa") == f"{augmented} contains no questions."
    write_authors_files(tmp_path / "ocrbench", "ocrbench", {"answers": "one text"})
    assert open_one(tmp_path, "ocrbench").rows[1]["answer"] == ["one text"]
    (file,) = write_authors_files(tmp_path / "docvqa", "docvqa")
    file.write_text("{}")
    assert open_error(tmp_path, "docvqa").startswith(f"{file} has no list of labels under 'data'; use the file")
    (tmp_path / "seedbench").mkdir()
    assert "there is no data/test-*.parquet or SEED-Bench.json in " in open_error(tmp_path, "seedbench")


def test_questions_about_one_image_are_one_cluster(tmp_path):
    rows = make_rows("docvqa")
    rows[5]["image"] = rows[6]["image"] = rows[0]["image"]  # in another row each, two of them in another file
    rows[2]["image"] = rows[3]["image"] = {"bytes": None, "path": None}
    write_rows(tmp_path, "docvqa", rows, shards=2)
    benchmark = open_one(tmp_path, "docvqa")
    for hidden in (False, True):
        if hidden:
            benchmark.hide_images()
        write_scores(benchmark, ["x"] * len(rows), epath.Path(tmp_path / "scores.jsonl"))
        clusters = [row.image for row in read_scores(epath.Path(tmp_path / "scores.jsonl"))]
        assert clusters == [0, 1, 2, 3, 4, 0, 0, 5]  # images that cannot be read are different ones


def test_unreadable_images(tmp_path):
    rows = make_rows("seedbench")
    for number, images in enumerate(
        [[], [{"bytes": None, "path": "a.png"}], [], [{"bytes": b"no image", "path": None}], rows[3]["image"] * 2]
    ):
        if number != 2:  # the video
            rows[number]["image"] = images
    write_rows(tmp_path, "seedbench", rows)
    file = tmp_path / "seedbench" / "data" / "test-00000-of-00001.parquet"
    benchmark = open_one(tmp_path, "seedbench")  # enough to score answers
    with pytest.raises(UserError) as error:
        benchmark.check_images()
    assert str(error.value) == (
        f"seedbench: 4 of 7 images cannot be used. The first: {file}, row 1 has 0 images, not one."
    )
    errors = []
    for question in benchmark.questions[1:4]:
        with pytest.raises(BadRow) as error:
            question.image()
        errors.append(str(error.value))
    assert errors[0] == f"{file}, row 2 contains no image."
    assert errors[1].startswith(f"Image of {file}, row 4 cannot be opened: its format is none of ")
    assert errors[2] == f"{file}, row 5 has 2 images, not one."
    # Rows are read when the benchmark is opened; its images may break later.
    write_rows(tmp_path, "ai2d", make_rows("ai2d"))
    benchmark = open_one(tmp_path, "ai2d")

    def fail(group, column):
        raise OSError("Corrupt snappy compressed data.")

    broken = types.SimpleNamespace(read_group=fail, locate=lambda number: (0, number))
    benchmark.questions[0].image.table._shards[0] = broken
    with pytest.raises(BadRow, match=r"The image of .*, row 1 cannot be read: Corrupt snappy compressed data\.$"):
        benchmark.questions[0].image()


def test_pyarrow_is_only_needed_for_parquet(tmp_path, monkeypatch):
    write_rows(tmp_path, "chartqa", make_rows("chartqa"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    file = tmp_path / "chartqa" / "data" / "test-00000-of-00001.parquet"
    assert open_error(tmp_path, "chartqa") == f"{file} is a Parquet file, which needs a package: pip install pyarrow"
    open_benchmarks(["shapes"], "")


def test_groups_decoded_at_once_are_few(tmp_path):
    write_rows(tmp_path, "ocrbench", make_rows("ocrbench"), shards=2)
    benchmark = open_one(tmp_path, "ocrbench")
    table = benchmark.questions[0].image.table
    assert not table._groups  # nothing is read before it is asked for
    for question in benchmark.questions:
        question.image()
        assert len(table._groups) <= 2
    assert benchmark.questions[0].image == benchmark.questions[0].image
    assert len({question.image for question in benchmark.questions}) == 11
    assert make_image(0) == table.read_image(benchmark.rows[0], "image")
