"""Exchange weights: ``python -m stf_jax.convert export RUN --format=native --to=DIR``."""

import argparse
import pathlib
import re
import sys

import jax.numpy as jnp

from stf_jax.config import UserError
from stf_jax.runtime.checkpoint import SavedParams
from stf_jax.runtime.cli import Parser, door
from stf_jax.weights.folder import save_params


def main(argv: list[str]) -> None:
    """Reads a run's newest checkpoint and writes its weights for others to start from."""
    parser = Parser(prog="python -m stf_jax.convert", description="Exchange weights with other programs.")
    verbs = parser.add_subparsers(dest="verb", required=True, parser_class=Parser)
    export = verbs.add_parser("export", help="write a run's weights", description="Write the weights of a run.")
    export.add_argument("run", type=pathlib.Path, help="workdir of the run")
    export.add_argument("--to", type=pathlib.Path, required=True, help="folder to write")
    export.add_argument(
        "--format",
        choices=["native"],
        required=True,
        help="native: safetensors under our own parameter paths, for config.init_from",
    )
    export.add_argument("--only", default=".*", metavar="PATTERN", help="parameters to write, e.g. '(vision|llm)/.*'")
    export.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="type to write them in")
    _export(parser.parse_args(argv))


def _export(options: argparse.Namespace) -> None:
    if not (options.run / "checkpoints").is_dir():
        raise UserError(f"{options.run} is not the workdir of a run: it has no checkpoints/.")
    params = SavedParams(options.run).restore({})
    chosen = {
        path: value.astype(jnp.dtype(options.dtype))
        for path, value in params.items()
        if re.fullmatch(options.only, path)
    }
    if not chosen:
        raise UserError(f"--only={options.only!r} matches none of the {len(params)} parameters.")
    save_params(options.to, chosen)
    count = sum(value.size for value in chosen.values())
    print(f"{len(chosen)} tensors, {count:,} parameters in {options.dtype}: {options.to / 'model.safetensors'}")


if __name__ == "__main__":
    sys.exit(door(main))
