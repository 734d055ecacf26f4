"""Exchange weights: ``python -m stf_jax.convert import SOURCE --to=DIR``, ``export``, ``verify``."""

import argparse
import sys

from stf_jax.config import UserError
from stf_jax.runtime.cli import Parser, door, path, require
from stf_jax.runtime.files import fetched

# What does the work takes seconds to import; so each command imports its own when its arguments are read.


def main(argv: list[str]) -> None:
    """Reads weights of others into a folder to start from, or writes a run's weights for others."""
    parser = Parser(prog="python -m stf_jax.convert", description="Exchange weights with other programs.")
    verbs = parser.add_subparsers(dest="verb", required=True, parser_class=Parser)

    take = verbs.add_parser("import", help="read weights of others", description="Read weights of others.")
    take.add_argument(
        "source",
        type=path,
        help="folder or file: Hugging Face, LLaVA, LLaVA-STF or GGUF; which, is seen from what is in it",
    )
    take.add_argument("--to", type=path, required=True, help="folder to write, for config.init_from")
    take.add_argument("--vision", type=path, metavar="SOURCE", help="take the vision tower from this folder instead")
    take.add_argument("--dtype", choices=["", *_TYPES], default="", help="type to write in; without it, as stored")
    take.set_defaults(run=_import)

    give = verbs.add_parser("export", help="write weights for others", description="Write weights for others.")
    give.add_argument("checkpoint", type=path, help="workdir of a run, or a folder that was imported")
    give.add_argument("--to", type=path, required=True, help="folder to write")
    give.add_argument(
        "--format", choices=["hf", "llava-stf", "native"], required=True,
        help="hf: for PyTorch and transformers; llava-stf: for the authors' code; native: for config.init_from",
    )  # fmt: skip
    give.add_argument("--dtype", choices=["", *_TYPES], default="", help="type to write in; without it, as stored")
    give.add_argument("--adapter-only", action="store_true", help="llava-stf: MBTF and STF alone, as mm_projector.bin")
    give.add_argument("--only", default="", metavar="PATTERN", help="native: parameters to write, '(vision|llm)/.*'")
    give.set_defaults(run=_export)

    check = verbs.add_parser("verify", help="ask an export and its model alike", description="Ask both alike.")
    check.add_argument("checkpoint", type=path, help="what was exported")
    check.add_argument("export", type=path, help="folder that export --format=hf wrote; its code is run")
    check.add_argument("--questions", type=int, default=16, help="on held-out scenes")
    check.add_argument("--tokens", type=int, default=16, help="new tokens per answer, at most")
    check.set_defaults(run=_verify)

    options = parser.parse_args(argv)
    options.run(options)


_TYPES = ("float32", "bfloat16", "float16")


def _import(options: argparse.Namespace) -> None:
    for source in filter(None, (options.source, options.vision)):
        require(source)
    from stf_jax.weights.imports import import_weights, summary

    vision = str(options.vision) if options.vision else ""
    print(summary(import_weights(str(options.source), options.to, vision, options.dtype), options.to))


def _export(options: argparse.Namespace) -> None:
    for option, given, form in (("adapter-only", options.adapter_only, "llava-stf"), ("only", options.only, "native")):
        if given and options.format != form:
            raise UserError(f"--{option} goes with --format={form}.")
    require(options.checkpoint)
    from stf_jax.weights.export_hf import export_hf
    from stf_jax.weights.export_stf import export_llava_stf
    from stf_jax.weights.exports import export_native, summary

    what, dtype = (options.checkpoint, options.to), options.dtype
    if options.format == "hf":
        report = export_hf(*what, dtype)
    elif options.format == "llava-stf":
        report = export_llava_stf(*what, dtype, options.adapter_only)
    else:
        report = export_native(*what, dtype, options.only or ".*")
    print(summary(report, options.to))


def _verify(options: argparse.Namespace) -> None:
    for folder in (options.checkpoint, options.export):
        require(folder)
    from stf_jax.weights.verify import table, verify

    pairs = verify(options.checkpoint, fetched(options.export), options.questions, options.tokens)
    print(table(pairs))
    if any(pair.ours != pair.theirs for pair in pairs):
        raise UserError(f"{options.export} does not answer as {options.checkpoint} does.")


if __name__ == "__main__":
    sys.exit(door(main))
