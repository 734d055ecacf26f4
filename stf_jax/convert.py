"""Import, export and verify weights: ``python -m stf_jax.convert import SOURCE --to=DIR``, ``export``, ``verify``."""

import argparse
import sys

from stf_jax.cli import Parser, path, require, run_command
from stf_jax.config import UserError
from stf_jax.files import local_copy

# Each command imports its implementation, which takes seconds, after parsing the arguments.


def main(argv: list[str]) -> None:
    """Imports weights of other programs, exports a model for them, or verifies an export."""
    parser = Parser(prog="python -m stf_jax.convert", description="Exchange weights with other programs.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)

    importer = commands.add_parser("import", help="import weights", description="Import weights of other programs.")
    importer.add_argument(
        "source",
        type=path,
        help="folder or file: Hugging Face, LLaVA, LLaVA-STF, PEFT or GGUF; the format is detected from its contents",
    )
    importer.add_argument("--to", type=path, required=True, help="folder to write, for config.init_from")
    importer.add_argument("--vision", type=path, metavar="SOURCE", help="use the vision tower of this folder instead")
    importer.add_argument("--base", type=path, metavar="SOURCE", help="the model to merge a LoRA adapter into")
    importer.add_argument("--dtype", choices=["", *_TYPES], default="", help="data type to write (default: as stored)")
    importer.add_argument(
        "--family", action="append", default=[], metavar="MODULE:FAMILY",
        help="family of the vision tower or the language model, if it is your own (may be repeated)",
    )  # fmt: skip
    importer.set_defaults(run=_import)

    exporter = commands.add_parser("export", help="export weights", description="Export weights for other programs.")
    exporter.add_argument("checkpoint", type=path, help="workdir of a run, or folder of imported weights")
    exporter.add_argument("--to", type=path, required=True, help="folder to write")
    exporter.add_argument(
        "--format", choices=["hf", "llava-stf", "native", "peft"], required=True,
        help="hf: for PyTorch and transformers; llava-stf: for the authors' code; native: for config.init_from; peft: "
        "the LoRA adapters and the fusion of a run, for the hf export of the weights that it started from",
    )  # fmt: skip
    exporter.add_argument("--dtype", choices=["", *_TYPES], default="", help="data type to write (default: as stored)")
    exporter.add_argument("--adapter-only", action="store_true", help="llava-stf: MBTF and STF only, mm_projector.bin")
    exporter.add_argument(
        "--only", default="", metavar="PATTERN", help="native: parameters to write; '(vision|llm)/.*'"
    )
    exporter.set_defaults(run=_export)

    verifier = commands.add_parser(
        "verify",
        help="compare the answers of an export and its model",
        description="Compare the answers of an export and its model.",
    )
    verifier.add_argument("checkpoint", type=path, help="the model that was exported")
    verifier.add_argument("export", type=path, help="folder written by export --format=hf; its code is executed")
    verifier.add_argument("--questions", type=int, default=16, help="questions on held-out scenes (%(default)s)")
    verifier.add_argument("--tokens", type=int, default=16, help="maximum new tokens per answer (%(default)s)")
    verifier.set_defaults(run=_verify)

    options = parser.parse_args(argv)
    options.run(options)


_TYPES = ("float32", "bfloat16", "float16")


def _import(options: argparse.Namespace) -> None:
    for source in filter(None, (options.source, options.vision, options.base)):
        require(source)
    from stf_jax.weights.imports import import_weights, summarize

    vision, base = (str(folder) if folder else "" for folder in (options.vision, options.base))
    report = import_weights(str(options.source), options.to, vision, options.dtype, options.family, base)
    print(summarize(report, options.to))


def _export(options: argparse.Namespace) -> None:
    for option, value, required in (
        ("adapter-only", options.adapter_only, "llava-stf"),
        ("only", options.only, "native"),
    ):
        if value and options.format != required:
            raise UserError(f"--{option} requires --format={required}.")
    require(options.checkpoint)
    from stf_jax.weights.export_hf import export_hf
    from stf_jax.weights.export_peft import export_peft
    from stf_jax.weights.export_stf import export_llava_stf
    from stf_jax.weights.exports import export_native, summarize

    if options.format == "hf":
        report = export_hf(options.checkpoint, options.to, options.dtype)
    elif options.format == "peft":
        report = export_peft(options.checkpoint, options.to, options.dtype)
    elif options.format == "llava-stf":
        report = export_llava_stf(options.checkpoint, options.to, options.dtype, options.adapter_only)
    else:
        report = export_native(options.checkpoint, options.to, options.dtype, options.only or ".*")
    print(summarize(report, options.to))


def _verify(options: argparse.Namespace) -> None:
    for folder in (options.checkpoint, options.export):
        require(folder)
    from stf_jax.evals.verify import format_table, verify

    pairs = verify(options.checkpoint, local_copy(options.export), options.questions, options.tokens)
    print(format_table(pairs))
    if any(pair.jax != pair.pytorch for pair in pairs):
        raise UserError(f"{options.export} and {options.checkpoint} give different answers.")


if __name__ == "__main__":
    sys.exit(run_command(main))
