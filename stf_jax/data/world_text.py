"""Captions, questions and cues for the second edition of the embedded data.

Questions are balanced, so that guessing without the image scores low: yes and no are equally likely, and a number,
color, shape or position is drawn evenly from the possible answers, as the scene allows.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from stf_jax.data.scenes import COLORS, SHAPES, Question, Thing
from stf_jax.data.world import HELD_OUT_PLACES, MAX_THINGS, PAIRS, ZONE, Chart, Scene, draw, make_rng, make_scene

__all__ = [
    "DESCRIBE",
    "KINDS",
    "MAX_THINGS",
    "ask_relations_first",
    "draw",
    "make_caption",
    "make_cues",
    "make_questions",
    "make_rng",
    "make_scene",
    "zone_name",
]

KINDS = ("existence", "count", "attribute", "position", "relation", "reading", "chart", "form")
DESCRIBE = "Describe the image."
_MAX_RELATION_CUES = 6  # per scene


_ZONES = (("top left", "top", "top right"), ("left", "center", "right"), ("bottom left", "bottom", "bottom right"))


def zone_name(x: int, y: int) -> str:
    """Returns the name of the ninth of the image that contains a point: ``top left``, ``top``, …, ``center``, …"""
    return _ZONES[y // ZONE][x // ZONE]


def make_caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """Describes everything in a scene in one line, in reading order or shuffled by ``rng``."""
    parts = [f"a {t.size} {t.color} {t.shape} at the {zone_name(t.x, t.y)}" for t in scene.things]
    parts += [f"the text {p.text} at the {p.row}" for p in scene.prints]
    if rng is not None:
        parts = [parts[i] for i in rng.permutation(len(parts))]
    if scene.chart is not None:
        bars = zip(scene.chart.labels, scene.chart.values, strict=True)
        parts.append("a chart of " + ", ".join(f"{label} {value}" for label, value in bars))
    if scene.form is not None and scene.form.is_table:
        rows = (f"row {i} {' '.join(cells)}" for i, cells in enumerate(scene.form.cells, start=1))
        parts.append(f"a table of {' '.join(scene.form.labels)}, " + ", ".join(rows))
    elif scene.form is not None:
        lines = zip(scene.form.labels, scene.form.cells, strict=True)
        parts.append("a form of " + ", ".join(f"{label} {number}" for label, (number,) in lines))
    return ", ".join(parts)


def make_questions(scene: Scene, rng: np.random.Generator, held_out: bool = False) -> list[Question]:
    """Makes one question of each kind that the scene allows, in random order."""
    made = [make(scene, rng, held_out) for make in _MAKERS.values()]
    questions = [question for question in made if question is not None]
    return [questions[i] for i in rng.permutation(len(questions))]


def ask_relations_first(questions: Sequence[Question]) -> list[Question]:
    """Moves questions about relations to the front, and keeps one per pair of shapes and axis.

    Answers about positions, or about the reverse relation, give a relation away: a model that reads it from earlier
    answers does not learn to read it from the image.
    """
    relations = {
        frozenset(q.text.replace("right", "left").replace("below", "above").rstrip("?").split()): q
        for q in questions
        if q.kind == "relation"
    }
    return [*relations.values(), *(q for q in questions if q.kind != "relation")]


def make_cues(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Makes short cues and their answers: all facts of the caption, asked for in a few words, in random order.

    Cues with more than one answer are left out. Yes and no are equally likely. Relations come first, as in
    :func:`ask_relations_first`.
    """
    pairs = [(f"{t.color} {t.shape}", zone_name(t.x, t.y)) for t in scene.things]
    pairs += [(zone_name(t.x, t.y), f"{t.size} {t.color} {t.shape}") for t in scene.things]
    for t in scene.things:
        pairs += [(f"color {t.shape}", t.color), (f"shape {t.color}", t.shape), (f"size {t.color} {t.shape}", t.size)]
    pairs += [(f"text {p.row}", p.text) for p in scene.prints]
    if scene.chart is not None:
        for label, value in zip(scene.chart.labels, scene.chart.values, strict=True):
            pairs += [(label, str(value)), (str(value), label)]
        pairs += [(which, label) for which, label in _find_extremes(scene.chart).items()]
    if scene.form is not None and scene.form.is_table:
        lines = enumerate(scene.form.cells, start=1)
        pairs += [(f"row {i} {c}", cell) for i, line in lines for c, cell in zip(scene.form.labels, line, strict=True)]
    elif scene.form is not None:
        for label, (number,) in zip(scene.form.labels, scene.form.cells, strict=True):
            pairs += [(label, number), (number, label)]
    answers: dict[str, set[str]] = collections.defaultdict(set)
    for cue, answer in pairs:
        answers[cue].add(answer)
    pairs = [pair for pair in dict.fromkeys(pairs) if len(answers[pair[0]]) == 1]
    if scene.things:
        present = {t.color for t in scene.things} | {t.shape for t in scene.things}
        absent = [word for word in (*COLORS, *SHAPES) if word not in present]
        count = min(3, len(present), len(absent))
        for words, answer in ((sorted(present), "yes"), (absent, "no")):
            pairs += [(f"any {words[i]}", answer) for i in rng.permutation(len(words))[:count]]
        pairs.append(("how many shapes", str(len(scene.things))))
        for counts in _count_colors_and_shapes(scene):
            for count, options in _group_by_count(counts).items():
                pairs.append((f"how many {_pick(rng, options)}", str(count)))
    return [*_make_relation_cues(scene, rng), *(pairs[i] for i in rng.permutation(len(pairs)))]


def _make_relation_cues(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Asks about pairs of shapes, either in which direction one is from the other, or for yes or no on each axis.

    Directions have the names of zones. They are learned first, and help to learn yes and no.
    """
    things = _get_unique(scene)
    pairs = [(things[i], things[j]) for i in range(len(things)) for j in range(i)]
    cues: list[tuple[str, str]] = []
    for number in rng.permutation(len(pairs)):
        a, b = (pairs[number][i] for i in rng.permutation(2))
        names = f"{a.color} {a.shape}", f"{b.color} {b.shape}"
        columns, rows = (np.sign(u // ZONE - v // ZONE) for u, v in ((a.x, b.x), (a.y, b.y)))
        if rng.random() < 0.5:
            cues.append((f"{names[0]} from {names[1]}", _ZONES[rows + 1][columns + 1]))
            continue
        for sign, (before, after) in ((columns, ("left of", "right of")), (rows, ("above", "below"))):
            answer = ("yes", "no")[rng.integers(2)]
            if sign:
                relation = before if (sign < 0) == (answer == "yes") else after
                cues.append((f"{names[0]} {relation} {names[1]}", answer))
    return cues[:_MAX_RELATION_CUES]


_T = TypeVar("_T")


def _pick(rng: np.random.Generator, options: list[_T] | tuple[_T, ...]) -> _T:
    return options[rng.integers(len(options))]


def _existence(scene: Scene, rng: np.random.Generator, held_out: bool) -> Question | None:
    """Asks for a color, a shape, or a pair of both, which is the hardest."""
    del held_out
    if not scene.things:
        return None
    choice = rng.integers(3)
    present: set[Any]  # what is asked for: names or pairs
    known: Sequence[Any]
    if choice == 2:
        present, known = {thing.pair for thing in scene.things}, PAIRS
    else:
        key = ("color", "shape")[choice]
        present, known = {getattr(thing, key) for thing in scene.things}, (tuple(COLORS), SHAPES)[choice]
    absent: list[Any] = [value for value in known if value not in present]
    answer = "yes" if rng.random() < 0.5 else "no"
    candidates: list[Any] = sorted(present) if answer == "yes" else absent
    if answer == "no" and choice == 2:
        # Harder: a pair with a color or a shape that is present.
        candidates = [(c, s) for c, s in absent if any(c == a or s == b for a, b in present)] or absent
    value = _pick(rng, candidates)
    noun = (f"{value} shape", value, " ".join(value))[choice]
    return Question("existence", f"Is there {'an' if noun.startswith('orange') else 'a'} {noun}?", answer)


def _count(scene: Scene, rng: np.random.Generator, held_out: bool) -> Question | None:
    del held_out
    if not scene.things or (scene.prints and len(scene.things) == 1):
        return None
    choice = rng.integers(3)
    if choice == 0:
        return Question("count", "How many shapes are there?", str(len(scene.things)))
    by_count = _group_by_count(_count_colors_and_shapes(scene)[choice - 1])
    number = _pick(rng, sorted(by_count))
    value = _pick(rng, by_count[number])
    noun = f"{value} shapes" if value in COLORS else {"cross": "crosses"}.get(value, f"{value}s")
    return Question("count", f"How many {noun} are there?", str(number))


def _count_colors_and_shapes(scene: Scene) -> list[dict[str, int]]:
    """Returns two dictionaries: how often each color occurs, and how often each shape."""
    tables = ((tuple(COLORS), [t.color for t in scene.things]), (SHAPES, [t.shape for t in scene.things]))
    return [{option: values.count(option) for option in options} for options, values in tables]


def _group_by_count(counts: Mapping[str, int]) -> dict[int, list[str]]:
    by_count: dict[int, list[str]] = collections.defaultdict(list)
    for option, count in counts.items():
        by_count[count].append(option)
    return by_count


def _attribute(scene: Scene, rng: np.random.Generator, held_out: bool) -> Question | None:
    del held_out
    by_type: dict[str, list[Question]] = collections.defaultdict(list)
    for thing in scene.things:
        if sum(t.shape == thing.shape for t in scene.things) == 1:
            by_type["color"].append(Question("attribute", f"What color is the {thing.shape}?", thing.color))
        if sum(t.color == thing.color for t in scene.things) == 1:
            by_type["shape"].append(Question("attribute", f"What shape is {thing.color}?", thing.shape))
        if sum(t.pair == thing.pair for t in scene.things) == 1:
            text = f"Is the {thing.color} {thing.shape} small or large?"
            by_type["size"].append(Question("attribute", text, thing.size))
    return _pick(rng, by_type[_pick(rng, sorted(by_type))]) if by_type else None


def _get_unique(scene: Scene) -> list[Thing]:
    return [t for t in scene.things if sum(o.pair == t.pair for o in scene.things) == 1]


def _position(scene: Scene, rng: np.random.Generator, held_out: bool) -> Question | None:
    """In a held-out scene, asks about a shape in a zone where training never shows its color and shape."""
    things = _get_unique(scene)
    if held_out:
        things = [t for t in things if HELD_OUT_PLACES[t.pair] == t.y // ZONE * 3 + t.x // ZONE]
    if not things:
        return None
    thing = _pick(rng, things)
    return Question("position", f"Where is the {thing.color} {thing.shape}?", zone_name(thing.x, thing.y))


_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def _find_relations(scene: Scene) -> list[tuple[Thing, Thing, str]]:
    """Returns the spatial relations of all pairs of shapes in different thirds of the image."""
    things = _get_unique(scene)
    relations: list[tuple[Thing, Thing, str]] = []
    for a in things:
        for b in things:
            if a.x // ZONE != b.x // ZONE:
                relations.append((a, b, "left of" if a.x < b.x else "right of"))
            if a.y // ZONE != b.y // ZONE:
                relations.append((a, b, "above" if a.y < b.y else "below"))
    return relations


def _relation(scene: Scene, rng: np.random.Generator, held_out: bool) -> Question | None:
    del held_out
    relations = _find_relations(scene)
    if not relations:
        return None
    a, b, relation = _pick(rng, relations)
    answer = "yes" if rng.random() < 0.5 else "no"
    relation = relation if answer == "yes" else _OPPOSITE[relation]
    return Question("relation", f"Is the {a.color} {a.shape} {relation} the {b.color} {b.shape}?", answer)


def _reading(scene: Scene, rng: np.random.Generator, held_out: bool) -> Question | None:
    del held_out
    if not scene.prints:
        return None
    item = _pick(rng, scene.prints)
    which = "" if len(scene.prints) == 1 else f"{item.row} "
    return Question("reading", f"What does the {which}text say?", item.text, item.height)


def _chart(scene: Scene, rng: np.random.Generator, held_out: bool) -> Question | None:
    del held_out
    if scene.chart is None:
        return None
    bars = list(zip(scene.chart.values, scene.chart.labels, strict=True))
    choice = rng.integers(3)
    if choice == 2:
        value, label = _pick(rng, bars)
        return Question("chart", f"What is the value of {label}?", str(value))
    which, label = list(_find_extremes(scene.chart).items())[choice]
    return Question("chart", f"Which bar is {which}?", label)


def _find_extremes(chart: Chart) -> dict[str, str]:
    bars = list(zip(chart.values, chart.labels, strict=True))
    return {"highest": max(bars)[1], "lowest": min(bars)[1]}


def _form(scene: Scene, rng: np.random.Generator, held_out: bool) -> Question | None:
    del held_out
    form = scene.form
    if form is None:
        return None
    row, column = int(rng.integers(len(form.cells))), int(rng.integers(len(form.cells[0])))
    number = form.cells[row][column]
    if form.is_table:
        return Question("form", f"What is in row {row + 1} of column {form.labels[column]}?", number)
    if rng.random() < 0.5:
        return Question("form", f"What is the {form.labels[row]}?", number)
    return Question("form", f"Which line says {number}?", form.labels[row])


_MAKERS: dict[str, Callable[[Scene, np.random.Generator, bool], Question | None]] = dict(
    zip(KINDS, (_existence, _count, _attribute, _position, _relation, _reading, _chart, _form), strict=True)
)
