"""Merges adapters into the kernels that they adapt, so that only training knows that there are adapters.

A merged kernel is W + change, computed in float32, in the type of W.
"""

import collections
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from stf_jax.checkpointing.params import SavedParams
from stf_jax.checkpointing.rules import find_kernel_adapters, parse_rules
from stf_jax.config import UserError, from_json
from stf_jax.files import read_json
from stf_jax.models.adapters.base import Adapter, adapted_kernel
from stf_jax.registry import refuse_code_in

_Layers = dict[str, jax.Array]  # parameters of an adapter by name, [L, ...]


def merge_params(params: Mapping[str, jax.Array], adapters: Mapping[str, Adapter]) -> Iterator[tuple[str, jax.Array]]:
    """Yields the parameters without adapters, each kernel merged when its turn comes.

    Args:
      params: those of a model with adapters, by path.
      adapters: by the path of the kernel.
    """
    leaves = adapter_leaves(params, adapters)
    for path, value in params.items():
        if path in leaves:
            value = _merge(adapters[path], value, {name: params[leaf] for name, leaf in leaves[path].items()})
        if adapted_kernel(path) not in adapters:
            yield path, value


class MergedParams:
    """The parameters of a run with adapters, merged as they are read. The attributes are those of SavedParams."""

    def __init__(self, saved: SavedParams, adapters: Mapping[str, Adapter]) -> None:
        """``adapters``: by the path of the kernel."""
        self._saved, self._adapters, self.step = saved, adapters, saved.step
        self._leaves = adapter_leaves(saved.shapes, adapters)
        self.shapes = {path: leaf for path, leaf in saved.shapes.items() if adapted_kernel(path) not in adapters}

    def read(self, path: str) -> np.ndarray:
        """Reads one parameter into host memory, merged layer by layer. Raises UserError if it is damaged."""
        value = self._saved.read(path)
        if path in self._leaves:
            leaves = {name: self._saved.read(leaf) for name, leaf in self._leaves[path].items()}
            value = np.array(value)  # what was read may be read-only
            for layer, kernel in enumerate(value):
                change = self._adapters[path].change({name: leaf[layer] for name, leaf in leaves.items()})
                value[layer] = (kernel.astype(np.float32) + change.reshape(kernel.shape)).astype(kernel.dtype)
        return value

    def restore(self, shardings: Mapping[str, jax.sharding.Sharding]) -> Iterator[tuple[str, jax.Array]]:
        """Yields paths and parameters with these shardings, one at a time. Raises UserError if one is damaged."""
        wanted: dict[str, jax.sharding.Sharding] = {}
        for path, sharding in shardings.items():
            wanted |= dict.fromkeys(self._leaves.get(path, {}).values(), _replicated(sharding)) | {path: sharding}
        pending: dict[str, jax.Array] = {}
        for path, value in self._saved.restore(wanted):  # a kernel comes after its adapter
            if path not in shardings:
                pending[path] = value
            elif path in self._leaves:
                leaves = {name: pending.pop(leaf) for name, leaf in self._leaves[path].items()}
                yield path, _merge(self._adapters[path], value, leaves)
            else:
                yield path, value


def open_params(folder: epath.Path) -> SavedParams | MergedParams:
    """Opens a run or an imported folder, as a model without adapters.

    Raises:
      UserError: as SavedParams; the run's config does not name its adapters.
    """
    saved = SavedParams(folder)
    adapters = saved_adapters(folder, saved)
    return MergedParams(saved, adapters) if adapters else saved


def saved_adapters(folder: epath.Path, saved: SavedParams) -> dict[str, Adapter]:
    """The adapters of a run by the path of the kernel; empty if it has none. Raises as :func:`open_params`."""
    kernels = {kernel for path in saved.shapes if (kernel := adapted_kernel(path)) in saved.shapes}
    if not kernels:
        return {}
    values = read_json(folder / "config.json")
    rules = from_json(values).rules if isinstance(values, dict) else ()
    refuse_code_in(folder, rules)
    adapters = find_kernel_adapters(parse_rules(rules), kernels)
    if missing := sorted(kernels - adapters.keys()):
        raise UserError(f"The rules in {folder / 'config.json'} name no adapter of {missing[0]}, but the run has one.")
    return adapters


def adapter_leaves(paths: Iterable[str], adapters: Mapping[str, Adapter]) -> dict[str, dict[str, str]]:
    """The paths of each adapter's parameters, by the path of its kernel and their names."""
    found: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for path in paths:
        if (kernel := adapted_kernel(path)) in adapters and kernel is not None:
            found[kernel][path.rpartition("/")[2]] = path
    return found


def _merge(adapter: Adapter, kernel: jax.Array, leaves: _Layers) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        return _compile_merge(adapter.change, kernel.sharding)(kernel, leaves)


@functools.cache
def _compile_merge(
    change: Callable[[_Layers], jax.Array], sharding: jax.sharding.Sharding
) -> Callable[[jax.Array, _Layers], jax.Array]:
    def merge_layer(layer: tuple[jax.Array, _Layers]) -> jax.Array:
        kernel, leaves = layer
        return (kernel.astype(jnp.float32) + change(leaves).reshape(kernel.shape)).astype(kernel.dtype)

    # Layer by layer, because all in float32 would take twice the memory of a bfloat16 kernel.
    return jax.jit(lambda *layers: jax.lax.map(merge_layer, layers), out_shardings=sharding)


def _replicated(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return sharding
