"""Benchmarks by name."""

from collections.abc import Sequence

from etils import epath

from stf_jax.config import UserError, did_you_mean
from stf_jax.evals.benchmark import Benchmark
from stf_jax.files import to_path
from stf_jax.registry import Registry

BENCHMARKS: Registry[type[Benchmark]] = Registry("benchmark", "stf_jax.evals.benchmarks")


def open_benchmarks(names: Sequence[str], data: str, limit: int = 0) -> list[Benchmark]:
    """Reads the questions and labels of benchmarks.

    Args:
      names: of the package's benchmarks, where ``all`` stands for every one; or ``package.module:Class`` of your own.
      data: the folder with LLaVA's evaluation files, for :class:`Benchmark`; the embedded benchmarks need none.
      limit: the number of questions of each benchmark to keep, the first ones; 0: all.

    Raises:
      UserError: an unknown name; files that are missing, malformed or inconsistent.
    """
    kinds = [*BENCHMARKS.known.values()] if "all" in names else [_find_benchmark(name) for name in names]
    for kind in kinds:
        if kind.folders and not data:
            raise UserError(
                f"Benchmark {kind.name} needs the folder of LLaVA's evaluation files: --data, or config.eval.data."
            )
    folder = to_path(data) if data else epath.Path()
    benchmarks = [kind(folder) for kind in kinds]
    for benchmark in benchmarks:
        if limit:
            benchmark.limit(limit)
    return benchmarks


def _find_benchmark(name: str) -> type[Benchmark]:
    if ":" not in name and name not in BENCHMARKS.known:
        raise UserError(f"Unknown benchmark {name!r}; {did_you_mean(name, [*BENCHMARKS.known, 'all'])}")
    found = BENCHMARKS.find(name)
    if not isinstance(found, type) or not issubclass(found, Benchmark):
        raise UserError(f"Benchmark {name} is not a subclass of stf_jax.evals.benchmark.Benchmark.")
    return found
