"""Former paths of parameters, so that older runs, folders and configs keep working.

Early versions had MBTF beside the rest of a fusion: ``fusion/mbtf/…`` and ``fusion/tokens/…``.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax

_PARTS = {"conv": "stf", "mix": "stf", "out": "stf", "first": "mlp", "second": "mlp"}  # after MBTF, by layer


def current_paths(saved: Iterable[str]) -> dict[str, str]:
    """Returns the saved paths of a model's parameters by today's paths."""
    saved = list(saved)
    has_mbtf = any(path.startswith("fusion/mbtf/") for path in saved)

    def current(path: str) -> str:
        if path.startswith("fusion/mbtf/"):
            return path.replace("fusion/", "fusion/connector/", 1)
        if not path.startswith("fusion/tokens/"):
            return path
        part = _PARTS.get(path.split("/")[2]) if has_mbtf else None
        return path.replace("tokens/", f"connector/{part}/" if part else "connector/", 1)

    return {current(path): path for path in saved}


def former_path(path: str) -> str:
    """Returns the path that a parameter had before."""
    path = re.sub("^fusion/connector/mbtf/", "fusion/mbtf/", path)
    return re.sub("^fusion/connector/((stf|mlp)/)?", "fusion/tokens/", path)


def path_matches(pattern: str | re.Pattern[str], path: str) -> bool:
    """Whether a regular expression of a config matches all of a path, or of the path that it had before."""
    return bool(re.fullmatch(pattern, path) or re.fullmatch(pattern, former_path(path)))


def rename_keys(tree: Any, names: Mapping[str, str]) -> Any:
    """Renames keys of the dicts of arrays in a tree, like that of an optimizer's moments."""
    return jax.tree.map(
        lambda leaf: {names.get(key, key): value for key, value in leaf.items()} if isinstance(leaf, dict) else leaf,
        tree,
        is_leaf=lambda leaf: isinstance(leaf, dict),
    )
