"""Prepare data: ``python -m stf_jax.prepare --annotations=FILE --images=DIR --out=DIR``."""

import os
import sys

from stf_jax.cli import Parser, path_text, run_command
from stf_jax.config import UserError

DESCRIPTION = """Check annotations and images, and write ArrayRecord shards that training reads by index.

Annotations are LLaVA's JSON, Parquet files, save_to_disk folders of datasets, or WebDataset tars.

Unusable rows are dropped, with the reasons in report.json. After an interruption, the same command resumes. Train on
the result with --config.data.annotations=OUT.
"""


def main(argv: list[str]) -> None:
    """Prepares a data set and prints a summary."""
    parser = Parser(prog="python -m stf_jax.prepare", description=DESCRIPTION)
    parser.add_argument(
        "--annotations",
        type=path_text,
        action="append",
        required=True,
        metavar="FILE",
        help="file, folder or pattern of rows; may be repeated",
    )
    parser.add_argument(
        "--images",
        type=path_text,
        default="",
        metavar="DIR",
        help="folder that image paths are relative to (default: images are in the rows)",
    )
    parser.add_argument("--filter", default="", help="keep rows and texts by their ratings, for example relevance>=4")
    parser.add_argument("--out", type=path_text, required=True, metavar="DIR", help="folder of the prepared data set")
    parser.add_argument("--workers", type=int, help=f"processes (default: one per core, {os.cpu_count()})")
    parser.add_argument(
        "--runner",
        default="",
        metavar="NAME",
        help="make the shards with this runner of Apache Beam, such as DataflowRunner",
    )
    parser.add_argument(
        "--beam-options",
        default="",
        metavar="OPTIONS",
        help="options of the runner, such as '--project=mine --region=us-west1'",
    )
    parser.add_argument("--limit", type=int, default=0, help="read only the first N rows (default: all)")
    parser.add_argument(
        "--max-side", type=int, default=0, help="shrink longer sides to N pixels (default: keep images)"
    )
    parser.add_argument("--strict", action="store_true", help="fail at the first row that would be dropped")
    parser.add_argument(
        "--tokenizer", type=path_text, default="", metavar="DIR", help="to count tokens with (default: estimate)"
    )
    parser.add_argument("--template", default="v1", help="conversation template to count tokens with (%(default)s)")
    parser.add_argument("--image-tokens", type=int, default=144, help="tokens per image (%(default)s)")
    parser.add_argument(
        "--max-length", type=int, default=2048, help="drop rows with more tokens (%(default)s); 0: keep all"
    )
    options = parser.parse_args(argv)
    if options.workers is not None and options.runner:
        raise UserError("--workers is for processes of this machine; set the workers of --runner by --beam-options.")
    if options.beam_options and not options.runner:
        raise UserError("--beam-options has no effect without --runner.")
    options.workers = os.cpu_count() if options.workers is None else options.workers
    for name, minimum in {"workers": 1, "limit": 0, "max_side": 0, "image_tokens": 1, "max_length": 0}.items():
        if getattr(options, name) < minimum:
            raise UserError(f"--{name.replace('_', '-')} must be at least {minimum}.")
    from stf_jax.data.preparing import HISTOGRAMS, REPORT, Options, prepare  # takes seconds to import

    options.annotations = tuple(options.annotations)
    report = prepare(Options(**vars(options)))
    print(report.summary())
    print(f"The data set, {REPORT} and {HISTOGRAMS} are in {options.out}")


if __name__ == "__main__":
    sys.exit(run_command(main))
