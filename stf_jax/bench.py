"""Measure speed, memory and what a tower sees: ``python -m stf_jax.bench NAME [--json=FILE]``."""

import importlib
import sys

from etils import epath

from stf_jax.benches import arguments
from stf_jax.config import UserError
from stf_jax.planning.topology import check_topology
from stf_jax.runtime.cli import Parser, door, local_path
from stf_jax.runtime.files import write_json, writing
from stf_jax.runtime.table import table

_BENCHES = {
    "backbone": "what a tower trained on cell labels sees in held-out images: colors, shapes, characters by height",
    "cost": "what 144 vision tokens take instead of 576: measured in few layers, predicted for the paper's machine",
    "decode": "prefill, time to first token, decode speed and memory, beside transformers' generate",
    "flops": "model FLOPs of every fusion: tower, fusion, prefill and a decoded token, beside figures that papers give",
    "fusion": "fusions side by side: tokens out, parameters, FLOPs, time forward and backward, memory",
    "input": "images per second on one core, and the share of useful positions, compared with LLaVA's pipeline",
    "plan": "memory, FLOPs and time by plan: beside MaxText's Llama-2-7B, and of 144 vision tokens beside 576",
    "step": "training steps: time, MFU and memory, beside the export in PyTorch, as it is and compiled",
    "weights": "time and peak memory of importing, loading and exporting a model",
}
_COMPILING = ("cost", "plan")  # for devices that are not here


def main(argv: list[str]) -> None:
    """Runs one benchmark; prints its table and, where asked, writes the same figures as JSON."""
    parser = Parser(prog="python -m stf_jax.bench", description="Measure speed, memory and what a tower sees.")
    names = parser.add_subparsers(dest="name", required=True, parser_class=Parser)
    for name, text in _BENCHES.items():
        one = names.add_parser(name, help=text, description=text)
        one.add_argument("--json", type=local_path, help="file to write the figures to")
        getattr(arguments, name)(one)
    options = parser.parse_args(argv)
    for option in ("json", "plot"):
        file = getattr(options, option, None)
        if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
            what = "it is a folder" if file.is_dir() else "there is no such folder"
            raise UserError(f"--{option}={file}: {what}.")
    if "topology" in options:
        check_topology(options.topology)
    rows = importlib.import_module(f"stf_jax.benches.{options.name}").run(options)  # which takes seconds to import
    print(table(rows))
    if options.json is not None:
        with writing(options.json):
            write_json(epath.Path(options.json), rows)


if __name__ == "__main__":
    sys.exit(door(main, compilers=sys.argv[1:2] in ([name] for name in _COMPILING)))
