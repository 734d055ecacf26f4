"""The evaluate command: killed and restarted, scoring without a model, and its messages for bad input."""

import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest
from make_evals import QUESTIONS, SHORT_ANSWER_SUFFIX, make_gqa, make_model
from make_hub import CASES, make_rows, write_rows

from stf_jax import evaluate
from stf_jax.cli import run_command
from stf_jax.evals.benchmark import Benchmark
from stf_jax.inference import loading
from stf_jax.inference.loading import load_generator

QUESTION_FILE, PREDICTIONS = "llava_gqa_testdev_balanced.jsonl", "testdev_balanced_predictions.json"


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def read_error(capsys):
    """Returns the error message of a failed command."""
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    return error.removeprefix("error: ")


@pytest.fixture(scope="module")
def gqa(tmp_path_factory):
    """A model, GQA, and an uninterrupted run's folder ``complete``; ``evaluate`` runs the command with another folder.

    The model is loaded and compiled once for all tests.
    """
    folder = tmp_path_factory.mktemp("gqa")
    gold, model = make_gqa(folder / "data"), make_model(folder / "model")

    def arguments(out, data=folder / "data"):
        return [f"--checkpoint={model}", "--benchmark=gqa", f"--data={data}", f"--out={out}", "--batch=8"]

    def run_evaluate(out, *more, data=folder / "data"):
        return run_command(evaluate.main, [*arguments(out, data), *more])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load_generator", functools.cache(load_generator))
        assert run_evaluate(folder / "complete") == 0
        yield types.SimpleNamespace(
            folder=folder, gold=gold, evaluate=run_evaluate, arguments=arguments, complete=folder / "complete"
        )


# ---- Evaluation ------------------------------------------------------------------------------------------------------


def test_every_answer_is_written_and_all_differ(gqa):
    assert set(contents(gqa.complete)) == {
        "answers.jsonl",
        "protocol.json",
        "results.json",
        "scores.jsonl",
        PREDICTIONS,
    }
    rows = [json.loads(line) for line in (gqa.complete / "answers.jsonl").read_bytes().splitlines()]
    questions = [json.loads(line) for line in (gqa.folder / "data" / "gqa" / QUESTION_FILE).read_bytes().splitlines()]
    keys = ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert [list(row) for row in rows] == [keys] * QUESTIONS
    assert [(row["question_id"], row["prompt"]) for row in rows] == [(q["question_id"], q["text"]) for q in questions]
    assert "grün" in rows[1]["prompt"]
    assert {row["model_id"] for row in rows} == {"model"}
    assert len({row["text"] for row in rows}) == QUESTIONS  # the tests below rely on it


def test_a_benchmark_of_your_own(gqa, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parent / "plugins")
    checkpoint = gqa.arguments(tmp_path)[0]
    options = [checkpoint, "--benchmark=brightness:Brightness", f"--out={tmp_path / 'out'}", "--batch=8"]
    assert run_command(evaluate.main, options) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["benchmark"] == "brightness"
    assert results["questions"] == 4
    assert results["metrics"].keys() == {"accuracy"}


def test_a_killed_and_restarted_run_ends_with_the_same_files(gqa, tmp_path):
    """The killed run is a separate process with a locale that cannot encode ü."""
    locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    killed, answers = tmp_path / "killed", tmp_path / "killed" / "answers.jsonl"
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "stf_jax.evaluate", *gqa.arguments(killed)],
            env=os.environ | locale,
            stdout=log,
            stderr=log,
        )
        try:
            while process.poll() is None and not (answers.exists() and answers.read_bytes().count(b"\n") > 8):
                time.sleep(0.002)
        finally:
            process.kill()
    assert process.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
    partial, complete = answers.read_bytes(), (gqa.complete / "answers.jsonl").read_bytes()
    assert 8 < partial.count(b"\n") < QUESTIONS
    assert complete.startswith(partial)
    assert not (killed / "results.json").exists()
    cut = tmp_path / "cut"
    shutil.copytree(killed, cut)
    last = partial[partial[:-1].rindex(b"\n") + 1 :]
    (cut / "answers.jsonl").write_bytes(partial[: -len(last) // 2])
    for out in (killed, cut):
        assert gqa.evaluate(out) == 0
        assert contents(out) == contents(gqa.complete)


def test_a_last_partial_batch_is_asked_as_in_a_complete_run(gqa, tmp_path):
    """It is half a batch: asked by itself in bfloat16, some of its answers would differ."""
    lines = (gqa.complete / "answers.jsonl").read_bytes().splitlines(True)
    for count in (40, 43):
        out = tmp_path / str(count)
        shutil.copytree(gqa.complete, out)
        (out / "answers.jsonl").write_bytes(b"".join(lines[:count]))
        assert gqa.evaluate(out) == 0
        assert contents(out) == contents(gqa.complete)


def test_bad_images_are_named_and_earlier_answers_are_kept(gqa, tmp_path, capsys, monkeypatch):
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(gqa.folder / "data", data)
    images, question_file = data / "gqa" / "images", data / "gqa" / QUESTION_FILE
    lines, rows = (gqa.complete / "answers.jsonl").read_bytes().splitlines(True), question_file.read_bytes()

    def fail(kept):
        assert gqa.evaluate(out, data=data) == 2
        assert (out / "answers.jsonl").read_bytes() == b"".join(lines[:kept])
        assert not (out / "results.json").exists()
        return read_error(capsys)

    (images / "n12.png").write_bytes((images / "n12.png").read_bytes()[:900])
    (images / "n20.png").rename(tmp_path / "n20.png")
    question_file.write_bytes(rows.replace(b'"n31.png"', b'"../n31.png"'))
    assert gqa.evaluate(out, data=data) == 2
    assert read_error(capsys).startswith(
        f"gqa: 3 of 44 images cannot be used. The first: Image {images}/n12.png cannot be "
    )
    assert not out.exists()  # no question was asked
    monkeypatch.setattr(Benchmark, "check_images", lambda self: None)  # as if they broke after the check
    assert "n12.png" in fail(8)
    shutil.copy(gqa.folder / "data" / "gqa" / "images" / "n12.png", images)
    assert fail(16) == f"Image {images}/n20.png cannot be opened: No such file or directory."
    (tmp_path / "n20.png").rename(images / "n20.png")
    shutil.copy(images / "n31.png", data / "gqa")
    assert fail(24) == f"Image path '../n31.png' leaves the folder {images}."
    question_file.write_bytes(rows)
    assert gqa.evaluate(out, data=data) == 0
    assert (out / "answers.jsonl").read_bytes() == b"".join(lines)


@pytest.mark.parametrize("other", ["--precision=float32", "--temperature=0.5", "--batch=4", "--limit=40", "model"])
def test_a_folder_with_another_runs_answers_is_refused(other, gqa, capsys):
    before = contents(gqa.complete)
    if other == "model":
        copy = gqa.folder / "copy"
        copy.symlink_to(gqa.folder / "model")
        other = f"--checkpoint={copy}"
    assert gqa.evaluate(gqa.complete, other) == 2
    assert read_error(capsys) == (
        f"{gqa.complete} contains answers to other questions, or from another model or protocol (see protocol.json "
        "there); choose another --out, or delete them."
    )
    assert contents(gqa.complete) == before


def test_several_benchmarks_write_one_folder_each_and_a_list(gqa, tmp_path, capsys):
    out = tmp_path / "out"
    assert gqa.evaluate(out, "--benchmark=gqa,scenes", "--limit=8") == 0
    results = json.loads((out / "results.json").read_text())
    assert [(result["benchmark"], result["questions"]) for result in results] == [("gqa", 8), ("scenes", 8)]
    for result in results:
        assert json.loads((out / result["benchmark"] / "results.json").read_text()) == result
    # The first batch is that of the complete run.
    first = (gqa.complete / "answers.jsonl").read_bytes().splitlines()[:8]
    assert (out / "gqa" / "answers.jsonl").read_bytes().splitlines() == first
    output = capsys.readouterr().out
    assert "gqa, 8 questions: model" in output
    assert "scenes, 8 questions: model" in output
    assert "also written: contact_sheet.png" in output
    assert output.endswith(f"results.json and all other files are in {out}\n")


def test_blank_images_are_asked_about_and_recorded(gqa, tmp_path, capsys):
    out = tmp_path / "out"
    assert gqa.evaluate(out, "--blank", "--limit=8") == 0
    results = json.loads((out / "results.json").read_text())
    assert results["protocol"]["asking"]["images"] == "blank"
    assert "gqa, 8 questions, blank images: model" in capsys.readouterr().out
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_bytes().splitlines()]
    seen = [json.loads(line) for line in (gqa.complete / "answers.jsonl").read_bytes().splitlines()[:8]]
    assert [line["metadata"] for line in lines] == [line["metadata"] | {"shown": "blank"} for line in seen]
    assert [line["prompt"] for line in lines] == [line["prompt"] for line in seen]
    assert [line["text"] for line in lines] != [line["text"] for line in seen]
    # Questions with the same text get the same answer now: nothing of their images is left.
    answers = {}
    for line in lines:
        assert answers.setdefault(line["prompt"], line["text"]) == line["text"]
    assert len(answers) < 8
    assert gqa.evaluate(out, "--limit=8") == 2  # the same folder without --blank
    assert "from another model or protocol" in read_error(capsys)


# ---- Scoring ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def score(gqa, tmp_path, monkeypatch, capsys):
    """Scores lines as GQA's answers without a model; returns the results, or the error message."""

    def no_model(*args):
        raise AssertionError

    monkeypatch.setattr(loading, "load_generator", no_model)

    def run(lines, *more, benchmark="gqa", data=gqa.folder / "data"):
        file, out = tmp_path / "other.jsonl", tmp_path / "scored"
        shutil.rmtree(out, ignore_errors=True)
        file.write_bytes(b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
        arguments = [f"--answers={file}", f"--benchmark={benchmark}", f"--data={data}", f"--out={out}", *more]
        status = run_command(evaluate.main, arguments)
        if status:
            assert status == 2
            assert not out.exists()
            return read_error(capsys).replace(str(file), "FILE")
        assert not (out / "answers.jsonl").exists()
        return json.loads((out / "results.json").read_text())

    return run


def rows(pairs):
    return [json.dumps({"question_id": key, "text": text}).encode() + b"\n" for key, text in pairs]


def test_answers_in_any_order_get_the_score_of_their_run(gqa, score, tmp_path):
    expected = json.loads((gqa.complete / "results.json").read_text())
    lines = (gqa.complete / "answers.jsonl").read_bytes().splitlines(True)
    for order in (lines, lines[::-1], lines[20:] + lines[:20]):
        results = score(order)
        protocol, original = results.pop("protocol"), expected["protocol"]
        assert results == {key: value for key, value in expected.items() if key != "protocol"}
        assert protocol == {key: original[key] for key in ("benchmark", "questions", "rule", "labels")} | {
            "answers": protocol["answers"]
        }
        assert (tmp_path / "scored" / PREDICTIONS).read_bytes() == (gqa.complete / PREDICTIONS).read_bytes()


def test_the_score_by_hand(gqa, score):
    """Eleven of 44 answers are correct, six of them to open questions (the even ones)."""
    pairs = [(f"20{n:04}", f" {gold.upper()}. " if n < 11 else f"no {gold}") for n, gold in enumerate(gqa.gold)]
    metrics = score(rows(pairs))["metrics"]
    assert (metrics["accuracy"], metrics["open"], metrics["binary"]) == (11 / 44, 6 / 22, 5 / 22)
    # --limit scores only the first questions, and ignores the other answers.
    assert score(rows(pairs), "--limit=4")["metrics"]["accuracy"] == 1.0
    assert score(rows(pairs), "--limit=22")["metrics"]["accuracy"] == 0.5


def test_answers_that_do_not_match_are_refused(score):
    matching = rows((f"20{n:04}", "red") for n in range(QUESTIONS))
    assert score([]) == "FILE leaves 44 of 44 questions unanswered, such as '200000'."
    assert score(matching[1:]) == "FILE leaves 1 of 44 questions unanswered, such as '200000'."
    assert score([*matching, *rows([(200003, "blue")])]) == "FILE has two different answers for question 200003."
    assert score([*matching, *rows([("7", "red")])]) == (
        "FILE does not match the benchmark: 1 of its 45 answers are to other questions, such as '7'."
    )
    assert score([*matching[:2], b'{"question_id"\n']).startswith("FILE, line 3 is not JSON: ")
    assert score([*matching[:2], b'{"question_id": "1"}\n']) == "FILE, line 3: an answer needs question_id and text."


def test_answers_about_parquet_files(score, tmp_path):
    write_rows(tmp_path, "chartqa", make_rows("chartqa"))
    lines = rows((n, text) for n, (_, text, _) in enumerate(CASES["chartqa"]["cases"]))
    results = score(lines, benchmark="chartqa", data=tmp_path)
    assert results["metrics"]["accuracy"] == CASES["chartqa"]["scores"]["relaxed_overall"]
    (file,) = (tmp_path / "chartqa" / "data").iterdir()
    assert [label["file"] for label in results["protocol"]["labels"]] == [str(file)]
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    error = score(lines, benchmark="chartqa", data=tmp_path)
    assert error.startswith(f"{file} cannot be read as Parquet: ")
    assert error.endswith("; download it again.")
    assert score(lines, "--blank", data=tmp_path, benchmark="shapes") == (
        "--blank asks a model; it cannot change the answers in a file."
    )


def test_questions_with_the_same_id_are_matched_by_prompt(score, tmp_path):
    """In MME, the two questions of an image have its name as their id."""
    folder = tmp_path / "MME"
    labels = folder / "MME_Benchmark_release_version" / "existence"
    labels.mkdir(parents=True)
    questions, answers = [], []
    for image in ("existence/1.jpg", "existence/2.jpg"):
        for thing, gold in (("dog", "Yes"), ("cat", "No")):
            question = f"Is there a {thing}?"
            questions.append(
                {"question_id": image, "image": image, "text": question + SHORT_ANSWER_SUFFIX, "category": "existence"}
            )
            with (labels / f"{image[10]}.txt").open("a") as file:
                file.write(f"{question} Please answer yes or no.\t{gold}\n")
            answers.append({"question_id": image, "prompt": question + SHORT_ANSWER_SUFFIX, "text": gold})
    (folder / "llava_mme.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    answers[3]["text"] = "Yes"  # wrong: no cat in the second image

    def score_mme(lines):
        return score([json.dumps(line).encode() + b"\n" for line in lines], benchmark="mme", data=tmp_path)

    for order in (answers, answers[::-1], [answers[i] for i in (2, 1, 3, 0)]):
        # Three of four questions, one of two images: 75 + 50.
        assert score_mme(order)["metrics"]["perception"] == 125.0
    for row in answers:
        row["prompt"] = "Is there?"
    assert score_mme(answers) == (
        "FILE does not match the benchmark: 4 of its 4 answers are to other questions, such as 'existence/1.jpg'."
    )


# ---- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--benchmark=gqa", "--out=o"], "One of the arguments --checkpoint --answers is required; see --help."),
        (["--checkpoint=c", "--answers=a", "--benchmark=gqa", "--out=o"], "not allowed with argument"),
        (["--checkpoint=c", "--benchmark=gqa"], "The following arguments are required: --out; see --help."),
        (["--checkpoint=c", "--out=o"], "The following arguments are required: --benchmark; see --help."),
        (["--checkpoint=c", "--benchmark=gqa", "--out=o"], "gqa needs the folder of the evaluation files: --data"),
        (["--checkpoint=c", "--benchmark=scene", "--out=o"], "Unknown benchmark 'scene'; did you mean 'scenes'?"),
        (["--checkpoint=c", "--benchmark=scenes,pop", "--out=o"], "Unknown benchmark 'pop'; did you mean 'pope'?"),
        (["--checkpoint=c", "--benchmark=scenes", "--out=o"], "c does not exist"),
        (["--checkpoint=c", "--benchmark=scenes", "--out=o", "--limit=-1"], "--limit must be at least 0"),
        (["--checkpoint=c", "--benchmark=scenes", "--out=o", "--batch=0"], "--batch at least 1"),
        (
            ["--checkpoint=c", "--benchmark=scenes", "--out=o", "--mesh=2"],
            "Argument --mesh: '2' should be three comma-separated integers",
        ),
        (["--answers=a", "--benchmark=scenes", "--out=o"], "a does not exist; give a folder or file."),
        (
            ["--answers=a", "--benchmark=scenes,gqa", "--data=DATA", "--out=o"],
            "--answers can only be scored for one benchmark",
        ),
        (["--answers=a", "--benchmark=paper", "--data=DATA", "--out=o"], "mmbench: there is no mmbench_dev_2023"),
        (
            ["--answers=a", "--benchmark=ocr", "--data=DATA", "--out=o"],
            "chartqa: there is no data/test-*.parquet or test/test_human.json",
        ),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments, sentence, gqa, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert (
        run_command(evaluate.main, [argument.replace("DATA", str(gqa.folder / "data")) for argument in arguments]) == 2
    )
    assert sentence in read_error(capsys)
    assert not (tmp_path / "o").exists()
