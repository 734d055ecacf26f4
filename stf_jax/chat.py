"""Chat with a model: ``python -m stf_jax.chat --checkpoint=DIR --image=FILE --prompt=TEXT``, or ``--web``."""

import contextlib
import functools
import io
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import PIL.Image

from stf_jax.cli import Parser, add_model_arguments, path, require, run_command
from stf_jax.config import MeshConfig, UserError
from stf_jax.data.image import open_image_file
from stf_jax.data.records import IMAGE_MARK, Record, Turn
from stf_jax.files import to_path

if TYPE_CHECKING:
    from stf_jax.inference.decoding import Sampling
    from stf_jax.inference.generator import Generator

DESCRIPTION = """Ask a model about images: one question with --prompt, or a conversation without it.

In a conversation, every line is a question, and the model reads all previous turns. /image FILE adds an image to the
next question, /reset clears the conversation, /quit (or Ctrl-D) exits.

With --web the conversation is on a page, which only this machine can open and which offers other methods and budgets.
"""
_PORT = 7860
_HELP = "/image FILE adds an image to the next question, /reset clears the conversation, /quit exits."


def main(argv: list[str]) -> None:
    """Answers one prompt, or holds a conversation."""
    parser = Parser(prog="python -m stf_jax.chat", description=DESCRIPTION)
    parser.add_argument(
        "--checkpoint",
        type=path,
        required=True,
        help="workdir of a run, folder of imported weights, or export",
    )
    parser.add_argument(
        "--image", type=path, action="append", default=[], metavar="FILE", help="an image; may be repeated"
    )
    parser.add_argument("--prompt", help="one question; only its answer is printed")
    parser.add_argument("--web", action="store_true", help="serve a page to try the model, until Ctrl-C")
    parser.add_argument("--port", type=int, help=f"of --web; 0 means any that is free (default: {_PORT})")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="maximum tokens per answer (%(default)s)")
    add_model_arguments(parser)
    options = parser.parse_args(argv)
    if options.max_new_tokens < 1:
        raise UserError("--max-new-tokens must be at least 1.")
    if options.web and (options.image or options.prompt is not None):
        raise UserError("--web takes images and questions on its page: leave out --image and --prompt.")
    if options.web and options.tokens == "auto":
        raise UserError("--web has a menu of numbers of tokens: leave out --tokens=auto.")
    if options.port is not None and not options.web:
        raise UserError("--port has no effect without --web.")
    port = _PORT if options.port is None else options.port
    if not 0 <= port < 2**16:
        raise UserError(f"--port={port} must be 0 to {2**16 - 1:,}.")
    images = [open_image_file(file) for file in options.image]  # before the model, which takes longer to load
    require(options.checkpoint)
    # These take seconds to import, and checking the arguments does not need them.
    from stf_jax.inference.decoding import Sampling
    from stf_jax.inference.loading import load_generator
    from stf_jax.parallel.mesh import make_mesh

    mesh = make_mesh(MeshConfig(*options.mesh))
    generator, _ = load_generator(
        options.checkpoint,
        mesh,
        options.precision,
        options.reduce,
        options.keep,
        options.tokens,
        options.tolerance,
        allow_text_only=True,
    )
    sampling = Sampling(options.temperature, options.top_p, options.top_k, options.seed)
    if options.web:
        name = "/".join(os.path.abspath(options.checkpoint).split("/")[-2:])
        _serve(generator, name, options.max_new_tokens, sampling, port)
        return
    conversation = Conversation(
        functools.partial(_stream_answer, generator, options.max_new_tokens, sampling),
        accepts_images=generator.slots > 0,
    )
    for image in images:
        conversation.add_image(image)
    if options.prompt is not None:
        conversation.ask(options.prompt)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (lines can be edited and recalled)
    if isinstance(sys.stdin, io.TextIOWrapper):  # a line that is not UTF-8 is reported, then the next one is read
        sys.stdin.reconfigure(errors="surrogateescape")
    print(_HELP)
    while (line := _read_line()) is not None:
        _handle_line(conversation, line)


def _serve(generator: "Generator", name: str, max_new_tokens: int, sampling: "Sampling", port: int) -> None:
    from stf_jax.web.server import Server  # takes seconds to import

    with Server(generator, name, max_new_tokens, sampling, port) as server, contextlib.suppress(KeyboardInterrupt):
        print(f"open {server.url} (Ctrl-C ends it)", flush=True)
        server.serve_forever()


class Conversation:
    """The turns of a conversation so far.

    Attributes:
      turns: questions and answers in alternation.
      images: the images of all questions, in the order of their marks.
      pending_images: images for the next question.
    """

    def __init__(self, answer: Callable[[Record], str], *, accepts_images: bool = True):
        """``answer`` answers a record that ends with a question."""
        self._answer, self._accepts_images = answer, accepts_images
        self.pending_images: list[PIL.Image.Image] = []
        self.turns: list[Turn] = []
        self.images: list[PIL.Image.Image] = []

    def add_image(self, image: PIL.Image.Image) -> None:
        """Adds an image to the next question. Raises UserError if the model does not accept images."""
        if not self._accepts_images:
            from stf_jax.inference.generator import NO_VISION_MESSAGE  # takes seconds to import

            raise UserError(f"This image cannot be used: {NO_VISION_MESSAGE}")
        self.pending_images.append(image)

    def ask(self, text: str) -> str:
        """Answers a question and, once the answer is complete, adds both to the conversation.

        Raises UserError if the question cannot be answered; the conversation then stays unchanged.
        """
        try:
            text.encode()
        except UnicodeEncodeError:  # surrogates stand for bytes that Python could not decode
            raise UserError("The question is not UTF-8 text.") from None
        question = Turn("human", f"{IMAGE_MARK}\n" * len(self.pending_images) + text.replace(IMAGE_MARK, ""))
        turns, images = [*self.turns, question], [*self.images, *self.pending_images]
        answer = self._answer(Record("conversation", tuple(image.copy for image in images), tuple(turns)))
        self.turns, self.images, self.pending_images = [*turns, Turn("gpt", answer.replace(IMAGE_MARK, ""))], images, []
        return answer

    def reset(self) -> None:
        """Removes all turns and images."""
        self.turns, self.images, self.pending_images = [], [], []


def _handle_line(conversation: Conversation, line: str) -> None:
    """Handles one line of input. An error in it is printed, and the conversation continues."""
    command, _, argument = line.partition(" ")
    try:
        if command == "/image" and argument.strip():
            conversation.add_image(open_image_file(to_path(argument.strip())))
            print(f"({argument.strip()} is added to the next question)")
        elif command == "/reset":
            conversation.reset()
            print("(conversation cleared)")
        elif line.startswith("/"):
            print(_HELP)
        elif line:
            conversation.ask(line)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:  # the unfinished answer is dropped
        print("\n(interrupted)")


def _read_line() -> str | None:
    try:
        line = input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None
    return None if line == "/quit" else line


def _stream_answer(generator: "Generator", max_new_tokens: int, sampling: "Sampling", record: Record) -> str:
    def print_text(_: int, text: str) -> None:
        print(text, end="", flush=True)

    (answer,) = generator.generate([record], max_new_tokens, 1, sampling, on_text=print_text)
    print()
    return answer


if __name__ == "__main__":
    sys.exit(run_command(main))
