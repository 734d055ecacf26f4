"""Tests paths in buckets: ``gs://`` with a local emulator, ``s3://`` with a folder behind fsspec."""

import contextlib
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import time

import fsspec
import pytest
from bucket import make_environment
from etils import epath
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from make_containers import WRITERS, make_rows
from make_llava import make

from stf_jax.checkpointing.manager import Checkpoints
from stf_jax.config import CheckpointConfig, UserError
from stf_jax.data.records import BadRow
from stf_jax.data.sources.llava import LlavaRecords, open_container
from stf_jax.data.tokenizer import MINIATURE, load_tokenizer
from stf_jax.files import AppendOnlyFile, local_copy, open_atomic, upload
from stf_jax.runs import lock
from stf_jax.runs.events import Events
from stf_jax.runs.status import format_status
from stf_jax.weights.folder import load_params, new_folder

TESTS = pathlib.Path(__file__).parent
GOOD, BAD = 24, 8  # rows of the data set

# ---- gs:// -----------------------------------------------------------------------------------------------------------

_UPLOAD = """
import pathlib, sys
from etils import epath
from stf_jax.data.records import BadRow
from stf_jax.data.tokenizer import MINIATURE
from stf_jax.files import upload
upload(pathlib.Path(sys.argv[1]), epath.Path("gs://bucket/raw"))
upload(MINIATURE, epath.Path("gs://bucket/tokenizer"))
"""
_CONVERT = "import sys, tiny; from stf_jax.convert import main; main(sys.argv[1:])"  # tiny registers its presets
_LIST = """
import json
from etils import epath
run = epath.Path("gs://bucket/run")
print(json.dumps({
    "metrics": run.joinpath("metrics.jsonl").read_text(),
    "checkpoints": sorted(path.name for path in (run / "checkpoints").iterdir()),
    "run": sorted(path.name for path in run.iterdir()),
    "profiles": sum(len(list(folder.glob("*.xplane.pb"))) for folder in (run / "profile/plugins/profile").iterdir()),
    "prepared": sorted(path.name for path in epath.Path("gs://bucket/prepared").iterdir()),
    "export": sorted(path.name for path in epath.Path("gs://bucket/export").iterdir()),
}))
"""


@pytest.fixture(scope="module")
def gs(tmp_path_factory):
    """A function that runs Python with ``gs://bucket`` in the emulator and returns its output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cache = {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}
    with subprocess.Popen([sys.executable, TESTS / "bucket.py", str(port)], stderr=subprocess.DEVNULL) as server:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)

        def run(*arguments):
            command = [sys.executable, *map(str, arguments)]
            one_device = {"JAX_NUM_CPU_DEVICES": "1"}  # faster
            env = os.environ | make_environment(port) | cache | one_device
            process = subprocess.run(command, env=env, capture_output=True, text=True)
            assert process.returncode == 0, process.stderr[-3000:]
            return process.stdout

        yield run
        server.kill()


@pytest.mark.slow  # a minute
def test_prepare_train_and_export_in_a_bucket(gs, tmp_path):
    make(tmp_path, captions=1, conversations=GOOD)
    gs("-c", _UPLOAD, tmp_path)
    raw = ["--annotations=gs://bucket/raw/llava_v1_5_mix665k.json", "--images=gs://bucket/raw/images", "--workers=1"]
    output = gs("-m", "stf_jax.prepare", *raw, "--out=gs://bucket/prepared", "--tokenizer=gs://bucket/tokenizer")
    assert f"{GOOD} kept" in output
    data = {
        "source": "llava",
        "annotations": "gs://bucket/prepared",
        "tokenizer": "gs://bucket/tokenizer",
        "max_length": 320,
    }
    train = ["-m", "stf_jax.main", f"--config={TESTS}/tiny.py", "--workdir=gs://bucket/run"]
    train += [f"--config.data.{key}={value}" for key, value in data.items()]
    gs(*train, "--config.steps=2", "--config.profile.first_step=2")
    gs(*train, "--config.steps=4")  # continues from the checkpoint of step 2
    output = gs("-m", "stf_jax.main", "--workdir=gs://bucket/run", "--status")
    assert re.match(r"gs://bucket/run: ended \d+ s ago\n  step         4 of 4, logged \d+ s ago\n", output)
    assert re.search(r"\n  restarts     1\n  checkpoints  2, 4\n", output)
    gs("-c", _CONVERT, "export", "gs://bucket/run", "--format=hf", "--to=gs://bucket/export")
    found = json.loads(gs("-c", _LIST))
    lines = [json.loads(line) for line in found["metrics"].splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[2]["seconds"] > lines[1]["seconds"]
    assert found["checkpoints"] == ["2", "4"]
    assert {"config.json", "metrics.jsonl", "tensorboard", "profile"} <= set(found["run"])
    assert found["profiles"] == 1
    assert {"dataset_info.json", "features.json", "kept.json", "report.json", "histograms.png"} <= set(
        found["prepared"]
    )
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(found["export"])


# ---- s3:// -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """The folder behind ``s3://bucket``; one for all tests, because etils caches the file system."""
    folder = tmp_path_factory.mktemp("s3")
    (folder / "bucket").mkdir()

    class Folder(DirFileSystem):
        protocol = "s3"
        cachable = False

        def __init__(self):
            super().__init__(path=str(folder), fs=LocalFileSystem(auto_mkdir=True))

        @classmethod
        def _strip_protocol(cls, path):
            return path.removeprefix("s3://") if isinstance(path, str) else [cls._strip_protocol(one) for one in path]

    fsspec.register_implementation("s3", Folder, clobber=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield folder / "bucket"


def _open(image):
    """Returns an image's pixels, or the reason why it cannot be opened."""
    try:
        return image().tobytes()
    except BadRow as error:
        return error.reason


def test_annotations_and_images_are_read_from_s3(s3):
    make(s3, captions=2, conversations=GOOD)
    records = LlavaRecords("s3://bucket/llava_v1_5_mix665k.json", "s3://bucket/images")
    files = LlavaRecords(str(s3 / "llava_v1_5_mix665k.json"), str(s3 / "images"))
    assert len(records) == GOOD + BAD
    for i in range(len(records)):
        try:
            expected = files[i]
        except UserError:
            continue
        for image, reference in zip(records[i].images, expected.images, strict=True):
            assert _open(image) == _open(reference)


@pytest.mark.parametrize("kind", ["pairs", "disk", "tars"])
def test_containers_are_read_from_s3(s3, kind):
    path = WRITERS[kind](s3 / "containers", make_rows(5))
    found, local = (
        LlavaRecords(name, rows=open_container(name)) for name in (f"s3://bucket/containers/{path.name}", str(path))
    )
    assert len(found) == 5
    for i in range(5):
        assert found[i].turns == local[i].turns
        assert [_open(image) for image in found[i].images] == [_open(image) for image in local[i].images]


def test_weights_and_tokenizers_are_cached(s3):
    upload(MINIATURE, epath.Path("s3://bucket/tokenizer"))
    assert load_tokenizer("s3://bucket/tokenizer").get_vocab() == load_tokenizer("miniature").get_vocab()
    weights = MINIATURE.parent
    upload(weights, epath.Path("s3://bucket/weights"))
    copy = local_copy("s3://bucket/weights")
    assert copy == s3.parent / "cache" / "stf_jax" / "s3" / "bucket" / "weights"
    assert sorted(path.name for path in copy.iterdir()) == sorted(path.name for path in weights.iterdir())
    assert load_params("s3://bucket/weights", {}, (".*",)) == {}


def test_changed_files_are_fetched_again(s3):
    (s3 / "one.txt").write_text("first")
    assert local_copy("s3://bucket/one.txt").read_text() == "first"
    (s3 / "one.txt").write_text("second one")
    assert local_copy("s3://bucket/one.txt").read_text() == "second one"
    (s3 / "one.txt").write_text("second two")  # the same length
    assert local_copy("s3://bucket/one.txt").read_text() == "second two"
    assert local_copy("/some/where") == pathlib.Path("/some/where")


def test_unchanged_files_are_not_fetched_again(s3):
    (s3 / "kept.txt").write_text("kept")
    before = local_copy("s3://bucket/kept.txt").stat()
    after = local_copy("s3://bucket/kept.txt").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_deleted_files_are_removed_from_the_cache(s3):
    (s3 / "folder" / "deep").mkdir(parents=True)
    for name in ("one", "deep/two"):
        (s3 / "folder" / name).write_text(name)
    copy = local_copy("s3://bucket/folder")
    (copy / ".three.1234").touch()  # another host is fetching it
    (s3 / "folder" / "deep" / "two").unlink()
    local_copy("s3://bucket/folder")
    assert sorted(path.name for path in copy.rglob("*") if path.is_file()) == [".three.1234", "one"]
    (s3 / "folder" / "one").unlink()
    assert not local_copy("s3://bucket/folder/one").exists()


def test_folders_and_files_are_written_atomically(s3):
    with new_folder(epath.Path("s3://bucket/made")) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("here")
        assert not (s3 / "made").exists()
    assert (s3 / "made" / "deep" / "file").read_text() == "here"
    with pytest.raises(UserError, match="exists and is not empty"), new_folder(epath.Path("s3://bucket/made")):
        pass
    with contextlib.suppress(KeyError), open_atomic(epath.Path("s3://bucket/broken.txt")) as file:
        file.write("half")
        raise KeyError
    assert not (s3 / "broken.txt").exists()


def test_a_log_in_a_bucket_is_rewritten_as_it_grows(s3, monkeypatch):
    log = AppendOnlyFile(epath.Path("s3://bucket/log.jsonl"), ["before"])
    assert (s3 / "log.jsonl").read_text() == "before\n"
    log.append("one")
    assert (s3 / "log.jsonl").read_text() == "before\n"  # not after every line
    monkeypatch.setattr(log, "_REWRITE_SECONDS", 0.0)
    log.append("two")
    assert (s3 / "log.jsonl").read_text() == "before\none\ntwo\n"
    monkeypatch.setattr(log, "_REWRITE_SECONDS", 99.0)
    log.append("three")
    log.close()
    assert (s3 / "log.jsonl").read_text() == "before\none\ntwo\nthree\n"


def test_a_log_on_a_disk_starts_as_a_new_file(tmp_path):
    """A new file replaces the old one, so no line is lost if a run is killed while it is resuming."""
    path = epath.Path(tmp_path / "log.jsonl")
    path.write_text("one\ntwo\n")
    with path.open() as before:
        log = AppendOnlyFile(path, ["one"])
        assert before.read() == "one\ntwo\n"
    log.append("three")
    assert path.read_text() == "one\nthree\n"
    log.close()
    assert [file.name for file in tmp_path.iterdir()] == ["log.jsonl"]


def test_status_of_a_run_in_a_bucket(s3, monkeypatch):
    monkeypatch.setattr(lock, "_RENEWAL_SECONDS", 0.2)
    workdir = epath.Path("s3://bucket/run")
    for step in (2, 4):
        (s3 / "run" / "checkpoints" / str(step)).mkdir(parents=True)
    (s3 / "run" / "checkpoints" / "2" / "commit_success.txt").touch()  # Orbax renames no folders in buckets
    (s3 / "run" / "config.json").write_text('{"global_batch_size": 8}')
    with Events(workdir, active=True) as log:
        log.add("begin", 0, resumed=False)
    assert format_status(workdir).startswith("s3://bucket/run: dead")
    with lock.workdir_lock(workdir):
        output = format_status(workdir)
    assert output.startswith("s3://bucket/run: running since")
    assert "\n  checkpoints  2, 4 (incomplete)\n" in output


def test_events_in_a_bucket_are_written_immediately(s3):
    with Events(epath.Path("s3://bucket/fate"), active=True) as log:
        log.add("begin", 0)
        assert '"begin"' in (s3 / "fate" / "events.jsonl").read_text()


def test_a_workdir_that_orbax_cannot_write_to_is_refused(s3):
    with pytest.raises(UserError, match=r"Orbax cannot write checkpoints to s3://bucket/run; give a gs:// or a local"):
        Checkpoints(epath.Path("s3://bucket/run"), CheckpointConfig())
