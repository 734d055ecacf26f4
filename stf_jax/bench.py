"""Compare speed and memory: ``python -m stf_jax.bench NAME [--json=FILE]``."""

import pathlib
import sys

from etils import epath

from stf_jax.benches import cost as cost_bench
from stf_jax.benches import decode as decode_bench
from stf_jax.benches import flops as flops_bench
from stf_jax.benches import fusion as fusion_bench
from stf_jax.benches import input as input_bench
from stf_jax.benches import plan as plan_bench
from stf_jax.benches import step as step_bench
from stf_jax.benches import weights as weights_bench
from stf_jax.config import UserError
from stf_jax.runtime.cli import Parser, door
from stf_jax.runtime.files import write_json, writing
from stf_jax.runtime.table import table


def main(argv: list[str]) -> None:
    """Runs one benchmark; prints its table and, where asked, writes the same figures as JSON."""
    parser = Parser(prog="python -m stf_jax.bench", description="Compare speed and memory.")
    names = parser.add_subparsers(dest="name", required=True, parser_class=Parser)
    benches = {
        "cost": cost_bench,
        "decode": decode_bench,
        "flops": flops_bench,
        "fusion": fusion_bench,
        "input": input_bench,
        "plan": plan_bench,
        "step": step_bench,
        "weights": weights_bench,
    }
    for name, bench in benches.items():
        one = names.add_parser(name, help=bench.HELP, description=bench.HELP)
        bench.add_arguments(one)
        one.add_argument("--json", type=pathlib.Path, help="file to write the figures to")
        one.set_defaults(run=bench.run)
    options = parser.parse_args(argv)
    if options.json is not None and (options.json.is_dir() or not options.json.absolute().parent.is_dir()):
        what = "it is a folder" if options.json.is_dir() else "there is no such folder"
        raise UserError(f"--json={options.json}: {what}.")
    rows = options.run(options)
    print(table(rows))
    if options.json is not None:
        with writing(options.json):
            write_json(epath.Path(options.json), rows)


if __name__ == "__main__":
    sys.exit(door(main))
