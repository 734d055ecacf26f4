"""The door that answers: one prompt, or a conversation that remembers; what is wrong is said in a sentence."""

import io
import pathlib
import re
import subprocess
import sys

import pytest
from etils import epath
from make_models import make, make_image, make_run

from stf_jax import chat
from stf_jax.config import FusionConfig
from stf_jax.data.conversation import encode, template_items
from stf_jax.data.records import BadRow, Record, Turn
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.inference import loading
from stf_jax.inference.decoding import Sampling
from stf_jax.inference.loading import load_generator
from stf_jax.runtime.cli import door
from stf_jax.weights.export_hf import export_hf

ROOT = pathlib.Path(__file__).parents[1]


class Echo:
    """In place of a generator: remembers what it was asked, and says the pieces that it is given, answer by answer."""

    def __init__(self, *answers):
        self._left, self.asked, self.how, self.slots = list(answers), [], [], 3

    def answers(self, records, limit, rows, sampling, told):
        (record,) = records
        self.asked.append(record)
        self.how.append((limit, rows, sampling))
        said = self._left.pop(0)
        if isinstance(said, BaseException):
            raise said
        for piece in said:
            told(0, piece)
        yield "".join(said)


@pytest.fixture
def talk(monkeypatch, capsys):
    """Holds a conversation with an Echo: (exit status, what was printed, what was complained of)."""

    def hold(echo, typed, *argv):
        monkeypatch.setattr(loading, "load_generator", lambda *_, **__: (echo, None))
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed.encode(errors="surrogateescape"))))
        status = door(chat.main, ["--checkpoint=.", *argv])
        return status, *capsys.readouterr()

    return hold


@pytest.fixture
def shown(tmp_path):
    """Files of two images, red and blue, and their names."""
    files = tmp_path / "red.png", tmp_path / "blue one.png"
    for file, size in zip(files, ((20, 30), (40, 10)), strict=True):
        make_image(1, size).save(file)
    return files


def replies(printed):
    """What was printed in a conversation, but for the greeting and the prompts."""
    greeting, *rest = printed.split("> ")
    assert greeting == chat._HELP + "\n"
    return rest


# ---- One prompt ------------------------------------------------------------------------------------------------------


def test_a_prompt_prints_its_answer_alone(talk, shown):
    echo = Echo(["It", " is", " a\ncircle", "."])
    files = [f"--image={file}" for file in shown]
    how = ["--max-new-tokens=7", "--temperature=0.5", "--top-p=0.9", "--top-k=3", "--seed=4"]
    assert talk(echo, "typed", "--prompt=What <image>is it?", *files, *how) == (0, "It is a\ncircle.\n", "")
    (record,) = echo.asked
    assert [turn.text for turn in record.turns] == ["<image>\n<image>\nWhat is it?"]
    assert [one().size for one in record.images] == [(30, 20), (10, 40)]
    assert echo.how == [(7, 1, Sampling(0.5, 0.9, 3, 4))]


def test_without_options_an_answer_is_the_likeliest_of_512_tokens(talk):
    echo = Echo([""])
    assert talk(echo, "", "--prompt=Hello") == (0, "\n", "")
    assert echo.how == [(512, 1, Sampling())]
    assert echo.asked == [Record("conversation", (), (Turn("human", "Hello"),))]


# ---- Conversations ---------------------------------------------------------------------------------------------------


def test_a_conversation_remembers(talk, shown):
    echo = Echo(["A ", "circle."], ["Blue."], ["No."])
    typed = f"What is it?\n/image {shown[1]}\n/image {shown[0]}\n\n  And this?  \nSure?\n"
    status, printed, complained = talk(echo, typed, f"--image={shown[0]}")
    assert (status, complained) == (0, "")
    notes = [f"({file} goes with the next question)\n" for file in (shown[1], shown[0])]
    assert replies(printed) == ["A circle.\n", *notes, "", "Blue.\n", "No.\n", "\n"]

    first, second, third = echo.asked
    assert [one().size for one in first.images] == [(30, 20)]
    assert [one().size for one in third.images] == [(30, 20), (10, 40), (30, 20)]
    assert second.turns == (*first.turns, Turn("gpt", "A circle."), Turn("human", "<image>\n<image>\nAnd this?"))
    assert third.turns == (*second.turns, Turn("gpt", "Blue."), Turn("human", "Sure?"))
    # As the model reads it, three slots per image.
    tokenizer = load_tokenizer("miniature")
    read = encode(template_items("v1", third), tokenizer, 3)
    assert read.is_image.sum() == 9
    text = tokenizer.decode(read.tokens[~read.is_image])
    assert text.endswith(
        "USER: \nWhat is it? ASSISTANT: A circle.</s>USER: \n\nAnd this? ASSISTANT: Blue.</s>USER: Sure? ASSISTANT:"
    )


def test_a_reset_forgets_words_and_images(talk, shown):
    echo = Echo(["Yes."], ["No."])
    typed = f"/image {shown[0]}\nIs it?\n/image {shown[1]}\n/reset\nAnd now?\n"
    status, printed, _ = talk(echo, typed)
    assert status == 0
    assert replies(printed)[3:] == ["(all is forgotten)\n", "No.\n", "\n"]
    assert echo.asked[1] == Record("conversation", (), (Turn("human", "And now?"),))


def test_an_interrupted_answer_is_forgotten(talk):
    echo = Echo(KeyboardInterrupt(), ["No."])
    status, printed, _ = talk(echo, "Is it?\nAnd now?\n")
    assert status == 0
    assert replies(printed) == ["\n(interrupted)\n", "No.\n", "\n"]
    assert [turn.text for turn in echo.asked[1].turns] == ["And now?"]


@pytest.mark.parametrize("end", ["", "\n/quit\nnever asked\n"])
def test_a_conversation_ends(talk, end):
    echo = Echo(["Hello."])
    status, printed, _ = talk(echo, "Hello?" + end)
    assert status == 0
    assert len(echo.asked) == 1
    assert printed.endswith("> " if end else "> \n")


@pytest.mark.parametrize("line", ["/help", "/image", "/image ", "/imagine a.png", "/tmp/a.png is what?"])
def test_what_is_no_command_is_explained(talk, line):
    echo = Echo()
    assert replies(talk(echo, line)[1]) == [chat._HELP + "\n", "\n"]
    assert echo.asked == []


def test_what_is_wrong_is_said_and_the_conversation_goes_on_as_it_was(talk, shown, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    echo = Echo(["One."], BadRow("roles", "This cannot be asked."), ["Three."])
    lost = [tmp_path / "lost.png", tmp_path, tmp_path / "text.png"]
    urls = ["https://example.org/a.jpg", "hf://owner/a.jpg", "data:image/png;base64," + "A" * 5000]
    typed = "".join(f"/image {file}\n" for file in (*lost, *urls, "a" * 300, "a\0b", shown[0])) + "First?\n"
    status, printed, complained = talk(echo, f"{typed}/image {shown[1]}\nSecond?\nTh\udcffird?\nThird?\n")
    assert status == 0
    paths = "paths are those of files and folders, or of buckets: gs://… and s3://…"
    assert complained.splitlines() == [
        f"error: Image {lost[0]} cannot be opened: No such file or directory.",
        f"error: Image {lost[1]} cannot be opened: it is no regular file.",
        f"error: Image {lost[2]} cannot be opened: no format of JPEG, PNG, GIF, WEBP, BMP, TIFF, PPM.",
        *(f"error: {url} is a URL; {paths}" for url in (*urls[:2], f"{urls[2][:100]}…")),
        f"error: '{'a' * 100}…' cannot be looked at: File name too long.",
        r"error: 'a\x00b' cannot be looked at: embedded null byte.",
        "error: This cannot be asked.",
        "error: The question is not UTF-8 text.",
    ]
    notes = [f"({file} goes with the next question)\n" for file in shown]
    assert replies(printed) == [*[""] * 8, notes[0], "One.\n", notes[1], "", "", "Three.\n", "\n"]
    # What could not be answered is no part of it, and its image goes with the next question.
    last = echo.asked[-1]
    assert [turn.text for turn in last.turns] == ["<image>\nFirst?", "One.", "<image>\nThird?"]
    assert [one().size for one in last.images] == [(30, 20), (10, 40)]


def test_marks_of_images_that_are_typed_or_said_are_no_images(talk):
    echo = Echo(["An <image>."], ["Yes."])
    assert replies(talk(echo, "<image>\nAnd <image>?\n")[1])[0] == "An <image>.\n"
    assert [turn.text for turn in echo.asked[1].turns] == ["", "An .", "And ?"]
    template_items("v1", echo.asked[1])


# ---- A real model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model as an import leaves it, in a run that began with it, and exported."""
    root = epath.Path(tmp_path_factory.mktemp("models"))
    start = make(root / "imported", FusionConfig("mbtf_stf"), "clip", "llama")
    run = make_run(root / "run", start, step=3)
    export_hf(run, root / "export")
    return {"imported": start, "run": run, "export": root / "export"}


def test_a_run_an_imported_folder_and_an_export_answer(models, shown, capsys, monkeypatch):
    options = ["--prompt=What is red?", f"--image={shown[0]}", "--max-new-tokens=12", "--precision=float32"]
    opened = []

    def load(*how, **more):
        opened.append(load_generator(*how, **more)[0])
        return opened[-1], None

    monkeypatch.setattr(loading, "load_generator", load)
    assert door(chat.main, [f"--checkpoint={models['run']}", *options]) == 0
    printed, complained = capsys.readouterr()
    # What is streamed is the answer, as it is without streaming.
    asked = Record("a", (make_image(1, (20, 30)).copy,), (Turn("human", "<image>\nWhat is red?"),))
    (answer,) = opened[0].answers([asked], 12, 1)
    assert len(answer) > 12
    assert printed == answer + "\n"
    assert "error" not in complained  # the kernels that were chosen may stand there
    assert door(chat.main, [f"--checkpoint={models['imported']}", *options]) == 0
    assert capsys.readouterr().out == printed
    # As a user has it, in a process of its own.
    command = [sys.executable, "-m", "stf_jax.chat", f"--checkpoint={models['export']}", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.decode()) == (0, printed), done.stderr.decode()


# ---- What cannot be used ---------------------------------------------------------------------------------------------


def test_what_cannot_be_used_ends_in_one_sentence(models, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no image")
    torn = io.BytesIO()
    make_image(1).save(torn, "PNG")
    (tmp_path / "torn.png").write_bytes(torn.getvalue()[:-2000])
    mute = epath.Path(tmp_path / "mute")
    make(mute, FusionConfig("stf"), "clip", "llama")
    (mute / "tokenizer" / "tokenizer.json").unlink()
    chatty = make(epath.Path(tmp_path / "chatty"), FusionConfig("stf"), "clip", "llama", template="chatml")
    good = f"--checkpoint={models['run']}"
    ask = "--prompt=What?"
    cases = [
        ([ask], "The following arguments are required: --checkpoint"),
        ([f"--checkpoint={tmp_path / 'nowhere'}", ask], f"{tmp_path / 'nowhere'} does not exist"),
        ([f"--checkpoint={tmp_path / 'text.png'}", ask], f"{tmp_path / 'text.png'} is neither the workdir of a run"),
        ([f"--checkpoint={mute}", ask], "No tokenizer can be read from"),
        ([f"--checkpoint={chatty}", ask], "'chatml' needs the token <|im_start|>"),
        ([good, ask, f"--image={tmp_path / 'lost.png'}"], "lost.png cannot be opened: No such file"),
        ([good, ask, f"--image={tmp_path}"], f"{tmp_path} cannot be opened: it is no regular file"),
        ([good, ask, f"--image={tmp_path / 'text.png'}"], "text.png cannot be opened: no format of"),
        ([good, ask, f"--image={tmp_path / 'torn.png'}"], "torn.png cannot be opened: "),
        ([good, ask, "--max-new-tokens=0"], "--max-new-tokens must be at least 1"),
        ([good, ask, "--mesh=1,3,1"], "mesh"),
        ([good, "--prompt=Wh\udcffat?"], "The question is not UTF-8 text."),
        ([good, ask, "--prmpt=What?"], "--prmpt"),
    ]
    for argv, says in cases:
        assert door(chat.main, argv) == 2, argv
        printed, complained = capsys.readouterr()
        assert printed == ""
        assert re.fullmatch(r"error: [^\n]+\n", complained), complained
        assert says in complained
