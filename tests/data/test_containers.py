"""Rows as the Hub has them: each schema, written by its own library, gives LLaVA's records, and defects are named."""

import concurrent.futures
import io
import json
import math
import os
import random
import re
import shutil

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath
from make_containers import IMAGE, PAIRS, WRITERS, make_image, make_rows, pair_rows, write_single, write_tar
from tiny import batches, make_preprocessor, tiny

from stf_jax.cli import run_command
from stf_jax.config import UserError
from stf_jax.data.conversation import find_chat, template_items
from stf_jax.data.pipeline import Batches, load_training_records
from stf_jax.data.ratings import Filter
from stf_jax.data.records import BadRow, Record, Turn
from stf_jax.data.rows import read_row, turn_to_json
from stf_jax.data.sources.containers import list_files
from stf_jax.data.sources.llava import PreparedRecords, open_container, open_llava
from stf_jax.data.sources.pages import find_values
from stf_jax.data.sources.tars import open_tars
from stf_jax.models.decoders.chat import Mark, Text
from stf_jax.prepare import main as prepare

ROWS = make_rows(13)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same rows in each container, by kind."""
    return {kind: write(tmp_path_factory.mktemp(kind), ROWS) for kind, write in WRITERS.items()}


def configure(annotations, images="", **changes):
    paths = {"data.annotations": str(annotations), "data.images": str(images)}
    return tiny(**{"data.source": "llava", "data.images_per_row": 2} | paths | changes)


def open_records(path, images="", **changes):
    (records,) = open_llava(configure(path, images, **changes))
    return records


def read(record: Record):
    return [turn.text for turn in record.turns], [np.asarray(image()).tobytes() for image in record.images]


# ---- Reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WRITERS)
def test_every_container_gives_the_same_records(files, kind):
    """In any order, by several threads."""
    records = open_records(files[kind], files[kind].parent / "images" if kind in ("llava", "messages", "paths") else "")
    reference = open_records(files["llava"], files["llava"].parent / "images")
    order = [*range(len(ROWS))] * 4
    random.Random(0).shuffle(order)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda index: read(records[index]), order))
    expected = [read(record) for record in map(reference.__getitem__, range(len(ROWS)))]
    assert len(records) == len(reference) == len(ROWS)
    assert found == [expected[index] for index in order]
    assert len({str(each) for each in found}) == len(ROWS)


def test_records_without_ids_are_named_by_file_and_row(files):
    records = open_records(files["pairs"])
    assert records[12].id == f"row 5 of {files['pairs']}/train-00001-of-00002.parquet"
    assert records[0].ignored_keys == ("relevance_ratings",)


def test_a_pattern_names_some_files_of_a_folder(files):
    assert len(open_records(f"{files['pairs']}/train-00001-*")) == 6
    assert len(open_records(f"{files['tars']}/*1.tar")) == 7


def test_a_pattern_may_name_folders(files, tmp_path):
    for name in ("b", "a", "[c]", ".hidden"):
        shutil.copytree(files["pairs"], tmp_path / "sets" / name)
    found = list_files(f"{tmp_path}/sets/*/train-00001-*")
    assert [file.parent.name for file in found] == ["[c]", "a", "b"]
    assert len(open_records(f"{tmp_path}/*/[ab]/train-00001-*")) == 2 * 6
    assert len(list_files(f"{tmp_path}/sets/[c]")) == len(list_files(f"{tmp_path}/sets/a"))
    assert list_files(f"{tmp_path}/sets/*/nothing-*") == list_files(f"{tmp_path}/nowhere/*/train-*") == []


def test_an_image_without_its_file_in_a_column_without_paths(tmp_path):
    schema = pa.schema([("images", pa.list_(pa.struct([("bytes", pa.binary())]))), PAIRS.field("texts")])
    rows = [{"images": [{"bytes": content}], "texts": pair_rows(ROWS)[0]["texts"]} for content in (make_image(0), None)]
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "a.parquet")
    records = open_records(tmp_path / "a.parquet")
    assert records[0].images[0]().size
    with pytest.raises(BadRow):
        records[1].images[0]()


def test_captions_beside_images(tmp_path):
    """As img2dataset writes them; members without a suffix are no samples."""
    facts = json.dumps({"url": "http://a.org/b.jpg", "caption": "a cat", "width": 3}).encode()
    members = [("README", b""), ("0.png", make_image(0)), ("0.txt", b"A cat."), ("0.json", facts), ("1.txt", b"A dog.")]
    records = open_records(write_tar(tmp_path / "a.tar", members))
    assert records[0].turns == (Turn("human", "<image>"), Turn("gpt", "A cat."))
    assert records[0].ignored_keys == ("url", "caption", "width")
    assert [len(records[i].images) for i in range(2)] == [1, 0]


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "none", "use_dictionary": False},
        {"compression": "none", "use_dictionary": False, "data_page_size": 1000, "write_batch_size": 1},
        {"compression": "snappy", "use_dictionary": False},
        {"compression": "none"},
        {"compression": "none", "use_dictionary": False, "data_page_version": "2.0"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_images_are_found_in_parquet_pages(tmp_path, options):
    """Those with a dictionary, compressed, or of the second version are read by pyarrow instead."""
    rows = pair_rows(ROWS)
    pq.write_table(pa.Table.from_pylist(rows, PAIRS), tmp_path / "a.parquet", row_group_size=7, **options)
    container = open_container(str(tmp_path / "a.parquet"))
    found = [[image.read() for image in container[i]["images"]] for i in range(len(rows))]
    assert found == [images for images, _ in ROWS]
    metadata = pq.read_metadata(tmp_path / "a.parquet")
    places = find_values(epath.Path(tmp_path / "a.parquet"), metadata.row_group(1).column(0), (1, 3))
    if options.get("use_dictionary", True) or options["compression"] != "none" or "data_page_version" in options:
        assert places is None
    else:
        content = (tmp_path / "a.parquet").read_bytes()
        flat = [image for images, _ in ROWS[7:] for image in images]
        assert [content[begin : begin + size] for begin, size in places] == flat


def test_a_column_of_single_images(tmp_path):
    rows = [(images[:1], pairs) for images, pairs in ROWS]
    records = open_records(write_single(tmp_path, rows))
    for index, (images, _) in enumerate(rows):
        assert [np.asarray(image()).shape[1] for image in records[index].images] == [20 + 10 * index] * len(images)


def test_an_image_without_its_file_is_below_the_folder_of_images(tmp_path):
    (tmp_path / "a.png").write_bytes(make_image(3))
    rows = [
        {"image": {"bytes": None, "path": path}, "texts": pair_rows(ROWS)[0]["texts"]} for path in ("a.png", "../b")
    ]
    schema = pa.schema([("image", IMAGE), PAIRS.field("texts")])
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "a.parquet")
    records = open_records(tmp_path / "a.parquet", tmp_path)
    assert records[0].images[0]().size == (23, 12)
    with pytest.raises(BadRow, match=r"Image path '\.\./b' leaves the folder"):
        records[1].images[0]()
    with pytest.raises(BadRow, match=r"Image 'a\.png' is a path, but no image folder is given"):
        open_records(tmp_path / "a.parquet")[0].images[0]()


# ---- Conversations ---------------------------------------------------------------------------------------------------

IMAGE_PART, NEWLINE = {"type": "image"}, Text("\n")


@pytest.mark.parametrize(
    ("parts", "question"),
    [
        ([IMAGE_PART, "What?"], [Mark.IMAGE, NEWLINE, Text("What?")]),  # as in LLaVA
        ([IMAGE_PART, IMAGE_PART, " Same?"], [Mark.IMAGE, NEWLINE, Mark.IMAGE, NEWLINE, Text("Same?")]),
        (["What is ", IMAGE_PART, "?"], [Text("What is "), Mark.IMAGE, Text("?")]),
        ([IMAGE_PART, "Like ", IMAGE_PART], [Mark.IMAGE, Text("Like "), Mark.IMAGE]),
    ],
)
def test_interleaved_images_stay_in_place(parts, question):
    images = [f"{i}.png" for i in range(parts.count(IMAGE_PART))]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A cat."}]
    row = read_row({"images": images, "messages": messages}, "row")
    items = template_items("v1", Record("row", (None,) * len(images), row.turns))
    begin = len(find_chat("v1").start + find_chat("v1").before_question)
    assert items[begin : begin + len(question)] == question
    # What prepare writes is read as the same.
    again = {"image": images, "conversations": [turn_to_json(turn) for turn in row.turns]}
    assert read_row(again, "row").turns == row.turns


def test_a_system_text_without_a_place_is_left_out_and_counted(tmp_path, caplog):
    row = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<image>"}]}
    row["messages"].append({"role": "assistant", "content": "A cat."})
    (tmp_path / "0.png").write_bytes(make_image(0))
    (tmp_path / "rows.jsonl").write_text(json.dumps(row | {"image": "0.png"}))
    config = configure(tmp_path / "rows.jsonl", tmp_path, **{"data.template": "plain"})
    with caplog.at_level("WARNING"):
        lengths, _ = make_preprocessor(config).measure(open_llava(config)[0])
    assert "a system text, for which template 'plain' has no place (1 rows)" in caplog.text
    assert lengths[0] > 0


# ---- Filters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "row", "kept"),
    [
        ("relevance>=4", {"relevance_ratings": [5, 1], "texts": ["a", "b"]}, ["a"]),
        ("relevance>=4 and form<3", {"relevance_ratings": [5, 5], "form_ratings": [3, 2], "texts": ["a", "b"]}, ["b"]),
        ("relevance>=4", {"relevance_ratings": [5, None], "texts": ["a", "b"]}, ["a", "b"]),
        ("relevance>=4", {"relevance": 4, "texts": ["a", "b"]}, ["a", "b"]),
        ("relevance>=4", {"relevance_ratings": [math.nan, 5, 1], "texts": ["a", "b", "c"]}, ["a", "b"]),
        ("relevance>=4", {"relevance": math.nan, "texts": ["a", "b"]}, ["a", "b"]),
        ("relevance>=4", {"relevance_ratings": [], "relevance_min": 5, "texts": ["a"]}, ["a"]),
        ("relevance == 4.5", {"relevance_min": 4.5, "texts": ["a"]}, ["a"]),
        ("relevance>4", {"relevance_min": 4, "texts": ["a"]}, "filtered"),
        ("relevance>=4 and form<3", {"relevance_ratings": [5, 1], "form_ratings": [3, 2], "texts": []}, "filtered"),
        ("relevance!=4", {"texts": ["a"]}, ["a"]),
        ("relevance>=4", {"relevance_ratings": [5], "texts": ["a", "b"]}, "ratings"),
        ("relevance>=4", {"relevance": "high", "texts": ["a"]}, "ratings"),
    ],
)
def test_filters(text, row, kept):
    if isinstance(kept, str):
        with pytest.raises(BadRow, match=r"^Row 3 of a ") as error:
            Filter(text).keep(row, "row 3 of a")
        assert error.value.reason == kept
    else:
        assert Filter(text).keep(row, "row 3 of a")["texts"] == kept


def test_filtered_rows_are_not_in_the_data_set(files):
    """Rows with a rating of at least 4 are every first and third of four; LLaVA's have no ratings."""
    changes = {"data.filter": "relevance>=4"}
    paths = f"{files['llava']},{files['pairs']}"
    llava, pairs = open_llava(configure(paths, files["llava"].parent / "images", **changes))
    kept = [i for i in range(len(ROWS)) if i % 4 in (0, 2)]
    assert (len(llava), len(pairs)) == (len(ROWS), len(kept))
    assert [pairs[i].turns[0].text.removeprefix("<image>") for i in range(len(kept))] == [f"What is {i}?" for i in kept]
    assert [len(pairs[i].turns) for i in range(len(kept))] == [2 if i % 4 == 0 else 4 for i in kept]


# ---- The index of a tar ----------------------------------------------------------------------------------------------


def _caption_tar(file, caption):
    return write_tar(file, [("0.png", make_image(0)), ("0.txt", caption.encode())])


@pytest.mark.parametrize("damage", ["", "{", '{"version": 1}', "old", "outside"])
def test_the_index_of_a_tar_is_made_once_and_again_for_another(tmp_path, monkeypatch, damage):
    file, index = _caption_tar(tmp_path / "a.tar", "A cat."), tmp_path / "a.tar.index.json"
    assert open_tars(str(file))[0]["conversations"][1]["value"] == "A cat."
    made = index.read_text()
    if damage == "old":
        _caption_tar(file, "A dog.")
        os.utime(file, ns=(1, 1))
    elif damage == "outside":
        index.write_text(made.replace(", 6]", f", {2**40}]"))
        assert index.read_text() != made
    elif damage:
        index.write_text(damage)
    else:
        monkeypatch.setattr("stf_jax.data.sources.tars._list_samples", None)
    answer = open_tars(str(file))[0]["conversations"][1]["value"]
    assert answer == ("A dog." if damage == "old" else "A cat.")
    assert damage in ("", "old") or index.read_text() == made


def test_the_index_of_a_tar_in_a_read_only_folder_is_cached(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    file = _caption_tar(folder / "a.tar", "A cat.")
    (folder / "a.tar.index.json").mkdir()  # root may write anywhere, but not to a folder
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert len(open_tars(str(file))) == 1
    (cached,) = (tmp_path / "cache" / "stf_jax" / "tars").iterdir()
    monkeypatch.setattr("stf_jax.data.sources.tars._list_samples", None)
    assert len(open_tars(str(file))) == 1
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    assert cached.name.endswith(".index.json")


# ---- Defective twins -------------------------------------------------------------------------------------------------


def _write_table(folder, *, drop="", schema=PAIRS, **changes):
    rows = [row | changes for row in pair_rows(ROWS)]
    schema = pa.schema([field for field in schema if field.name != drop])
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / "a.parquet", row_group_size=5, use_dictionary=False)
    return folder / "a.parquet"


def _cut(file, size):
    file.write_bytes(file.read_bytes()[:size])
    return file


def _copy_disk(folder, files):
    for path in files["disk"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def _write_other_turns(folder, files):
    del files
    schema = pa.schema([("texts", pa.list_(pa.int64()))])
    pq.write_table(pa.Table.from_pylist([{"texts": [1]}], schema), folder / "a.parquet")
    return folder / "a.parquet"


def _write_bad_line(folder, files):
    lines = files["messages"].read_text().splitlines()
    (folder / "a.jsonl").write_text("\n".join([*lines[:2], lines[2][:-5], *lines[3:]]))
    return folder / "a.jsonl"


def _drop_shard(folder, files):
    _copy_disk(folder, files)
    (folder / "data-00001-of-00002.arrow").unlink()
    return folder


def _cut_disk(folder, files):
    _cut(_copy_disk(folder, files) / "data-00001-of-00002.arrow", 9000)
    return folder


def _change_state(folder, files):
    state = _copy_disk(folder, files) / "state.json"
    state.write_text(state.read_text().replace("data-00000", "../data-00000"))
    return folder


def _several_splits(folder, files):
    for split in ("train", "test"):
        content = (files["pairs"] / "train-00000-of-00002.parquet").read_bytes()
        (folder / f"{split}-00000-of-00001.parquet").write_bytes(content)
    return folder


def _several_sets(folder, files):
    (folder / "train").mkdir()
    _copy_disk(folder / "train", files)
    (folder / "dataset_dict.json").write_text('{"splits": ["train"]}')
    return folder


def _mixed_kinds(folder, files):
    write_tar(folder / "a.tar", [("0.txt", b"A")])
    _write_table(folder)
    return folder


def _members(*names):
    return lambda folder, files: write_tar(folder / "a.tar", [(name, b"a") for name in names])


def _write_link(folder, files):
    import tarfile

    del files
    with tarfile.open(folder / "a.tar", "w") as tar:
        info = tarfile.TarInfo("0.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    return folder / "a.tar"


DEFECTS = {
    "no column of turns": (lambda f, _: _write_table(f, drop="texts"), r"a\.parquet has no column conversations, "),
    "turns of another type": (_write_other_turns, r"Row 0 of .*a\.parquet: pair 1 of texts is a number, not an object"),
    "images of another type": (
        lambda f, _: _write_table(f, schema=PAIRS.remove(0).insert(0, pa.field("images", pa.int64())), images=3),
        r"Row 0 of .*a\.parquet has an image that is a number",
    ),
    "a file cut short": (lambda f, _: _cut(_write_table(f), 3000), r"a\.parquet cannot be read as Parquet: "),
    "an image without content": (
        lambda f, _: _write_table(f, images=[{"bytes": None, "path": None}]),
        r"Image 0 of row 0 of .*a\.parquet is empty",
    ),
    "no image": (lambda f, _: _write_table(f, images=[{"bytes": b"x"}]), r"Image 0 of row 0 of .*: its format is none"),
    "a bad line": (_write_bad_line, r"Line 3 of .*a\.jsonl is not JSON: "),
    "a missing shard": (_drop_shard, r"data-00001-of-00002\.arrow is missing, but state\.json lists it"),
    "a shard cut short": (_cut_disk, r"data-00001-of-00002\.arrow cannot be read as Arrow: "),
    "a shard elsewhere": (_change_state, r"state\.json does not list the files of a data set"),
    "several splits": (_several_splits, r"of several splits; choose one: .*test-\* or .*train-\*"),
    "several data sets": (_several_sets, r"has several splits; choose one: .*/train"),
    "several kinds": (_mixed_kinds, r"has (Parquet files and tars|tars and Parquet files); give a pattern"),
    "a tar cut short": (
        lambda f, files: _cut(_caption_tar(f / "a.tar", "A cat."), 2000),
        r"a\.tar is cut short or damaged after 0\.(png|txt): .*; copy it again",
    ),
    "a tar without an end": (
        lambda f, files: _cut(_caption_tar(f / "a.tar", "A cat."), 2560),
        r"a\.tar is cut short or damaged after 0\.txt: it has no end mark",
    ),
    "a compressed tar": (
        lambda f, _: (f / "a.tar").write_bytes(b"\x1f\x8b" + bytes(600)) and f / "a.tar",
        r"a\.tar is compressed, so its rows cannot be read by index; decompress it first",
    ),
    "no samples": (_members("README"), r"a\.tar has no files named KEY\.SUFFIX"),
    "a name that leaves": (
        _members("a/../../0.png"),
        r"a\.tar has 'a/\.\./\.\./0\.png', a name that leaves the archive",
    ),
    "an absolute name": (_members("/etc/0.png"), r"a\.tar has '/etc/0\.png', a name that leaves the archive"),
    "a member twice": (_members("0.png", "./0.png"), r"a\.tar has '\./0\.png' twice"),
    "a link": (_write_link, r"a\.tar has '0\.png', which is no ordinary file"),
    "JSON cut short": (_members("0.png", "0.json"), r"Row 0 of .*a\.tar: 0\.json is not JSON: "),
    "JSON too deep": (
        lambda f, _: write_tar(f / "a.tar", [("0.json", b"[" * 900 + b"]" * 900)]),
        r"Row 0 of .*a\.tar: 0\.json is not JSON: it is nested too deeply",
    ),
    "no turns": (_members("0.png"), r"Row 0 of .*a\.tar has no list of turns"),
    "a video": (
        lambda f, _: write_tar(f / "a.tar", [("0.mp4", b""), ("0.txt", b"A cat.")]),
        r"Row 0 of .*a\.tar has 'mp4', which is not read",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_end_with_a_sentence_that_names_the_file(tmp_path, files, defect):
    make, sentence = DEFECTS[defect]
    config = configure(make(tmp_path, files), tmp_path)
    with pytest.raises(UserError, match=sentence) as error:
        batches(config, 1)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(".")


def test_a_damaged_page_affects_only_its_own_rows(tmp_path):
    file = _write_table(tmp_path)
    file.write_bytes(b"PAR1" + b"\xff" * 36 + file.read_bytes()[40:])
    records = open_records(file)
    with pytest.raises(BadRow, match=r"^Image 0 of row 1 of .*a\.parquet cannot be read: .*\.$"):
        records[1].images[0]()
    assert read(records[6])[1] == [np.asarray(PIL.Image.open(io.BytesIO(ROWS[6][0][0]))).tobytes()]


def test_damaged_bytes_of_parquet_give_images_or_reasons(tmp_path):
    """Whatever the headers of pages and the lengths of images say."""
    content, rng = _write_table(tmp_path).read_bytes(), np.random.default_rng(0)
    metadata = pq.read_metadata(tmp_path / "a.parquet")
    columns = [metadata.row_group(group).column(0) for group in range(metadata.num_row_groups)]
    headers = [column.data_page_offset for column in columns]
    good = bad = 0
    for number in range(60):
        damaged = bytearray(content)
        begin = headers[number % len(headers)] + int(rng.integers(0, 60))
        damaged[begin : begin + 1 + number % 7] = (
            rng.choice([0, 28, 255, 130], 1 + number % 7).astype(np.uint8).tobytes()
        )
        (tmp_path / "a.parquet").write_bytes(damaged)
        rows = open_container(str(tmp_path / "a.parquet"))
        for index in (0, 6, 10):
            reason = ""
            try:
                good += isinstance(rows[index]["images"][0].read(), bytes)
            except BadRow as error:
                reason = error.reason
            assert reason in ("", "corrupt")
            bad += bool(reason)
    assert good > 100
    assert bad > 10


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("relevance", r"The filter 'relevance' should be conditions like"),
        ("relevance>=4 or form>3", r"should be conditions like 'relevance>=4 and formatting>=3'"),
        ("style>=4", r"data\.filter=style>=4: no data set has ratings under style, style_ratings, style_min\."),
        ("relevance>9", r"data\.filter=relevance>9 leaves no row of .*pairs\."),
    ],
)
def test_filters_that_cannot_be_used_are_reported(files, text, sentence):
    with pytest.raises(UserError, match=sentence):
        open_records(files["pairs"], **{"data.filter": text})


# ---- Preparing, and training on a mixture ----------------------------------------------------------------------------


def test_prepared_rows_are_the_same(files, tmp_path, capsys):
    """Those with two images are too long, and named; others are filtered."""
    kinds = ("pairs", "disk", "tars")
    arguments = [*(f"--annotations={files[kind]}" for kind in kinds), f"--out={tmp_path / 'out'}", "--workers=1"]
    arguments += ["--tokenizer=miniature", "--image-tokens=100", "--max-length=230", "--filter=relevance>=2"]
    assert run_command(prepare, arguments) == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    ready, expected, dropped, filtered = PreparedRecords(str(tmp_path / "out")), [], [], 0
    for kind in kinds:
        container = open_container(str(files[kind]))
        records = open_records(files[kind], **({"data.filter": "relevance>=2"} if kind == "pairs" else {}))
        filtered += len(container) - len(records)
        expected += [read(record) for i in range(len(records)) if len((record := records[i]).images) < 2]
        # In the Parquet files they are all filtered.
        dropped += [container.locate(i) for i, (images, _) in enumerate(ROWS) if len(images) == 2 and kind != "pairs"]
    assert [read(ready[i]) for i in range(len(ready))] == expected
    assert report["rows_dropped"] == {"filtered": filtered, "over_length": len(dropped)}
    assert report["rows_read"] == 3 * len(ROWS)
    assert sorted((row["file"], row["row"]) for row in report["dropped"]) == sorted(dropped)


def test_prepare_needs_the_folder_of_paths(files, tmp_path, capsys):
    assert run_command(prepare, [f"--annotations={files['llava']}", f"--out={tmp_path}/b"]) == 2
    assert re.search(r"llava\.json has paths of images; give their folder", capsys.readouterr().err)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("packing", [False, True])
def test_a_mixture_resumes_on_another_number_of_hosts(files, packing):
    """LLaVA's JSON, FineVision's Parquet and tars: to the bit, after a batch within an epoch."""
    names = ",".join(str(files[kind]) for kind in ("llava", "pairs", "tars"))
    changes = {
        "data.mix": (1.0, 2.0, 0.5),
        "data.packing": packing,
        "global_batch_size": 4,
        "data.filter": "relevance>1",
    }
    config = configure(names, files["llava"].parent / "images", **changes)

    def start(host, hosts):
        return Batches(config, load_training_records(config), make_preprocessor(config), host=host, hosts=hosts)

    alone = start(0, 1)
    for _ in range(3):
        next(alone)
    state = json.loads(json.dumps(alone.get_state()))
    hosts = [start(host, 2) for host in range(2)]
    for host in hosts:
        host.set_state(state)
    kinds = set()
    for _ in range(6):
        expected, parts = next(alone), [next(host) for host in hosts]
        for name in ("tokens", "targets", "loss_mask", "positions", "segment_ids", "image_slots", "images"):
            whole, (first, second) = getattr(expected, name), (getattr(part, name) for part in parts)
            np.testing.assert_array_equal(whole[0::2], first, err_msg=name)
            np.testing.assert_array_equal(whole[1::2], second, err_msg=name)
        kinds.add(expected.images.shape)
    assert alone.replaced == sum(host.replaced for host in hosts) == 0
    ids = {
        re.sub(r"[0-9]+ of|r[0-9]+", "", each)
        for batch in range(1, 9)
        for row in alone.record_ids(batch)
        for each in row
    }
    assert len(ids) == 3, ids  # named by the Parquet files; r0, …
    for stream in (alone, *hosts):
        stream.close()
