"""Finds components by name: those of the package, and your own as ``package.module:Thing``.

A component of the package is declared in the file that implements it, in a dict ``COMPONENTS`` of names. A component
from outside is any object of any module that Python can import. Nothing is imported before it is asked for.
"""

import functools
import importlib
import importlib.util
import os
import pathlib
import pkgutil
import re
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from stf_jax.config import UserError, did_you_mean

_Component = TypeVar("_Component")
_OUTSIDE = re.compile(r"\w+(\.\w+)*:\w+")


class Registry(Generic[_Component]):
    """The components of one kind."""

    def __init__(self, kind: str, package: str) -> None:
        """``kind`` is named in messages; ``package``: the package whose modules declare ``COMPONENTS``."""
        self.kind, self._package = kind, package

    @functools.cached_property
    def known(self) -> Mapping[str, _Component]:
        """The components of the package by name."""
        found: dict[str, _Component] = {}
        for module in pkgutil.iter_modules(importlib.import_module(self._package).__path__):
            if not module.name.endswith("_torch"):  # the same for PyTorch, for exports
                found |= getattr(importlib.import_module(f"{self._package}.{module.name}"), "COMPONENTS", {})
        return found

    def find(self, name: str) -> _Component:
        """Returns the component of that name. Raises UserError for a name or a module that does not exist."""
        if is_outside(name):
            return load_object(name, self.kind)
        if name not in self.known:
            raise UserError(f"Unknown {self.kind} {name!r}; {did_you_mean(name, self.known)}")
        return self.known[name]


def is_outside(name: str) -> bool:
    """Whether a name is of the form ``package.module:Thing`` (a bucket's address is not)."""
    return ":" in name and "://" not in name


def load_object(name: str, kind: str) -> Any:
    """Imports ``package.module:Thing``. Raises UserError if there is no such module or thing."""
    if not _OUTSIDE.fullmatch(name):
        raise UserError(f"Unknown {kind} {name!r}; one from outside is named package.module:Thing.")
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists, and imports one that does not
        raise UserError(f"Unknown {kind} {name!r}: no module {error.name}; is its folder on PYTHONPATH?") from None
    if not hasattr(module, attribute):
        raise UserError(f"Unknown {kind} {name!r}: module {module_name} has no {attribute}.")
    return getattr(module, attribute)


def refuse_code_in(folder: os.PathLike[str] | str, values: Any) -> None:
    """Raises UserError if a component's module is inside ``folder``: opening a model must not run code from its folder.

    Imports nothing. Call it with what a folder's files say, plain data that may name components anywhere, before
    :meth:`Registry.find`.
    """
    if isinstance(values, Mapping):
        values = list(values.values())
    if isinstance(values, list | tuple):
        for value in values:
            refuse_code_in(folder, value)
    elif isinstance(values, str) and _OUTSIDE.fullmatch(values):
        _refuse_module_in(folder, values)


def _refuse_module_in(folder: os.PathLike[str] | str, name: str) -> None:
    top, *rest = name.partition(":")[0].split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return  # find() reports it
    for place in [] if spec is None else spec.submodule_search_locations or [spec.origin or ""]:
        if pathlib.Path(place, *rest).resolve().is_relative_to(pathlib.Path(folder).resolve()):
            raise UserError(
                f"{folder} names {name}, whose code is in that folder. Opening a model never runs code from its "
                "folder; if you trust it, move it elsewhere on PYTHONPATH."
            )
