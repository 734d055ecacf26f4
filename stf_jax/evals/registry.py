"""The registry of benchmarks by name."""

from collections.abc import Sequence

from etils import epath

from stf_jax.config import UserError, did_you_mean
from stf_jax.evals.benchmark import Benchmark
from stf_jax.evals.gqa import GQA
from stf_jax.evals.mmbench import MMBench, MMBenchCN
from stf_jax.evals.mme import MME
from stf_jax.evals.pope import POPE
from stf_jax.evals.scenes import Prints, Scenes, Shapes
from stf_jax.evals.scienceqa import ScienceQA
from stf_jax.evals.textvqa import TextVQA
from stf_jax.evals.vizwiz import VizWiz
from stf_jax.evals.vqav2 import VQAv2
from stf_jax.files import to_path

BENCHMARKS: dict[str, type[Benchmark]] = {
    kind.name: kind
    for kind in (GQA, ScienceQA, VQAv2, VizWiz, TextVQA, POPE, MMBench, MMBenchCN, MME, Scenes, Prints, Shapes)
}


def open_benchmarks(names: Sequence[str], data: str, limit: int = 0) -> list[Benchmark]:
    """Reads the questions and labels of benchmarks.

    Args:
      names: keys of :data:`BENCHMARKS`; ``all`` stands for every one.
      data: the folder with LLaVA's evaluation files, for :class:`Benchmark`; the embedded benchmarks need none.
      limit: the number of questions of each benchmark to keep, the first ones; 0: all.

    Raises:
      UserError: an unknown name; files that are missing, malformed or inconsistent.
    """
    names = list(BENCHMARKS) if "all" in names else names
    for name in names:
        if name not in BENCHMARKS:
            raise UserError(f"Unknown benchmark {name!r}; {did_you_mean(name, [*BENCHMARKS, 'all'])}")
        if BENCHMARKS[name].folders and not data:
            raise UserError(
                f"Benchmark {name} needs the folder of LLaVA's evaluation files: --data, or config.eval.data."
            )
    folder = to_path(data) if data else epath.Path()
    benchmarks = [BENCHMARKS[name](folder) for name in names]
    for benchmark in benchmarks:
        if limit:
            benchmark.limit(limit)
    return benchmarks
