"""The pages of looks in a real browser: tokens are clicked, keys and screens work, and nothing is loaded."""

import dataclasses
import json
import re
import time

import browser
import numpy as np
import PIL.Image
import pytest
from etils import epath

from stf_jax.looking.drawing import find_owners, patch_values
from stf_jax.looking.look import Look
from stf_jax.looking.page import describe_layers, disagreement, sort_by_disagreement, write_pages
from stf_jax.models.reducers.base import Reduction, Stage

NARROW, WIDE = 400, 1200
SIDE, LAYERS = 6, 3
QUESTION, ANSWER = "What </script> is it?", "a <b>cat</b>"


def make_look(name, answer=ANSWER, *, sources=None, taps=(8, 4), reduction=None, probability=0.9):
    """A look with random maps; by default of windows of 2×2."""
    rng = np.random.default_rng(0)
    if sources is None:
        half = np.kron(np.eye(SIDE // 2), np.ones(2) / 2)
        sources = np.kron(half, half)
    tokens, reads = len(sources), np.ones((LAYERS, len(sources)), bool)
    reduction = reduction or Reduction("", tokens, tokens)
    if reduction.stages:
        reads[1:, reduction.stages[0].keep :] = False
    return Look(
        name=name,
        question=QUESTION,
        answer=answer,
        pieces=["", *answer.split(" "), ""],
        probabilities=np.array([1.0, *[probability] * len(answer.split(" ")), 1.0]),
        blank_answer="nothing",
        blank_probability=0.001,
        milliseconds=12.34,
        reduction=reduction,
        pixels=rng.integers(0, 256, (8 * SIDE, 8 * SIDE, 3), np.uint8),
        grid=(SIDE, SIDE),
        tiles=None,
        patches=SIDE**2,
        taps=taps,
        sources=sources,
        stated=True,
        movement=rng.random((tokens, len(taps), SIDE**2)) * (sources > 0)[:, None],
        attention=rng.random((LAYERS, len(answer.split(" ")) + 2, tokens)) / tokens,
        dependence=np.eye(tokens)[[min(4, tokens - 1)] * (len(answer.split(" ")) + 2)],
        reads=reads,
    )


LOOKS = {
    "cat.png": [
        make_look("windows"),
        make_look("dropped", "no", reduction=Reduction("fastv", 9, 4, None, (Stage(1, 4),))),
        make_look("a few patches", sources=np.eye(SIDE**2)[[0, 3, 20, 21]], taps=(7,)),
    ],
    "index.png": [make_look(name) for name in ("windows", "dropped", "a few patches")],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("looks")
    assert write_pages(LOOKS, epath.Path(out)) == epath.Path(out) / "index.html"
    return out


@pytest.fixture
def page(folder, chromium):
    chromium.requests.clear()
    open_page(chromium, folder / "cat.html", WIDE)
    return chromium


def open_page(chromium, file, width, dark=False):
    """Opens a page, and waits until it has drawn, which is after it is loaded."""
    chromium.open(file, width, dark)
    deadline = time.monotonic() + 20
    while not text(chromium, "#token-text"):
        assert time.monotonic() < deadline


def text(page, selector):
    return page.evaluate(f"document.querySelector({json.dumps(selector)}).textContent")


def click_patch(page, row, column):
    page.evaluate(f"""(() => {{
        const canvas = document.getElementById("tokens"), box = canvas.getBoundingClientRect();
        canvas.dispatchEvent(new MouseEvent("click", {{bubbles: true,
            clientX: box.left + ({column} + .5) * box.width / {SIDE},
            clientY: box.top + ({row} + .5) * box.height / {SIDE}}}));
    }})()""")
    return text(page, "#token-text")


def press(page, key):
    page.evaluate('document.getElementById("tokens").focus()')
    for kind in ("keyDown", "keyUp"):
        page.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)
    return text(page, "#token-text")


def test_it_shows_texts_as_they_are_and_loads_nothing(page, folder):
    assert text(page, "h1") == QUESTION
    assert text(page, "#methods b") == ANSWER
    card = r"81% sure9 tokens: made of 36 patches12\.3 msblank image: nothing; this answer <1%"
    assert re.search(card, text(page, "#methods"))
    assert page.errors == []
    assert [url for url in page.requests if not url.startswith("data:")] == [(folder / "cat.html").as_uri()]
    assert {file.name for file in folder.iterdir()} == {
        "index.html",
        *(f"{page}.html" for page in ("cat", "index-2")),
        *(
            f"{page}-{method}-{kind}.png"
            for page in ("cat", "index-2")
            for method in ("windows", "dropped", "a-few-patches")
            for kind in ("tokens", "answer")
        ),
    }


def test_tokens_are_chosen_by_clicks_and_arrows(page):
    assert text(page, "#token-text").startswith("Token 5 of 9")  # on which the answer depends
    assert click_patch(page, 1, 5) == "Token 3 of 9: made of 4 patches in equal shares."
    assert press(page, "ArrowDown").startswith("Token 6 ")
    assert press(page, "ArrowLeft").startswith("Token 5 ")
    assert press(page, "ArrowUp").startswith("Token 2 ")
    assert press(page, "ArrowUp").startswith("Token 2 ")  # the border
    page.evaluate('document.querySelectorAll("#methods button")[1].click()')
    assert text(page, "#token-text").startswith("Token 2 of 9")  # at the same place
    assert click_patch(page, 5, 5) == "Token 9 of 9: made of 4 patches in equal shares; read by layer 1 of 3."
    page.evaluate('document.querySelectorAll("#methods button")[2].click()')
    assert click_patch(page, 0, 0) == "Token 1 of 4: made of one patch."
    assert press(page, "ArrowRight").startswith("Token 2 ")  # over two dropped patches
    assert click_patch(page, 5, 5) == "No token is made of this patch."
    assert page.errors == []


def test_maps_are_drawn_where_the_dependence_is(page):
    """The map of the answer has the accent color at the token that it depends on, and none elsewhere."""
    colors = page.evaluate(f"""(() => {{
        const canvas = document.getElementById("answer"), side = canvas.width / {SIDE};
        const {{data}} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        return Array.from({{length: {SIDE**2}}}, (_, p) => {{
            const x = Math.floor((p % {SIDE} + .5) * side), y = Math.floor((Math.floor(p / {SIDE}) + .5) * side);
            return [...data.slice(4 * (y * canvas.width + x)).slice(0, 3)];
        }});
    }})()""")
    colored = [p for p, (red, green, _) in enumerate(colors) if red - green > 60]
    assert colored == list(np.flatnonzero(LOOKS["cat.png"][0].sources[4]))
    shares = page.evaluate('[...document.querySelectorAll("#taps .number")].map(x => parseInt(x.textContent))')
    moved = LOOKS["cat.png"][0].movement[4].sum(-1)
    assert shares == [round(100 * share) for share in (moved / moved.sum())[::-1]]  # block 4, then block 8
    page.evaluate('document.querySelector("#taps button").focus()')
    assert page.evaluate("document.activeElement.textContent").startswith("block 4")
    page.evaluate('document.querySelector("[data-use=attention]").click()')
    page.evaluate('document.getElementById("layer").value = 2')
    page.evaluate('document.getElementById("layer").dispatchEvent(new Event("input"))')
    share = LOOKS["cat.png"][0].attention[1, 1:3].sum(-1).mean()
    assert f"gives {100 * share:.0f}% of its attention" in text(page, "#answer-text")
    assert text(page, "#layer-text") == "layer 2 of 3"


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize(("name", "opened"), [("cat", open_page), ("index", browser.Browser.open)])
def test_a_narrow_screen_shows_all_without_horizontal_overflow(folder, chromium, name, opened, dark):
    opened(chromium, folder / f"{name}.html", NARROW, dark)
    assert chromium.evaluate("document.documentElement.scrollWidth") <= NARROW
    ink, paper = chromium.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
        ".map(color => color.match(/[0-9]+/g).slice(0, 3).reduce((sum, x) => sum + Number(x), 0))"
    )
    assert (ink > paper + 400) if dark else (paper > ink + 400)


def test_a_thousand_quick_clicks_leave_it_working(page):
    page.evaluate("""(() => {
        let seed = 1;
        const canvas = document.getElementById("tokens"), box = canvas.getBoundingClientRect();
        for (let i = 0; i < 1000; i++) {
            seed = seed * 48271 % 2147483647;
            const buttons = [...document.querySelectorAll("button")], at = seed % (buttons.length + 1);
            if (at < buttons.length) buttons[at].click();
            else canvas.dispatchEvent(new MouseEvent("click", {clientX: box.left + seed % 400, clientY: box.top}));
        }
        document.querySelectorAll("#methods button")[0].click();
    })()""")
    assert click_patch(page, 0, 0).startswith("Token 1 of 9")
    assert page.errors == []


def test_the_index_lists_disagreements_first(folder, chromium):
    chromium.open(folder / "index.html", WIDE)
    titles = chromium.evaluate('[...document.querySelectorAll("h2")].map(title => title.textContent)')
    assert titles == ["cat.png", "index.png"]
    assert disagreement(LOOKS["cat.png"]) == 2 / 3
    assert disagreement(LOOKS["index.png"]) == 0
    single = {str(p): [make_look("x", probability=p)] for p in (0.9, 0.2, 0.5)}
    assert sort_by_disagreement(single) == ["0.2", "0.5", "0.9"]


def test_tokens_of_tiles_and_those_that_end_their_rows_are_shown(tmp_path, chromium):
    """Three squares of 2×2 patches in a row, the thumbnail apart, and a newline token after the tiles' second row."""
    places = [0, 1, 7, 8, 3, 4, 5, 6, 10, 11, 12, 13]
    sources = np.zeros((len(places) + 1, 2 * 7))
    sources[range(len(places)), places] = 1
    tokens = len(sources)
    made = dataclasses.replace(
        make_look("tiles", sources=np.eye(SIDE**2)[:tokens]),
        **{"sources": sources, "grid": (2, 7), "tiles": (1, 2), "patches": 12, "stated": False},
        movement=np.ones((tokens, 2, 14)) * sources[:, None],
        pixels=np.zeros((16, 56, 3), np.uint8),
        dependence=np.eye(tokens)[[tokens - 1] * 4],
    )
    open_page(chromium, write_pages({"wide.png": [made]}, epath.Path(tmp_path)), WIDE)
    assert "13 tokens: of 12 patches of a thumbnail and 1×2 tiles" in text(chromium, "#methods")
    assert text(chromium, "#token-text") == "Token 13 of 13: the end of a row of tiles, made of no patch."
    assert press(chromium, "ArrowRight") == "Token 1 of 13: made of one patch (by gradient)."
    assert press(chromium, "ArrowRight").startswith("Token 2 ")
    assert press(chromium, "ArrowRight").startswith("Token 5 ")  # over the gap
    assert chromium.errors == []


def test_layers_that_read_a_token_are_named():
    names = {"1111": "", "1100": "layers 1 to 2", "0100": "layer 2", "1011": "layers 1, 3 to 4", "0000": "no layer"}
    assert {key: describe_layers(np.array([*map(int, key)])) for key in names} == names


def test_values_of_tokens_keep_their_sum_on_patches():
    look = LOOKS["cat.png"][2]
    values = np.array([1.0, 2.0, 3.0, 4.0])
    assert patch_values(look, values).sum() == 10
    assert patch_values(look, values)[[0, 3, 20, 21]].tolist() == [1, 2, 3, 4]
    assert [p for p, owner in enumerate(find_owners(look)) if owner >= 0] == [0, 3, 20, 21]


def test_images_have_the_color_where_the_answer_depends(folder):
    pixels = np.asarray(PIL.Image.open(folder / "cat-windows-answer.png"), float)
    red_over_green = (pixels[..., 0] - pixels[..., 1]).reshape(SIDE, 80, SIDE, 80).mean((1, 3)).reshape(-1)
    assert set(np.flatnonzero(red_over_green > 60)) == set(np.flatnonzero(LOOKS["cat.png"][0].sources[4]))
