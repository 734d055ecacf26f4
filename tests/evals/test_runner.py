"""Benchmark runs with a stand-in for the model: answers kept, given up or refused; scored; told to people and logs."""

import json
import re

import jax
import pytest
from etils import epath
from full_disk import limit_file_size
from make_evals import Given

from stf_jax.config import UserError
from stf_jax.data.records import BadRow
from stf_jax.evals import runner
from stf_jax.evals.benchmark import Question
from stf_jax.evals.runner import evaluate, evaluate_all, flatten_metrics, format_results, score
from stf_jax.inference.decoding import Sampling

FILES = ("answers.jsonl", "protocol.json", "results.json")
SETTINGS = dict(model="m", origin={"step": 3}, rows=4)


def given(count=11, labels=(), name="given"):
    """Questions, each with an image but the first; ``Parrot`` answers the third and the tenth rightly."""
    benchmark = Given(
        [Question(n, f"Näher: {n}?", None if n == 0 else (lambda n=n: n), f"{n}?", {"n": n}) for n in range(count)],
        labels,
    )
    benchmark.name = name
    return benchmark


class Parrot:
    """Stands for a generator. As with one, what it says hangs on the batch, and on the size that was compiled for it.

    Attributes:
      asked: places of the questions that it was asked.
      taken: what it was given as parameters.
    """

    def __init__(self, word="says", breaks=None):
        self.asked, self.taken, self._word, self._breaks = [], [], word, breaks

    def load_params(self, params):
        self.taken.append(dict(params))
        return self

    def protocol(self, record):
        assert [image() for image in record.images] == []  # the first question has none
        return {"llm": self._word, "first_prompt": record.turns[0].text}

    def generate(self, records, limit, rows, sampling):
        assert limit == 128
        for start in range(0, len(records), rows):
            batch = records[start : start + rows]
            if self._breaks in [record.id for record in batch]:
                raise BadRow("missing", f"Image {self._breaks} cannot be opened.")
            for record in batch:
                place = int(record.id)
                self.asked.append(place)
                begin = "" if place == 0 else "<image>\n"
                assert [turn.text for turn in record.turns] == [f"{begin}Näher: {place}?"]
                assert [image() for image in record.images] == [place] * (place > 0)
                company = " ".join(other.id for other in batch)
                lone = f"{self._word} 紺\u2028 {record.id} among {company} of {min(rows, len(records))}"
                yield "yes" if place in (2, 9) else lone


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def whole(tmp_path):
    """The folder of a run that nothing disturbed."""
    out = epath.Path(tmp_path) / "whole"
    results = evaluate(given(), Parrot(), out, **SETTINGS)
    assert results["metrics"] == {"accuracy": 2 / 11}
    assert json.loads((out / "results.json").read_text()) == results
    assert set(contents(out)) == set(FILES)
    return out


# ---- Answers are kept ------------------------------------------------------------------------------------------------


def test_results_name_all_that_they_hang_on(whole):
    results = json.loads((whole / "results.json").read_text())
    assert list(results) == ["benchmark", "metrics", "questions", "model", "submission", "protocol"]
    assert (results["benchmark"], results["questions"], results["model"]) == ("given", 11, "m")
    assert results["protocol"] == json.loads((whole / "protocol.json").read_text())
    assert results["protocol"] == {
        "benchmark": "given",
        "questions": 11,
        "rule": "Right is yes.",
        "labels": [],
        "asking": {
            "llm": "says",
            "first_prompt": "Näher: 0?",
            "decoding": {"max_new_tokens": 128, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0},
            "rows": 4,
            "model": {"step": 3},
        },
    }


def test_a_run_cut_anywhere_ends_as_if_it_had_not_been(whole, tmp_path):
    answers, out = (whole / "answers.jsonl").read_bytes(), epath.Path(tmp_path) / "cut"
    out.mkdir()
    ends = [match.end() for match in re.finditer(b"\n", answers)]
    assert len(ends) == 11
    # In the middle of lines, of characters, and at every end of one, a byte before it and after.
    cuts = {*range(0, len(answers), 53), *ends, *(end - 1 for end in ends), *(end + 1 for end in ends[:-1])}
    for cut in sorted(cuts):
        (out / "protocol.json").write_bytes((whole / "protocol.json").read_bytes())
        (out / "answers.jsonl").write_bytes(answers[:cut])
        parrot = Parrot()
        evaluate(given(), parrot, out, **SETTINGS)
        assert contents(out) == contents(whole), cut
        lines = sum(end <= cut for end in ends)
        # Whole batches of four are kept, but for the one that makes up the last one's size.
        first = 11 if lines == 11 else 4 * (lines >= 4)
        assert parrot.asked == list(range(first, 11)), cut


def test_fewer_questions_than_a_batch_are_one(tmp_path):
    whole, cut = epath.Path(tmp_path) / "whole", epath.Path(tmp_path) / "cut"
    settings = SETTINGS | {"rows": 16}
    for out in (whole, cut):
        evaluate(given(), Parrot(), out, **settings)
    (cut / "answers.jsonl").write_bytes(b"".join((whole / "answers.jsonl").read_bytes().splitlines(True)[:7]))
    parrot = Parrot()
    evaluate(given(), parrot, cut, **settings)
    assert contents(cut) == contents(whole)
    assert parrot.asked == list(range(11))


def test_a_finished_run_is_scored_again_without_asking(whole):
    before = contents(whole)
    (whole / "results.json").unlink()
    parrot = Parrot()
    evaluate(given(), parrot, whole, **SETTINGS)
    assert parrot.asked == []
    assert contents(whole) == before


def test_a_image_that_fails_leaves_the_answers_before_it(whole, tmp_path, monkeypatch):
    out, closed = epath.Path(tmp_path) / "out", []

    class Recording(runner.AppendOnlyFile):
        """A bucket's file is written when it is closed."""

        def close(self):
            closed.append(True)
            super().close()

    monkeypatch.setattr(runner, "AppendOnlyFile", Recording)
    with pytest.raises(UserError, match=r"^Image 9 cannot be opened\.$"):
        evaluate(given(), Parrot(breaks="9"), out, **SETTINGS)
    lines = (whole / "answers.jsonl").read_bytes().splitlines(True)
    assert (out / "answers.jsonl").read_bytes() == b"".join(lines[:8])
    assert closed == [True]
    assert set(contents(out)) == {"answers.jsonl", "protocol.json"}
    evaluate(given(), Parrot(), out, **SETTINGS)
    assert contents(out) == contents(whole)


# ---- Answers of others -----------------------------------------------------------------------------------------------

OTHERS = {
    "model": dict(settings={"model": "n"}),
    "step": dict(settings={"origin": {"step": 4}}),
    "rows": dict(settings={"rows": 5}),
    "decoding": dict(settings={"sampling": Sampling(0.5)}),
    "seed": dict(settings={"sampling": Sampling(seed=1)}),
    "structure": dict(parrot=lambda: Parrot("sings")),
    "questions": dict(benchmark=lambda: given(10)),
    "rule": dict(benchmark=lambda: changed(rule="Right is no.")),
    "name": dict(benchmark=lambda: given(name="other")),
}


def changed(**attributes):
    benchmark = given()
    for key, value in attributes.items():
        setattr(benchmark, key, value)
    return benchmark


def other_run(case, out, **how):
    what = OTHERS[case]
    parrot = what.get("parrot", Parrot)()
    evaluate(what.get("benchmark", given)(), parrot, out, **SETTINGS | what.get("settings", {}) | how)
    return parrot


@pytest.mark.parametrize("case", OTHERS)
def test_answers_of_another_run_are_refused_or_given_up(case, whole, tmp_path):
    before = contents(whole)
    with pytest.raises(UserError) as error:
        other_run(case, whole)
    assert str(error.value) == (
        f"{whole} holds answers to other questions, of another model or of another protocol (see protocol.json there); "
        "choose another --out, or remove them."
    )
    assert contents(whole) == before
    fresh = epath.Path(tmp_path) / "fresh"
    asked = other_run(case, fresh).asked
    assert asked[0] == 0
    assert other_run(case, whole, overwrite=True).asked == asked
    assert contents(whole) == contents(fresh)


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
def test_lines_that_are_no_run_s_own_are_refused_or_given_up(old, new, whole, tmp_path):
    before = contents(whole)
    answers = (whole / "answers.jsonl").read_text(encoding="utf-8")
    assert old in answers
    (whole / "answers.jsonl").write_text(answers.replace(old, new), encoding="utf-8")
    with pytest.raises(UserError, match="holds answers to other questions"):
        evaluate(given(), Parrot(), whole, **SETTINGS)
    evaluate(given(), Parrot(), whole, **SETTINGS, overwrite=True)
    assert contents(whole) == before


def test_answers_without_a_protocol_are_of_nobody(whole):
    before = contents(whole)
    (whole / "protocol.json").unlink()
    with pytest.raises(UserError, match="holds answers to other questions"):
        evaluate(given(), Parrot(), whole, **SETTINGS)
    evaluate(given(), Parrot(), whole, **SETTINGS, overwrite=True)
    assert contents(whole) == before


def test_answers_that_gave_way_never_lie_beside_the_new_protocol(whole, monkeypatch):
    """Killed just after the protocol was written, it must not take them for its own."""

    def kill(path, lines):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "AppendOnlyFile", kill)
    other = SETTINGS | {"origin": {"step": 4}}
    with pytest.raises(KeyboardInterrupt):
        evaluate(given(), Parrot(), whole, **other, overwrite=True)
    monkeypatch.undo()
    parrot = Parrot()
    evaluate(given(), parrot, whole, **other)
    assert parrot.asked == list(range(11))


def test_labels_are_part_of_the_protocol(tmp_path):
    labels, out = epath.Path(tmp_path) / "labels", epath.Path(tmp_path) / "out"
    labels.write_text("a")
    evaluate(given(labels=[labels]), Parrot(), out, **SETTINGS)
    stated = json.loads((out / "protocol.json").read_text())["labels"]
    # As sha256sum says.
    assert stated == [
        {"file": str(labels), "sha256": "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"}
    ]
    # Labels that came later, or were put right, score the answers that are there.
    labels.write_text("b")
    before, parrot = (out / "answers.jsonl").read_bytes(), Parrot()
    results = evaluate(given(labels=[labels]), parrot, out, **SETTINGS)
    assert results["protocol"]["labels"] != stated
    assert json.loads((out / "protocol.json").read_text()) == results["protocol"]
    assert (out / "answers.jsonl").read_bytes() == before


def test_very_many_labels_are_one_hash_of_all(tmp_path):
    files = [epath.Path(tmp_path) / f"{n}.txt" for n in range(21)]
    for file in files:
        file.write_text("a")

    def stated():
        results = evaluate(given(labels=files), Parrot(), epath.Path(tmp_path) / "out", **SETTINGS, overwrite=True)
        return results["protocol"]["labels"]

    (first,) = stated()
    assert (first["files"], first["first"]) == (21, str(files[0]))
    files[20].write_text("b")
    (other,) = stated()
    assert other["sha256"] != first["sha256"]
    assert len(other["sha256"]) == 64
    files.pop()
    assert [entry["file"] for entry in stated()] == [str(file) for file in files]


def test_a_full_disk_keeps_the_answers_so_far(whole, tmp_path):
    out = epath.Path(tmp_path) / "full"
    full = len((whole / "answers.jsonl").read_bytes()) - 20
    assert len((whole / "protocol.json").read_bytes()) < full
    with limit_file_size(full), pytest.raises(UserError, match=r"answers\.jsonl cannot be written: File too large"):
        evaluate(given(), Parrot(), out, **SETTINGS)
    assert (out / "answers.jsonl").read_bytes() == (whole / "answers.jsonl").read_bytes()[:full]
    evaluate(given(), Parrot(), out, **SETTINGS)
    assert (out / "answers.jsonl").read_bytes() == (whole / "answers.jsonl").read_bytes()


@pytest.mark.parametrize("way", ["evaluate", "score"])
def test_a_folder_that_cannot_be_made_is_said(way, whole, tmp_path):
    (tmp_path / "file").write_text("")
    out = epath.Path(tmp_path) / "file" / "out"
    ways = {
        "evaluate": lambda: evaluate(given(), Parrot(), out, **SETTINGS),
        "score": lambda: score(given(), whole / "answers.jsonl", out),
    }
    with pytest.raises(UserError, match=rf"^The folder {re.escape(str(out))} cannot be made: Not a directory\.$"):
        ways[way]()


# ---- Scored without a model ------------------------------------------------------------------------------------------


def test_an_answer_file_is_scored_as_the_run_that_made_it(whole, tmp_path):
    expected = json.loads((whole / "results.json").read_text())
    file, out = epath.Path(tmp_path) / "theirs.jsonl", epath.Path(tmp_path) / "scored"
    lines = (whole / "answers.jsonl").read_bytes().splitlines(True)
    file.write_bytes(b"".join(lines[5:] + lines[:5]))
    results = score(given(), file, out)
    assert results["protocol"].pop("answers")["file"] == str(file)
    assert results["protocol"].keys() == {"benchmark", "questions", "rule", "labels"}
    for key in ("benchmark", "metrics", "questions", "model", "submission"):
        assert results[key] == expected[key], key
    assert set(contents(out)) == {"results.json"}
    # Of several models, or of none that is named.
    file.write_bytes(b"".join(lines).replace(b'"model_id": "m"', b'"model_id": "a"', 1))
    assert score(given(), file, out)["model"] == "a, m"
    file.write_bytes(b"".join(lines).replace(b'"model_id": "m", ', b""))
    assert score(given(), file, out)["model"] == "theirs.jsonl"


def test_a_benchmark_without_labels_is_not_scored_but_submitted(tmp_path):
    class Submitted(Given):
        scored = False

        def metrics(self, texts):
            raise AssertionError

        def write_submission(self, texts, out):
            (out / "sent.txt").write_text("\n".join(texts))
            return [out / "sent.txt"]

    out = epath.Path(tmp_path) / "out"
    results = evaluate(Submitted(given(2).questions), Parrot(), out, **SETTINGS)
    assert (results["metrics"], results["submission"]) == ({}, ["sent.txt"])
    assert (out / "sent.txt").read_text().startswith("says 紺")
    told = ["given, 2 questions: m", "Its labels are not here, so there is no metric.", "written beside: sent.txt"]
    assert format_results(results).splitlines() == told
    assert flatten_metrics(results) == {}


# ---- Of a run that trains --------------------------------------------------------------------------------------------


def test_several_benchmarks_have_a_folder_each_and_a_list(tmp_path):
    out, parrot = epath.Path(tmp_path) / "out", Parrot()
    params = {"llm/head/kernel": jax.numpy.zeros(())}
    # Answers of an earlier run give way.
    evaluate(given(), Parrot(), out / "two", model="other", origin={}, rows=3)
    results = evaluate_all([given(name="one"), given(3, name="two")], parrot, params, out, "m", {"step": 3}, rows=4)
    assert [result["benchmark"] for result in results] == ["one", "two"]
    assert [result["metrics"]["accuracy"] for result in results] == [2 / 11, 1 / 3]
    assert json.loads((out / "results.json").read_text()) == results
    assert {file.name for file in out.iterdir()} == {"one", "two", "results.json"}
    for result in results:
        assert json.loads((out / result["benchmark"] / "results.json").read_text()) == result
    assert parrot.taken == [params, {}]  # and the memory is training's again


def test_one_benchmark_has_the_folder_itself(whole, tmp_path):
    out = epath.Path(tmp_path) / "out"
    (result,) = evaluate_all([given()], Parrot(), {}, out, "m", {"step": 3}, rows=4)
    assert json.loads((out / "results.json").read_text()) == result
    assert contents(out) == contents(whole)


def test_no_benchmark_takes_nothing(tmp_path):
    parrot = Parrot()
    assert evaluate_all([], parrot, {}, epath.Path(tmp_path) / "out", "m", {}, rows=4) == []
    assert parrot.taken == []
    assert not (tmp_path / "out").exists()


# ---- Told ------------------------------------------------------------------------------------------------------------


def told(metrics, questions=1000, name="bench", submission=()):
    return {"benchmark": name, "metrics": metrics, "questions": questions, "model": "m", "submission": submission}


POPE = told(
    {
        "f1": 0.859,
        "accuracy": 0.87449,
        "random": {"f1": 0.9, "accuracy": 0.91, "questions": 2910},
        "popular": {"f1": 0.8, "accuracy": 1.0, "questions": 3000},
    },
    8910,
    "pope",
)
MME = told(
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
VQA = told(
    {"accuracy": 0.785, "by_answer_type": {"number": 0.5, "yes/no": 0.91, "other": 0.704}}, 7, "vqav2", ["a.json"]
)
SCENES = told(
    {
        "accuracy": 0.5,
        "blank_image_accuracy": 0.25,
        "by_kind": {"count": {"accuracy": 0.5, "blank_image_accuracy": 0.25, "questions": 4}},
    },
    4,
    "scenes",
)


def test_people_read_percent_and_points_in_every_row():
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
        "written beside: a.json",
    ]
    assert rows(SCENES) == [
        "scenes, 4 questions: m",
        "accuracy blank image accuracy questions",
        "all 50.0% 25.0% 4",
        "count 50.0% 25.0% 4",
    ]


def test_logs_get_every_share_under_the_benchmark_s_name():
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
    assert flatten_metrics({}) == {}  # of a host that does not write
