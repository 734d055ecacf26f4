"""Tests the plan of an epoch: exact for any number of hosts, grouped like LLaVA's, mixed as configured."""

import collections
import dataclasses
import fractions
import itertools
import math
import random
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stf_jax.config import DataConfig, UserError
from stf_jax.data import sampling
from stf_jax.data.packing import best_fit
from stf_jax.data.sampling import BatchShape, Plan, fit_budgets

MODES = {
    "packed": {"packing": True},
    "grouped": {},
    "shuffled": {"group_by_modality_length": False},
}
LENGTH = 64


def measured(count, seed=0, longest=LENGTH):
    """Makes lengths and image counts of ``count`` conversations: a third text-only, some unusable (length 0)."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, count)
    lengths[rng.random(count) < 0.05] = 0
    return lengths, np.where(lengths > 0, rng.choice([0, 1, 2], count), 0)


def planned(count=100, batch=8, seed=0, sizes=None, **data):
    config = DataConfig(**{"max_length": LENGTH, "images_per_row": 4} | data)
    lengths, image_counts = measured(count)
    return Plan(config, seed, batch, lengths, image_counts, sizes or [count])


def epochs_of(plan, count, batch=8):
    """Returns the rows of the first epochs, by epoch."""
    ends = [0, *(plan.steps(epoch) * batch for epoch in range(1, count + 1))]
    return [[plan[i] for i in range(a, b)] for a, b in itertools.pairwise(ends)]


def members(rows):
    return [int(i) for row in rows for i in row.members]


def split(rows, size):
    return [rows[start : start + size] for start in range(0, len(rows), size)]


# ---- An epoch --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("count", [96, 64, 97, 63, 5, 1])
def test_all_hosts_together_see_every_conversation_once_per_epoch(mode, hosts, count):
    alone = planned(count, **MODES[mode])
    plans = [planned(count, **MODES[mode]) for _ in range(hosts)]  # each host makes its own
    begin = 0
    for epoch in range(1, 4):
        end = plans[0].steps(epoch) * 8
        shares = [[plan[i] for i in range(begin + host, end, hosts)] for host, plan in enumerate(plans)]
        assert sorted(members(itertools.chain(*shares))) == list(range(count))
        # All hosts' parts of a batch have the same shape, and all hosts have the same number of batches.
        parts = [split(share, 8 // hosts) for share in shares]
        for step, batch in enumerate(zip(*parts, strict=True)):
            assert len({row[1:] for part in batch for row in part}) == 1
            rows = [alone[begin + step * 8 + i] for i in range(8)]
            assert sorted(members(rows)) == sorted(members(itertools.chain(*batch)))
        begin = end


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_epoch_is_exact(data):
    """Every conversation occurs once, no row is too long, and only the last batch has empty rows."""
    count, batch = data.draw(st.integers(1, 120)), data.draw(st.integers(1, 9))
    mode, buckets = data.draw(st.sampled_from(list(MODES))), data.draw(st.integers(1, 4))
    lengths, image_counts = measured(count, data.draw(st.integers(0, 9)), longest=2 * LENGTH)
    config = DataConfig(max_length=LENGTH, images_per_row=3, buckets=buckets, **MODES[mode])
    plan = Plan(config, data.draw(st.integers(0, 3)), batch, lengths, image_counts, [count])
    for rows in epochs_of(plan, 2, batch):
        assert len(rows) % batch == 0
        assert sorted(members(rows)) == list(range(count))
        empty = [i for i, row in enumerate(rows) if not len(row.members)]
        assert len(empty) < batch
        assert empty == list(range(len(rows) - len(empty), len(rows)))
        for row in rows:
            # A conversation that is longer than a row is truncated to it.
            tokens = sum(min(int(lengths[i]), LENGTH) for i in row.members)
            assert tokens <= row.length <= LENGTH
            assert sum(image_counts[i] for i in row.members) <= row.images <= 3
            assert mode == "packed" or len(row.members) <= 1


@pytest.mark.parametrize("mode", MODES)
def test_rows_have_room_for_their_text_where_layers_drop_image_tokens(mode):
    """Of a row's positions, layers lack ``dropped`` for each image place, those without an image included."""
    dropped, places = 7, 4
    lengths, image_counts = measured(200, longest=LENGTH - places * dropped)
    config = DataConfig(max_length=LENGTH, images_per_row=places, buckets=3, **MODES[mode])
    plan = Plan(config, 0, 8, lengths + dropped * image_counts, image_counts, [200], dropped=dropped)
    (rows,) = epochs_of(plan, 1)
    assert sorted(members(rows)) == list(range(200))
    for row in rows:
        assert sum(lengths[i] for i in row.members) <= row.length - dropped * (places if row.images else 0)


@pytest.mark.parametrize("mode", MODES)
def test_epochs_and_seeds_have_different_orders(mode):
    orders = [members(rows) for seed in (0, 1) for rows in epochs_of(planned(1200, seed=seed, **MODES[mode]), 3)]
    assert [members(rows) for rows in epochs_of(planned(1200, **MODES[mode]), 3)] == orders[:3]
    # Neighbors are also shuffled.
    pairs = [{frozenset(pair) for pair in itertools.pairwise(order)} for order in orders]
    for a, b in itertools.combinations(pairs, 2):
        assert len(a & b) < 1200 / 4


@pytest.mark.parametrize("mode", MODES)
def test_rows_do_not_depend_on_the_order_of_access(mode):
    walked = planned(**MODES[mode])
    rows = [list(row.members) for epoch in epochs_of(walked, 4) for row in epoch]
    indices = list(range(len(rows)))
    random.Random(0).shuffle(indices)
    plan, found = planned(**MODES[mode]), {}

    def read(mine):
        found.update({i: list(plan[i].members) for i in mine})

    threads = [threading.Thread(target=read, args=(indices[k::4],)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(len(rows))] == rows


def test_steps_is_thread_safe(monkeypatch):
    """The pipeline's threads prefetch rows: here one of them is in the middle of planning an epoch."""
    expected = [planned(packing=True).steps(epochs) for epochs in range(1, 6)]
    plan, within, requested = planned(packing=True), threading.Event(), threading.Event()

    def interrupted(*arguments):
        if not within.is_set():
            within.set()
            requested.wait(0.2)  # with a timeout, because steps may wait for this thread
        return best_fit(*arguments)

    monkeypatch.setattr(sampling, "best_fit", interrupted)
    reader = threading.Thread(target=lambda: plan[0])
    reader.start()
    within.wait()
    plan.steps(3)
    requested.set()
    reader.join()
    assert [plan.steps(epochs) for epochs in range(1, 6)] == expected


@pytest.mark.parametrize("mode", ["grouped", "shuffled"])
@pytest.mark.parametrize(
    ("count", "epochs"),
    [(80, 1), (80, 2), (77, 1), (80, 0.5), (77, 1.5), (80, 0.01), (8, 3), (3, 2), (77, 0.25), (80, 1.1), (800, 0.07)],
)
def test_steps_is_the_number_of_batches(mode, count, epochs):
    """A fraction of an epoch is rounded up to full batches."""
    batches = math.ceil(count / 8)
    assert planned(count, **MODES[mode]).steps(epochs) == math.ceil(fractions.Fraction(str(epochs)) * batches)


@pytest.mark.parametrize("epochs", [1, 2, 3, 0.5, 1.5, 2.75])
def test_steps_with_packing(epochs):
    plan, seen, ends = planned(packing=True), 0, [0]
    for step in itertools.count(1):
        seen += len(members(plan[step * 8 + i] for i in range(-8, 0)))
        if seen == 100:
            ends.append(step)
            seen = 0
        if len(ends) == 5:
            break
    full = int(epochs)
    assert plan.steps(epochs) == ends[full] + math.ceil((epochs - full) * (ends[full + 1] - ends[full]))


# ---- Groups ----------------------------------------------------------------------------------------------------------


def llava_batches(lengths, image_counts, batch, seed):
    """LLaVA's rule (get_modality_length_grouped_indices in llava/train/llava_trainer.py), megabatches of 32 batches."""
    rng = random.Random(seed)
    batches, additional = [], []
    for has_image in (True, False):
        indices = [i for i in range(len(lengths)) if (image_counts[i] > 0) == has_image]
        rng.shuffle(indices)
        megabatches = [sorted(mega, key=lambda i: lengths[i], reverse=True) for mega in split(indices, 32 * batch)]
        cut = split([i for mega in megabatches for i in mega], batch)
        if cut and len(cut[-1]) < batch:
            additional += cut.pop()
        batches += cut
    rng.shuffle(batches)
    return batches, sorted(additional)


@pytest.mark.parametrize(("images", "texts"), [(3333, 1234), (4096, 512), (4001, 0), (0, 3000), (7, 3000), (11, 6)])
def test_groups_match_llava(images, texts):
    rng = np.random.default_rng(0)
    count = images + texts
    image_counts = rng.permutation(np.repeat([1, 0], [images, texts]))
    lengths = np.clip(300 * np.exp(0.6 * rng.standard_normal(count)), 40, 2048).astype(int)
    plan = Plan(DataConfig(images_per_row=1), 0, 8, lengths, image_counts, [count])
    (rows,) = epochs_of(plan, 1)
    found = [members(batch) for batch in split(rows, 8)]
    reference, additional = llava_batches(lengths, image_counts, 8, 0)
    # The same number of batches of each kind, no mixed batches, and the same remainder at the end.
    result, rest = found[: len(reference)], sorted(itertools.chain(*found[len(reference) :]))
    assert [len(batch) for batch in result] == [8] * len(reference)
    kinds = [
        collections.Counter(tuple(set(image_counts[batch].tolist())) for batch in some) for some in (result, reference)
    ]
    assert kinds[0] == kinds[1]
    assert all(len(kind) == 1 for kind in kinds[0])
    assert len(rest) == len(additional) == images % 8 + texts % 8
    assert image_counts[rest].sum() == images % 8
    if len(reference) < 100:
        return
    # Lengths within a batch are as similar, much more than by chance.
    spreads = [np.mean([np.ptp(lengths[batch]) for batch in some]) for some in (result, reference)]
    assert spreads[0] == pytest.approx(spreads[1], rel=0.15)
    shuffled = np.mean([np.ptp(lengths[batch]) for batch in split(rng.permutation(count), 8)])
    assert spreads[0] < shuffled / 8
    # The batches are shuffled: kinds and lengths of neighbors are not correlated.
    for values in ([lengths[batch].mean() for batch in result], [image_counts[batch].mean() for batch in result]):
        if np.ptp(values):
            assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.15


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("start", "stop"), [(0, 3), (5, 13), (5, 40), (26, 27), (30, 30)])
def test_shapes_of_the_batches_to_come(mode, start, stop):
    """They are all shapes up to the end of the next epoch."""
    plan = planned(buckets=4, **MODES[mode])
    end = min(stop, next(e for e in map(plan.steps, range(1, 9)) if e > start) + plan.steps(1))
    expected = {BatchShape(8, plan[8 * batch].length, plan[8 * batch].images) for batch in range(start, end)}
    assert planned(buckets=4, **MODES[mode]).shapes(start, stop) == expected


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_batches_by_tokens(data):
    """They have as many rows as fit, in multiples of the batch size, and follow each other without gaps."""
    count, batch, separate = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 4)), data.draw(st.booleans())
    positions = LENGTH * batch + data.draw(st.integers(0, 5 * LENGTH * batch))
    lengths, image_counts = measured(count, data.draw(st.integers(0, 9)), longest=2 * LENGTH)
    config = DataConfig(max_length=LENGTH, images_per_row=2, buckets=data.draw(st.integers(1, 4)))
    config = dataclasses.replace(config, tokens_per_batch=positions, group_by_modality_length=separate)
    plan = Plan(config, 0, batch, lengths, image_counts, [count])
    number, begin, shapes, mixed = 0, 0, set(), 0
    for epoch in (1, 2):
        rows = []
        while number < plan.steps(epoch):
            indices = plan.batch_rows(number)
            assert indices.start == begin
            assert plan.find_batch(begin) == number
            found = [plan[i] for i in indices]
            length, images = found[0].length, found[0].images
            assert len(found) == positions // (length * batch) * batch <= plan.max_rows
            kinds = {bool(image_counts[i]) for i in members(found)}
            assert {(row.length, row.images) for row in found} == {(length, 2 if True in kinds else 0)}
            assert all(min(lengths[i], LENGTH) <= length for i in members(found))
            shapes.add(BatchShape(len(found), length, images))
            rows, begin, number, mixed = rows + found, indices.stop, number + 1, mixed + (len(kinds) > 1)
        assert sorted(members(rows)) == list(range(count))
        # Only the last batches have empty rows.
        empty = [not len(row.members) for row in rows]
        assert sum(empty) < 2 * plan.max_rows
        assert shapes == plan.shapes(0, number)
    assert mixed <= 2 * 2 or not separate


def test_most_batches_by_tokens_have_as_many_positions():
    plan = planned(4000, batch=2, buckets=4, tokens_per_batch=16 * LENGTH)
    sizes = [len(rows) * plan[rows.start].length / LENGTH for rows in map(plan.batch_rows, range(plan.steps(1)))]
    assert max(sizes) <= 16
    assert np.mean(np.array(sizes) > 14) > 0.95


def test_text_batches_have_no_image_places():
    (rows,) = epochs_of(planned(200), 1)
    image_counts = measured(200)[1]
    batches = [(members(batch), {row.images for row in batch}) for batch in split(rows, 8)]
    kinds = [(bool(image_counts[batch].any()), places) for batch, places in batches]
    assert all(places == ({4} if any_image else {0}) for any_image, places in kinds)
    assert {any_image for any_image, _ in kinds} == {True, False}


@pytest.mark.parametrize("mode", ["grouped", "shuffled"])
@pytest.mark.parametrize("buckets", [1, 2, 3, 5])
def test_a_batch_is_padded_to_the_smallest_bucket_that_fits(mode, buckets):
    plan, lengths = planned(400, buckets=buckets, **MODES[mode]), measured(400)[0]
    batches = split([row for rows in epochs_of(plan, 3) for row in rows], 8)
    known = sorted({row.length for batch in batches for row in batch})
    assert len(known) <= buckets
    assert known[-1] == LENGTH
    if mode == "grouped":
        assert len(known) == buckets
    for batch in batches:
        longest = max(lengths[members(batch)])
        assert {row.length for row in batch} == {next(size for size in known if size >= longest)}


@pytest.mark.parametrize("buckets", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_buckets_minimize_padding(buckets, seed):
    """Against all choices of buckets, with batches of one row."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.geometric(0.08, 150), 60)
    # Buckets are multiples of 1/64 of the longest row, here 1; with one bucket, all rows have the maximum length.
    plan = Plan(DataConfig(max_length=64, buckets=buckets), 0, 1, lengths, np.zeros(150, int), [150])
    (rows,) = epochs_of(plan, 1, 1)
    ends = [64] if buckets == 1 else [int(lengths.max())]
    choices = itertools.combinations(range(1, ends[0]), buckets - 1)
    filled = [np.array([*some, *ends])[np.searchsorted([*some, *ends], lengths)].sum() for some in choices]
    assert sum(row.length for row in rows) == min(filled)


# ---- Mixtures --------------------------------------------------------------------------------------------------------


def counts(plan, epochs, sizes):
    """Counts how often each epoch has each conversation, by set."""
    ends = np.cumsum(sizes)[:-1]
    return [np.split(np.bincount(members(rows), minlength=sum(sizes)), ends) for rows in epochs_of(plan, epochs)]


@pytest.mark.parametrize("mode", MODES)
def test_mixture_by_epoch(mode):
    sizes = [30, 41, 29]
    plan = planned(sizes=sizes, mix=(2.0, 0.5, 1.0), **MODES[mode])
    first, second, third, fourth = counts(plan, 4, sizes)
    for twice, half, once in (first, second, third, fourth):
        assert (twice == 2).all()
        assert half.max() == 1
        assert half.sum() in (20, 21)
        assert (once == 1).all()
    # The next epoch has the other half; then it starts again, with different halves.
    for a, b in ((first, second), (third, fourth)):
        assert (a[1] + b[1] == 1).all()
    assert (first[1] != third[1]).any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weights", [(1.0, 2.0, 0.5), (3.0, 1.0, 1.0), (1.0, 1.0, 0.0), (0.1, 0.2, 0.7)])
def test_mixture_by_weight_is_exact(mode, weights):
    sizes = [60, 29, 11]
    plan = planned(sizes=sizes, mix=weights, mix_by="weight", **MODES[mode])
    seen = [np.zeros(size, int) for size in sizes]
    for epoch, found in enumerate(counts(plan, 12, sizes), start=1):
        for total, one, weight in zip(seen, found, weights, strict=True):
            total += one
            assert abs(total.sum() - epoch * 100 * weight / sum(weights)) < 1
            assert np.ptp(total) <= 1  # all rows are used equally often


def test_an_epoch_of_a_small_share_may_be_empty():
    """Packed, with several budgets."""
    data = DataConfig(packing=True, max_length=100, images_per_row=2, mix=(0.05,))
    plan = Plan(data, 0, 4, np.full(10, 40), np.ones(10, int), [10], budgets=(9, 4))
    assert plan.steps(4) == 2
    assert [len(members(plan[i] for i in range(4 * step, 4 * step + 4))) for step in range(2)] == [1, 1]


def test_without_a_mixture_each_set_is_used_once():
    for found in counts(planned(sizes=[60, 40]), 3, [60, 40]):
        assert all((one == 1).all() for one in found)


@pytest.mark.parametrize(
    ("mix", "sentence"),
    [
        ((1.0,), r"data\.mix has 1 numbers for 2 data sets"),
        ((1.0, 1.0, 1.0), r"data\.mix has 3 numbers for 2 data sets"),
        ((1.0, -0.5), r"data\.mix=\(1\.0, -0\.5\) must be numbers of at least 0"),
        ((0.0, 0.0), r"data\.mix=\(0\.0, 0\.0\) must be numbers of at least 0, with a positive sum"),
    ],
)
@pytest.mark.parametrize("mix_by", ["epoch", "weight"])
def test_invalid_mixtures_are_refused(mix, sentence, mix_by):
    with pytest.raises(UserError, match=sentence):
        planned(sizes=[60, 40], mix=mix, mix_by=mix_by)


# ---- Budgets of image tokens -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_rows_fit_their_lengths_at_every_budget(mode):
    text, image_counts = measured(400, longest=20)
    lengths = np.where(text > 0, text + 16 * image_counts, 0)
    config = DataConfig(max_length=LENGTH, images_per_row=3, **MODES[mode])
    options = (), ((16, 4, 1),), ((16, 4, 1), "one")
    plain, plan, drawn = (Plan(config, 0, 8, lengths, image_counts, [400], 0, *more) for more in options)
    steps, spare = plan.steps(2), []
    assert [sorted(members(rows)) for rows in epochs_of(plan, 2)] == [
        sorted(members(rows)) for rows in epochs_of(plain, 2)
    ]
    for batch in range(steps):
        rows, budgets = [plan[i] for i in plan.batch_rows(batch)], plan.batch_budgets(batch)
        if mode != "packed":
            assert rows == [plain[i] for i in plain.batch_rows(batch)]
        if not rows[0].images:
            assert budgets == drawn.batch_budgets(batch) == ()
            continue
        assert drawn.batch_budgets(batch) in [(budget,) for budget in budgets]
        longest = [
            max(int((lengths - (16 - tokens) * image_counts)[list(row.members)].sum()) for row in rows)
            for tokens, _ in budgets
        ]
        assert all(needed <= budget.length for needed, budget in zip(longest, budgets, strict=True))
        (images,) = (n for n in range(4) if fit_budgets((16, 4, 1), rows[0].length, n) == budgets)
        assert images == 3 or longest[-1] > rows[0].length - 15 * (images + 1)
        spare.append(images)
    assert {budget.tokens for batch in range(steps) for budget in drawn.batch_budgets(batch)} == {16, 4, 1}
    assert len(set(spare)) > 1 or mode == "grouped"
    if mode == "packed":  # as if rows were not grouped
        order = np.random.default_rng(0).permutation(len(rows := [plan[i] for i in range(8 * steps)]))
        room = [(sum(image_counts[list(row.members)]), LENGTH - lengths[list(row.members)].sum()) for row in rows]
        alone = [min(3, images + free // 15) for images, free in room]
        assert np.mean(spare) > np.mean([min(alone[i] for i in batch) for batch in split(order, 8)])


# ---- Fingerprints ----------------------------------------------------------------------------------------------------


def test_the_fingerprint_covers_all_that_the_order_depends_on():
    config = DataConfig(max_length=LENGTH, images_per_row=4)
    lengths, image_counts = measured(100)
    base = {
        "data": config,
        "seed": 0,
        "batch_size": 8,
        "lengths": lengths,
        "image_counts": image_counts,
        "sizes": [60, 40],
    }

    def of(**changes):
        return Plan(**base | changes).fingerprint()

    def but(**changes):
        return of(data=dataclasses.replace(config, **changes))

    longer, more, other = lengths.copy(), image_counts.copy(), lengths.copy()
    longer[3] += 1
    more[np.flatnonzero(image_counts == 1)[0]] = 2
    other[[0, 1]] = lengths[[1, 0]]
    assert lengths[0] != lengths[1]
    prints = [
        of(),
        of(seed=1),
        of(batch_size=4),
        of(sizes=[59, 41]),
        of(sizes=[100]),
        of(lengths=longer),
        of(lengths=other),
        of(image_counts=more),
        of(lengths=lengths[:99], image_counts=image_counts[:99], sizes=[60, 39]),
        but(packing=True),
        but(group_by_modality_length=False),
        but(max_length=LENGTH + 1),
        but(images_per_row=5),
        but(buckets=2),
        but(tokens_per_batch=8 * LENGTH),
        but(mix=(1.0, 2.0)),
        but(mix=(2.0, 1.0)),
        but(mix=(2.0, 1.0), mix_by="weight"),
        of(budgets=(8, 4)),
        of(budgets=(8, 2)),
        of(budgets=(8, 4), budgets_per_step="one"),
    ]
    assert len(set(prints)) == len(prints)
    # Nothing else changes the fingerprint.
    same = [
        of(),
        but(threads=9),
        but(annotations="moved.json", images="elsewhere"),
        of(lengths=lengths.astype(np.int32)),
        of(budgets_per_step="one"),
    ]
    assert set(same) == {prints[0]}
