"""Run an ablation study: ``python -m stf_jax.ablate --config=configs/ablations/fusions.py --out=DIR``."""

import shlex
import signal
import sys
from typing import NoReturn

from etils import epath

from stf_jax import cli
from stf_jax.cli import Parser, local_path, run_command
from stf_jax.config import RunFailed, Stopped, UserError, short_message
from stf_jax.evals.files import RESULTS
from stf_jax.files import make_folder
from stf_jax.studies.study import default_study, make_cells, read_study

HELP = """Train variants of a model with several seeds, and report how they differ.

  python -m stf_jax.ablate --config=FILE[:key=value,...] --out=DIR [--config.KEY=VALUE ...]

  --config=FILE        a Python file with get_config(arg): one of configs/ablations/
  --config.KEY=VALUE   change the study: --config.seeds='(0,1)' --config.baseline=mlp
  --out=DIR            the folder for report.md, report.html, report.json and PNGs
  --cells=DIR          the folder for runs; studies with the same one share equal runs (default: OUT/cells)
  --jobs=N             runs at once (default: one per GPU, or one per CPU as memory permits)
  -v                   also show the logs of libraries

Every run is an ordinary run of stf_jax.main or stf_jax.evaluate; report.json lists the commands. After an interruption,
the same command continues where it stopped, and finished runs are not repeated. Exit status: 0 success; 2 invalid
input; 1 a run failed (the report covers the others).
"""


def main(argv: list[str]) -> None:
    """Runs a study's unfinished cells, measures costs, and writes the report."""
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
        raise UserError(f"--jobs={options.jobs} must be at least 1; omit it for the default.")
    # These take seconds to import.
    from stf_jax.studies.cost import measure_cost
    from stf_jax.studies.outcomes import read_outcomes
    from stf_jax.studies.page import strip_markup
    from stf_jax.studies.report import compute_findings, format_verdicts, write_report
    from stf_jax.studies.runner import make_slots, run_cells

    study, slots = read_study(config), make_slots(options.jobs)
    folder = options.cells or options.out / "cells"
    cells = make_cells(study, folder)
    for path in (options.out, folder):
        make_folder(epath.Path(path))
    previous_handler = signal.signal(signal.SIGTERM, _stop)
    try:
        failed = run_cells(cells, slots, folder / "programs")
        incomplete = {cell.variant.name for cell in cells if not (cell.folder / RESULTS).exists()}
        done = [cell for cell in cells if cell.variant.name not in incomplete]
        costs = {}
        for cell in (cell for cell in done if cell.seed == study.seeds[0]):
            try:
                costs[cell.variant.name] = measure_cost(cell, slots[0])
            except RunFailed as error:
                failed[cell] = short_message(error)
                print(f"{cell.name}: {failed[cell]}")
    finally:
        signal.signal(signal.SIGTERM, previous_handler)
    if done:
        findings = compute_findings(study, read_outcomes(done), costs)
        write_report(findings, done, failed, shlex.join(["python", "-m", "stf_jax.ablate", *argv]), options.out)
        print("\n".join(strip_markup(verdict) for verdict in format_verdicts(findings)))
        print(f"report.md, report.html, report.json and the images are in {options.out}")
    if failed:
        raise RunFailed(
            f"{len(failed)} of {len(cells)} runs failed, the first of them {next(iter(failed)).name}: see above"
        )


def _stop(*_: object) -> NoReturn:
    raise Stopped("Stopped by SIGTERM; the same command continues where it stopped.")


if __name__ == "__main__":
    sys.exit(run_command(main))
