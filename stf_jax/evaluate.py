"""Evaluate a model: ``python -m stf_jax.evaluate --checkpoint=DIR --benchmark=NAME --data=DIR --out=DIR``."""

import argparse
import os
import pathlib
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

from stf_jax.cli import Parser, add_host_arguments, add_model_arguments, path, path_text, require, run_command
from stf_jax.config import MeshConfig, UserError
from stf_jax.evals.benchmark import Benchmark
from stf_jax.evals.registry import BENCHMARKS, benchmark_groups, open_benchmarks
from stf_jax.files import write_json

DESCRIPTION = """Evaluate a model on benchmarks, or score an existing answer file.

Questions, prompts and decoding are LLaVA's, read from LLaVA's own files in their own layout, or lmms-eval's, read from
the Parquet files of its data sets (docs/evaluating.md).
Answers are written as they arrive. After an interruption, the same command continues where it stopped. OUT gets
answers.jsonl, results.json with metrics and protocol, and the file for the benchmark's server if its labels are not
public.
"""


def main(argv: list[str]) -> None:
    """Evaluates a model or scores answers, and prints the results."""
    parser = Parser(prog="python -m stf_jax.evaluate", description=DESCRIPTION)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=path, help="a run's workdir, an imported folder, or an export")
    source.add_argument("--answers", type=path, metavar="FILE", help="score these answers; no model is needed")
    names = f"{', '.join(BENCHMARKS.known)}; a group: {', '.join(benchmark_groups())}; several separated by commas"
    parser.add_argument("--benchmark", required=True, metavar="NAME", help=names)
    parser.add_argument(
        "--data",
        type=path_text,
        default="",
        metavar="DIR",
        help="folder of the evaluation files, for all benchmarks or for one",
    )
    parser.add_argument(
        "--out", type=path, required=True, metavar="DIR", help="output folder; several benchmarks get one folder each"
    )
    parser.add_argument("--limit", type=int, default=0, help="evaluate only the first N questions (default: all)")
    parser.add_argument("--blank", action="store_true", help="make all images blank, to see what can be guessed")
    parser.add_argument("--batch", type=int, default=16, help="questions per batch (default: %(default)s)")
    add_model_arguments(parser)
    add_host_arguments(parser)
    options = parser.parse_args(argv)
    if options.limit < 0 or options.batch < 1:
        raise UserError("--limit must be at least 0 and --batch at least 1.")
    benchmarks = open_benchmarks(options.benchmark.split(","), options.data, options.limit)
    several = len(benchmarks) > 1
    if options.answers is not None and several:
        raise UserError("--answers can only be scored for one benchmark; name that one.")
    if options.blank:
        if options.answers is not None:
            raise UserError("--blank asks a model; it cannot change the answers in a file.")
        for benchmark in benchmarks:
            benchmark.hide_images()
    require(options.checkpoint if options.answers is None else options.answers)
    from stf_jax.evals.runner import RESULTS, format_results  # takes seconds to import

    results = []
    for result in _evaluate_or_score(options, benchmarks, several):
        if result:  # only host 0 has results
            print(format_results(result))
            results.append(result)
    if results:
        if several:
            write_json(options.out / RESULTS, results)
        print(f"{RESULTS} and all other files are in {options.out}")


def _evaluate_or_score(
    options: argparse.Namespace, benchmarks: Sequence[Benchmark], several: bool
) -> Iterator[dict[str, Any]]:
    from stf_jax.evals.runner import check_images, evaluate, score
    from stf_jax.inference.decoding import Sampling
    from stf_jax.inference.loading import load_generator
    from stf_jax.models.reducers.base import find_reducer
    from stf_jax.parallel.hosts import join
    from stf_jax.parallel.mesh import make_mesh

    if options.answers is not None:
        yield score(benchmarks[0], options.answers, options.out)
        return
    if options.reduce:
        find_reducer(options.reduce)  # before all images are opened, which may take minutes
    join(options.coordinator, options.processes, options.process)
    check_images(benchmarks)
    mesh = make_mesh(MeshConfig(*options.mesh))
    chosen = options.reduce, options.keep, options.tokens, options.tolerance
    generator, saved = load_generator(options.checkpoint, mesh, options.precision, *chosen)
    name = pathlib.Path(os.path.abspath(options.checkpoint)).name  # abspath: a name even for "."
    origin = {"checkpoint": str(options.checkpoint), "step": saved.step}
    sampling = Sampling(options.temperature, options.top_p, options.top_k, options.seed)
    for benchmark in benchmarks:
        out = options.out / benchmark.name if several else options.out
        yield evaluate(benchmark, generator, out, name, origin, rows=options.batch, sampling=sampling)


class _Callable(types.ModuleType):
    """The command's module, which is also the Python API's function: both are named ``stf_jax.evaluate``."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from stf_jax.api import evaluate

        return evaluate(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    sys.exit(run_command(main))
