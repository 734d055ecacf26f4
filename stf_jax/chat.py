"""Try: ``python -m stf_jax.chat --checkpoint=DIR --image=FILE --prompt=TEXT``."""

import contextlib
import functools
import sys
from collections.abc import Callable

import PIL.Image

from stf_jax.config import MeshConfig, UserError
from stf_jax.data.image import open_file
from stf_jax.data.records import IMAGE_MARK, Record, Turn
from stf_jax.runtime.cli import Parser, add_model_arguments, door, path, require
from stf_jax.runtime.files import to_path

DESCRIPTION = """Ask a model about images: one question with --prompt, without it a conversation.

In a conversation, a line is a question; the model sees all that was said before. /image FILE shows an image with the
next question, /reset begins anew, /quit (or Ctrl-D) ends.
"""
_HELP = "/image FILE shows an image with the next question, /reset begins anew, /quit ends."


def main(argv: list[str]) -> None:
    """Answers one prompt, or line after line."""
    parser = Parser(prog="python -m stf_jax.chat", description=DESCRIPTION)
    parser.add_argument(
        "--checkpoint",
        type=path,
        required=True,
        help="workdir of a run, a folder that was imported, or an export",
    )
    parser.add_argument("--image", type=path, action="append", default=[], metavar="FILE", help="may be repeated")
    parser.add_argument("--prompt", help="one question; its answer alone is printed")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="of an answer (%(default)s)")
    add_model_arguments(parser)
    options = parser.parse_args(argv)
    if options.max_new_tokens < 1:
        raise UserError("--max-new-tokens must be at least 1.")
    images = [open_file(file) for file in options.image]  # before anything is loaded, which takes a while
    require(options.checkpoint)
    # These take seconds to import, and none is needed to say what is wrong with the arguments.
    from stf_jax.inference.decoding import Sampling
    from stf_jax.inference.loading import load_generator
    from stf_jax.runtime.mesh import make_mesh

    mesh, how = make_mesh(MeshConfig(*options.mesh)), (options.precision, options.reduce, options.keep)
    generator, _ = load_generator(options.checkpoint, mesh, *how, text_alone=True)
    sampling = Sampling(options.temperature, options.top_p, options.top_k, options.seed)
    talk = Conversation(functools.partial(_say, generator, options.max_new_tokens, sampling), sees=generator.slots > 0)
    for image in images:
        talk.show(image)
    if options.prompt is not None:
        talk.ask(options.prompt)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (lines can be edited and recalled)
    sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no text is told, and the next one read
    print(_HELP)
    while (line := _line()) is not None:
        _obey(talk, line)


class Conversation:
    """What was said so far.

    Attributes:
      turns: in order, an answer after each question.
      images: of all questions, in the order of their marks.
      shown: those that go with the next question.
    """

    def __init__(self, say: Callable[[Record], str], *, sees: bool = True):
        """``say`` answers a record that ends with a question; ``sees``: whether it takes images."""
        self._say, self._sees = say, sees
        self.shown: list[PIL.Image.Image] = []
        self.turns: list[Turn] = []
        self.images: list[PIL.Image.Image] = []

    def show(self, image: PIL.Image.Image) -> None:
        """The image goes with the next question. Raises UserError where the model takes none."""
        if not self._sees:
            from stf_jax.inference.generator import TEXT_ALONE  # which takes seconds

            raise UserError(f"This image cannot be shown: {TEXT_ALONE}")
        self.shown.append(image)

    def ask(self, text: str) -> str:
        """The answer to a question, which becomes part of the conversation when it is whole.

        Raises UserError where nothing can be answered; the conversation is as it was.
        """
        try:
            text.encode()
        except UnicodeEncodeError:  # how Python keeps bytes that it cannot decode
            raise UserError("The question is not UTF-8 text.") from None
        asked = Turn("human", f"{IMAGE_MARK}\n" * len(self.shown) + text.replace(IMAGE_MARK, ""))
        turns, images = [*self.turns, asked], [*self.images, *self.shown]
        answer = self._say(Record("conversation", tuple(p.copy for p in images), tuple(turns)))
        self.turns, self.images, self.shown = [*turns, Turn("gpt", answer.replace(IMAGE_MARK, ""))], images, []
        return answer

    def reset(self) -> None:
        """Forgets all of it."""
        self.turns, self.images, self.shown = [], [], []


def _obey(talk, line):
    """One line of an interactive conversation. What is wrong with it is said, and the conversation goes on."""
    command, _, argument = line.partition(" ")
    try:
        if command == "/image" and argument.strip():
            talk.show(open_file(to_path(argument.strip())))
            print(f"({argument.strip()} goes with the next question)")
        elif command == "/reset":
            talk.reset()
            print("(all is forgotten)")
        elif line.startswith("/"):
            print(_HELP)
        elif line:
            talk.ask(line)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:  # the answer has gone on long enough; it is forgotten
        print("\n(interrupted)")


def _line():
    try:
        line = input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None
    return None if line == "/quit" else line


def _say(generator, limit, sampling, record):
    (answer,) = generator.answers([record], limit, 1, sampling, told=lambda _, piece: print(piece, end="", flush=True))
    print()
    return answer


if __name__ == "__main__":
    sys.exit(door(main))
