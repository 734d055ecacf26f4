"""Records from LLaVA's files, and the pipeline: hosts share the work, epochs differ, and iterators resume exactly."""

import dataclasses
import io
import itertools
import json

import numpy as np
import PIL.Image
import pytest
from tiny import tiny

from stf_jax.config import UserError
from stf_jax.data.packing import Batch
from stf_jax.data.pipeline import Prepare, training_batches, training_records
from stf_jax.data.records import LlavaRecords, Record, Turn
from stf_jax.data.scenes import SceneRecords
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.models.presets import VISION

SIDE = VISION["clip-tiny"].image_size
SLOTS = 9


def take(batches, count) -> list[Batch]:
    return list(itertools.islice(iter(batches), count))


def same(ours: Batch, theirs: Batch) -> bool:
    names = [field.name for field in dataclasses.fields(Batch)]
    return all(np.array_equal(getattr(ours, name), getattr(theirs, name)) for name in names)


# ---- Order -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Number:
    """A record that is its own index."""

    index: int


def number_example(record):
    """One token, which says which record it is."""
    return {
        "tokens": np.array([record.index], np.int32),
        "targets": np.zeros(1, np.int32),
        "loss_mask": np.zeros(1, bool),
        "is_image": np.zeros(1, bool),
        "images": np.zeros((0, 1, 1, 3), np.uint8),
    }


def order(count, batches, host=0, hosts=1, seed=0, rows=4):
    """Which records the host reads, batch by batch, of ``count``."""
    config = tiny(**{"seed": seed, "global_batch_size": rows, "data.max_length": 2, "data.images_per_row": 0})
    source = [Number(index) for index in range(count)]
    pipeline = training_batches(config, source, number_example, host=host, hosts=hosts)
    return [batch.tokens[:, 0].tolist() for batch in take(pipeline, batches)]


def flat(lists):
    return [number for numbers in lists for number in numbers]


@pytest.mark.parametrize(("count", "hosts"), [(16, 2), (17, 2), (24, 4), (13, 4)])
def test_hosts_share_what_one_host_would_read(count, hosts):
    """Row by row: the hosts' batches together are the batch of a single host, in any epoch."""
    alone = order(count, 9)
    shares = [order(count, 9, host=host, hosts=hosts) for host in range(hosts)]
    assert all(len(batch) == 4 // hosts for share in shares for batch in share)
    together = [sorted(flat(batches)) for batches in zip(*shares, strict=True)]
    assert together == [sorted(batch) for batch in alone]
    if count % hosts == 0:  # then the shares of an epoch are disjoint
        epoch = [flat(share)[: count // hosts] for share in shares]
        assert sorted(flat(epoch)) == list(range(count))


def test_an_epoch_reads_every_record_once_and_the_next_in_another_order():
    read = flat(order(16, 16))
    epochs = [read[start : start + 16] for start in range(0, 64, 16)]
    assert all(sorted(epoch) == list(range(16)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert epochs[0] != list(range(16))


def test_the_order_is_the_seeds():
    orders = [flat(order(16, 8, seed=seed)) for seed in (0, 0, 1, 2)]
    assert orders[0] == orders[1]
    assert len({tuple(one) for one in orders}) == 3


# ---- Real batches ----------------------------------------------------------------------------------------------------


def scenes_pipeline(packing=False, host=0, hosts=1, **changes):
    settings = {"data.packing": packing, "data.images_per_row": 2 if packing else 1, "data.scenes.size": 20}
    config = tiny(**settings | {"data.max_length": 320} | changes)
    prepare = Prepare(config.data, load_tokenizer("miniature"), VISION["clip-tiny"], SLOTS)
    return training_batches(config, training_records(config), prepare, host=host, hosts=hosts)


@pytest.mark.parametrize("packing", [False, True])
def test_batches(packing):
    (batch,) = take(scenes_pipeline(packing), 1)
    assert batch.tokens.shape == batch.image_slots.shape == (8, 320)
    assert batch.images.shape == (8, 2 if packing else 1, SIDE, SIDE, 3)
    assert (batch.segment_ids.max() > 1) == packing
    for row in range(8):
        pictures = (batch.image_slots[row] >= 0).sum() / SLOTS
        assert pictures == batch.segment_ids[row].max()  # each of these conversations has one
        assert batch.images[row].any(axis=(1, 2, 3)).sum() == pictures
    assert batch.loss_mask.any(axis=1).all()


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_restored_iterator_goes_on_to_the_bit(packing, after):
    pipeline = scenes_pipeline(packing)
    original = iter(pipeline)
    for _ in range(after):
        next(original)
    state = original.get_state()
    expected = [next(original) for _ in range(4)]
    restored = iter(scenes_pipeline(packing))
    restored.set_state(json.loads(json.dumps(state)))  # as a checkpoint keeps it
    assert all(same(next(restored), batch) for batch in expected)
    # And back, in the iterator that has run ahead.
    original.set_state(state)
    assert all(same(next(original), batch) for batch in expected)


@pytest.mark.parametrize("packing", [False, True])
def test_batches_do_not_depend_on_threads(packing):
    one, many = (take(scenes_pipeline(packing, **{"data.threads": threads}), 4) for threads in (1, 8))
    assert all(same(*pair) for pair in zip(one, many, strict=True))


def test_hosts_rows_are_the_rows_of_one_host():
    alone = take(scenes_pipeline(), 3)
    shares = [take(scenes_pipeline(host=host, hosts=2), 3) for host in range(2)]
    for step, batch in enumerate(alone):
        rows = [row.tobytes() for share in shares for row in share[step].tokens]
        assert sorted(rows) == sorted(row.tobytes() for row in batch.tokens)


@pytest.mark.parametrize("packing", [False, True])
def test_text_alone_needs_no_picture_places(packing):
    changes = {"data.images_per_row": 0, "data.scenes.task": "documents", "data.template": "plain"}
    (batch,) = take(scenes_pipeline(packing, **changes), 1)
    assert batch.images.shape == (8, 0, SIDE, SIDE, 3)
    assert (batch.image_slots == -1).all()
    assert batch.loss_mask.any(axis=1).all()


def test_a_record_that_does_not_fit_ends_the_iteration_with_its_name():
    batches = iter(scenes_pipeline(**{"data.max_length": SLOTS}))
    with pytest.raises(UserError, match=r"Record 'scene-0-\d+' has pictures beyond data\.max_length=9"):
        next(batches)


def test_scenes_are_the_configs():
    config = tiny(**{"data.scenes.size": 7, "data.scenes.task": "captions", "seed": 3})
    records = training_records(config)
    assert isinstance(records, SceneRecords)
    assert len(records) == 7
    assert records[5].turns == SceneRecords("captions", 7, 3)[5].turns


# ---- LLaVA's files ---------------------------------------------------------------------------------------------------


def talk(question="<image>\nWhat?", answer="A cat."):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


ROWS = [
    {"id": "a", "image": "one.png", "conversations": talk()},
    {"id": "b", "image": ["one.png", "deep/two.jpg"], "conversations": talk("<image><image>\nSame?")},
    {"id": "c", "model": "", "conversations": talk("Hello")},
    {"id": 4, "image": "deep/../one.png", "conversations": talk()},
    {"image": ["deep/two.jpg"], "conversations": talk()},
]


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "images"
    (images / "deep").mkdir(parents=True)
    PIL.Image.new("RGB", (30, 20), "red").save(images / "one.png")
    PIL.Image.new("L", (20, 40), 90).save(images / "deep" / "two.jpg")
    PIL.Image.new("RGB", (2, 2)).save(tmp_path / "secret.png")
    return tmp_path


def llava(folder, rows):
    (folder / "rows.json").write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return LlavaRecords(str(folder / "rows.json"), str(folder / "images"))


def test_llava_records(folder):
    records = llava(folder, ROWS)
    assert len(records) == 5
    read = [records[index] for index in range(5)]
    assert [record.id for record in read] == ["a", "b", "c", "4", "4"]
    assert [[picture.size for picture in record.pictures] for record in read] == [
        [(30, 20)],
        [(30, 20), (20, 40)],
        [],
        [(30, 20)],
        [(20, 40)],
    ]
    assert read[1].turns == (Turn("human", "<image><image>\nSame?"), Turn("gpt", "A cat."))
    assert read[0].pictures[0].getpixel((0, 0)) == (255, 0, 0)


def test_llava_records_become_batches(folder):
    (folder / "rows.json").write_text(json.dumps(ROWS))
    changes = {
        "data.source": "llava",
        "data.annotations": str(folder / "rows.json"),
        "data.images": str(folder / "images"),
        "data.images_per_row": 2,
        "data.aspect": "pad",
        "data.max_length": 320,
        "global_batch_size": 5,
    }
    config = tiny(**changes)
    prepare = Prepare(config.data, load_tokenizer("miniature"), VISION["clip-tiny"], SLOTS)
    (batch,) = take(training_batches(config, training_records(config), prepare, host=0, hosts=1), 1)
    assert sorted((batch.image_slots >= 0).sum(axis=1) // SLOTS) == [0, 1, 1, 1, 2]
    assert batch.loss_mask.any(axis=1).all()


def test_a_link_in_the_folder_may_lead_elsewhere(folder):
    """As data sets on other disks are laid in LLaVA's folder."""
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    PIL.Image.new("RGB", (8, 9)).save(elsewhere / "three.png")
    (folder / "images" / "coco").symlink_to(elsewhere)
    records = llava(folder, [{"id": "a", "image": "coco/three.png", "conversations": talk()}])
    assert records[0].pictures[0].size == (8, 9)


@pytest.mark.parametrize("path", ["../secret.png", "deep/../../secret.png", "/etc/hostname", "../images2/one.png"])
def test_a_path_that_leaves_the_folder_is_refused(folder, path):
    records = llava(folder, [{"id": "a", "image": path, "conversations": talk()}])
    with pytest.raises(UserError, match=r"Image path '.*' in .*rows\.json leaves the folder .*images\.$"):
        records[0]


def test_a_picture_that_cannot_be_read_is_named(folder):
    images = folder / "images"
    whole = io.BytesIO()
    rng = np.random.default_rng(0)
    PIL.Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole, "PNG")
    (images / "cut.png").write_bytes(whole.getvalue()[:3000])
    (images / "cut.jpg").write_bytes((images / "deep" / "two.jpg").read_bytes()[:-60])
    (images / "text.jpg").write_text("no picture")
    (images / "empty.jpg").touch()
    names = ["cut.png", "cut.jpg", "text.jpg", "empty.jpg", "missing.jpg", "deep", "one.png/x", ""]
    records = llava(folder, [{"id": "a", "image": name, "conversations": talk()} for name in names])
    for index, name in enumerate(names):
        with pytest.raises(UserError, match=rf"^Image .*{name}.* cannot be opened: .+\.$"):
            records[index]


@pytest.mark.parametrize(
    "row",
    [
        {"id": "a"},
        {"id": "a", "conversations": None},
        {"id": "a", "conversations": ["hello"]},
        {"id": "a", "conversations": [{"from": "human"}]},
        {"id": "a", "conversations": [{"value": "Hello"}]},
        {"id": "a", "conversations": [{"from": "human", "value": None}]},
        {"id": "a", "conversations": [{"from": "human", "value": 3}]},
        {"id": "a", "image": None, "conversations": talk()},
        {"id": "a", "image": 3, "conversations": talk()},
        {"id": "a", "image": [3], "conversations": talk()},
        ["a", "b"],
        "a",
        None,
        3,
    ],
    ids=repr,
)
def test_a_row_of_another_form_is_named(folder, row):
    records = llava(folder, [{"id": "a", "conversations": talk("Hello")}, row])
    assert records[0].id == "a"
    with pytest.raises(UserError, match=r"^Row 1 of .*rows\.json is not in LLaVA's conversation format\.$"):
        records[1]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[{", "is not JSON: Expecting"),
        ("", "is not JSON: Expecting value"),
        ('{"id": 1}\n{"id": 2}', "is not JSON: Extra data"),
        ('{"id": 1}', "should hold a JSON array of at least one row"),
        ("[]", "should hold a JSON array of at least one row"),
        ("3", "should hold a JSON array"),
    ],
)
def test_annotations_of_another_form_are_named(folder, content, sentence):
    with pytest.raises(UserError, match=rf"rows\.json {sentence}"):
        llava(folder, content)


def test_annotations_that_are_no_text_are_named(folder):
    with pytest.raises(UserError, match=r"one\.png is not JSON"):
        LlavaRecords(str(folder / "images" / "one.png"), str(folder / "images"))
    with pytest.raises(UserError, match=r"deep cannot be read"):
        LlavaRecords(str(folder / "images" / "deep"), str(folder / "images"))


@pytest.mark.parametrize("missing", ["annotations", "images"])
@pytest.mark.parametrize("path", ["", "nowhere/at/all"])
def test_missing_files_are_named_with_their_keys(folder, missing, path):
    (folder / "rows.json").write_text(json.dumps(ROWS))
    paths = {"annotations": str(folder / "rows.json"), "images": str(folder / "images")} | {missing: path}
    with pytest.raises(UserError, match=rf"{missing} .*{path}.*--config\.data\.{missing}=PATH.*configs/demo\.py"):
        LlavaRecords(**paths)
    config = tiny(**{"data.source": "llava"} | {f"data.{name}": value for name, value in paths.items()})
    with pytest.raises(UserError, match=rf"--config\.data\.{missing}=PATH"):
        training_records(config)


def test_records_are_read_only_when_asked_for(folder):
    """A missing picture stops the run when its turn comes, not before."""
    records = llava(folder, [ROWS[0], {"id": "z", "image": "missing.png", "conversations": talk()}])
    assert isinstance(records[0], Record)
