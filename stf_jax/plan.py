"""Estimate memory and time: ``python -m stf_jax.plan --config=configs/finetune.py --topology=v5e:4x8``."""

import json
import sys

from stf_jax.cli import Parser, parse, run_command
from stf_jax.config import UserError, resolve
from stf_jax.data.sources.base import find_source
from stf_jax.environment import suppress_stderr
from stf_jax.files import check_paths
from stf_jax.planning.topology import check_topology, topology_devices

HELP = """Compile the program of a run for devices that this machine does not have; report whether it fits and its cost.

  python -m stf_jax.plan --config=FILE[:ARG] --topology=NAME [--config.KEY=VALUE ...] [options]

  --config=FILE:ARG        as for stf_jax.main, also --config.KEY=VALUE; with several stages, select one
  --topology=NAME          v4, v5e, v5p or v6e with the layout of a slice, such as v5e:4x8 or v5p:2x2x4; l4, 4090,
                           a6000, a100-40, a100-80, h100, h200 or b200 with the GPUs of one machine, such as h100:8
  --slices=N               number of TPU slices of that layout (default: 1)
  --what=WHAT              what to plan. train (default); or for eval.batch questions of data.max_length tokens:
                           prefill, decode (one token), or evaluate (complete answers, with the training state in
                           memory if eval.benchmarks is set)
  --search                 try meshes, rematerialization and microbatches, and rank those that fit
  --price-per-chip-hour=X  also report the cost of the run
  --json                   one JSON object on standard output, and nothing else
  -v                       also show the log messages of libraries

Times are roofline estimates: the slowest of compute, memory and links, each at the fraction of the vendor's figure that
good programs attain. Every row counts as data.max_length long, unless the config names data that are here. Nothing is
allocated and no accelerator is needed, only the compilers: pip install --no-deps -r requirements-plan.txt

Exit status: 0 done, whether it fits or not; 2 wrong input; 1 a bug.
"""


def main(argv: list[str]) -> None:
    """Compiles the program of a config for the devices of a topology and prints a report."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--topology")
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--what", choices=["train", "prefill", "decode", "evaluate"], default="train")
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--price-per-chip-hour", type=float, default=0.0)
    parser.add_argument("--json", action="store_true")
    options, config_argv = parser.parse_known_args(argv)
    if argv and not config_argv:
        raise UserError("--config is missing; see --help.")
    _, config = parse(config_argv, HELP, workdir=False)
    stages = resolve(config)
    if len(stages) > 1:
        names = ", ".join(stage.name for stage in stages)
        raise UserError(f"The config has stages {names}; select one with --config=FILE:stage={stages[0].name}.")
    if not options.topology:
        raise UserError("--topology is missing; see --help.")
    if options.slices < 1 or not 0 <= options.price_per_chip_hour < float("inf"):
        raise UserError("--slices must be at least 1, and --price-per-chip-hour finite and at least 0; see --help.")
    if options.search and options.what != "train":
        raise UserError("--search requires --what=train.")
    check_paths(stages[0])
    find_source(stages[0].data.source)
    check_topology(options.topology, options.slices)
    with suppress_stderr():  # the compilers log that they find no device
        import jax

        from stf_jax.planning.formatting import format_ranking, format_report, format_trial
        from stf_jax.planning.report import make_report
        from stf_jax.planning.search import search
        from stf_jax.weights.origin import complete_config
    jax.config.update("jax_platforms", "cpu")  # ignore the devices of this machine
    devices, config = topology_devices(options.topology, options.slices), complete_config(stages[0])
    if options.search:
        result = search(
            config,
            devices,
            options.price_per_chip_hour,
            on_trial=lambda trial: print(format_trial(trial), file=sys.stderr),
        )
    else:
        result = make_report(config, options.what, devices, options.price_per_chip_hour)
    result = {"topology": options.topology, "slices": options.slices} | result
    if options.json:
        print(json.dumps(result))
    else:
        print(format_ranking(result) if options.search else format_report(result))


if __name__ == "__main__":
    sys.exit(run_command(main, compilers=True))
