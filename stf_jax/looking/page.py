"""Writes looks as self-contained HTML pages, one per image, with PNGs beside them and an index."""

import base64
import html
import io
import itertools
import json
import pathlib
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
from etils import epath

from stf_jax.files import as_user_error, make_folder, move_file
from stf_jax.looking.look import Look
from stf_jax.models.reducers.base import PatchReducer

INDEX = "index.html"
_PNG_SIDE = 480  # pixels, at least
_ACCENT = (214, 0, 110)  # of what a map shows, as in the page's style
_FADED = 0.5  # of the image's contrast beneath a map


def write_pages(looks: Mapping[str, Sequence[Look]], out: epath.Path) -> epath.Path:
    """Writes a page for each image, and an index if there are several; returns the file to open.

    Args:
      looks: by the name of the image file, at least one each: one method after another.
      out: the folder, which is created if it does not exist.

    Raises:
      UserError: the folder cannot be written.
    """
    pages = dict(zip(looks, _unique_names(pathlib.PurePath(image).stem for image in looks), strict=True))
    with tempfile.TemporaryDirectory() as local, as_user_error(out):
        folder = pathlib.Path(local)
        for image, name in pages.items():
            for look, method in zip(looks[image], _unique_names(look.name for look in looks[image]), strict=True):
                draw_tokens(look).save(folder / f"{name}-{method}-tokens.png")
                draw_answer(look).save(folder / f"{name}-{method}-answer.png")
            text = render_page(image, looks[image], index=INDEX if len(pages) > 1 else "")
            (folder / f"{name}.html").write_text(text, encoding="utf-8")
        first = f"{next(iter(pages.values()))}.html"
        if len(pages) > 1:
            first, order = INDEX, sort_by_disagreement(looks)
            text = render_index({pages[image]: (image, looks[image]) for image in order})
            (folder / INDEX).write_text(text, encoding="utf-8")
        make_folder(out)
        for file in sorted(folder.iterdir()):
            move_file(file, out / file.name)
    return out / first


def disagreement(looks: Sequence[Look]) -> float:
    """The share of pairs of methods with different answers; of one method, 1 minus the probability of its answer."""
    if len(looks) == 1:
        return 1 - looks[0].probability
    answers = [look.answer.strip().lower() for look in looks]
    pairs = list(itertools.combinations(answers, 2))
    return sum(a != b for a, b in pairs) / len(pairs)


def sort_by_disagreement(looks: Mapping[str, Sequence[Look]]) -> list[str]:
    """The images, those first on which methods disagree most; among equals, the least certain answers first."""

    def key(image: str) -> tuple[float, float]:
        return -disagreement(looks[image]), min(look.probability for look in looks[image])

    return sorted(looks, key=key)


def describe_reduction(look: Look) -> str:
    """Says in a few words what became of the image's patches and tokens."""
    reduction, patches = look.reduction, look.grid[0] * look.grid[1]
    if reduction.stages:
        return ", ".join(f"{stage.keep} after layer {stage.after}" for stage in reduction.stages)
    if isinstance(reduction.reducer, PatchReducer) and patches < reduction.tokens:
        return f"the image reduced to {look.pixels.shape[1]}×{look.pixels.shape[0]} pixels"
    if lost := int((look.sources.max(0) == 0).sum()):
        return f"{lost} of {patches} patches dropped"
    return f"made of {patches} patches" if reduction.slots < patches else "one for each patch"


def patch_values(look: Look, values: np.ndarray) -> np.ndarray:
    """Spreads values of tokens [S] over the patches that they are made of, float64 [P]; their sum stays the same."""
    return values.astype(np.float64) @ look.sources


def find_owners(look: Look) -> np.ndarray:
    """The token in which each patch has its largest share, int64 [P]; −1 for patches that no token is made of."""
    return np.where(look.sources.max(0) > 0, look.sources.argmax(0), -1)


def draw_tokens(look: Look) -> PIL.Image.Image:
    """Draws the image, with lines between tokens and what was dropped faded."""
    own, reaches_last = find_owners(look), np.asarray(look.reads.all(0))
    return _draw(look, np.zeros(len(own)), (own >= 0) & reaches_last[own])


def draw_answer(look: Look) -> PIL.Image.Image:
    """Draws what the answer depends on, all its tokens with text together, over the faded image."""
    with_text = [bool(piece.strip()) for piece in look.pieces]
    shown = with_text if any(with_text) else [True] * len(with_text)
    values = patch_values(look, _shares(look.dependence)[shown].sum(0))
    return _draw(look, values / max(values.max(), 1e-30), np.zeros(len(values), bool))


def _draw(look: Look, values: np.ndarray, shown: np.ndarray) -> PIL.Image.Image:
    """Draws a map [P] in 0..1 over the image, which is faded except for patches that are ``shown``."""
    rows, columns = look.grid
    side = -(-_PNG_SIDE // look.pixels.shape[0]) * look.pixels.shape[0] // rows  # of a patch

    def enlarge(x: np.ndarray) -> np.ndarray:
        return x.reshape(rows, columns, 1).repeat(side, 0).repeat(side, 1)

    size = (columns * side, rows * side)
    pixels = np.asarray(PIL.Image.fromarray(look.pixels).resize(size, PIL.Image.Resampling.NEAREST), np.float64)
    gray = 128 + _FADED * (pixels.mean(-1, keepdims=True) - 128)
    pixels = np.where(enlarge(shown), pixels, gray)
    alpha = 0.7 * enlarge(values)
    pixels = pixels * (1 - alpha) + np.array(_ACCENT) * alpha
    own = find_owners(look).reshape(rows, columns)
    below, right = own[1:] != own[:-1], own[:, 1:] != own[:, :-1]
    for row, column in zip(*np.nonzero(below), strict=True):
        pixels[(row + 1) * side - 1 : (row + 1) * side + 1, column * side : (column + 1) * side] = 255
    for row, column in zip(*np.nonzero(right), strict=True):
        pixels[row * side : (row + 1) * side, (column + 1) * side - 1 : (column + 1) * side + 1] = 255
    return PIL.Image.fromarray(pixels.round().astype(np.uint8))


def render_page(image: str, looks: Sequence[Look], index: str = "") -> str:
    """Renders the page of an image as HTML; ``index`` is the page to link back to, if any."""
    data = {"image": image, "question": looks[0].question, "methods": [_to_json(look) for look in looks]}
    back = f'<a href="{html.escape(index)}">all images</a> · ' if index else ""
    return _document(
        f"{image}: {looks[0].question}",
        _BODY.replace("{back}", back),
        f'<script type="application/json" id="data">{_embed(data)}</script><script>{_SCRIPT}</script>',
    )


def render_index(pages: Mapping[str, tuple[str, Sequence[Look]]]) -> str:
    """Renders the list of pages; ``pages``: by their names, the image and its looks, in order."""
    question = next(iter(pages.values()))[1][0].question
    several = any(len(looks) > 1 for _, looks in pages.values())
    cards = []
    for name, (image, looks) in pages.items():
        answers = "".join(
            f"<dt>{html.escape(look.name)}</dt><dd><b>{html.escape(look.answer) or '(empty)'}</b> "
            f"{_percent(look.probability)}</dd>"
            for look in looks
        )
        note = f"{_percent(disagreement(looks))} of pairs disagree" if several else ""
        cards.append(
            f'<a class="card" href="{html.escape(name)}.html"><img alt="" src="{_png(looks[0].pixels)}">'
            f"<div><h2>{html.escape(image)}</h2><dl>{answers}</dl><p>{note}</p></div></a>"
        )
    order = "The images on which methods disagree most come first." if several else "The least certain come first."
    body = f"<h1>{html.escape(question)}</h1><p>{len(pages)} images. {order}</p><main>{''.join(cards)}</main>"
    return _document(question, body, "")


def _to_json(look: Look) -> dict[str, Any]:
    by_layer = np.concatenate([look.attention.mean(0, keepdims=True), look.attention])
    by_tap, dependence = _shares(look.movement.sum(2)), _shares(look.dependence)
    return {
        "name": look.name,
        "answer": look.answer,
        "probability": look.probability,
        "blankAnswer": look.blank_answer,
        "blankProbability": look.blank_probability,
        "milliseconds": look.milliseconds,
        "tokens": look.reduction.slots,
        "reduction": describe_reduction(look),
        "grid": look.grid,
        "pixels": _png(look.pixels),
        "taps": list(look.taps),
        "tapShares": _round(by_tap),
        "stated": look.stated,
        "owners": find_owners(look).tolist(),
        "layersRead": look.reads.sum(0).tolist(),
        "layers": len(look.reads),
        "sources": _encode(look.sources, np.uint16),  # a token may be made of hundreds of patches
        "movement": _encode(look.movement.reshape(len(look.movement), -1)),
        "pieces": list(look.pieces),
        "probabilities": _round(look.probabilities),
        "attention": _encode(by_layer),
        "attentionScales": _round(by_layer.max(-1)),
        "toImage": _round(by_layer.sum(-1)),
        "dependence": _encode(dependence),
        "dependenceScales": _round(dependence.max(-1)),
    }


def _shares(values: np.ndarray) -> np.ndarray:
    """Values in shares of their sums over the last axis."""
    return values / np.maximum(values.sum(-1, keepdims=True), 1e-30)


def _round(values: np.ndarray) -> Any:
    return values.astype(np.float64).round(5).tolist()


def _encode(values: np.ndarray, dtype: type[np.unsignedinteger[Any]] = np.uint8) -> str:
    """Rows of values as whole numbers in base64, each row in shares of its largest value."""
    scaled = np.iinfo(dtype).max * (values / np.maximum(values.max(-1, keepdims=True), 1e-30))
    return base64.b64encode(scaled.round().astype(np.dtype(dtype).newbyteorder("<")).tobytes()).decode()


def _png(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _embed(value: Any) -> str:
    """JSON that cannot end the element of the page that it is in."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"


def _unique_names(names: Iterable[str]) -> list[str]:
    """File names made of texts, without suffixes, all different and none that of the index."""
    unique, taken = list[str](), {pathlib.PurePath(INDEX).stem}
    for name in names:
        base = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "image"
        candidates = itertools.chain([base], (f"{base}-{number}" for number in itertools.count(2)))
        unique.append(next(one for one in candidates if one.lower() not in taken))
        taken.add(unique[-1].lower())
    return unique


def _document(title: str, body: str, scripts: str) -> str:
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>{body}{scripts}</body></html>\n"
    )


_STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#1f2328, #e6edf3); --soft: light-dark(#59636e, #9198a1);
  --paper: light-dark(#fff, #0d1117); --panel: light-dark(#f6f8fa, #151b23); --line: light-dark(#d1d9e0, #3d444d);
  --accent: light-dark(#d6006e, #ff4fa3); }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 72rem;
  margin: 0 auto; padding: 1.5rem 1rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.1rem; margin: 0 0 .5rem; }
p { margin: .25rem 0; }
.soft, .soft a { color: var(--soft); }
button, input { font: inherit; color: inherit; }
[hidden] { display: none !important; }
button { background: none; border: 1px solid var(--line); border-radius: .5rem; padding: .35rem .7rem;
  min-height: 2.5rem; cursor: pointer; }
button:hover { border-color: var(--soft); }
button[aria-pressed=true], button[aria-checked=true] { border-color: var(--accent);
  box-shadow: inset 0 0 0 1px var(--accent); }
:focus-visible { outline: 3px solid light-dark(#0b63c5, #6cb6ff); outline-offset: 2px; }
#methods { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); gap: .75rem;
  margin: 1.25rem 0; }
#methods button { display: flex; flex-direction: column; text-align: left; padding: .7rem .9rem;
  background: var(--panel); }
#methods b { font-size: 1.5rem; line-height: 1.3; }
#methods span { font-size: .875rem; color: var(--soft); }
#methods .name { color: var(--ink); font-weight: 600; }
.meter { width: 100%; height: 4px; border-radius: 2px; background: var(--line); margin: .3rem 0 .4rem; }
.meter i { display: block; height: 100%; background: var(--accent); }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.5rem 2rem; }
section { margin: 0 0 1.5rem; min-width: 0; }
.stage { display: block; width: 100%; max-width: 30rem; border-radius: .4rem; touch-action: manipulation; }
#tokens { cursor: crosshair; }
.row { display: flex; flex-wrap: wrap; gap: .4rem; align-items: center; margin: .6rem 0; }
.bars { display: grid; grid-template-columns: auto 1fr auto; gap: 0 .6rem; max-width: 30rem; align-items: center;
  font-size: .875rem; }
.bars button { display: grid; grid-template-columns: subgrid; grid-column: 1 / -1; align-items: center;
  border: 0; padding: 0; min-height: 1.6rem; text-align: left; }
.bars .bar { height: 1.1rem; border-radius: 3px; background: var(--panel); }
.bars .bar i { display: block; height: 100%; border-radius: 3px; background: var(--accent); min-width: 1px; }
.bars button[aria-pressed=true] { font-weight: 700; color: var(--accent); box-shadow: none; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.piece { padding: .2rem .55rem; }
.piece small { display: block; color: var(--soft); font-size: .75rem; line-height: 1.1; }
input[type=range] { width: min(100%, 18rem); accent-color: var(--accent); min-height: 2.5rem; }
.scroll { overflow-x: auto; padding-bottom: .25rem; }
.scroll canvas { display: block; margin: .5rem 0; }
details { max-width: 44rem; margin-top: 1rem; }
.card { display: flex; gap: 1rem; padding: 1rem 0; border-top: 1px solid var(--line); color: inherit;
  text-decoration: none; }
.card img { width: 7rem; height: 7rem; flex: none; border-radius: .4rem; image-rendering: pixelated; }
.card:hover h2 { text-decoration: underline; }
.card p { color: var(--soft); font-size: .875rem; }
dl { display: grid; grid-template-columns: auto 1fr; gap: 0 .75rem; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; }
"""

_BODY = """
<header><h1 id="question"></h1><p class="soft">{back}<span id="image"></span></p></header>
<div id="methods" role="radiogroup" aria-label="Method"></div>
<div class="panels">
<section aria-labelledby="tokens-title">
<h2 id="tokens-title">What a token holds</h2>
<canvas id="tokens" class="stage" tabindex="0" role="application"
  aria-label="Image tokens: click one, or move with the arrow keys" aria-describedby="token-text"></canvas>
<div class="row"><button id="previous" aria-label="Previous token">‹</button>
<button id="next" aria-label="Next token">›</button>
<button data-map="sources" aria-pressed="true">Made of</button>
<button data-map="movement" aria-pressed="false">Moved by</button></div>
<p id="token-text" aria-live="polite"></p>
<div id="taps" class="bars"></div>
</section>
<section aria-labelledby="answer-title">
<h2 id="answer-title">What the answer uses</h2>
<canvas id="answer" class="stage" role="img" aria-label="Map of the answer"></canvas>
<div class="row" id="pieces"></div>
<div class="row"><button data-use="dependence" aria-pressed="true">Depends on</button>
<button data-use="attention" aria-pressed="false">Attends to</button></div>
<div class="row" id="layer-row" hidden><label for="layer" id="layer-text"></label>
<input id="layer" type="range" min="0" value="0"></div>
<p id="answer-text" aria-live="polite"></p>
</section>
</div>
<section aria-labelledby="strip-title">
<h2 id="strip-title">Does a letter fit a token?</h2>
<p class="soft" id="strip-text"></p>
<div class="scroll"><canvas id="strip-true" role="img" aria-label="Tokens at true size"></canvas></div>
<div class="scroll"><canvas id="strip-large" role="img" aria-label="Tokens, four times as large"></canvas></div>
</section>
<details><summary>What the maps mean</summary>
<p><b>Made of</b>: the patches whose states a token is computed from, and their shares.</p>
<p><b>Moved by</b>: the states that change the length of the token most if they change by a share of their own length,
by the block of the tower they come from. A state of a deep block has read all of the image, not only its own patch.</p>
<p><b>Depends on</b>: the image tokens that change the logit of a token of the answer most, in the same sense.</p>
<p><b>Attends to</b>: attention of the position that predicts the token, averaged over heads. Attention is not
importance: it may go to tokens that change nothing.</p>
<p>Colors are shares of the largest value of each map. docs/looking-inside.md says more.</p></details>
"""

_SCRIPT = r"""
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const find = id => document.getElementById(id);
const decode = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
const percent = x => x > 0 && x < .01 ? "<1%" : `${Math.round(100 * x)}%`;
const state = {method: 0, token: -1, map: "sources", tap: -1, piece: -1, use: "dependence", layer: 0};
let methods = [];

const make = (tag, text, name) => {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (name) element.className = name;
  return element;
};

async function setUp() {
  find("question").textContent = data.question;
  find("image").textContent = data.image;
  methods = data.methods.map((method, index) => {
    const image = new Image();
    image.src = method.pixels;
    const [rows, columns] = method.grid;
    return {...method, index, bitmap: image, patches: rows * columns,
      sources: new Uint16Array(decode(method.sources).buffer),
      movement: decode(method.movement), attention: decode(method.attention), dependence: decode(method.dependence)};
  });
  await Promise.all(methods.map(method => method.bitmap.decode()));
  for (const method of methods) {
    const card = make("button");
    card.setAttribute("role", "radio");
    const meter = make("div", undefined, "meter"), level = make("i");
    level.style.width = `${100 * method.probability}%`;
    meter.append(level);
    card.append(make("span", method.name, "name"), make("b", method.answer || "(empty)"), meter,
      make("span", `${percent(method.probability)} sure`),
      make("span", `${method.tokens} tokens: ${method.reduction}`),
      make("span", `${method.milliseconds.toPrecision(3)} ms`),
      make("span", `blank image: ${method.blankAnswer || "(empty)"}; this answer ${percent(method.blankProbability)}`));
    card.addEventListener("click", () => choose(method.index));
    find("methods").append(card);
  }
  find("methods").addEventListener("keydown", event => {
    const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
    if (!step) return;
    event.preventDefault();
    choose((state.method + step + methods.length) % methods.length);
    find("methods").children[state.method].focus();
  });
  listen();
  choose(0);
}

function choose(index) {
  const method = methods[index], before = methods[state.method], place = before.owners.indexOf(state.token);
  Object.assign(state, {method: index, tap: -1, piece: -1, layer: Math.min(state.layer, method.layers), token: -1});
  if (place >= 0) {  // the token at the same place as before
    const x = Math.floor((place % before.grid[1]) / before.grid[1] * method.grid[1]);
    const y = Math.floor(Math.floor(place / before.grid[1]) / before.grid[0] * method.grid[0]);
    state.token = method.owners[y * method.grid[1] + x];
  }
  if (state.token < 0) {  // or the one that the answer depends on most
    const values = answerValues(method, false);
    state.token = values.indexOf(Math.max(...values));
  }
  [...find("methods").children].forEach((card, i) => {
    card.setAttribute("aria-checked", i === index);
    card.tabIndex = i === index ? 0 : -1;
  });
  find("layer").max = method.layers;
  find("layer").value = state.layer;
  find("pieces").replaceChildren(...[-1, ...method.pieces.keys()].map(piece => {
    const text = piece < 0 ? "whole answer" : method.pieces[piece].trim() ||
      (piece === method.pieces.length - 1 ? "(end)" : "(no text)");
    const button = make("button", text, "piece");
    if (piece >= 0) button.append(make("small", percent(method.probabilities[piece])));
    button.dataset.piece = piece;
    button.addEventListener("click", () => { state.piece = piece; draw(); });
    return button;
  }));
  draw();
}

// Values of the selected token at each patch, in shares of the largest.
function tokenMap(method) {
  const {patches} = method, taps = method.taps.length, out = new Float64Array(patches);
  if (state.map === "sources") {
    for (let p = 0; p < patches; p++) out[p] = method.sources[state.token * patches + p];
  } else {
    const start = state.token * taps * patches;
    for (let tap = 0; tap < taps; tap++) if (state.tap < 0 || state.tap === tap)
      for (let p = 0; p < patches; p++) out[p] += method.movement[start + tap * patches + p];
  }
  return scale(out);
}

function scale(values) {
  const largest = Math.max(...values) || 1;
  return values.map(x => x / largest);
}

// The tokens of the answer that are shown: one, or all that have text.
function shownPieces({pieces}) {
  if (state.piece >= 0) return [state.piece];
  const all = [...pieces.keys()], withText = all.filter(piece => pieces[piece].trim());
  return withText.length ? withText : all;
}

// The sum of the shown pieces' maps, of each image token.
function answerValues(method, attends) {
  const {tokens} = method, values = new Float64Array(tokens);
  const [source, scales] = attends ? [method.attention, method.attentionScales[state.layer]]
    : [method.dependence, method.dependenceScales];
  const first = attends ? state.layer * method.pieces.length : 0;
  for (const piece of shownPieces(method))
    for (let s = 0; s < tokens; s++) values[s] += scales[piece] * source[(first + piece) * tokens + s];
  return values;
}

// The same, spread over the patches that each token is made of.
function answerMap(method) {
  const {tokens, patches} = method, out = new Float64Array(patches);
  const values = answerValues(method, state.use === "attention");
  for (let s = 0; s < tokens; s++) {
    let total = 0;
    const row = s * patches;
    for (let p = 0; p < patches; p++) total += method.sources[row + p];
    if (total) for (let p = 0; p < patches; p++) out[p] += values[s] * method.sources[row + p] / total;
  }
  return scale(out);
}

function paint(canvas, method, values, selected) {
  const [rows, columns] = method.grid, width = canvas.clientWidth, ratio = devicePixelRatio || 1;
  canvas.style.aspectRatio = `${columns} / ${rows}`;
  const cell = width * ratio / columns, accent = resolve("var(--accent)");
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(cell * rows);
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.fillStyle = "#808080";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.filter = "grayscale(1)";
  context.globalAlpha = .5;
  const size = [method.bitmap.naturalWidth / columns, method.bitmap.naturalHeight / rows].map(Math.floor);
  context.drawImage(method.bitmap, 0, 0, size[0] * columns, size[1] * rows, 0, 0, canvas.width, canvas.height);
  context.filter = "none";
  for (let p = 0; p < values.length; p++) {
    const x = p % columns, y = Math.floor(p / columns), owner = method.owners[p];
    const box = [Math.round(x * cell), Math.round(y * cell)];
    box.push(Math.round((x + 1) * cell) - box[0], Math.round((y + 1) * cell) - box[1]);
    if (selected && owner >= 0 && method.layersRead[owner] === method.layers) {
      context.globalAlpha = 1;  // what reaches the last layer keeps its colors
      context.drawImage(method.bitmap, x * size[0], y * size[1], size[0], size[1], ...box);
    }
    context.globalAlpha = (selected ? .45 : .7) * values[p];
    context.fillStyle = accent;
    context.fillRect(...box);
  }
  context.globalAlpha = 1;
  const lines = (differs, color, thickness) => {
    context.beginPath();
    for (let y = 0; y < rows; y++) for (let x = 0; x < columns; x++) {
      const p = y * columns + x;
      if (x + 1 < columns && differs(p, p + 1)) {
        context.moveTo((x + 1) * cell, y * cell);
        context.lineTo((x + 1) * cell, (y + 1) * cell);
      }
      if (y + 1 < rows && differs(p, p + columns)) {
        context.moveTo(x * cell, (y + 1) * cell);
        context.lineTo((x + 1) * cell, (y + 1) * cell);
      }
    }
    context.strokeStyle = color;
    context.lineWidth = thickness * ratio;
    context.stroke();
  };
  if (!selected) return;
  lines((a, b) => method.owners[a] !== method.owners[b], "rgba(255, 255, 255, .75)", 1);
  const own = p => method.owners[p] === state.token;
  for (const [color, thickness] of [["#000", 4], ["#fff", 2]]) {
    lines((a, b) => own(a) !== own(b), color, thickness);
    context.beginPath();  // and at the border of the image
    for (let p = 0; p < values.length; p++) if (own(p)) {
      const x = p % columns, y = Math.floor(p / columns), inset = 1.5 * ratio;
      if (!x) { context.moveTo(inset, y * cell); context.lineTo(inset, (y + 1) * cell); }
      if (!y) { context.moveTo(x * cell, inset); context.lineTo((x + 1) * cell, inset); }
      if (x === columns - 1) {
        context.moveTo(canvas.width - inset, y * cell);
        context.lineTo(canvas.width - inset, (y + 1) * cell);
      }
      if (y === rows - 1) {
        context.moveTo(x * cell, canvas.height - inset);
        context.lineTo((x + 1) * cell, canvas.height - inset);
      }
    }
    context.stroke();
  }
}

const probe = document.createElement("span");
function resolve(color) {  // light-dark(…) as a color that a canvas understands
  if (!probe.isConnected) { probe.hidden = true; document.body.append(probe); }
  probe.style.color = color;
  return getComputedStyle(probe).color;
}

// The patches in the rows around the selected token, with gaps between tokens.
function paintStrip(canvas, method, zoom) {
  const [rows, columns] = method.grid, {bitmap} = method, gap = 2;
  const [width, height] = [Math.floor(bitmap.naturalWidth / columns), Math.floor(bitmap.naturalHeight / rows)];
  const own = [...method.owners.keys()].filter(p => method.owners[p] === state.token);
  const lines = own.map(p => Math.floor(p / columns));
  const top = lines.length ? Math.min(...lines) : 0, bottom = lines.length ? Math.max(...lines) : 0;
  const around = Math.min(bottom - top + 1, 2);
  const first = Math.max(0, top - around), last = Math.min(rows - 1, Math.min(bottom, top + 1) + around);
  // Places of the patches along an axis, with a gap where tokens differ anywhere across it.
  const findPlaces = (start, end, size, owner) => {
    const places = {[start]: 0};
    for (let i = start + 1; i <= end; i++)
      places[i] = places[i - 1] + size + (owner(i).some((o, j) => o !== owner(i - 1)[j]) ? gap / zoom : 0);
    return places;
  };
  const all = Array.from({length: last - first + 1}, (_, y) =>
    method.owners.slice((first + y) * columns, (first + y + 1) * columns));
  const across = findPlaces(0, columns - 1, width, x => all.map(row => row[x]));
  const down = findPlaces(first, last, height, y => all[y - first]);
  const ratio = devicePixelRatio || 1;
  const size = [(across[columns - 1] + width) * zoom, (down[last] + height) * zoom];
  [canvas.width, canvas.height] = size.map(x => Math.round(x * ratio));
  [canvas.style.width, canvas.style.height] = size.map(x => `${x}px`);
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.fillStyle = "#8c959f";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.scale(ratio * zoom, ratio * zoom);
  for (let y = first; y <= last; y++) for (let x = 0; x < columns; x++) {
    context.drawImage(bitmap, x * width, y * height, width, height, across[x], down[y], width, height);
    const [here, below] = [y, y + 1].map(line => method.owners[line * columns + x] === state.token);
    if (zoom === 1 || !here || below && y < last) continue;
    context.fillStyle = resolve("var(--accent)");
    context.fillRect(across[x], down[y] + height - 3 / zoom, width, 3 / zoom);
  }
}

function describeToken(method) {
  const {patches, taps} = method, start = state.token * patches;
  let largest = 0, used = 0, sum = 0;
  for (let p = 0; p < patches; p++) {
    const value = method.sources[start + p];
    sum += value;
    used += value > 0;
    largest = Math.max(largest, value);
  }
  const read = method.layersRead[state.token];
  const made = used === 1 ? "made of one patch" : `made of ${used} patches` +
    (used * largest > 1.01 * sum ? `, up to ${percent(largest / sum)} from one` : " in equal shares");
  const dropped = read < method.layers ? `; dropped after layer ${read} of ${method.layers}` : "";
  return `Token ${state.token + 1} of ${method.tokens}: ${made}${method.stated ? "" : " (by gradient)"}${dropped}.`;
}

function draw() {
  const method = methods[state.method];
  for (const key of ["map", "use", "piece"]) for (const button of document.querySelectorAll(`[data-${key}]`))
    button.setAttribute("aria-pressed", button.dataset[key] === String(state[key]));
  paint(find("tokens"), method, tokenMap(method), true);
  paint(find("answer"), method, answerMap(method), false);
  find("token-text").textContent = describeToken(method);
  const shares = method.tapShares[state.token];
  find("taps").hidden = method.taps.length < 2;
  if (method.taps.length > 1) {
    const order = [...method.taps.keys()].sort((a, b) => method.taps[a] - method.taps[b]);
    const focused = document.activeElement?.dataset?.tap;
    find("taps").replaceChildren(...order.map(tap => {
      const button = make("button"), bar = make("span", undefined, "bar"), level = make("i");
      level.style.width = `${100 * shares[tap]}%`;
      bar.append(level);
      button.dataset.tap = tap;
      button.setAttribute("aria-pressed", state.tap === tap);
      button.append(make("span", `block ${method.taps[tap]}`), bar, make("span", percent(shares[tap]), "number"));
      button.addEventListener("click", () => {
        Object.assign(state, {map: "movement", tap: state.tap === tap ? -1 : tap});
        draw();
      });
      return button;
    }));
    if (focused !== undefined) find("taps").querySelector(`[data-tap="${focused}"]`)?.focus();
  }
  const attends = state.use === "attention";
  find("layer-row").hidden = !attends;
  find("layer-text").textContent = state.layer ? `layer ${state.layer} of ${method.layers}` : "all layers, on average";
  const what = state.piece < 0 ? "The answer" : `“${method.pieces[state.piece].trim() || "…"}”`;
  const shown = shownPieces(method);
  const share = shown.reduce((sum, piece) => sum + method.toImage[state.layer][piece], 0) / shown.length;
  find("answer-text").textContent = attends
    ? `${what} gives ${percent(share)} of its attention to the image, the rest to text.`
    : `${what} depends most on the tokens with the strongest color.`;
  const [rows, columns] = method.grid, [width, height] = [method.bitmap.naturalWidth, method.bitmap.naturalHeight];
  find("strip-text").textContent = `The rows around the selected token, as the tower reads them, cut where one ` +
    `token ends and the next begins (${width}×${height} pixels, patches of ${Math.floor(width / columns)}×` +
    `${Math.floor(height / rows)}): at true size, and four times as large. The selected token is underlined.`;
  paintStrip(find("strip-true"), method, 1);
  paintStrip(find("strip-large"), method, 4);
}

function move(dx, dy) {  // to the next token in that direction
  const {owners, grid: [rows, columns]} = methods[state.method];
  const own = [...owners.keys()].filter(p => owners[p] === state.token);
  if (!own.length) return step(dx + dy);
  const p = own[dx + dy > 0 ? own.length - 1 : 0];
  let x = p % columns + dx, y = Math.floor(p / columns) + dy;
  for (; x >= 0 && y >= 0 && x < columns && y < rows; x += dx, y += dy) {
    const owner = owners[y * columns + x];
    if (owner >= 0 && owner !== state.token) { state.token = owner; break; }
  }
  draw();
}

function step(by) {
  const {tokens} = methods[state.method];
  state.token = (state.token + by + tokens) % tokens;
  draw();
}

function listen() {
  find("tokens").addEventListener("click", event => {
    const {grid: [rows, columns], owners} = methods[state.method], box = event.target.getBoundingClientRect();
    const x = Math.floor((event.clientX - box.left) / box.width * columns);
    const y = Math.floor((event.clientY - box.top) / box.height * rows);
    const owner = owners[Math.min(rows - 1, Math.max(0, y)) * columns + Math.min(columns - 1, Math.max(0, x))];
    if (owner < 0) { find("token-text").textContent = "This patch was dropped: no token is made of it."; return; }
    state.token = owner;
    draw();
  });
  find("tokens").addEventListener("keydown", event => {
    const way = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
    if (!way) return;
    event.preventDefault();
    move(...way);
  });
  find("previous").addEventListener("click", () => step(-1));
  find("next").addEventListener("click", () => step(1));
  document.querySelectorAll("[data-map]").forEach(button => button.addEventListener("click", () => {
    Object.assign(state, {map: button.dataset.map, tap: -1});
    draw();
  }));
  document.querySelectorAll("[data-use]").forEach(button => button.addEventListener("click", () => {
    state.use = button.dataset.use;
    draw();
  }));
  find("layer").addEventListener("input", event => { state.layer = Number(event.target.value); draw(); });
  addEventListener("resize", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}

setUp();
"""
