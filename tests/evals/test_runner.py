"""Evaluation runs with a fake generator: answers kept, overwritten or refused; scoring; formatting and logging."""

import json
import re

import jax
import pytest
from etils import epath
from full_disk import limit_file_size
from make_evals import FixedBenchmark

from stf_jax.config import UserError
from stf_jax.data.records import BadRow
from stf_jax.evals import runner
from stf_jax.evals.benchmark import Question
from stf_jax.evals.runner import evaluate, evaluate_all, flatten_metrics, format_results, score
from stf_jax.inference.choosing import ChoosingGenerator
from stf_jax.inference.decoding import Sampling

FILES = ("answers.jsonl", "protocol.json", "results.json")
SETTINGS = dict(model="m", origin={"step": 3}, rows=4)


def make_benchmark(count=11, labels=(), name="given"):
    """A benchmark; all questions but the first have an image. ``FakeGenerator`` answers two of them correctly."""
    benchmark = FixedBenchmark(
        [Question(n, f"Näher: {n}?", None if n == 0 else (lambda n=n: n), f"{n}?", {"n": n}) for n in range(count)],
        labels,
    )
    benchmark.name = name
    return benchmark


class FakeGenerator:
    """A fake generator. As with a real one, its answers depend on the batch and on the compiled batch size.

    Attributes:
      asked: indices of the questions that it was asked.
      loaded: the parameters of each ``load_params`` call.
    """

    def __init__(self, word="says", bad_id=None):
        self.asked, self.loaded, self._word, self._bad_id = [], [], word, bad_id

    def load_params(self, params):
        self.loaded.append(dict(params))
        return self

    def protocol(self, record):
        assert [image() for image in record.images] == []  # the first question has none
        return {"llm": self._word, "first_prompt": record.turns[0].text}

    def generate(self, records, limit, rows, sampling):
        assert limit == 128
        for start in range(0, len(records), rows):
            batch = records[start : start + rows]
            if self._bad_id in [record.id for record in batch]:
                raise BadRow("missing", f"Image {self._bad_id} cannot be opened.")
            for record in batch:
                index = int(record.id)
                self.asked.append(index)
                prefix = "" if index == 0 else "<image>\n"
                assert [turn.text for turn in record.turns] == [f"{prefix}Näher: {index}?"]
                assert [image() for image in record.images] == [index] * (index > 0)
                ids = " ".join(other.id for other in batch)
                text = f"{self._word} 紺\u2028 {record.id} among {ids} of {min(rows, len(records))}"
                yield "yes" if index in (2, 9) else text


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def complete(tmp_path):
    """The folder of an uninterrupted run."""
    out = epath.Path(tmp_path) / "complete"
    results = evaluate(make_benchmark(), FakeGenerator(), out, **SETTINGS)
    assert results["metrics"] == {"accuracy": 2 / 11}
    assert json.loads((out / "results.json").read_text()) == results
    assert set(contents(out)) == set(FILES)
    return out


# ---- Resuming --------------------------------------------------------------------------------------------------------


def test_results_record_the_protocol(complete):
    results = json.loads((complete / "results.json").read_text())
    assert list(results) == ["benchmark", "metrics", "questions", "model", "submission", "protocol"]
    assert (results["benchmark"], results["questions"], results["model"]) == ("given", 11, "m")
    assert results["protocol"] == json.loads((complete / "protocol.json").read_text())
    assert results["protocol"] == {
        "benchmark": "given",
        "questions": 11,
        "rule": "Yes is correct.",
        "labels": [],
        "asking": {
            "llm": "says",
            "first_prompt": "Näher: 0?",
            "decoding": {"max_new_tokens": 128, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0},
            "rows": 4,
            "model": {"step": 3},
        },
    }


def test_a_run_interrupted_anywhere_ends_with_the_same_files(complete, tmp_path):
    answers, out = (complete / "answers.jsonl").read_bytes(), epath.Path(tmp_path) / "cut"
    out.mkdir()
    ends = [match.end() for match in re.finditer(b"\n", answers)]
    assert len(ends) == 11
    # In the middle of lines and characters; at the end of every line, and a byte before and after it.
    cuts = {*range(0, len(answers), 53), *ends, *(end - 1 for end in ends), *(end + 1 for end in ends[:-1])}
    for cut in sorted(cuts):
        (out / "protocol.json").write_bytes((complete / "protocol.json").read_bytes())
        (out / "answers.jsonl").write_bytes(answers[:cut])
        generator = FakeGenerator()
        evaluate(make_benchmark(), generator, out, **SETTINGS)
        assert contents(out) == contents(complete), cut
        lines = sum(end <= cut for end in ends)
        # Full batches of four are kept, except the one needed to fill up the last batch.
        first = 11 if lines == 11 else 4 * (lines >= 4)
        assert generator.asked == list(range(first, 11)), cut


class FakeChooser(FakeGenerator, ChoosingGenerator):
    """It answers windows of two batches, each in batches of one number of tokens."""

    def choose(self, records, rows):
        return [(9, 1)[int(record.id) % 3 == 0] for record in records]

    def generate(self, records, limit, rows, sampling, chosen):
        assert chosen == self.choose(records, rows)
        for start in range(0, len(records), 2 * rows):
            window = records[start : start + 2 * rows]
            sorted_by_tokens = sorted(window, key=lambda record: chosen[records.index(record)])
            texts = zip(sorted_by_tokens, super().generate(sorted_by_tokens, limit, 2 * rows, sampling), strict=True)
            by_id = {record.id: text for record, text in texts}
            yield from (by_id[record.id] for record in window)


def test_where_tokens_are_chosen_windows_are_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "WINDOW", 2)
    folders = [epath.Path(tmp_path) / name for name in ("complete", "cut")]
    for out in folders:
        results = evaluate(make_benchmark(13), FakeChooser(), out, **SETTINGS | {"rows": 3})
    # The first question has no image.
    assert results["image_tokens"] == {"mean": round((8 * 9 + 4) / 12, 2), "shares": {"9": 8 / 12, "1": 4 / 12}}
    complete, cut = folders
    lines = (complete / "answers.jsonl").read_bytes().splitlines(True)
    (cut / "answers.jsonl").write_bytes(b"".join(lines[:11]))
    generator = FakeChooser()
    evaluate(make_benchmark(13), generator, cut, **SETTINGS | {"rows": 3})
    assert contents(cut) == contents(complete)
    assert sorted(generator.asked) == list(range(6, 13))  # not from 9 on, in the middle of a window


def test_fewer_questions_than_a_batch_are_all_asked_again(tmp_path):
    complete, cut = epath.Path(tmp_path) / "complete", epath.Path(tmp_path) / "cut"
    settings = SETTINGS | {"rows": 16}
    for out in (complete, cut):
        evaluate(make_benchmark(), FakeGenerator(), out, **settings)
    (cut / "answers.jsonl").write_bytes(b"".join((complete / "answers.jsonl").read_bytes().splitlines(True)[:7]))
    generator = FakeGenerator()
    evaluate(make_benchmark(), generator, cut, **settings)
    assert contents(cut) == contents(complete)
    assert generator.asked == list(range(11))


def test_a_finished_run_is_scored_again_without_asking(complete):
    before = contents(complete)
    (complete / "results.json").unlink()
    generator = FakeGenerator()
    evaluate(make_benchmark(), generator, complete, **SETTINGS)
    assert generator.asked == []
    assert contents(complete) == before


def test_a_bad_image_keeps_the_answers_before_it(complete, tmp_path, monkeypatch):
    out, closed = epath.Path(tmp_path) / "out", []

    class Recording(runner.AppendOnlyFile):
        """Records that the file is closed: in a bucket, only closing writes it."""

        def close(self):
            closed.append(True)
            super().close()

    monkeypatch.setattr(runner, "AppendOnlyFile", Recording)
    with pytest.raises(UserError, match=r"^Image 9 cannot be opened\.$"):
        evaluate(make_benchmark(), FakeGenerator(bad_id="9"), out, **SETTINGS)
    lines = (complete / "answers.jsonl").read_bytes().splitlines(True)
    assert (out / "answers.jsonl").read_bytes() == b"".join(lines[:8])
    assert closed == [True]
    assert set(contents(out)) == {"answers.jsonl", "protocol.json"}
    evaluate(make_benchmark(), FakeGenerator(), out, **SETTINGS)
    assert contents(out) == contents(complete)


# ---- Other runs' answers ---------------------------------------------------------------------------------------------

OTHERS = {
    "model": dict(settings={"model": "n"}),
    "step": dict(settings={"origin": {"step": 4}}),
    "rows": dict(settings={"rows": 5}),
    "decoding": dict(settings={"sampling": Sampling(0.5)}),
    "seed": dict(settings={"sampling": Sampling(seed=1)}),
    "structure": dict(generator=lambda: FakeGenerator("sings")),
    "questions": dict(benchmark=lambda: make_benchmark(10)),
    "rule": dict(benchmark=lambda: changed(rule="No is correct.")),
    "name": dict(benchmark=lambda: make_benchmark(name="other")),
}


def changed(**attributes):
    benchmark = make_benchmark()
    for key, value in attributes.items():
        setattr(benchmark, key, value)
    return benchmark


def run_other(case, out, **options):
    other = OTHERS[case]
    generator = other.get("generator", FakeGenerator)()
    evaluate(other.get("benchmark", make_benchmark)(), generator, out, **SETTINGS | other.get("settings", {}) | options)
    return generator


@pytest.mark.parametrize("case", OTHERS)
def test_answers_of_another_run_are_refused_or_overwritten(case, complete, tmp_path):
    before = contents(complete)
    with pytest.raises(UserError) as error:
        run_other(case, complete)
    assert str(error.value) == (
        f"{complete} contains answers to other questions, or from another model or protocol (see protocol.json there); "
        "choose another --out, or delete them."
    )
    assert contents(complete) == before
    fresh = epath.Path(tmp_path) / "fresh"
    asked = run_other(case, fresh).asked
    assert asked[0] == 0
    assert run_other(case, complete, overwrite=True).asked == asked
    assert contents(complete) == contents(fresh)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"prompt": "1?"', '"prompt": "what?"'),
        ('"question_id": 1,', '"question_id": "1",'),
        ('"model_id": "m"', '"model_id": "n"'),
        ('"text"', '"texts"'),
        ("{", "["),
    ],
)
def test_foreign_lines_are_refused_or_overwritten(old, new, complete, tmp_path):
    before = contents(complete)
    answers = (complete / "answers.jsonl").read_text(encoding="utf-8")
    assert old in answers
    (complete / "answers.jsonl").write_text(answers.replace(old, new), encoding="utf-8")
    with pytest.raises(UserError, match="contains answers to other questions"):
        evaluate(make_benchmark(), FakeGenerator(), complete, **SETTINGS)
    evaluate(make_benchmark(), FakeGenerator(), complete, **SETTINGS, overwrite=True)
    assert contents(complete) == before


def test_answers_without_a_protocol_are_refused_or_overwritten(complete):
    before = contents(complete)
    (complete / "protocol.json").unlink()
    with pytest.raises(UserError, match="contains answers to other questions"):
        evaluate(make_benchmark(), FakeGenerator(), complete, **SETTINGS)
    evaluate(make_benchmark(), FakeGenerator(), complete, **SETTINGS, overwrite=True)
    assert contents(complete) == before


def test_overwritten_answers_are_deleted_before_the_new_protocol_is_written(complete, monkeypatch):
    """A run that is killed right after writing the protocol must not resume from the old answers."""

    def kill(path, lines):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "AppendOnlyFile", kill)
    other = SETTINGS | {"origin": {"step": 4}}
    with pytest.raises(KeyboardInterrupt):
        evaluate(make_benchmark(), FakeGenerator(), complete, **other, overwrite=True)
    monkeypatch.undo()
    generator = FakeGenerator()
    evaluate(make_benchmark(), generator, complete, **other)
    assert generator.asked == list(range(11))


def test_labels_are_part_of_the_protocol(tmp_path):
    labels, out = epath.Path(tmp_path) / "labels", epath.Path(tmp_path) / "out"
    labels.write_text("a")
    evaluate(make_benchmark(labels=[labels]), FakeGenerator(), out, **SETTINGS)
    stated = json.loads((out / "protocol.json").read_text())["labels"]
    # As computed by sha256sum.
    assert stated == [
        {"file": str(labels), "sha256": "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"}
    ]
    # New or corrected labels score the existing answers.
    labels.write_text("b")
    before, generator = (out / "answers.jsonl").read_bytes(), FakeGenerator()
    results = evaluate(make_benchmark(labels=[labels]), generator, out, **SETTINGS)
    assert results["protocol"]["labels"] != stated
    assert json.loads((out / "protocol.json").read_text()) == results["protocol"]
    assert (out / "answers.jsonl").read_bytes() == before


def test_many_label_files_become_one_hash(tmp_path):
    files = [epath.Path(tmp_path) / f"{n}.txt" for n in range(21)]
    for file in files:
        file.write_text("a")

    def stated():
        results = evaluate(
            make_benchmark(labels=files), FakeGenerator(), epath.Path(tmp_path) / "out", **SETTINGS, overwrite=True
        )
        return results["protocol"]["labels"]

    (first,) = stated()
    assert (first["files"], first["first"]) == (21, str(files[0]))
    files[20].write_text("b")
    (other,) = stated()
    assert other["sha256"] != first["sha256"]
    assert len(other["sha256"]) == 64
    files.pop()
    assert [entry["file"] for entry in stated()] == [str(file) for file in files]


def test_a_full_disk_keeps_the_answers_so_far(complete, tmp_path):
    out = epath.Path(tmp_path) / "full"
    full = len((complete / "answers.jsonl").read_bytes()) - 20
    assert len((complete / "protocol.json").read_bytes()) < full
    with limit_file_size(full), pytest.raises(UserError, match=r"answers\.jsonl cannot be written: File too large"):
        evaluate(make_benchmark(), FakeGenerator(), out, **SETTINGS)
    assert (out / "answers.jsonl").read_bytes() == (complete / "answers.jsonl").read_bytes()[:full]
    evaluate(make_benchmark(), FakeGenerator(), out, **SETTINGS)
    assert (out / "answers.jsonl").read_bytes() == (complete / "answers.jsonl").read_bytes()


@pytest.mark.parametrize("function", ["evaluate", "score"])
def test_a_folder_that_cannot_be_created_is_refused(function, complete, tmp_path):
    (tmp_path / "file").write_text("")
    out = epath.Path(tmp_path) / "file" / "out"
    calls = {
        "evaluate": lambda: evaluate(make_benchmark(), FakeGenerator(), out, **SETTINGS),
        "score": lambda: score(make_benchmark(), complete / "answers.jsonl", out),
    }
    with pytest.raises(UserError, match=rf"^The folder {re.escape(str(out))} cannot be created: Not a directory\.$"):
        calls[function]()


# ---- Scoring without a model -----------------------------------------------------------------------------------------


def test_an_answer_file_gets_the_score_of_its_run(complete, tmp_path):
    expected = json.loads((complete / "results.json").read_text())
    file, out = epath.Path(tmp_path) / "other.jsonl", epath.Path(tmp_path) / "scored"
    lines = (complete / "answers.jsonl").read_bytes().splitlines(True)
    file.write_bytes(b"".join(lines[5:] + lines[:5]))
    results = score(make_benchmark(), file, out)
    assert results["protocol"].pop("answers")["file"] == str(file)
    assert results["protocol"].keys() == {"benchmark", "questions", "rule", "labels"}
    for key in ("benchmark", "metrics", "questions", "model", "submission"):
        assert results[key] == expected[key], key
    assert set(contents(out)) == {"results.json"}
    # Several models, or no model name.
    file.write_bytes(b"".join(lines).replace(b'"model_id": "m"', b'"model_id": "a"', 1))
    assert score(make_benchmark(), file, out)["model"] == "a, m"
    file.write_bytes(b"".join(lines).replace(b'"model_id": "m", ', b""))
    assert score(make_benchmark(), file, out)["model"] == "other.jsonl"


def test_a_benchmark_without_labels_writes_only_a_submission(tmp_path):
    class Unlabeled(FixedBenchmark):
        scored = False

        def metrics(self, texts):
            raise AssertionError

        def write_submission(self, texts, out):
            (out / "sent.txt").write_text("\n".join(texts))
            return [out / "sent.txt"]

    out = epath.Path(tmp_path) / "out"
    results = evaluate(Unlabeled(make_benchmark(2).questions), FakeGenerator(), out, **SETTINGS)
    assert (results["metrics"], results["submission"]) == ({}, ["sent.txt"])
    assert (out / "sent.txt").read_text().startswith("says 紺")
    lines = ["given, 2 questions: m", "There are no labels here, so there are no metrics.", "also written: sent.txt"]
    assert format_results(results).splitlines() == lines
    assert flatten_metrics(results) == {}


# ---- During training -------------------------------------------------------------------------------------------------


def test_several_benchmarks_write_one_folder_each_and_a_list(tmp_path):
    out, generator = epath.Path(tmp_path) / "out", FakeGenerator()
    params = {"llm/head/kernel": jax.numpy.zeros(())}
    # Answers of an earlier run are overwritten.
    evaluate(make_benchmark(), FakeGenerator(), out / "two", model="other", origin={}, rows=3)
    results = evaluate_all(
        [make_benchmark(name="one"), make_benchmark(3, name="two")],
        generator,
        params.items(),
        out,
        "m",
        {"step": 3},
        rows=4,
    )
    assert [result["benchmark"] for result in results] == ["one", "two"]
    assert [result["metrics"]["accuracy"] for result in results] == [2 / 11, 1 / 3]
    assert json.loads((out / "results.json").read_text()) == results
    assert {file.name for file in out.iterdir()} == {"one", "two", "results.json"}
    for result in results:
        assert json.loads((out / result["benchmark"] / "results.json").read_text()) == result
    assert generator.loaded == [params, {}]  # the memory is freed for training


def test_one_benchmark_writes_to_the_folder_itself(complete, tmp_path):
    out = epath.Path(tmp_path) / "out"
    (result,) = evaluate_all([make_benchmark()], FakeGenerator(), (), out, "m", {"step": 3}, rows=4)
    assert json.loads((out / "results.json").read_text()) == result
    assert contents(out) == contents(complete)


def test_no_benchmark_loads_and_writes_nothing(tmp_path):
    generator = FakeGenerator()
    assert evaluate_all([], generator, (), epath.Path(tmp_path) / "out", "m", {}, rows=4) == []
    assert generator.loaded == []
    assert not (tmp_path / "out").exists()


# ---- Formatting and logging ------------------------------------------------------------------------------------------


def make_results(metrics, questions=1000, name="bench", submission=()):
    return {"benchmark": name, "metrics": metrics, "questions": questions, "model": "m", "submission": submission}


POPE = make_results(
    {
        "f1": 0.859,
        "accuracy": 0.87449,
        "random": {"f1": 0.9, "accuracy": 0.91, "questions": 2910},
        "popular": {"f1": 0.8, "accuracy": 1.0, "questions": 3000},
    },
    8910,
    "pope",
)
MME = make_results(
    {
        "perception": 1510.72,
        "cognition": 300.0,
        "by_task": {
            "existence": {"score": 195.0, "accuracy": 0.975, "accuracy_plus": 0.9666, "questions": 60},
            "OCR": {"score": 132.5, "accuracy": 0.75, "accuracy_plus": 0.575, "questions": 40},
        },
    },
    2374,
    "mme",
)
VQA = make_results(
    {"accuracy": 0.785, "by_answer_type": {"number": 0.5, "yes/no": 0.91, "other": 0.704}}, 7, "vqav2", ["a.json"]
)
SCENES = make_results(
    {
        "accuracy": 0.5,
        "blank_image_accuracy": 0.25,
        "by_kind": {"count": {"accuracy": 0.5, "blank_image_accuracy": 0.25, "questions": 4}},
    },
    4,
    "scenes",
)


def test_format_results_has_percents_and_points_in_every_row():
    def rows(results):
        return [" ".join(line.split()) for line in format_results(results).splitlines() if line]

    assert rows(POPE) == [
        "pope, 8910 questions: m",
        "f1 accuracy questions",
        "all 85.9% 87.4% 8910",
        "random 90.0% 91.0% 2910",
        "popular 80.0% 100.0% 3000",
    ]
    assert rows(MME) == [
        "mme, 2374 questions: m",
        "perception cognition questions",
        "all 1510.7 300.0 2374",
        "score accuracy accuracy plus questions",
        "existence 195.0 97.5% 96.7% 60",
        "OCR 132.5 75.0% 57.5% 40",
    ]
    assert rows(VQA) == [
        "vqav2, 7 questions: m",
        "accuracy questions",
        "all 78.5% 7",
        "accuracy",
        "number 50.0%",
        "yes/no 91.0%",
        "other 70.4%",
        "also written: a.json",
    ]
    assert rows(SCENES) == [
        "scenes, 4 questions: m",
        "accuracy blank image accuracy questions",
        "all 50.0% 25.0% 4",
        "count 50.0% 25.0% 4",
    ]


def test_flatten_metrics_has_every_share_under_the_benchmarks_name():
    assert flatten_metrics(POPE) == {
        "pope/f1": 0.859,
        "pope/accuracy": 0.87449,
        "pope/random/f1": 0.9,
        "pope/random/accuracy": 0.91,
        "pope/popular/f1": 0.8,
        "pope/popular/accuracy": 1.0,
    }
    assert flatten_metrics(VQA)["vqav2/by_answer_type/yes/no"] == 0.91
    assert flatten_metrics(SCENES) == {
        "scenes/accuracy": 0.5,
        "scenes/blank_image_accuracy": 0.25,
        "scenes/by_kind/count/accuracy": 0.5,
        "scenes/by_kind/count/blank_image_accuracy": 0.25,
    }
    assert flatten_metrics({}) == {}  # on a host that does not write
