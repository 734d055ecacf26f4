"""What the studies of configs/ablations/ share: runs of configs/demo.py, from several seeds."""

import ml_collections

from stf_jax.config import parse_arg
from stf_jax.studies.study import default_study

_COMMON = ("stages.finetune.eval.benchmarks=('scenes','prints')",)


def miniature(arg: str | None, title: str, seeds: int = 5) -> ml_collections.ConfigDict:
    """A study of variants of configs/demo.py, to be filled; ``arg`` is the config file's (``seeds=N``)."""
    arg = parse_arg(arg, seeds=seeds)
    config = default_study()
    config.update(title=title, base="configs/demo.py", common=_COMMON, seeds=tuple(range(arg.seeds)))
    return config.unlock()


def tokens(count: int) -> tuple[str, ...]:
    """Overrides for images of ``count`` tokens: rows so long that the same text stands beside them whatever it is.

    So all variants see the same images in the same steps: a caption a row in the first stage, two conversations in the
    second, of any length that the world has.
    """
    return (f"stages.pretrain.data.max_length={52 + count}", f"stages.finetune.data.max_length={432 + 2 * count}")
