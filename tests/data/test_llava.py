"""Tests reading LLaVA's files with all their faults, and training without the unusable rows."""

import io
import itertools
import json
import os
import pathlib
import re
import threading

import numpy as np
import PIL.Image
import pytest
from etils import epath
from tiny import make_preprocessor, tiny

from stf_jax.cli import run_command
from stf_jax.config import UserError
from stf_jax.data.image import read_image
from stf_jax.data.pipeline import Batches, load_training_records
from stf_jax.data.records import REASONS, BadRow, Record, Turn
from stf_jax.data.rows import read_row
from stf_jax.data.sources.llava import LlavaRecords, read_rows
from stf_jax.main import main

ROOT = pathlib.Path(__file__).parents[2]


def make_turns(question="<image>\nWhat?", answer="A cat."):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


ROWS = [
    {"id": "a", "image": "one.png", "conversations": make_turns()},
    {"id": "b", "image": ["one.png", "deep/two.jpg"], "conversations": make_turns("<image><image>\nSame?")},
    {"id": "c", "model": "", "conversations": make_turns("Hello")},
    {"id": 4, "image": "deep/../one.png", "conversations": make_turns()},
    {"image": ["deep/two.jpg"], "conversations": make_turns()},
]


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "images"
    (images / "deep").mkdir(parents=True)
    PIL.Image.new("RGB", (30, 20), "red").save(images / "one.png")
    PIL.Image.new("L", (20, 40), 90).save(images / "deep" / "two.jpg")
    PIL.Image.new("RGB", (2, 2)).save(tmp_path / "secret.png")
    return tmp_path


def written(folder, rows):
    (folder / "rows.json").write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return folder / "rows.json"


def llava(folder, rows):
    return LlavaRecords(str(written(folder, rows)), str(folder / "images"))


# ---- Reading ---------------------------------------------------------------------------------------------------------


def test_llava_records(folder):
    records = llava(folder, ROWS)
    assert len(records) == 5
    read = [records[index] for index in range(5)]
    assert [record.id for record in read] == ["a", "b", "c", "4", f"row 4 of {folder}/rows.json"]
    assert [[image().size for image in record.images] for record in read] == [
        [(30, 20)],
        [(30, 20), (20, 40)],
        [],
        [(30, 20)],
        [(20, 40)],
    ]
    assert read[1].turns == (Turn("human", "<image><image>\nSame?"), Turn("gpt", "A cat."))
    assert read[0].images[0]().getpixel((0, 0)) == (255, 0, 0)


def test_texts_are_unchanged(folder):
    texts = ["naïve 🙂", 'quotes " and \\ and \n', "\u2028 \x00 </s>", "日本語", "<IMAGE>"]
    records = llava(folder, [{"id": text, "conversations": make_turns(text, text)} for text in texts])
    assert [[turn.text for turn in records[i].turns] for i in range(5)] == [[text, text] for text in texts]
    assert [records[i].id for i in range(5)] == texts


def test_links_in_the_folder_may_lead_out_of_it(folder):
    """Data sets on other disks are usually linked into LLaVA's folder."""
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    PIL.Image.new("RGB", (8, 9)).save(elsewhere / "three.png")
    (folder / "images" / "coco").symlink_to(elsewhere)
    records = llava(folder, [{"id": "a", "image": "coco/three.png", "conversations": make_turns()}])
    assert records[0].images[0]().size == (8, 9)


@pytest.mark.parametrize("path", ["../secret.png", "deep/../../secret.png", "/etc/hostname", "../images2/one.png"])
def test_a_path_that_leaves_the_folder_is_refused(folder, path):
    records = llava(folder, [{"id": "a", "image": path, "conversations": make_turns()}])
    with pytest.raises(BadRow, match=r"Image path '.*' leaves the folder .*images\.$") as error:
        records[0].images[0]()
    assert (error.value.reason, error.value.image) == ("outside", path)


def test_unreadable_images_are_reported(folder):
    images = folder / "images"
    complete = io.BytesIO()
    rng = np.random.default_rng(0)
    PIL.Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(complete, "PNG")
    (images / "cut.png").write_bytes(complete.getvalue()[:3000])
    (images / "cut.jpg").write_bytes((images / "deep" / "two.jpg").read_bytes()[:-60])
    (images / "text.jpg").write_text("no image")
    (images / "empty.jpg").touch()
    reasons = {"cut.png": "truncated", "cut.jpg": "truncated", "text.jpg": "corrupt", "empty.jpg": "corrupt"}
    reasons |= dict.fromkeys(["missing.jpg", "deep", "one.png/x"], "missing")
    records = llava(folder, [{"id": "a", "image": name, "conversations": make_turns()} for name in reasons])
    for index, (name, reason) in enumerate(reasons.items()):
        # The record can be read; the error is raised when the image is opened.
        record = records[index]
        assert isinstance(record, Record)
        with pytest.raises(BadRow, match=rf"^Image .*{name}.* cannot be opened: .+\.$") as error:
            record.images[0]()
        assert error.value.reason == reason
        assert error.value.image.endswith(name)


def system(text="Be brief."):
    return {"from": "system", "value": text}


PARTS = [{"type": "text", "text": "What?"}, {"type": "image"}]
NOT_ROWS = [
    ({"id": "a"}, "no_turns", "has no list of turns under conversations, messages or texts; its keys: id"),
    ({"id": "a", "conversations": None}, "no_turns", "has no list of turns"),
    ({"id": "a", "conversation": make_turns("Hi")}, "no_turns", "its keys: id, conversation"),
    ({"conversations": ["hello"]}, "no_turn", "turn 1 is a string, not an object"),
    ({"conversations": [{"from": "human"}]}, "no_turn", "turn 1 has no string under 'value' or 'content'"),
    ({"conversations": [{"value": "Hello"}]}, "no_turn", "turn 1 has no speaker under 'from' or 'role'"),
    ({"conversations": [{"from": "human", "value": None}]}, "no_turn", "turn 1 has no string"),
    ({"conversations": [{"from": "human", "value": 3}]}, "no_turn", "turn 1 has a number instead of a string"),
    (
        {"conversations": [*make_turns("Hi"), {"from": "tool", "value": "a"}]},
        "speaker",
        "turn 3 is by 'tool'; known speakers: human",
    ),
    (
        {"conversations": [*make_turns("Hi"), system()]},
        "roles",
        "turn 3 is by 'system', but only the first turn may be",
    ),
    (
        {"image": 3, "conversations": make_turns()},
        "image_value",
        "has an image that is a number, neither a path nor a list",
    ),
    ({"image": {"path": "a.png"}, "conversations": make_turns()}, "image_value", "has an image that is an object"),
    ({"image": [3], "conversations": make_turns()}, "image_value", "a list of images in which one is a number"),
    ({"image": ["one.png", None], "conversations": make_turns()}, "image_value", "in which one is null"),
    (
        {"image": "one.png", "images": ["b.png"], "conversations": make_turns()},
        "unread",
        "both image and images, and they",
    ),
    ({"system": "a", "conversations": [system(), *make_turns("Hi")]}, "unread", "two system texts, and they differ"),
    ({"system": ["a"], "conversations": make_turns("Hi")}, "unread", "has a system text that is a list"),
    ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "no_turn", "a part of type 'video'"),
    ({"conversations": [{"from": "human", "value": "a", "content": "b"}]}, "unread", "both value and content"),
    (["a", "b"], "no_object", "is a list, not an object"),
    ("a", "no_object", "is a string, not an object"),
    (None, "no_object", "is null, not an object"),
    (3, "no_object", "is a number, not an object"),
]


@pytest.mark.parametrize(("row", "reason", "clause"), NOT_ROWS, ids=repr)
def test_malformed_rows_are_reported(folder, row, reason, clause):
    records = llava(folder, [{"id": "a", "conversations": make_turns("Hello")}, row])
    assert records[0].id == "a"
    with pytest.raises(BadRow, match=rf"^Row 1 of .*rows\.json\b.*{re.escape(clause)}.*\.$") as error:
        records[1]
    assert error.value.reason == reason
    assert reason in REASONS


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([], "no_answer"),
        (make_turns()[:1], "no_answer"),
        ([system(), *make_turns()[:1]], "no_answer"),
        (make_turns(answer=""), "empty_answer"),
        (make_turns(answer=" \n"), "empty_answer"),
        (make_turns() + make_turns(answer="<image>"), "empty_answer"),
    ],
)
def test_rows_without_an_answer_are_reported(folder, turns, reason):
    with pytest.raises(BadRow, match=r"^Record 'a'( has no answer|: turn \d is an empty answer)\.$") as error:
        llava(folder, [{"id": "a", "image": "one.png", "conversations": turns}])[0]
    assert error.value.reason == reason


@pytest.mark.parametrize("nothing", [None, float("nan"), "", " ", [], [None], [""], {}], ids=repr)
@pytest.mark.parametrize("key", ["image", "images", "video", "system", "tools"])
def test_empty_values_are_ignored(folder, key, nothing):
    """pandas and parquet write such values for missing ones."""
    record = llava(folder, [{"id": "a", key: nothing, "conversations": make_turns("Hello")}])[0]
    assert (record.images, record.ignored_keys) == ((), ())
    assert [turn.speaker for turn in record.turns] == ["human", "gpt"]


@pytest.mark.parametrize(
    "extra",
    [
        {"video": "x.mp4"},
        {"videos": ["x.mp4"]},
        {"audio": {"path": "x.wav"}},
        {"image_path": "one.png"},
        {"imagePath": "one.png"},
        {"img": "one.png"},
        {"image_url": "http://example.org/a.png"},
        {"media": [{"type": "image", "file": "one"}]},
        {"file_name": "one.png"},
        {"input": "data:image/png;base64,iVBO"},
        {"tools": '[{"name": "search"}]'},
        {"image": "one.png", "image_2": "deep/two.jpg"},
        {"image": "one.png", "video": "x.mp4"},
        {"image": "one.png", "video_path": "x.mp4"},
    ],
    ids=repr,
)
def test_content_under_an_unknown_key_is_refused(folder, extra):
    question = "<image>\nWhat?" if "image" in extra else "What?"
    with pytest.raises(BadRow, match=rf"^Row 0 of .* has '{list(extra)[-1]}', which is not read;") as error:
        llava(folder, [{"id": "a", "conversations": make_turns(question)} | extra])[0]
    assert error.value.reason == "unread"


@pytest.mark.parametrize(
    ("extra", "clause"),
    [
        ({"weight": 0}, "turn 2 has weight=0, but every answer is trained on"),
        ({"train": False}, "turn 2 has train=False"),
        ({"images": ["one.png"]}, "turn 2 has 'images', which is not read"),
        ({"tool_calls": [{"name": "search"}]}, "turn 2 has 'tool_calls'"),
        ({"reasoning_content": "Well."}, "turn 2 has 'reasoning_content'"),
    ],
    ids=repr,
)
def test_content_under_an_unknown_key_of_a_turn_is_refused(folder, extra, clause):
    question, answer = make_turns("Hi")
    with pytest.raises(BadRow, match=re.escape(clause)):
        llava(folder, [{"id": "a", "conversations": [question, answer | extra]}])[0]
    harmless = answer | {"weight": 1, "markdown": None, "text": ""}
    assert llava(folder, [{"id": "a", "conversations": [question, harmless]}])[0].id == "a"


def test_other_keys_of_public_mixtures_are_ignored_and_listed(folder):
    """These are from rows of ShareGPT, LLaVA-Pretrain, LLaVA-Med and Interleave."""
    facts = {
        "model": "gpt-4",
        "source": "vqa",
        "url": "http://a.org/b.jpg",
        "blip_caption": "a cat",
        "data_source": "x",
    }
    facts |= {
        "domain": {"mri": True},
        "metadata": {"split": "train"},
        "choice_list": ["a"],
        "image_id": "7",
        "score": 3,
    }
    facts |= {"image_size": "9x9", "answer": "a", "image_source": "coco", "num_images": 1, "has_image": True}
    rows = [{"id": "a", "image": "one.png", "conversations": make_turns()} | facts]
    rows += [{"id": "b", "model": "", "conversations": make_turns("Hello")}]
    rows += [{"id": "c", "conversations": [make_turns()[1], *make_turns("Hello")]}]
    records = llava(folder, rows)
    assert records[0].ignored_keys == tuple(facts)
    assert records[1].ignored_keys == ()
    assert records[2].ignored_keys == ("a first turn by gpt",)


def test_other_formats_give_the_same_rows(folder):
    ours = {"id": "a", "image": "one.png", "conversations": [system(), *make_turns()]}
    openai = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<image>\nWhat?"}]
    openai += [{"role": "assistant", "content": "A cat."}]
    url = {"type": "image_url", "image_url": {"url": "one.png"}}
    question = {"type": "text", "text": "\nWhat?"}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}
    rows = [
        ours,
        {"id": "a", "images": ["one.png"], "messages": openai},
        {"id": "a", "image": ["one.png"], "system": "Be brief.", "conversations": make_turns()},
        {"id": "a", "image": "one.png", "conversations": [{"from": t["role"], "value": t["content"]} for t in openai]},
        {"id": "a", "messages": [openai[0], {"role": "User", "content": [url, question]}, answer]},
        {
            "id": "a",
            "image": "one.png",
            "messages": [openai[0], {"role": "user", "content": [PARTS[1], question]}, answer],
        },
    ]
    read = [read_row(row, "row") for row in rows]
    assert read == [read[0]] * len(rows)
    assert read[0].images == ("one.png",)
    assert [turn.text for turn in read[0].turns] == ["Be brief.", "<image>\nWhat?", "A cat."]


def test_long_texts_are_shortened_in_messages(folder):
    """A data: URI is identified as one, but not printed."""
    long = "data:image/png;base64," + "A" * 1_000_000
    rows = [
        {"id": long, "image": long, "conversations": make_turns()},
        {"id": "a", "image": "b" * 1_000_000, "conversations": make_turns()},
        {"id": long, "conversations": make_turns(answer="")},
        {"id": "a", "conversations": [{"from": long, "value": "a"}]},
        {long: "a"},
        {"id": "a", long: "x.png", "conversations": make_turns("Hi")},
    ]
    records, messages = llava(folder, rows), []
    for index in range(len(rows)):
        with pytest.raises(BadRow) as error:
            [image() for image in records[index].images]
        messages.append(str(error.value))
    assert "is a data: URI, not a path: save it as a file" in messages[0]
    assert all(len(message) < 600 for message in messages), messages


@pytest.mark.parametrize("linked", [False, True])
def test_absolute_paths_within_the_folder_are_accepted(folder, linked):
    images = folder / "images"
    if linked:
        (folder / "link").symlink_to(images)
    records = LlavaRecords(
        str(written(folder, [{"image": f"{images}/deep/../one.png", "conversations": make_turns()}])),
        str(folder / "link" if linked else images),
    )
    assert records[0].images[0]().size == (30, 20)
    for outside in (f"{images}/../secret.png", f"{images}2/one.png", str(images)):
        with pytest.raises(BadRow, match="leaves the folder"):
            read_image(epath.Path(images), outside)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[{", r"^Row 0 of FILE is not JSON: Expecting property name enclosed in double quotes\.$"),
        ("", r"^FILE should be a JSON array with at least one row, or have one row per line\.$"),
        ('{"id": 1}\n\n{"id": 2', r"^Line 3 of FILE is not JSON: Expecting ',' delimiter\. .* may be cut short\.$"),
        ('{"id": 1}\n{"id": 2,\n{"id": 3}', r"^Line 2 of FILE is not JSON: Expecting property name .* quotes\.$"),
        (
            '{"id": 1} {"id": 2}',
            r"^FILE should be a JSON array of rows, or have one row per line, but line 1 of FILE is not",
        ),
        (
            '\n{\n"id": 1}',
            r"^FILE should be a JSON array of rows, or have one row per line, but line 2 of FILE is not JSON",
        ),
        ('{"a": 1}\n{"a": ' + "[" * 101 + "]" * 101 + "}", r"^Line 2 of FILE cannot be read: it nests over 100"),
        ('[{"id": 1}, {"id": 2]', r"^Row 1 of FILE is not JSON: Expecting ',' delimiter\.$"),
        ('[{"id": 1} {"id": 2}]', r"^Row 0 of FILE is not JSON: Expecting ',' delimiter\.$"),
        ('[{"id": 1}, {"id": "2', r"^Row 1 of FILE is not JSON: Unterminated string"),
        ('[{"id": 1}, ]', r"^Row 1 of FILE is not JSON: Expecting value\.$"),
        ('[{"id": 1}]\n[', r"^FILE is not JSON: there is more text after its array, which ends with row 0\.$"),
        ('{"rows": []}\n\n', r"^FILE should be a JSON array of rows, or have one row per line, but is one object\.$"),
        (" [ ]\n", r"^FILE should be a JSON array with at least one row, or have one row per line\.$"),
        ("3", r"^FILE should be a JSON array with at least one row, or have one row per line\.$"),
        ('["a", ' + "[" * 1_000_000 + "]" * 1_000_000 + "]", r"^Row 1 of FILE cannot be read: it nests over 100"),
        ('["a", ' + "[" * 101 + "]" * 101 + "]", r"^Row 1 of FILE cannot be read: it nests over 100 levels deep"),
        ('["a", ' + '{"a": ' * 900 + "1" + "}" * 900 + "]", r"^Row 1 of FILE cannot be read: it nests over 100"),
        (
            '["a", ' + "1" * 5000 + "]",
            r"^Row 1 of FILE cannot be read: .* or has a number with thousands of digits; remove",
        ),
    ],
    ids=lambda value: value[:30],
)
def test_malformed_annotations_are_reported(folder, content, sentence):
    with pytest.raises(UserError, match=sentence.replace("FILE", r"\S*/rows\.json")):
        llava(folder, content)


def test_rows_may_cross_chunks(folder, monkeypatch):
    """Chunks end at all positions, also within numbers, words, escapes and characters."""
    rows = [1.25e-3, -12, True, None, 'a\\"b ü 🙂', {"a": [{}, []], "b": "]}"}, [[[[" "]]]], 2**70, ["x" * 90]]
    text = json.dumps(rows, indent=1) + " \n"
    (folder / "rows.json").write_bytes(b"\xef\xbb\xbf" + text.replace("\\u00fc", "ü").encode())  # a byte order mark
    for size in (2, 3, 5, 7, 11, 64, 2**16):
        monkeypatch.setattr("stf_jax.data.sources.llava._CHUNK", size)
        assert list(read_rows(epath.Path(folder / "rows.json"))) == rows


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n \n"])
def test_json_lines(folder, end):
    """With any file name, a byte order mark, blank lines, and characters at which splitlines() would split."""
    rows = [*ROWS, {"id": "u\u2028\x85", "conversations": make_turns("naïve 🙂")}]
    text = "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)
    for content in (text, "\n" + text, text.rstrip()):
        (folder / "rows.json").write_bytes(b"\xef\xbb\xbf" + content.encode())
        assert list(read_rows(epath.Path(folder / "rows.json"))) == rows
    records = LlavaRecords(str(folder / "rows.json"), str(folder / "images"))
    assert [records[index].id for index in (0, 5)] == ["a", "u\u2028\x85"]


def test_the_deepest_allowed_row(folder):
    deep = json.loads("[" * 100 + "]" * 100)
    assert list(read_rows(epath.Path(written(folder, ["a", deep])))) == ["a", deep]


def test_a_row_without_an_end_is_refused(folder, monkeypatch):
    """A missing quotation mark does not cause the rest of a large file to be loaded."""
    monkeypatch.setattr("stf_jax.data.sources.llava._CHUNK", 16)
    monkeypatch.setattr("stf_jax.data.sources.llava._MAX_ROW", 1000)
    with pytest.raises(UserError, match=r"^Row 1 of .*rows\.json is not JSON: Unterminated string"):
        llava(folder, '["a", "' + "b" * 2000 + '"]')
    assert len(llava(folder, '["a", "' + "b" * 400 + '"]')) == 2


HALF = rb"\ud83d"  # half a surrogate pair, escaped in JSON


@pytest.mark.parametrize(
    ("place", "other"),
    [(b"cat", HALF), (b"cat", b"caf\xe9"), (b"Hello", HALF), (b"naught", HALF), (b"human", HALF), (b"one.png", HALF)],
)
def test_invalid_utf8_affects_only_its_own_row(folder, place, other):
    rows = [{"id": "naught", "image": "one.png", "conversations": make_turns("<image> Hello")}, ROWS[2]]
    file = written(folder, rows)
    file.write_bytes(file.read_bytes().replace(place, other, 1))
    records = LlavaRecords(str(file), str(folder / "images"))
    assert records[1].id == "c"
    with pytest.raises(BadRow, match=r"^Row 0 of .*rows\.json(: turn 1 is by .*| has bytes that .*)\.$") as error:
        records[0]
    assert error.value.reason == ("speaker" if place == b"human" else "no_text")


def test_ids_that_are_not_strings(folder):
    """A number of over 64 bits, and null, for which the row's index is used."""
    records = llava(folder, [{"id": identity, "conversations": make_turns("Hello")} for identity in (2**80, None)])
    assert [records[0].id, records[1].id] == [str(2**80), f"row 1 of {folder}/rows.json"]


def test_named_pipes_do_not_block(folder):
    os.mkfifo(folder / "images" / "pipe.png")
    (folder / "images" / "link.png").symlink_to(folder / "images" / "pipe.png")
    records = llava(
        folder, [{"id": "a", "image": f"{name}.png", "conversations": make_turns()} for name in ("pipe", "link")]
    )
    found = []

    def read():
        for index in range(2):
            try:
                records[index].images[0]()
            except BadRow as error:
                found.append((error.reason, str(error)))

    reader = threading.Thread(target=read, daemon=True)  # so that the test ends even if it hangs
    reader.start()
    reader.join(timeout=10)
    assert [reason for reason, _ in found] == ["missing", "missing"]
    assert found[0][1].endswith("pipe.png cannot be opened: it is not a regular file.")


def test_annotations_that_are_not_text_are_reported(folder):
    with pytest.raises(UserError, match=r"one\.png should be a JSON array with at least one row"):
        LlavaRecords(str(folder / "images" / "one.png"), str(folder / "images"))
    with pytest.raises(UserError, match=r"deep cannot be read: Is a directory\.$"):
        LlavaRecords(str(folder / "images" / "deep"), str(folder / "images"))


@pytest.mark.parametrize("missing", ["annotations", "images"])
@pytest.mark.parametrize("path", ["", "nowhere/at/all"])
def test_missing_files_are_reported_with_their_keys(folder, missing, path):
    (folder / "rows.json").write_text(json.dumps(ROWS))
    paths = {"annotations": str(folder / "rows.json"), "images": str(folder / "images")} | {missing: path}
    with pytest.raises(UserError, match=rf"{missing} .*{path}.*--config\.data\.{missing}=PATH.*configs/demo\.py"):
        LlavaRecords(**paths)
    config = tiny(**{"data.source": "llava"} | {f"data.{name}": value for name, value in paths.items()})
    with pytest.raises(UserError, match=rf"--config\.data\.{missing}=PATH"):
        load_training_records(config)


# ---- Training without the bad rows -----------------------------------------------------------------------------------

GOOD, TEXT = 21, 7  # usable rows, and those of them without an image
MODES = {
    "packed": {"data.packing": True, "data.images_per_row": 3},
    "grouped": {},
    "shuffled": {"data.group_by_modality_length": False},
}


def bad_rows(images):
    """Returns one unusable row per fault, by the fault's name, and writes the files that they need."""
    jpeg = io.BytesIO()
    PIL.Image.effect_noise((90, 60), 50).save(jpeg, "JPEG")
    (images / "cut.jpg").write_bytes(jpeg.getvalue()[:900])
    (images / "text.jpg").write_text("no image")
    (images / "empty.jpg").touch()
    PIL.Image.new("RGB", (9, 9)).save(images.parent / "outside.png")
    with_image = {
        "missing": ("nowhere.jpg", make_turns()),
        "truncated": ("cut.jpg", make_turns()),
        "corrupt": ("text.jpg", make_turns()),
        "empty file": ("empty.jpg", make_turns()),
        "outside": ("../outside.png", make_turns()),
        "one of two is missing": (["good-0.png", "nowhere.jpg"], make_turns("<image><image>\nSame?")),
        "image without mark": ("good-0.png", make_turns("What?")),
        "mark in answer": ("good-0.png", make_turns("What?", "This: <image> is.")),
        "roles": ("good-0.png", make_turns()[:1] + make_turns()),
        "speaker": ("good-0.png", [*make_turns(), {"from": "system", "value": "Stop."}]),
        "empty answer": ("good-0.png", make_turns(answer=" \n")),
    }
    rows = {what: {"id": what, "image": image, "conversations": c} for what, (image, c) in with_image.items()}
    text = {
        "mark without image": make_turns(),
        "no answer": make_turns("Hello")[:1],
        "no turns": [],
        "malformed": "Hello",
    }
    return rows | {what: {"id": what, "conversations": c} for what, c in text.items()}


@pytest.fixture
def faulty(tmp_path):
    """A folder of good rows with different lengths and images and some bad ones, and the number of bad ones."""
    images = tmp_path / "images"
    images.mkdir()
    rows = []
    for number in range(GOOD):
        answer = f"Number {number}." + " And so on." * (number % 4)
        row = {"id": f"good-{number}", "conversations": make_turns(answer=answer)}
        if number < GOOD - TEXT:
            PIL.Image.new("RGB", (40 + number, 30), (10 * number, 200, 90)).save(images / f"good-{number}.png")
            row["image"] = f"good-{number}.png"
        else:
            row["conversations"] = make_turns("What?", answer)
        rows.append(row)
    bad = list(bad_rows(images).values())
    mixed = [rows.pop(0)] + [row for pair in itertools.zip_longest(bad, rows) for row in pair if row is not None]
    (tmp_path / "rows.json").write_text(json.dumps(mixed))
    return tmp_path, len(bad)


def changes(folder, annotations="rows.json", images="images", **more):
    """Returns config changes that train on the data in a folder; names are separated by commas."""
    paths = (",".join(str(folder / name) for name in names.split(",")) for names in (annotations, images))
    keys = ("data.annotations", "data.images")
    base = {"data.source": "llava", "data.max_length": 256, "data.images_per_row": 2, "global_batch_size": 4}
    return base | dict(zip(keys, paths, strict=True)) | {"mesh.data": 1} | more


_started = []


@pytest.fixture(autouse=True)
def _close_pipelines():
    """Ends the prefetching threads of a test's pipelines, which would log bad rows in the next test."""
    before = {*threading.enumerate()}
    yield
    while _started:
        _started.pop().close()
    for thread in {*threading.enumerate()} - before:
        thread.join(10)


def pipeline(folder, host=0, hosts=1, **more):
    config = tiny(**changes(folder, **more))
    _started.append(Batches(config, load_training_records(config), make_preprocessor(config), host=host, hosts=hosts))
    return _started[-1]


def conversations(batch):
    """Returns the tokens and images of each conversation of a batch, as bytes."""
    found = []
    for row, segments in enumerate(batch.segment_ids):
        images = [image.tobytes() for image in batch.images[row]]
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            count = (batch.image_slots[row][here] >= 0).sum() // 4
            mine, images = images[:count], images[count:]
            found.append((batch.tokens[row][here].tobytes(), b"".join(mine)))
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("hosts", [1, 2])
def test_epochs_have_all_good_rows_once_and_count_the_bad(faulty, mode, hosts):
    folder, bad = faulty
    shares = [pipeline(folder, host, hosts, **MODES[mode]) for host in range(hosts)]
    records = LlavaRecords(str(folder / "rows.json"), str(folder / "images"))
    prepare = make_preprocessor(tiny(**changes(folder, **MODES[mode])))
    good = []
    for index in range(len(records)):
        try:
            example = prepare(records[index])
        except BadRow:
            continue
        good.append((example.tokens.tobytes(), example.images.tobytes()))
    assert len(set(good)) == GOOD
    ends = [0, *(pipeline(folder, **MODES[mode]).plan.steps(epoch) for epoch in range(1, 4))]
    for epoch, (begin, end) in enumerate(itertools.pairwise(ends), start=1):
        found = []
        for _ in range(begin, end):
            batches = [next(share) for share in shares]
            assert len({batch.tokens.shape for batch in batches}) == 1
            assert len({batch.images.shape for batch in batches}) == 1
            found += [one for batch in batches for one in conversations(batch)]
        assert sorted(found) == sorted(good)
        assert sum(share.replaced for share in shares) == epoch * bad


def test_the_first_bad_rows_are_logged_and_the_others_counted(faulty, caplog):
    folder, bad = faulty
    batches = pipeline(folder, **{"data.threads": 1})
    for _ in range(batches.plan.steps(3)):
        next(batches)
    assert batches.replaced == 3 * bad
    first, *named = caplog.messages
    unseen = bad - 6  # the others have an image that cannot be opened, which is found when it is read
    assert first.startswith(
        f"{unseen} of the {GOOD + bad} rows of {folder}/rows.json cannot be used (images not checked yet): "
    )
    assert "an answer without text (1)" in first
    assert len(named) == 10
    assert all("counted in rows_replaced" in message for message in named)
    assert [message.endswith("Further ones are only counted.") for message in named] == [False] * 9 + [True]


def test_grouped_text_rows_need_no_image_places(faulty):
    batches = pipeline(faulty[0])
    taken = [next(batches) for _ in range(batches.plan.steps(1))]
    with_slots = [bool((batch.image_slots >= 0).any()) for batch in taken]
    assert [batch.images.shape[1] for batch in taken if not (batch.image_slots >= 0).any()].count(0) >= 1
    # There are never fewer places than images, and none if a batch has no images.
    assert all(batch.images.shape[1] == 2 for batch, slots in zip(taken, with_slots, strict=True) if slots)
    planned = [batches.plan[4 * step].images for step in range(len(taken))]
    assert [batch.images.shape[1] for batch in taken] == planned


def test_a_run_leaves_out_bad_rows_and_reports_their_number(faulty, tmp_path, capsys):
    """One epoch has batches with and without images."""
    folder, bad = faulty
    workdir = tmp_path / "run"
    arguments = {"steps": 0, "epochs": 1.0, "log_every_steps": 2} | changes(folder)
    options = [f"--config.{key}={value}" for key, value in arguments.items()]
    assert run_command(main, [f"--config={ROOT}/tests/tiny.py", f"--workdir={workdir}", *options]) == 0
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = -(-(GOOD + bad) // 4)
    assert lines[-1]["step"] == steps
    counts = [line["rows_replaced"] for line in lines]
    assert counts == sorted(counts)
    assert counts[-1] == bad
    # Each count is that of the batches up to its line, without prefetched ones.
    batches, consumed = pipeline(folder), []
    for _ in range(steps):
        next(batches)
        consumed.append(batches.replaced)
    assert counts == [consumed[line["step"] - 1] for line in lines]
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert f"{bad} unusable rows" in capsys.readouterr().out


def test_data_without_a_usable_image_are_refused(faulty, tmp_path, capsys):
    folder, _ = faulty
    rows = [row for row in json.loads((folder / "rows.json").read_text()) if "image" in row]
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "none").mkdir()
    options = [f"--config.{key}={value}" for key, value in changes(folder, images="none").items()]
    assert run_command(main, [f"--config={ROOT}/tests/tiny.py", f"--workdir={tmp_path / 'run'}", *options]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    (sentence,) = [line for line in lines if line.startswith("error: ")]
    assert f"None of the 25 sampled rows of {folder}/rows.json can be used" in sentence
    assert f"Image {folder}/none/good-0.png cannot be opened: No such file or directory" in sentence
    assert "Traceback" not in "".join(lines)
    assert not (tmp_path / "run").exists()


# ---- Several data sets -----------------------------------------------------------------------------------------------


@pytest.fixture
def two(folder):
    """A folder with two data sets that use the same image names in different folders."""
    (folder / "rows.json").write_text(json.dumps(ROWS))
    (folder / "others").mkdir()
    PIL.Image.new("RGB", (7, 7), "blue").save(folder / "others" / "one.png")
    others = [{"id": f"z{i}", "image": "one.png", "conversations": make_turns(answer=f"Blue {i}.")} for i in range(3)]
    (folder / "others.json").write_text(json.dumps(others))
    return folder


@pytest.mark.parametrize(("images", "color"), [("images,others", (0, 0, 255)), ("images", (255, 0, 0))])
def test_two_data_sets_are_concatenated(two, images, color):
    """With one folder for each, or one for both."""
    records = load_training_records(tiny(**changes(two, "rows.json,others.json", images)))
    assert records.sizes == [5, 3]
    assert [records[i].id for i in (0, 1, 2, 3, 5, 6, 7)] == ["a", "b", "c", "4", "z0", "z1", "z2"]
    assert records[0].images[0]().getpixel((0, 0)) == (255, 0, 0)
    assert records[6].images[0]().getpixel((0, 0)) == color


@pytest.mark.parametrize("mode", MODES)
def test_two_data_sets_are_mixed_into_batches(two, mode):
    more = MODES[mode] | {"data.annotations": f"{two}/rows.json, {two}/others.json", "data.mix": (1.0, 2.0)}
    batches = pipeline(two, **more)
    found = [one for _ in range(batches.plan.steps(1)) for one in conversations(next(batches))]
    times = sorted(found.count(one) for one in set(found))
    # Rows 0 and 3 of the first set are equal; each row of the second occurs twice.
    assert times == [1, 1, 1, 2, 2, 2, 2]
    assert batches.replaced == 0


@pytest.mark.parametrize("wrong", [0, 1])
def test_each_data_set_is_checked(two, wrong):
    """A set with the wrong image folder ends the run, even if the other set is good."""
    rows = [row for row in ROWS if "image" in row and row["image"] != ["deep/two.jpg"]]
    (two / "rows.json").write_text(json.dumps(rows))
    (two / "empty").mkdir()
    folders = ["images", "others"]
    folders[wrong] = "empty"
    name = ("rows.json", "others.json")[wrong]
    with pytest.raises(
        UserError,
        match=rf"^None of the \d+ sampled rows of \S*/{name} can be used.* Image \S*/empty/one\.png cannot be",
    ):
        pipeline(two, **changes(two, "rows.json,others.json", ",".join(folders)))
    batches = pipeline(two, **changes(two, "rows.json,others.json", "images,others"))
    assert batches.plan.steps(1) == 2  # six conversations, four per batch


@pytest.mark.parametrize("mode", MODES)
def test_rows_with_too_many_images_are_left_out(folder, caplog, mode):
    (folder / "rows.json").write_text(json.dumps(ROWS))
    batches = pipeline(folder, **MODES[mode] | {"data.images_per_row": 1})
    found = [one for _ in range(batches.plan.steps(1)) for one in conversations(next(batches))]
    assert len(found) == 4
    assert batches.replaced == 1
    assert caplog.messages[0].endswith(
        "rows.json cannot be used (images not checked yet): more images than data.images_per_row (1)."
    )
    assert caplog.messages[1].startswith("Record 'b' has 2 images, more than data.images_per_row=1; raise it.")


def test_data_with_only_too_many_images_are_refused(folder):
    (folder / "rows.json").write_text(json.dumps(ROWS[:2]))
    with pytest.raises(
        UserError,
        match=r"^None of the \d+ sampled rows of \S*/rows\.json .*Record 'a' has 1 images, more than data\.im",
    ):
        pipeline(folder, **{"data.images_per_row": 0})


def test_the_number_of_folders_must_match_the_annotations(two):
    with pytest.raises(
        UserError, match=r"data\.images has 2 folders for 1 annotation files; give one for all, or one for each"
    ):
        load_training_records(tiny(**changes(two, "rows.json", "images,others")))
    with pytest.raises(UserError, match=r"data\.images has 2 folders for 3 annotation files"):
        load_training_records(tiny(**changes(two, "rows.json,others.json,rows.json", "images,others")))
    with pytest.raises(UserError, match=r"annotations .* missing: '.*absent\.json' does not exist"):
        load_training_records(tiny(**changes(two, "rows.json,absent.json")))


def test_llava_records_become_batches(folder):
    (folder / "rows.json").write_text(json.dumps(ROWS))
    batch = next(pipeline(folder, **{"data.aspect": "pad", "global_batch_size": 5}))
    assert sorted((batch.image_slots >= 0).sum(axis=1) // 4) == [0, 1, 1, 1, 2]
    assert batch.loss_mask.any(axis=1).all()
