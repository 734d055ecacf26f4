"""Writes looks as self-contained HTML pages, one per image, with PNGs beside them and an index."""

import base64
import html
import importlib.resources
import io
import itertools
import json
import pathlib
import re
import tempfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
from etils import epath

from stf_jax.files import as_user_error, make_folder, move_file
from stf_jax.looking.drawing import draw_answer, draw_tokens, find_owners, to_shares
from stf_jax.looking.look import Look
from stf_jax.models.reducers.base import PatchReducer

INDEX = "index.html"
_FILES = importlib.resources.files("stf_jax.looking")


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
    reduction, patches, tokens = look.reduction, look.patches, len(look.sources)
    if look.tiles is not None:
        rows, columns = look.tiles
        return f"of {patches} patches of a thumbnail and {rows}×{columns} tiles"
    if reduction.schedule is not None:
        return f"{look.reads.sum() / len(look.reads):.3g} read by a layer, on average"
    if reduction.stages:
        return ", ".join(f"{stage.keep} after layer {stage.after}" for stage in reduction.stages)
    if isinstance(reduction.reducer, PatchReducer) and patches < reduction.tokens:
        return f"the image reduced to {look.pixels.shape[1]}×{look.pixels.shape[0]} pixels"
    if lost := int((look.sources.max(0) == 0).sum()):
        return f"{lost} of {patches} patches dropped"
    return f"made of {patches} patches" if tokens < patches else "one for each patch"


def describe_layers(reads: np.ndarray) -> str:
    """Says which layers read a token, bool [L]: ``layers 1 to 8``; empty if all do."""
    if reads.all():
        return ""
    groups = [
        [index for index, _ in group] for read, group in itertools.groupby(enumerate(reads, 1), lambda x: x[1]) if read
    ]
    spans = [str(group[0]) if len(group) == 1 else f"{group[0]} to {group[-1]}" for group in groups]
    if not spans:
        return "no layer"
    several = len(spans) > 1 or " to " in spans[0]
    return f"layer{'s' * several} {', '.join(spans)}"


def render_page(image: str, looks: Sequence[Look], index: str = "") -> str:
    """Renders the page of an image as HTML; ``index`` is the page to link back to, if any."""
    data = {"image": image, "question": looks[0].question, "methods": [_to_json(look) for look in looks]}
    back = f'<a href="{html.escape(index)}">all images</a> · ' if index else ""
    return _document(
        f"{image}: {looks[0].question}",
        _read("page.html").replace("{back}", back),
        f'<script type="application/json" id="data">{_embed(data)}</script><script>{_read("page.js")}</script>',
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
    by_tap, dependence = to_shares(look.movement.sum(2)), to_shares(look.dependence)
    return {
        "name": look.name,
        "answer": look.answer,
        "probability": look.probability,
        "blankAnswer": look.blank_answer,
        "blankProbability": look.blank_probability,
        "milliseconds": look.milliseconds,
        "tokens": len(look.sources),
        "reduction": describe_reduction(look),
        "grid": look.grid,
        "pixels": _png(look.pixels),
        "taps": list(look.taps),
        "tapShares": _round(by_tap),
        "stated": look.stated,
        "owners": find_owners(look).tolist(),
        "layersRead": look.reads.sum(0).tolist(),
        "readBy": [describe_layers(reads) for reads in look.reads.T],
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


def _round(values: np.ndarray) -> Any:
    return values.astype(np.float64).round(5).tolist()


def _encode(values: np.ndarray, dtype: type[np.unsignedinteger[Any]] = np.uint8) -> str:
    """Rows of values as whole numbers, each row in shares of its largest value; deflated, in base64."""
    scaled = np.iinfo(dtype).max * (values / np.maximum(values.max(-1, keepdims=True), 1e-30))
    return base64.b64encode(zlib.compress(scaled.round().astype(np.dtype(dtype).newbyteorder("<")).tobytes())).decode()


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
    style = _read("page.css")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{style}</style></head><body>{body}{scripts}</body></html>\n"
    )


def _read(name: str) -> str:
    return _FILES.joinpath(name).read_text(encoding="utf-8")
