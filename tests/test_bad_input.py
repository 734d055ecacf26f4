"""Invalid input to every command: exit status 2, one sentence, no foreign code executed, no files left behind."""

import dataclasses
import fnmatch
import functools
import hashlib
import io
import json
import os
import pathlib
import pickle
import re
import shutil
import struct
import types
import zipfile
import zlib
from collections.abc import Callable

import make_study
import numpy as np
import PIL.Image
import pytest
import torch
from etils import epath
from make_evals import make_gqa
from make_models import CONTROL, make
from reference import decoder

from stf_jax import ablate, bench, chat, convert, evaluate, look, main, plan, prepare
from stf_jax.cli import run_command
from stf_jax.config import FusionConfig
from stf_jax.data.conversation import TEMPLATES, encode, template_items
from stf_jax.data.records import Record, Turn
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.inference import loading
from stf_jax.inference.loading import load_generator
from stf_jax.weights.export_hf import export_hf

ROOT = pathlib.Path(__file__).parents[1]
COMMANDS = {
    "main": main, "prepare": prepare, "convert": convert, "evaluate": evaluate, "chat": chat, "plan": plan,
    "bench": bench, "ablate": ablate, "look": look,
}  # fmt: skip
Make = Callable[[pathlib.Path, types.SimpleNamespace], None]


@dataclasses.dataclass(frozen=True)
class Case:
    """A command with invalid input.

    In ``argv``, ``{here}`` is the temporary folder of the case, and other names are attributes of ``shared``. ``make``
    writes the input into ``here``. ``messages`` must occur in the error. ``may_leave`` has patterns of files that the
    command may write.
    """

    name: str
    command: str
    make: Make
    argv: tuple[str, ...]
    messages: tuple[str, ...]
    may_leave: tuple[str, ...] = ()


# ---- Writing input ---------------------------------------------------------------------------------------------------


def no_input(here, shared):
    """Writes nothing: the arguments alone are invalid, or the input is missing."""


def write_file(name: str, content: bytes | str) -> Make:
    """Writes a file."""
    content = content.encode() if isinstance(content, str) else content

    def write(here, shared):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(content)

    return write


def combine(*makers: Make) -> Make:
    def write(here, shared):
        for maker in makers:
            maker(here, shared)

    return write


def modified_copy(folder: str, name: str, change: Callable[[bytes], bytes]) -> Make:
    """Copies a shared folder to ``here`` and changes one of its files."""

    def write(here, shared):
        shutil.copytree(getattr(shared, folder), here / folder)
        file = here / folder / name
        content = change(file.read_bytes())
        file.unlink()  # the copy may be a link
        file.write_bytes(content)

    return write


def edited_json(folder: str, name: str, **values) -> Make:
    """Copies a shared folder and sets keys of a JSON object in it."""
    return modified_copy(folder, name, lambda old: json.dumps(json.loads(old) | values).encode())


def first_half(content: bytes) -> bytes:
    return content[: len(content) // 2]


TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A thing."}]
ROW = {"id": "a", "image": "good.png", "conversations": TURNS}


def write_rows(*changes: dict) -> Make:
    """Writes annotations in LLaVA's format to ``here/rows.json``: a valid row, updated with each of ``changes``."""
    return write_file("rows.json", json.dumps([ROW | change for change in changes]))


def json_lines(*values) -> str:
    """JSON lines."""
    return "".join(json.dumps(value) + "\n" for value in values)


# ---- Images --------------------------------------------------------------------------------------------------------


def encode_image(kind: str, **options) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8)
    PIL.Image.fromarray(noise).save(file, kind, **options)
    return file.getvalue()


def make_png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG whose header claims this size in gray pixels, with the given chunks."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*item) for item in ((b"IHDR", header), *chunks, (b"IEND", b"")))


def make_zip(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


BAD_IMAGES = {  # with part of the error message
    "cut.jpg": (first_half(encode_image("JPEG")), "truncated"),
    "cut.png": (first_half(encode_image("PNG")), ""),
    "cut.webp": (first_half(encode_image("WEBP", lossless=True)), ""),
    "empty.jpg": (b"", "its format is none of JPEG"),
    "text.jpg": (b"This is no image.", "its format is none of JPEG"),
    "zip.png": (make_zip(a=b"a"), "its format is none of JPEG"),
    "script.jpg": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch pwned) (w) file\n",
        "its format is none",
    ),
    "bomb.png": (make_png(12_000, 12_000), "12000x12000 pixels"),
    "ribbon.png": (make_png(50_000, 2), "50000x2 pixels"),
    "text_bomb.png": (make_png(8, 8, (b"zTXt", b"a\0\0" + zlib.compress(bytes(2**27)))), ""),
}


# ---- Weights ---------------------------------------------------------------------------------------------------------


def make_safetensors(head: dict | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header, which claims this length."""
    head = json.dumps(head).encode() if isinstance(head, dict) else head
    return struct.pack("<Q", len(head) if length is None else length) + head + data


def tensor_entry(shape: list[int], begin: int, end: int, kind: str = "F32") -> dict:
    return {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}


class UnpickleTrap:
    """Unpickling it writes a file to the working folder."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


def save_torch(value, **options) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def compress_pickle(content: bytes) -> bytes:
    """A torch file with a compressed pickle: a few KB that expand to 64 MiB."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w") as new:
        for member in old.infolist():
            if member.filename.endswith("data.pkl"):
                new.writestr(member.filename, bytes(2**26), zipfile.ZIP_DEFLATED)
            else:
                new.writestr(member, old.read(member))
    return file.getvalue()


def gguf_text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def make_gguf(values: dict[str, int | str], tensors: int = 0, rest: bytes = b"", count: int | None = None) -> bytes:
    """A GGUF with these numbers and texts in its header."""
    file = b"GGUF" + struct.pack("<IQQ", 3, tensors, len(values) if count is None else count)
    for key, value in values.items():
        file += gguf_text(key)
        file += struct.pack("<II", 4, value) if isinstance(value, int) else struct.pack("<I", 8) + gguf_text(value)
    return file + rest


LLAMA = {"general.architecture": "llama", "llama.block_count": 2, "llama.embedding_length": 32}
LLAMA |= {"llama.attention.head_count": 4}
WEIGHT = {"model.norm.weight": torch.ones(32)}
BOMB = compress_pickle(save_torch(WEIGHT))
EMBEDDING = make_safetensors({"model.embed_tokens.weight": tensor_entry([62, 32], 0, 7936)}, bytes(7936))

# ---- The cases: name, function that writes the input, arguments, parts of the message --------------------------------

TINY, RUN = f"--config={ROOT}/tests/tiny.py", "--workdir={here}/run"
LLAVA = "--config.data.source=llava"
ROWS, IMAGES = "--config.data.annotations={here}/rows.json", "--config.data.images={images}"
FILE = "{here}/rows.json"
MODEL = ("--checkpoint={model}", "--precision=float32")


def train_case(name, make, argv, *messages, may_leave=()):
    """Training with a valid config except for ``argv``, one or several options."""
    argv = [argv] if isinstance(argv, str) else argv
    return Case(name, "main", make, (TINY, RUN, *argv), messages, may_leave)


def annotations_case(name, make, *messages):
    """Training on invalid annotations."""
    return train_case(name, make, (LLAVA, ROWS, IMAGES), *messages)


def prepared_case(name, file, change, *messages):
    """Training on a damaged prepared set."""
    argv = (LLAVA, "--config.data.annotations={here}/prepared")
    return train_case(name, modified_copy("prepared", file, change), argv, "{here}/prepared", *messages)


def init_case(name, content, *messages):
    """Training that starts from a file of weights. The workdir is created before they are read."""
    argv = ("--config.init_from={here}/w", "--config.init_missing=('(?!llm/norm).*',)")
    return train_case(
        name, write_file("w/a.safetensors", content), argv, "{here}/w", *messages, may_leave=("run", "run/*")
    )


MAIN = [
    Case("a misspelled option", "main", no_input, (TINY, "--wrokdir={here}/run"), ("wrokdir", "workdir")),
    Case("no workdir", "main", no_input, (TINY,), ("--workdir is missing",)),
    Case("a missing config", "main", no_input, ("--config={here}/none.py", RUN), ("{here}/none.py",)),
    Case("an unknown config argument", "main", no_input, (f"{TINY}:setps=3", RUN), ("'setps=3'", "'steps='")),
    train_case(
        "a config that is not Python", write_file("c.py", "def get_config(:\n"), "--config={here}/c.py", "c.py, line 1"
    ),
    train_case("a config with NUL", write_file("c.py", b"a = 1\0\n"), "--config={here}/c.py", "The config file"),
    train_case(
        "a config that fails",
        write_file("c.py", "def get_config(a=0):\n    1 / a"),
        "--config={here}/c.py",
        "c.py, line 2",
    ),
    train_case("an unknown key", no_input, "--config.data.anotations=a", "data.anotations", "'data.annotations'"),
    train_case("text for a number", no_input, "--config.steps=many", "--config.steps=many"),
    train_case(
        "a learning rate of NaN",
        no_input,
        "--config.optimizer.learning_rate=nan",
        "optimizer.learning_rate is nan",
        "between",
    ),
    train_case("an empty batch", no_input, "--config.global_batch_size=0", "global_batch_size is 0", "between 1 and"),
    train_case(
        "a rule that is not a pattern", no_input, "--config.rules=(('(', 'train'),)", "'('", "regular expression"
    ),
    train_case(
        "init_missing that is not a pattern",
        no_input,
        "--config.init_missing=('(',)",
        "init_missing",
        "'('",
        may_leave=("run", "run/*"),
    ),
    train_case(
        "taps beyond the tower", no_input, "--config.model.fusion.taps=(9,)", "model.fusion.taps=(9,)", "0 to 3"
    ),
    train_case("an unknown template", no_input, "--config.data.template=v2", "'v2'", "v1"),
    train_case("a template with missing tokens", no_input, "--config.data.template=chatml", "<|im_start|>"),
    train_case("a workdir that is a file", write_file("run", ""), (), "{here}/run"),
    train_case("a workdir below a file", write_file("file", ""), "--workdir={here}/file/run", "{here}/file/run"),
    train_case("a workdir that cannot be created", no_input, "--workdir=/proc/stf_jax", "/proc/stf_jax"),
    train_case(
        "a tokenizer that is a file", write_file("t", "{}"), "--config.data.tokenizer={here}/t", "{here}/t", "=DIR"
    ),
    train_case(
        "a truncated tokenizer",
        write_file("t/tokenizer.json", '{"model": {'),
        "--config.data.tokenizer={here}/t",
        "{here}/t",
    ),
    train_case(
        "an incomplete model description",
        edited_json("model", "model.json", llm={"width": 3}),
        "--config.model.llm={here}/model",
        "{here}/model/model.json",
    ),
    train_case(
        "truncated questions",
        write_file("gqa/llava_gqa_testdev_balanced.jsonl", '{"question_id": "1", "im'),
        ("--config.eval.benchmarks=('gqa',)", "--config.eval.data={here}"),
        "testdev_balanced.jsonl, line 1",
    ),
    train_case("an unprepared folder", no_input, (LLAVA, "--config.data.annotations={here}"), "{here}", "prepare"),
    train_case(
        "two folders for one file",
        write_rows({}),
        (LLAVA, ROWS, f"{IMAGES},a"),
        "data.images has 2 folders",
        "give one",
    ),
    annotations_case("no annotations", no_input, FILE, ROWS.partition("=")[0]),
    annotations_case(
        "truncated annotations", write_file("rows.json", json.dumps([ROW, ROW])[:-40]), f"Row 1 of {FILE}"
    ),
    annotations_case("no rows", write_file("rows.json", "[ ]"), FILE, "at least one row"),
    annotations_case("an empty file of rows", write_file("rows.json", ""), FILE, "at least one row"),
    annotations_case(
        "truncated lines of rows",
        write_file("rows.json", json_lines(ROW, ROW)[:-40]),
        f"Line 2 of {FILE}",
        "may be cut short",
    ),
    annotations_case(
        "one object on several lines",
        write_file("rows.json", '{\n"a": 1}'),
        FILE,
        "or have one row per line, but line 1",
    ),
    annotations_case("rows in UTF-16", write_file("rows.json", json.dumps([ROW]).encode("utf-16")), FILE),
    annotations_case("rows of NUL", write_file("rows.json", bytes(99)), FILE),
    annotations_case("endlessly nested rows", write_file("rows.json", "[" * 99_999), f"Row 0 of {FILE}", "remove it"),
    annotations_case(
        "a deeply nested row", write_file("rows.json", f"[{'[' * 200}{']' * 200}]"), f"Row 0 of {FILE}", "remove it"
    ),
    annotations_case("numbers for text", write_rows({"conversations": [{"from": 1, "value": 2}]}), f"Row 0 of {FILE}"),
    annotations_case("a missing image", write_rows({"image": "lost.png"}), FILE, "{images}/lost.png"),
    annotations_case(
        "an image outside the folder", write_rows({"image": "../a.png"}), "'../a.png' leaves the folder {images}"
    ),
    annotations_case(
        "an image with an absolute path",
        write_rows({"image": "/etc/hostname"}),
        "'/etc/hostname' leaves the folder {images}",
    ),
    annotations_case("an image's name with NUL", write_rows({"image": "a\0.png"}), "contains NUL"),
    annotations_case(
        "a file that is not an image", write_rows({"image": "text.jpg"}), "{images}/text.jpg cannot be opened"
    ),
    annotations_case("an oversized image", write_rows({"image": "bomb.png"}), "{images}/bomb.png cannot be opened"),
    train_case(
        "rows that are too long",
        write_rows({}),
        (LLAVA, ROWS, IMAGES, "--config.data.max_length=8"),
        "'a'",
        "max_length=8",
    ),
    prepared_case("a prepared set without rows", "kept.json", lambda _: b"[]", "kept.json"),
    prepared_case(
        "a prepared set that lost a row", "kept.json", lambda old: json.dumps(json.loads(old)[1:]).encode(), "1 rows"
    ),
    prepared_case("a prepared set with truncated info", "dataset_info.json", first_half, "prepared again"),
    prepared_case("a prepared set with an array of features", "features.json", lambda _: b"[]", "prepared again"),
    prepared_case(
        "a prepared set with a truncated shard", "llava-train.array_record-00000-of-00001", first_half, "Row 0", "shard"
    ),
    init_case(
        "truncated weights", first_half(make_safetensors({"a": tensor_entry([9], 0, 36)}, bytes(36))), "a.safetensors"
    ),
    init_case(
        "weights of another shape", make_safetensors({"llm/norm/scale": tensor_entry([9], 0, 36)}, bytes(36)), "(9,)"
    ),
    init_case(
        "weights of an unsupported type",
        make_safetensors({"llm/norm/scale": tensor_entry([32], 0, 32, "F8_E4M3")}, bytes(32)),
    ),
]


def prepare_case(name, make, argv, *messages, may_leave=()):
    """Preparing, with options that override valid ones."""
    argv = ("--annotations={here}/rows.json", "--images={images}", "--out={here}/out", "--workers=1", *argv)
    return Case(name, "prepare", make, argv, messages, may_leave)


BAD_ROWS = [{"image": name} for name in (*BAD_IMAGES, "lost.png", "../good.png", "/etc/hostname", 3, float("nan"))]
BAD_ROWS += [{"conversations": turns} for turns in (3, TURNS[:1], [TURNS[0], TURNS[0]])]
PREPARE = [
    prepare_case("a misspelled option", write_rows({}), ["--max-lenght=3"], "--max-lenght"),
    prepare_case("no folder of images", write_rows({}), ["--images={here}/none"], "{here}/none"),
    prepare_case("a file for a folder of images", write_rows({}), [f"--images={FILE}"], FILE),
    prepare_case("no annotations", no_input, [], FILE, "No such file"),
    prepare_case("a folder for annotations", write_file("rows.json/mine", ""), [], FILE),
    prepare_case("truncated annotations", write_file("rows.json", json.dumps([ROW])[:-30]), [], f"Row 0 of {FILE}"),
    prepare_case("an object of rows", write_file("rows.json", json.dumps({"rows": [ROW]})), [], FILE, "JSON array"),
    prepare_case("more after the array", write_file("rows.json", json.dumps([ROW]) + "[]"), [], FILE, "row 0"),
    prepare_case(
        "a number with too many digits", write_file("rows.json", f"[{'1' * 9999}]"), [], f"Row 0 of {FILE}", "remove it"
    ),
    prepare_case("an output that is a file", combine(write_rows({}), write_file("out", "mine")), [], "{here}/out"),
    prepare_case("an output below a file", write_rows({}), [f"--out={FILE}/out"], f"{FILE}/out"),
    prepare_case("an output that cannot be created", write_rows({}), ["--out=/proc/out"], "/proc/out"),
    prepare_case(
        "an output with other files", combine(write_rows({}), write_file("out/thesis.txt", "mine")), [], "another --out"
    ),
    prepare_case("no workers", write_rows({}), ["--workers=0"], "--workers must be at least 1"),
    prepare_case("a limit that is not a number", write_rows({}), ["--limit=ten"], "--limit", "'ten'"),
    prepare_case("an unknown template", write_rows({}), ["--template=v2"], "'v2'", "v1"),
    prepare_case("no tokenizer", write_rows({}), ["--tokenizer={here}/none"], "{here}/none"),
    prepare_case(
        "no usable row",
        write_rows(*BAD_ROWS),
        [],
        "No row can be used",
        "cannot be decoded",
        "is cut short",
        "too large or too thin",
        "leaves the folder",
        "report.json in {here}/out",
        may_leave=("out", "out/*"),  # the report, and the state for resuming
    ),
    prepare_case(
        "a bad row in strict mode",
        write_rows({}, {"image": "zip.png"}),
        ["--strict"],
        f"row 1 of {FILE}",
        "zip.png",
        may_leave=("out", "out/unfinished", "out/unfinished/plan.json"),
    ),
    prepare_case(
        "a finished set with a truncated report",
        combine(write_rows({}), modified_copy("prepared", "report.json", first_half)),
        ["--out={here}/prepared"],
        "{here}/prepared/report.json",
    ),
]


def convert_case(name, make, argv, *messages):
    return Case(name, "convert", make, argv, messages)


def import_case(name, make, source, *messages):
    return convert_case(
        f"import {name}", make, ("import", "{here}/" + source, "--to={here}/out"), "{here}/" + source, *messages
    )


def safetensors_case(name, content, *messages):
    return import_case(f"safetensors {name}", write_file("w.safetensors", content), "w.safetensors", *messages)


def pickle_case(name, content, *messages):
    return import_case(f"a pickle {name}", write_file("w.bin", content), "w.bin", *messages)


def gguf_case(name, content, *messages):
    return import_case(f"a GGUF {name}", write_file("w.gguf", content), "w.gguf", *messages)


def index_case(name, content, *messages):
    file = "w/model.safetensors.index.json"
    return import_case(f"an index {name}", write_file(file, content), "w", "{here}/" + file, *messages)


def config_case(name, change, *messages):
    """Importing a checkpoint with a changed config."""
    return import_case(f"a config {name}", modified_copy("foreign", "config.json", change), "foreign", *messages)


def set_values(**values):
    return lambda old: json.dumps(json.loads(old) | values).encode()


def export_case(name, make, *messages, model="{here}/model", options=("--format=hf",)):
    return convert_case(f"export {name}", make, ("export", model, "--to={here}/out", *options), *messages)


def verify_case(name, make, export, *messages, options=("--questions=1", "--tokens=1")):
    return convert_case(f"verify {name}", make, ("verify", "{model}", export, *options), *messages)


def copy_model_without(name: str) -> Make:
    """Copies the model without one of its files."""
    ignored = shutil.ignore_patterns(name)
    return lambda here, shared: shutil.copytree(shared.model, here / "model", ignore=ignored)


NOT_EXECUTED = "no code in it was run"
CONVERT = [
    convert_case("no command", no_input, (), "command"),
    convert_case("an unknown command", no_input, ("improt", "{foreign}"), "'improt'", "'import'"),
    convert_case("import to nowhere", no_input, ("import", "{foreign}"), "--to"),
    convert_case(
        "import as an unknown type", no_input, ("import", "{foreign}", "--to={here}/out", "--dtype=int3"), "'int3'"
    ),
    convert_case(
        "import over a file", write_file("out", "mine"), ("import", "{foreign}", "--to={here}/out"), "{here}/out"
    ),
    convert_case(
        "import below a file", write_file("f", ""), ("import", "{foreign}", "--to={here}/f/out"), "{here}/f/out"
    ),
    convert_case(
        "import to a folder that cannot be created", no_input, ("import", "{foreign}", "--to=/proc/out"), "/proc/out"
    ),
    convert_case(
        "import a tower from a source without one",
        no_input,
        ("import", "{foreign}", "--to={here}/out", "--vision={foreign}"),
        "--vision={foreign}",
    ),
    import_case("nothing", no_input, "none", "give a folder or file"),
    import_case("an empty folder", write_file("w/readme", ""), "w", "*.safetensors"),
    import_case("another kind of file", write_file("w.pt", save_torch(WEIGHT)), "w.pt", "*.bin"),
    safetensors_case("that is empty", b""),
    safetensors_case("that contain text", "This is no file of tensors, whatever it is called.", "download it again"),
    safetensors_case(
        "truncated", first_half(make_safetensors({"a": tensor_entry([99], 0, 396)}, bytes(396))), "download it again"
    ),
    safetensors_case(
        "with a header beyond the file", make_safetensors({"a": tensor_entry([1], 0, 4)}, bytes(4), length=4096)
    ),
    safetensors_case(
        "with a header of terabytes", make_safetensors({"a": tensor_entry([1], 0, 4)}, bytes(4), length=2**43)
    ),
    safetensors_case("with a header that is not JSON", make_safetensors(b'{"a": {"dtype": ', bytes(4))),
    safetensors_case(
        "with a deeply nested header", make_safetensors(b'{"a":' + b"[" * 9999 + b"]" * 9999 + b"}", bytes(4))
    ),
    safetensors_case(
        "that overlap", make_safetensors({"a": tensor_entry([2], 0, 8), "b": tensor_entry([2], 4, 12)}, bytes(12))
    ),
    safetensors_case(
        "beyond the end", make_safetensors({"a": tensor_entry([1], 0, 4), "b": tensor_entry([1], 4, 8)}, bytes(4))
    ),
    safetensors_case("of terabytes", make_safetensors({"a": tensor_entry([2**40], 0, 2**42)}, bytes(4))),
    safetensors_case(
        "of a size that differs from the shape", make_safetensors({"a": tensor_entry([3], 0, 8)}, bytes(8))
    ),
    safetensors_case("of an overflowing size", make_safetensors({"a": tensor_entry([2**62, 2**62], 0, 4)}, bytes(4))),
    safetensors_case("of a negative size", make_safetensors({"a": tensor_entry([-1], 0, 4)}, bytes(4))),
    safetensors_case("of an unknown type", make_safetensors({"a": tensor_entry([4], 0, 4, "U9")}, bytes(4))),
    safetensors_case(
        "of an unsupported type", make_safetensors({"a": tensor_entry([4], 0, 4, "F8_E4M3")}, bytes(4)), "a", "F8_E4M3"
    ),
    safetensors_case(
        "that are a Git LFS pointer", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"
    ),
    safetensors_case("of no model", make_safetensors({"a": tensor_entry([1], 0, 4)}, bytes(4)), "no vision tower"),
    index_case(
        "that may_leave its folder", json.dumps({"weight_map": {"a": "../../etc/hostname"}}), "'../../etc/hostname'"
    ),
    index_case("truncated", '{"weight_map": {"a', "download it again"),
    index_case("nested deeply", "[" * 99_999, "download it again"),
    index_case("of numbers", json.dumps({"weight_map": {"a": 3}}), "download it again"),
    index_case("of files that are missing", json.dumps({"weight_map": {"a": "b.safetensors"}}), "b.safetensors"),
    config_case("truncated", first_half, "config.json"),
    config_case("in Latin-1", lambda old: old + b"\xe4", "config.json"),
    config_case("nested deeply", lambda _: b"[" * 99_999, "config.json"),
    config_case("that is an array", lambda _: b"[]", "config.json"),
    config_case("with too many layers", set_values(num_hidden_layers=10**9), "config.json", "1000000000"),
    config_case("with text for a number", set_values(hidden_size="wide"), "config.json", "'wide'"),
    config_case("with NaN for a number", set_values(num_hidden_layers=float("nan")), "config.json", "nan"),
    config_case("with norms of NaN", set_values(rms_norm_eps=float("nan")), "config.json", "nan"),
    config_case(
        "with positions of NaN", set_values(rope_parameters={"rope_type": "default", "rope_theta": float("nan")}), "nan"
    ),
    config_case("with heads that do not divide", set_values(num_attention_heads=5), "config.json", "(5)"),
    config_case("that contains code", set_values(model_type="mine", auto_map={"AutoConfig": "evil.Evil"}), "'mine'"),
    import_case(
        "weights with most tensors missing",
        modified_copy("foreign", "model.safetensors", lambda _: EMBEDDING),
        "foreign",
        "num_hidden_layers 3, but the tensors hold 0 layers",
    ),
    pickle_case("that is empty", b""),
    pickle_case("that is text", "This is no pickle.", NOT_EXECUTED),
    pickle_case("truncated", first_half(save_torch(WEIGHT)), NOT_EXECUTED),
    pickle_case("that would run code", save_torch({"a": UnpickleTrap()}), NOT_EXECUTED),
    pickle_case(
        "in the old format that would run code",
        save_torch({"a": UnpickleTrap()}, _use_new_zipfile_serialization=False),
        NOT_EXECUTED,
    ),
    pickle_case("of plain Python that would run code", pickle.dumps(UnpickleTrap()), NOT_EXECUTED),
    pickle_case("of a module", save_torch(torch.nn.Linear(2, 2)), NOT_EXECUTED),
    pickle_case("that is a bomb", BOMB, "is compressed"),
    pickle_case("of numbers", save_torch({"a": 3}), "named tensors"),
    pickle_case("of a list", save_torch([torch.ones(2)]), "named tensors"),
    pickle_case("of complex numbers", save_torch({"a": torch.ones(2, dtype=torch.complex64)}), "complex64"),
    gguf_case("that is empty", b""),
    gguf_case("that is text", "This is no GGUF, whatever it is called.", "download it again"),
    gguf_case("truncated in its header", make_gguf(LLAMA)[:-9], "truncated"),
    gguf_case("with too many values", make_gguf(LLAMA, count=2**60), "truncated"),
    gguf_case("with too many tensors", make_gguf(LLAMA, tensors=2**60), "truncated"),
    gguf_case("with too long a text", make_gguf({"a": "b"}, count=2, rest=struct.pack("<Q", 2**60)), "truncated"),
    gguf_case("of another family", make_gguf({"general.architecture": "mamba"}), "'mamba'", "llama"),
    gguf_case("without a number of heads", make_gguf({"general.architecture": "llama"}), "the key llama.block_count,"),
    gguf_case(
        "with too many layers", make_gguf(LLAMA | {"llama.block_count": 2**31 - 1}), "llama.block_count is 2147483647"
    ),
    gguf_case("with text for a number", make_gguf(LLAMA | {"llama.block_count": "two"}), "llama.block_count is 'two'"),
    gguf_case("with a number for text", make_gguf(LLAMA | {"general.architecture": 3}), "architecture 3"),
    gguf_case("of no heads", make_gguf(LLAMA | {"llama.attention.head_count": 0}), "llama.attention.head_count is 0"),
    gguf_case("in parts", make_gguf(LLAMA | {"split.count": 3}), "3 parts", "gguf-split"),
    gguf_case(
        "with a tensor beyond its end", make_gguf(LLAMA, 1, gguf_text("a") + struct.pack("<IQIQ", 1, 2**40, 0, 0))
    ),
    gguf_case(
        "with a tensor of an unknown type",
        make_gguf(LLAMA, 1, gguf_text("a") + struct.pack("<IQIQ", 1, 8, 999, 0)),
        "999",
    ),
    export_case("nothing", no_input, "{here}/model"),
    export_case("a file", write_file("model", ""), "{here}/model"),
    export_case("without a format", no_input, "--format", model="{model}", options=()),
    export_case("in an unknown format", no_input, "'onnx'", "'hf'", model="{model}", options=("--format=onnx",)),
    export_case(
        "with an invalid pattern", no_input, "--only='('", model="{model}", options=("--format=native", "--only=(")
    ),
    export_case("no parameters", no_input, "--only='x'", model="{model}", options=("--format=native", "--only=x")),
    export_case(
        "a part in a format for complete models",
        no_input,
        "--format=native",
        model="{model}",
        options=("--format=hf", "--only=x"),
    ),
    export_case(
        "over existing files", write_file("out/thesis.txt", "mine"), "{here}/out", "another folder", model="{model}"
    ),
    export_case(
        "a model unsupported by the authors' code",
        no_input,
        "hf instead",
        model="{model}",
        options=("--format=llava-stf",),
    ),
    export_case("a truncated description", modified_copy("model", "model.json", first_half), "{here}/model/model.json"),
    export_case(
        "a deeply nested description", modified_copy("model", "model.json", lambda _: b"[" * 99_999), "{here}/model"
    ),
    export_case("a description of no model", edited_json("model", "model.json", llm=[1]), "{here}/model"),
    export_case("a model without its values", copy_model_without("d"), "{here}/model"),
    export_case(
        "a model with a truncated list", modified_copy("model", "params/state/_METADATA", first_half), "{here}/model"
    ),
    export_case("a model without its tokenizer", copy_model_without("tokenizer"), "{here}/model", "lacks tokenizer"),
    verify_case("no questions", no_input, "{export}", "--questions", options=("--questions=0",)),
    verify_case("nothing", no_input, "{here}/none", "{here}/none"),
    verify_case(
        "a truncated export", modified_copy("export", "model.safetensors", first_half), "{here}/export", "{here}/export"
    ),
]


def score_case(name, make, argv, *messages, may_leave=()):
    """Scoring answers to GQA, with options that override valid ones."""
    argv = ("--answers={here}/answers.jsonl", "--benchmark=gqa", "--data={data}", "--out={here}/out", *argv)
    return Case(name, "evaluate", make, argv, messages, may_leave)


def answers_case(name, content, *messages):
    return score_case(f"answers {name}", write_file("answers.jsonl", content), [], "{here}/answers.jsonl", *messages)


def benchmark_case(name, kind, files, *messages):
    """Scoring a benchmark with invalid files, the first of which must be named."""
    make = combine(ANSWERS, *(write_file(f"d/{kind}/{file}", content) for file, content in files.items()))
    return score_case(
        f"{kind}, {name}", make, [f"--benchmark={kind}", "--data={here}/d"], f"{{here}}/d/{kind}/", *messages
    )


def question_lines(*changes):
    """Questions in LLaVA's format."""
    return json_lines(*({"question_id": "1", "image": "good.png", "text": "Is it?"} | change for change in changes))


def question_case(name, make, *messages):
    """Evaluating an invalid question; the answers before it remain, so that the same command can resume."""
    argv = (*MODEL, "--benchmark=gqa", "--data={here}/data", "--out={here}/out")
    may_leave = ("out", "out/answers.jsonl", "out/protocol.json")
    return Case(f"a question with {name}", "evaluate", make, (*argv, "--batch=8", "--limit=8"), messages, may_leave)


def replace_in_questions(old: bytes, new: bytes) -> Make:
    """Copies GQA with the first occurrence of a word in its questions replaced."""
    return modified_copy("data", f"gqa/{GQA}", lambda lines: lines.replace(old, new, 1))


ANSWERS = write_file("answers.jsonl", json_lines(*({"question_id": f"20{n:04}", "text": "red"} for n in range(44))))
GQA, LABELS = "llava_gqa_testdev_balanced.jsonl", "testdev_balanced_questions.json"
POPE, POPULAR = "llava_pope_test.jsonl", "coco/coco_pope_popular.json"
VQA, ANNOTATED = "llava_vqav2_mscoco_val2014.jsonl", "v2_mscoco_val2014_annotations.json"
TEXTVQA, OCR = "TextVQA_0.5.1_val.json", "llava_textvqa_val_v051_ocr.jsonl"
SCIENCE, CHOICE = "llava_test_CQM-A.json", [{"from": "human", "value": "A. a\nB. b"}]
TSV, HEAD = "mmbench_dev_20230712.tsv", "index\tquestion\tA\tB\tanswer\timage\n"
COUNTS = question_lines(*({"category": "count", "question_id": "count/1.png", "text": text} for text in "ab"))
EVALUATE = [
    score_case("a misspelled option", ANSWERS, ["--limitt=3"], "--limitt"),
    score_case("a misspelled benchmark", ANSWERS, ["--benchmark=gqq"], "'gqq'", "'gqa'"),
    score_case("no questions", ANSWERS, ["--data={here}"], f"{GQA} in {{here}}"),
    score_case("a temperature of NaN", ANSWERS, ["--temperature=nan"], "--temperature", "nan"),
    score_case("an output that is a file", combine(ANSWERS, write_file("out", "mine")), [], "{here}/out"),
    score_case("an output below a file", combine(ANSWERS, write_file("f", "")), ["--out={here}/f/out"], "{here}/f/out"),
    score_case("an output that cannot be created", ANSWERS, ["--out=/proc/out"], "/proc/out"),
    score_case(
        "a folder for results",
        combine(ANSWERS, write_file("out/results.json/mine", "")),
        [],
        "{here}/out/results.json",
        may_leave=("out/testdev_balanced_predictions.json", "out/scores.jsonl"),
    ),
    score_case("no answers", no_input, [], "{here}/answers.jsonl"),
    score_case("a folder for answers", write_file("answers.jsonl/mine", ""), [], "{here}/answers.jsonl"),
    answers_case("that is empty", "", "44 of 44"),
    answers_case("truncated", json_lines({"question_id": "200000", "text": "red"}) + '{"question_id": "2', "line 2"),
    answers_case("in UTF-16", json_lines({"question_id": "200000", "text": "red"}).encode("utf-16")),
    answers_case("of NUL", bytes(20), "line 1"),
    answers_case("nested deeply", "[" * 99_999, "line 1"),
    answers_case("with a number with too many digits", f'{{"question_id": {"1" * 9999}}}', "line 1"),
    answers_case("with a number for text", json_lines({"question_id": "200000", "text": 3}), "line 1", "text"),
    answers_case("with half a surrogate pair", '{"question_id": "200000", "text": "\\ud800"}\n', "line 1", "surrogate"),
    answers_case("in an array", json.dumps([{"question_id": "200000", "text": "red"}]), "line 1"),
    answers_case(
        "with two answers to a question",
        json_lines(*({"question_id": "200000", "text": text} for text in "ab")),
        "'200000'",
    ),
    answers_case("to other questions", json_lines({"question_id": "7", "text": "red"}), "'7'"),
    benchmark_case("no questions in its file", "gqa", {GQA: "\n"}, GQA),
    benchmark_case("a number for an image", "gqa", {GQA: question_lines({}, {"image": 3})}, f"{GQA}, line 2"),
    benchmark_case("NUL for a question", "gqa", {GQA: question_lines({}) + "\0\n"}, f"{GQA}, line 2"),
    benchmark_case("truncated labels", "gqa", {GQA: question_lines({}), LABELS: '{"1": '}, LABELS),
    benchmark_case("deeply nested labels", "gqa", {GQA: question_lines({}), LABELS: "[" * 99_999}, LABELS),
    benchmark_case(
        "labels of other questions", "gqa", {GQA: question_lines({}), LABELS: "{}"}, LABELS, "'1'", "Replace it"
    ),
    benchmark_case("a folder for labels", "gqa", {GQA: question_lines({}), f"{LABELS}/mine": ""}, LABELS),
    benchmark_case(
        "a misspelled category",
        "pope",
        {POPE: question_lines({"category": "popluar"})},
        f"{POPE}, question 1",
        "'popular'",
    ),
    benchmark_case(
        "a label that is neither yes nor no",
        "pope",
        {
            POPE: question_lines({"category": "popular"}),
            POPULAR: json_lines({"image": "a", "text": "b", "label": "maybe"}),
        },
        f"{POPULAR}, line 1",
    ),
    benchmark_case(
        "half a pair", "mme", {"llava_mme.jsonl": question_lines({"category": "count"})}, "llava_mme.jsonl", "two"
    ),
    benchmark_case(
        "labels without tabs",
        "mme",
        {"llava_mme.jsonl": COUNTS, "MME_Benchmark_release_version/count/1.txt": "a Yes\n"},
        "1.txt, line 1",
        "tabs",
    ),
    benchmark_case(
        "labels in an array", "vqav2", {VQA: question_lines({}), ANNOTATED: "[]"}, ANNOTATED, "'annotations'"
    ),
    benchmark_case(
        "no annotators",
        "vqav2",
        {
            VQA: question_lines({}),
            ANNOTATED: json.dumps({"annotations": [{"question_id": "1", "answer_type": "other"}]}),
        },
        f"{ANNOTATED}, question 1",
    ),
    benchmark_case(
        "eleven annotators",
        "textvqa",
        {
            OCR: question_lines({}),
            TEXTVQA: json.dumps({"data": [{"image_id": "1", "question": "a", "answers": ["b"] * 11}]}),
        },
        f"{TEXTVQA}, label 1",
        "not 11",
    ),
    benchmark_case(
        "an answer beyond the choices",
        "scienceqa",
        {
            SCIENCE: json.dumps([{"id": "1", "conversations": CHOICE}]),
            "problems.json": json.dumps({"1": {"choices": ["a", "b"], "answer": 2}}),
        },
        "problems.json, problem 1",
    ),
    benchmark_case(
        "a number for an image",
        "scienceqa",
        {SCIENCE: json.dumps([{"id": "1", "image": 3, "conversations": CHOICE}])},
        f"{SCIENCE}, question 1",
    ),
    benchmark_case(
        "labels in an object", "vizwiz", {"llava_val.jsonl": question_lines({}), "val.json": "{}"}, "val.json"
    ),
    benchmark_case("a table of other columns", "mmbench", {TSV: "index\tquestion\n1\tWhat?\n"}, TSV, "A, B"),
    benchmark_case("a truncated table", "mmbench", {TSV: HEAD + "1\tWhat?\ta"}, f"{TSV}, row 1", "download"),
    benchmark_case("a table in UTF-16", "mmbench", {TSV: (HEAD + "1\tWhat?\ta\tb\tA\tx\n").encode("utf-16")}, TSV),
    benchmark_case("text for an index", "mmbench", {TSV: HEAD + "one\tWhat?\ta\tb\tA\tx\n"}, "row 1", "'one'"),
    benchmark_case(
        "an index with too many digits", "mmbench", {TSV: HEAD + "1" * 9999 + "\tWhat?\ta\tb\tA\tx\n"}, f"{TSV}, row 1"
    ),
    benchmark_case("a repeated index", "mmbench", {TSV: HEAD + "1\tWhat?\ta\tb\tA\tx\n" * 2}, f"{TSV}, row 2"),
    benchmark_case(
        "an answer that is not a choice", "mmbench", {TSV: HEAD + "1\tWhat?\ta\tb\tF\tx\n"}, f"{TSV}, index 1", "'F'"
    ),
    Case(
        "no model", "evaluate", no_input, ("--checkpoint={here}", "--benchmark=scenes", "--out={here}/out"), ("{here}",)
    ),
    question_case(
        "a truncated image", modified_copy("data", "gqa/images/n2.png", first_half), "{here}/data/gqa/images/n2.png"
    ),
    question_case(
        "an oversized image", modified_copy("data", "gqa/images/n2.png", lambda _: BAD_IMAGES["bomb.png"][0]), "n2.png"
    ),
    question_case(
        "an image outside the folder",
        replace_in_questions(b'"n2.png"', b'"../../n2.png"'),
        "'../../n2.png' leaves the folder",
    ),
    question_case(
        "a missing image", replace_in_questions(b'"n2.png"', b'"lost.png"'), "{here}/data/gqa/images/lost.png"
    ),
    question_case(
        "a folder for the protocol",
        combine(write_file("out/protocol.json/mine", ""), replace_in_questions(b"", b"")),
        "{here}/out/protocol.json",
    ),
    question_case(
        "a prompt that is too long",
        replace_in_questions(b"Is the thing", b"Is " * 9999),
        "'200000'",
        "4,096",
        "shorten it",
    ),
]


def chat_case(name, make, argv, *messages):
    """Asking about an image; ``argv`` may override the model, which is missing by default."""
    return Case(name, "chat", make, ("--checkpoint={here}/model", "--prompt=What is it?", *argv), messages)


CHAT = [
    chat_case("no model", no_input, [], "{here}/model"),
    chat_case(
        "a truncated description", modified_copy("model", "model.json", first_half), [], "{here}/model/model.json"
    ),
    chat_case(
        "a truncated tokenizer",
        modified_copy("model", "tokenizer/tokenizer.json", first_half),
        [],
        "{here}/model/tokenizer",
    ),
    chat_case(
        "a truncated export",
        modified_copy("export", "model.safetensors", first_half),
        ["--checkpoint={here}/export"],
        "{here}/export/model.safetensors",
    ),
    *(
        chat_case(f"an image: {name}", write_file(name, content), ["--image={here}/" + name], "{here}/" + name, words)
        for name, (content, words) in BAD_IMAGES.items()
    ),
    chat_case("a missing image", no_input, ["--image={here}/lost.png"], "{here}/lost.png"),
    chat_case("a folder for an image", no_input, ["--image={here}"], "{here}"),
    chat_case("a pipe for an image", lambda here, _: os.mkfifo(here / "pipe"), ["--image={here}/pipe"], "{here}/pipe"),
    chat_case(
        "a link to itself for an image",
        lambda here, _: (here / "a.png").symlink_to("a.png"),
        ["--image={here}/a.png"],
        "{here}/a.png",
    ),
    chat_case("a misspelled option", no_input, ["--imgae={here}/a.png"], "--imgae"),
    chat_case("no new tokens", no_input, ["--max-new-tokens=0"], "--max-new-tokens must be at least 1"),
    chat_case("top-p of NaN", no_input, ["--top-p=nan"], "--top-p", "nan"),
    chat_case("an empty mesh", no_input, ["--checkpoint={model}", "--mesh=0,0,0"], "mesh.data=0"),
    chat_case("a prompt that is too long", no_input, [*MODEL, "--prompt=" + "on " * 9999], "shorten it"),
]


def plan_case(name, argv, *messages):
    return Case(name, "plan", no_input, (TINY, *argv), messages)


PLAN = [
    plan_case("a misspelled option", ["--topolgy=h100:8"], "topolgy"),
    plan_case("no config", ["--config={here}/none.py", "--topology=h100:8"], "{here}/none.py"),
    plan_case(
        "an unknown key", ["--topology=h100:8", "--config.global_batch=8"], "'global_batch'", "'global_batch_size'"
    ),
    plan_case("an unknown device", ["--topology=h1000:8"], "h1000:8", "'h100'"),
    plan_case("an empty layout", ["--topology=v5e:0x0"], "--topology=v5e:0x0"),
    plan_case("a layout that does not exist", ["--topology=v5e:99999x99999"], "--topology=v5e:99999x99999"),
    plan_case("slices of GPUs", ["--topology=h100:8", "--slices=2"], "--slices=2"),
    plan_case("slices that are not a number", ["--topology=v5e:2x2", "--slices=two"], "--slices", "'two'"),
    plan_case("an infinite price", ["--topology=h100:8", "--price-per-chip-hour=inf"], "--price-per-chip-hour"),
    plan_case("a mesh that does not match the devices", ["--topology=h100:8", "--config.mesh.tensor=3"], "mesh.tensor"),
    plan_case("a negative number of records", ["--topology=h100:8", "--config.data.records=-1"], "data.records is -1"),
    plan_case(
        "a folder without a model",
        ["--topology=h100:8", "--config.model.llm={here}"],
        "Unknown preset model.llm=",
        "{here}",
    ),
]


def bench_case(name, argv, *messages, make=no_input):
    return Case(name, "bench", make, argv, messages)


BENCH = [
    bench_case("no benchmark", (), "name"),
    bench_case("an unknown benchmark", ("setp",), "'setp'", "'step'"),
    bench_case("a misspelled option", ("step", "--setps=3"), "--setps"),
    bench_case("output in a missing folder", ("input", "--json={here}/none/a.json"), "--json={here}/none/a.json"),
    bench_case("output to a folder", ("input", "--json={here}"), "--json={here}"),
    bench_case(
        "output below a file", ("input", "--json={here}/f/a.json"), "--json={here}/f/a.json", make=write_file("f", "")
    ),
    bench_case("no images", ("input", "--images=0"), "--images"),
    bench_case("no rows", ("input", "--rows=0"), "--rows"),
    bench_case("no steps", ("step", "--steps=0"), "--steps"),
    bench_case("an unknown fusion", ("step", "--fusion=sft"), "'sft'", "'stf'"),
    bench_case("invalid batches", ("decode", "--batches=1,,8"), "--batches=1,,8"),
    bench_case("an unknown tower", ("decode", "--vision=clip"), "'clip'"),
    bench_case(
        "a file for the scratch folder",
        ("weights", "--scratch={here}/f"),
        "--scratch={here}/f",
        make=write_file("f", ""),
    ),
    bench_case("an unknown device", ("plan", "--no-mark", "--topology=v5f:4x8"), "v5f:4x8", "'v5p'"),
]


def ablate_case(name, changes, *messages, make=no_input, may_leave=()):
    argv = ("--config={here}/study.py", "--out={here}/out")
    study = combine(make, lambda here, shared: make_study.write(here / "study.py", **changes))
    return Case(name, "ablate", study, argv, messages, may_leave)


ABLATE = [
    ablate_case(
        "a variant of a misspelled key", {"variants": (("mlp", ("model.fuson.fusion=mlp",)),)}, "'mlp'", "fuson"
    ),
    ablate_case("a misspelled fusion", {"variants": (("mlp", ("model.fusion.fusion=mpl",)),)}, "'mlp'", "'mpl'"),
    ablate_case(
        "more tokens than available", {"asked": (("zip", ("mlp", "--reduce=fastv", "--keep=145")),)}, "'zip'", "145"
    ),
    Case("no study", "ablate", no_input, ("--out={here}/out",), ("--config is missing",)),
    Case(
        "a misspelled key of a study",
        "ablate",
        lambda here, shared: make_study.write(here / "study.py"),
        ("--config={here}/study.py", "--out={here}/out", "--config.sedes=(0,)"),
        ("'sedes'", "'seeds'"),
    ),
    ablate_case("a variant outside its folder", {"variants": (("../mlp", ()),)}, "'../mlp'"),
    ablate_case("a missing base", {"base": "none.py"}, "'mlp'", "none.py"),
    ablate_case("a file in place of its runs", {}, "{here}/out/cells", make=write_file("out/cells", "")),
    ablate_case(
        "results without a config",
        {},
        "{here}/out/cells/mlp/seed_0/pretrain/config.json",
        make=write_file("out/cells/mlp/seed_0/results.json", "{}"),
    ),
    ablate_case(
        "a truncated config of a run",
        {},
        "{here}/out/cells/mlp/seed_0/pretrain/config.json",
        make=combine(
            write_file("out/cells/mlp/seed_0/results.json", "{}"),
            write_file("out/cells/mlp/seed_0/pretrain/config.json", "{"),
        ),
    ),
]


def look_case(name, argv, *messages, make=no_input):
    """Looking at a valid image with a valid model; ``argv`` may override all options."""
    valid = ("--checkpoint={model}", "--image={images}/good.png", "--question=What is it?", "--out={here}/out")
    return Case(name, "look", make, (*valid, *argv), messages)


LOOK = [
    look_case("no model", ["--checkpoint={model},{here}/lost"], "{here}/lost"),
    look_case("a missing image", ["--image={here}/lost.png"], "{here}/lost.png"),
    look_case(
        "a folder without images", ["--image={here}/texts"], "{here}/texts", ".png", make=write_file("texts/a.txt", "")
    ),
    look_case(
        "a folder with a text named as an image",
        ["--image={here}/texts"],
        "{here}/texts/a.png",
        "format",
        make=write_file("texts/a.png", "a"),
    ),
    look_case("an unknown reducer", ["--reduce=visonzip"], "'visonzip'", "'visionzip'"),
    look_case("a reducer that fits no model", ["--reduce=visionzip"], "visionzip", "mbtf_stf"),
    look_case("a budget that is not a number", ["--reduce=fastv", "--keep=1,a"], "'1,a'"),
    look_case("more tokens than there are", ["--reduce=fastv", "--keep=10"], "keep=10", "9"),
    look_case("a question that is too long", ["--question=" + "on " * 9999], "shorten it"),
    look_case("an empty question", ["--question= "], "--question"),
    look_case("a file in place of its folder", [], "{here}/out", make=write_file("out", "")),
]
CASES = [*MAIN, *PREPARE, *CONVERT, *EVALUATE, *CHAT, *PLAN, *BENCH, *ABLATE, *LOOK]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Valid input, for cases that damage a copy of it or have another error."""
    root = tmp_path_factory.mktemp("shared")
    model = make(epath.Path(root / "model"), FusionConfig("mbtf_stf"), "clip", "llama")
    export_hf(model, epath.Path(root / "export"))
    decoder("llama").save_pretrained(root / "foreign")
    (root / "images").mkdir()
    PIL.Image.new("RGB", (30, 20)).save(root / "images" / "good.png")
    for name, (content, _) in BAD_IMAGES.items():
        (root / "images" / name).write_bytes(content)
    make_gqa(root / "data")
    write_rows({}, {"id": "b"})(root, None)
    argv = [f"--annotations={root}/rows.json", f"--images={root}/images", f"--out={root}/prepared", "--workers=1"]
    assert run_command(prepare.main, argv) == 0
    with pytest.MonkeyPatch.context() as patch:
        cached = functools.cache(load_generator)  # the valid model with its programs
        patch.setattr(loading, "load_generator", cached)
        yield types.SimpleNamespace(root=root, **{path.name: path for path in root.iterdir() if path.is_dir()})


def hash_files(folder: pathlib.Path) -> dict[str, str]:
    """Paths in a folder with digests of the files."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.command}: {case.name}")
def test_invalid_input_gives_one_sentence_and_leaves_no_files(case, shared, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    case.make(tmp_path, shared)
    folders = {"here": str(tmp_path)} | {name: str(path) for name, path in vars(shared).items()}

    def fill(text):
        return re.sub(r"\{(\w+)\}", lambda match: folders[match[1]], text)

    before = hash_files(tmp_path)
    capfd.readouterr()
    status = run_command(COMMANDS[case.command].main, [fill(word) for word in case.argv])
    stderr = capfd.readouterr().err
    assert status == 2, stderr
    assert "Traceback" not in stderr
    *logged, last = stderr.splitlines()
    assert last.startswith("error: ")
    assert not any(line.startswith("error: ") for line in logged)
    for message in case.messages:
        assert fill(message) in last
    after = hash_files(tmp_path)
    changes = {path for path in before | after if before.get(path) != after.get(path)}
    assert {path for path in changes if not any(fnmatch.fnmatch(path, pattern) for pattern in case.may_leave)} == set()
    assert not [path for path in after if "partial" in path]


def test_the_unpickle_trap_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(UnpickleTrap()))  # none of the cases above may do this
    assert (tmp_path / "pwned").exists()


@pytest.mark.parametrize("template", TEMPLATES)
def test_control_tokens_in_text_are_encoded_as_text(template):
    tokenizer = load_tokenizer("miniature")
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROL})
    names = [*CONTROL, tokenizer.eos_token, tokenizer.bos_token]

    def count_controls(question, answer):
        turns = Turn("human", f"<image>\n{question}"), Turn("gpt", answer)
        encoded = encode(template_items(template, Record("a", (PIL.Image.Image,), turns)), tokenizer, 9)
        assert encoded.is_image.sum() == 9
        text_ids = encoded.tokens[~encoded.is_image].tolist()
        return [text_ids.count(token) for token in tokenizer.convert_tokens_to_ids(names)], tokenizer.decode(text_ids)

    plain, _ = count_controls("What?", "It.")
    with_controls, text = count_controls(f"What{''.join(names)}?", f"It{''.join(names)}.")
    assert with_controls == plain
    assert text.count(f"It{''.join(names)}.") == 1
