"""Compare results of methods: ``python -m stf_jax.compare results/mlp results/stf --out=DIR``."""

import shlex
import sys

from etils import epath

from stf_jax.cli import Parser, local_path, run_command
from stf_jax.config import UserError
from stf_jax.files import as_user_error, make_folder

DESCRIPTION = """Compare results of methods on the same questions, with intervals, costs and hard questions.

RESULTS are output folders of stf_jax.evaluate, main or ablate, or sample files (or their folders) that lmms-eval writes
with --log_samples. Each is PATH or NAME=PATH; results with one given NAME, and folders METHOD/seed_N, are seeds of one
method. OUT gets compare.md, compare.html (one file that works without network), compare.json and the plots
(docs/comparing.md).
"""


def main(argv: list[str]) -> None:
    """Compares results, writes the report and prints how methods differ from the baseline."""
    parser = Parser(prog="python -m stf_jax.compare", description=DESCRIPTION)
    parser.add_argument("results", nargs="+", metavar="RESULTS", help="results of one method: PATH or NAME=PATH")
    parser.add_argument("--out", type=local_path, required=True, metavar="DIR", help="output folder")
    parser.add_argument("--baseline", default="", metavar="NAME", help="what the others are compared with (the first)")
    parser.add_argument("--resized", default="", metavar="NAME", help="the method that defines hard questions")
    parser.add_argument(
        "--blank",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="results of method NAME with blank images; may be repeated",
    )
    parser.add_argument(
        "--margin", type=float, default=1.0, help="points below which methods count as equal (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    if not options.margin > 0:
        raise UserError("--margin must be above 0 points.")
    # These take a second to import.
    from stf_jax.comparisons.comparison import compare, read_results, read_run, split_name
    from stf_jax.comparisons.report import NAME, format_verdicts, write_report
    from stf_jax.studies.page import strip_markup

    blank = {}
    for argument in options.blank:
        name, place = split_name(argument)
        if not name:
            raise UserError(f"--blank={argument} names no method: write --blank=NAME=PATH.")
        blank[name] = read_run(place)
    comparison = compare(
        read_results(options.results),
        baseline=options.baseline,
        resized=options.resized,
        blank=blank,
        margin=options.margin,
    )
    make_folder(epath.Path(options.out))
    with as_user_error(epath.Path(options.out)):
        write_report(comparison, shlex.join(["python", "-m", "stf_jax.compare", *argv]), options.out)
    print("\n".join(strip_markup(verdict) for verdict in format_verdicts(comparison)))
    print(f"{NAME}.md, {NAME}.html, {NAME}.json and the plots are in {options.out}")


if __name__ == "__main__":
    sys.exit(run_command(main))
