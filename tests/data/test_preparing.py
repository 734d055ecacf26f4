"""Tests preparing LLaVA's files: what is kept, what is dropped and why, and continuing after a kill."""

import concurrent.futures
import contextlib
import fcntl
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import tracemalloc

import grain
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from etils import epath
from make_llava import make

from stf_jax.cli import run_command
from stf_jax.config import UserError
from stf_jax.data.conversation import encode, template_items
from stf_jax.data.image import open_image
from stf_jax.data.preparing import Options, prepare
from stf_jax.data.shard_writer import number_rows, open_sources, read_shard, shrink
from stf_jax.data.sources.llava import LlavaRecords, PreparedRecords, read_rows
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.prepare import main

ROWS, SHARD = 40, 16


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """LLaVA's files with known faults, and the number of rows with each fault."""
    folder = tmp_path_factory.mktemp("llava")
    return folder, make(folder, captions=8, conversations=ROWS)


def options(folder, out, **changes):
    annotations = (str(folder / "llava_v1_5_mix665k.json"),)
    made = {"annotations": annotations, "images": str(folder / "images"), "out": str(out), "workers": 2}
    return Options(**made | {"shard_rows": SHARD} | changes)


@pytest.fixture(scope="module")
def prepared(data, tmp_path_factory):
    """A finished data set under a name that TFDS accepts, and its report."""
    out = tmp_path_factory.mktemp("out") / "mine" / "1.0.0"
    report = prepare(options(data[0], out, tokenizer="miniature", image_tokens=9))
    return out, report


def test_bad_rows_are_dropped_for_the_right_reason(data, prepared):
    (_, faults), (out, report) = data, prepared
    values = json.loads((out / "report.json").read_text())
    assert values == report.values
    assert values["rows_read"] == ROWS + sum(faults.values())
    assert values["rows_kept"] == ROWS
    assert values["rows_dropped"] == faults
    for row in values["dropped"]:
        # The ids of bad rows contain the reason.
        assert row["id"].removeprefix("bad-") in {"empty": "corrupt", "long": "over_length"} | {row["reason"]: ""}
        rows = json.loads(pathlib.Path(row["file"]).read_text())
        assert rows[row["row"]]["id"] == row["id"]
        assert row["image"] == rows[row["row"]].get("image", "")
    assert values["image_formats"]["GIF"] == ROWS // 8
    assert values["text_only_rows"] == ROWS // 16


def test_a_beam_pipeline_makes_the_same_data_set(data, prepared, tmp_path):
    out = tmp_path / "mine" / "1.0.0"
    beam = options(data[0], out, tokenizer="miniature", image_tokens=9, runner="DirectRunner")
    assert prepare(beam).values == prepared[1].values
    assert {file.name for file in out.iterdir()} == {file.name for file in prepared[0].iterdir()}
    for name in ("report.json", "kept.json", "dataset_info.json", "features.json"):
        assert (out / name).read_bytes() == (prepared[0] / name).read_bytes()
    sources = (tfds.builder_from_directory(path).as_data_source("train") for path in (out, prepared[0]))
    for example, reference in zip(*sources, strict=True):
        assert (example["id"], example["images"]) == (reference["id"], reference["images"])
    ends = [prepare(options(data[0], tmp_path / f"to-{name}", limit=21, runner=name)) for name in ("", "DirectRunner")]
    assert ends[0].values == ends[1].values


@pytest.mark.parametrize("limit", [0, 7])
def test_shards_read_by_number_are_those_read_in_order(tmp_path, limit):
    """Over the end of a file, of two kinds."""
    rows = [{"id": str(i), "conversations": []} for i in range(9)]
    (tmp_path / "a.json").write_text(json.dumps(rows[:4]))
    texts = [{"user": "Who?", "assistant": "Me."}]
    pq.write_table(pa.Table.from_pylist([{"id": r["id"], "texts": texts} for r in rows[4:]]), tmp_path / "b.parquet")
    names = tuple(str(tmp_path / name) for name in ("a.json", "b.parquet"))
    made = Options(names, "", "", 1, limit=limit, shard_rows=3)

    def read(rows):
        return [(*place, (row() if callable(row) else row)["id"]) for *place, row in rows]

    expected = read(number_rows(made))
    assert [number for _, _, number in expected] == [row["id"] for row in rows[: limit or None]]
    assert [row for shard in range(3) for row in read(read_shard(made, open_sources(made), shard))] == expected


def test_a_beam_pipeline_resumes_and_is_strict(data, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [f"--annotations={data[0] / 'llava_v1_5_mix665k.json'}", f"--images={data[0] / 'images'}"]
    arguments += [f"--out={out}", "--runner=DirectRunner", "--beam-options=--direct_num_workers=1"]
    assert run_command(main, [*arguments, "--strict"]) == 2
    assert "error: --strict: row " in capsys.readouterr().err
    assert not (out / "dataset_info.json").exists()
    assert run_command(main, arguments) == 0
    assert not (out / "unfinished").exists()
    assert run_command(main, [*arguments[:2], f"--out={tmp_path / 'other'}", "--runner=NoSuchRunner"]) == 2
    assert "NoSuchRunner with --beam-options='': Unexpected pipeline runner" in capsys.readouterr().err
    assert (
        run_command(main, [*arguments[:2], f"--out={tmp_path / 'other'}", "--runner=DirectRunner", "--beam-options='"])
        == 2
    )
    assert "No closing quotation" in capsys.readouterr().err
    assert (
        run_command(
            main,
            [
                *arguments[:2],
                f"--out={tmp_path / 'other'}",
                "--runner=DirectRunner",
                "--beam-options=--direct_num_workers=x",
            ],
        )
        == 2
    )
    assert "--direct_num_workers: invalid int value: 'x'\n" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    assert run_command(main, [*arguments, "--workers=2"]) == 2
    assert "--workers is for processes of this machine" in capsys.readouterr().err


def test_without_beam_a_runner_is_refused(data, tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "stf_jax.data.beam", raising=False)
    monkeypatch.delattr("stf_jax.data.beam", raising=False)  # of the package, if another test has imported it
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    arguments = [f"--annotations={data[0] / 'llava_v1_5_mix665k.json'}", f"--images={data[0] / 'images'}"]
    assert run_command(main, [*arguments, f"--out={tmp_path / 'out'}", "--runner=DirectRunner"]) == 2
    assert "--runner needs Apache Beam, but there is no module apache_beam: install" in capsys.readouterr().err


def test_file_modes_follow_the_umask(prepared, tmp_path):
    (tmp_path / "file").touch()
    modes = {file.stat().st_mode for file in prepared[0].rglob("*") if file.is_file()}
    assert modes == {(tmp_path / "file").stat().st_mode}


def test_the_summary_has_reasons_files_and_ids(data, prepared):
    text = prepared[1].summary()
    assert f"{ROWS} kept" in text
    for reason in data[1]:
        assert reason in text
    assert re.search(r"row \d+, bad-missing: Image .*vg/VG_100K_2/0\.jpg cannot be opened: ", text)
    assert "tokens per conversation, counted by miniature: min" in text
    with PIL.Image.open(prepared[0] / "histograms.png") as image:
        assert image.size == (1100, 396)
        assert len(np.unique(np.asarray(image.convert("L")))) > 10


def test_tfds_and_grain_can_read_the_data_set(data, prepared):
    folder, out = data[0], prepared[0]
    source = tfds.data_source("mine", data_dir=out.parent.parent, split="train")
    rows = json.loads((out / "kept.json").read_text())
    assert len(source) == len(rows) == ROWS
    dataset = grain.MapDataset.source(source).seed(0).shuffle()
    assert sorted(dataset[i]["id"].decode() for i in range(ROWS)) == sorted(row["id"] for row in rows)
    for found, row in zip(source, rows, strict=True):
        turns = found["conversations"]
        values = [value.decode() for value in turns["value"]]
        assert [{"from": a.decode(), "value": b} for a, b in zip(turns["from"], values, strict=True)] == (
            row["conversations"]
        )
        names = [row["image"]] if "image" in row else []
        # Files are copied unchanged.
        assert found["images"] == [(folder / "images" / name).read_bytes() for name in names]


def test_prepared_records_match_the_files(data, prepared):
    folder, out = data[0], prepared[0]
    files = LlavaRecords(str(folder / "llava_v1_5_mix665k.json"), str(folder / "images"))
    by_id = {}
    for i in range(len(files)):
        try:
            by_id[files[i].id] = files[i]
        except UserError:
            continue
    ready = PreparedRecords(str(out))
    for record in (ready[i] for i in range(len(ready))):
        expected = by_id[record.id]
        assert record.turns == expected.turns
        for image, reference in zip(record.images, expected.images, strict=True):
            assert image().tobytes() == reference().tobytes()
        assert record.sizes or not record.images
        assert record.image_sizes() == [image().size for image in record.images]


def test_token_counts_match_training(prepared):
    tokenizer, ready = load_tokenizer("miniature"), PreparedRecords(str(prepared[0]))
    lengths = [len(encode(template_items("v1", ready[i]), tokenizer, 9).tokens) for i in range(len(ready))]
    tokens = prepared[1].values["tokens"]
    assert (tokens["min"], tokens["max"]) == (min(lengths), max(lengths))
    assert tokens["mean"] == pytest.approx(np.mean(lengths))


def test_repeating_the_command_changes_nothing(data, tmp_path, capsys):
    folder, out = data[0], tmp_path / "out"
    command = [f"--annotations={folder}/llava_v1_5_mix665k.json", f"--images={folder}/images", f"--out={out}"]
    command += ["--limit=20", "--max-side=64", "--workers=1"]
    assert run_command(main, command) == 0
    output = capsys.readouterr().out
    assert "20 rows read" in output
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert not (out / "unfinished").exists()
    assert run_command(main, command) == 0
    finished = f"{out} is already finished; to check the input again, remove the folder.\n"
    assert capsys.readouterr().out == finished + output
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    # --max-side shrinks images and keeps their aspect ratio.
    ready = PreparedRecords(str(out))
    files = LlavaRecords(f"{folder}/llava_v1_5_mix665k.json", f"{folder}/images")
    shapes = {files[i].id: files[i].images[0]().size for i in range(20) if "bad" not in str(files._rows[i]["id"])
              and files[i].images}  # fmt: skip
    for i in range(len(ready)):
        for image in ready[i].images:
            width, height = image().size
            assert max(width, height) == 64
            assert width / height == pytest.approx(np.divide(*shapes[ready[i].id]), rel=0.05)
    assert run_command(main, [*command, "--max-length=9"]) == 2
    assert "has a data set made from other input" in capsys.readouterr().err


_KILLED = """
import sys
from stf_jax.data.preparing import Options, prepare
if __name__ == "__main__":
    folder, out = sys.argv[1:]
    prepare(Options((f"{folder}/llava_v1_5_mix665k.json",), f"{folder}/images", out, workers=1, shard_rows=2))
"""


def test_a_killed_run_can_be_continued(data, tmp_path):
    folder, out = data[0], tmp_path / "out"
    script = tmp_path / "script.py"
    script.write_text(_KILLED)
    process = subprocess.Popen([sys.executable, script, folder, out], start_new_session=True)
    notes = out / "unfinished"
    try:
        while process.poll() is None and len(list(notes.glob("0*.json"))) < 3:
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)  # its worker too
    finally:
        process.wait()
    assert not (out / "dataset_info.json").exists()
    with pytest.raises(UserError, match="has no finished data set"):
        PreparedRecords(str(out))
    done = {f"llava-train.array_record-{note.stem}-of-00024" for note in notes.glob("0*.json")}
    assert 3 <= len(done) < 24
    before = {name: (out / name).stat().st_mtime_ns for name in done}
    again = options(folder, out, workers=1, shard_rows=2)
    with pytest.raises(UserError, match="unfinished work on other input"):
        prepare(options(folder, out, shard_rows=2, limit=7))
    resumed = prepare(again)
    assert {name: (out / name).stat().st_mtime_ns for name in done} == before
    complete = prepare(options(folder, tmp_path / "complete", shard_rows=2))
    assert resumed.values == complete.values
    assert (out / "kept.json").read_bytes() == (tmp_path / "complete" / "kept.json").read_bytes()
    sources = (tfds.builder_from_directory(path).as_data_source("train") for path in (out, tmp_path / "complete"))
    assert len(resumed.values["dropped"]) == 8
    for example, reference in zip(*sources, strict=True):
        assert (example["id"], example["images"]) == (reference["id"], reference["images"])
    names = {path.name for path in out.iterdir()}
    assert names == {path.name for path in (tmp_path / "complete").iterdir()}  # no partial files remain


def test_strict_stops_at_a_bad_row_and_leaves_no_finished_data_set(data, tmp_path, capsys):
    folder, out = data[0], tmp_path / "out"
    command = [f"--annotations={folder}/llava_v1_5_mix665k.json", f"--images={folder}/images", f"--out={out}"]
    assert run_command(main, [*command, "--strict", "--workers=1"]) == 2
    assert capsys.readouterr().err.startswith("error: --strict: ")
    assert not list(out.glob("llava-train*"))
    assert not (out / "dataset_info.json").exists()


def test_strict_refuses_a_finished_data_set_with_dropped_rows(data, prepared):
    again = options(data[0], prepared[0], tokenizer="miniature", image_tokens=9, strict=True)
    with pytest.raises(UserError, match=r"^--strict: "):
        prepare(again)


def test_other_folders_are_not_changed(data, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "tfds").mkdir()
    (tmp_path / "tfds" / "dataset_info.json").write_text("{}")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "report.json").write_text("{}")
    with pytest.raises(UserError, match=r"file cannot be created: File exists\.$"):
        prepare(options(data[0], tmp_path / "file"))
    with pytest.raises(UserError, match="exists and is not empty"):
        prepare(options(data[0], tmp_path / "other"))
    with pytest.raises(UserError, match="has a data set made from other input"):
        prepare(options(data[0], tmp_path / "tfds"))


def test_paths_outside_the_folder_and_extreme_images_are_refused(tmp_path):
    (tmp_path / "images").mkdir()
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    PIL.Image.new("RGB", (1, 300)).save(tmp_path / "images" / "thin.png")
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "images" / "good.png")
    names = ["../secret.png", str(tmp_path / "secret.png"), "gs://bucket/a.png", "a\0b.png", "thin.png", "good.png"]
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A thing."}]
    rows = [{"id": "same", "image": name, "conversations": turns} for name in names]
    rows.append({"id": None, "conversations": [{"from": "human", "value": "word " * 3000}, turns[1]]})
    rows.append({"id": "half \ud83d", "image": "\ud83d.png", "conversations": turns})
    (tmp_path / "llava_v1_5_mix665k.json").write_text(json.dumps(rows))
    report = prepare(options(tmp_path, tmp_path / "out", workers=1))
    assert report.values["rows_dropped"] == {
        "no_text": 1,
        "over_estimate": 1,
        "url": 1,
        "outside": 2,
        "missing": 1,
        "too_large": 1,
    }
    assert report.values["duplicate_ids"] == ["same"]
    assert report.values["tokens_are"].startswith("estimated")
    long, half = report.values["dropped"][-2:]
    # 15,000 bytes and the 8 of the answer, at four per token.
    assert "1 rows with" not in report.summary()
    assert long["why"].endswith("has an estimated 3752 tokens; give --tokenizer to count them.")
    assert (long["id"], half["id"], half["image"]) == ("", "half \\ud83d", "\\ud83d.png")
    assert "over_estimate: more tokens than fit in a row (estimated without --tokenizer)" in report.summary()


def test_shrunk_images_can_always_be_opened():
    """399×2 pixels would become 201×1, an aspect ratio over 200."""
    for size, expected in {(399, 2): (201, 2), (2, 399): (2, 201), (4000, 20): (201, 2), (402, 99): (201, 50)}.items():
        content, shrunk = shrink(PIL.Image.new("RGB", size), 201)
        assert open_image(content, "thin").size == shrunk == expected


# ---- Errors, and repeating the command -------------------------------------------------------------------------------


def test_without_a_usable_row_there_is_a_report_and_a_corrected_command_starts_again(data, tmp_path, capsys):
    folder, out = data[0], tmp_path / "out"
    (tmp_path / "none").mkdir()
    command = [f"--annotations={folder}/blip_laion_cc_sbu_558k.json", f"--out={out}", "--workers=1"]
    assert run_command(main, [*command, f"--images={tmp_path}/none"]) == 2
    sentence = f"error: No row can be used: the image file does not exist (8); report.json in {out} lists them all.\n"
    assert capsys.readouterr().err.endswith(sentence)
    assert len(json.loads((out / "report.json").read_text())["dropped"]) == 8
    with pytest.raises(UserError, match=r"has no finished .* --annotations=FILE\.json --images=DIR --out="):
        PreparedRecords(str(out))
    assert run_command(main, [*command, f"--images={folder}/pretrain_images"]) == 0
    assert "8 kept" in capsys.readouterr().out
    assert len(PreparedRecords(str(out))) == 8


def test_two_runs_cannot_write_the_same_folder(data, tmp_path, prepared):
    folder, out = data[0], tmp_path / "out"
    out.mkdir()
    other = os.open(out, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(UserError, match=r"^Another run is writing .*out; wait for it, or choose another --out\.$"):
        prepare(options(folder, out))
    os.close(other)
    assert not list(out.iterdir())
    # A run that has ended, even with an error, does not block the next one.
    for _ in range(2):
        with pytest.raises(UserError, match="made from other input"):
            prepare(options(folder, prepared[0]))


def test_killed_workers_are_reported(data, tmp_path, monkeypatch):
    def submit(*_):
        raise concurrent.futures.process.BrokenProcessPool

    monkeypatch.setattr(concurrent.futures.ProcessPoolExecutor, "submit", submit)
    with pytest.raises(UserError, match=r"^A worker process was killed, perhaps for lack of memory"):
        prepare(options(data[0], tmp_path / "out"))


def test_errors_at_the_start_of_a_worker_are_reported(data, tmp_path, monkeypatch):
    """Here the tokenizer is removed after the run has started."""
    monkeypatch.setattr("stf_jax.data.preparing.load_tokenizer", lambda _: load_tokenizer("miniature"))
    with pytest.raises(UserError, match=r"^The tokenizer is missing: 'nowhere'"):
        prepare(options(data[0], tmp_path / "out", tokenizer="nowhere"))


_LARGE = """
import sys
from stf_jax.prepare import main
from stf_jax.cli import run_command
if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
"""


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_their_parent(data, tmp_path, end):
    """Also in the middle of a shard that takes half a minute, and if ^C is pressed many times."""
    folder, scratch, script = data[0], tmp_path / "scratch", tmp_path / "script.py"
    rows = json.loads((folder / "llava_v1_5_mix665k.json").read_text())
    (tmp_path / "rows.json").write_text(json.dumps(rows * 150))
    scratch.mkdir()
    script.write_text(_LARGE)
    command = [f"--annotations={tmp_path}/rows.json", f"--images={folder}/images", f"--out={tmp_path}/out"]
    process = subprocess.Popen(
        [sys.executable, script, *command, "--workers=1"],
        env=os.environ | {"TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,  # also the worker's: communicate() returns when both have ended
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while process.poll() is None and not list(scratch.rglob("llava-train*")):
            time.sleep(0.01)
        for _ in range(9):
            process.send_signal(end)
            time.sleep(0.002)
        process.communicate(timeout=20)
        assert process.returncode == (130 if end == signal.SIGINT else -signal.SIGKILL)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert [path.name for path in (tmp_path / "out" / "unfinished").iterdir()] == ["plan.json"]
    if end == signal.SIGINT:
        assert not list(scratch.rglob("llava-train*"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"annotations": ("nowhere.json",)}, r"nowhere\.json cannot be read: No such file"),
        ({"images": "nowhere"}, r"The image folder nowhere does not exist"),
        ({"tokenizer": "nowhere"}, r"The tokenizer is missing"),
        ({"tokenizer": "miniature", "template": "chatml"}, r"needs the token <\|im_start\|>"),
        ({"tokenizer": "miniature", "template": "phi"}, r"Unknown data\.template='phi'"),
        ({"out": "."}, r"\. exists and is not empty"),
        ({"out": "something/below"}, r"The folder something/below cannot be created: Not a directory"),
    ],
)
def test_unusable_input_is_reported(data, tmp_path, monkeypatch, changes, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "something").touch()
    with pytest.raises(UserError, match=sentence):
        prepare(options(data[0], **{"out": "out"} | changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--workers=0", "--limit=-1", "--max-length=-5", "--image-tokens=0", "--limit=x"])
def test_numbers_out_of_range_are_refused(option, capsys):
    assert run_command(main, ["--annotations=a", "--images=b", "--out=c", option]) == 2
    assert option.split("=")[0] in capsys.readouterr().err


def test_annotations_are_streamed(tmp_path):
    row = {"id": "a", "conversations": [{"from": "human", "value": "x" * 10_000}]}
    (tmp_path / "rows.json").write_text(json.dumps([row] * 2000))  # 20 MB
    tracemalloc.start()
    count = sum(1 for _ in read_rows(epath.Path(tmp_path / "rows.json")))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 2000
    assert peak < 2**20
