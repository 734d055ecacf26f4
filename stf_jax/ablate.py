"""Study: ``python -m stf_jax.ablate --config=configs/ablations/fusions.py --out=DIR``."""

import shlex
import signal
import sys

from etils import epath

from stf_jax.config import RunFailed, Stopped, UserError, short_message
from stf_jax.evals.files import RESULTS
from stf_jax.runtime import cli
from stf_jax.runtime.cli import Parser, local_path, run_command
from stf_jax.runtime.files import make_folder
from stf_jax.studies.study import cells, default_study, read_study

HELP = """Train variants of a model from several seeds, and tell what difference they make.

  python -m stf_jax.ablate --config=FILE[:key=value,...] --out=DIR [--config.KEY=VALUE ...]

  --config=FILE        a Python file with get_config(arg): one of configs/ablations/
  --config.KEY=VALUE   change the study: --config.seeds='(0,1)' --config.baseline=mlp
  --out=DIR            gets report.md, report.html, report.json and PNGs
  --cells=DIR          where the runs lie; studies that share it share runs that are equal (OUT/cells)
  --jobs=N             runs at once (one a GPU, or one a processor until memory is full)
  -v                   show what libraries log, too

Every run is an ordinary one of stf_jax.main or stf_jax.evaluate, whose command stands in report.json. Interrupted, the
same command goes on where it was; what is done is not done again. Exit status: 0 done; 2 your input; 1 a run failed
(the others are reported all the same).
"""


def main(argv: list[str]) -> None:
    """Runs what is not done yet of a study, measures what it costs, and writes the report."""
    own = Parser(add_help=False, allow_abbrev=False)
    own.add_argument("--out", type=local_path)
    own.add_argument("--cells", type=local_path)
    own.add_argument("--jobs", type=int, default=0)
    options, rest = own.parse_known_args(argv)
    if argv and not rest:
        raise UserError("--config is missing; see --help.")
    config = cli.parse(rest, HELP, workdir=False, defaults=default_study)[1]
    if options.out is None:
        raise UserError("--out is missing; see --help.")
    if options.jobs < 0:
        raise UserError(f"--jobs={options.jobs} should be at least 1, or left out.")
    # These take seconds to import.
    from stf_jax.studies.cost import cost
    from stf_jax.studies.outcomes import by_variant
    from stf_jax.studies.page import plain
    from stf_jax.studies.report import findings, verdicts, write_report
    from stf_jax.studies.runner import run, slots

    study, shares = read_study(config), slots(options.jobs)
    folder = options.cells or options.out / "cells"
    every = cells(study, folder)
    for path in (options.out, folder):
        make_folder(epath.Path(path))
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        failed = run(every, shares, folder / "programs")
        lacking = {cell.variant.name for cell in every if not (cell.folder / RESULTS).exists()}
        done = [cell for cell in every if cell.variant.name not in lacking]
        costs = {}
        for cell in (cell for cell in done if cell.seed == study.seeds[0]):
            try:
                costs[cell.variant.name] = cost(cell, shares[0])
            except RunFailed as error:
                failed[cell] = short_message(error)
                print(f"{cell.name}: {failed[cell]}")
    finally:
        signal.signal(signal.SIGTERM, before)
    if done:
        found = findings(study, by_variant(done), costs)
        write_report(found, done, failed, shlex.join(["python", "-m", "stf_jax.ablate", *argv]), options.out)
        print("\n".join(plain(verdict) for verdict in verdicts(found)))
        print(f"report.md, report.html, report.json and the images are in {options.out}")
    if failed:
        raise RunFailed(
            f"{len(failed)} of {len(every)} runs failed, the first of them {next(iter(failed)).name}: see above"
        )


def _stop(*_):
    raise Stopped("Stopped by SIGTERM; the same command goes on where it was.")


if __name__ == "__main__":
    sys.exit(run_command(main))
