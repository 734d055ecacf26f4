"""LLaVA's files: read with all their faults, and trained on without the rows that are of no use."""

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

from stf_jax.config import UserError
from stf_jax.data.image import read_image
from stf_jax.data.llava import LlavaRecords, read_rows
from stf_jax.data.pipeline import Batches, load_training_records
from stf_jax.data.records import REASONS, BadRow, Record, Turn
from stf_jax.data.rows import read_row
from stf_jax.main import main
from stf_jax.runtime.cli import run_command

ROOT = pathlib.Path(__file__).parents[2]


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


def test_texts_come_as_they_are_written(folder):
    texts = ["naïve 🙂", 'quotes " and \\ and \n', "\u2028 \x00 </s>", "日本語", "<IMAGE>"]
    records = llava(folder, [{"id": text, "conversations": talk(text, text)} for text in texts])
    assert [[turn.text for turn in records[i].turns] for i in range(5)] == [[text, text] for text in texts]
    assert [records[i].id for i in range(5)] == texts


def test_a_link_in_the_folder_may_lead_elsewhere(folder):
    """As data sets on other disks are laid in LLaVA's folder."""
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    PIL.Image.new("RGB", (8, 9)).save(elsewhere / "three.png")
    (folder / "images" / "coco").symlink_to(elsewhere)
    records = llava(folder, [{"id": "a", "image": "coco/three.png", "conversations": talk()}])
    assert records[0].images[0]().size == (8, 9)


@pytest.mark.parametrize("path", ["../secret.png", "deep/../../secret.png", "/etc/hostname", "../images2/one.png"])
def test_a_path_that_leaves_the_folder_is_refused(folder, path):
    records = llava(folder, [{"id": "a", "image": path, "conversations": talk()}])
    with pytest.raises(BadRow, match=r"Image path '.*' leaves the folder .*images\.$") as error:
        records[0].images[0]()
    assert (error.value.reason, error.value.image) == ("outside", path)


def test_a_image_that_cannot_be_read_is_named(folder):
    images = folder / "images"
    whole = io.BytesIO()
    rng = np.random.default_rng(0)
    PIL.Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole, "PNG")
    (images / "cut.png").write_bytes(whole.getvalue()[:3000])
    (images / "cut.jpg").write_bytes((images / "deep" / "two.jpg").read_bytes()[:-60])
    (images / "text.jpg").write_text("no image")
    (images / "empty.jpg").touch()
    reasons = {"cut.png": "truncated", "cut.jpg": "truncated", "text.jpg": "corrupt", "empty.jpg": "corrupt"}
    reasons |= dict.fromkeys(["missing.jpg", "deep", "one.png/x"], "missing")
    records = llava(folder, [{"id": "a", "image": name, "conversations": talk()} for name in reasons])
    for index, (name, reason) in enumerate(reasons.items()):
        # The record is there; what is wrong with the image is found when it is opened.
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
    ({"id": "a"}, "no_turns", "has no list of turns under conversations or messages; its keys: id"),
    ({"id": "a", "conversations": None}, "no_turns", "has no list of turns"),
    ({"id": "a", "conversation": talk("Hi")}, "no_turns", "its keys: id, conversation"),
    ({"conversations": ["hello"]}, "no_turn", "turn 1 is a string, not an object"),
    ({"conversations": [{"from": "human"}]}, "no_turn", "turn 1 has no string under 'value' or 'content'"),
    ({"conversations": [{"value": "Hello"}]}, "no_turn", "turn 1 has no speaker under 'from' or 'role'"),
    ({"conversations": [{"from": "human", "value": None}]}, "no_turn", "turn 1 has no string"),
    ({"conversations": [{"from": "human", "value": 3}]}, "no_turn", "turn 1 has a number instead of a string"),
    (
        {"conversations": [*talk("Hi"), {"from": "tool", "value": "a"}]},
        "speaker",
        "turn 3 is by 'tool'; known speakers: human",
    ),
    ({"conversations": [*talk("Hi"), system()]}, "roles", "turn 3 is by 'system', but only the first turn may be"),
    ({"image": 3, "conversations": talk()}, "image_value", "has an image that is a number, neither a path nor a list"),
    ({"image": {"path": "a.png"}, "conversations": talk()}, "image_value", "has an image that is an object"),
    ({"image": [3], "conversations": talk()}, "image_value", "a list of images in which one is a number"),
    ({"image": ["one.png", None], "conversations": talk()}, "image_value", "in which one is null"),
    ({"image": "one.png", "images": ["b.png"], "conversations": talk()}, "unread", "both image and images, and they"),
    ({"system": "a", "conversations": [system(), *talk("Hi")]}, "unread", "two system texts, and they differ"),
    ({"system": ["a"], "conversations": talk("Hi")}, "unread", "has a system text that is a list"),
    ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "no_turn", "a part of type 'video'"),
    ({"conversations": [{"from": "human", "value": "a", "content": "b"}]}, "unread", "both value and content"),
    (["a", "b"], "no_object", "is a list, not an object"),
    ("a", "no_object", "is a string, not an object"),
    (None, "no_object", "is null, not an object"),
    (3, "no_object", "is a number, not an object"),
]


@pytest.mark.parametrize(("row", "reason", "clause"), NOT_ROWS, ids=repr)
def test_a_row_of_another_form_is_named_with_the_clause_that_failed(folder, row, reason, clause):
    records = llava(folder, [{"id": "a", "conversations": talk("Hello")}, row])
    assert records[0].id == "a"
    with pytest.raises(BadRow, match=rf"^Row 1 of .*rows\.json\b.*{re.escape(clause)}.*\.$") as error:
        records[1]
    assert error.value.reason == reason
    assert reason in REASONS


@pytest.mark.parametrize(
    ("talk", "reason"),
    [
        ([], "no_answer"),
        (talk()[:1], "no_answer"),
        ([system(), *talk()[:1]], "no_answer"),
        (talk(answer=""), "empty_answer"),
        (talk(answer=" \n"), "empty_answer"),
        (talk() + talk(answer="<image>"), "empty_answer"),
    ],
)
def test_a_row_without_an_answer_is_named(folder, talk, reason):
    with pytest.raises(BadRow, match=r"^Record 'a'( has no answer|: turn \d is an empty answer)\.$") as error:
        llava(folder, [{"id": "a", "image": "one.png", "conversations": talk}])[0]
    assert error.value.reason == reason


@pytest.mark.parametrize("nothing", [None, float("nan"), "", " ", [], [None], [""], {}], ids=repr)
@pytest.mark.parametrize("key", ["image", "images", "video", "system", "tools"])
def test_a_key_that_holds_nothing_says_nothing(folder, key, nothing):
    """As pandas and parquet write what a row does not have."""
    record = llava(folder, [{"id": "a", key: nothing, "conversations": talk("Hello")}])[0]
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
def test_a_row_with_content_under_a_key_that_is_not_read_is_not_trained_on(folder, extra):
    question = "<image>\nWhat?" if "image" in extra else "What?"
    with pytest.raises(BadRow, match=rf"^Row 0 of .* has '{list(extra)[-1]}', which is not read;") as error:
        llava(folder, [{"id": "a", "conversations": talk(question)} | extra])[0]
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
def test_content_beside_the_text_of_a_turn_is_named(folder, extra, clause):
    question, answer = talk("Hi")
    with pytest.raises(BadRow, match=re.escape(clause)):
        llava(folder, [{"id": "a", "conversations": [question, answer | extra]}])[0]
    harmless = answer | {"weight": 1, "markdown": None, "text": ""}
    assert llava(folder, [{"id": "a", "conversations": [question, harmless]}])[0].id == "a"


def test_other_keys_of_public_mixtures_are_passed_over_and_told(folder):
    """As ShareGPT's, LLaVA-Pretrain's, LLaVA-Med's and Interleave's rows have them."""
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
    rows = [{"id": "a", "image": "one.png", "conversations": talk()} | facts]
    rows += [{"id": "b", "model": "", "conversations": talk("Hello")}]
    rows += [{"id": "c", "conversations": [talk()[1], *talk("Hello")]}]
    records = llava(folder, rows)
    assert records[0].ignored_keys == tuple(facts)
    assert records[1].ignored_keys == ()
    assert records[2].ignored_keys == ("a first turn by gpt",)


def test_rows_in_the_words_of_others_are_the_same_rows(folder):
    ours = {"id": "a", "image": "one.png", "conversations": [system(), *talk()]}
    openai = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<image>\nWhat?"}]
    openai += [{"role": "assistant", "content": "A cat."}]
    url = {"type": "image_url", "image_url": {"url": "one.png"}}
    question = {"type": "text", "text": "\nWhat?"}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}
    rows = [
        ours,
        {"id": "a", "images": ["one.png"], "messages": openai},
        {"id": "a", "image": ["one.png"], "system": "Be brief.", "conversations": talk()},
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


def test_long_texts_of_users_are_cut_in_messages(folder):
    """An image in a data: URI is called one, and not printed."""
    long = "data:image/png;base64," + "A" * 1_000_000
    rows = [
        {"id": long, "image": long, "conversations": talk()},
        {"id": "a", "image": "b" * 1_000_000, "conversations": talk()},
        {"id": long, "conversations": talk(answer="")},
        {"id": "a", "conversations": [{"from": long, "value": "a"}]},
        {long: "a"},
        {"id": "a", long: "x.png", "conversations": talk("Hi")},
    ]
    records, said = llava(folder, rows), []
    for index in range(len(rows)):
        with pytest.raises(BadRow) as error:
            [image() for image in records[index].images]
        said.append(str(error.value))
    assert "is a data: URI, not a path: save it as a file" in said[0]
    assert all(len(sentence) < 600 for sentence in said), said


@pytest.mark.parametrize("linked", [False, True])
def test_an_absolute_path_within_the_folder_is_used(folder, linked):
    images = folder / "images"
    if linked:
        (folder / "link").symlink_to(images)
    records = LlavaRecords(
        str(written(folder, [{"image": f"{images}/deep/../one.png", "conversations": talk()}])),
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
def test_annotations_of_another_form_are_named(folder, content, sentence):
    with pytest.raises(UserError, match=sentence.replace("FILE", r"\S*/rows\.json")):
        llava(folder, content)


def test_a_file_is_read_however_its_rows_lie_in_it(folder, monkeypatch):
    """Cut into pieces at every place that there is: within numbers, words, escapes and characters too."""
    rows = [1.25e-3, -12, True, None, 'a\\"b ü 🙂', {"a": [{}, []], "b": "]}"}, [[[[" "]]]], 2**70, ["x" * 90]]
    text = json.dumps(rows, indent=1) + " \n"
    (folder / "rows.json").write_bytes(b"\xef\xbb\xbf" + text.replace("\\u00fc", "ü").encode())  # a byte order mark
    for size in (2, 3, 5, 7, 11, 64, 2**16):
        monkeypatch.setattr("stf_jax.data.llava._CHUNK", size)
        assert list(read_rows(epath.Path(folder / "rows.json"))) == rows


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n \n"])
def test_lines_of_json_are_read_where_an_array_is(folder, end):
    """Whatever the file is called, with a byte order mark, blank lines and what splitlines() would split at."""
    rows = [*ROWS, {"id": "u\u2028\x85", "conversations": talk("naïve 🙂")}]
    text = "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)
    for content in (text, "\n" + text, text.rstrip()):
        (folder / "rows.json").write_bytes(b"\xef\xbb\xbf" + content.encode())
        assert list(read_rows(epath.Path(folder / "rows.json"))) == rows
    records = LlavaRecords(str(folder / "rows.json"), str(folder / "images"))
    assert [records[index].id for index in (0, 5)] == ["a", "u\u2028\x85"]


def test_a_row_that_is_deep_but_not_absurd_is_read(folder):
    deep = json.loads("[" * 100 + "]" * 100)
    assert list(read_rows(epath.Path(written(folder, ["a", deep])))) == ["a", deep]


def test_a_row_that_does_not_end_is_given_up(folder, monkeypatch):
    """The rest of a large file is not read into memory for want of a quotation mark."""
    monkeypatch.setattr("stf_jax.data.llava._CHUNK", 16)
    monkeypatch.setattr("stf_jax.data.llava._MAX_ROW", 1000)
    with pytest.raises(UserError, match=r"^Row 1 of .*rows\.json is not JSON: Unterminated string"):
        llava(folder, '["a", "' + "b" * 2000 + '"]')
    assert len(llava(folder, '["a", "' + "b" * 400 + '"]')) == 2


HALF = rb"\ud83d"  # of a surrogate pair, as JSON escapes it


@pytest.mark.parametrize(
    ("place", "other"),
    [(b"cat", HALF), (b"cat", b"caf\xe9"), (b"Hello", HALF), (b"naught", HALF), (b"human", HALF), (b"one.png", HALF)],
)
def test_text_that_is_no_text_spoils_its_own_row_alone(folder, place, other):
    rows = [{"id": "naught", "image": "one.png", "conversations": talk("<image> Hello")}, ROWS[2]]
    file = written(folder, rows)
    file.write_bytes(file.read_bytes().replace(place, other, 1))
    records = LlavaRecords(str(file), str(folder / "images"))
    assert records[1].id == "c"
    with pytest.raises(BadRow, match=r"^Row 0 of .*rows\.json(: turn 1 is by .*| has bytes that .*)\.$") as error:
        records[0]
    assert error.value.reason == ("speaker" if place == b"human" else "no_text")


def test_ids_that_are_no_text(folder):
    """A number of over 64 bits; none, where the place of the row is its name."""
    records = llava(folder, [{"id": identity, "conversations": talk("Hello")} for identity in (2**80, None)])
    assert [records[0].id, records[1].id] == [str(2**80), f"row 1 of {folder}/rows.json"]


def test_a_pipe_in_the_folder_is_not_waited_for(folder):
    os.mkfifo(folder / "images" / "pipe.png")
    (folder / "images" / "link.png").symlink_to(folder / "images" / "pipe.png")
    records = llava(folder, [{"id": "a", "image": f"{name}.png", "conversations": talk()} for name in ("pipe", "link")])
    found = []

    def read():
        for index in range(2):
            try:
                records[index].images[0]()
            except BadRow as error:
                found.append((error.reason, str(error)))

    reader = threading.Thread(target=read, daemon=True)  # the test ends though it should hang
    reader.start()
    reader.join(timeout=10)
    assert [reason for reason, _ in found] == ["missing", "missing"]
    assert found[0][1].endswith("pipe.png cannot be opened: it is not a regular file.")


def test_annotations_that_are_no_text_are_named(folder):
    with pytest.raises(UserError, match=r"one\.png should be a JSON array with at least one row"):
        LlavaRecords(str(folder / "images" / "one.png"), str(folder / "images"))
    with pytest.raises(UserError, match=r"deep cannot be read: Is a directory\.$"):
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
        load_training_records(config)


# ---- Training without the bad rows -----------------------------------------------------------------------------------

GOOD, TEXT = 21, 7  # rows that can be used; those of them without an image
MODES = {
    "packed": {"data.packing": True, "data.images_per_row": 3},
    "grouped": {},
    "shuffled": {"data.group_by_modality_length": False},
}


def bad_rows(images):
    """One row of each fault, by what is wrong, and the files that they need; none of them can be trained on."""
    jpeg = io.BytesIO()
    PIL.Image.effect_noise((90, 60), 50).save(jpeg, "JPEG")
    (images / "cut.jpg").write_bytes(jpeg.getvalue()[:900])
    (images / "text.jpg").write_text("no image")
    (images / "empty.jpg").touch()
    PIL.Image.new("RGB", (9, 9)).save(images.parent / "outside.png")
    with_image = {
        "missing": ("nowhere.jpg", talk()),
        "truncated": ("cut.jpg", talk()),
        "corrupt": ("text.jpg", talk()),
        "empty file": ("empty.jpg", talk()),
        "outside": ("../outside.png", talk()),
        "one of two is missing": (["good-0.png", "nowhere.jpg"], talk("<image><image>\nSame?")),
        "image without mark": ("good-0.png", talk("What?")),
        "mark in answer": ("good-0.png", talk("What?", "This: <image> is.")),
        "roles": ("good-0.png", talk()[:1] + talk()),
        "speaker": ("good-0.png", [*talk(), {"from": "system", "value": "Stop."}]),
        "empty answer": ("good-0.png", talk(answer=" \n")),
    }
    rows = {what: {"id": what, "image": image, "conversations": c} for what, (image, c) in with_image.items()}
    text = {"mark without image": talk(), "no answer": talk("Hello")[:1], "no turns": [], "malformed": "Hello"}
    return rows | {what: {"id": what, "conversations": c} for what, c in text.items()}


@pytest.fixture
def faulty(tmp_path):
    """A folder of good rows, of different lengths and images, with bad ones among them; how many are bad."""
    images = tmp_path / "images"
    images.mkdir()
    rows = []
    for number in range(GOOD):
        answer = f"Number {number}." + " And so on." * (number % 4)
        row = {"id": f"good-{number}", "conversations": talk(answer=answer)}
        if number < GOOD - TEXT:
            PIL.Image.new("RGB", (40 + number, 30), (10 * number, 200, 90)).save(images / f"good-{number}.png")
            row["image"] = f"good-{number}.png"
        else:
            row["conversations"] = talk("What?", answer)
        rows.append(row)
    bad = list(bad_rows(images).values())
    mixed = [rows.pop(0)] + [row for pair in itertools.zip_longest(bad, rows) for row in pair if row is not None]
    (tmp_path / "rows.json").write_text(json.dumps(mixed))
    return tmp_path, len(bad)


def changes(folder, annotations="rows.json", images="images", **more):
    """To train on what lies in the folder; several names of files or folders are separated by commas."""
    paths = (",".join(str(folder / name) for name in names.split(",")) for names in (annotations, images))
    keys = ("data.annotations", "data.images")
    base = {"data.source": "llava", "data.max_length": 256, "data.images_per_row": 2, "global_batch_size": 4}
    return base | dict(zip(keys, paths, strict=True)) | {"mesh.data": 1} | more


def pipeline(folder, host=0, hosts=1, **more):
    config = tiny(**changes(folder, **more))
    return Batches(config, load_training_records(config), make_preprocessor(config), host=host, hosts=hosts)


def conversations(batch):
    """The tokens and images of each conversation of a batch, as bytes."""
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
def test_every_epoch_has_all_good_rows_once_and_counts_the_bad(faulty, mode, hosts):
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


def test_the_first_bad_rows_are_named_and_the_others_counted(faulty, caplog):
    folder, bad = faulty
    batches = pipeline(folder, **{"data.threads": 1})
    for _ in range(batches.plan.steps(3)):
        next(batches)
    assert batches.replaced == 3 * bad
    first, *named = caplog.messages
    unseen = bad - 6  # those whose image cannot be opened are found when they come up
    assert first.startswith(
        f"{unseen} of the {GOOD + bad} rows of {folder}/rows.json cannot be used (images not checked yet): "
    )
    assert "an answer without text (1)" in first
    assert len(named) == 10
    assert all("counted in rows_replaced" in message for message in named)
    assert [message.endswith("Further ones are only counted.") for message in named] == [False] * 9 + [True]


def test_rows_of_text_need_no_image_places_in_groups(faulty):
    batches = pipeline(faulty[0])
    taken = [next(batches) for _ in range(batches.plan.steps(1))]
    with_slots = [bool((batch.image_slots >= 0).any()) for batch in taken]
    assert [batch.images.shape[1] for batch in taken if not (batch.image_slots >= 0).any()].count(0) >= 1
    # Never are there fewer places than images; without an image in a batch, there are none.
    assert all(batch.images.shape[1] == 2 for batch, slots in zip(taken, with_slots, strict=True) if slots)
    planned = [batches.plan[4 * step].images for step in range(len(taken))]
    assert [batch.images.shape[1] for batch in taken] == planned


def test_a_run_leaves_bad_rows_out_and_says_how_many(faulty, tmp_path, capsys):
    """One epoch of it: both kinds of batches, with images and without, are trained on."""
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
    # Each count is that of the batches up to its line, not of what was read ahead.
    batches, consumed = pipeline(folder), []
    for _ in range(steps):
        next(batches)
        consumed.append(batches.replaced)
    assert counts == [consumed[line["step"] - 1] for line in lines]
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert f"{bad} unusable rows" in capsys.readouterr().out


def test_data_without_any_image_end_in_one_sentence(faulty, tmp_path, capsys):
    folder, _ = faulty
    rows = [row for row in json.loads((folder / "rows.json").read_text()) if "image" in row]
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "none").mkdir()
    options = [f"--config.{key}={value}" for key, value in changes(folder, images="none").items()]
    assert run_command(main, [f"--config={ROOT}/tests/tiny.py", f"--workdir={tmp_path / 'run'}", *options]) == 2
    spoken = capsys.readouterr().err.strip().splitlines()
    (sentence,) = [line for line in spoken if line.startswith("error: ")]
    assert f"sampled rows of {folder}/rows.json can be used" in sentence
    assert f"Image {folder}/none/good-0.png cannot be opened: No such file or directory" in sentence
    assert "Traceback" not in "".join(spoken)
    assert not (tmp_path / "run").exists()


# ---- Several data sets -----------------------------------------------------------------------------------------------


@pytest.fixture
def two(folder):
    """Two sets: of five rows, two of them with the same image names in another folder; and what they hold."""
    (folder / "rows.json").write_text(json.dumps(ROWS))
    (folder / "others").mkdir()
    PIL.Image.new("RGB", (7, 7), "blue").save(folder / "others" / "one.png")
    others = [{"id": f"z{i}", "image": "one.png", "conversations": talk(answer=f"Blue {i}.")} for i in range(3)]
    (folder / "others.json").write_text(json.dumps(others))
    return folder


@pytest.mark.parametrize(("images", "colour"), [("images,others", (0, 0, 255)), ("images", (255, 0, 0))])
def test_two_data_sets_stand_one_after_the_other(two, images, colour):
    """With a folder each, or one for both."""
    records = load_training_records(tiny(**changes(two, "rows.json,others.json", images)))
    assert records.sizes == [5, 3]
    assert [records[i].id for i in (0, 1, 2, 3, 5, 6, 7)] == ["a", "b", "c", "4", "z0", "z1", "z2"]
    assert records[0].images[0]().getpixel((0, 0)) == (255, 0, 0)
    assert records[6].images[0]().getpixel((0, 0)) == colour


@pytest.mark.parametrize("mode", MODES)
def test_two_data_sets_are_mixed_into_batches(two, mode):
    more = MODES[mode] | {"data.annotations": f"{two}/rows.json, {two}/others.json", "data.mix": (1.0, 2.0)}
    batches = pipeline(two, **more)
    found = [one for _ in range(batches.plan.steps(1)) for one in conversations(next(batches))]
    times = sorted(found.count(one) for one in set(found))
    # Rows 0 and 3 of the first set are alike; each of the second comes twice.
    assert times == [1, 1, 1, 2, 2, 2, 2]
    assert batches.replaced == 0


@pytest.mark.parametrize("wrong", [0, 1])
def test_each_data_set_is_looked_at(two, wrong):
    """One whose image folder is another's ends the run, though the other set is good."""
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
    assert batches.plan.steps(1) == 2  # six conversations, four a batch


@pytest.mark.parametrize("mode", MODES)
def test_a_row_with_more_images_than_a_row_has_places_is_left_out(folder, caplog, mode):
    (folder / "rows.json").write_text(json.dumps(ROWS))
    batches = pipeline(folder, **MODES[mode] | {"data.images_per_row": 1})
    found = [one for _ in range(batches.plan.steps(1)) for one in conversations(next(batches))]
    assert len(found) == 4
    assert batches.replaced == 1
    assert caplog.messages[0].endswith(
        "rows.json cannot be used (images not checked yet): more images than data.images_per_row (1)."
    )
    assert caplog.messages[1].startswith("Record 'b' has 2 images, more than data.images_per_row=1; raise it.")


def test_data_of_which_every_row_has_too_many_images_end_in_one_sentence(folder):
    (folder / "rows.json").write_text(json.dumps(ROWS[:2]))
    with pytest.raises(
        UserError,
        match=r"^None of the \d+ sampled rows of \S*/rows\.json .*Record 'a' has 1 images, more than data\.im",
    ):
        pipeline(folder, **{"data.images_per_row": 0})


def test_folders_that_do_not_match_the_annotations_are_refused(two):
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
