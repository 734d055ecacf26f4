"""What the studies of configs/ablations/ share: configs/demo.py, so short that dozens of runs take hours."""

import ml_collections

from stf_jax.config import parse_arg
from stf_jax.studies.study import default_study

_SHORTER = ("stages.pretrain.steps=200", "stages.finetune.steps=400", "data.scenes.size=6000")


def miniature(arg: str | None, title: str, seeds: int = 3) -> ml_collections.ConfigDict:
    """A study of variants of configs/demo.py, to be filled; ``arg`` is the config file's (``seeds=N``)."""
    arg = parse_arg(arg, seeds=seeds)
    config = default_study()
    config.update(title=title, base="configs/demo.py", common=_SHORTER, seeds=tuple(range(arg.seeds)))
    return config.unlock()


def tokens(count: int) -> tuple[str, ...]:
    """Overrides for pictures of ``count`` tokens: rows so long that as much text stands beside them whatever it is.

    So all variants see the same pictures in the same steps: four captions a row in the first stage, a conversation in
    the second.
    """
    return (f"stages.pretrain.data.max_length={124 + 4 * count}", f"stages.finetune.data.max_length={199 + count}")
