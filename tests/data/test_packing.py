"""Conversations in rows: every token once, in its place, and none that sees or predicts another conversation.

Axis letters: B rows, T positions, M pictures a row, N slots a picture.
"""

import dataclasses

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny

from stf_jax.config import UserError
from stf_jax.data.conversation import Encoded
from stf_jax.data.packing import Batch, pad, to_batch, to_example
from stf_jax.data.pipeline import Prepare, training_batches
from stf_jax.data.records import Record, Turn
from stf_jax.models.presets import VISION

T, M, N = 24, 3, 3
SLOT = 0  # the token of an image slot here


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What was put in: all tokens and pictures of all conversations differ."""

    number: int
    encoded: Encoded
    images: np.ndarray

    def example(self, max_length=T):
        return to_example(self.encoded, self.images, max_length, f"row-{self.number}")


def conversation(number, parts, seed=0):
    """From parts: a text's number of tokens, or None for a picture."""
    is_image = np.concatenate([np.full(N if part is None else part, part is None) for part in parts] or [[]]).astype(
        bool
    )
    length, pictures = len(is_image), parts.count(None)
    tokens = np.where(is_image, SLOT, 1000 * (number + 1) + np.arange(length)).astype(np.int32)
    learned = (np.random.default_rng([seed, number]).random(length) < 0.5) & ~is_image
    images = np.zeros((pictures, 2, 2, 3), np.uint8)
    images += (1 + M * number + np.arange(pictures)).astype(np.uint8)[:, None, None, None]
    return Conversation(number, Encoded(tokens, learned, is_image), images)


@st.composite
def conversations(draw):
    """Up to twenty of 1 to T tokens, none with more than M pictures."""
    made = []
    for number in range(draw(st.integers(1, 20))):
        pictures = draw(st.integers(0, M))
        room = T - N * pictures
        cuts = sorted(draw(st.lists(st.integers(0, room), min_size=pictures + 1, max_size=pictures + 1)))
        texts = [b - a for a, b in zip([0, *cuts], cuts, strict=False)]
        parts = [texts[0] or 1 if not pictures else texts[0]]
        for text in texts[1:]:
            parts += [None, text]
        made.append(conversation(number, parts))
    return made


def rows_of(batch: Batch):
    """The rows of a batch, as batches without B."""
    count = len(batch.tokens)
    fields = [field.name for field in dataclasses.fields(Batch)]
    return [Batch(**{name: getattr(batch, name)[i] for name in fields}) for i in range(count)]


def check_row(row: Batch, known: list[Conversation]) -> list[int]:
    """Asserts all that a row promises; returns the conversations in it, in order."""
    assert {name: value.dtype for name, value in vars(row).items()} == {
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
    found, slots, pictures = [], 0, []
    for segment in segments:
        (places,) = np.nonzero(row.segment_ids == segment)
        tokens = row.tokens[places]
        (number,) = {int(token) // 1000 - 1 for token in tokens if token != SLOT} or {None}
        if number is None:  # pictures alone, which tell whose they are
            number = (int(row.images[len(pictures), 0, 0, 0]) - 1) // M
        it = known[number]
        found.append(number)
        assert tokens.tolist() == it.encoded.tokens.tolist()
        assert row.targets[places].tolist() == [*it.encoded.tokens[1:].tolist(), 0]
        assert row.loss_mask[places].tolist() == [*it.encoded.learned[1:].tolist(), False]
        assert row.positions[places].tolist() == list(range(len(places)))
        for place, is_image in zip(places, it.encoded.is_image, strict=True):
            assert row.image_slots[place] == (slots if is_image else -1)
            slots += int(is_image)
        pictures += list(it.images)
        assert slots == N * len(pictures)
    assert len(pictures) <= len(row.images)
    for place, picture in enumerate(pictures):
        assert np.array_equal(row.images[place], picture)
    assert not row.images[len(pictures) :].any()
    for empty in (row.tokens, row.targets, row.loss_mask, row.positions, row.segment_ids, row.image_slots + 1):
        assert not empty[filled:].any()
    return found


def packed(examples, images_per_row=M, bins=4):
    """As the pipeline packs, but each example once."""
    lengths = dict.fromkeys(("tokens", "targets", "loss_mask", "is_image"), T) | {"images": images_per_row}
    source = grain.MapDataset.source(examples).to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    rows = grain.experimental.BestFitPackIterDataset(source, length_struct=lengths, num_packing_bins=bins, seed=1)
    return [row for batch in rows.batch(1).map(to_batch) for row in rows_of(batch)]


@given(conversations())
@settings(max_examples=80, deadline=None)
def test_packed_rows_hold_every_conversation_once(known):
    rows = packed([it.example() for it in known])
    assert all(row.tokens.shape == (T,) and row.images.shape == (M, 2, 2, 3) for row in rows)
    assert sorted(number for row in rows for number in check_row(row, known)) == list(range(len(known)))


def test_packing_packs():
    known = [conversation(number, [3, None, 2]) for number in range(9)]
    rows = packed([it.example() for it in known])
    assert [len(check_row(row, known)) for row in rows] == [3, 3, 3]


def test_pictures_may_fill_a_row_before_tokens_do():
    known = [conversation(number, [1, None, None]) for number in range(4)]
    rows = packed([it.example() for it in known])
    assert [len(check_row(row, known)) for row in rows] == [1, 1, 1, 1]


def test_text_alone_is_packed_without_picture_places():
    known = [conversation(number, [8]) for number in range(6)]
    rows = packed([it.example() for it in known], images_per_row=0)
    assert [len(check_row(row, known)) for row in rows] == [3, 3]
    assert rows[0].images.shape == (0, 2, 2, 3)


@given(conversations())
@settings(max_examples=80, deadline=None)
def test_padded_rows_hold_one_conversation_each(known):
    padded = [pad(it.example(), T, M) for it in known]
    batch = to_batch({key: np.stack([row[key] for row in padded]) for key in padded[0]})
    assert batch.tokens.shape == (len(known), T)
    assert batch.images.shape == (len(known), M, 2, 2, 3)
    assert [check_row(row, known) for row in rows_of(batch)] == [[number] for number in range(len(known))]


def test_padded_and_packed_rows_agree():
    """The same features in the same form, so that one program takes both."""
    known = [conversation(0, [4, None, 17])]
    (one,) = packed([known[0].example()])
    alone = pad(known[0].example(), T, M)
    (other,) = rows_of(to_batch({key: value[None] for key, value in alone.items()}))
    for field in dataclasses.fields(Batch):
        ours, theirs = getattr(one, field.name), getattr(other, field.name)
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours, theirs), field.name


@pytest.mark.parametrize("packing", [False, True])
def test_the_pipeline_packs_so(packing):
    """Through the pipeline itself, whose epochs repeat: every row keeps its promises, and none is favoured."""
    known = [conversation(number, [2 + number % 5, None, 1 + number % 3]) for number in range(12)]
    changes = {"data.packing": packing, "data.max_length": T, "data.images_per_row": M, "global_batch_size": 4}
    batches = iter(training_batches(tiny(**changes), known, Conversation.example, host=0, hosts=1))
    found = [number for _ in range(15) for row in rows_of(next(batches)) for number in check_row(row, known)]
    assert len(found) > (60 if packing else 59)
    counts = [found.count(number) for number in range(12)]
    assert max(counts) - min(counts) <= (5 if packing else 0), counts


# ---- Cuts ------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 30), st.integers(1, 30))
@settings(deadline=None)
def test_a_long_conversation_loses_its_end(length, limit):
    it = conversation(1, [length])
    example = it.example(limit)
    kept = min(length, limit)
    assert example["tokens"].tolist() == it.encoded.tokens[:kept].tolist()
    assert example["targets"].tolist() == [*it.encoded.tokens[1:kept].tolist(), 0]
    assert example["loss_mask"].tolist() == [*it.encoded.learned[1:kept].tolist(), False]


def test_no_picture_is_cut():
    it = conversation(4, [5, None, 6])
    assert len(it.example(5 + N)["tokens"]) == 5 + N  # just after it
    for limit in (1, 5, 5 + N - 1):
        with pytest.raises(UserError, match=rf"Record 'row-4' has pictures beyond data\.max_length={limit} tokens"):
            it.example(limit)


@pytest.mark.parametrize(("limit", "pictures"), [(0, 1), (1, 2), (2, 5)])
def test_too_many_pictures_are_refused(limit, pictures):
    data = tiny(**{"data.images_per_row": limit}).data
    prepare = Prepare(data, tokenizer=None, vision=VISION["clip-tiny"], slots=4)
    row = Record("row-9", (None,) * pictures, (Turn("human", "<image>" * pictures), Turn("gpt", "Yes")))
    with pytest.raises(UserError, match=rf"Record 'row-9' has {pictures} pictures; raise data\.images_per_row={limit}"):
        prepare(row)
