"""Sample files made by lmms-eval itself: equal means, its paired test, and what is refused."""

import json
import os
import shutil

import numpy as np
import pytest
from etils import epath

from stf_jax.comparisons.comparison import compare, read_results, read_run
from stf_jax.config import UserError

QUESTIONS = 40
TASK = """
dataset_path: {data}
dataset_kwargs: {{load_from_disk: true}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.images
doc_to_text: !function utils.question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: {tokens}}}
process_results: !function utils.score
metric_list:
- {{metric: length, aggregation: mean, higher_is_better: true}}
- {{metric: score, aggregation: mean, higher_is_better: true}}
- {{metric: pairs, aggregation: !function utils.collect, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
UTILS = """
def images(doc):
    return [doc["image"]]

def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def score(doc, results):
    correct = float(results[0] == doc["answer"])
    # As for MME: a dict with the image's id, which the task's own aggregation reads.
    return {"length": len(results[0]), "score": correct, "pairs": {"question_id": doc["photo"], "score": correct}}

def collect(items):
    return 100 * sum(item["score"] for item in items)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Evaluates two models that answer 70 and 50% of the questions with lmms-eval, and one with fewer new tokens."""
    pytest.importorskip("lmms_eval", reason="pip install --no-deps --requirement requirements-data.txt")
    root = tmp_path_factory.mktemp("lmms")
    before = os.environ.get("HF_HOME")
    os.environ["HF_HOME"] = str(root / "cache")
    import datasets
    import PIL.Image
    import PIL.ImageFile
    from lmms_eval.api.model import lmms
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.loggers.evaluation_tracker import EvaluationTracker
    from lmms_eval.tasks import TaskManager

    class Guesser(lmms):
        """Answers with the gold answer for a random share of the questions."""

        def __init__(self, share, seed):
            super().__init__()
            self.correct = np.random.default_rng(seed).random(QUESTIONS) < share

        def generate_until(self, requests):
            docs = [(request.args[3], self.task_dict[request.args[4]][request.args[5]]) for request in requests]
            return [split[index]["answer"] if self.correct[index] else "none" for index, split in docs]

        def loglikelihood(self, requests):
            raise NotImplementedError

        def generate_until_multi_round(self, requests):
            raise NotImplementedError

    rows = [
        {
            "image": PIL.Image.new("RGB", (8, 8), (index // 2, 0, 0)),
            "photo": f"{index // 2}.png",
            "question": f"What is {index}?",
            "answer": f"thing {index}",
        }
        for index in range(QUESTIONS)
    ]
    features = {key: datasets.Value("string") for key in ("photo", "question", "answer")}
    split = datasets.Dataset.from_list(rows, features=datasets.Features({"image": datasets.Image()} | features))
    datasets.DatasetDict({"test": split}).save_to_disk(root / "data")

    def evaluate(name, share, seed, tokens=4, baseline=None):
        tasks = root / f"tasks{tokens}"
        tasks.mkdir(exist_ok=True)
        (tasks / "utils.py").write_text(UTILS)
        (tasks / "things.yaml").write_text("task: things" + TASK.format(data=root / "data", tokens=tokens))
        tracker = EvaluationTracker(output_path=str(root / name))
        manager = TaskManager(include_path=str(tasks), include_defaults=False)
        results = simple_evaluate(
            Guesser(share, seed), tasks=["things"], task_manager=manager, bootstrap_iters=0, baseline=baseline,
            evaluation_tracker=tracker,
        )  # fmt: skip
        samples = results.pop("samples")
        tracker.save_results_aggregated(results, samples, "20260101_000000")
        tracker.save_results_samples("things", samples["things"])
        return results

    first = evaluate("full", 0.7, 0)
    (file,) = (root / "full").rglob("*_samples_*.jsonl")
    second = evaluate("pruned", 0.5, 1, baseline=str(file))
    evaluate("short", 0.5, 2, tokens=8)
    PIL.ImageFile.LOAD_TRUNCATED_IMAGES = False  # lmms-eval sets it for the whole process
    os.environ.pop("HF_HOME") if before is None else os.environ.update(HF_HOME=before)
    return root, first["results"]["things"], second["results"]["things"]


def test_means_and_the_paired_test_are_lmms_evals(folder):
    root, first, second = folder
    methods = read_results([str(root / name) for name in ("full", "pruned")])
    # Without the images' ids, questions are independent, as lmms-eval's test takes them.
    for method in methods:
        method.benchmark("things").clusters[:] = range(QUESTIONS)
    results = compare(methods).results["things"]
    assert results["full"].accuracy.value == pytest.approx(100 * first["score,none"])
    assert results["pruned"].accuracy.value == pytest.approx(100 * second["score,none"])
    assert second["paired_baseline_score"] == pytest.approx(results["full"].accuracy.value)
    difference = results["pruned"].difference
    assert difference.low == pytest.approx(second["paired_ci_lower"])
    assert difference.high == pytest.approx(second["paired_ci_upper"])
    assert difference.p_value == pytest.approx(second["paired_pvalue"])


def test_samples_are_read(folder):
    root, first, _ = folder
    (file,) = (root / "full").rglob("*_samples_*.jsonl")
    run = read_run(epath.Path(root / "full"))
    scored = run.benchmarks["things"]
    assert run.tool == "lmms-eval"
    assert scored.metric == "score, whose mean lmms-eval reports"  # the lengths are not in 0..1
    assert len(scored.ids) == QUESTIONS
    assert len(set(scored.clusters)) == QUESTIONS // 2  # two questions about each image
    assert scored.metrics["length,none"] == first["length,none"]
    by_file = read_run(epath.Path(file))
    assert by_file.benchmarks["things"].scores.tolist() == scored.scores.tolist()
    assert read_results([str(file)])[0].name == file.parent.name


def copy(folder, tmp_path):
    (file,) = (folder[0] / "full").rglob("*_samples_*.jsonl")
    shutil.copytree(file.parent, tmp_path / "copy")
    return tmp_path / "copy" / file.name


def rewrite(file, change):
    file.write_text("".join(json.dumps(change(json.loads(line))) + "\n" for line in file.read_text().splitlines()))


def test_a_score_without_a_reported_mean_counts_if_it_is_zero_or_one(folder, tmp_path):
    """As for MME, whose points are no mean: each sample has one of two metrics."""
    file = copy(folder, tmp_path)
    expected = read_run(epath.Path(file)).benchmarks["things"].scores.tolist()

    def change(sample):
        score = sample.pop("score")
        return sample | {f"points_{int(sample['doc_id']) % 2}": {"score": score}, "pairs": None}

    rewrite(file, change)
    found = read_run(epath.Path(file)).benchmarks["things"]
    assert found.scores.tolist() == expected
    assert found.metric.startswith("score, as a share of questions")
    rewrite(file, lambda sample: {key: value for key, value in sample.items() if not key.startswith("points")})
    with pytest.raises(UserError, match="no metric with a number for each question; it has length, pairs"):
        read_run(epath.Path(file))


def test_samples_that_cannot_be_compared_are_refused(folder, tmp_path):
    def refuse(match, *paths):
        with pytest.raises(UserError, match=match) as found:
            compare(read_results(list(map(str, paths))))
        assert "\n" not in str(found.value)

    full = folder[0] / "full"
    refuse("different protocols of things: generation_kwargs.max_new_tokens is 4 .* and 8", full, folder[0] / "short")
    file = copy(folder, tmp_path)
    rewrite(file, lambda sample: sample | {"target": sample["target"].replace("thing 3", "thing three")})
    refuse("different questions of things: question '3' has another prompt or gold answer", full, file)
    with file.open("a") as opened:
        opened.write(file.read_text().splitlines()[0] + "\n")
    refuse("line 41: a second sample of question 0", file)
    file.write_text('{"doc_id": 1}\n')
    refuse("line 1 is no sample", file)
    file.write_text("")
    refuse("contains no samples", file)
    again = file.with_name(file.name.replace("20260101", "20260102"))
    shutil.copy(full.rglob("*_samples_*.jsonl").__next__(), file)
    shutil.copy(file, again)
    shutil.copy(file.with_name("20260101_000000_results.json"), file.with_name("20260102_000000_results.json"))
    refuse("several sample files of things; name one of them", file.parent)
    file.with_name("20260101_000000_results.json").write_text("{}")
    refuse("has no results of things", file)
    file.with_name("20260101_000000_results.json").unlink()
    refuse("20260101_000000_results.json is missing", file)
