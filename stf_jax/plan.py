"""Foresee: ``python -m stf_jax.plan --config=configs/finetune.py --topology=v5e:4x8``."""

import json
import sys

from stf_jax.config import UserError, resolve
from stf_jax.planning.topology import check_topology, topology_devices
from stf_jax.runtime.cli import Parser, door, parse
from stf_jax.runtime.environment import muted
from stf_jax.runtime.files import check_paths

HELP = """Compile a run's real program for devices that are not here, and tell whether it fits and what it takes.

  python -m stf_jax.plan --config=FILE[:ARG] --topology=NAME [--config.KEY=VALUE ...] [options]

  --config=FILE:ARG        as for stf_jax.main, and --config.KEY=VALUE too; of several stages, the one that is meant
  --topology=NAME          v4, v5e, v5p or v6e with the layout of a slice's chips, as v5e:4x8 or v5p:2x2x4; a6000,
                           a100-40, a100-80, h100, h200 or b200 with the cards of one machine, as h100:8
  --slices=N               of a TPU, N slices of that layout (1)
  --what=WHAT              train, or of eval.batch questions as long as data.max_length: prefill; decode, one token;
                           evaluate, all of an answer, beside the training state if eval.benchmarks
                           names any (train)
  --search                 try meshes, rematerialisation and microbatches, and rank those that fit
  --price-per-chip-hour=X  tell what the run costs, too
  --json                   one JSON object on standard output, and nothing else
  -v                       show what libraries log, too

Times are a roofline: the slowest of compute, memory and links, each at the share of the vendor's figure that good
programs attain, with every row data.max_length long. Nothing is allocated, and no accelerator is needed, but the
compilers are: pip install --no-deps -r requirements-plan.txt

Exit status: 0 done, whether it fits or not; 2 your input; 1 our bug.
"""


def main(argv: list[str]) -> None:
    """Reads the config, describes the devices, compiles, and prints what was found."""
    options = Parser(add_help=False, allow_abbrev=False)
    options.add_argument("--topology")
    options.add_argument("--slices", type=int, default=1)
    options.add_argument("--what", choices=["train", "prefill", "decode", "evaluate"], default="train")
    options.add_argument("--search", action="store_true")
    options.add_argument("--price-per-chip-hour", type=float, default=0.0)
    options.add_argument("--json", action="store_true")
    known, rest = options.parse_known_args(argv)
    if argv and not rest:
        raise UserError("--config is missing; see --help.")
    _, config = parse(rest, HELP, workdir=False)
    stages = resolve(config)
    if len(stages) > 1:
        names = ", ".join(stage.name for stage in stages)
        raise UserError(f"The config has stages {names}; name one, as in --config=FILE:stage={stages[0].name}.")
    if not known.topology:
        raise UserError("--topology is missing; see --help.")
    if known.slices < 1 or not 0 <= known.price_per_chip_hour < float("inf"):
        raise UserError("--slices should be at least 1, and --price-per-chip-hour a price; see --help.")
    if known.search and known.what != "train":
        raise UserError("--search is for --what=train.")
    check_paths(stages[0])
    check_topology(known.topology, known.slices)
    with muted():  # the compilers' packages tell that there is no device for them
        import jax

        from stf_jax.planning.formatting import ranking, summary, trial
        from stf_jax.planning.report import report
        from stf_jax.planning.search import search
        from stf_jax.weights.origin import complete
    jax.config.update("jax_platforms", "cpu")  # what is here is not asked for
    devices, config = topology_devices(known.topology, known.slices), complete(stages[0])
    if known.search:
        found = search(config, devices, known.price_per_chip_hour, lambda one: print(trial(one), file=sys.stderr))
    else:
        found = report(config, known.what, devices, known.price_per_chip_hour)
    found = {"topology": known.topology, "slices": known.slices} | found
    print(json.dumps(found) if known.json else (ranking if known.search else summary)(found))


if __name__ == "__main__":
    sys.exit(door(main, compilers=True))
