"""What can be said of the embedded world's second edition: captions, and questions with answers.

Questions are balanced, so that who sees nothing earns little: where an answer is yes or no, each is as likely; a
number, colour, shape or place is drawn evenly from what the question may have as its answer, where the scene allows.
"""

import collections
from collections.abc import Callable

import numpy as np

from stf_jax.data.scenes import COLORS, SHAPES, Question
from stf_jax.data.world import HELD_OUT_PLACES, MOST_THINGS, PAIRS, ZONE, Scene, draw, generator, make_scene

__all__ = ["DESCRIBE", "KINDS", "MOST_THINGS", "caption", "draw", "generator", "make_scene", "questions", "zone"]

KINDS = ("existence", "count", "attribute", "position", "relation", "reading", "chart", "form")
DESCRIBE = "Describe the image."


def zone(x: int, y: int) -> str:
    """The ninth of the image that a point lies in: ``top left``, ``top``, …, ``center``, …"""
    row, column = ("top", "", "bottom")[y // ZONE], ("left", "", "right")[x // ZONE]
    return f"{row} {column}".strip() or "center"


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """All that a scene shows, in one line; its parts in reading order, or as ``rng`` shuffles them."""
    parts = [f"a {t.size} {t.color} {t.shape} at the {zone(t.x, t.y)}" for t in scene.things]
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


def questions(scene: Scene, rng: np.random.Generator, held_out: bool = False) -> list[Question]:
    """One question of each kind that the scene allows, in random order."""
    made = [make(scene, rng, held_out) for make in _MAKERS.values()]
    made = [question for question in made if question is not None]
    return [made[i] for i in rng.permutation(len(made))]


def cues(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Short cues with their answers, in random order: everything that the caption says, asked for in a few words.

    Cues with more than one answer are left out. Yes is the answer as often as no.
    """
    pairs = [(f"{t.color} {t.shape}", zone(t.x, t.y)) for t in scene.things]
    pairs += [(zone(t.x, t.y), f"{t.size} {t.color} {t.shape}") for t in scene.things]
    for t in scene.things:
        pairs += [(f"color {t.shape}", t.color), (f"shape {t.color}", t.shape), (f"size {t.color} {t.shape}", t.size)]
    pairs += [(f"text {p.row}", p.text) for p in scene.prints]
    if scene.chart is not None:
        for label, value in zip(scene.chart.labels, scene.chart.values, strict=True):
            pairs += [(label, str(value)), (str(value), label)]
        pairs += [(which, label) for which, label in _extremes(scene.chart).items()]
    if scene.form is not None and scene.form.is_table:
        lines = enumerate(scene.form.cells, start=1)
        pairs += [(f"row {i} {c}", cell) for i, line in lines for c, cell in zip(scene.form.labels, line, strict=True)]
    elif scene.form is not None:
        for label, (number,) in zip(scene.form.labels, scene.form.cells, strict=True):
            pairs += [(label, number), (number, label)]
    answers = collections.defaultdict(set)
    for cue, answer in pairs:
        answers[cue].add(answer)
    pairs = [pair for pair in dict.fromkeys(pairs) if len(answers[pair[0]]) == 1]
    if scene.things:
        seen = {t.color for t in scene.things} | {t.shape for t in scene.things}
        unseen = [word for word in (*COLORS, *SHAPES) if word not in seen]
        some = min(3, len(seen), len(unseen))
        for words, answer in ((sorted(seen), "yes"), (unseen, "no")):
            pairs += [(f"any {words[i]}", answer) for i in rng.permutation(len(words))[:some]]
        pairs.append(("how many shapes", str(len(scene.things))))
        for counts in _counts(scene):
            for number, same in _by_count(counts).items():
                pairs.append((f"how many {_pick(rng, same)}", str(number)))
    relations = _relations(scene)
    for i in rng.permutation(len(relations))[:3]:
        a, b, relation = relations[i]
        for said, answer in ((relation, "yes"), (_OPPOSITE[relation], "no")):
            pairs.append((f"{a.color} {a.shape} {said} {b.color} {b.shape}", answer))
    return [pairs[i] for i in rng.permutation(len(pairs))]


def _pick(rng, options):
    return options[rng.integers(len(options))]


def _existence(scene, rng, held_out):
    """Of a colour, of a shape, or of both together, which is the hard one."""
    del held_out
    if not scene.things:
        return None
    asked = rng.integers(3)
    if asked == 2:
        present, known = {thing.pair for thing in scene.things}, PAIRS
    else:
        key = ("color", "shape")[asked]
        present, known = {getattr(thing, key) for thing in scene.things}, (tuple(COLORS), SHAPES)[asked]
    absent = [value for value in known if value not in present]
    answer = "yes" if rng.random() < 0.5 else "no"
    candidates = sorted(present) if answer == "yes" else absent
    if answer == "no" and asked == 2:
        # Half right is harder: another shape of a colour that is there, or another colour of a shape.
        candidates = [(c, s) for c, s in absent if any(c == a or s == b for a, b in present)] or absent
    value = _pick(rng, candidates)
    what = (f"{value} shape", value, " ".join(value))[asked]
    return Question("existence", f"Is there {'an' if what.startswith('orange') else 'a'} {what}?", answer)


def _count(scene, rng, held_out):
    del held_out
    if not scene.things or (scene.prints and len(scene.things) == 1):
        return None
    asked = rng.integers(3)
    if asked == 0:
        return Question("count", "How many shapes are there?", str(len(scene.things)))
    by_count = _by_count(_counts(scene)[asked - 1])
    number = _pick(rng, sorted(by_count))
    value = _pick(rng, by_count[number])
    noun = f"{value} shapes" if value in COLORS else {"cross": "crosses"}.get(value, f"{value}s")
    return Question("count", f"How many {noun} are there?", str(number))


def _counts(scene):
    """How often each color comes, and each shape, in two dictionaries."""
    tables = ((tuple(COLORS), [t.color for t in scene.things]), (SHAPES, [t.shape for t in scene.things]))
    return [{option: shown.count(option) for option in options} for options, shown in tables]


def _by_count(counts):
    by_count = collections.defaultdict(list)
    for option, count in counts.items():
        by_count[count].append(option)
    return by_count


def _attribute(scene, rng, held_out):
    del held_out
    by_type = collections.defaultdict(list)
    for thing in scene.things:
        if sum(t.shape == thing.shape for t in scene.things) == 1:
            by_type["color"].append(Question("attribute", f"What color is the {thing.shape}?", thing.color))
        if sum(t.color == thing.color for t in scene.things) == 1:
            by_type["shape"].append(Question("attribute", f"What shape is {thing.color}?", thing.shape))
        if sum(t.pair == thing.pair for t in scene.things) == 1:
            text = f"Is the {thing.color} {thing.shape} small or large?"
            by_type["size"].append(Question("attribute", text, thing.size))
    return _pick(rng, by_type[_pick(rng, sorted(by_type))]) if by_type else None


def _unique(scene):
    return [t for t in scene.things if sum(o.pair == t.pair for o in scene.things) == 1]


def _position(scene, rng, held_out):
    """In a held-out scene, asks about a shape in a zone where training never shows its color and shape."""
    things = _unique(scene)
    if held_out:
        things = [t for t in things if HELD_OUT_PLACES[t.pair] == t.y // ZONE * 3 + t.x // ZONE]
    if not things:
        return None
    thing = _pick(rng, things)
    return Question("position", f"Where is the {thing.color} {thing.shape}?", zone(thing.x, thing.y))


_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def _relations(scene):
    """How any two shapes lie to each other, in different thirds of the image."""
    things, relations = _unique(scene), []
    for a in things:
        for b in things:
            if a.x // ZONE != b.x // ZONE:
                relations.append((a, b, "left of" if a.x < b.x else "right of"))
            if a.y // ZONE != b.y // ZONE:
                relations.append((a, b, "above" if a.y < b.y else "below"))
    return relations


def _relation(scene, rng, held_out):
    del held_out
    relations = _relations(scene)
    if not relations:
        return None
    a, b, relation = _pick(rng, relations)
    answer = "yes" if rng.random() < 0.5 else "no"
    relation = relation if answer == "yes" else _OPPOSITE[relation]
    return Question("relation", f"Is the {a.color} {a.shape} {relation} the {b.color} {b.shape}?", answer)


def _reading(scene, rng, held_out):
    del held_out
    if not scene.prints:
        return None
    item = _pick(rng, scene.prints)
    which = "" if len(scene.prints) == 1 else f"{item.row} "
    return Question("reading", f"What does the {which}text say?", item.text, item.height)


def _chart(scene, rng, held_out):
    del held_out
    if scene.chart is None:
        return None
    bars = list(zip(scene.chart.values, scene.chart.labels, strict=True))
    asked = rng.integers(3)
    if asked == 2:
        value, label = _pick(rng, bars)
        return Question("chart", f"What is the value of {label}?", str(value))
    which, label = list(_extremes(scene.chart).items())[asked]
    return Question("chart", f"Which bar is {which}?", label)


def _extremes(chart):
    bars = list(zip(chart.values, chart.labels, strict=True))
    return {"highest": max(bars)[1], "lowest": min(bars)[1]}


def _form(scene, rng, held_out):
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
