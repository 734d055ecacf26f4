"""Prepare data: ``python -m stf_jax.prepare --annotations=FILE.json --images=DIR --out=DIR``."""

import os
import sys

from stf_jax.config import UserError
from stf_jax.runtime.cli import Parser, door, path_text

DESCRIPTION = """Check LLaVA's JSON and images, and write a TFDS data set that training reads by index.

Rows that cannot be trained on are left out, each with its reason in report.json. A run that was interrupted goes on
where it was when the same command is given again. Train on the result with --config.data.annotations=OUT.
"""


def main(argv: list[str]) -> None:
    """Prepares a data set and prints what it came to."""
    parser = Parser(prog="python -m stf_jax.prepare", description=DESCRIPTION)
    parser.add_argument(
        "--annotations",
        type=path_text,
        action="append",
        required=True,
        metavar="FILE.json",
        help="an array, or a row a line; may be repeated",
    )
    parser.add_argument(
        "--images", type=path_text, required=True, metavar="DIR", help="folder that the image paths start from"
    )
    parser.add_argument("--out", type=path_text, required=True, metavar="DIR", help="folder of the data set")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; the cores (%(default)s)")
    parser.add_argument("--limit", type=int, default=0, help="rows to read; all")
    parser.add_argument("--max-side", type=int, default=0, help="pixels that larger images are shrunk to; kept as is")
    parser.add_argument("--strict", action="store_true", help="end at the first row that would be dropped")
    parser.add_argument(
        "--tokenizer", type=path_text, default="", metavar="DIR", help="counts tokens; without, they are estimated"
    )
    parser.add_argument("--template", default="v1", help="conversation template that is counted (%(default)s)")
    parser.add_argument("--image-tokens", type=int, default=144, help="tokens per image takes (%(default)s)")
    parser.add_argument(
        "--max-length", type=int, default=2048, help="tokens; longer rows are dropped (%(default)s); 0: none is"
    )
    options = parser.parse_args(argv)
    for name, least in {"workers": 1, "limit": 0, "max_side": 0, "image_tokens": 1, "max_length": 0}.items():
        if getattr(options, name) < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}.")
    from stf_jax.data.preparing import HISTOGRAMS, REPORT, Options, prepare  # which takes seconds

    options.annotations = tuple(options.annotations)
    report = prepare(Options(**vars(options)))
    print(report.summary())
    print(f"The data set, {REPORT} and {HISTOGRAMS} are in {options.out}")


if __name__ == "__main__":
    sys.exit(door(main))
