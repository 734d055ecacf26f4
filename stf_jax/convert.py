"""Exchange weights: ``python -m stf_jax.convert import SOURCE --to=DIR``, ``export``, ``verify``."""

import argparse
import sys

from etils import epath

from stf_jax.config import UserError
from stf_jax.runtime.cli import Parser, door
from stf_jax.runtime.files import fetched
from stf_jax.weights.export_hf import export_hf
from stf_jax.weights.export_stf import export_llava_stf
from stf_jax.weights.exports import export_native
from stf_jax.weights.exports import summary as summary_of_export
from stf_jax.weights.imports import import_weights, summary
from stf_jax.weights.verify import table, verify


def main(argv: list[str]) -> None:
    """Reads weights of others into a folder to start from, or writes a run's weights for others."""
    parser = Parser(prog="python -m stf_jax.convert", description="Exchange weights with other programs.")
    verbs = parser.add_subparsers(dest="verb", required=True, parser_class=Parser)

    take = verbs.add_parser("import", help="read weights of others", description="Read weights of others.")
    take.add_argument("source", help="folder or file: Hugging Face, LLaVA, LLaVA-STF or GGUF, told by what is in it")
    take.add_argument("--to", type=epath.Path, required=True, help="folder to write, for config.init_from")
    take.add_argument("--vision", default="", metavar="SOURCE", help="take the vision tower from this folder instead")
    take.add_argument("--dtype", choices=["", *_TYPES], default="", help="type to write in; without it, as stored")
    take.set_defaults(run=lambda o: print(summary(import_weights(o.source, o.to, o.vision, o.dtype), o.to)))

    give = verbs.add_parser("export", help="write weights for others", description="Write weights for others.")
    give.add_argument("checkpoint", type=epath.Path, help="workdir of a run, or a folder that was imported")
    give.add_argument("--to", type=epath.Path, required=True, help="folder to write")
    give.add_argument(
        "--format", choices=["hf", "llava-stf", "native"], required=True,
        help="hf: for PyTorch and transformers; llava-stf: for the authors' code; native: for config.init_from",
    )  # fmt: skip
    give.add_argument("--dtype", choices=["", *_TYPES], default="", help="type to write in; without it, as stored")
    give.add_argument("--adapter-only", action="store_true", help="llava-stf: MBTF and STF alone, as mm_projector.bin")
    give.add_argument("--only", default="", metavar="PATTERN", help="native: parameters to write, '(vision|llm)/.*'")
    give.set_defaults(run=_export)

    check = verbs.add_parser("verify", help="ask an export and its model alike", description="Ask both alike.")
    check.add_argument("checkpoint", type=epath.Path, help="what was exported")
    check.add_argument("export", type=fetched, help="folder that export --format=hf wrote; its code is run")
    check.add_argument("--questions", type=int, default=16, help="on held-out scenes")
    check.add_argument("--tokens", type=int, default=16, help="new tokens an answer, at most")
    check.set_defaults(run=_verify)

    options = parser.parse_args(argv)
    options.run(options)


_TYPES = ("float32", "bfloat16", "float16")


def _export(options: argparse.Namespace) -> None:
    for option, given, form in (("adapter-only", options.adapter_only, "llava-stf"), ("only", options.only, "native")):
        if given and options.format != form:
            raise UserError(f"--{option} goes with --format={form}.")
    what, dtype = (options.checkpoint, options.to), options.dtype
    if options.format == "hf":
        report = export_hf(*what, dtype)
    elif options.format == "llava-stf":
        report = export_llava_stf(*what, dtype, options.adapter_only)
    else:
        report = export_native(*what, dtype, options.only or ".*")
    print(summary_of_export(report, options.to))


def _verify(options: argparse.Namespace) -> None:
    pairs = verify(options.checkpoint, options.export, options.questions, options.tokens)
    print(table(pairs))
    if any(pair.ours != pair.theirs for pair in pairs):
        raise UserError(f"{options.export} does not answer as {options.checkpoint} does.")


if __name__ == "__main__":
    sys.exit(door(main))
