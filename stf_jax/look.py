"""Look inside a model: ``python -m stf_jax.look --checkpoint=DIR --image=FILE --question=TEXT --out=DIR``."""

import argparse
import dataclasses
import os
import pathlib
import sys
from typing import TYPE_CHECKING

from etils import epath

from stf_jax.cli import Parser, add_device_arguments, path, require, run_command
from stf_jax.config import MeshConfig, UserError
from stf_jax.data.image import open_image_file

if TYPE_CHECKING:
    from stf_jax.looking.look import Look
    from stf_jax.models.spec import ModelSpec

DESCRIPTION = """Show what a model's image tokens hold, and what its answer depends on, in a page that opens from disk.

Several checkpoints, and several untrained reducers with several budgets, answer the same question side by side. OUT
gets an HTML page for each image, PNGs of its maps, and for a folder of images index.html, in which the images on which
the methods disagree most come first (docs/looking-inside.md).
"""
_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm")


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to answer: a checkpoint, and its budget or what reduces its image tokens."""

    name: str
    checkpoint: epath.Path
    reduce: str = ""
    keep: int = 0
    tokens: int = 0


def main(argv: list[str]) -> None:
    """Answers the question with each method, and writes the pages."""
    parser = Parser(prog="python -m stf_jax.look", description=DESCRIPTION)
    parser.add_argument(
        "--checkpoint", type=_parse_paths, required=True, metavar="DIR[,DIR…]", help="runs, imported folders or exports"
    )
    parser.add_argument(
        "--image", type=path, required=True, metavar="FILE|FOLDER", help="an image, or a folder of them"
    )
    parser.add_argument("--question", required=True, metavar="TEXT", help="asked about each image")
    parser.add_argument("--out", type=path, required=True, metavar="DIR", help="output folder")
    parser.add_argument(
        "--reduce",
        action="append",
        default=[],
        metavar="NAME[:KEY=VALUE,…]",
        help="also answer with this untrained reducer of image tokens (docs/evaluating.md); may be repeated",
    )
    parser.add_argument(
        "--keep",
        type=_parse_budgets,
        default=(0,),
        metavar="N[,N…]",
        help="image tokens kept per image with --reduce; each number is one more method (default: one quarter)",
    )
    parser.add_argument(
        "--tokens",
        type=_parse_budgets,
        default=(),
        metavar="N[,N…]",
        help="also answer with these budgets of a model that has several (docs/budgets.md)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, help="maximum tokens per answer (%(default)s)")
    add_device_arguments(parser)
    options = parser.parse_args(argv)
    if options.keep != (0,) and not options.reduce:
        raise UserError("--keep has no effect without --reduce.")
    if options.max_new_tokens < 1:
        raise UserError("--max-new-tokens must be at least 1.")
    if not options.question.strip():
        raise UserError("--question is empty.")
    try:
        options.question.encode()
    except UnicodeEncodeError:  # surrogates stand for bytes that Python could not decode
        raise UserError("--question is not UTF-8 text.") from None
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out={options.out} is a file; give a folder.")
    for checkpoint in options.checkpoint:
        require(checkpoint)
    images = _find_images(require(options.image))
    for image in images:
        open_image_file(image)  # before the models, which take longer to load
    looks = _look(options, images)
    from stf_jax.looking.page import write_pages

    page = write_pages(looks, options.out)
    for image, one in looks.items():
        for look in one:
            print(f"{image}  {look.name}: {look.answer!r} ({look.probability:.0%})")
    print(f"open {page}")


def _look(options: argparse.Namespace, images: list[epath.Path]) -> "dict[str, list[Look]]":
    """Looks at each image with each method; the looks by image, one after another as the methods are."""
    # These take seconds to import, and checking the arguments does not need them.
    from stf_jax.inference.loading import load_generator
    from stf_jax.looking.look import look_at
    from stf_jax.parallel.mesh import make_mesh
    from stf_jax.weights.model import open_model

    configs = {checkpoint: open_model(checkpoint).config for checkpoint in options.checkpoint}
    methods = plan_methods(configs, options.reduce, options.keep, options.tokens)
    mesh = make_mesh(MeshConfig(*options.mesh))
    looks: dict[str, list[Look]] = {image.name: [] for image in images}
    loaded = None
    for method in methods:
        if loaded is None or loaded[0] != method.checkpoint:
            loaded = None  # frees the weights before the next are read
            loaded = method.checkpoint, load_generator(method.checkpoint, mesh, options.precision)[0]
        generator = loaded[1]
        if method.reduce or method.tokens:
            generator = generator.with_reduction(method.reduce, method.keep, method.tokens)
        for image in images:
            opened = open_image_file(image)
            looks[image.name].append(look_at(generator, opened, options.question, method.name, options.max_new_tokens))
    return looks


def plan_methods(
    configs: "dict[epath.Path, ModelSpec]", reducers: list[str], keeps: tuple[int, ...], budgets: tuple[int, ...] = ()
) -> list[Method]:
    """Each checkpoint as it is, then with each other budget and each reducer that fits it.

    Raises:
      UserError: a budget or a reducer fits none.
    """
    methods = {
        checkpoint: [Method(name, checkpoint)]
        for checkpoint, name in zip(configs, _name_checkpoints(configs), strict=True)
    }
    choices = [("", 0, tokens) for tokens in budgets] + [(reduce, keep, 0) for reduce in reducers for keep in keeps]
    for reduce, keep, tokens in choices:
        refusals = []
        for checkpoint, config in configs.items():
            try:
                reduction = dataclasses.replace(config, reduce=reduce, keep=keep, tokens=tokens).reduction
            except UserError as error:
                refusals.append(error)
                continue
            if tokens != config.reduction.tokens:  # which it answers with as it is
                more = f" + {reduce}, {reduction.keep}" if reduce else f", {tokens} token{'s' * (tokens > 1)}"
                methods[checkpoint].append(
                    Method(f"{methods[checkpoint][0].name}{more}", checkpoint, reduce, keep, tokens)
                )
        if len(refusals) == len(configs):
            raise refusals[0]
    return [method for some in methods.values() for method in some]


def _name_checkpoints(configs: "dict[epath.Path, ModelSpec]") -> list[str]:
    """Short names that differ: those of the fusions, the folders, or the paths as given."""
    choices = (
        [config.fusion.fusion for config in configs.values()],
        [pathlib.Path(os.path.abspath(checkpoint)).name for checkpoint in configs],
    )
    return next((names for names in choices if len(set(names)) == len(names)), [str(folder) for folder in configs])


def _find_images(place: epath.Path) -> list[epath.Path]:
    """The image itself, or the images in a folder, by name."""
    if not place.is_dir():
        return [place]
    named = [file for file in place.iterdir() if file.suffix.lower() in _SUFFIXES and not file.name.startswith(".")]
    found = [file for file in named if file.is_file()]
    if not found:
        raise UserError(f"{place} has no images: no file in it ends with {', '.join(_SUFFIXES)}.")
    return sorted(found)


def _parse_paths(text: str) -> list[epath.Path]:
    return list(dict.fromkeys(path(part) for part in text.split(",")))


def _parse_budgets(text: str) -> tuple[int, ...]:
    budgets = text.split(",")
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in budgets):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0, or several separated by commas")
    return tuple(map(int, budgets))


if __name__ == "__main__":
    sys.exit(run_command(main))
