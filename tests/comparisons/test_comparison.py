"""Comparisons: accuracy, paired differences, seeds, hard questions, agreement, budgets, and what is refused."""

import dataclasses
import json
import re

import make_results
import numpy as np
import pytest
import scipy.stats
from etils import epath

from stf_jax.comparisons.comparison import ALL, compare, read_results, read_run
from stf_jax.comparisons.plots import find_pareto_front
from stf_jax.comparisons.runs import read_cost
from stf_jax.config import UserError
from stf_jax.evals.registry import open_benchmarks
from stf_jax.evals.runner import score

BLANK = make_results.ASKING | {"images": "blank"}


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Writes results below the current folder and returns their path there."""
    monkeypatch.chdir(tmp_path)

    def write(name, scores, **others):
        make_results.write(tmp_path / name, scores, **others)
        return name

    return write


def draw(seed, count=200, share=0.6):
    return (np.random.default_rng(seed).random(count) < share).astype(float).tolist()


def test_differences_are_those_of_the_paired_t_test(make):
    one, two = draw(0), draw(1, share=0.5)
    comparison = compare(read_results([make("mlp", one), make("stf", two)]))
    result = comparison.results["pope"]["stf"]
    expected = scipy.stats.ttest_rel(two, one)
    bounds = expected.confidence_interval()
    assert result.accuracy.value == pytest.approx(100 * np.mean(two))
    assert (result.difference.low, result.difference.high) == pytest.approx((100 * bounds.low, 100 * bounds.high))
    assert result.difference.p_value == pytest.approx(expected.pvalue)
    assert comparison.baseline == "mlp"
    assert comparison.results["pope"]["mlp"].difference is None


def test_questions_about_one_image_are_resampled_together(make):
    """Pairs of questions with equal scores: the interval is that of half as many questions."""
    scores = draw(0)
    pairs = [x for x in scores for _ in range(2)]
    (alone,) = read_results([make("alone", scores)])
    (shared,) = read_results([make("shared", pairs, images=[i // 2 for i in range(400)])])
    one, two = (compare([method]).results["pope"][method.name].accuracy for method in (alone, shared))
    assert (one.low, one.high) == pytest.approx((two.low, two.high))


def test_questions_without_an_image_are_left_out(make):
    (method,) = read_results([make("mlp", [1, 0, 1, 1], images=[0, None, 1, None])])
    assert method.scores("pope").tolist() == [[100, 100]]


def test_several_benchmarks_count_equally(make):
    one = make("mlp", {"gqa": [1, 1, 0, 0], "pope": [1] * 8})
    two = make("stf", {"gqa": [1, 0, 0, 0], "pope": [1] * 6 + [0] * 2})
    comparison = compare(read_results([one, two]))
    assert list(comparison.results) == [ALL, "gqa", "pope"]
    assert comparison.results[ALL]["mlp"].accuracy.value == pytest.approx((50 + 100) / 2)
    assert comparison.results[ALL]["stf"].difference.value == pytest.approx((-25 - 25) / 2)
    assert comparison.questions == {ALL: 12, "gqa": 4, "pope": 8}


def test_folders_of_seeds_are_one_method(make):
    scores = [draw(seed) for seed in range(3)]
    paths = [make(f"cells/stf/seed_{seed}", scores[seed]) for seed in (2, 0, 1)]
    method, baseline = read_results([*paths, make("mlp", draw(7))])
    assert (method.name, method.seeds) == ("stf", (0, 1, 2))
    assert method.scores("pope").mean(1) == pytest.approx([100 * np.mean(one) for one in scores])
    result = compare([method, baseline], baseline="mlp").results["pope"]["stf"]
    assert result.by_seed == pytest.approx([100 * np.mean(one) for one in scores])
    assert result.difference.seeds == 3  # the baseline's single seed counts for each
    named = read_results([f"stf={path}" for path in paths])
    assert [one.name for one in named] == ["stf"]


def test_tokens_that_a_model_chooses_may_differ_between_seeds_and_benchmarks(make, tmp_path):
    paths = []
    for seed, means in enumerate(([30, 10], [20, 8])):
        path = make(f"auto/seed_{seed}", {"gqa": draw(seed), "pope": draw(seed + 2)})
        results = json.loads((tmp_path / path / "results.json").read_text())
        for one, mean in zip(results, means, strict=True):
            one["image_tokens"] = {"mean": mean}
        (tmp_path / path / "results.json").write_text(json.dumps(results))
        paths.append(path)
    (method,) = read_results(paths)
    assert method.runs[0].cost == {"image_tokens": 20}
    assert method.cost == {"image_tokens": 17}


def test_tokens_of_tiles_depend_on_the_image(make):
    (method,) = read_results([make("tiles", draw(0), asking=make_results.ASKING | {"tiles": {"most": 4}})])
    assert method.cost == {}


def test_hard_questions_are_the_groups_of_vtc_bench(make):
    full, resized, method = [1, 1, 1, 0, 0, 1], [1, 0, 0, 0, 1, 1], [1, 1, 0, 1, 1, 0]
    comparison = compare(
        read_results([make("full", full), make("resize", resized), make("mine", method)]), resized="resize"
    )
    assert comparison.hard_questions == {"pope": (3, 2, 2)}
    result = comparison.results["pope"]["mine"]
    # Wrong when resized: 1, 2, 3; of these the full model gets 1 and 2 right. Both right: 0 and 5.
    assert (result.hard.value, result.lost.value, result.kept.value) == pytest.approx((200 / 3, 50, 50))


def test_agreement_counts_equal_answers_right_or_wrong(make):
    one = make("mlp", [1, 0, 0, 1], answers=["Yes", "no", "a cat", "two"])
    two = make("stf", [1, 0, 0, 1], answers=["yes.", "no", "a dog", "two "])
    assert compare(read_results([one, two])).results["pope"]["stf"].agreement == 75


def test_blank_scores_are_of_the_same_folder_or_another(make):
    paths = [make("mlp", [1, 1, 0], blank=[1, 0]), make("stf", [1, 1, 0])]
    dark = read_run(epath.Path(make("dark", [0, 0, 1], asking=BLANK)))
    results = compare(read_results(paths), blank={"stf": dark}).results["pope"]
    assert (results["mlp"].blank, results["stf"].blank) == (50, pytest.approx(100 / 3))


def test_a_benchmark_that_asks_about_blank_images_too_does_so_in_a_blank_run(make):
    # `evaluate --blank` leaves the images of `scenes`, which has blank questions of its own.
    path = make("mlp", {"pope": [1, 1], "scenes": [1, 1]})
    dark = read_run(epath.Path(make("dark", {"pope": [0, 1], "scenes": [1, 1]}, asking=BLANK)))
    dark.benchmarks["scenes"] = dataclasses.replace(dark.benchmarks["scenes"], blank=25.0)
    comparison = compare(read_results([path]), blank={"mlp": dark})
    assert [result["mlp"].blank for result in comparison.results.values()] == [37.5, 50, 25]


def test_shown_images_are_refused_as_blank_ones(make):
    path = make("mlp", [1, 1, 0])
    with pytest.raises(UserError, match=r"^--blank=mlp=mlp has answers about the images themselves: evaluate with"):
        compare(read_results([path]), blank={"mlp": read_run(epath.Path(path))})


def test_benchmarks_without_public_labels_are_left_out(make, tmp_path):
    paths = [make(name, {"pope": [1, 0], "vqav2": [0, 0]}) for name in ("mlp", "stf")]
    for path in paths:
        results = json.loads((tmp_path / path / "results.json").read_text())
        results[1]["metrics"] = {}
        (tmp_path / path / "results.json").write_text(json.dumps(results))
        (tmp_path / path / "vqav2" / "scores.jsonl").unlink()
    methods = read_results(paths)
    assert list(compare(methods).results) == ["pope"]
    assert [run.unscored for method in methods for run in method.runs] == [("vqav2",)] * 2


def test_groups_of_benchmarks_have_their_means(make):
    scores = {"pope": [1, 0], "ocrbench": [1, 1], "chartqa": [0, 0]}
    results = compare(read_results([make("mlp", scores)])).results
    assert list(results) == [ALL, "Mean of ocr", "pope", "ocrbench", "chartqa"]
    assert [result["mlp"].accuracy.value for result in results.values()] == [50, 50, 50, 100, 0]
    alone = compare(read_results([make("ocr", {"ocrbench": [1, 1], "chartqa": [0, 0]})])).results
    assert list(alone) == [ALL, "ocrbench", "chartqa"]


def test_budgets_near_those_of_uniprunebench_are_named_after_them(make):
    tokens = {"full": 576, "b": 192, "c": 128, "d": 64, "e": 144}
    methods = read_results([make(name, [1, 0], cost={"image_tokens": count}) for name, count in tokens.items()])
    comparison = compare(methods)
    budgets = {method.name: comparison.budget(method) for method in comparison.methods}
    assert budgets == {"full": 0, "e": 75, "b": 66.7, "c": 77.8, "d": 88.9}
    assert [method.name for method in comparison.methods] == ["full", "b", "e", "c", "d"]


def test_tokens_are_those_of_the_protocol_without_a_cost_file(make):
    asking = make_results.ASKING | {"reduce": "visionzip", "keep": 144}
    full, kept = read_results([make("mlp", [1, 0]), make("zip", [1, 0], asking=asking)])
    assert (full.cost, kept.cost) == ({"image_tokens": 576}, {"image_tokens": 144})
    assert (full.runs[0].reduced, kept.runs[0].reduced) == ("", "visionzip, keep=144")


def test_tokens_that_the_decoder_drops_count_on_average_over_its_layers(make):
    """And not those that its last layers read, which would make the method look cheaper than it is."""
    dropped = {"kept_after_layer": {"2": 144}, "average_image_tokens": 171.0}
    reduced = make_results.ASKING | {"reduce": "fastv:after=2", "keep": 144} | dropped
    scheduled = make_results.ASKING | {"schedule": "vica"} | dropped
    methods = read_results(
        [
            make("mlp", [1, 0]),
            make("fastv", [1, 0], asking=reduced),
            make("vica", [1, 0], asking=scheduled),
            make("measured", [1, 0], asking=reduced, cost={"image_tokens": 144, "average_image_tokens": 171.0}),
        ]
    )
    assert [method.cost for method in methods] == [{"image_tokens": 576}, *[{"image_tokens": 171}] * 3]
    assert [method.runs[0].reduced for method in methods[1:3]] == [
        "fastv:after=2, keep=144 (144 after layer 2)",
        "vica (144 after layer 2)",
    ]
    comparison = compare(methods)
    assert comparison.budget(methods[1]) == pytest.approx(100 * (1 - 171 / 576))


def test_pareto_front():
    points = [(576, 80), (192, 70), (192, 75), (128, 75), (64, 50), (300, 79)]
    assert find_pareto_front(points) == [(64, 50), (128, 75), (300, 79), (576, 80)]


def test_the_scores_that_evaluate_writes_are_read(tmp_path):
    (benchmark,) = open_benchmarks(["scenes"], "")
    lines = [
        json.dumps({"question_id": q.id, "prompt": q.prompt, "text": q.metadata["truth"] if index % 3 else "no idea"})
        for index, q in enumerate(benchmark.questions)
    ]
    file = epath.Path(tmp_path / "answers.jsonl")
    file.write_text("\n".join(lines))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "answers.jsonl").write_text("\n".join(lines))
    metrics = score(benchmark, file, epath.Path(tmp_path / "out"))["metrics"]
    scored = read_run(epath.Path(tmp_path / "out")).benchmarks["scenes"]
    assert scored.scores.mean() == pytest.approx(100 * metrics["accuracy"])
    assert scored.blank == pytest.approx(100 * metrics["blank_image_accuracy"])
    assert 1 < len(set(scored.clusters)) < len(scored.ids)  # an image has several questions
    # Earlier versions wrote no scores; embedded benchmarks need no files to score their answers again.
    (tmp_path / "out" / "scores.jsonl").unlink()
    again = read_run(epath.Path(tmp_path / "out")).benchmarks["scenes"]
    assert (again.ids, again.answers, again.blank) == (scored.ids, scored.answers, scored.blank)
    np.testing.assert_array_equal(again.scores, scored.scores)
    np.testing.assert_array_equal(again.clusters, scored.clusters)


def test_the_output_folder_of_a_study_stands_for_its_runs(make, tmp_path, monkeypatch):
    folders = {name: [make(f"cells/{name}/seed_{seed}", draw(seed)) for seed in (0, 1)] for name in ("mlp", "k=3")}
    (tmp_path / "study").mkdir()
    report = tmp_path / "study" / "report.json"
    report.write_text(json.dumps({"title": "A study", "folders": folders}))
    single = make("single", draw(0))
    methods = read_results(["study", single])  # earlier reports have paths from the current folder
    assert [(method.name, method.seeds) for method in methods] == [("mlp", (0, 1)), ("k=3", (0, 1)), ("single", (0,))]
    from_report = {name: [f"../{path}" for path in paths] for name, paths in folders.items()}
    report.write_text(json.dumps({"title": "A study", "folders": from_report}))
    monkeypatch.chdir(tmp_path / "cells")
    assert [(method.name, method.seeds) for method in read_results(["../study"])] == [("mlp", (0, 1)), ("k=3", (0, 1))]
    monkeypatch.chdir(tmp_path)
    for wrong in ({"title": "A study"}, [], {"folders": [1]}):
        report.write_text(json.dumps(wrong))
        refuse("lists no folders of runs", ["study"])


# ---- Refused ---------------------------------------------------------------------------------------------------------


def refuse(match, paths, **options):
    with pytest.raises(UserError, match=match) as found:
        compare(read_results(paths), **options)
    assert "\n" not in str(found.value)
    assert str(found.value).endswith((".", ")"))


def test_different_questions_are_refused(make):
    mlp = make("mlp", [1, 0, 1])
    refuse(r"mlp and few answered different questions of pope: 3 and 2\.", [mlp, make("few", [1, 0])])
    other = make("other", [1, 0, 1])
    file = epath.Path(other) / "scores.jsonl"
    text = file.read_text()
    file.write_text(text.replace('"question_id": "2"', '"question_id": "9"'))
    refuse("other has no question '2'", [mlp, other])
    file.write_text(text.replace('"question_id": "2"', '"question_id": "1"'))
    refuse("other has no question '2'", [other, mlp])
    file.write_text(text.replace("Is it 2?", "Is it two?"))
    refuse("question '2' has another prompt", [mlp, other])
    refuse(r"mlp has results of pope, but gqa \(gqa\) does not", [mlp, make("gqa", {"gqa": [1, 0, 1]})])


def test_different_protocols_and_labels_are_refused(make):
    labels = [{"file": "a.json", "sha256": "12"}]
    mlp = make("mlp", [1, 0], labels=labels)
    refuse("different protocols of pope: labels is .*12.* for mlp and .*34.* for b", [
        mlp, make("b", [1, 0], labels=[{"file": "a.json", "sha256": "34"}]),
    ])  # fmt: skip
    refuse("rule is 'Yes is correct.' for mlp and 'No.' for c", [mlp, make("c", [1, 0], labels=labels, rule="No.")])
    short = make_results.ASKING | {"decoding": {"max_new_tokens": 16, "temperature": 0.0}}
    refuse("decoding.max_new_tokens is 128 for mlp and 16 for d", [mlp, make("d", [1, 0], labels=labels, asking=short)])
    moved = make("moved", [1, 0], labels=[{"file": "elsewhere/a.json", "sha256": "12"}])
    scored = make("scored", [1, 0], labels=labels, asking={}, answers=["yes", "no"])
    compare(read_results([mlp, moved, scored]))  # the same content; unknown decoding


def test_unclear_names_and_seeds_are_refused(make):
    mlp, other = make("a/pope", [1, 0]), make("b/pope", [1, 0])
    message = "Two results are named pope (a/pope and b/pope): name them, as in A=a/pope B=b/pope"
    refuse(re.escape(message), [mlp, other])
    assert [method.name for method in read_results([f"A={mlp}", f"B={other}"])] == ["A", "B"]
    blank = make("dark", [1, 0], asking=make_results.ASKING | {"images": "blank"})
    refuse("dark has answers about blank images; pass it as --blank=NAME=dark", [mlp, blank])
    refuse("a/pope is named twice", [mlp, f"B={mlp}"])
    refuse("same seed", [make("x/stf/seed_1", [1, 0]), make("y/stf/seed_1", [1, 0])])
    few = make("few", [1, 0], cost={"image_tokens": 64})
    refuse("few has 64 image tokens and a/pope 576", [f"m={mlp}", f"m={few}"])
    seeds = [make(f"{name}/seed_{seed}", [1, 0]) for name, seed in (("s", 0), ("s", 1), ("t", 0), ("t", 2))]
    refuse("t has seeds 0, 2, but s 0, 1", seeds)
    refuse("--baseline names no result 'mpl'; known: A, B", [f"A={mlp}", f"B={other}"], baseline="mpl")
    refuse("--resized names no result 'resize'", [f"A={mlp}"], resized="resize")


def test_folders_without_scores_are_refused(make, tmp_path):
    refuse("nowhere has no results", ["nowhere"])
    (tmp_path / "empty").mkdir()
    refuse("empty has no results: neither results.json", ["empty"])
    old = make("old", [1, 0])
    (tmp_path / "old" / "scores.jsonl").unlink()
    refuse("old has no scores.jsonl: .*python -m stf_jax.evaluate --answers=old/answers.jsonl --benchmark=pope", [old])
    (tmp_path / "old" / "results.json").write_text('{"benchmark": "pope", "metrics": {}, "protocol": {}}')
    refuse("the labels of pope are not public", [old])
    (tmp_path / "old" / "results.json").write_text("[1]")
    refuse("is not a file of results", [old])
    bad = make("bad", [1, 0])
    with (tmp_path / "bad" / "scores.jsonl").open("a") as file:
        file.write('{"question_id": 3}\n')
    refuse("scores.jsonl, line 3 is not a question's score", [bad])
    refuse("no questions about images", [make("texts", [1, 0], images=[None, None])])


@pytest.mark.parametrize("text", ["[]", '{"image_tokens": "many"}', '{"first_token_ms": -1}', "{"])
def test_malformed_costs_are_refused(tmp_path, text):
    file = epath.Path(tmp_path / "cost.json")
    file.write_text(text)
    with pytest.raises(UserError, match=r"cost\.json"):
        read_cost(file)
