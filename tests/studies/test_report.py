"""Reports: their sentences, tables, plots and files, from computed findings."""

import dataclasses
import html.parser
import itertools
import json
import math
import os
import pathlib
import re
import tarfile

import make_study
import matplotlib.text
import numpy as np
import PIL.Image
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from stf_jax import cli
from stf_jax.studies import plots, report
from stf_jax.studies.outcomes import Outcome, read_losses, read_outcomes
from stf_jax.studies.page import Code, Heading, Image, Items, Table, Text, render_html, render_markdown, strip_markup
from stf_jax.studies.report import compute_findings, format_verdicts, write_report
from stf_jax.studies.study import default_study, make_cells, read_study

ROOT = pathlib.Path(__file__).parent.parent.parent
PLOTS = ("quality", "kinds", "losses", "differences", "cost")


class PageParser(html.parser.HTMLParser):
    """Parses a page: checks that tags are closed, and collects its references and text."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.references, self.tags, self.text = [], [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [value for key, value in attrs if key in ("src", "href", "srcset", "data", "action")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["script"]:
            self.text += data


def make_scores(seeds=3, questions=200, **shares):
    """Makes scores by kind for variants with these shares of correct answers."""
    scores = {}
    for name, share in shares.items():
        luck = np.random.default_rng(0).random((seeds, questions))  # the same for all
        hits = 100.0 * (luck < share)
        scores[name] = {"all": hits, "count": hits[:, ::2], "blank image": 100.0 * (luck[:, :50] < 0.3)}
    return scores


def make_findings(scores, costs=None, **changes):
    seeds = tuple(range(len(next(iter(next(iter(scores.values())).values())))))
    outcomes = {name: Outcome(by_kind) for name, by_kind in scores.items()}
    return compute_findings(make_study.study(seeds=seeds, **changes), outcomes, {}, costs or {})


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report of a study with a failed run: its folder, findings and finished cells."""
    out = tmp_path_factory.mktemp("report")
    study = make_study.study(variants=(*make_study.VALUES["variants"], ("avg_pool", ("model.fusion.fusion=avg_pool",))))
    cells = make_cells(study, out / "cells")
    for cell in cells:
        make_study.finish(cell, share={"mlp": 0.5, "stf": 0.9, "fastv": 0.52, "avg_pool": 0.1}[cell.variant.name])
    done = [cell for cell in cells if cell.variant.name != "avg_pool"]
    error = "ended with status 2: error: <b>`x`</b> & more"
    failed = {cell: error for cell in cells if cell.variant.name == "avg_pool" and cell.seed == 1}
    outcomes = read_outcomes(done)
    costs = {name: json.loads((out / "cells" / name / "seed_0" / "cost.json").read_text()) for name in outcomes}
    findings = compute_findings(study, outcomes, read_losses(done), costs)
    write_report(findings, done, failed, "python -m stf_jax.ablate --config=x --out='a b'", out)
    return out, findings, done


def test_all_files_are_written(written):
    out, _, _ = written
    names = [*(f"report.{kind}" for kind in ("md", "html", "json")), *(f"{name}.png" for name in PLOTS)]
    assert sorted(path.name for path in out.iterdir() if path.is_file()) == sorted(names)
    for name in PLOTS:
        with PIL.Image.open(out / f"{name}.png") as image:
            pixels = np.asarray(image.convert("L"))
        assert image.width > 400
        assert (pixels < 128).sum() > 500  # something is drawn
        assert f"]({name}.png)" in (out / "report.md").read_text()


def test_the_html_page_is_self_contained(written):
    out, _, _ = written
    page = PageParser((out / "report.html").read_text())
    assert page.open == []
    assert len(page.references) == len(PLOTS)
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    assert "url(" not in (out / "report.html").read_text()
    assert set(page.tags).isdisjoint(["link", "b", "fusions"])  # names and logs are escaped
    assert page.text.count("Two <fusions> & a baseline") == 2
    assert "error: <b>x</b> & more" in page.text
    assert "*" not in page.text


def test_it_says_how_to_reproduce_it(written):
    out, _, done = written
    text = (out / "report.md").read_text()
    assert "python -m stf_jax.ablate --config=x --out='a b'" in text
    assert "Seeds 0, 1; 4 training runs, whose steps took 8 min in total and at most 2 min per run." in text
    assert "| stf | `model.fusion.fusion=stf` |" in text
    assert "| fastv | runs of mlp, evaluated with `--reduce=fastv` |" in text
    report = json.loads((out / "report.json").read_text())
    assert [path for paths in report["folders"].values() for path in paths] == [
        os.path.relpath(cell.folder, out) for name in report["folders"] for cell in done if cell.variant.name == name
    ]
    commands = report["commands"]
    assert set(commands) == {cell.name for cell in done}
    assert commands["stf, seed 1"].startswith("python -m stf_jax.main --config=")


def test_variants_with_failed_runs_are_left_out_and_listed(written):
    out, _, _ = written
    text = (out / "report.md").read_text()
    assert "**Some runs failed.** The report leaves out their variants." in text
    assert "- avg_pool, seed 1: ended with status 2" in text
    figures = json.loads((out / "report.json").read_text())
    assert list(figures["quality"]) == ["mlp", "stf", "fastv"]
    assert list(figures["differences"]) == ["stf", "fastv"]


def test_its_values_match_the_answers(written):
    out, findings, done = written
    figures = json.loads((out / "report.json").read_text(), parse_constant=pytest.fail)  # no NaN
    for cell in done:
        accuracy = json.loads((cell.folder / "results.json").read_text())["metrics"]["accuracy"]
        assert figures["by_seed"][cell.variant.name]["all"][cell.seed] == pytest.approx(100 * accuracy)
    stf, mlp = (figures["by_seed"][name]["all"] for name in ("stf", "mlp"))
    difference = figures["differences"]["stf"]["all"]
    assert difference["value"] == pytest.approx(np.mean(stf) - np.mean(mlp))
    assert difference["within_noise"] is False
    assert difference["low"] > 20
    assert figures["quality"]["stf"]["all"]["value"] == pytest.approx(np.mean(stf))
    assert figures["deviation"]["stf"]["value"] == pytest.approx(np.std(stf, ddof=1))
    assert figures["cost"] == findings.costs
    row = next(line for line in (out / "report.md").read_text().splitlines() if line.startswith("| stf | 36 |"))
    assert row.split("|")[3].strip().startswith(f"{np.mean(stf):.1f}<br>± ")


def test_a_variant_that_does_not_train_has_no_step_cost(written):
    out, _, _ = written
    row = next(
        line for line in (out / "report.md").read_text().splitlines() if line.startswith("| fastv | 36 | 33,024 ")
    )
    assert [cell.strip() for cell in row.split("|")[4:7]] == ["", "", ""]


def test_verdicts_tell_differences_from_noise():
    scores = make_scores(mlp=0.5, better=0.8, worse=0.2, same=0.5)
    scores["same"]["all"] = np.random.default_rng(1).permuted(scores["same"]["all"], axis=1)
    names = ("mlp", "better", "worse", "same")
    variants = tuple((name, ("model.fusion.fusion=mlp",)) for name in names)
    findings = make_findings(scores, variants=variants, asked=())
    verdicts = dict(zip(names[1:], format_verdicts(findings), strict=True))
    assert verdicts["better"].startswith("better is better than mlp: +3")
    assert verdicts["worse"].startswith("worse is worse than mlp: -2")
    assert verdicts["same"].endswith("**within noise**.")
    assert "noise" not in verdicts["better"] + verdicts["worse"]


def test_verdicts_tell_equality_from_noise():
    luck = np.random.default_rng(0).random((5, 4000))
    hits, lucky = 100.0 * (luck < 0.8), np.array([[0.76], [0.79], [0.8], [0.81], [0.84]])
    scores = {name: {"all": hits.copy()} for name in ("mlp", "same", "bit_worse", "unclear")}
    scores["same"]["all"][:, :40] = np.random.default_rng(1).permuted(hits[:, :40], axis=1)
    scores["bit_worse"]["all"][:, :60] = 0
    scores["unclear"]["all"] = 100.0 * (np.random.default_rng(2).random((5, 4000)) < lucky)
    variants = tuple((name, ("model.fusion.fusion=mlp",)) for name in scores)
    findings = make_findings(scores, variants=variants, asked=(), margin=2)
    verdicts = dict(zip(list(scores)[1:], format_verdicts(findings), strict=True))
    assert verdicts["same"].startswith("same and mlp are **equal within 2 points**: ")
    assert verdicts["bit_worse"].startswith("bit_worse is worse than mlp, by less than 2 points: -1.")
    assert verdicts["unclear"].endswith("**within noise**.")


def test_detectable_differences_are_listed(written):
    out, findings, _ = written
    lines = (out / "report.md").read_text().splitlines()
    detectable = {name: by_kind["all"].detectable() for name, by_kind in findings.differences.items()}
    row = next(line for line in lines[lines.index("## Detectable differences") :] if line.startswith("| all |"))
    low, high = (f"{end(detectable.values()):.1f}" for end in (min, max))
    assert [cell.strip() for cell in row.split("|")[2:5:2]] == [low, high]
    figures = json.loads((out / "report.json").read_text())
    assert figures["differences"]["stf"]["all"]["detectable"] == pytest.approx(detectable["stf"])
    assert (figures["margin"], figures["kind_margin"]) == (2, 5)


def test_a_repeated_variant_is_a_control(tmp_path):
    study = make_study.study(repeated=(("again", ("mlp",)),), seeds=(0, 1, 2))
    cells = make_cells(study, tmp_path)
    for cell in cells:
        make_study.finish(cell, share=0.5, questions=200)
    verdicts = format_verdicts(compute_findings(study, read_outcomes(cells), {}, {}))
    assert verdicts[-1] == "Control: again is mlp with other seeds; no difference is significant."
    for cell in cells:
        if cell.variant.name == "again":
            make_study.finish(cell, share=0.9, questions=200)
    verdicts = format_verdicts(compute_findings(study, read_outcomes(cells), {}, {}))
    assert re.fullmatch("Control: again is mlp with other seeds; by chance they differ in all, .*", verdicts[-1])


def test_scores_by_height_are_drawn_and_listed(tmp_path):
    study = make_study.study(asked=())
    cells = make_cells(study, tmp_path)
    outcomes = {}
    for name, shares in (("mlp", (0.5, 0.9)), ("stf", (0.1, 0.9))):
        luck = np.random.default_rng(0).random((2, 100))
        heights = {height: 100.0 * (luck < share) for height, share in zip((5, 22), shares, strict=True)}
        outcomes[name] = Outcome({"all": np.concatenate(list(heights.values()), axis=1)}, heights)
    findings = compute_findings(study, outcomes, {}, {})
    write_report(findings, cells, {}, "command", tmp_path)
    section = (tmp_path / "report.md").read_text().partition("## By height of print")[2].partition("##")[0]
    assert "| stf | " in section
    assert "Filled points differ from mlp by more than noise." in section
    figures = json.loads((tmp_path / "report.json").read_text())
    assert figures["heights"]["stf"]["22"]["value"] == pytest.approx(outcomes["stf"].heights[22].mean())
    expected = outcomes["stf"].heights[5].mean() - outcomes["mlp"].heights[5].mean()
    assert figures["height_differences"]["stf"]["5"]["value"] == pytest.approx(expected)
    (axes,) = plots._draw_heights(findings).axes
    assert axes.get_title() == "stf"
    curves = [line.get_ydata().tolist() for line in axes.lines if len(line.get_xdata()) == 2]
    for name in ("mlp", "stf"):
        assert [estimate.value for estimate in findings.heights[name].values()] in curves
    points = {line.get_xdata()[0]: line.get_markerfacecolor() for line in axes.lines if len(line.get_xdata()) == 1}
    assert points == {5: plots.INK, 22: plots.PAPER}
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["5", "22"]
    assert (tmp_path / "heights.png").exists()


def test_losses_are_read_at_the_steps_of_all_seeds(tmp_path):
    cells = make_cells(make_study.study(), tmp_path)
    for cell in cells:
        make_study.finish(cell)
    with (cells[0].folder / "finetune" / "metrics.jsonl").open("a") as file:
        file.write('\n{"step": 4, "loss": 1.0}\n{"step": 6, "seconds": 3.0}\n')
    losses = read_losses(cells)
    assert list(losses) == ["pretrain", "finetune"]
    assert all(list(by_variant) == ["mlp", "stf"] for by_variant in losses.values())  # fastv trains nothing
    curve = losses["finetune"]["mlp"]
    assert curve.steps.tolist() == [2]
    assert curve.losses.tolist() == [[1.5], [2.5]]


def test_colors_of_kinds_are_differences_beyond_noise():
    scores = make_scores(mlp=0.5, worse=0.2, same=0.5)
    scores["same"]["all"] = np.random.default_rng(1).permuted(scores["same"]["all"], axis=1)
    variants = tuple((name, ("model.fusion.fusion=mlp",)) for name in scores)
    findings = make_findings(scores, variants=variants, asked=())
    (axes,) = plots._draw_kinds(findings).axes
    assert [text.get_text() for text in axes.texts] == [
        f"{findings.quality[name]['count'].value:.0f}" for name in scores
    ]
    colors = axes.images[0].get_array()
    assert colors[:, 0].tolist() == [0, findings.differences["worse"]["count"].value, 0]


def test_one_seed_with_one_value_has_no_noise_estimate():
    scores = {name: {"pope/f1": np.array([[share]])} for name, share in (("mlp", 50.0), ("stf", 90.0))}
    findings = make_findings(scores, asked=())
    assert format_verdicts(findings) == ["stf vs. mlp: one seed and one value are too few to estimate the noise."]


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_report_with_minimal_data(tmp_path, seeds):
    """One seed or constant values, no costs, one kind of question."""
    scores = {name: {"pope/f1": np.full((seeds, 1), share)} for name, share in (("mlp", 0.1), ("stf", 0.7))}
    findings = make_findings(scores, asked=())
    write_report(findings, make_cells(findings.study, tmp_path), {}, "command", tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"quality.png", "differences.png"}
    figures = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert figures["quality"]["stf"]["pope/f1"]["value"] == pytest.approx(0.7)
    assert (figures["quality"]["stf"]["pope/f1"]["low"] is None) == (seeds == 1)
    assert "nan" not in (tmp_path / "report.md").read_text()


def test_without_the_baseline_nothing_is_compared(tmp_path):
    scores = make_scores(stf=0.5)
    findings = make_findings(scores, asked=())
    assert findings.differences == {}
    assert format_verdicts(findings) == []
    write_report(findings, make_cells(findings.study, tmp_path)[1:2], {}, "command", tmp_path)
    assert "Differences" not in (tmp_path / "report.md").read_text()
    assert PageParser((tmp_path / "report.html").read_text()).open == []


def test_a_single_kind_may_differ():
    scores = make_scores(mlp=0.5, stf=0.5)
    scores["stf"]["count"] = np.full_like(scores["stf"]["count"], 100)
    by_kind = make_findings(scores, asked=()).differences["stf"]
    assert by_kind["all"].value == 0
    assert by_kind["all"].within_noise
    assert by_kind["count"].low > 0
    assert not any(math.isnan(value) for value in dataclasses.astuple(by_kind["count"]))


def test_markdown_and_html_render_all_blocks(tmp_path):
    PIL.Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    blocks = [
        Heading("<One>"),
        Text("of `a<b` and **c**"),
        Items(["d", "e"]),
        Code("f <g>"),
        Table(["", "h"], [["i", "`j|k`"]]),
        Image(tmp_path / "a.png", 'l "m"'),
    ]
    text = render_markdown("T & U", blocks)
    lines = [
        "# T & U",
        "## <One>",
        "of `a<b` and **c**",
        "- d",
        "- e",
        "f <g>",
        '![l "m"](a.png)',
        "|  | h |",
        "|---|--:|",
    ]
    assert set(lines) <= set(text.splitlines())
    assert r"| i | `j\|k` |" in text
    page = PageParser(render_html("T & U", blocks))
    assert page.open == []
    for tag in ("h1", "h2", "p", "code", "strong", "ul", "li", "pre", "table", "img"):
        assert tag in page.tags
    for text in ("<One>", "of a<b and c", "f <g>", "j|k"):
        assert text in page.text
    assert strip_markup("of `a` and **c**") == "of a and c"


@pytest.mark.parametrize("count", [1, 2, 12])
def test_names_in_the_cost_plot_do_not_overlap(count):
    names = [f"variant_{i}" for i in range(count)]
    scores = make_scores(**dict.fromkeys(names, 0.5))  # at the same height, and close together
    costs = {name: {"prefill_gflops": 1 + i // 3 / 100, "step_gflops": 2.0} for i, name in enumerate(names)}
    variants = tuple((name, ("model.fusion.fusion=mlp",)) for name in names)
    figure = plots._draw_cost(make_findings(scores, costs, variants=variants, baseline=names[0], asked=()))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    for axes in figure.axes:
        assert sorted(text.get_text() for text in axes.texts) == sorted(names)
        area = axes.get_window_extent()
        # The extent of the text without its line.
        boxes = [matplotlib.text.Text.get_window_extent(text, canvas.get_renderer()) for text in axes.texts]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        assert all(area.x0 < box.x0 and box.x1 < area.x1 for box in boxes)
        assert all(area.y0 < box.y0 and box.y1 < area.y1 for box in boxes)


@pytest.mark.parametrize(
    ("folder", "name", "runs"), [("scenes", "fusions", 50), ("teacher", "teacher", 10), ("tiles", "tiles", 15)]
)
def test_the_committed_runs_give_the_committed_report(folder, name, runs, tmp_path, monkeypatch):
    """docs/evidence/runs has the answers of all runs of these reports, one of which has some variants of its study."""
    for run in (ROOT / "docs" / "evidence" / "runs").glob("*.tar.xz"):
        with tarfile.open(run) as archive:
            archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(ROOT)
    argument = f"--config=configs/ablations/{name}.py"
    study = read_study(cli.parse([argument], "", workdir=False, defaults=default_study)[1])
    expected = json.loads((ROOT / "docs" / "evidence" / folder / "report.json").read_text())
    reported = [variant for variant in study.variants if variant.name in expected["quality"]]
    study = dataclasses.replace(study, variants=tuple(reported))
    cells = make_cells(study, tmp_path)
    assert len(cells) == runs
    assert all(cell.done for cell in cells)
    costs = {cell.variant.name: json.loads((cell.folder / "cost.json").read_text()) for cell in cells if not cell.seed}
    findings = compute_findings(study, read_outcomes(cells), read_losses(cells), costs)
    found = json.loads(json.dumps(report._make_json(findings, cells, tmp_path)))
    for key in {*expected} - {"folders", "commands"}:  # which name another folder
        assert found[key] == approx(expected[key]), key


def approx(value):
    """The value, with its numbers to nine digits."""
    if isinstance(value, dict):
        return {key: approx(one) for key, one in value.items()}
    if isinstance(value, list):
        return [approx(one) for one in value]
    return pytest.approx(value, rel=1e-9) if isinstance(value, float) else value
