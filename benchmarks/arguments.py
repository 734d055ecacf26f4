"""Command-line arguments of the benchmarks, one function each, without importing the benchmarks, which is slow."""

import argparse

from stf_jax.cli import local_path

LLAVA = "clip-l-14-336", "vicuna-7b"  # presets of LLaVA-1.5 7B


def backbone(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of :mod:`benchmarks.backbone`."""
    parser.add_argument(
        "--checkpoint", required=True, type=local_path, help="workdir of a run trained with model.cells"
    )
    parser.add_argument("--images", type=int, default=400, help="held-out images to label (%(default)s)")


def cost(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of :mod:`benchmarks.cost`."""
    parser.add_argument("--vision", default="clip-l-14-336", help="vision tower preset (%(default)s)")
    parser.add_argument("--llm", default="vicuna-7b", help="language model preset (%(default)s)")
    parser.add_argument("--layers", default="1,2", help="two numbers of decoder layers to measure (%(default)s)")
    parser.add_argument("--batches", default="1,2", help="batch sizes to measure (%(default)s)")
    parser.add_argument("--topology", default="a6000:8", help="devices to compile for (%(default)s)")
    parser.add_argument("--rows", default="1,4,8,16", help="rows per device to compile for (%(default)s)")
    parser.add_argument("--plot", type=local_path, help="PNG file to plot to")


def decode(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of :mod:`benchmarks.decode`."""
    parser.add_argument("--llm", default="smollm2-135m", help="language model preset, random weights (%(default)s)")
    parser.add_argument("--vision", default="clip-mini-16-384", help="vision tower preset, a cheap one (%(default)s)")
    parser.add_argument("--batches", default="1,8", help="batch sizes (%(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per prompt (%(default)s)")
    parser.add_argument(
        "--precision",
        choices=["float32", "bfloat16"],
        default="float32",
        help="of both programs (%(default)s); use bfloat16 on GPUs",
    )


def flops(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of :mod:`benchmarks.flops`."""
    parser.add_argument("--vision", default=LLAVA[0], help="vision tower preset (%(default)s)")
    parser.add_argument("--llm", default=LLAVA[1], help="language model preset (%(default)s)")
    parser.add_argument("--text", default="0,64", help="text tokens per prompt (%(default)s)")


def look(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of :mod:`benchmarks.look`."""
    parser.add_argument("--vision", default=LLAVA[0], help="vision tower preset (%(default)s)")
    parser.add_argument("--llm", default=LLAVA[1], help="language model preset (%(default)s)")
    parser.add_argument("--text", type=int, default=40, help="text tokens of the prompt (%(default)s)")
    parser.add_argument("--answer", type=int, default=8, help="tokens of the answer (%(default)s)")


def fusion(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of :mod:`benchmarks.fusion`."""
    parser.add_argument("--vision", default="clip-l-14-336", help="vision tower preset (%(default)s)")
    parser.add_argument("--llm", default="vicuna-7b", help="language model preset (%(default)s)")
    parser.add_argument("--fusions", default="", help="fusions, separated by commas (default: all)")
    parser.add_argument("--batch", type=int, default=1, help="images per batch (%(default)s)")
    parser.add_argument(
        "--precision", choices=["float32", "bfloat16"], default="float32", help="of compute (%(default)s)"
    )


def idle(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of :mod:`benchmarks.idle`."""
    parser.add_argument("--share", type=float, default=0.8, help="time to read a batch, in steps (%(default)s)")
    parser.add_argument("--steps", type=int, default=24, help="steps of each run (%(default)s)")


def input(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of :mod:`benchmarks.input`."""
    parser.add_argument("--images", type=int, default=384, help="JPEG files to generate (%(default)s)")
    parser.add_argument("--rows", type=int, default=66_530, help="conversation lengths to draw (%(default)s)")


def methods(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of :mod:`benchmarks.methods`."""
    parser.add_argument(
        "results", nargs="+", type=local_path, metavar="RESULTS", help="output folder of stf_jax.evaluate or main"
    )
    parser.add_argument("--rows", type=int, default=1, help="questions per batch (%(default)s)")
    parser.add_argument("--text", type=int, default=64, help="text tokens per prompt (%(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="rounds over all methods (%(default)s)")


def plan(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of :mod:`benchmarks.plan`."""
    parser.add_argument("--topology", default="v5e:4x8", help="devices to compare 144 tokens with 576 on (%(default)s)")
    parser.add_argument("--llm", default="vicuna-7b", help="language model preset (%(default)s)")
    parser.add_argument("--no-mark", action="store_true", help="skip the comparison with MaxText")
    parser.add_argument("--methods", action="store_true", help="also plan schedules, and models with several budgets")


def serve(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of :mod:`benchmarks.serve`."""
    parser.add_argument(
        "exports", nargs="*", type=local_path, metavar="EXPORT",
        help="exports to serve, the first of which the others are compared with (default: two with random weights)",
    )  # fmt: skip
    parser.add_argument("--llm", default="smollm2-135m", help="language model preset, random weights (%(default)s)")
    parser.add_argument("--vision", default="clip-mini-16-384", help="vision tower preset, a cheap one (%(default)s)")
    parser.add_argument("--in-flight", default="1,8,32", help="requests at a time (%(default)s)")
    parser.add_argument("--requests", type=int, default=32, help="requests for each number in flight (%(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens per request (%(default)s)")
    parser.add_argument(
        "--precision", choices=["float32", "bfloat16"], default="float32", help="of weights and compute (%(default)s)"
    )


def sources(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of :mod:`benchmarks.sources`."""
    parser.add_argument("--images", type=int, default=384, help="JPEG files in each source (%(default)s)")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of Parquet to plan (%(default)s)")


def schedules(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of :mod:`benchmarks.schedules`."""
    _step_shapes(parser, fusion="mlp")
    parser.add_argument(
        "--schedules",
        default="vica;pyramiddrop;hidrop",
        help="values of model.schedule, separated by semicolons (%(default)s)",
    )


def step(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of :mod:`benchmarks.step`."""
    _step_shapes(parser, fusion="mbtf_stf")
    parser.add_argument(
        "--precision", choices=["float32", "bfloat16"], default="float32", help="of compute (%(default)s)"
    )
    parser.add_argument(
        "--remat", choices=["none", "full"], default="none", help="gradient checkpointing (%(default)s)"
    )


def _step_shapes(parser: argparse.ArgumentParser, fusion: str) -> None:
    parser.add_argument("--llm", default="smollm2-135m", help="language model preset, random weights (%(default)s)")
    parser.add_argument("--vision", default="clip-mini-16-384", help="vision tower preset, a cheap one (%(default)s)")
    parser.add_argument("--fusion", default=fusion, help="fusion (%(default)s)")
    parser.add_argument("--rows", type=int, default=2, help="rows per step (%(default)s)")
    parser.add_argument("--text", type=int, default=112, help="text tokens per row (%(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="steps to time (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds over all programs (%(default)s)")


def weights(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of :mod:`benchmarks.weights`."""
    parser.add_argument("--model", default="vicuna-7b", help="language model preset, with random bfloat16 weights")
    parser.add_argument("--scratch", type=local_path, help="folder on a disk with space for three copies of the model")
