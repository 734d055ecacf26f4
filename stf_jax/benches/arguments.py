"""Arguments of the benchmarks, a function each. What runs takes seconds to import, and none of it is needed here."""

import argparse

from stf_jax.runtime.cli import local_path

LLAVA = "clip-l-14-336", "vicuna-7b"  # presets of LLaVA-1.5 7B


def backbone(parser: argparse.ArgumentParser) -> None:
    """Of :mod:`stf_jax.benches.backbone`."""
    parser.add_argument(
        "--checkpoint", required=True, type=local_path, help="workdir of a run trained with model.cells"
    )
    parser.add_argument("--images", type=int, default=400, help="held-out images to label (%(default)s)")


def cost(parser: argparse.ArgumentParser) -> None:
    """Of :mod:`stf_jax.benches.cost`."""
    parser.add_argument("--vision", default="clip-l-14-336", help="a tower preset (%(default)s)")
    parser.add_argument("--llm", default="vicuna-7b", help="a language model preset (%(default)s)")
    parser.add_argument("--layers", default="1,2", help="of the decoder, that are measured: two numbers (%(default)s)")
    parser.add_argument("--batches", default="1,2", help="rows at once, that are measured (%(default)s)")
    parser.add_argument("--topology", default="a6000:8", help="to compile for (%(default)s)")
    parser.add_argument("--rows", default="1,4,8,16", help="a device of that (%(default)s)")
    parser.add_argument("--plot", type=local_path, help="PNG to draw")


def decode(parser: argparse.ArgumentParser) -> None:
    """Of :mod:`stf_jax.benches.decode`."""
    parser.add_argument("--llm", default="smollm2-135m", help="a language model preset, with random weights")
    parser.add_argument("--vision", default="clip-mini-16-384", help="a tower preset; this one costs little")
    parser.add_argument("--batches", default="1,8", help="prompts at once (%(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each (%(default)s)")
    parser.add_argument(
        "--precision",
        choices=["float32", "bfloat16"],
        default="float32",
        help="of both (%(default)s); GPUs want bfloat16",
    )


def flops(parser: argparse.ArgumentParser) -> None:
    """Of :mod:`stf_jax.benches.flops`."""
    parser.add_argument("--vision", default=LLAVA[0], help="a tower preset (%(default)s)")
    parser.add_argument("--llm", default=LLAVA[1], help="a language model preset (%(default)s)")
    parser.add_argument("--text", default="0,64", help="text tokens of a prompt (%(default)s)")


def fusion(parser: argparse.ArgumentParser) -> None:
    """Of :mod:`stf_jax.benches.fusion`."""
    parser.add_argument("--vision", default="clip-l-14-336", help="a tower preset (%(default)s)")
    parser.add_argument("--llm", default="vicuna-7b", help="a language model preset (%(default)s)")
    parser.add_argument("--fusions", default="", help="names with commas between; all")
    parser.add_argument("--batch", type=int, default=1, help="images at once (%(default)s)")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="(%(default)s)")


def input(parser: argparse.ArgumentParser) -> None:
    """Of :mod:`stf_jax.benches.input`."""
    parser.add_argument("--images", type=int, default=384, help="JPEGs to make (%(default)s)")
    parser.add_argument("--rows", type=int, default=66_530, help="conversations whose lengths are drawn (%(default)s)")


def plan(parser: argparse.ArgumentParser) -> None:
    """Of :mod:`stf_jax.benches.plan`."""
    parser.add_argument("--topology", default="v5e:4x8", help="to compare 144 tokens with 576 on (%(default)s)")
    parser.add_argument("--llm", default="vicuna-7b", help="preset (%(default)s)")
    parser.add_argument("--no-mark", action="store_true", help="leave out the comparison with MaxText")


def step(parser: argparse.ArgumentParser) -> None:
    """Of :mod:`stf_jax.benches.step`."""
    parser.add_argument("--llm", default="smollm2-135m", help="a language model preset, with random weights")
    parser.add_argument("--vision", default="clip-mini-16-384", help="a tower preset; this one costs little")
    parser.add_argument("--fusion", default="mbtf_stf")
    parser.add_argument("--rows", type=int, default=2, help="a step (%(default)s)")
    parser.add_argument("--text", type=int, default=112, help="text tokens of a row (%(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="that are timed (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of all programs in turn (%(default)s)")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="(%(default)s)")
    parser.add_argument(
        "--remat", choices=["none", "full"], default="none", help="gradient checkpointing (%(default)s)"
    )


def weights(parser: argparse.ArgumentParser) -> None:
    """Of :mod:`stf_jax.benches.weights`."""
    parser.add_argument("--model", default="vicuna-7b", help="a language model preset, filled with random bfloat16")
    parser.add_argument("--scratch", type=local_path, help="folder on a disk with room for the model three times")
