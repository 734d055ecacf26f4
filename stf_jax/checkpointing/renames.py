"""Parameter paths of before they changed, so that older runs, folders and configs go on working."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax

_RENAMES = (  # in order; version 0.1.0 had MBTF beside the rest of a fusion
    (re.compile("^fusion/mbtf/"), "fusion/connector/mbtf/"),
    (re.compile("^fusion/tokens/"), "fusion/connector/"),
)


def current_path(path: str) -> str:
    """Returns today's path of a parameter."""
    for pattern, replacement in _RENAMES:
        path = pattern.sub(replacement, path)
    return path


def former_path(path: str) -> str:
    """Returns the path that a parameter had before; the inverse of :func:`current_path`."""
    if path.startswith("fusion/connector/mbtf/"):
        return path.replace("connector/", "", 1)
    return path.replace("fusion/connector/", "fusion/tokens/", 1)


def find_renames(saved: Iterable[str]) -> dict[str, str]:
    """Returns the saved paths by today's path, of those that changed."""
    return {current: path for path in saved if (current := current_path(path)) != path}


def rename_keys(tree: Any, names: Mapping[str, str]) -> Any:
    """Renames keys of the dicts of arrays in a tree, like that of an optimizer's moments."""
    return jax.tree.map(
        lambda leaf: {names.get(key, key): value for key, value in leaf.items()} if isinstance(leaf, dict) else leaf,
        tree,
        is_leaf=lambda leaf: isinstance(leaf, dict),
    )
