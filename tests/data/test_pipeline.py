"""Tests the input pipeline: hosts share the work, epochs differ, and a resumed run repeats no record."""

import contextlib
import dataclasses
import itertools
import json
import signal
import socket
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
from tiny import make_preprocessor, tiny

from stf_jax.config import UserError
from stf_jax.data import pipeline
from stf_jax.data.conversation import Encoded
from stf_jax.data.packing import Batch, to_example
from stf_jax.data.pipeline import Batches, ConcatenatedRecords, Preprocessor, load_training_records
from stf_jax.data.sources.scenes import SceneRecords
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.models.spec import VISION

SIDE = VISION["clip-tiny"].image_size
SLOTS = 9


def take(batches, count) -> list[Batch]:
    return list(itertools.islice(batches, count))


def same(a: Batch, b: Batch) -> bool:
    names = [field.name for field in dataclasses.fields(Batch)]
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in names)


# ---- Order -----------------------------------------------------------------------------------------------------------


class Numbers:
    """A stand-in for Preprocessor: record n is a conversation whose tokens are all n + 1."""

    layout = types.SimpleNamespace(vision=types.SimpleNamespace(image_size=1, grid=1), tokens=0)
    dropped = 0

    def fingerprint(self):
        return "digits"

    def measure(self, source, *, log, on_chunk):
        return np.array([2 + source[i] * 7 % 5 for i in range(len(source))]), np.zeros(len(source), int)

    def __call__(self, number):
        size = 2 + number * 7 % 5
        encoded = Encoded(np.full(size, number + 1, np.int32), np.ones(size, bool), np.full(size, -1))
        return to_example(encoded, np.zeros((0, 1, 1, 3), np.uint8), 12, str(number))


def numbers(count, host=0, hosts=1, **changes):
    """Makes batches of the numbers below ``count``."""
    config = tiny(**{"global_batch_size": 4, "data.max_length": 12, "data.images_per_row": 0} | changes)
    return Batches(config, ConcatenatedRecords([range(count)]), Numbers(), host=host, hosts=hosts)


def read(batches):
    """Returns the numbers in batches, by row."""
    return [
        tuple(int(row[segments == s][0]) - 1 for s in range(1, segments.max() + 1))
        for batch in batches
        for row, segments in zip(batch.tokens, batch.segment_ids, strict=True)
    ]


def flat(rows):
    return [number for row in rows for number in row]


PACKING = pytest.mark.parametrize("packing", [False, True])
LAYOUTS = pytest.mark.parametrize(
    "layout", [{}, {"data.packing": True}, {"data.tokens_per_batch": 48, "data.buckets": 3}], ids=str
)


@LAYOUTS
@pytest.mark.parametrize(("count", "hosts"), [(16, 2), (17, 2), (24, 4), (13, 4)])
def test_hosts_together_read_the_rows_of_one_host(count, hosts, layout):
    """Batch by batch, in any epoch, and each conversation on one host only."""
    alone = numbers(count, **layout)
    shares = [numbers(count, host, hosts, **layout) for host in range(hosts)]
    batches = itertools.count()
    for _ in range(3):
        together = []
        while len(flat(together)) < count:
            rows = len(alone.plan.batch_rows(next(batches)))
            assert rows == 4 or (layout and rows % 4 == 0)
            parts = [next(share) for share in shares]
            assert {len(part.tokens) for part in parts} == {rows // hosts}
            parts = [read([part]) for part in parts]
            together += sorted(itertools.chain(*parts))
            assert sorted(itertools.chain(*parts)) == sorted(read([next(alone)]))
        assert sorted(flat(together)) == list(range(count))


@PACKING
def test_epochs_read_every_record_once_in_different_orders(packing):
    batches = numbers(17, **{"data.packing": packing})
    epochs = []
    for _ in range(4):
        epochs.append([])
        while len(epochs[-1]) < 17:
            epochs[-1] += flat(read([next(batches)]))
    assert all(sorted(epoch) == list(range(17)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert epochs[0] != list(range(17))


def test_the_order_depends_on_the_seed():
    orders = [tuple(read(take(numbers(16, seed=seed), 8))) for seed in (0, 0, 1, 2)]
    assert orders[0] == orders[1]
    assert len(set(orders)) == 3


# ---- Resuming --------------------------------------------------------------------------------------------------------


@LAYOUTS
@pytest.mark.parametrize("after", [0, 1, 3, 11])
@pytest.mark.parametrize(("before", "hosts"), [(2, 1), (2, 4), (1, 2), (4, 2)])
def test_resuming_with_another_number_of_hosts(before, hosts, after, layout):
    """No record is lost or repeated: the rest is what a single host would have read without interruption."""
    alone = numbers(27, **layout)
    taken = read(take(alone, after))
    stopped = [numbers(27, host, before, **layout) for host in range(before)]
    assert sorted(itertools.chain(*(read(take(share, after)) for share in stopped))) == sorted(taken)
    states = [share.get_state() for share in stopped]
    assert all(state == states[0] for state in states)
    resumed = [numbers(27, host, hosts, **layout) for host in range(hosts)]
    for share in resumed:
        share.set_state(json.loads(json.dumps(states[0])))  # as checkpoints store it
    for _ in range(9):
        parts = [read([next(share)]) for share in resumed]
        assert sorted(itertools.chain(*parts)) == sorted(read([next(alone)]))
    assert [share.get_state() for share in resumed] == [alone.get_state()] * hosts


@PACKING
@pytest.mark.parametrize(
    ("count", "changes"),
    [
        (27, {"seed": 1}),
        (27, {"global_batch_size": 8}),
        (28, {}),
        (27, {"data.max_length": 13}),
        (27, {"data.mix": (2.0,)}),
    ],
    ids=str,
)
def test_a_state_with_another_order_is_refused(packing, count, changes):
    stopped = numbers(27, **{"data.packing": packing})
    take(stopped, 3)
    other = numbers(count, **{"data.packing": packing} | changes)
    with pytest.raises(UserError, match=r"made with different data, or a different order .*config\.json"):
        other.set_state(stopped.get_state())
    with pytest.raises(UserError, match="made with different data"):
        numbers(27, **{"data.packing": not packing}).set_state(stopped.get_state())


def test_prefetching_threads_end_with_the_stream():
    before = {*threading.enumerate()}

    def reading():
        return [thread for thread in threading.enumerate() if thread not in before]

    stream = numbers(30)
    next(stream)
    assert reading()
    stream.set_state(stream.get_state())
    next(stream)
    stream.close()
    for thread in reading():
        thread.join(60)
    assert not reading()


def test_a_state_with_another_tokenizer_is_refused():
    """Even if all conversations have the same numbers of tokens."""
    stopped = numbers(27)
    take(stopped, 3)
    state = stopped.get_state()
    assert state["tokenizer"] == "digits"
    other = numbers(27)
    other.set_state(state)
    with pytest.raises(UserError, match=r"made with a different tokenizer than data\.tokenizer"):
        other.set_state(state | {"tokenizer": "letters"})


def test_fingerprints_of_tokenizers(tmp_path):
    one, same = (make_preprocessor(tiny()) for _ in range(2))
    assert one.fingerprint() == same.fingerprint()
    folder = tmp_path / "other"
    tokenizer = load_tokenizer("miniature")
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(folder)
    assert make_preprocessor(tiny(**{"data.tokenizer": str(folder)})).fingerprint() != one.fingerprint()


def test_on_chunk_is_called_while_measuring(monkeypatch):
    """So that a long measurement is not mistaken for a hang."""
    monkeypatch.setattr(pipeline, "_CHUNK", 100)
    config, calls = tiny(), []
    Batches(
        config,
        load_training_records(config),
        make_preprocessor(config),
        host=0,
        hosts=1,
        on_chunk=lambda: calls.append(1),
    )
    assert len(calls) == 3  # of 256 records


@PACKING
def test_record_ids_of_a_batch(packing):
    config = tiny(**{"data.packing": packing, "data.images_per_row": 3, "data.max_length": 384, "global_batch_size": 4})
    source, prepare = load_training_records(config), make_preprocessor(config)
    stream = Batches(config, source, prepare, host=0, hosts=1)
    by_id = {source[index].id: source[index] for index in range(len(source))}
    for number, batch in enumerate(take(stream, 3), start=1):
        ids = stream.record_ids(number)
        assert len(ids) == 4
        for row, names in enumerate(ids):
            tokens = np.concatenate([prepare(by_id[name]).tokens for name in names])
            np.testing.assert_array_equal(batch.tokens[row][batch.segment_ids[row] > 0], tokens)
    # Another host's stream returns the same.
    assert Batches(config, source, prepare, host=1, hosts=2).record_ids(2) == stream.record_ids(2)


WORKER = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("pipeline_test", sys.argv[1])
test = importlib.util.module_from_spec(spec)
spec.loader.exec_module(test)
batches = test.numbers(97, host=int(sys.argv[2]), hosts=2, **{"data.packing": True})
for batch in batches:
    print(json.dumps([test.read([batch]), batches.get_state()]), flush=True)
"""


def test_four_hosts_resume_after_two_were_killed():
    """The two processes are killed at any point; four continue after the last batch that both have read."""
    with contextlib.ExitStack() as stack:
        two = [
            stack.enter_context(
                subprocess.Popen([sys.executable, "-c", WORKER, __file__, str(host)], stdout=subprocess.PIPE, text=True)
            )
            for host in range(2)
        ]
        lines = [[process.stdout.readline() for _ in range(3 + host)] for host, process in enumerate(two)]
        for process, mine in zip(two, lines, strict=True):
            process.kill()
            mine += process.stdout.readlines()
            assert process.wait() == -signal.SIGKILL
    taken = [[json.loads(line) for line in mine if line.endswith("\n")] for mine in lines]
    common = min(len(mine) for mine in taken)
    state = taken[0][common - 1][1]
    assert state == taken[1][common - 1][1]
    # Rows that a host read after that are read again.
    rows = [tuple(row) for mine in taken for step in mine[:common] for row in step[0]]
    four = [numbers(97, host, hosts=4, **{"data.packing": True}) for host in range(4)]
    for share in four:
        share.set_state(state)
    while len(flat(rows)) % 97 or len(flat(rows)) < 97:
        rows += [row for share in four for row in read([next(share)])]
    assert sorted(flat(rows)) == sorted([*range(97)] * (len(flat(rows)) // 97))
    alone = numbers(97, **{"data.packing": True})
    assert sorted(rows) == sorted(read(take(alone, len(rows) // 4)))


HOST = """
import importlib.util, sys
import jax
jax.distributed.initialize(sys.argv[2], num_processes=2, process_id=int(sys.argv[3]))
from stf_jax.cli import run_command
spec = importlib.util.spec_from_file_location("pipeline_test", sys.argv[1])
test = importlib.util.module_from_spec(spec)
spec.loader.exec_module(test)
sys.exit(run_command(lambda argv: test.numbers(int(argv[0]), host=jax.process_index(), hosts=2), sys.argv[4:]))
"""


def test_hosts_with_different_plans_exit():
    """The second host's file has one more row."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with contextlib.ExitStack() as stack:
        hosts = []
        for host, count in enumerate((97, 98)):
            command = [sys.executable, "-c", HOST, __file__, address, str(host), str(count)]
            hosts.append(stack.enter_context(subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
            stack.callback(hosts[-1].kill)
        errors = [process.communicate(timeout=60)[1] for process in hosts]
    assert [process.returncode for process in hosts] == [2, 2], errors
    for host, text in enumerate(errors):
        assert f"error: Host {host} has different data, or a different order, than host {1 - host}: give all" in text


# ---- Real batches ----------------------------------------------------------------------------------------------------


def scenes_pipeline(packing=False, host=0, hosts=1, **changes):
    settings = {"data.packing": packing, "data.images_per_row": 2 if packing else 1, "data.scenes.size": 20}
    config = tiny(**settings | {"data.max_length": 420} | changes)
    prepare = Preprocessor(config.data, load_tokenizer("miniature"), VISION["clip-tiny"], SLOTS)
    return Batches(config, load_training_records(config), prepare, host=host, hosts=hosts)


@pytest.mark.parametrize("packing", [False, True])
def test_batches(packing):
    (batch,) = take(scenes_pipeline(packing), 1)
    assert batch.tokens.shape == batch.image_slots.shape == (8, 420)
    assert batch.images.shape == (8, 2 if packing else 1, SIDE, SIDE, 3)
    assert (batch.segment_ids.max() > 1) == packing
    for row in range(8):
        images = (batch.image_slots[row] >= 0).sum() / SLOTS
        assert images == batch.segment_ids[row].max()  # each of these conversations has one
        assert batch.images[row].any(axis=(1, 2, 3)).sum() == images
    assert batch.loss_mask.any(axis=1).all()


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_restored_iterator_continues_exactly(packing, after):
    pipeline = scenes_pipeline(packing)
    original = pipeline
    for _ in range(after):
        next(original)
    state = original.get_state()
    expected = [next(original) for _ in range(4)]
    restored = scenes_pipeline(packing)
    restored.set_state(json.loads(json.dumps(state)))  # as checkpoints store it
    assert all(same(next(restored), batch) for batch in expected)
    # Also backward, in the iterator that is further ahead.
    original.set_state(state)
    assert all(same(next(original), batch) for batch in expected)


@pytest.mark.parametrize("packing", [False, True])
def test_batches_do_not_depend_on_threads(packing):
    one, many = (take(scenes_pipeline(packing, **{"data.threads": threads}), 4) for threads in (1, 8))
    assert all(same(*pair) for pair in zip(one, many, strict=True))


def test_rows_of_two_hosts_are_the_rows_of_one_host():
    alone = take(scenes_pipeline(), 3)
    shares = [take(scenes_pipeline(host=host, hosts=2), 3) for host in range(2)]
    for step, batch in enumerate(alone):
        rows = [row.tobytes() for share in shares for row in share[step].tokens]
        assert sorted(rows) == sorted(row.tobytes() for row in batch.tokens)


@pytest.mark.parametrize("packing", [False, True])
def test_text_only_data_need_no_image_places(packing):
    changes = {"data.images_per_row": 0, "data.scenes.task": "documents", "data.template": "plain"}
    (batch,) = take(scenes_pipeline(packing, **changes), 1)
    assert batch.images.shape == (8, 0, SIDE, SIDE, 3)
    assert (batch.image_slots == -1).all()
    assert batch.loss_mask.any(axis=1).all()


def test_data_without_a_usable_record_are_refused():
    with pytest.raises(
        UserError,
        match=r"^None of the 20 sampled rows .* can be used.*Record 'scene-0-0' has images beyond .*max_length=9",
    ):
        scenes_pipeline(**{"data.max_length": SLOTS})


def test_scenes_follow_the_config():
    config = tiny(**{"data.scenes.size": 7, "data.scenes.task": "captions", "seed": 3})
    records = load_training_records(config)
    assert len(records) == 7
    assert records[5].turns == SceneRecords("captions", 7, 3)[5].turns


def test_data_sets_are_concatenated():
    records = ConcatenatedRecords(["ab", "", "cde"])
    assert records.sizes == [2, 0, 3]
    assert [records[i] for i in range(len(records))] == list("abcde")
    with pytest.raises(IndexError):
        records[5]
