"""Measure speed, memory and what a vision tower sees: ``python -m stf_jax.bench NAME [--json=FILE]``, in a clone."""

import importlib
import sys
import types

from etils import epath

from stf_jax.cli import Parser, local_path, run_command
from stf_jax.config import UserError
from stf_jax.files import as_user_error, write_json
from stf_jax.planning.topology import check_topology
from stf_jax.table import format_table

_BENCHES = {
    "backbone": "accuracy of a vision tower trained on cell labels: colors, shapes, characters by height",
    "cost": "cost of 144 image tokens compared with 576: measured with few layers, estimated for the paper's machine",
    "decode": "prefill, time to first token, decode speed and memory, compared with generate in transformers",
    "flops": "model FLOPs with every fusion: tower, fusion, prefill, decoded token; compared with published figures",
    "fusion": "every fusion: output tokens, parameters, FLOPs, forward and backward time, memory",
    "idle": "time that devices wait for the next batch and for the log, if reading is slow",
    "input": "images per second per core and the fraction of useful positions, compared with LLaVA's pipeline",
    "look": "model FLOPs of the maps of stf_jax.look at any size, for mbtf_stf and mlp",
    "methods": "evaluated methods in turn: time to the first token, the method's own time, memory; writes cost.json",
    "plan": "memory, FLOPs and time by plan: compared with MaxText's Llama-2-7B, and 144 image tokens with 576",
    "schedules": "training steps with each schedule of image tokens: time and FLOPs, as shares of those without one",
    "serve": "requests per second and time to the first token of exports under vLLM, with 144 and 576 image tokens",
    "sources": "images per second per core from each kind of data source, and the time to plan rows of Parquet",
    "step": "training steps: time, MFU and memory, compared with the export in PyTorch, eager and compiled",
    "weights": "time and peak memory of importing, loading and exporting a model",
}
_COMPILING = ("cost", "plan")  # these compile for devices that this machine does not have


def main(argv: list[str]) -> None:
    """Runs one benchmark, prints its table and, with ``--json``, writes the same figures as JSON."""
    arguments = _import("arguments")
    parser = Parser(prog="python -m stf_jax.bench", description="Measure speed, memory and what a vision tower sees.")
    names = parser.add_subparsers(dest="name", required=True, parser_class=Parser)
    for name, text in _BENCHES.items():
        subparser = names.add_parser(name, help=text, description=text)
        subparser.add_argument("--json", type=local_path, help="file to write the figures to")
        getattr(arguments, name)(subparser)
    options = parser.parse_args(argv)
    for option in ("json", "plot"):
        file = getattr(options, option, None)
        if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
            reason = "it is a folder" if file.is_dir() else "its folder does not exist"
            raise UserError(f"--{option}={file}: {reason}.")
    if "topology" in options:
        check_topology(options.topology)
    rows = _import(options.name).run(options)  # takes seconds to import
    print(format_table(rows))
    if options.json is not None:
        with as_user_error(options.json):
            write_json(epath.Path(options.json), rows)


def _import(name: str) -> types.ModuleType:
    """Imports a module of benchmarks/, which is beside the package."""
    try:
        return importlib.import_module(f"benchmarks.{name}")
    except ModuleNotFoundError as error:
        if error.name not in ("benchmarks", f"benchmarks.{name}"):
            raise
        raise UserError(
            "The benchmarks are not installed with the package: run this in a clone of it, or set PYTHONPATH "
            "to the clone."
        ) from None


if __name__ == "__main__":
    sys.exit(run_command(main, compilers=sys.argv[1:2] in ([name] for name in _COMPILING)))
