# ruff: noqa: PT017 (exceptions are optional here; their properties are checked)
"""Fuzz targets and seed inputs. A target is a function of bytes that raises if the project crashes or is inconsistent.

Each target reads its bytes like user input: a file, or texts separated by :data:`SEPARATOR`. hypothesis (test_fuzz.py,
in every test run) and atheris (guided.py, guided by coverage) use them.
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
from collections.abc import Callable, Iterator, Sequence

import make_hub
import numpy as np
import PIL.Image
import tokenizers
from etils import epath
from special_tokens import count_special_tokens
from transformers import PreTrainedTokenizerFast

from stf_jax import cli
from stf_jax.config import UserError, from_json, resolve, to_json
from stf_jax.data.conversation import TEMPLATES, count_tokens, encode, stop_tokens, template_items
from stf_jax.data.image import MAX_ASPECT_RATIO, open_image, read_image, to_square
from stf_jax.data.records import IMAGE_MARK, REASONS, BadRow, Record, Turn
from stf_jax.data.sources.llava import LlavaRecords, read_rows
from stf_jax.data.tokenizer import load_tokenizer, read_tokenizer
from stf_jax.evals import vqa
from stf_jax.evals.answers import answer_line, match_answers, read_answers
from stf_jax.evals.benchmark import Question
from stf_jax.evals.benchmarks import gqa, mmbench, mme, pope, scienceqa
from stf_jax.evals.registry import BENCHMARKS
from stf_jax.evals.runner import flatten_metrics, format_results, score
from stf_jax.models.spec import vision_preset

SEPARATOR = "\x1e"  # between the texts or files of an input
SLOTS = 3
_ROOT = pathlib.Path(__file__).parent.parent.parent


@functools.cache
def _folder(name: str) -> pathlib.Path:
    """Returns an empty folder of this process."""
    temporary = tempfile.TemporaryDirectory(prefix=f"fuzz-{name}-", dir=_shared_memory())
    _TEMPORARY.append(temporary)  # removed when the process ends
    return pathlib.Path(temporary.name)


_TEMPORARY: list[tempfile.TemporaryDirectory] = []


def _shared_memory():
    return "/dev/shm" if pathlib.Path("/dev/shm").is_dir() else None


def _split_texts(data: bytes) -> list[str]:
    return data.decode(errors="replace").split(SEPARATOR)


def _choose(name: str, known: Sequence[str]) -> str:
    """Maps any text to one of ``known``: itself, or one chosen by its first character."""
    return name if name in known else known[ord(name[:1] or "\0") % len(known)]


# ---- LLaVA's JSON ----------------------------------------------------------------------------------------------------


@functools.cache
def _images_folder() -> pathlib.Path:
    folder = _folder("images")
    (folder / "a.png").write_bytes(_make_image("PNG", "RGB"))
    return folder


def annotations(data: bytes) -> None:
    """Reads a LLaVA JSON file and encodes its records: each row is read or refused, in order."""
    file = _folder("annotations") / "rows.json"
    file.write_bytes(data)
    try:
        source = LlavaRecords(str(file), str(_images_folder()))
    except UserError as error:
        assert "rows.json" in str(error)
        assert not _load_array(data), "a JSON array is refused"
        return
    rows = list(read_rows(epath.Path(file)))
    assert len(source) == len(rows) > 0
    if known := _load_array(data):
        assert repr(rows) == repr(known), "rows are not those of the file"
    for index in range(len(rows)):
        with contextlib.suppress(BadRow):
            record = source[index]
            for template in TEMPLATES:
                with contextlib.suppress(BadRow):
                    encode(template_items(template, record), _load_tokenizer(template), SLOTS)
            for image in record.images:
                assert image().size == (20, 9)


def _load_array(data):
    """Returns what Python's json reads from a file, if it is an array and not too deep."""
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
def _load_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Loads a tokenizer for a template: byte-level with all control tokens, or SentencePiece's for ``… llama``."""
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
    """Encodes turns in a template: targets are exactly the answers, and no text becomes a control token or a slot."""
    kind, *texts = _split_texts(data)
    kind = _choose(kind, _KINDS)
    template, tokenizer = kind.split()[0], _load_tokenizer(kind)
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
        return  # SentencePiece's symbol for a space, which decoding cannot distinguish from a space
    if template == "plain":
        _check_plain(result, turns, images, tokenizer)
    else:
        _check_chat(template, result, turns, tokenizer)


def _check_plain(result, turns, images, tokenizer):
    target_text = tokenizer.decode(result.tokens[result.is_target])
    if images and len(turns) == 2:
        assert target_text.removeprefix(" ") == turns[1].text.strip() + "\n"
    elif not images:
        decoded, text = tokenizer.decode(result.tokens).removeprefix("<s>"), "".join(turn.text for turn in turns)
        if "\u2581" in tokenizer.get_vocab():  # SentencePiece puts a space before a text
            decoded, text = decoded.lstrip(" "), text.lstrip(" ")
        assert decoded == text
        if len(turns) == 2:  # a token across the border of the turns is a target
            assert target_text.endswith(turns[1].text)
    assert len(turns) > 1 or not result.is_target.any()


def _check_chat(template, result, turns, tokenizer):
    (stop, *_), targets = stop_tokens(template, tokenizer), [[]]
    for token in result.tokens[result.is_target].tolist():
        if token == stop:
            targets.append([])
        else:
            targets[-1].append(token)
    answers = [turn.text.strip() for turn in turns[1::2]]
    assert targets.pop() == [], "the last answer has no end"
    assert [tokenizer.decode(tokens).removeprefix(" ") for tokens in targets] == answers
    rest = tokenizer.decode(result.tokens[~result.is_target & ~result.is_image])
    for turn in turns[::2]:
        question = turn.text.replace(IMAGE_MARK, "").strip()
        assert question in rest, "a question is incomplete or not in order"
        rest = rest[rest.index(question) + len(question) :]
    # Tokens do not depend on later turns, so prompts have the tokens of training.
    begins = np.flatnonzero(result.is_target & ~np.concatenate([[False], result.is_target[:-1]]))
    for place in range(1, len(turns)):
        part = Record("row", (None,) * sum(turn.text.count(IMAGE_MARK) for turn in turns[:place]), turns[:place])
        tokens = encode(template_items(template, part), tokenizer, SLOTS).tokens
        assert tokens.tolist() == result.tokens[: len(tokens)].tolist(), "the first turns depend on later ones"
        if place % 2:
            assert len(tokens) == begins[place // 2], "a prompt does not end where the answer begins"


# ---- Images ----------------------------------------------------------------------------------------------------------

_TOWER = dataclasses.replace(vision_preset("clip-mini-16-96"), image_size=8, patch_size=4)
_TOWERS = (_TOWER, dataclasses.replace(_TOWER, class_token=False))  # one that crops, one that squeezes


def image(data: bytes) -> None:
    """Opens an image file: it is refused with a reason, or resized to the tower's size deterministically."""
    data = _fix_checksums(data)
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


def _fix_checksums(data):
    """Corrects the checksums of a PNG file's chunks; otherwise most changes would be rejected without being parsed."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    file, place = bytearray(data), 8
    while place + 12 <= len(file):
        end = place + 8 + int.from_bytes(file[place : place + 4])
        file[end : end + 4] = zlib.crc32(file[place + 4 : end]).to_bytes(4)
        place = end + 4
    return bytes(file[: len(data)])


@functools.cache
def _guarded_folder():
    """Returns a folder of images and the contents of its files; files next to the folder must not be read."""
    parent = _folder("parent")
    folder = parent / "images"
    (folder / "sub").mkdir(parents=True)
    contents = {b"a": folder / "a.png", b"b": folder / "sub" / "b.png", b"c": folder / "~", b"d": folder / "..."}
    for content, file in contents.items():
        file.write_bytes(content)
    for file in (parent / "a.png", parent / "secret", parent / "images2.png"):
        file.write_bytes(b"secret")
    return epath.Path(folder), set(contents)


def image_path(data: bytes) -> None:
    """Reads the path of an image: a file in the folder, or refused, but never another file."""
    folder, inside = _guarded_folder()
    try:
        content = read_image(folder, data.decode(errors="surrogateescape"))
    except BadRow as error:
        assert error.reason in ("outside", "missing", "url")
        return
    assert content in inside, "a file outside the folder was read"


# ---- Answers ---------------------------------------------------------------------------------------------------------


def scoring(data: bytes) -> None:
    """Scores an answer and others: metrics are in range, correct answers score highest, and rules hold."""
    text, *others = _split_texts(data)
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
        for answer in (letter, f"{letter}.", f"({letter})", f"\n{letter} "):
            assert mmbench.parse_choice(answer, options) == letter
        for answer in (letter, f"{letter}. {text}", f"The answer is {letter}."):
            assert scienceqa.parse_choice(answer) == letter


class _Questions:
    """The part of a benchmark that match_answers needs."""

    limited = False

    def __init__(self, texts):
        self.questions = [Question(number % 2, text, None, f"{number}\n{text}") for number, text in enumerate(texts)]


def _check_answer_file(texts):
    file, benchmark = epath.Path(_folder("answers")) / "answers.jsonl", _Questions(texts)
    lines = [answer_line(question, i, texts[i], "model") for i, question in enumerate(benchmark.questions)]
    file.write_text("\n".join(reversed(lines)) + "\n")
    assert match_answers(benchmark, read_answers(file), file) == [text.strip() for text in texts]


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
    """Scores a benchmark from its name and files: it is refused, or its results are in their range."""
    name, *files = data.split(SEPARATOR.encode())
    name = _choose(name.decode(errors="replace"), list(_FILES))
    folder = _folder("benchmark") / name
    shutil.rmtree(folder, ignore_errors=True)
    for path, content in zip((*_FILES[name], "answers.jsonl"), files, strict=False):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    _score_files(name, folder, has_answers=len(files) > len(_FILES[name]))


def _score_files(name: str, folder: pathlib.Path, *, has_answers: bool) -> None:
    """Scores a benchmark's files: they are refused in one line, or the results are in their range."""
    try:
        opened = BENCHMARKS.find(name)(epath.Path(folder))
        if not has_answers:
            lines = [answer_line(q, i, str(q.id), "model") for i, q in enumerate(opened.questions)]
            (folder / "answers.jsonl").write_text("\n".join(lines), encoding="utf-8")
        for question in opened.questions:
            with contextlib.suppress(BadRow):
                encode(template_items("v1", question.to_record()), _load_tokenizer("v1"), SLOTS)
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


_HUB_NAMES = tuple(make_hub.SCHEMAS)


def hub(data: bytes) -> None:
    """Scores a benchmark from its name and its file, as on the Hub or as its authors publish it, as above."""
    name, _, content = data.partition(SEPARATOR.encode())
    name = _choose(name.decode(errors="replace"), _HUB_NAMES)
    folder = _folder("hub") / name
    shutil.rmtree(folder, ignore_errors=True)
    kind = BENCHMARKS.find(name)
    if content.startswith(b"PAR1") or not kind.authors:
        files = [kind.files.replace("*", "00000-of-00001")]
    else:
        files = [file.names[0] for file in kind.authors]
        (folder / "documents").mkdir(parents=True)
        (folder / "documents" / "0.png").write_bytes(make_hub.make_image(0))
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)
    _score_files(name, folder, has_answers=False)


def _hub_seeds() -> Iterator[bytes]:
    """Yields valid files of each benchmark: Parquet's without compression, so that changes reach its values."""
    for name in _HUB_NAMES:
        folder = _folder("hub-seeds")
        make_hub.write_rows(folder, name, make_hub.make_rows(name)[:2], compression="none")
        (file,) = (folder / make_hub.FOLDERS[name]).parent.glob("*.parquet")
        yield _join(name, file.read_bytes())
        if BENCHMARKS.find(name).authors:
            file, *_ = make_hub.write_authors_files(folder / "authors" / name, name)
            yield _join(name, file.read_bytes())


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

# Options that name files to run or read; the user is responsible for these.
_NAMES_FILES = re.compile(r"--?(config(=|$)|flagfile)")


def config(data: bytes) -> None:
    """Parses a config argument and options: they are refused, or the config round-trips through JSON."""
    arg, *argv = _split_texts(data)
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


# ---- Seeds -----------------------------------------------------------------------------------------------------------


def _make_image(kind, mode, save=(), **more):
    """Makes the file of a small image."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 20, 4), np.uint8)
    image = PIL.Image.fromarray(pixels).convert("RGB")
    image = image.quantize(16) if mode == "P" else image.convert(mode)
    file = io.BytesIO()
    image.save(file, kind, **dict(save), **more)
    return file.getvalue()


def _image_seeds():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    frames = [PIL.Image.new("P", (20, 9), shade) for shade in (1, 2)]
    yield from (_make_image("JPEG", mode, exif=exif, quality=20) for mode in ("L", "RGB", "CMYK"))
    yield _make_image("JPEG", "RGB", progressive=True)
    yield from (_make_image("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"))
    yield _make_image("PNG", "P", transparency=b"\0\x80\xff")
    yield _make_image("PNG", "L", transparency=7)
    yield _make_image("GIF", "P", transparency=3)
    yield _make_image("GIF", "P", save_all=True, append_images=frames)
    yield from (_make_image("WEBP", "RGBA", lossless=lossless) for lossless in (True, False))
    yield _make_image("WEBP", "RGB", save_all=True, append_images=[frame.convert("RGB") for frame in frames])
    yield from (_make_image("BMP", mode) for mode in ("1", "P", "RGB"))
    yield from (_make_image("TIFF", mode) for mode in ("1", "P", "RGBA", "CMYK", "LAB", "I;16", "F"))
    yield from (
        _make_image("TIFF", "RGB", compression=compression)
        for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits")
    )
    yield from (_make_image("PPM", mode) for mode in ("1", "L", "RGB", "I;16"))
    yield b"P3\n2 1\n255\n1 2 3 4 5 6\n"
    yield b"P5\n401 2\n255\n" + bytes(802)


def _join(*parts: str | bytes) -> bytes:
    return SEPARATOR.encode().join(part.encode() if isinstance(part, str) else part for part in parts)


def _json_lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def _benchmarks():
    """Yields the smallest valid files of each benchmark, with correct answers."""
    ask = {"question_id": "1", "image": "a.png", "text": "Is it?\nAnswer the question using a single word or phrase."}
    answer, ten = {"question_id": "1", "text": "Yes"}, [{"answer": "yes"}] * 10
    label = {"1": {"answer": "yes", "types": {"structural": "verify", "semantic": "attr"}}}
    yield _join("gqa", _json_lines(ask), json.dumps(label), _json_lines(answer))
    turns = [{"from": "human", "value": "<image>\nWhich?\nA. x\nB. y"}, {"from": "gpt", "value": "B"}]
    problem = {"choices": ["x", "y"], "answer": 1}
    row = {"id": "1", "image": "a.png", "conversations": turns}
    yield _join("scienceqa", json.dumps([row]), json.dumps({"1": problem}), _json_lines(answer | {"text": "B"}))
    label = {"annotations": [{"question_id": 1, "answer_type": "yes/no", "answers": ten}]}
    yield _join("vqav2", _json_lines(ask | {"question_id": 1}), json.dumps(label), _json_lines(answer))
    yield _join("vizwiz", _json_lines(ask), json.dumps([{"image": "a.png", "answers": ten}]), _json_lines(answer))
    label = {"data": [{"image_id": "1", "question": "is it?", "answers": ["yes"] * 10}]}
    yield _join("textvqa", _json_lines(ask), json.dumps(label), _json_lines(answer))
    label = {"image": "a.png", "text": "Is it?", "label": "yes"}
    yield _join("pope", _json_lines(ask | {"category": "random"}), _json_lines(label), _json_lines(answer))
    table = "index\tquestion\thint\tA\tB\tanswer\tcategory\timage\n"
    table += "1\tWhich?\t\tx\ty\tB\tc\tiVBO\n1000001\tWhich?\tnan\ty\tx\tA\tc\tiVBO\n"
    answers = _json_lines({"question_id": 1, "text": "B"}, {"question_id": 1000001, "text": "A"})
    yield from (_join(name, table, answers) for name in ("mmbench", "mmbench_cn"))
    asks = [ask | {"category": "existence", "text": text} for text in ("Is it?", "Is it not?")]
    answers = [answer | {"prompt": "Is it?"}, answer | {"prompt": "Is it not?", "text": "no"}]
    yield _join("mme", _json_lines(*asks), "1.png\tIs it?\tYes\n1.png\tIs it not?\tNo\n", _json_lines(*answers))


def _make_row(*texts, first=0, **more):
    speakers = ("human", "gpt")
    turns = [{"from": speakers[(first + i) % 2], "value": text} for i, text in enumerate(texts)]
    return more | {"conversations": turns}


_ROWS = [
    _make_row("<image>\nWhat?", "\u00e9 \U0001f917", id="1", image="a.png"),
    _make_row("<image><image>", "</s>", image=["a.png", "../a.png"]),
    _make_row("Hi", "", "x", first=1, id=3),
]

SEEDS: dict[str, list[bytes]] = {
    "annotations": [
        json.dumps(_ROWS).encode(),
        json.dumps(_ROWS, indent=1, ensure_ascii=False).encode("utf-8-sig"),
        b"[[], {}, 1e5, null, -0, NaN]",
        b'[{"conversations": [{"from": "human", "value": "\\ud83d\\ude00"}, {"from": "gpt", "value": "\\ud800"}]}]',
    ],
    "conversation": [
        *(_join(kind, f"{IMAGE_MARK}\nWhat?", "A cat.", "Sure?", "Yes") for kind in _KINDS),
        *(_join(kind, IMAGE_MARK * 2, "</s><|im_end|><|eot_id|>[/INST]") for kind in _KINDS),
        *(_join(kind, " th", "e") for kind in _KINDS),
        *(_join(kind, "", "", " USER: ", "\n\n", "e\u0301\u200d\U0001f917") for kind in _KINDS),
    ],
    "image": list(_image_seeds()),
    "image_path": [b"a.png", b"sub/../a.png", b"../secret", b"../images/a.png", b"/etc/passwd", b"~", b"..."],
    "scoring": [
        _join("Yes, it is.", "yes", "The answer is B.", "two dogs", "Don't"),
        _join("A", "a cat", "a-b - c", "1,000.", "(B)", "none"),
        _join("The answer is C.", "x", "y", "z", "w"),
    ],
    "benchmark": list(_benchmarks()),
    "hub": list(_hub_seeds()),
    "config": [
        _join("stage=pretrain,steps=3", "--config.optimizer.learning_rate=1e-3", "--config.seed=7"),
        _join("", "--config.stages.finetune.data.packing=false", "--config.run=('finetune',)"),
        _join("stage=finetune", "--config.model.fusion.taps=(3,2)", "--noconfig.data.packing", "--config.name=x"),
        _join("fusion=mlp", "--help"),
    ],
}
"""Valid and almost valid inputs of each target."""

FOUND: dict[str, list[bytes]] = {name: [] for name in SEEDS} | {
    "benchmark": [
        _join("mmbench", "index\tquestion\tA\tB\tanswer\timage\n1\tWhich?\ty\tx\ufffe\tA\tiVB"),
        _join("mmbench", f"index\tquestion\tA\tB\timage\n{'9' * 5000}\tWhich?\ty\tx\tiVB"),
        next(_benchmarks()).replace(b"Is it?", b"\\ud800"),
        next(_benchmarks()).replace(b'"Yes"', b'"\\uDFFF"'),
        next(_benchmarks()).replace(b'"Yes"', b"[" * 5000),
    ],
    "config": [
        *(_join("", f"--config.run={run}") for run in ("(1,)", "([1],)", "(None,)", "('finetune','finetune')")),
        *(_join("stage=finetune", f"--config.{key}") for key in ("optimizer.b1=nan", "data.mix=(1e999,)")),
    ],
}
"""Inputs that once broke a target."""

_CHAT_WORDS = (
    SEPARATOR,
    IMAGE_MARK,
    *_CONTROL,
    "<s>",
    "</s>",
    "<unk>",
    "[INST]",
    "USER:",
    " ASSISTANT: ",
    "\u2581",
    "\0",
)
WORDS: dict[str, tuple[str, ...]] = {
    "annotations": (
        *("[", "]", "{", "}", ",", '"id":', '"image":', '"conversations":', '"from":', '"value":', '"human"', '"gpt"'),
        *('"<image>"', "\\ud800", "\\udc00", "\\n", "\ufeff", "NaN", "-Infinity", "1e999", "null", "[" * 101),
    ),
    "conversation": (
        *(*_KINDS, *_CHAT_WORDS),
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
    "hub": (
        *(SEPARATOR, *_HUB_NAMES, "PAR1", "\0", "\x15", "\xff" * 4, "\x80" * 8, "[", "]", "{", "}", "null", "1.5"),
        *('"answers":', '"data":', '"questions":', '"\\ud800"', '"../0.png"', "[" * 101, "answer", "image", "bytes"),
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
"""Dictionary words for mutating each target's inputs."""

TARGETS: dict[str, Callable[[bytes], None]] = {
    "annotations": annotations,
    "conversation": conversation,
    "image": image,
    "image_path": image_path,
    "scoring": scoring,
    "benchmark": benchmark,
    "hub": hub,
    "config": config,
}
