"""Outcomes: scores read from the files of runs."""

import dataclasses
import json

import make_study
import numpy as np
import pytest

from stf_jax.config import UserError
from stf_jax.data.scenes import KINDS
from stf_jax.data.world import LARGE
from stf_jax.evals.benchmarks.scenes import Scenes
from stf_jax.studies.outcomes import KINDS as ALL_KINDS
from stf_jax.studies.outcomes import read_losses, read_outcome, read_outcomes
from stf_jax.studies.study import make_cells


@pytest.fixture
def cell(tmp_path):
    """A cell without files."""
    return make_cells(make_study.study(), tmp_path)[0]


def test_losses_of_a_single_stage_without_those_that_are_not_finite(tmp_path):
    study = make_study.study(base=f"{make_study.DEMO}:stage=finetune", common=("steps=2",), asked=())
    cells = make_cells(study, tmp_path)
    for cell in cells:
        make_study.finish(cell)
    file = cells[0].folder / "metrics.jsonl"
    lines = [{"step": 1, "loss": None}, {"step": 2, "loss": 1.5}, {"step": 3, "scenes/accuracy": 0.5}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (losses,) = read_losses(cells).values()
    assert losses["mlp"].steps.tolist() == [2]
    assert losses["mlp"].losses.tolist() == [[1.5], [2.5]]


@pytest.mark.parametrize("key", ["shown", "picture"])  # older runs' key; codespell:ignore picture
def test_single_answers_of_scenes_are_read(cell, key):
    make_study.put(cell.folder / "results.json", {"benchmark": "scenes"})
    correct = {"count": [True, False, True], "existence": [False, False]}
    lines = make_study.answers(correct, [True, False])
    (cell.folder / "answers.jsonl").write_text(lines.replace('"shown"', f'"{key}"'))
    scores = read_outcome(cell).scores
    assert list(scores) == ["all", "existence", "count", "blank image"]
    assert scores["count"].tolist() == [100, 0, 100]
    assert scores["existence"].tolist() == [0, 0]
    assert scores["blank image"].tolist() == [100, 0]
    assert scores["all"].tolist() == [100, 0, 100, 0, 0]


def test_scores_match_the_benchmarks_metrics(cell):
    benchmark = Scenes()
    benchmark.keep_first(60)
    rng = np.random.default_rng(0)
    texts, lines = [], []
    for question in benchmark.questions:
        truth = question.metadata["truth"]
        texts.append(truth.upper() if rng.random() < 0.4 else f"{truth}s")
        lines.append(json.dumps({"text": texts[-1], "metadata": question.metadata}) + "\n")
    make_study.put(cell.folder / "results.json", {"benchmark": "scenes"})
    (cell.folder / "answers.jsonl").write_text("".join(lines))
    metrics, (scores, heights) = benchmark.metrics(texts), dataclasses.astuple(read_outcome(cell))
    large = np.concatenate([hits for height, hits in heights.items() if height >= LARGE])
    assert large.mean() / 100 == pytest.approx(metrics["by_print"]["large print"]["accuracy"])
    assert large.size == metrics["by_print"]["large print"]["questions"]
    means = {kind: hits.mean() / 100 for kind, hits in scores.items()}
    assert means.pop("all") == pytest.approx(metrics["accuracy"])
    assert means.pop("blank image") == pytest.approx(metrics["blank_image_accuracy"])
    assert means == pytest.approx({kind: one["accuracy"] for kind, one in metrics["by_kind"].items()})
    assert list(means) == [kind for kind in ALL_KINDS if kind in metrics["by_kind"]]


def test_prints_give_only_heights_if_evaluated_with_scenes(cell):
    """In either order."""
    for name, height in (("prints", 5), ("scenes", 22)):
        metadata = {"kind": "reading", "shown": "scene", "truth": "FOX", "height": height}
        lines = [{"text": text, "metadata": metadata} for text in ("fox", "fix", "fog")]
        make_study.put(cell.folder / name / "answers.jsonl", 0)
        text = "".join(json.dumps(line) + "\n" for line in lines[: 2 + (name == "prints")])
        (cell.folder / name / "answers.jsonl").write_text(text)
    for names in (["scenes", "prints"], ["prints", "scenes"]):
        make_study.put(cell.folder / "results.json", [{"benchmark": name} for name in names])
        outcome = read_outcome(cell)
        assert outcome.scores["all"].tolist() == [100, 0]
        assert {height: hits.tolist() for height, hits in outcome.heights.items()} == {5: [100, 0, 0]}


def test_the_metrics_of_other_benchmarks_are_read(cell):
    pope = {"benchmark": "pope", "metrics": {"f1": 0.8, "random": {"f1": 0.9, "questions": 30}}, "questions": 90}
    make_study.put(cell.folder / "results.json", pope)
    assert {kind: hits.tolist() for kind, hits in read_outcome(cell).scores.items()} == {
        "pope/f1": [80],
        "pope/random/f1": [90],
    }
    mme = {"benchmark": "mme", "metrics": {"perception": 1510.7, "existence": {"score": 190.0, "accuracy": 0.95}}}
    make_study.put(cell.folder / "results.json", [pope, mme])
    scores = read_outcome(cell).scores
    assert scores["pope/random/f1"].tolist() == [90]
    assert scores["mme/perception"].tolist() == [1510.7]  # points, not percent
    assert (scores["mme/existence/score"].item(), scores["mme/existence/accuracy"].item()) == (190, 95)


def test_a_benchmark_without_labels_has_no_outcome(cell):
    make_study.put(cell.folder / "results.json", {"benchmark": "vizwiz", "metrics": {}, "questions": 9})
    with pytest.raises(UserError, match="has answers but no metrics, because its benchmarks have no labels"):
        read_outcome(cell)


def test_variants_have_their_seeds_in_order(tmp_path):
    cells = make_cells(make_study.study(), tmp_path)
    for number, cell in enumerate(cells):
        make_study.finish(cell, share=number / len(cells), questions=10)
    outcomes = read_outcomes(cells)
    assert list(outcomes) == ["mlp", "stf", "fastv"]
    assert outcomes["stf"].scores["all"].shape == (2, 10 * len(KINDS))
    for cell in cells:
        results = json.loads((cell.folder / "results.json").read_text())
        accuracy = outcomes[cell.variant.name].scores["all"][cell.seed].mean() / 100
        assert accuracy == pytest.approx(results["metrics"]["accuracy"])
