"""What cannot be used, verb by verb: status 2 and one sentence, no code of others run, and nothing left behind."""

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
from theirs import decoder

from stf_jax import ablate, bench, chat, convert, evaluate, main, plan, prepare
from stf_jax.config import FusionConfig
from stf_jax.data.conversation import TEMPLATES, encode, template_items
from stf_jax.data.records import Record, Turn
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.inference import loading
from stf_jax.inference.loading import load_generator
from stf_jax.runtime.cli import door
from stf_jax.weights.export_hf import export_hf

ROOT = pathlib.Path(__file__).parents[1]
VERBS = {
    "main": main, "prepare": prepare, "convert": convert, "evaluate": evaluate, "chat": chat, "plan": plan,
    "bench": bench, "ablate": ablate,
}  # fmt: skip
Make = Callable[[pathlib.Path, types.SimpleNamespace], None]


@dataclasses.dataclass(frozen=True)
class Case:
    """A command that cannot be carried out.

    In ``argv``, ``{here}`` is an empty folder of the case's own, and the attributes of ``shared`` are what all cases
    have. ``make`` writes the input into ``here``. ``leaves`` are patterns of files that may be there afterwards, whole.
    """

    name: str
    verb: str
    make: Make
    argv: tuple[str, ...]
    says: tuple[str, ...]
    leaves: tuple[str, ...] = ()


# ---- What is written -------------------------------------------------------------------------------------------------


def nothing(here, shared):
    """The input is wrong, or not there, as it is."""


def put(name: str, content: bytes | str) -> Make:
    """A file."""
    content = content.encode() if isinstance(content, str) else content

    def write(here, shared):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(content)

    return write


def several(*makers: Make) -> Make:
    def write(here, shared):
        for one in makers:
            one(here, shared)

    return write


def changed(what: str, name: str, change: Callable[[bytes], bytes]) -> Make:
    """A copy, in ``here/what``, of one of the shared folders with a file changed."""

    def write(here, shared):
        shutil.copytree(getattr(shared, what), here / what)
        file = here / what / name
        content = change(file.read_bytes())
        file.unlink()  # it may be linked
        file.write_bytes(content)

    return write


def edited(what: str, name: str, **values) -> Make:
    """The same, with keys of a JSON object set."""
    return changed(what, name, lambda old: json.dumps(json.loads(old) | values).encode())


def halved(content: bytes) -> bytes:
    return content[: len(content) // 2]


TALK = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A thing."}]
ROW = {"id": "a", "image": "good.png", "conversations": TALK}


def rows(*changes: dict) -> Make:
    """Annotations in LLaVA's format, in ``here/rows.json``: a good row, changed as each of ``changes`` says."""
    return put("rows.json", json.dumps([ROW | change for change in changes]))


def lines(*values) -> str:
    """JSON lines."""
    return "".join(json.dumps(value) + "\n" for value in values)


# ---- Images --------------------------------------------------------------------------------------------------------


def encoded(kind: str, **how) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8)
    PIL.Image.fromarray(noise).save(file, kind, **how)
    return file.getvalue()


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of so many grey pixels, by its head; with chunks as they are given."""
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in ((b"IHDR", head), *chunks, (b"IEND", b"")))


def archive(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
        for name, content in members.items():
            made.writestr(name, content)
    return file.getvalue()


PICTURES = {  # with what is said of each
    "cut.jpg": (halved(encoded("JPEG")), "truncated"),
    "cut.png": (halved(encoded("PNG")), ""),
    "cut.webp": (halved(encoded("WEBP", lossless=True)), ""),
    "empty.jpg": (b"", "no format of JPEG"),
    "text.jpg": (b"This is no image.", "no format of JPEG"),
    "zip.png": (archive(a=b"a"), "no format of JPEG"),
    "script.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch pwned) (w) file\n", "no format"),
    "bomb.png": (png(12_000, 12_000), "12000x12000 pixels"),
    "ribbon.png": (png(50_000, 2), "50000x2 pixels"),
    "text_bomb.png": (png(8, 8, (b"zTXt", b"a\0\0" + zlib.compress(bytes(2**27)))), ""),
}


# ---- Weights ---------------------------------------------------------------------------------------------------------


def safetensors(head: dict | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with that head, which says to be so long."""
    head = json.dumps(head).encode() if isinstance(head, dict) else head
    return struct.pack("<Q", len(head) if length is None else length) + head + data


def tensor(shape: list[int], begin: int, end: int, kind: str = "F32") -> dict:
    return {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}


class Trap:
    """Whoever unpickles it makes a file in the working folder."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


def torch_file(value, **how) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **how)
    return file.getvalue()


def bombed(content: bytes) -> bytes:
    """A file of torch's whose pickle is compressed: a few KB that would be 64 MiB."""
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


def gguf(values: dict[str, int | str], tensors: int = 0, rest: bytes = b"", count: int | None = None) -> bytes:
    """A GGUF with those numbers and texts in its head."""
    file = b"GGUF" + struct.pack("<IQQ", 3, tensors, len(values) if count is None else count)
    for key, value in values.items():
        file += gguf_text(key)
        file += struct.pack("<II", 4, value) if isinstance(value, int) else struct.pack("<I", 8) + gguf_text(value)
    return file + rest


LLAMA = {"general.architecture": "llama", "llama.block_count": 2, "llama.embedding_length": 32}
LLAMA |= {"llama.attention.head_count": 4}
WEIGHT = {"model.norm.weight": torch.ones(32)}
BOMB = bombed(torch_file(WEIGHT))
EMBEDDING = safetensors({"model.embed_tokens.weight": tensor([62, 32], 0, 7936)}, bytes(7936))

# ---- The table: name, what makes the input, what is asked for, what must be said -------------------------------------

TINY, RUN = f"--config={ROOT}/tests/tiny.py", "--workdir={here}/run"
LLAVA = "--config.data.source=llava"
ROWS, IMAGES = "--config.data.annotations={here}/rows.json", "--config.data.images={images}"
FILE = "{here}/rows.json"
MODEL = ("--checkpoint={model}", "--precision=float32")


def run(name, make, argv, *says, leaves=()):
    """Training by a config that is good but for ``argv``, one option or several."""
    argv = [argv] if isinstance(argv, str) else argv
    return Case(name, "main", make, (TINY, RUN, *argv), says, leaves)


def trained(name, make, *says):
    """Training on data that are not."""
    return run(name, make, (LLAVA, ROWS, IMAGES), *says)


def again(name, file, change, *says):
    """Training on a prepared set that was damaged since."""
    argv = (LLAVA, "--config.data.annotations={here}/prepared")
    return run(name, changed("prepared", file, change), argv, "{here}/prepared", *says)


def initialised(name, content, *says):
    """Training that starts with a file of weights. The workdir is made before they are read."""
    argv = ("--config.init_from={here}/w", "--config.init_missing=('(?!llm/norm).*',)")
    return run(name, put("w/a.safetensors", content), argv, "{here}/w", *says, leaves=("run", "run/*"))


MAIN = [
    Case("a misspelt option", "main", nothing, (TINY, "--wrokdir={here}/run"), ("wrokdir", "workdir")),
    Case("no workdir", "main", nothing, (TINY,), ("--workdir is missing",)),
    Case("no such config", "main", nothing, ("--config={here}/none.py", RUN), ("{here}/none.py",)),
    Case("an argument that a config has not", "main", nothing, (f"{TINY}:setps=3", RUN), ("'setps=3'", "'steps='")),
    run("a config that is no Python", put("c.py", "def get_config(:\n"), "--config={here}/c.py", "c.py, line 1"),
    run("a config with NUL", put("c.py", b"a = 1\0\n"), "--config={here}/c.py", "The config file"),
    run("a config that fails", put("c.py", "def get_config(a=0):\n    1 / a"), "--config={here}/c.py", "c.py, line 2"),
    run("an unknown key", nothing, "--config.data.anotations=a", "data.anotations", "'data.annotations'"),
    run("a number that is none", nothing, "--config.steps=many", "--config.steps=many"),
    run("a rate of NaN", nothing, "--config.optimizer.learning_rate=nan", "optimizer.learning_rate is nan", "between"),
    run("a batch of none", nothing, "--config.global_batch_size=0", "global_batch_size is 0", "between 1 and"),
    run("a rule that is no pattern", nothing, "--config.rules=(('(', 'train'),)", "'('", "regular expression"),
    run(
        "a start that is no pattern",
        nothing,
        "--config.init_missing=('(',)",
        "init_missing",
        "'('",
        leaves=("run", "run/*"),
    ),
    run("taps that the tower has not", nothing, "--config.model.fusion.taps=(9,)", "model.fusion.taps=(9,)", "0 to 3"),
    run("an unknown template", nothing, "--config.data.template=v2", "'v2'", "v1"),
    run("a template of tokens that are not there", nothing, "--config.data.template=chatml", "<|im_start|>"),
    run("a workdir that is a file", put("run", ""), (), "{here}/run"),
    run("a workdir below a file", put("file", ""), "--workdir={here}/file/run", "{here}/file/run"),
    run("a workdir where nothing can be", nothing, "--workdir=/proc/stf_jax", "/proc/stf_jax"),
    run("a tokenizer that is a file", put("t", "{}"), "--config.data.tokenizer={here}/t", "{here}/t", "=DIR"),
    run(
        "a tokenizer cut short", put("t/tokenizer.json", '{"model": {'), "--config.data.tokenizer={here}/t", "{here}/t"
    ),
    run(
        "a model that is not described",
        edited("model", "model.json", llm={"width": 3}),
        "--config.model.llm={here}/model",
        "{here}/model/model.json",
    ),
    run(
        "questions cut short",
        put("gqa/llava_gqa_testdev_balanced.jsonl", '{"question_id": "1", "im'),
        ("--config.eval.benchmarks=('gqa',)", "--config.eval.data={here}"),
        "testdev_balanced.jsonl, line 1",
    ),
    run("a folder that was not prepared", nothing, (LLAVA, "--config.data.annotations={here}"), "{here}", "prepare"),
    run("two folders for one file", rows({}), (LLAVA, ROWS, f"{IMAGES},a"), "data.images names 2 folders", "name one"),
    trained("no annotations", nothing, FILE, ROWS.partition("=")[0]),
    trained("annotations cut short", put("rows.json", json.dumps([ROW, ROW])[:-40]), f"Row 1 of {FILE}"),
    trained("no rows", put("rows.json", "[ ]"), FILE, "at least one row"),
    trained("an empty file of rows", put("rows.json", ""), FILE, "at least one row"),
    trained(
        "lines of rows cut short", put("rows.json", lines(ROW, ROW)[:-40]), f"Line 2 of {FILE}", "may be cut short"
    ),
    trained("rows of one object over lines", put("rows.json", '{\n"a": 1}'), FILE, "or a row a line, but line 1"),
    trained("rows in UTF-16", put("rows.json", json.dumps([ROW]).encode("utf-16")), FILE),
    trained("rows of NUL", put("rows.json", bytes(99)), FILE),
    trained("rows nested without end", put("rows.json", "[" * 99_999), f"Row 0 of {FILE}", "take it out"),
    trained("a row nested deep", put("rows.json", f"[{'[' * 200}{']' * 200}]"), f"Row 0 of {FILE}", "take it out"),
    trained("numbers for texts", rows({"conversations": [{"from": 1, "value": 2}]}), f"Row 0 of {FILE}"),
    trained("an image that is not there", rows({"image": "lost.png"}), FILE, "{images}/lost.png"),
    trained("an image above the folder", rows({"image": "../a.png"}), "'../a.png' leaves the folder {images}"),
    trained("an image elsewhere", rows({"image": "/etc/hostname"}), "'/etc/hostname' leaves the folder {images}"),
    trained("an image's name with NUL", rows({"image": "a\0.png"}), "NUL in its name"),
    trained("an image that is none", rows({"image": "text.jpg"}), "{images}/text.jpg cannot be opened"),
    trained("an image of absurd size", rows({"image": "bomb.png"}), "{images}/bomb.png cannot be opened"),
    run("rows over length", rows({}), (LLAVA, ROWS, IMAGES, "--config.data.max_length=8"), "'a'", "max_length=8"),
    again("a prepared set without rows", "kept.json", lambda _: b"[]", "kept.json"),
    again(
        "a prepared set that lost a row", "kept.json", lambda old: json.dumps(json.loads(old)[1:]).encode(), "1 rows"
    ),
    again("a prepared set whose info is cut", "dataset_info.json", halved, "prepared again"),
    again("a prepared set whose features are an array", "features.json", lambda _: b"[]", "prepared again"),
    again("a prepared set whose shard is cut", "llava-train.array_record-00000-of-00001", halved, "Row 0", "shard"),
    initialised("weights cut short", halved(safetensors({"a": tensor([9], 0, 36)}, bytes(36))), "a.safetensors"),
    initialised("weights of another shape", safetensors({"llm/norm/scale": tensor([9], 0, 36)}, bytes(36)), "(9,)"),
    initialised(
        "weights of a strange type", safetensors({"llm/norm/scale": tensor([32], 0, 32, "F8_E4M3")}, bytes(32))
    ),
]


def prepared(name, make, argv, *says, leaves=()):
    """Preparing, with options that win over good ones."""
    argv = ("--annotations={here}/rows.json", "--images={images}", "--out={here}/out", "--workers=1", *argv)
    return Case(name, "prepare", make, argv, says, leaves)


UNFIT = [{"image": name} for name in (*PICTURES, "lost.png", "../good.png", "/etc/hostname", 3, float("nan"))]
UNFIT += [{"conversations": talk} for talk in (3, TALK[:1], [TALK[0], TALK[0]])]
PREPARE = [
    prepared("a misspelt option", rows({}), ["--max-lenght=3"], "--max-lenght"),
    prepared("no folder of images", rows({}), ["--images={here}/none"], "{here}/none"),
    prepared("a file for a folder of images", rows({}), [f"--images={FILE}"], FILE),
    prepared("no annotations", nothing, [], FILE, "No such file"),
    prepared("a folder for annotations", put("rows.json/mine", ""), [], FILE),
    prepared("annotations cut short", put("rows.json", json.dumps([ROW])[:-30]), [], f"Row 0 of {FILE}"),
    prepared("an object of rows", put("rows.json", json.dumps({"rows": [ROW]})), [], FILE, "JSON array"),
    prepared("more after the array", put("rows.json", json.dumps([ROW]) + "[]"), [], FILE, "row 0"),
    prepared("a number without end", put("rows.json", f"[{'1' * 9999}]"), [], f"Row 0 of {FILE}", "take it out"),
    prepared("an output that is a file", several(rows({}), put("out", "mine")), [], "{here}/out"),
    prepared("an output below a file", rows({}), [f"--out={FILE}/out"], f"{FILE}/out"),
    prepared("an output where nothing can be", rows({}), ["--out=/proc/out"], "/proc/out"),
    prepared(
        "an output that holds something else", several(rows({}), put("out/thesis.txt", "mine")), [], "another --out"
    ),
    prepared("no workers", rows({}), ["--workers=0"], "--workers must be at least 1"),
    prepared("a limit that is no number", rows({}), ["--limit=ten"], "--limit", "'ten'"),
    prepared("an unknown template", rows({}), ["--template=v2"], "'v2'", "v1"),
    prepared("no tokenizer", rows({}), ["--tokenizer={here}/none"], "{here}/none"),
    prepared(
        "no row that can be used",
        rows(*UNFIT),
        [],
        "No row can be used",
        "cannot be decoded",
        "is cut short",
        "absurd size",
        "leaves the folder",
        "report.json in {here}/out",
        leaves=("out", "out/*"),  # the report, and what is looked at again with the same command
    ),
    prepared(
        "a row that would be dropped, strictly",
        rows({}, {"image": "zip.png"}),
        ["--strict"],
        f"row 1 of {FILE}",
        "zip.png",
        leaves=("out", "out/unfinished", "out/unfinished/plan.json"),
    ),
    prepared(
        "a finished set whose report is cut",
        several(rows({}), changed("prepared", "report.json", halved)),
        ["--out={here}/prepared"],
        "{here}/prepared/report.json",
    ),
]


def converted(name, make, argv, *says):
    return Case(name, "convert", make, argv, says)


def imported(name, make, source, *says):
    return converted(
        f"import {name}", make, ("import", "{here}/" + source, "--to={here}/out"), "{here}/" + source, *says
    )


def weights(name, content, *says):
    return imported(f"safetensors {name}", put("w.safetensors", content), "w.safetensors", *says)


def pickled(name, content, *says):
    return imported(f"a pickle {name}", put("w.bin", content), "w.bin", *says)


def ggufs(name, content, *says):
    return imported(f"a GGUF {name}", put("w.gguf", content), "w.gguf", *says)


def index(name, content, *says):
    file = "w/model.safetensors.index.json"
    return imported(f"an index {name}", put(file, content), "w", "{here}/" + file, *says)


def config(name, change, *says):
    """Importing a checkpoint with its config changed."""
    return imported(f"a config {name}", changed("theirs", "config.json", change), "theirs", *says)


def values(**given):
    return lambda old: json.dumps(json.loads(old) | given).encode()


def exported(name, make, *says, model="{here}/model", how=("--format=hf",)):
    return converted(f"export {name}", make, ("export", model, "--to={here}/out", *how), *says)


def verified(name, make, export, *says, more=("--questions=1", "--tokens=1")):
    return converted(f"verify {name}", make, ("verify", "{model}", export, *more), *says)


def without(name: str) -> Make:
    """The model without something."""
    ignored = shutil.ignore_patterns(name)
    return lambda here, shared: shutil.copytree(shared.model, here / "model", ignore=ignored)


UNRUN = "nothing in it was run"
CONVERT = [
    converted("no verb", nothing, (), "verb"),
    converted("an unknown verb", nothing, ("improt", "{theirs}"), "'improt'", "'import'"),
    converted("import to nowhere", nothing, ("import", "{theirs}"), "--to"),
    converted(
        "import as an unknown type", nothing, ("import", "{theirs}", "--to={here}/out", "--dtype=int3"), "'int3'"
    ),
    converted("import over a file", put("out", "mine"), ("import", "{theirs}", "--to={here}/out"), "{here}/out"),
    converted("import below a file", put("f", ""), ("import", "{theirs}", "--to={here}/f/out"), "{here}/f/out"),
    converted("import where nothing can be", nothing, ("import", "{theirs}", "--to=/proc/out"), "/proc/out"),
    converted(
        "import a tower from where none is",
        nothing,
        ("import", "{theirs}", "--to={here}/out", "--vision={theirs}"),
        "--vision={theirs}",
    ),
    imported("nothing", nothing, "none", "give a folder or file"),
    imported("an empty folder", put("w/readme", ""), "w", "*.safetensors"),
    imported("another kind of file", put("w.pt", torch_file(WEIGHT)), "w.pt", "*.bin"),
    weights("of nothing", b""),
    weights("that are text", "This is no file of tensors, whatever it is called.", "fetch it again"),
    weights("cut short", halved(safetensors({"a": tensor([99], 0, 396)}, bytes(396))), "fetch it again"),
    weights("with a head beyond the file", safetensors({"a": tensor([1], 0, 4)}, bytes(4), length=4096)),
    weights("with a head of terabytes", safetensors({"a": tensor([1], 0, 4)}, bytes(4), length=2**43)),
    weights("with a head that is no JSON", safetensors(b'{"a": {"dtype": ', bytes(4))),
    weights("with a head nested deep", safetensors(b'{"a":' + b"[" * 9999 + b"]" * 9999 + b"}", bytes(4))),
    weights("that overlap", safetensors({"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}, bytes(12))),
    weights("beyond the end", safetensors({"a": tensor([1], 0, 4), "b": tensor([1], 4, 8)}, bytes(4))),
    weights("of terabytes", safetensors({"a": tensor([2**40], 0, 2**42)}, bytes(4))),
    weights("of a size that is not their shape's", safetensors({"a": tensor([3], 0, 8)}, bytes(8))),
    weights("of a size beyond numbers", safetensors({"a": tensor([2**62, 2**62], 0, 4)}, bytes(4))),
    weights("of a negative size", safetensors({"a": tensor([-1], 0, 4)}, bytes(4))),
    weights("of an unknown type", safetensors({"a": tensor([4], 0, 4, "U9")}, bytes(4))),
    weights("of a type that is not read", safetensors({"a": tensor([4], 0, 4, "F8_E4M3")}, bytes(4)), "a", "F8_E4M3"),
    weights("that are a pointer", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    weights("of no model", safetensors({"a": tensor([1], 0, 4)}, bytes(4)), "no vision tower"),
    index("that leaves its folder", json.dumps({"weight_map": {"a": "../../etc/hostname"}}), "'../../etc/hostname'"),
    index("cut short", '{"weight_map": {"a', "fetch it again"),
    index("nested deep", "[" * 99_999, "fetch it again"),
    index("of numbers", json.dumps({"weight_map": {"a": 3}}), "fetch it again"),
    index("of files that are missing", json.dumps({"weight_map": {"a": "b.safetensors"}}), "b.safetensors"),
    config("cut short", halved, "config.json"),
    config("in Latin-1", lambda old: old + b"\xe4", "config.json"),
    config("nested deep", lambda _: b"[" * 99_999, "config.json"),
    config("that is an array", lambda _: b"[]", "config.json"),
    config("of layers without end", values(num_hidden_layers=10**9), "config.json", "1000000000"),
    config("with a text for a number", values(hidden_size="wide"), "config.json", "'wide'"),
    config("with NaN for a number", values(num_hidden_layers=float("nan")), "config.json", "nan"),
    config("with norms of NaN", values(rms_norm_eps=float("nan")), "config.json", "nan"),
    config(
        "with positions of NaN", values(rope_parameters={"rope_type": "default", "rope_theta": float("nan")}), "nan"
    ),
    config("with heads that do not divide", values(num_attention_heads=5), "config.json", "(5)"),
    config("that brings code", values(model_type="mine", auto_map={"AutoConfig": "evil.Evil"}), "'mine'"),
    imported(
        "weights of which most are missing",
        changed("theirs", "model.safetensors", lambda _: EMBEDDING),
        "theirs",
        "num_hidden_layers 3, but the tensors hold 0 layers",
    ),
    pickled("of nothing", b""),
    pickled("that is text", "This is no pickle.", UNRUN),
    pickled("cut short", halved(torch_file(WEIGHT)), UNRUN),
    pickled("that would run code", torch_file({"a": Trap()}), UNRUN),
    pickled("of old that would run code", torch_file({"a": Trap()}, _use_new_zipfile_serialization=False), UNRUN),
    pickled("of Python's that would run code", pickle.dumps(Trap()), UNRUN),
    pickled("of a module", torch_file(torch.nn.Linear(2, 2)), UNRUN),
    pickled("that is a bomb", BOMB, "is compressed"),
    pickled("of numbers", torch_file({"a": 3}), "named tensors"),
    pickled("of a list", torch_file([torch.ones(2)]), "named tensors"),
    pickled("of complex numbers", torch_file({"a": torch.ones(2, dtype=torch.complex64)}), "complex64"),
    ggufs("of nothing", b""),
    ggufs("that is text", "This is no GGUF, whatever it is called.", "fetch it again"),
    ggufs("cut in its head", gguf(LLAMA)[:-9], "cut short"),
    ggufs("with values without end", gguf(LLAMA, count=2**60), "cut short"),
    ggufs("with tensors without end", gguf(LLAMA, tensors=2**60), "cut short"),
    ggufs("with a text without end", gguf({"a": "b"}, count=2, rest=struct.pack("<Q", 2**60)), "cut short"),
    ggufs("of another family", gguf({"general.architecture": "mamba"}), "'mamba'", "llama"),
    ggufs("that does not say its heads", gguf({"general.architecture": "llama"}), "num_attention_heads"),
    ggufs("of layers without end", gguf(LLAMA | {"llama.block_count": 2**31 - 1}), "llama.block_count is 2147483647"),
    ggufs("with a text for a number", gguf(LLAMA | {"llama.block_count": "two"}), "llama.block_count is 'two'"),
    ggufs("with a number for a text", gguf(LLAMA | {"general.architecture": 3}), "architecture 3"),
    ggufs("of no heads", gguf(LLAMA | {"llama.attention.head_count": 0}), "llama.attention.head_count is 0"),
    ggufs("in parts", gguf(LLAMA | {"split.count": 3}), "3 parts", "gguf-split"),
    ggufs("with a tensor beyond its end", gguf(LLAMA, 1, gguf_text("a") + struct.pack("<IQIQ", 1, 2**40, 0, 0))),
    ggufs(
        "with a tensor of an unknown type", gguf(LLAMA, 1, gguf_text("a") + struct.pack("<IQIQ", 1, 8, 999, 0)), "999"
    ),
    exported("nothing", nothing, "{here}/model"),
    exported("a file", put("model", ""), "{here}/model"),
    exported("in no format", nothing, "--format", model="{model}", how=()),
    exported("in an unknown format", nothing, "'onnx'", "'hf'", model="{model}", how=("--format=onnx",)),
    exported("by no pattern", nothing, "--only='('", model="{model}", how=("--format=native", "--only=(")),
    exported("nothing of it", nothing, "--only='x'", model="{model}", how=("--format=native", "--only=x")),
    exported("a part as a whole", nothing, "--format=native", model="{model}", how=("--format=hf", "--only=x")),
    exported("over something", put("out/thesis.txt", "mine"), "{here}/out", "another folder", model="{model}"),
    exported("what the authors cannot run", nothing, "hf instead", model="{model}", how=("--format=llava-stf",)),
    exported("a description cut short", changed("model", "model.json", halved), "{here}/model/model.json"),
    exported("a description nested deep", changed("model", "model.json", lambda _: b"[" * 99_999), "{here}/model"),
    exported("a description of no model", edited("model", "model.json", llm=[1]), "{here}/model"),
    exported("a model without its values", without("d"), "{here}/model"),
    exported("a model whose list is cut", changed("model", "params/state/_METADATA", halved), "{here}/model"),
    exported("a model without its tokenizer", without("tokenizer"), "{here}/model", "lacks tokenizer"),
    verified("no questions", nothing, "{export}", "--questions", more=("--questions=0",)),
    verified("nothing", nothing, "{here}/none", "{here}/none"),
    verified("an export cut short", changed("export", "model.safetensors", halved), "{here}/export", "{here}/export"),
]


def scored(name, make, argv, *says, leaves=()):
    """Scoring answers to GQA, with options that win over good ones."""
    argv = ("--answers={here}/answers.jsonl", "--benchmark=gqa", "--data={data}", "--out={here}/out", *argv)
    return Case(name, "evaluate", make, argv, says, leaves)


def answered(name, content, *says):
    return scored(f"answers {name}", put("answers.jsonl", content), [], "{here}/answers.jsonl", *says)


def benchmark(name, kind, files, *says):
    """Scoring a benchmark whose own files are wrong, the first of which must be named."""
    made = several(ANSWERS, *(put(f"d/{kind}/{file}", content) for file, content in files.items()))
    return scored(f"{kind}, {name}", made, [f"--benchmark={kind}", "--data={here}/d"], f"{{here}}/d/{kind}/", *says)


def asked(*changes):
    """Lines of LLaVA's questions."""
    return lines(*({"question_id": "1", "image": "good.png", "text": "Is it?"} | change for change in changes))


def seen(name, make, *says):
    """Asking a model a question that cannot be asked; the answers before it stay, for the same command to go on."""
    argv = (*MODEL, "--benchmark=gqa", "--data={here}/data", "--out={here}/out")
    leaves = ("out", "out/answers.jsonl", "out/protocol.json")
    return Case(f"a question with {name}", "evaluate", make, (*argv, "--batch=8", "--limit=8"), says, leaves)


def replaced(old: bytes, new: bytes) -> Make:
    """GQA with a word in its questions replaced, where it first stands."""
    return changed("data", f"gqa/{GQA}", lambda lines: lines.replace(old, new, 1))


ANSWERS = put("answers.jsonl", lines(*({"question_id": f"20{n:04}", "text": "red"} for n in range(44))))
GQA, LABELS = "llava_gqa_testdev_balanced.jsonl", "testdev_balanced_questions.json"
POPE, POPULAR = "llava_pope_test.jsonl", "coco/coco_pope_popular.json"
VQA, ANNOTATED = "llava_vqav2_mscoco_val2014.jsonl", "v2_mscoco_val2014_annotations.json"
TEXTVQA, OCR = "TextVQA_0.5.1_val.json", "llava_textvqa_val_v051_ocr.jsonl"
SCIENCE, CHOICE = "llava_test_CQM-A.json", [{"from": "human", "value": "A. a\nB. b"}]
TSV, HEAD = "mmbench_dev_20230712.tsv", "index\tquestion\tA\tB\tanswer\timage\n"
COUNTS = asked(*({"category": "count", "question_id": "count/1.png", "text": text} for text in "ab"))
EVALUATE = [
    scored("a misspelt option", ANSWERS, ["--limitt=3"], "--limitt"),
    scored("a misspelt benchmark", ANSWERS, ["--benchmark=gqq"], "'gqq'", "'gqa'"),
    scored("no questions", ANSWERS, ["--data={here}"], f"{GQA} in {{here}}"),
    scored("a temperature of NaN", ANSWERS, ["--temperature=nan"], "--temperature", "nan"),
    scored("an output that is a file", several(ANSWERS, put("out", "mine")), [], "{here}/out"),
    scored("an output below a file", several(ANSWERS, put("f", "")), ["--out={here}/f/out"], "{here}/f/out"),
    scored("an output where nothing can be", ANSWERS, ["--out=/proc/out"], "/proc/out"),
    scored(
        "results that are a folder",
        several(ANSWERS, put("out/results.json/mine", "")),
        [],
        "{here}/out/results.json",
        leaves=("out/testdev_balanced_predictions.json",),
    ),
    scored("no answers", nothing, [], "{here}/answers.jsonl"),
    scored("answers that are a folder", put("answers.jsonl/mine", ""), [], "{here}/answers.jsonl"),
    answered("of nothing", "", "44 of 44"),
    answered("cut short", lines({"question_id": "200000", "text": "red"}) + '{"question_id": "2', "line 2"),
    answered("in UTF-16", lines({"question_id": "200000", "text": "red"}).encode("utf-16")),
    answered("of NUL", bytes(20), "line 1"),
    answered("nested deep", "[" * 99_999, "line 1"),
    answered("with a number without end", f'{{"question_id": {"1" * 9999}}}', "line 1"),
    answered("with a number for a text", lines({"question_id": "200000", "text": 3}), "line 1", "text"),
    answered("with half a character", '{"question_id": "200000", "text": "\\ud800"}\n', "line 1", "surrogate"),
    answered("in an array", json.dumps([{"question_id": "200000", "text": "red"}]), "line 1"),
    answered("twice and not alike", lines(*({"question_id": "200000", "text": text} for text in "ab")), "'200000'"),
    answered("to other questions", lines({"question_id": "7", "text": "red"}), "'7'"),
    benchmark("no questions in its file", "gqa", {GQA: "\n"}, GQA),
    benchmark("a number for an image", "gqa", {GQA: asked({}, {"image": 3})}, f"{GQA}, line 2"),
    benchmark("NUL for a question", "gqa", {GQA: asked({}) + "\0\n"}, f"{GQA}, line 2"),
    benchmark("labels cut short", "gqa", {GQA: asked({}), LABELS: '{"1": '}, LABELS),
    benchmark("labels nested deep", "gqa", {GQA: asked({}), LABELS: "[" * 99_999}, LABELS),
    benchmark("labels of other questions", "gqa", {GQA: asked({}), LABELS: "{}"}, LABELS, "'1'", "replace it"),
    benchmark("labels that are a folder", "gqa", {GQA: asked({}), f"{LABELS}/mine": ""}, LABELS),
    benchmark(
        "a misspelt category", "pope", {POPE: asked({"category": "popluar"})}, f"{POPE}, question 1", "'popular'"
    ),
    benchmark(
        "a label that is neither",
        "pope",
        {POPE: asked({"category": "popular"}), POPULAR: lines({"image": "a", "text": "b", "label": "maybe"})},
        f"{POPULAR}, line 1",
    ),
    benchmark("half a pair", "mme", {"llava_mme.jsonl": asked({"category": "count"})}, "llava_mme.jsonl", "two"),
    benchmark(
        "labels without tabs",
        "mme",
        {"llava_mme.jsonl": COUNTS, "MME_Benchmark_release_version/count/1.txt": "a Yes\n"},
        "1.txt, line 1",
        "tabs",
    ),
    benchmark("labels in an array", "vqav2", {VQA: asked({}), ANNOTATED: "[]"}, ANNOTATED, "'annotations'"),
    benchmark(
        "no annotators",
        "vqav2",
        {VQA: asked({}), ANNOTATED: json.dumps({"annotations": [{"question_id": "1", "answer_type": "other"}]})},
        f"{ANNOTATED}, question 1",
    ),
    benchmark(
        "eleven annotators",
        "textvqa",
        {OCR: asked({}), TEXTVQA: json.dumps({"data": [{"image_id": "1", "question": "a", "answers": ["b"] * 11}]})},
        f"{TEXTVQA}, label 1",
        "not 11",
    ),
    benchmark(
        "an answer beyond the choices",
        "scienceqa",
        {
            SCIENCE: json.dumps([{"id": "1", "conversations": CHOICE}]),
            "problems.json": json.dumps({"1": {"choices": ["a", "b"], "answer": 2}}),
        },
        "problems.json, problem 1",
    ),
    benchmark(
        "a number for an image",
        "scienceqa",
        {SCIENCE: json.dumps([{"id": "1", "image": 3, "conversations": CHOICE}])},
        f"{SCIENCE}, question 1",
    ),
    benchmark("labels in an object", "vizwiz", {"llava_val.jsonl": asked({}), "val.json": "{}"}, "val.json"),
    benchmark("a table of other columns", "mmbench", {TSV: "index\tquestion\n1\tWhat?\n"}, TSV, "A, B"),
    benchmark("a table cut short", "mmbench", {TSV: HEAD + "1\tWhat?\ta"}, f"{TSV}, row 1", "fetch"),
    benchmark("a table in UTF-16", "mmbench", {TSV: (HEAD + "1\tWhat?\ta\tb\tA\tx\n").encode("utf-16")}, TSV),
    benchmark("an index that is text", "mmbench", {TSV: HEAD + "one\tWhat?\ta\tb\tA\tx\n"}, "row 1", "'one'"),
    benchmark("an index without end", "mmbench", {TSV: HEAD + "1" * 9999 + "\tWhat?\ta\tb\tA\tx\n"}, f"{TSV}, row 1"),
    benchmark("an index twice", "mmbench", {TSV: HEAD + "1\tWhat?\ta\tb\tA\tx\n" * 2}, f"{TSV}, row 2"),
    benchmark("an answer of none", "mmbench", {TSV: HEAD + "1\tWhat?\ta\tb\tF\tx\n"}, f"{TSV}, index 1", "'F'"),
    Case(
        "no model", "evaluate", nothing, ("--checkpoint={here}", "--benchmark=scenes", "--out={here}/out"), ("{here}",)
    ),
    seen("an image cut short", changed("data", "gqa/images/n2.png", halved), "{here}/data/gqa/images/n2.png"),
    seen("an image of absurd size", changed("data", "gqa/images/n2.png", lambda _: PICTURES["bomb.png"][0]), "n2.png"),
    seen("an image above the folder", replaced(b'"n2.png"', b'"../../n2.png"'), "'../../n2.png' leaves the folder"),
    seen("an image that is not there", replaced(b'"n2.png"', b'"lost.png"'), "{here}/data/gqa/images/lost.png"),
    seen(
        "a protocol that is a folder",
        several(put("out/protocol.json/mine", ""), replaced(b"", b"")),
        "{here}/out/protocol.json",
    ),
    seen(
        "more words than the model takes", replaced(b"Is the thing", b"Is " * 9999), "'200000'", "4,096", "shorten it"
    ),
]


def said(name, make, argv, *says):
    """Asking about an image; ``argv`` may name a model that is there."""
    return Case(name, "chat", make, ("--checkpoint={here}/model", "--prompt=What is it?", *argv), says)


CHAT = [
    said("no model", nothing, [], "{here}/model"),
    said("a description cut short", changed("model", "model.json", halved), [], "{here}/model/model.json"),
    said("a tokenizer cut short", changed("model", "tokenizer/tokenizer.json", halved), [], "{here}/model/tokenizer"),
    said(
        "an export cut short",
        changed("export", "model.safetensors", halved),
        ["--checkpoint={here}/export"],
        "{here}/export/model.safetensors",
    ),
    *(
        said(f"an image: {name}", put(name, content), ["--image={here}/" + name], "{here}/" + name, words)
        for name, (content, words) in PICTURES.items()
    ),
    said("an image that is not there", nothing, ["--image={here}/lost.png"], "{here}/lost.png"),
    said("an image that is a folder", nothing, ["--image={here}"], "{here}"),
    said("an image that is a pipe", lambda here, _: os.mkfifo(here / "pipe"), ["--image={here}/pipe"], "{here}/pipe"),
    said(
        "an image that links to itself",
        lambda here, _: (here / "a.png").symlink_to("a.png"),
        ["--image={here}/a.png"],
        "{here}/a.png",
    ),
    said("a misspelt option", nothing, ["--imgae={here}/a.png"], "--imgae"),
    said("no words to say", nothing, ["--max-new-tokens=0"], "--max-new-tokens must be at least 1"),
    said("a share of NaN", nothing, ["--top-p=nan"], "--top-p", "nan"),
    said("a mesh of none", nothing, ["--checkpoint={model}", "--mesh=0,0,0"], "mesh.data=0"),
    said("more words than the model takes", nothing, [*MODEL, "--prompt=" + "on " * 9999], "shorten it"),
]


def planned(name, argv, *says):
    return Case(name, "plan", nothing, (TINY, *argv), says)


PLAN = [
    planned("a misspelt option", ["--topolgy=h100:8"], "topolgy"),
    planned("no config", ["--config={here}/none.py", "--topology=h100:8"], "{here}/none.py"),
    planned(
        "an unknown key", ["--topology=h100:8", "--config.global_batch=8"], "'global_batch'", "'global_batch_size'"
    ),
    planned("an unknown device", ["--topology=h1000:8"], "h1000:8", "'h100'"),
    planned("a layout without chips", ["--topology=v5e:0x0"], "--topology=v5e:0x0"),
    planned("a layout that nobody has", ["--topology=v5e:99999x99999"], "--topology=v5e:99999x99999"),
    planned("slices of GPUs", ["--topology=h100:8", "--slices=2"], "--slices=2"),
    planned("slices that are no number", ["--topology=v5e:2x2", "--slices=two"], "--slices", "'two'"),
    planned("a price without end", ["--topology=h100:8", "--price-per-chip-hour=inf"], "--price-per-chip-hour"),
    planned("a mesh that the devices are not", ["--topology=h100:8", "--config.mesh.tensor=3"], "mesh.tensor"),
    planned("fewer records than none", ["--topology=h100:8", "--config.data.records=-1"], "data.records is -1"),
    planned(
        "a model that is none",
        ["--topology=h100:8", "--config.model.llm={here}"],
        "Unknown preset model.llm=",
        "{here}",
    ),
]


def measured(name, argv, *says, make=nothing):
    return Case(name, "bench", make, argv, says)


BENCH = [
    measured("no benchmark", (), "name"),
    measured("an unknown benchmark", ("setp",), "'setp'", "'step'"),
    measured("a misspelt option", ("step", "--setps=3"), "--setps"),
    measured("figures to no folder", ("input", "--json={here}/none/a.json"), "--json={here}/none/a.json"),
    measured("figures to a folder", ("input", "--json={here}"), "--json={here}"),
    measured("figures below a file", ("input", "--json={here}/f/a.json"), "--json={here}/f/a.json", make=put("f", "")),
    measured("no images", ("input", "--images=0"), "--images"),
    measured("no rows", ("input", "--rows=0"), "--rows"),
    measured("no steps", ("step", "--steps=0"), "--steps"),
    measured("an unknown fusion", ("step", "--fusion=sft"), "'sft'", "'stf'"),
    measured("batches that are none", ("decode", "--batches=1,,8"), "--batches=1,,8"),
    measured("an unknown tower", ("decode", "--vision=clip"), "'clip'"),
    measured("a scratch that is a file", ("weights", "--scratch={here}/f"), "--scratch={here}/f", make=put("f", "")),
    measured("an unknown device", ("plan", "--no-mark", "--topology=v5f:4x8"), "v5f:4x8", "'v5p'"),
]


def studied(name, changes, *says, make=nothing, leaves=()):
    argv = ("--config={here}/study.py", "--out={here}/out")
    study = several(make, lambda here, shared: make_study.write(here / "study.py", **changes))
    return Case(name, "ablate", study, argv, says, leaves)


ABLATE = [
    studied("a variant of a misspelt key", {"variants": (("mlp", ("model.fuson.fusion=mlp",)),)}, "'mlp'", "fuson"),
    studied("a misspelt fusion", {"variants": (("mlp", ("model.fusion.fusion=mpl",)),)}, "'mlp'", "'mpl'"),
    studied("more tokens than there are", {"asked": (("zip", ("mlp", "--reduce=fastv", "--keep=145")),)}, "zip", "145"),
    Case("no study", "ablate", nothing, ("--out={here}/out",), ("--config is missing",)),
    Case(
        "a misspelt key of a study", "ablate", lambda here, shared: make_study.write(here / "study.py"),
        ("--config={here}/study.py", "--out={here}/out", "--config.sedes=(0,)"), ("'sedes'", "'seeds'"),
    ),
    studied("a variant outside its folder", {"variants": (("../mlp", ()),)}, "'../mlp'"),
    studied("a base that is not there", {"base": "none.py"}, "'mlp'", "none.py"),
    studied("a file where its runs should lie", {}, "{here}/out/cells", make=put("out/cells", "")),
    studied(
        "results of nobody knows what", {}, "{here}/out/cells/mlp/seed_0/pretrain/config.json",
        make=put("out/cells/mlp/seed_0/results.json", "{}"),
    ),
    studied(
        "a run's config that is cut", {}, "{here}/out/cells/mlp/seed_0/pretrain/config.json",
        make=several(
            put("out/cells/mlp/seed_0/results.json", "{}"), put("out/cells/mlp/seed_0/pretrain/config.json", "{")
        ),
    ),
]  # fmt: skip
CASES = [*MAIN, *PREPARE, *CONVERT, *EVALUATE, *CHAT, *PLAN, *BENCH, *ABLATE]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Good input, of which cases take a damaged copy, or where only something else is wrong."""
    root = tmp_path_factory.mktemp("shared")
    model = make(epath.Path(root / "model"), FusionConfig("mbtf_stf"), "clip", "llama")
    export_hf(model, epath.Path(root / "export"))
    decoder("llama").save_pretrained(root / "theirs")
    (root / "images").mkdir()
    PIL.Image.new("RGB", (30, 20)).save(root / "images" / "good.png")
    for name, (content, _) in PICTURES.items():
        (root / "images" / name).write_bytes(content)
    make_gqa(root / "data")
    rows({}, {"id": "b"})(root, None)
    argv = [f"--annotations={root}/rows.json", f"--images={root}/images", f"--out={root}/prepared", "--workers=1"]
    assert door(prepare.main, argv) == 0
    with pytest.MonkeyPatch.context() as patch:
        once = functools.cache(load_generator)  # the good model, and its programs
        patch.setattr(loading, "load_generator", once)
        yield types.SimpleNamespace(root=root, **{path.name: path for path in root.iterdir() if path.is_dir()})


def tree(folder: pathlib.Path) -> dict[str, str]:
    """All that is in a folder, with digests of files."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.verb}: {case.name}")
def test_what_cannot_be_used_ends_in_one_sentence_and_leaves_nothing(case, shared, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    case.make(tmp_path, shared)
    places = {"here": str(tmp_path)} | {name: str(path) for name, path in vars(shared).items()}

    def placed(text):
        return re.sub(r"\{(\w+)\}", lambda found: places[found[1]], text)

    before = tree(tmp_path)
    capfd.readouterr()
    status = door(VERBS[case.verb].main, [placed(word) for word in case.argv])
    complained = capfd.readouterr().err
    assert status == 2, complained
    assert "Traceback" not in complained
    *told, last = complained.splitlines()
    assert last.startswith("error: ")
    assert not any(line.startswith("error: ") for line in told)
    for words in case.says:
        assert placed(words) in last
    after = tree(tmp_path)
    changes = {path for path in before | after if before.get(path) != after.get(path)}
    assert {path for path in changes if not any(fnmatch.fnmatch(path, one) for one in case.leaves)} == set()
    assert not [path for path in after if "partial" in path]


def test_the_trap_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Trap()))  # what none of the cases above may do
    assert (tmp_path / "pwned").exists()


@pytest.mark.parametrize("template", TEMPLATES)
def test_control_tokens_in_a_text_are_text(template):
    tokenizer = load_tokenizer("miniature")
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROL})
    names = [*CONTROL, tokenizer.eos_token, tokenizer.bos_token]

    def controls(question, answer):
        turns = Turn("human", f"<image>\n{question}"), Turn("gpt", answer)
        coded = encode(template_items(template, Record("a", (PIL.Image.Image,), turns)), tokenizer, 9)
        assert coded.is_image.sum() == 9
        spoken = coded.tokens[~coded.is_image].tolist()
        return [spoken.count(token) for token in tokenizer.convert_tokens_to_ids(names)], tokenizer.decode(spoken)

    plain, _ = controls("What?", "It.")
    laced, text = controls(f"What{''.join(names)}?", f"It{''.join(names)}.")
    assert laced == plain
    assert text.count(f"It{''.join(names)}.") == 1
