"""Both stages of the paper, one after the other: configs/pretrain.py, then configs/finetune.py and its benchmarks.

    python -m stf_jax.main --config=configs/paper.py --workdir=DIR

Weights, data and evaluation files are expected where docs/reproduce.md puts them.
"""

import pathlib
import runpy
from typing import Any

import ml_collections

from stf_jax.config import default_config, flatten, parse_arg

_PLACES: dict[str, dict[str, Any]] = {
    "pretrain": {"init_from": "weights/base", "data": {"annotations": "data/lcs558k", "images": ""}},
    "finetune": {
        "data": {"annotations": "data/mix665k", "images": ""},
        "eval": {"benchmarks": ("paper", "ocr", "general"), "data": "eval"},
    },
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The recipes of both stages; ``vision=NAME`` and ``llm=NAME`` select other backbones."""
    arg = parse_arg(arg, vision="", llm="")
    config = default_config()
    config.model.update(vision=arg.vision, llm=arg.llm)
    config.run = tuple(_PLACES)
    config.stages = {name: _read_changes(name) for name in config.run}
    for name, places in _PLACES.items():
        config.stages[name].update(places)
    return config


def _read_changes(name: str) -> dict[str, Any]:
    """Reads the keys in which a stage's own config file differs from the defaults."""
    stage = runpy.run_path(str(pathlib.Path(__file__).with_name(f"{name}.py")))["get_config"]()
    defaults = flatten(default_config().to_dict())
    changes: dict[str, Any] = {}
    for key, value in flatten(stage.to_dict()).items():
        if key != "name" and value != defaults.get(key):
            *groups, last = key.split(".")
            node = changes
            for group in groups:
                node = node.setdefault(group, {})
            node[last] = value
    return changes
