"""Benchmarks by name, and groups of them."""

from collections.abc import Sequence

from etils import epath

from stf_jax.config import UserError, did_you_mean
from stf_jax.evals.benchmark import Benchmark
from stf_jax.files import to_path
from stf_jax.registry import Registry

ALL = "all"  # the group of every benchmark
BENCHMARKS: Registry[type[Benchmark]] = Registry("benchmark", "stf_jax.evals.benchmarks")


def benchmark_groups() -> dict[str, list[str]]:
    """Returns the names of the package's benchmarks by group."""
    groups: dict[str, list[str]] = {}
    for name, kind in BENCHMARKS.known.items():
        for group in kind.groups:
            groups.setdefault(group, []).append(name)
    return groups | {ALL: [*BENCHMARKS.known]}


def find_benchmarks(names: Sequence[str]) -> list[type[Benchmark]]:
    """Returns the classes of benchmarks, each only once.

    Args:
      names: of the package's benchmarks or groups of them; or ``package.module:Class`` of your own.

    Raises:
      UserError: an unknown name, or something that is not a benchmark.
    """
    groups = benchmark_groups()
    members = dict.fromkeys(member for name in names for member in groups.get(name, [name]))
    return [_find_benchmark(name) for name in members]


def open_benchmarks(names: Sequence[str], data: str, limit: int = 0) -> list[Benchmark]:
    """Reads the questions and labels of benchmarks.

    Args:
      names: as for :func:`find_benchmarks`.
      data: the folder with the evaluation files, for :class:`Benchmark`; the embedded benchmarks need none.
      limit: the number of questions of each benchmark to keep, the first ones; 0: all.

    Raises:
      UserError: as for :func:`find_benchmarks`; files that are missing, malformed or inconsistent.
    """
    kinds = find_benchmarks(names)
    for kind in kinds:
        if kind.folders and not data:
            raise UserError(
                f"Benchmark {kind.name} needs the folder of the evaluation files: --data, or config.eval.data."
            )
    folder = to_path(data) if data else epath.Path()
    benchmarks = [kind(folder) for kind in kinds]
    for benchmark in benchmarks:
        if limit:
            benchmark.limit(limit)
    return benchmarks


def _find_benchmark(name: str) -> type[Benchmark]:
    if ":" not in name and name not in BENCHMARKS.known:
        raise UserError(f"Unknown benchmark {name!r}; {did_you_mean(name, [*BENCHMARKS.known, *benchmark_groups()])}")
    found = BENCHMARKS.find(name)
    if not isinstance(found, type) or not issubclass(found, Benchmark):
        raise UserError(f"Benchmark {name} is not a subclass of stf_jax.evals.benchmark.Benchmark.")
    return found
