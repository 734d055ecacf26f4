"""What an adapter is: a few parameters beside the kernel of a linear layer, which train while the kernel is frozen.

A rule of a config names one, ``("llm/.*", "lora:rank=16")``: an object in a file of this folder, or in your own as
``package.module:thing``, or a function that returns one and whose keyword-only parameters are its options
(registry.py). Training adds its modules to the layers that it adapts; everything else, inference and exports too, reads
the kernel that it is merged into.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar, runtime_checkable

import jax
import numpy as np
from flax import nnx

from stf_jax.config import UserError
from stf_jax.models.layers import Linear
from stf_jax.registry import Registry

ADAPTER = "adapter"  # the attribute of a layer, and so a part of paths: llm/blocks/mlp/up/adapter/a
Array = TypeVar("Array", np.ndarray, jax.Array)


@runtime_checkable
class Adapter(Protocol):
    """Adapts the linear layers of blocks, whose parameters are stacked."""

    def build(self, rngs: nnx.Rngs, layer: Linear) -> nnx.Module:
        """The module that a call of the layer adds to its product: [..., *inputs] → [..., *outputs].

        Its parameters are declared with a leading axis of layers, as the layer's own; a call sees one layer's. What is
        added is 0 at first.
        """
        ...

    def change(self, params: Mapping[str, Array]) -> Array:
        """The change of one layer's kernel that has the same effect, float32 [inputs, outputs].

        Args:
          params: those of the module, by name, for one layer.
        """
        ...


ADAPTERS: Registry[Adapter | Callable[..., Adapter]] = Registry("adapter", "stf_jax.models.adapters")


@functools.lru_cache
def find_adapter(name: str) -> Adapter:
    """The adapter of that name, with the options in it. Raises UserError for a wrong one, or what is no adapter."""
    found = ADAPTERS.make(name)
    if isinstance(found, type) or not isinstance(found, Adapter):
        raise UserError(f"adapter={name} is not an object with the methods build and change.")
    return found


def adapted_kernel(path: str) -> str | None:
    """The path of the kernel that a parameter of an adapter belongs to; None if the path is of no adapter."""
    match = re.fullmatch(rf"(.+)/{ADAPTER}/\w+", path)
    return match and f"{match[1]}/kernel"
