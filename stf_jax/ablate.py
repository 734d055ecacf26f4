"""Run an ablation study: ``python -m stf_jax.ablate --config=configs/ablations/fusions.py --out=DIR``."""

import argparse
import pathlib
import shlex
import signal
import sys
from typing import NoReturn

import ml_collections
from etils import epath

from stf_jax import cli
from stf_jax.cli import Parser, local_path, run_command
from stf_jax.config import RunFailed, Stopped, UserError, short_message
from stf_jax.environment import suppress_stderr
from stf_jax.evals.files import RESULTS
from stf_jax.files import as_user_error, make_folder
from stf_jax.planning.topology import check_topology
from stf_jax.studies.study import default_study, make_cells, read_study
from stf_jax.table import format_table

HELP = """Train variants of a model with several seeds, and report how they differ.

  python -m stf_jax.ablate --config=FILE[:key=value,...] --out=DIR [--config.KEY=VALUE ...]

  --config=FILE        a Python file with get_config(arg): one of configs/ablations/
  --config.KEY=VALUE   change the study: --config.seeds='(0,1)' --config.baseline=mlp
  --out=DIR            the folder for report.md, report.html, report.json and PNGs
  --cells=DIR          the folder for runs; studies with the same one share equal runs (default: OUT/cells)
  --jobs=N             runs at once (default: one per GPU, or one per CPU as memory permits)
  --topology=NAME      run nothing; print the hours of the training runs on that machine, as stf_jax.plan
  --price-per-chip-hour=X   with --topology: also print what they cost
  -v                   also show the log messages of libraries

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
    own.add_argument("--topology")
    own.add_argument("--price-per-chip-hour", type=float, default=0.0)
    options, rest = own.parse_known_args(argv)
    if argv and not rest:
        raise UserError("--config is missing; see --help.")
    config = cli.parse(rest, HELP, workdir=False, defaults=default_study)[1]
    if not 0 <= options.price_per_chip_hour < float("inf"):
        raise UserError("--price-per-chip-hour must be finite and at least 0; see --help.")
    if options.price_per_chip_hour and not options.topology:
        raise UserError("--price-per-chip-hour has no effect without --topology; see --help.")
    if options.topology:
        return _plan(config, options)
    if options.out is None:
        raise UserError("--out is missing; see --help.")
    if options.jobs < 0:
        raise UserError(f"--jobs={options.jobs} must be at least 1; omit it for the default.")
    # These take seconds to import.
    from stf_jax.studies.cost import measure_cost
    from stf_jax.studies.outcomes import read_losses, read_outcomes
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
        findings = compute_findings(study, read_outcomes(done), read_losses(done), costs)
        with as_user_error(epath.Path(options.out)):
            write_report(findings, done, failed, shlex.join(["python", "-m", "stf_jax.ablate", *argv]), options.out)
        print("\n".join(strip_markup(verdict) for verdict in format_verdicts(findings)))
        print(f"report.md, report.html, report.json and the images are in {options.out}")
    if failed:
        raise RunFailed(
            f"{len(failed)} of {len(cells)} runs failed, the first of them {next(iter(failed)).name}: see above"
        )


def _plan(config: ml_collections.ConfigDict, options: argparse.Namespace) -> None:
    """Prints what the training runs of a study take on a machine."""
    check_topology(options.topology)
    study = read_study(config)
    folder = options.cells or (options.out or pathlib.Path()) / "cells"
    with suppress_stderr():  # the compilers log that they find no device
        import jax

        from stf_jax.planning.topology import topology_devices
        from stf_jax.studies.planned import plan_study
    jax.config.update("jax_platforms", "cpu")  # ignore the devices of this machine
    devices, cells = topology_devices(options.topology), make_cells(study, folder)
    rows = plan_study(
        study,
        cells,
        devices,
        options.price_per_chip_hour,
        on_stage=lambda name, report: print(
            f"{name}: {report['step_seconds_estimate']:.2f} s per step, bound by {report['bound']}", file=sys.stderr
        ),
    )
    print(format_table(rows))
    evaluations = [cell for cell in cells if cell.source_run is not None]
    print(
        f"\nTimes are estimates for {options.topology}, with every row data.max_length long. "
        f"{len(evaluations)} evaluations that train nothing are not included, nor those at the end of runs."
    )


def _stop(*_: object) -> NoReturn:
    raise Stopped("Stopped by SIGTERM; the same command continues where it stopped.")


if __name__ == "__main__":
    sys.exit(run_command(main, compilers=any(argument.startswith("--topology") for argument in sys.argv)))
