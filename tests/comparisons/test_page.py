"""The page of a comparison in a real browser: no errors or requests, tables sort, plots show, and phones show it."""

import make_results
import numpy as np
import pytest

from stf_jax import compare
from stf_jax.cli import run_command

NARROW, WIDE = 400, 1200


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a comparison with all its parts."""
    root, rng = tmp_path_factory.mktemp("page"), np.random.default_rng(0)
    costs = {"full": (576, 90.5), "resize": (144, 30.25), "pruned-with-a-long-name": (1152, 120.0)}
    paths = []
    for index, (name, (tokens, ms)) in enumerate(costs.items()):
        scores = {task: (rng.random(60) < 0.8 - 0.2 * index).astype(float).tolist() for task in ("gqa", "pope")}
        cost = {"image_tokens": tokens, "first_token_ms": ms, "first_token_rows": 1, "device": "a <device>"}
        paths.append(str(make_results.write(root / name, scores, cost=cost)))
    unknown = make_results.write(root / "unknown", scores, asking={})
    status = run_command(compare.main, [*paths, str(unknown), "--resized=resize", f"--out={root / 'out'}"])
    assert status == 0
    return root / "out" / "compare.html"


def test_there_are_no_errors_and_no_requests(page, chromium):
    chromium.requests.clear()
    chromium.open(page, WIDE)
    assert chromium.evaluate("document.title") == "Comparison with full"
    assert chromium.errors == []
    assert chromium.requests == [page.as_uri()]


def test_tables_sort(page, chromium):
    chromium.open(page, WIDE)

    def click(column):
        chromium.evaluate(f'document.querySelectorAll("table")[0].tHead.rows[0].cells[{column}].firstChild.click()')
        rows = '[...document.querySelectorAll("table")[0].tBodies[0].rows]'
        return chromium.evaluate(f"{rows}.map(row => row.cells[0].textContent)")

    long = "pruned-with-a-long-name"
    heads = '[...document.querySelectorAll("table")[0].tHead.rows[0].cells].map(cell => cell.textContent)'
    tokens = chromium.evaluate(heads).index("image tokens")
    assert click(0) == ["full", long, "resize", "unknown"]
    assert click(0) == ["unknown", "resize", long, "full"]
    assert click(tokens) == [long, "full", "resize", "unknown"]  # 1,152 is more than 576; unknown comes last
    assert click(tokens) == ["resize", "full", long, "unknown"]
    sorts = chromium.evaluate('[...document.querySelectorAll("th[aria-sort]")].map(head => head.ariaSort)')
    assert sorts == ["ascending"]


def test_plots_show(page, chromium):
    chromium.open(page, NARROW)
    sizes = chromium.evaluate(
        '[...document.querySelectorAll("svg")].map(svg => [svg.getBoundingClientRect().width, '
        "svg.getBoundingClientRect().height, svg.textContent.includes('resize')])"
    )
    assert len(sizes) == 6  # tokens and milliseconds, for the mean and two benchmarks
    assert all(300 < width <= NARROW and height > 200 and named for width, height, named in sizes)


@pytest.mark.parametrize("dark", [False, True])
def test_a_narrow_screen_shows_all_without_horizontal_overflow(page, chromium, dark):
    chromium.open(page, NARROW, dark)
    assert chromium.evaluate("document.documentElement.scrollWidth") <= NARROW
    size = chromium.evaluate('parseFloat(getComputedStyle(document.querySelector("td")).fontSize)')
    assert size >= 14
    ink, paper = chromium.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
        ".map(color => color.match(/[0-9]+/g).slice(0, 3).reduce((sum, x) => sum + Number(x), 0))"
    )
    assert (ink > paper + 400) if dark else (paper > ink + 400)
    text = chromium.evaluate('getComputedStyle(document.querySelector("svg text")).fill')
    assert text == chromium.evaluate("getComputedStyle(document.body).color")  # plots take the page's color
