"""Tests of the base class and registry: question files, folders, images, limits, names."""

import dataclasses
import json
import pathlib
import re

import PIL.Image
import pytest
from etils import epath
from make_evals import SHORT_ANSWER_SUFFIX, FixedBenchmark, make_gqa
from make_hub import make_rows, write_rows

from stf_jax import evaluate
from stf_jax.config import UserError
from stf_jax.data.image import read_image
from stf_jax.evals import benchmark
from stf_jax.evals.benchmark import BlankImage, Question, accuracy_by_kind
from stf_jax.evals.benchmarks.gqa import GQA
from stf_jax.evals.registry import BENCHMARKS, benchmark_groups, open_benchmarks
from stf_jax.evals.runner import check_images

QUESTIONS = "llava_gqa_testdev_balanced.jsonl"
ROW = {"question_id": "1", "image": "a.png", "text": "Is it?", "category": "default"}


def open_gqa(folder, *rows):
    """GQA with these rows or lines as its questions, without labels."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / QUESTIONS).write_bytes("".join(line + "\n" for line in lines).encode())
    return GQA(epath.Path(folder))


# ---- Questions -------------------------------------------------------------------------------------------------------


def test_rows_become_questions_unchanged(tmp_path):
    first, second = open_gqa(
        tmp_path,
        "\ufeff" + json.dumps(ROW | {"text": f"Is it?{SHORT_ANSWER_SUFFIX}"}),
        "",
        ROW | {"question_id": 2, "text": "a\u2028紺"},
    ).questions
    assert (first.id, first.text, first.prompt, first.metadata) == (
        "1",
        f"Is it?{SHORT_ANSWER_SUFFIX}",
        f"Is it?{SHORT_ANSWER_SUFFIX}",
        {},
    )
    assert (second.id, second.text) == (2, "a\u2028紺")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"question_id": "1"', " is not JSON: "),
        ("7", ": a question needs question_id, image and text."),
        (ROW | {"image": ""}, ": a question needs question_id, image and text."),
        (ROW | {"text": ""}, ": a question needs question_id, image and text."),
        (ROW | {"question_id": None}, ": a question needs question_id, image and text."),
        (ROW | {"question_id": 1.5}, ": a question needs question_id, image and text."),
        (ROW | {"image": ["a.png"]}, ": a question needs question_id, image and text."),
        (ROW | {"text": 3}, ": a question needs question_id, image and text."),
        (
            {key: value for key, value in ROW.items() if key != "image"},
            ": a question needs question_id, image and text.",
        ),
    ],
)
def test_a_malformed_row_is_reported_with_its_line(line, sentence, tmp_path):
    with pytest.raises(UserError, match=rf"{QUESTIONS}, line 3{sentence}"):
        open_gqa(tmp_path, ROW, "", line)


def test_files_that_are_empty_or_not_text_are_refused(tmp_path):
    with pytest.raises(UserError, match=rf"{QUESTIONS} contains no questions\.$"):
        open_gqa(tmp_path, "", " ")
    (tmp_path / QUESTIONS).write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=rf"{QUESTIONS} cannot be read: .*utf-8"):
        GQA(epath.Path(tmp_path))
    (tmp_path / QUESTIONS).unlink()
    with pytest.raises(UserError, match=rf"^gqa: there is no {QUESTIONS} in {re.escape(str(tmp_path))}\.$"):
        GQA(epath.Path(tmp_path))


def test_kinds_are_scored_separately():
    assert list(accuracy_by_kind(["b", "a", "b", "b"], [1, 0.5, 0, 0]).items()) == [
        ("a", {"accuracy": 0.5, "questions": 1}),
        ("b", {"accuracy": 1 / 3, "questions": 3}),
    ]


def test_a_limit_keeps_the_first_questions_and_sets_limited():
    benchmark = FixedBenchmark([Question(n, "", None, "") for n in range(5)])
    for count, left, limited in ((7, 5, False), (5, 5, False), (2, 2, True)):
        benchmark.limit(count)
        assert ([q.id for q in benchmark.questions], benchmark.limited) == (list(range(left)), limited)
        assert benchmark.count == left


# ---- Images --------------------------------------------------------------------------------------------------------


def test_images_come_from_the_first_folder_that_exists(tmp_path):
    (question,) = open_gqa(tmp_path, ROW).questions
    PIL.Image.new("RGB", (3, 1)).save(tmp_path / "a.png")
    assert question.image().size == (3, 1)
    for side, folder in ((4, "images"), (5, "data/images")):
        (tmp_path / folder).mkdir(parents=True)
        PIL.Image.new("RGB", (side, 1)).save(tmp_path / folder / "a.png")
        (question,) = GQA(epath.Path(tmp_path)).questions
        assert question.image().size == (side, 1)


def test_an_image_that_cannot_be_opened_is_named(tmp_path):
    def make_image(name):
        (question,) = open_gqa(tmp_path, ROW | {"image": name}).questions
        return question.image

    (tmp_path / "images").mkdir()
    PIL.Image.new("RGB", (1, 1)).save(tmp_path / "outside.png")
    with pytest.raises(UserError, match=r"images/absent\.png cannot be opened: No such file"):
        make_image("absent.png")()
    with pytest.raises(UserError, match=r"'file://outside\.png' is a URL"):
        make_image("file://outside.png")()
    for name in ("../outside.png", "sub/../../outside.png", str(tmp_path / "outside.png")):
        with pytest.raises(UserError, match=rf"^Image path {re.escape(repr(name))} leaves the folder .*images\.$"):
            make_image(name)()
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"broken\.png"):
        make_image("broken.png")()


def test_check_images_opens_every_image_once(tmp_path, monkeypatch):
    make_gqa(tmp_path)
    file, images = tmp_path / "gqa" / QUESTIONS, tmp_path / "gqa" / "images"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[7]["image"] = rows[3]["image"] = rows[0]["image"]  # three questions share an image
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = []
    monkeypatch.setattr(benchmark, "read_image", lambda folder, name: (read.append(name), read_image(folder, name))[1])
    check_images(open_benchmarks(["scenes", "gqa"], str(tmp_path)))
    assert sorted(read) == sorted({row["image"] for row in rows})
    (images / "n43.png").unlink()
    (images / "n40.png").write_bytes((images / "n40.png").read_bytes()[:300])
    with pytest.raises(UserError, match=r"^gqa: 2 of 42 images cannot be used\. The first: Image .*/n40\.png cannot"):
        check_images(open_benchmarks(["scenes", "gqa"], str(tmp_path)))
    check_images(open_benchmarks(["gqa"], str(tmp_path), limit=40))  # images beyond the limit are not opened


def test_images_are_opened_before_the_model_is_loaded(tmp_path):
    make_gqa(tmp_path)
    (tmp_path / "gqa" / "images" / "n43.png").unlink()
    (tmp_path / "none").mkdir()
    argv = [f"--checkpoint={tmp_path}/none", "--benchmark=gqa", f"--data={tmp_path}", f"--out={tmp_path}/out"]
    with pytest.raises(UserError, match=r"^gqa: 1 of 44 images cannot be used\. The first: Image .*/n43\.png "):
        evaluate.main(argv)
    with pytest.raises(UserError, match="none is neither the workdir of a run"):
        evaluate.main([*argv, "--limit=43"])


# ---- Registry --------------------------------------------------------------------------------------------------------


def test_every_benchmark_is_registered_by_its_name():
    names = ["gqa", "scienceqa", "vqav2", "vizwiz", "textvqa", "pope", "mmbench", "mmbench_cn", "mme"]
    groups = {"paper": names}
    groups["ocr"] = ["ocrbench", "chartqa", "docvqa", "infovqa", "textvqa_no_ocr"]
    groups["general"] = ["seedbench", "mmstar", "ai2d"]
    groups["all"] = sum(groups.values(), ["docvqa_test", "infovqa_test", "scenes", "prints", "shapes"])
    assert {group: sorted(members) for group, members in benchmark_groups().items()} == {
        group: sorted(members) for group, members in groups.items()
    }
    assert all(kind.name == name for name, kind in BENCHMARKS.known.items())
    assert all(kind.rule.endswith(".") for kind in BENCHMARKS.known.values())


def test_groups_stand_for_their_benchmarks_each_once(tmp_path):
    for name in ("ai2d", "mmstar", "seedbench"):
        write_rows(tmp_path, name, make_rows(name))
    opened = open_benchmarks(["mmstar", "general", "shapes", "mmstar"], str(tmp_path), limit=1)
    assert [benchmark.name for benchmark in opened] == ["mmstar", "ai2d", "seedbench", "shapes"]


def test_hidden_images_are_blank_and_of_the_same_size(tmp_path):
    write_rows(tmp_path, "ai2d", make_rows("ai2d"))
    (benchmark,) = open_benchmarks(["ai2d"], str(tmp_path), limit=3)
    seen, opener = benchmark.questions, benchmark.questions[1].image
    benchmark.hide_images()
    for question, before in zip(benchmark.questions, seen, strict=True):
        assert dataclasses.replace(question, image=before.image, metadata=before.metadata) == before
        assert question.metadata == before.metadata | {"shown": "blank"}
        image = question.image()
        assert image.size == before.image().size
        assert image.getcolors() == [(image.width * image.height, (122, 116, 104))]
    assert benchmark.questions[1].image == BlankImage(opener)  # equal openers open the same image
    benchmark.check_images()
    text_only = FixedBenchmark([Question(1, "?", None, "?")])
    text_only.hide_images()
    assert text_only.questions == [Question(1, "?", None, "?")]
    (scenes,) = open_benchmarks(["shapes"], "")
    before = list(scenes.questions)
    scenes.hide_images()  # asks about blank images anyway
    assert scenes.questions == before
    assert not scenes.blank


def test_a_benchmark_of_your_own(monkeypatch):
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[1] / "plugins")
    (benchmark,) = open_benchmarks(["brightness:Brightness"], "")
    assert [question.text for question in benchmark.questions] == ["Is it bright?"] * 4
    assert benchmark.metrics(["Yes", "no", "Yes.", "No"]) == {"accuracy": 0.5}
    with pytest.raises(UserError, match=r"^Benchmark brightness:Gray is not a subclass of stf_jax\.evals\.benchmark"):
        open_benchmarks(["brightness:Gray"], "")


def test_data_is_the_folder_of_all_benchmarks_or_of_one(tmp_path):
    make_gqa(tmp_path)
    for folder in (tmp_path, tmp_path / "gqa"):
        gqa, scenes = open_benchmarks(["gqa", "scenes"], str(folder), limit=6)
        assert (len(gqa.questions), gqa.count) == (6, 6)
        assert (len(scenes.questions), scenes.count) == (12, 6)
        assert gqa.questions[0].image().size == (56, 40)
    (gqa,) = open_benchmarks(["gqa"], str(tmp_path))
    assert len(gqa.questions) == 44
    assert gqa.scored
    (tmp_path / "gqa" / "testdev_balanced_questions.json").unlink()
    assert not open_benchmarks(["gqa"], str(tmp_path))[0].scored


NO_MMBENCH = (
    "mmbench: there is no mmbench_dev_20230712.tsv or mmbench_test_20230712.tsv or MMBench_DEV_EN.tsv or "
    "MMBench_TEST_EN.tsv in DATA."
)


@pytest.mark.parametrize(
    ("names", "data", "sentence"),
    [
        (["gqua"], "", "Unknown benchmark 'gqua'; did you mean 'gqa'?"),
        (["scenes", "mm bench"], "", "Unknown benchmark 'mm bench'; did you mean 'mmbench'?"),
        (["al"], "", "Unknown benchmark 'al'; did you mean 'all'?"),
        ([""], "", f"Unknown benchmark ''; known: {', '.join(BENCHMARKS.known)}, general, ocr, paper, all."),
        (
            ["scenes", "pope"],
            "",
            "Benchmark pope needs the folder of the evaluation files: --data, or config.eval.data.",
        ),
        (["all"], "", "Benchmark ai2d needs the folder of the evaluation files: --data, or config.eval.data."),
        # Of all that it needs, the folder has GQA's.
        (
            ["paper"],
            "DATA",
            NO_MMBENCH,
        ),
        (
            ["scenes", "paper"],
            "DATA",
            NO_MMBENCH,
        ),
        (["gqa"], "nowhere", f"gqa: there is no {QUESTIONS} in nowhere."),
    ],
)
def test_names_and_folders_that_cannot_be_opened_are_refused(names, data, sentence, tmp_path):
    make_gqa(tmp_path)
    with pytest.raises(UserError) as error:
        open_benchmarks(names, data.replace("DATA", str(tmp_path)))
    assert str(error.value) == sentence.replace("DATA", str(tmp_path))
