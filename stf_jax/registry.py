"""Finds components by name: those of the package, and your own as ``package.module:Thing``.

A component of the package is declared in the file that implements it, in a dict ``COMPONENTS`` of names. A component
from outside is any object of any module that Python can import. Nothing is imported before it is asked for.

A component may be a *factory*: a function that has only keyword-only parameters with defaults, and returns the
component. A name may then set them, as ``NAME:key=value,…``.
"""

import functools
import importlib
import importlib.util
import inspect
import math
import os
import pathlib
import pkgutil
import re
from collections.abc import Mapping
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin, get_type_hints

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

    def make(self, name: str) -> Any:
        """Returns the component that ``NAME:key=value,…`` describes. Raises UserError for a wrong name or option."""
        base, options = split_options(name)
        return _call_factory(self.find(base), options, name, self.kind)


def is_outside(name: str) -> bool:
    """Whether a name is of the form ``package.module:Thing`` (a bucket's address is not)."""
    return ":" in name and "://" not in name


def split_options(name: str) -> tuple[str, str]:
    """Splits ``NAME:key=value,…`` at the first colon before a ``key=``; the options are empty if there is none."""
    match = re.fullmatch(r"(.+?):(\w*=.*)", name, re.DOTALL)
    return (match[1], match[2]) if match else (name, "")


def _call_factory(found: Any, options: str, name: str, kind: str) -> Any:
    """The component that a factory makes of ``key=value,…``; anything but a factory is returned as it is.

    Values are numbers, several whole ones joined by ``+``, one of the words of a Literal, or text without commas, as
    the factory's types say.

    Raises:
      UserError: an unknown key, a value of another type or out of range, or options for something that has none.
    """
    if not _is_factory(found):
        if options:
            raise UserError(f"{kind}={name}: {name.removesuffix(f':{options}')} has no options.")
        return found
    types, values = {key: hint for key, hint in get_type_hints(found).items() if key != "return"}, {}
    for option in filter(None, options.split(",")):
        key, _, text = option.partition("=")
        if key not in types:
            raise UserError(f"{kind}={name}: unknown option {key!r}; {did_you_mean(key, types)}")
        if key in values:
            raise UserError(f"{kind}={name} sets {key} twice.")
        values[key] = _parse_option(f"{kind}={name}: {key}={text}", text, types[key])
    try:
        return found(**values)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{kind}={name}: {error}") from None


def _is_factory(found: Any) -> bool:
    return inspect.isfunction(found) and all(
        parameter.kind is parameter.KEYWORD_ONLY and parameter.default is not parameter.empty
        for parameter in inspect.signature(found).parameters.values()
    )


def _parse_option(label: str, text: str, hint: Any) -> Any:
    if get_origin(hint) is Literal:
        if text not in get_args(hint):
            raise UserError(f"{label} must be one of {', '.join(get_args(hint))}.")
        return text
    if hint is str:
        return text
    if hint is float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise UserError(f"{label} must be a number.")
        return number
    numbers = text.split("+") if get_origin(hint) is tuple else [text]
    if not all(re.fullmatch(r"[0-9]{1,9}", number) for number in numbers):
        several = ", or several joined by +" if get_origin(hint) is tuple else ""
        raise UserError(f"{label} must be a whole number{several}.")
    return tuple(map(int, numbers)) if get_origin(hint) is tuple else int(text)


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
    elif isinstance(values, str) and _OUTSIDE.fullmatch(name := re.split("[*@]", split_options(values)[0])[0]):
        _refuse_module_in(folder, name)


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
