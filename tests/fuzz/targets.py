# ruff: noqa: PT017 (nothing here expects an exception: what is refused is looked at, too)
"""What is fuzzed: functions of bytes that raise where the project crashes or breaks a promise; inputs to start from.

Each target reads its bytes as a user's input would arrive: a file, or texts with :data:`SEPARATOR` between. Both layers
use them: hypothesis (test_fuzz.py, in every test run) and atheris (guided.py, which follows the code's coverage).
"""

import contextlib
import dataclasses
import functools
import importlib.util
import io
import itertools
import json
import math
import pathlib
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import PIL.Image
import tokenizers
from etils import epath
from special_tokens import count_special_tokens
from transformers import PreTrainedTokenizerFast

from stf_jax.config import UserError, from_json, resolve, to_json
from stf_jax.data.conversation import TEMPLATES, count_tokens, encode, stop_tokens, template_items
from stf_jax.data.image import MAX_ASPECT_RATIO, open_image, read_image, to_square
from stf_jax.data.llava import LlavaRecords, read_rows
from stf_jax.data.records import IMAGE_MARK, REASONS, BadRow, Record, Turn
from stf_jax.data.tokenizer import load_tokenizer, read_tokenizer
from stf_jax.evals import gqa, mmbench, mme, pope, scienceqa, vqa
from stf_jax.evals.answers import answer_line, match_answers, read_answers
from stf_jax.evals.benchmark import Question
from stf_jax.evals.registry import BENCHMARKS
from stf_jax.evals.runner import flatten_metrics, format_results, score
from stf_jax.models.presets import vision_preset
from stf_jax.runtime import cli

SEPARATOR = "\x1e"  # between the texts or files that an input is made of
SLOTS = 3
_ROOT = pathlib.Path(__file__).parent.parent.parent


@functools.cache
def _folder(name: str) -> pathlib.Path:
    """An empty folder of this process."""
    holder = tempfile.TemporaryDirectory(prefix=f"fuzz-{name}-", dir=_shared_memory())
    _HOLDERS.append(holder)  # removed when the process ends
    return pathlib.Path(holder.name)


_HOLDERS: list[tempfile.TemporaryDirectory] = []


def _shared_memory():
    return "/dev/shm" if pathlib.Path("/dev/shm").is_dir() else None


def _texts(data: bytes) -> list[str]:
    return data.decode(errors="replace").split(SEPARATOR)


def _chosen(name: str, known: Sequence[str]) -> str:
    """One of ``known`` for any text: itself, or what its first character comes to."""
    return name if name in known else known[ord(name[:1] or "\0") % len(known)]


# ---- LLaVA's JSON ----------------------------------------------------------------------------------------------------


@functools.cache
def _images() -> pathlib.Path:
    folder = _folder("images")
    (folder / "a.png").write_bytes(_image("PNG", "RGB"))
    return folder


def annotations(data: bytes) -> None:
    """A JSON file of LLaVA's, down to token ids: each row is a record or is refused, and none is another's."""
    file = _folder("annotations") / "rows.json"
    file.write_bytes(data)
    try:
        source = LlavaRecords(str(file), str(_images()))
    except UserError as error:
        assert "rows.json" in str(error)
        assert not _plain_array(data), "a JSON array is refused"
        return
    rows = list(read_rows(epath.Path(file)))
    assert len(source) == len(rows) > 0
    if known := _plain_array(data):
        assert repr(rows) == repr(known), "rows are not those of the file"
    for index in range(len(rows)):
        with contextlib.suppress(BadRow):
            record = source[index]
            for template in TEMPLATES:
                with contextlib.suppress(BadRow):
                    encode(template_items(template, record), _tokenizer(template), SLOTS)
            for image in record.images:
                assert image().size == (20, 9)


def _plain_array(data):
    """What Python's own reader makes of a file, if that is an array and within what rows may be."""
    try:
        text = data.decode("utf-8-sig")
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    deep = text.count("[") + text.count("{") > 100
    return value if isinstance(value, list) and not deep and not text[:1000].isspace() else None


# ---- Conversations ---------------------------------------------------------------------------------------------------

_CONTROL = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_KINDS = [*TEMPLATES, "v1 llama", "mistral llama", "plain llama"]


@functools.cache
def _tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """One that fits the template: of bytes, with all control tokens, or SentencePiece's for ``… llama``."""
    if kind.endswith("llama"):
        package = importlib.util.find_spec("mistral_common")
        assert package is not None, "mistral-common (requirements-dev.txt) is not installed"
        folder = _folder("tokenizer")
        model = pathlib.Path(package.submodule_search_locations[0]) / "data" / "tokenizer.model.v1"
        shutil.copy(model, folder / "tokenizer.model")
        return read_tokenizer(folder)
    backend = tokenizers.Tokenizer.from_str(load_tokenizer("miniature").backend_tokenizer.to_str())
    backend.add_special_tokens(list(_CONTROL))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def conversation(data: bytes) -> None:
    """A template's name, then turns: what is learned is the answers, and no text becomes a control token or a slot."""
    kind, *texts = _texts(data)
    kind = _chosen(kind, _KINDS)
    template, tokenizer = kind.split()[0], _tokenizer(kind)
    turns = tuple(Turn(("human", "gpt")[i % 2], text) for i, text in enumerate(texts))
    images = sum(turn.text.count(IMAGE_MARK) for turn in turns)
    try:
        items = template_items(template, Record("row", (None,) * images, turns))
    except BadRow as error:
        assert error.reason in REASONS
        two = template == "plain" and len(turns) > 2
        assert any(IMAGE_MARK in turn.text for turn in turns[1::2]) or two, "a good record is refused"
        return
    result = encode(items, tokenizer, SLOTS)
    assert len(result.tokens) == len(result.is_target) == len(result.is_image)
    assert count_tokens([items], tokenizer, SLOTS) == [len(result.tokens)]
    assert result.is_image.sum() == SLOTS * images
    assert not (result.is_image & result.is_target).any()
    found, expected = count_special_tokens(result, items, tokenizer)
    assert found == expected, "text became a control token"
    if "\u2581" in data.decode(errors="replace") and kind.endswith("llama"):
        return  # SentencePiece's own mark of a space, which cannot be told from one afterwards
    if template == "plain":
        _check_plain(result, turns, images, tokenizer)
    else:
        _check_chat(template, result, turns, tokenizer)


def _check_plain(result, turns, images, tokenizer):
    said = tokenizer.decode(result.tokens[result.is_target])
    if images and len(turns) == 2:
        assert said.removeprefix(" ") == turns[1].text.strip() + "\n"
    elif not images:
        whole, text = tokenizer.decode(result.tokens).removeprefix("<s>"), "".join(turn.text for turn in turns)
        if "\u2581" in tokenizer.get_vocab():  # SentencePiece puts a space before a text
            whole, text = whole.lstrip(" "), text.lstrip(" ")
        assert whole == text
        if len(turns) == 2:  # a token with an end of one and a beginning of the other is learned
            assert said.endswith(turns[1].text)
    assert len(turns) > 1 or not result.is_target.any()


def _check_chat(template, result, turns, tokenizer):
    (stop, *_), said = stop_tokens(template, tokenizer), [[]]
    for token in result.tokens[result.is_target].tolist():
        if token == stop:
            said.append([])
        else:
            said[-1].append(token)
    answers = [turn.text.strip() for turn in turns[1::2]]
    assert said.pop() == [], "the last answer is not ended"
    assert [tokenizer.decode(tokens).removeprefix(" ") for tokens in said] == answers
    rest = tokenizer.decode(result.tokens[~result.is_target & ~result.is_image])
    for turn in turns[::2]:
        question = turn.text.replace(IMAGE_MARK, "").strip()
        assert question in rest, "a question is not all there, or not in order"
        rest = rest[rest.index(question) + len(question) :]
    # What is said first does not depend on what comes later: a prompt is how the model was trained to be asked.
    begins = np.flatnonzero(result.is_target & ~np.concatenate([[False], result.is_target[:-1]]))
    for place in range(1, len(turns)):
        part = Record("row", (None,) * sum(turn.text.count(IMAGE_MARK) for turn in turns[:place]), turns[:place])
        tokens = encode(template_items(template, part), tokenizer, SLOTS).tokens
        assert tokens.tolist() == result.tokens[: len(tokens)].tolist(), "a part is told otherwise than in the whole"
        if place % 2:
            assert len(tokens) == begins[place // 2], "a prompt does not end where the answer begins"


# ---- Images --------------------------------------------------------------------------------------------------------

_TOWER = dataclasses.replace(vision_preset("clip-mini-16-96"), image_size=8, patch_size=4)
_TOWERS = (_TOWER, dataclasses.replace(_TOWER, class_token=False))  # one that crops, one that squeezes


def image(data: bytes) -> None:
    """An image file: refused with a reason, or squares of the tower's size, the same each time."""
    data = _with_checksums(data)
    try:
        opened = open_image(data, "x.png")
    except BadRow as error:
        assert error.reason in ("corrupt", "truncated", "too_large")
        return
    assert max(opened.size) <= MAX_ASPECT_RATIO * min(opened.size)
    for tower, aspect in itertools.product(_TOWERS, ("square", "pad")):
        square = to_square(opened, tower, aspect)
        assert square.shape == (8, 8, 3)
        assert square.dtype == np.uint8
        assert (square == to_square(open_image(data, "x.png"), tower, aspect)).all()


def _with_checksums(data):
    """A PNG file with the checksums of its chunks put right, without which few changes of it would be looked at."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    file, place = bytearray(data), 8
    while place + 12 <= len(file):
        end = place + 8 + int.from_bytes(file[place : place + 4])
        file[end : end + 4] = zlib.crc32(file[place + 4 : end]).to_bytes(4)
        place = end + 4
    return bytes(file[: len(data)])


@functools.cache
def _yard():
    """A folder with images, beside it what must not be read; the folder, and what its files hold."""
    yard = _folder("yard")
    folder = yard / "images"
    (folder / "sub").mkdir(parents=True)
    contents = {b"a": folder / "a.png", b"b": folder / "sub" / "b.png", b"c": folder / "~", b"d": folder / "..."}
    for content, file in contents.items():
        file.write_bytes(content)
    for file in (yard / "a.png", yard / "secret", yard / "images2.png"):
        file.write_bytes(b"secret")
    return epath.Path(folder), set(contents)


def image_path(data: bytes) -> None:
    """A path in a record: a file of the folder, or refused; never one elsewhere."""
    folder, inside = _yard()
    try:
        content = read_image(folder, data.decode(errors="surrogateescape"))
    except BadRow as error:
        assert error.reason in ("outside", "missing", "url")
        return
    assert content in inside, "a file outside of the folder was read"


# ---- Answers ---------------------------------------------------------------------------------------------------------


def scoring(data: bytes) -> None:
    """An answer, then what others say: figures within their range, right answers at the top, rules kept."""
    text, *others = _texts(data)
    _check_vqa(text, others)
    _check_choices(text, others)
    assert gqa.normalize_answer(gqa.normalize_answer(text)) == gqa.normalize_answer(text)
    assert mme.parse_yes_no(text) in ("yes", "no", "other")
    assert pope.is_yes(text) == pope.is_yes(text.split(".")[0]) == pope.is_yes(text.replace(",", ""))
    if text.isascii():
        assert gqa.normalize_answer(text.swapcase() + "..") == gqa.normalize_answer(text)
        assert mme.parse_yes_no(text.swapcase()) == mme.parse_yes_no(text)
    _check_answer_file([text, *others])


def _check_vqa(text, others):
    answers = [text] * 4 + others
    assert math.isclose(vqa.accuracy(text, answers), 1), "what four annotators say is right"
    assert vqa.normalize(f"\n {text}\t") == vqa.normalize(text)
    if text.isascii():
        assert vqa.normalize(text.swapcase()) == vqa.normalize(text)
        assert vqa.normalize(text.replace(",", "").replace("?", "")) == vqa.normalize(text)
    if others:
        share = vqa.accuracy(text, others)
        assert 0 <= share <= 1
        assert math.isclose(share, vqa.accuracy(text, others[::-1])), "annotators have an order"
        best = max(vqa.accuracy(other, others) for other in others)
        assert share <= best + 1e-12, "an answer is better than all that were given"


def _check_choices(text, others):
    options = dict(zip("ABCD", filter(None, others), strict=False))
    assert mmbench.parse_choice(text, options) in (None, *"ABCDE")
    assert scienceqa.parse_choice(text) in (None, *"ABCDE")
    for letter in options:
        for said in (letter, f"{letter}.", f"({letter})", f"\n{letter} "):
            assert mmbench.parse_choice(said, options) == letter
        for said in (letter, f"{letter}. {text}", f"The answer is {letter}."):
            assert scienceqa.parse_choice(said) == letter


class _Questions:
    """A benchmark's part that answers are matched with."""

    limited = False

    def __init__(self, texts):
        self.questions = [Question(number % 2, text, None, f"{number}\n{text}") for number, text in enumerate(texts)]


def _check_answer_file(texts):
    file, asked = epath.Path(_folder("answers")) / "answers.jsonl", _Questions(texts)
    lines = [answer_line(question, i, texts[i], "model") for i, question in enumerate(asked.questions)]
    file.write_text("\n".join(reversed(lines)) + "\n")
    assert match_answers(asked, read_answers(file), file) == [text.strip() for text in texts]


_FILES = {
    "gqa": ("llava_gqa_testdev_balanced.jsonl", "testdev_balanced_questions.json"),
    "scienceqa": ("llava_test_CQM-A.json", "problems.json"),
    "vqav2": ("llava_vqav2_mscoco_val2014.jsonl", "v2_mscoco_val2014_annotations.json"),
    "vizwiz": ("llava_val.jsonl", "val.json"),
    "textvqa": ("llava_textvqa_val_v051_ocr.jsonl", "TextVQA_0.5.1_val.json"),
    "pope": ("llava_pope_test.jsonl", "coco/coco_pope_random.json"),
    "mmbench": ("mmbench_dev_20230712.tsv",),
    "mmbench_cn": ("mmbench_dev_cn_20231003.tsv",),
    "mme": ("llava_mme.jsonl", "eval_tool/Your_Results/existence.txt"),
}


def benchmark(data: bytes) -> None:
    """A benchmark's name, its files of questions and labels, and answers: results within their range, or refused."""
    name, *files = data.split(SEPARATOR.encode())
    name = _chosen(name.decode(errors="replace"), list(_FILES))
    folder = _folder("benchmark") / name
    shutil.rmtree(folder, ignore_errors=True)
    for path, content in zip((*_FILES[name], "answers.jsonl"), files, strict=False):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    try:
        opened = BENCHMARKS[name](epath.Path(folder))
        if len(files) <= len(_FILES[name]):
            lines = [answer_line(q, i, str(q.id), "model") for i, q in enumerate(opened.questions)]
            (folder / "answers.jsonl").write_text("\n".join(lines), encoding="utf-8")
        for question in opened.questions:
            with contextlib.suppress(BadRow):
                encode(template_items("v1", question.to_record()), _tokenizer("v1"), SLOTS)
            if question.image is not None:
                with contextlib.suppress(BadRow):
                    question.image()
        results = score(opened, epath.Path(folder / "answers.jsonl"), epath.Path(folder / "out"))
    except UserError as error:
        assert "\n" not in str(error)
        return
    _check_range("", results["metrics"])
    assert all(isinstance(value, (int, float)) for value in flatten_metrics(results).values())
    assert results["model"] in format_results(results)
    assert json.loads((folder / "out" / "results.json").read_bytes()) == json.loads(json.dumps(results))


def _check_range(key, value):
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_range(name, inner)
    elif isinstance(value, int):
        assert value >= 1
    else:
        most = {"perception": 2000, "cognition": 800, "score": 200}.get(key, 1)
        assert 0 <= value <= most, f"{key} is {value}"


# ---- Configs ---------------------------------------------------------------------------------------------------------

# They name files to run or read, which are the user's to answer for.
_NAMES_FILES = re.compile(r"--?(config(=|$)|flagfile)")


def config(data: bytes) -> None:
    """The argument of a config file and more of the command line: a config that survives JSON, or refused."""
    arg, *argv = _texts(data)
    argv = [item for item in argv if not _NAMES_FILES.match(item.strip())]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            _, read = cli.parse([f"--config={_ROOT / 'configs' / 'demo.py'}:{arg}", "--workdir=w", *argv], "help\n")
        stages = resolve(read)
    except SystemExit as error:
        assert error.code == 0
        assert {"-h", "--help"} & set(argv)
        return
    except UserError as error:
        assert str(error)
        return
    for stage in stages:
        assert from_json(json.loads(json.dumps(to_json(stage), allow_nan=False))) == stage


# ---- Where to start --------------------------------------------------------------------------------------------------


def _image(kind, mode, save=(), **more):
    """A small image's file."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 20, 4), np.uint8)
    image = PIL.Image.fromarray(pixels).convert("RGB")
    image = image.quantize(16) if mode == "P" else image.convert(mode)
    file = io.BytesIO()
    image.save(file, kind, **dict(save), **more)
    return file.getvalue()


def _images():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    frames = [PIL.Image.new("P", (20, 9), shade) for shade in (1, 2)]
    yield from (_image("JPEG", mode, exif=exif, quality=20) for mode in ("L", "RGB", "CMYK"))
    yield _image("JPEG", "RGB", progressive=True)
    yield from (_image("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"))
    yield _image("PNG", "P", transparency=b"\0\x80\xff")
    yield _image("PNG", "L", transparency=7)
    yield _image("GIF", "P", transparency=3)
    yield _image("GIF", "P", save_all=True, append_images=frames)
    yield from (_image("WEBP", "RGBA", lossless=whole) for whole in (True, False))
    yield _image("WEBP", "RGB", save_all=True, append_images=[frame.convert("RGB") for frame in frames])
    yield from (_image("BMP", mode) for mode in ("1", "P", "RGB"))
    yield from (_image("TIFF", mode) for mode in ("1", "P", "RGBA", "CMYK", "LAB", "I;16", "F"))
    yield from (_image("TIFF", "RGB", compression=how) for how in ("tiff_lzw", "tiff_adobe_deflate", "packbits"))
    yield from (_image("PPM", mode) for mode in ("1", "L", "RGB", "I;16"))
    yield b"P3\n2 1\n255\n1 2 3 4 5 6\n"
    yield b"P5\n401 2\n255\n" + bytes(802)


def _joined(*parts: str | bytes) -> bytes:
    return SEPARATOR.encode().join(part.encode() if isinstance(part, str) else part for part in parts)


def _lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def _benchmarks():
    """For each benchmark the smallest files that it takes, with the right answers."""
    ask = {"question_id": "1", "image": "a.png", "text": "Is it?\nAnswer the question using a single word or phrase."}
    answer, ten = {"question_id": "1", "text": "Yes"}, [{"answer": "yes"}] * 10
    label = {"1": {"answer": "yes", "types": {"structural": "verify", "semantic": "attr"}}}
    yield _joined("gqa", _lines(ask), json.dumps(label), _lines(answer))
    turns = [{"from": "human", "value": "<image>\nWhich?\nA. x\nB. y"}, {"from": "gpt", "value": "B"}]
    problem = {"choices": ["x", "y"], "answer": 1}
    row = {"id": "1", "image": "a.png", "conversations": turns}
    yield _joined("scienceqa", json.dumps([row]), json.dumps({"1": problem}), _lines(answer | {"text": "B"}))
    label = {"annotations": [{"question_id": 1, "answer_type": "yes/no", "answers": ten}]}
    yield _joined("vqav2", _lines(ask | {"question_id": 1}), json.dumps(label), _lines(answer))
    yield _joined("vizwiz", _lines(ask), json.dumps([{"image": "a.png", "answers": ten}]), _lines(answer))
    label = {"data": [{"image_id": "1", "question": "is it?", "answers": ["yes"] * 10}]}
    yield _joined("textvqa", _lines(ask), json.dumps(label), _lines(answer))
    label = {"image": "a.png", "text": "Is it?", "label": "yes"}
    yield _joined("pope", _lines(ask | {"category": "random"}), _lines(label), _lines(answer))
    table = "index\tquestion\thint\tA\tB\tanswer\tcategory\timage\n"
    table += "1\tWhich?\t\tx\ty\tB\tc\tiVBO\n1000001\tWhich?\tnan\ty\tx\tA\tc\tiVBO\n"
    told = _lines({"question_id": 1, "text": "B"}, {"question_id": 1000001, "text": "A"})
    yield from (_joined(name, table, told) for name in ("mmbench", "mmbench_cn"))
    asks = [ask | {"category": "existence", "text": text} for text in ("Is it?", "Is it not?")]
    told = [answer | {"prompt": "Is it?"}, answer | {"prompt": "Is it not?", "text": "no"}]
    yield _joined("mme", _lines(*asks), "1.png\tIs it?\tYes\n1.png\tIs it not?\tNo\n", _lines(*told))


def _row(*texts, first=0, **more):
    speakers = ("human", "gpt")
    turns = [{"from": speakers[(first + i) % 2], "value": text} for i, text in enumerate(texts)]
    return more | {"conversations": turns}


_ROWS = [
    _row("<image>\nWhat?", "\u00e9 \U0001f917", id="1", image="a.png"),
    _row("<image><image>", "</s>", image=["a.png", "../a.png"]),
    _row("Hi", "", "x", first=1, id=3),
]

SEEDS: dict[str, list[bytes]] = {
    "annotations": [
        json.dumps(_ROWS).encode(),
        json.dumps(_ROWS, indent=1, ensure_ascii=False).encode("utf-8-sig"),
        b"[[], {}, 1e5, null, -0, NaN]",
        b'[{"conversations": [{"from": "human", "value": "\\ud83d\\ude00"}, {"from": "gpt", "value": "\\ud800"}]}]',
    ],
    "conversation": [
        *(_joined(kind, f"{IMAGE_MARK}\nWhat?", "A cat.", "Sure?", "Yes") for kind in _KINDS),
        *(_joined(kind, IMAGE_MARK * 2, "</s><|im_end|><|eot_id|>[/INST]") for kind in _KINDS),
        *(_joined(kind, " th", "e") for kind in _KINDS),
        *(_joined(kind, "", "", " USER: ", "\n\n", "e\u0301\u200d\U0001f917") for kind in _KINDS),
    ],
    "image": list(_images()),
    "image_path": [b"a.png", b"sub/../a.png", b"../secret", b"../images/a.png", b"/etc/passwd", b"~", b"..."],
    "scoring": [
        _joined("Yes, it is.", "yes", "The answer is B.", "two dogs", "Don't"),
        _joined("A", "a cat", "a-b - c", "1,000.", "(B)", "none"),
        _joined("The answer is C.", "x", "y", "z", "w"),
    ],
    "benchmark": list(_benchmarks()),
    "config": [
        _joined("stage=pretrain,steps=3", "--config.optimizer.learning_rate=1e-3", "--config.seed=7"),
        _joined("", "--config.stages.finetune.data.packing=false", "--config.run=('finetune',)"),
        _joined("stage=finetune", "--config.model.fusion.taps=(3,2)", "--noconfig.data.packing", "--config.name=x"),
        _joined("fusion=mlp", "--help"),
    ],
}
"""Inputs of each target that the project takes, or nearly."""

FOUND: dict[str, list[bytes]] = {name: [] for name in SEEDS} | {
    "benchmark": [
        _joined("mmbench", "index\tquestion\tA\tB\tanswer\timage\n1\tWhich?\ty\tx\ufffe\tA\tiVB"),
        _joined("mmbench", f"index\tquestion\tA\tB\timage\n{'9' * 5000}\tWhich?\ty\tx\tiVB"),
        next(_benchmarks()).replace(b"Is it?", b"\\ud800"),
        next(_benchmarks()).replace(b'"Yes"', b'"\\uDFFF"'),
        next(_benchmarks()).replace(b'"Yes"', b"[" * 5000),
    ],
    "config": [
        *(_joined("", f"--config.run={run}") for run in ("(1,)", "([1],)", "(None,)", "('finetune','finetune')")),
        *(_joined("stage=finetune", f"--config.{key}") for key in ("optimizer.b1=nan", "data.mix=(1e999,)")),
    ],
}
"""Inputs that once broke a target."""

_CHATTER = (SEPARATOR, IMAGE_MARK, *_CONTROL, "<s>", "</s>", "<unk>", "[INST]", "USER:", " ASSISTANT: ", "\u2581", "\0")
WORDS: dict[str, tuple[str, ...]] = {
    "annotations": (
        *("[", "]", "{", "}", ",", '"id":', '"image":', '"conversations":', '"from":', '"value":', '"human"', '"gpt"'),
        *('"<image>"', "\\ud800", "\\udc00", "\\n", "\ufeff", "NaN", "-Infinity", "1e999", "null", "[" * 101),
    ),
    "conversation": (
        *(*_KINDS, *_CHATTER),
        *("\u200b", "\x1c", "\x85", "\u2028", "e\u0301", "\U0001f1e9\U0001f1ea", "\ufffe"),
    ),
    "image": (
        *("IHDR", "PLTE", "tRNS", "IDAT", "IEND", "acTL", "eXIf", "Exif\0\0", "GIF89a", "RIFF", "WEBP", "VP8X", "ALPH"),
        *("ANIM", "ANMF", "II*\0", "MM\0*", "BM", "P1\n", "P5\n", "P6\n", "Pf\n", "\0\0\0\0", "\x7f\x7f\x7f\x7f"),
    ),
    "image_path": (
        *("/", "..", "../", ".", "~", "a.png", "sub", "\\", "gs://", "file://", "\0", "%2e%2e/", "secret", "//"),
    ),
    "scoring": (
        *(SEPARATOR, "yes", "No", "not", ".", ",", "'s", "A", "(B)", "C.", "D", "The answer is ", "two", "none", "the"),
        *("dont", "-", " ", "\n", "?", "\u03a3", "\u0130", "\u00df", "\u2028", "\x1c", "\x85"),
    ),
    "benchmark": (
        *(SEPARATOR, *_FILES, '"question_id":', '"answers":', '"answer":', '"\\ud800"', "[", "]", "{", "}", "\t", "\n"),
        *('"', "1000001", "9" * 20, "null", "true", "NaN", "\ufffe", "[" * 101, "\r", "<image>", "../", "Yes", "No"),
    ),
    "config": (
        *(SEPARATOR, "stage=", "pretrain", "finetune", "steps=", "--config.", "--noconfig.", "stages.", "run", "rules"),
        *(
            "optimizer.",
            "learning_rate",
            "model.fusion.taps",
            "data.mix",
            "seed",
            "=",
            "(",
            ")",
            ",",
            "'",
            "\\",
            "\u0663",
        ),
        *("1e999", "nan", "true", "-1", "9" * 20, "None", "{}", "--workdir=", "--"),
    ),
}
"""What mutations of each target's inputs are made of."""

TARGETS: dict[str, Callable[[bytes], None]] = {
    "annotations": annotations,
    "conversation": conversation,
    "image": image,
    "image_path": image_path,
    "scoring": scoring,
    "benchmark": benchmark,
    "config": config,
}
