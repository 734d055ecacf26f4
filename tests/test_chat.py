"""The chat command: single prompts, conversations, and error messages."""

import io
import pathlib
import re
import subprocess
import sys

import pytest
from etils import epath
from make_models import make, make_image, make_run

from stf_jax import chat
from stf_jax.cli import run_command
from stf_jax.config import FusionConfig
from stf_jax.data.conversation import encode, template_items
from stf_jax.data.records import BadRow, Record, Turn
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.inference import loading
from stf_jax.inference.decoding import Sampling
from stf_jax.inference.loading import load_generator
from stf_jax.weights.export_hf import export_hf

ROOT = pathlib.Path(__file__).parents[1]


class FakeGenerator:
    """A generator that records its requests and streams given answers, each a list of pieces or an exception."""

    def __init__(self, *answers):
        self._answers, self.records, self.settings, self.slots = list(answers), [], [], 3

    def generate(self, records, limit, rows, sampling, on_text):
        (record,) = records
        self.records.append(record)
        self.settings.append((limit, rows, sampling))
        pieces = self._answers.pop(0)
        if isinstance(pieces, BaseException):
            raise pieces
        for piece in pieces:
            on_text(0, piece)
        yield "".join(pieces)


@pytest.fixture
def run_chat(monkeypatch, capsys):
    """Runs the command with a fake generator and typed lines; returns (exit status, stdout, stderr)."""

    def run(generator, typed, *argv):
        monkeypatch.setattr(loading, "load_generator", lambda *_, **__: (generator, None))
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed.encode(errors="surrogateescape"))))
        status = run_command(chat.main, ["--checkpoint=.", *argv])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def image_files(tmp_path):
    """Two image files, of 20x30 and 40x10 pixels."""
    files = tmp_path / "red.png", tmp_path / "blue one.png"
    for file, size in zip(files, ((20, 30), (40, 10)), strict=True):
        make_image(1, size).save(file)
    return files


def split_replies(printed):
    """The output after each prompt of a conversation, without the greeting."""
    greeting, *replies = printed.split("> ")
    assert greeting == chat._HELP + "\n"
    return replies


# ---- One prompt ------------------------------------------------------------------------------------------------------


def test_a_prompt_prints_only_its_answer(run_chat, image_files):
    generator = FakeGenerator(["It", " is", " a\ncircle", "."])
    files = [f"--image={file}" for file in image_files]
    options = ["--max-new-tokens=7", "--temperature=0.5", "--top-p=0.9", "--top-k=3", "--seed=4"]
    assert run_chat(generator, "typed", "--prompt=What <image>is it?", *files, *options) == (
        0,
        "It is a\ncircle.\n",
        "",
    )
    (record,) = generator.records
    assert [turn.text for turn in record.turns] == ["<image>\n<image>\nWhat is it?"]
    assert [one().size for one in record.images] == [(30, 20), (10, 40)]
    assert generator.settings == [(7, 1, Sampling(0.5, 0.9, 3, 4))]


def test_by_default_answers_are_greedy_with_up_to_512_tokens(run_chat):
    generator = FakeGenerator([""])
    assert run_chat(generator, "", "--prompt=Hello") == (0, "\n", "")
    assert generator.settings == [(512, 1, Sampling())]
    assert generator.records == [Record("conversation", (), (Turn("human", "Hello"),))]


# ---- Conversations ---------------------------------------------------------------------------------------------------


def test_a_conversation_includes_previous_turns(run_chat, image_files):
    generator = FakeGenerator(["A ", "circle."], ["Blue."], ["No."])
    typed = f"What is it?\n/image {image_files[1]}\n/image {image_files[0]}\n\n  And this?  \nSure?\n"
    status, printed, stderr = run_chat(generator, typed, f"--image={image_files[0]}")
    assert (status, stderr) == (0, "")
    notes = [f"({file} is added to the next question)\n" for file in (image_files[1], image_files[0])]
    assert split_replies(printed) == ["A circle.\n", *notes, "", "Blue.\n", "No.\n", "\n"]

    first, second, third = generator.records
    assert [one().size for one in first.images] == [(30, 20)]
    assert [one().size for one in third.images] == [(30, 20), (10, 40), (30, 20)]
    assert second.turns == (*first.turns, Turn("gpt", "A circle."), Turn("human", "<image>\n<image>\nAnd this?"))
    assert third.turns == (*second.turns, Turn("gpt", "Blue."), Turn("human", "Sure?"))
    # As encoded for the model, with three slots per image.
    tokenizer = load_tokenizer("miniature")
    encoded = encode(template_items("v1", third), tokenizer, 3)
    assert encoded.is_image.sum() == 9
    text = tokenizer.decode(encoded.tokens[~encoded.is_image])
    assert text.endswith(
        "USER: \nWhat is it? ASSISTANT: A circle.</s>USER: \n\nAnd this? ASSISTANT: Blue.</s>USER: Sure? ASSISTANT:"
    )


def test_a_reset_clears_turns_and_images(run_chat, image_files):
    generator = FakeGenerator(["Yes."], ["No."])
    typed = f"/image {image_files[0]}\nIs it?\n/image {image_files[1]}\n/reset\nAnd now?\n"
    status, printed, _ = run_chat(generator, typed)
    assert status == 0
    assert split_replies(printed)[3:] == ["(conversation cleared)\n", "No.\n", "\n"]
    assert generator.records[1] == Record("conversation", (), (Turn("human", "And now?"),))


def test_an_interrupted_answer_is_dropped(run_chat):
    generator = FakeGenerator(KeyboardInterrupt(), ["No."])
    status, printed, _ = run_chat(generator, "Is it?\nAnd now?\n")
    assert status == 0
    assert split_replies(printed) == ["\n(interrupted)\n", "No.\n", "\n"]
    assert [turn.text for turn in generator.records[1].turns] == ["And now?"]


@pytest.mark.parametrize("end", ["", "\n/quit\nnot asked\n"])
def test_quit_and_end_of_input_end_a_conversation(run_chat, end):
    generator = FakeGenerator(["Hello."])
    status, printed, _ = run_chat(generator, "Hello?" + end)
    assert status == 0
    assert len(generator.records) == 1
    assert printed.endswith("> " if end else "> \n")


@pytest.mark.parametrize("line", ["/help", "/image", "/image ", "/imagine a.png", "/tmp/a.png is what?"])
def test_unknown_commands_print_the_help(run_chat, line):
    generator = FakeGenerator()
    assert split_replies(run_chat(generator, line)[1]) == [chat._HELP + "\n", "\n"]
    assert generator.records == []


def test_errors_are_printed_and_leave_the_conversation_unchanged(run_chat, image_files, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    generator = FakeGenerator(["One."], BadRow("roles", "This cannot be asked."), ["Three."])
    unreadable = [tmp_path / "lost.png", tmp_path, tmp_path / "text.png"]
    urls = ["https://example.org/a.jpg", "hf://owner/a.jpg", "data:image/png;base64," + "A" * 5000]
    typed = "".join(f"/image {file}\n" for file in (*unreadable, *urls, "a" * 300, "a\0b", image_files[0])) + "First?\n"
    status, printed, stderr = run_chat(generator, f"{typed}/image {image_files[1]}\nSecond?\nTh\udcffird?\nThird?\n")
    assert status == 0
    paths = "give a local path, or one in a bucket: gs://… or s3://…"
    assert stderr.splitlines() == [
        f"error: Image {unreadable[0]} cannot be opened: No such file or directory.",
        f"error: Image {unreadable[1]} cannot be opened: it is not a regular file.",
        f"error: Image {unreadable[2]} cannot be opened: its format is none of JPEG, PNG, GIF, WEBP, BMP, TIFF, PPM.",
        *(f"error: {url} is a URL; {paths}" for url in (*urls[:2], f"{urls[2][:100]}…")),
        f"error: '{'a' * 100}…' cannot be accessed: File name too long.",
        r"error: 'a\x00b' cannot be accessed: embedded null byte.",
        "error: This cannot be asked.",
        "error: The question is not UTF-8 text.",
    ]
    notes = [f"({file} is added to the next question)\n" for file in image_files]
    assert split_replies(printed) == [*[""] * 8, notes[0], "One.\n", notes[1], "", "", "Three.\n", "\n"]
    # A question that failed is not part of the conversation; its image is added to the next question.
    last = generator.records[-1]
    assert [turn.text for turn in last.turns] == ["<image>\nFirst?", "One.", "<image>\nThird?"]
    assert [one().size for one in last.images] == [(30, 20), (10, 40)]


def test_image_marks_in_questions_and_answers_are_removed(run_chat):
    generator = FakeGenerator(["An <image>."], ["Yes."])
    assert split_replies(run_chat(generator, "<image>\nAnd <image>?\n")[1])[0] == "An <image>.\n"
    assert [turn.text for turn in generator.records[1].turns] == ["", "An .", "And ?"]
    template_items("v1", generator.records[1])


# ---- A real model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """An imported model, a run that started from it, and its export."""
    root = epath.Path(tmp_path_factory.mktemp("models"))
    imported = make(root / "imported", FusionConfig("mbtf_stf"), "clip", "llama")
    run = make_run(root / "run", imported, step=3)
    export_hf(run, root / "export")
    return {"imported": imported, "run": run, "export": root / "export"}


def test_a_run_an_imported_folder_and_an_export_answer(models, image_files, capsys, monkeypatch):
    options = ["--prompt=What is red?", f"--image={image_files[0]}", "--max-new-tokens=12", "--precision=float32"]
    generators = []

    def load(*arguments, **options):
        generators.append(load_generator(*arguments, **options)[0])
        return generators[-1], None

    monkeypatch.setattr(loading, "load_generator", load)
    assert run_command(chat.main, [f"--checkpoint={models['run']}", *options]) == 0
    printed, stderr = capsys.readouterr()
    # The streamed answer equals the answer without streaming.
    record = Record("a", (make_image(1, (20, 30)).copy,), (Turn("human", "<image>\nWhat is red?"),))
    (answer,) = generators[0].generate([record], 12, 1)
    assert len(answer) > 12
    assert printed == answer + "\n"
    assert "error" not in stderr  # chosen kernels may be logged
    assert run_command(chat.main, [f"--checkpoint={models['imported']}", *options]) == 0
    assert capsys.readouterr().out == printed
    # As a user runs it, in a separate process.
    command = [sys.executable, "-m", "stf_jax.chat", f"--checkpoint={models['export']}", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.decode()) == (0, printed), done.stderr.decode()


# ---- Invalid input ---------------------------------------------------------------------------------------------------


def test_invalid_input_is_reported_in_one_sentence(models, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no image")
    truncated = io.BytesIO()
    make_image(1).save(truncated, "PNG")
    (tmp_path / "truncated.png").write_bytes(truncated.getvalue()[:-2000])
    without_tokenizer = epath.Path(tmp_path / "without_tokenizer")
    make(without_tokenizer, FusionConfig("stf"), "clip", "llama")
    (without_tokenizer / "tokenizer" / "tokenizer.json").unlink()
    chatml = make(epath.Path(tmp_path / "chatml"), FusionConfig("stf"), "clip", "llama", template="chatml")
    good = f"--checkpoint={models['run']}"
    ask = "--prompt=What?"
    cases = [
        ([ask], "The following arguments are required: --checkpoint"),
        ([f"--checkpoint={tmp_path / 'nowhere'}", ask], f"{tmp_path / 'nowhere'} does not exist"),
        ([f"--checkpoint={tmp_path / 'text.png'}", ask], f"{tmp_path / 'text.png'} is neither the workdir of a run"),
        ([f"--checkpoint={without_tokenizer}", ask], "No tokenizer can be read from"),
        ([f"--checkpoint={chatml}", ask], "'chatml' needs the token <|im_start|>"),
        ([good, ask, f"--image={tmp_path / 'lost.png'}"], "lost.png cannot be opened: No such file"),
        ([good, ask, f"--image={tmp_path}"], f"{tmp_path} cannot be opened: it is not a regular file"),
        ([good, ask, f"--image={tmp_path / 'text.png'}"], "text.png cannot be opened: its format is none of"),
        ([good, ask, f"--image={tmp_path / 'truncated.png'}"], "truncated.png cannot be opened: "),
        ([good, ask, "--max-new-tokens=0"], "--max-new-tokens must be at least 1"),
        ([good, ask, "--mesh=1,3,1"], "mesh"),
        ([good, "--prompt=Wh\udcffat?"], "The question is not UTF-8 text."),
        ([good, ask, "--prmpt=What?"], "--prmpt"),
    ]
    for argv, message in cases:
        assert run_command(chat.main, argv) == 2, argv
        printed, stderr = capsys.readouterr()
        assert printed == ""
        assert re.fullmatch(r"error: [^\n]+\n", stderr), stderr
        assert message in stderr
