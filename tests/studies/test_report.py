"""A report says what was found, and no more; its page stands alone."""

import dataclasses
import html.parser
import itertools
import json
import math
import re

import make_study
import matplotlib.text
import numpy as np
import PIL.Image
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from stf_jax.studies import plots
from stf_jax.studies.outcomes import Outcome, by_variant
from stf_jax.studies.page import Code, Heading, Image, Items, Table, Text, markdown, page, plain
from stf_jax.studies.report import findings, verdicts, write_report
from stf_jax.studies.study import cells

PICTURES = ("quality", "kinds", "differences", "cost")


class Page(html.parser.HTMLParser):
    """Reads a page: its tags in pairs, what it refers to, and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.references, self.tags, self.text = [], [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [value for key, value in attrs if key in ("src", "href", "srcset", "data", "action")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def scores(seeds=3, questions=200, **shares):
    """Of variants with those shares of right answers, by kind."""
    made = {}
    for name, share in shares.items():
        luck = np.random.default_rng(0).random((seeds, questions))  # the same for all
        hits = 100.0 * (luck < share)
        made[name] = {"all": hits, "count": hits[:, ::2], "blank image": 100.0 * (luck[:, :50] < 0.3)}
    return made


def found_of(made, costs=None, **changes):
    seeds = tuple(range(len(next(iter(next(iter(made.values())).values())))))
    outcomes = {name: Outcome(by_kind) for name, by_kind in made.items()}
    return findings(make_study.study(seeds=seeds, **changes), outcomes, costs or {})


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report, one of whose runs failed: its folder, findings and cells."""
    out = tmp_path_factory.mktemp("report")
    study = make_study.study(variants=(*make_study.VALUES["variants"], ("avg_pool", ("model.fusion.fusion=avg_pool",))))
    every = cells(study, out / "cells")
    for cell in every:
        make_study.finish(cell, share={"mlp": 0.5, "stf": 0.9, "fastv": 0.52, "avg_pool": 0.1}[cell.variant.name])
    done = [cell for cell in every if cell.variant.name != "avg_pool"]
    why = "ended with status 2: error: <b>`x`</b> & more"
    failed = {cell: why for cell in every if cell.variant.name == "avg_pool" and cell.seed == 1}
    costs = {name: json.loads((out / "cells" / name / "seed_0" / "cost.json").read_text()) for name in by_variant(done)}
    found = findings(study, by_variant(done), costs)
    write_report(found, done, failed, "python -m stf_jax.ablate --config=x --out='a b'", out)
    return out, found, done


def test_all_its_files_are_there(written):
    out, _, _ = written
    names = [*(f"report.{kind}" for kind in ("md", "html", "json")), *(f"{name}.png" for name in PICTURES)]
    assert sorted(path.name for path in out.iterdir() if path.is_file()) == sorted(names)
    for name in PICTURES:
        with PIL.Image.open(out / f"{name}.png") as image:
            pixels = np.asarray(image.convert("L"))
        assert image.width > 400
        assert (pixels < 128).sum() > 500  # something is drawn
        assert f"]({name}.png)" in (out / "report.md").read_text()


def test_the_page_needs_no_other_file(written):
    out, _, _ = written
    read = Page((out / "report.html").read_text())
    assert read.open == []
    assert len(read.references) == len(PICTURES)
    assert all(reference.startswith("data:image/png;base64,") for reference in read.references)
    assert "url(" not in (out / "report.html").read_text()
    assert set(read.tags).isdisjoint(["script", "link", "b", "fusions"])  # what names and logs say is text
    assert read.text.count("Two <fusions> & a rival") == 2
    assert "error: <b>x</b> & more" in read.text
    assert "*" not in read.text


def test_it_says_how_to_repeat_it(written):
    out, _, done = written
    text = (out / "report.md").read_text()
    assert "python -m stf_jax.ablate --config=x --out='a b'" in text
    assert "Seeds 0, 1; 4 training runs, whose steps took 8 min together and 2 min at most." in text
    assert "| stf | `model.fusion.fusion=stf` |" in text
    assert "| fastv | runs of mlp, asked with `--reduce=fastv` |" in text
    commands = json.loads((out / "report.json").read_text())["commands"]
    assert set(commands) == {cell.name for cell in done}
    assert commands["stf, seed 1"].startswith("python -m stf_jax.main --config=")


def test_variants_that_lack_runs_are_left_out_and_told_of(written):
    out, _, _ = written
    text = (out / "report.md").read_text()
    assert "**Not all runs ended well.** Variants that lack one are left out." in text
    assert "- avg_pool, seed 1: ended with status 2" in text
    figures = json.loads((out / "report.json").read_text())
    assert list(figures["quality"]) == ["mlp", "stf", "fastv"]
    assert list(figures["differences"]) == ["stf", "fastv"]


def test_its_figures_are_those_of_the_answers(written):
    out, found, done = written
    figures = json.loads((out / "report.json").read_text(), parse_constant=pytest.fail)  # no NaN
    for cell in done:
        accuracy = json.loads((cell.folder / "results.json").read_text())["metrics"]["accuracy"]
        assert figures["by_seed"][cell.variant.name]["all"][cell.seed] == pytest.approx(100 * accuracy)
    stf, mlp = (figures["by_seed"][name]["all"] for name in ("stf", "mlp"))
    one = figures["differences"]["stf"]["all"]
    assert one["value"] == pytest.approx(np.mean(stf) - np.mean(mlp))
    assert one["within_noise"] is False
    assert one["low"] > 20
    assert figures["quality"]["stf"]["all"]["value"] == pytest.approx(np.mean(stf))
    assert figures["deviation"]["stf"]["value"] == pytest.approx(np.std(stf, ddof=1))
    assert figures["cost"] == found.costs
    row = next(line for line in (out / "report.md").read_text().splitlines() if line.startswith("| stf | 36 |"))
    assert row.split("|")[3].strip().startswith(f"{np.mean(stf):.1f} ± ")


def test_what_is_only_asked_has_no_step(written):
    out, _, _ = written
    row = next(
        line for line in (out / "report.md").read_text().splitlines() if line.startswith("| fastv | 36 | 33,024 ")
    )
    assert [cell.strip() for cell in row.split("|")[4:7]] == ["", "", ""]


def test_noise_is_called_noise():
    made = scores(mlp=0.5, better=0.8, worse=0.2, same=0.5)
    made["same"]["all"] = np.random.default_rng(1).permuted(made["same"]["all"], axis=1)
    names = ("mlp", "better", "worse", "same")
    variants = tuple((name, ("model.fusion.fusion=mlp",)) for name in names)
    found = found_of(made, variants=variants, asked=())
    said = dict(zip(names[1:], verdicts(found), strict=True))
    assert said["better"].startswith("better is better than mlp: +3")
    assert said["worse"].startswith("worse is worse than mlp: -2")
    assert said["same"].endswith("**within noise**.")
    assert "noise" not in said["better"] + said["worse"]


def test_what_is_shown_to_be_equal_is_called_so():
    luck = np.random.default_rng(0).random((5, 4000))
    hits, lucky = 100.0 * (luck < 0.8), np.array([[0.76], [0.79], [0.8], [0.81], [0.84]])
    made = {name: {"all": hits.copy()} for name in ("mlp", "same", "bit_worse", "unclear")}
    made["same"]["all"][:, :40] = np.random.default_rng(1).permuted(hits[:, :40], axis=1)
    made["bit_worse"]["all"][:, :60] = 0
    made["unclear"]["all"] = 100.0 * (np.random.default_rng(2).random((5, 4000)) < lucky)
    variants = tuple((name, ("model.fusion.fusion=mlp",)) for name in made)
    found = found_of(made, variants=variants, asked=(), margin=2)
    said = dict(zip(list(made)[1:], verdicts(found), strict=True))
    assert said["same"].startswith("same and mlp are **equal within 2 points**: ")
    assert said["bit_worse"].startswith("bit_worse is worse than mlp, by less than 2 points: -1.")
    assert said["unclear"].endswith("**within noise**.")


def test_what_could_be_found_is_said(written):
    out, found, _ = written
    lines = (out / "report.md").read_text().splitlines()
    detectable = {name: by_kind["all"].detectable() for name, by_kind in found.differences.items()}
    row = next(line for line in lines[lines.index("## What it could find") :] if line.startswith("| all |"))
    low, high = (f"{end(detectable.values()):.1f}" for end in (min, max))
    assert [cell.strip() for cell in row.split("|")[2:5:2]] == [low, high]
    figures = json.loads((out / "report.json").read_text())
    assert figures["differences"]["stf"]["all"]["detectable"] == pytest.approx(detectable["stf"])
    assert (figures["margin"], figures["kind_margin"]) == (2, 5)


def test_a_variant_under_another_name_is_a_control(tmp_path):
    study = make_study.study(repeated=(("again", ("mlp",)),), seeds=(0, 1, 2))
    every = cells(study, tmp_path)
    for cell in every:
        make_study.finish(cell, share=0.5, questions=200)
    said = verdicts(findings(study, by_variant(every), {}))
    assert said[-1] == "Control: again is mlp from other seeds; no difference is significant."
    for cell in every:
        if cell.variant.name == "again":
            make_study.finish(cell, share=0.9, questions=200)
    said = verdicts(findings(study, by_variant(every), {}))
    assert re.fullmatch("Control: again is mlp from other seeds; by chance they differ in all, .*", said[-1])


def test_print_is_drawn_and_listed_by_height(tmp_path):
    study = make_study.study(asked=())
    every = cells(study, tmp_path)
    made = {}
    for name, shares in (("mlp", (0.2, 0.9)), ("stf", (0.1, 0.8))):
        luck = np.random.default_rng(0).random((2, 100))
        heights = {height: 100.0 * (luck < share) for height, share in zip((5, 22), shares, strict=True)}
        made[name] = Outcome({"all": np.concatenate(list(heights.values()), axis=1)}, heights)
    found = findings(study, made, {})
    write_report(found, every, {}, "command", tmp_path)
    assert "| stf | " in (tmp_path / "report.md").read_text().partition("## By height of print")[2].partition("##")[0]
    figures = json.loads((tmp_path / "report.json").read_text())
    assert figures["heights"]["stf"]["22"]["value"] == pytest.approx(made["stf"].heights[22].mean())
    fewer = made["stf"].heights[5].mean() - made["mlp"].heights[5].mean()
    assert figures["height_differences"]["stf"]["5"]["value"] == pytest.approx(fewer)
    (axes,) = plots._heights(found).axes
    assert [line.get_text() for line in axes.get_legend().get_texts()] == ["mlp", "stf"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["5", "22"]
    assert (tmp_path / "heights.png").exists()


def test_one_seed_of_one_figure_is_no_finding():
    made = {name: {"pope/f1": np.array([[share]])} for name, share in (("mlp", 50.0), ("stf", 90.0))}
    found = found_of(made, asked=())
    assert verdicts(found) == ["stf against mlp: one seed and one figure tell nothing of noise."]


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_report_of_little_is_one(tmp_path, seeds):
    """One seed or figures that do not vary, no costs, one kind of question."""
    made = {name: {"pope/f1": np.full((seeds, 1), share)} for name, share in (("mlp", 0.1), ("stf", 0.7))}
    found = found_of(made, asked=())
    write_report(found, cells(found.study, tmp_path), {}, "command", tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"quality.png", "differences.png"}
    figures = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert figures["quality"]["stf"]["pope/f1"]["value"] == pytest.approx(0.7)
    assert (figures["quality"]["stf"]["pope/f1"]["low"] is None) == (seeds == 1)
    assert "nan" not in (tmp_path / "report.md").read_text()


def test_without_the_baseline_nothing_is_compared(tmp_path):
    made = scores(stf=0.5)
    found = found_of(made, asked=())
    assert found.differences == {}
    assert verdicts(found) == []
    write_report(found, cells(found.study, tmp_path)[1:2], {}, "command", tmp_path)
    assert "Differences" not in (tmp_path / "report.md").read_text()
    assert Page((tmp_path / "report.html").read_text()).open == []


def test_a_kind_by_itself_may_differ():
    made = scores(mlp=0.5, stf=0.5)
    made["stf"]["count"] = np.full_like(made["stf"]["count"], 100)
    one = found_of(made, asked=()).differences["stf"]
    assert one["all"].value == 0
    assert one["all"].noise
    assert one["count"].low > 0
    assert not any(math.isnan(end) for end in dataclasses.astuple(one["count"]))


def test_both_pages_have_all_blocks(tmp_path):
    PIL.Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    blocks = [
        Heading("<One>"),
        Text("of `a<b` and **c**"),
        Items(["d", "e"]),
        Code("f <g>"),
        Table(["", "h"], [["i", "`j|k`"]]),
        Image(tmp_path / "a.png", 'l "m"'),
    ]
    written = markdown("T & U", blocks)
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
    assert set(lines) <= set(written.splitlines())
    assert r"| i | `j\|k` |" in written
    read = Page(page("T & U", blocks))
    assert read.open == []
    for tag in ("h1", "h2", "p", "code", "strong", "ul", "li", "pre", "table", "img"):
        assert tag in read.tags
    for text in ("<One>", "of a<b and c", "f <g>", "j|k"):
        assert text in read.text
    assert plain("of `a` and **c**") == "of a and c"


@pytest.mark.parametrize("count", [1, 2, 12])
def test_no_name_lies_on_another_in_the_image_of_costs(count):
    names = [f"variant_{i}" for i in range(count)]
    made = scores(**dict.fromkeys(names, 0.5))  # at one height, and near each other
    costs = {name: {"prefill_gflops": 1 + i // 3 / 100, "step_gflops": 2.0} for i, name in enumerate(names)}
    variants = tuple((name, ("model.fusion.fusion=mlp",)) for name in names)
    figure = plots._cost(found_of(made, costs, variants=variants, baseline=names[0], asked=()))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    for axes in figure.axes:
        assert sorted(text.get_text() for text in axes.texts) == sorted(names)
        whole = axes.get_window_extent()
        # Of the text alone, without its line.
        boxes = [matplotlib.text.Text.get_window_extent(text, canvas.get_renderer()) for text in axes.texts]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        assert all(whole.x0 < box.x0 and box.x1 < whole.x1 for box in boxes)
        assert all(whole.y0 < box.y0 and box.y1 < whole.y1 for box in boxes)
