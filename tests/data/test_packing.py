"""Tests packing: rows contain every token once, and no conversation sees or predicts another.

Axis letters: B rows, T positions, M images per row, N slots per image.
"""

import dataclasses
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny

from stf_jax.data.conversation import Encoded
from stf_jax.data.packing import Batch, best_fit, to_batch, to_example, to_row
from stf_jax.data.pipeline import Batches, ConcatenatedRecords
from stf_jax.data.records import BadRow

T, M, N, SIDE = 24, 3, 3, 2
SLOT = 0  # the token id of an image slot in these tests


@dataclasses.dataclass(frozen=True)
class Conversation:
    """An input conversation; all tokens and images of all conversations differ."""

    number: int
    encoded: Encoded
    images: np.ndarray

    def example(self, max_length=T):
        return to_example(self.encoded, self.images, max_length, f"row-{self.number}")


def conversation(number, parts, seed=0):
    """Makes a conversation from parts: the number of tokens of a text, or None for an image."""
    is_image = np.concatenate([np.full(N if part is None else part, part is None) for part in parts] or [[]]).astype(
        bool
    )
    length, count = len(is_image), parts.count(None)
    tokens = np.where(is_image, SLOT, 1000 * (number + 1) + np.arange(length)).astype(np.int32)
    is_target = (np.random.default_rng([seed, number]).random(length) < 0.5) & ~is_image
    images = np.zeros((count, SIDE, SIDE, 3), np.uint8)
    images += (1 + M * number + np.arange(count)).astype(np.uint8)[:, None, None, None]
    return Conversation(number, Encoded(tokens, is_target, np.where(is_image, np.cumsum(is_image) - 1, -1)), images)


@st.composite
def conversations(draw):
    """Draws up to twenty conversations of 1 to T tokens and at most M images."""
    made = []
    for number in range(draw(st.integers(1, 20))):
        images = draw(st.integers(0, M))
        room = T - N * images
        cuts = sorted(draw(st.lists(st.integers(0, room), min_size=images + 1, max_size=images + 1)))
        texts = [b - a for a, b in zip([0, *cuts], cuts, strict=False)]
        parts = [texts[0] or 1 if not images else texts[0]]
        for text in texts[1:]:
            parts += [None, text]
        made.append(conversation(number, parts))
    return made


FIELDS = [field.name for field in dataclasses.fields(Batch) if field.name not in ("labels", "budgets")]


def rows_of(batch: Batch):
    """Returns the rows of a batch, as batches without B."""
    count = len(batch.tokens)
    return [Batch(**{name: getattr(batch, name)[i] for name in FIELDS}) for i in range(count)]


def check_row(row: Batch, known: list[Conversation]) -> list[int]:
    """Checks a row; returns its conversations, in order."""
    assert row.labels is None
    assert {name: getattr(row, name).dtype for name in FIELDS} == {
        "tokens": np.int32,
        "targets": np.int32,
        "loss_mask": bool,
        "positions": np.int32,
        "segment_ids": np.int32,
        "image_slots": np.int32,
        "images": np.uint8,
    }
    filled = int((row.segment_ids > 0).sum())
    assert (row.segment_ids[:filled] > 0).all()
    assert (np.diff(row.segment_ids[:filled]) >= 0).all()
    segments = sorted({int(segment) for segment in row.segment_ids[:filled]})
    assert segments == list(range(1, len(segments) + 1))
    found, slots, images = [], 0, []
    for segment in segments:
        (places,) = np.nonzero(row.segment_ids == segment)
        tokens = row.tokens[places]
        (number,) = {int(token) // 1000 - 1 for token in tokens if token != SLOT} or {None}
        if number is None:  # only images, whose values give the conversation
            number = (int(row.images[len(images), 0, 0, 0]) - 1) // M
        it = known[number]
        found.append(number)
        assert tokens.tolist() == it.encoded.tokens.tolist()
        assert row.targets[places].tolist() == [*it.encoded.tokens[1:].tolist(), 0]
        assert row.loss_mask[places].tolist() == [*it.encoded.is_target[1:].tolist(), False]
        assert row.positions[places].tolist() == list(range(len(places)))
        for place, is_image in zip(places, it.encoded.is_image, strict=True):
            assert row.image_slots[place] == (slots if is_image else -1)
            slots += int(is_image)
        images += list(it.images)
        assert slots == N * len(images)
    assert len(images) <= len(row.images)
    for place, image in enumerate(images):
        assert np.array_equal(row.images[place], image)
    assert not row.images[len(images) :].any()
    for empty in (row.tokens, row.targets, row.loss_mask, row.positions, row.segment_ids, row.image_slots + 1):
        assert not empty[filled:].any()
    return found


def packed(known, images_per_row=M):
    """Packs conversations as the pipeline does, in rows of one shape."""
    lengths = [len(it.encoded.tokens) for it in known]
    rows = best_fit(lengths, [len(it.images) for it in known], T, images_per_row)
    return stacked([[known[i].example() for i in row] for row in rows], images_per_row)


def stacked(rows, images_per_row=M, length=T):
    made = [to_row(row, length, images_per_row, SIDE, N) for row in rows]
    return rows_of(to_batch({key: np.stack([row[key] for row in made]) for key in made[0]}))


@given(conversations())
@settings(max_examples=80, deadline=None)
def test_packed_rows_contain_every_conversation_once(known):
    rows = packed(known)
    assert all(row.tokens.shape == (T,) and row.images.shape == (M, SIDE, SIDE, 3) for row in rows)
    assert sorted(number for row in rows for number in check_row(row, known)) == list(range(len(known)))


def test_several_conversations_fit_in_a_row():
    known = [conversation(number, [3, None, 2]) for number in range(9)]
    assert [len(check_row(row, known)) for row in packed(known)] == [3, 3, 3]


def test_rows_can_be_full_of_images_before_they_are_full_of_tokens():
    known = [conversation(number, [1, None, None]) for number in range(4)]
    assert [len(check_row(row, known)) for row in packed(known)] == [1, 1, 1, 1]


def test_text_only_rows_need_no_image_places():
    known = [conversation(number, [8]) for number in range(6)]
    rows = packed(known, images_per_row=0)
    assert [len(check_row(row, known)) for row in rows] == [3, 3]
    assert rows[0].images.shape == (0, SIDE, SIDE, 3)


@given(conversations())
@settings(max_examples=80, deadline=None)
def test_rows_without_packing_contain_one_conversation_each(known):
    rows = stacked([[it.example()] for it in known])
    assert all(row.tokens.shape == (T,) and row.images.shape == (M, SIDE, SIDE, 3) for row in rows)
    assert [check_row(row, known) for row in rows] == [[number] for number in range(len(known))]


def test_a_row_without_conversations_is_empty_and_has_no_targets():
    (row,) = stacked([[]])
    assert check_row(row, []) == []
    assert not row.loss_mask.any()
    assert not row.segment_ids.any()
    assert not row.images.any()


def test_a_conversation_is_the_same_in_any_row():
    """Padded to another length, or with others after it: only the rest of the row differs."""
    it = conversation(0, [4, None, 5])
    (alone,) = stacked([[it.example()]])
    (tight,) = stacked([[it.example()]], images_per_row=1, length=12)
    (shared,) = stacked([[it.example(), conversation(1, [6]).example()]])
    for name in FIELDS:
        first, *others = (getattr(row, name) for row in (alone, tight, shared))
        end = 1 if name == "images" else 12
        for other in others:
            assert first.dtype == other.dtype
            assert np.array_equal(first[:end], other[:end]), name


class Known:
    """A stand-in for Preprocessor with given conversations; a record is a conversation's number."""

    layout = types.SimpleNamespace(vision=types.SimpleNamespace(image_size=SIDE, grid=1), tokens=N)
    dropped = 0

    def __init__(self, known):
        self.known = known

    def fingerprint(self):
        return "none"

    def measure(self, source, *, log, on_chunk):
        lengths = [len(self.known[source[i]].encoded.tokens) for i in range(len(source))]
        return np.array(lengths), np.array([len(self.known[source[i]].images) for i in range(len(source))])

    def __call__(self, number):
        return self.known[number].example()


@pytest.mark.parametrize("packing", [False, True])
def test_rows_of_the_pipeline(packing):
    """Every row is valid, and every epoch has each conversation once."""
    known = [conversation(number, [2 + number % 5, None, 1 + number % 3]) for number in range(12)]
    changes = {"data.packing": packing, "data.max_length": T, "data.images_per_row": M, "global_batch_size": 4}
    batches = Batches(tiny(**changes), ConcatenatedRecords([range(12)]), Known(known), host=0, hosts=1)
    steps = batches.plan.steps(1)
    assert steps == (2 if packing else 3)
    for _ in range(5):
        found = [number for _ in range(steps) for row in rows_of(next(batches)) for number in check_row(row, known)]
        assert sorted(found) == list(range(12))


# ---- Best fit --------------------------------------------------------------------------------------------------------


def brute_force(lengths, images, length, most):
    """Best-fit decreasing that checks every row for every conversation."""
    rows = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        taking = [row for row in rows if row[0] >= lengths[i] and row[1] >= images[i]]
        row = min(taking, key=lambda row: row[:2], default=None)
        if row is None:
            row = [length, most, []]
            rows.append(row)
        row[0] -= lengths[i]
        row[1] -= images[i]
        row[2].append(i)
    return [(length - free, most - places, members) for free, places, members in rows]


@st.composite
def measures(draw):
    length, most = draw(st.integers(1, 40)), draw(st.integers(0, 4))
    pairs = draw(st.lists(st.tuples(st.integers(0, length), st.integers(0, most)), max_size=60))
    return [tokens for tokens, _ in pairs], [images for _, images in pairs], length, most


@given(measures())
@settings(max_examples=300, deadline=None)
def test_best_fit_matches_brute_force(measured):
    lengths, images, length, most = measured
    rows = best_fit(lengths, images, length, most)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    loads = [(sum(lengths[i] for i in row), sum(images[i] for i in row)) for row in rows]
    assert all(tokens <= length and places <= most for tokens, places in loads)
    expected = brute_force(*measured)
    assert len(rows) == len(expected)
    # Only the order of rows with the same contents may differ.
    assert sorted(loads) == sorted((tokens, places) for tokens, places, _ in expected)


@pytest.mark.parametrize(
    ("median", "spread", "least", "most"),
    [
        (300, 0.5, 190, 12),  # stage 2: 144 slots and a few rounds
        (175, 0.08, 150, 16),  # stage 1: 144 slots and a caption
        (330, 1.1, 40, 12),  # with ShareGPT's conversations, up to the length of a row
    ],
)
def test_realistic_rows_are_over_95_percent_full(median, spread, least, most):
    rng = np.random.default_rng(0)
    lengths = np.clip(median * np.exp(spread * rng.standard_normal(20_000)), least, 2048).astype(int)
    images = (lengths >= 150).astype(int)
    rows = best_fit(lengths, images, 2048, most)
    assert lengths.sum() / (2048 * len(rows)) > 0.95
    assert sorted(i for row in rows for i in row) == list(range(20_000))


# ---- Truncation ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 30), st.integers(1, 30))
@settings(deadline=None)
def test_a_long_conversation_is_truncated(length, limit):
    it = conversation(1, [length])
    kept = min(length, limit)
    if length > limit and not it.encoded.is_target[1:kept].any():
        with pytest.raises(BadRow, match=rf"Record 'row-1' has no answer within data\.max_length={limit}") as caught:
            it.example(limit)
        assert caught.value.reason == "over_length"
        return
    example = it.example(limit)
    assert example.tokens.tolist() == it.encoded.tokens[:kept].tolist()
    assert example.targets.tolist() == [*it.encoded.tokens[1:kept].tolist(), 0]
    assert example.loss_mask.tolist() == [*it.encoded.is_target[1:kept].tolist(), False]


def test_images_are_not_truncated():
    it = conversation(4, [5, None, 6])
    assert it.encoded.is_target[1:5].any()
    assert len(it.example(5 + N).tokens) == 5 + N  # right after the image
    for limit in (1, 5, 5 + N - 1):
        with pytest.raises(BadRow, match=rf"Record 'row-4' has images beyond data\.max_length={limit} tokens") as it_is:
            it.example(limit)
        assert it_is.value.reason == "over_length"
