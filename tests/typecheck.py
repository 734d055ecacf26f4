"""The type checker for jaxtyping's import hook."""

from collections.abc import Callable

from beartype import beartype


def check(function: Callable) -> Callable:
    """Checks calls of a function. Local functions are not checked: the hook would compile checks at each definition."""
    return function if "<locals>" in function.__qualname__ else beartype(function)
