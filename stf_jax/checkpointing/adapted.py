"""Merges adapters into the kernels that they adapt, so that only training knows adapters and quantized kernels.

A merged kernel is W + change, computed in float32, in the type of W. A quantized kernel counts as the W that it stands
for (models/quantized.py), in the compute type of the run.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from stf_jax.checkpointing.base import BasedParams
from stf_jax.checkpointing.params import SavedParams
from stf_jax.checkpointing.rules import find_kernel_adapters, parse_rules
from stf_jax.config import TrainConfig, UserError, from_json
from stf_jax.files import read_json
from stf_jax.models.adapters.base import Adapter, Array, adapted_kernel
from stf_jax.models.blueprint import Blueprint
from stf_jax.models.quantized import Quantization, find_quantization, scale_path
from stf_jax.registry import refuse_code_in


@dataclasses.dataclass(frozen=True)
class _Merging:
    """How a kernel of the plain model follows from what a run has."""

    adapter: Adapter | None
    quantization: Quantization | None
    dtype: np.dtype  # of the merged kernel
    # Paths of the adapter's parameters by name, and of the scales under an empty name.
    parts: Mapping[str, str] = dataclasses.field(compare=False)

    def merge_layer(self, kernel: Array, parts: Mapping[str, Array]) -> Array:
        """Merges one layer, given its parts by name."""
        leaves = dict(parts)
        if self.quantization is None:
            merged = kernel.astype(np.float32)
        else:
            merged = self.quantization.dequantize(kernel, leaves.pop(""))
        if self.adapter is not None:
            merged = merged + self.adapter.change(leaves).reshape(merged.shape)
        return merged.astype(self.dtype)


def merge_params(params: Mapping[str, jax.Array], plan: Blueprint) -> Iterator[tuple[str, jax.Array]]:
    """Yields the parameters of the plain model, each kernel merged when its turn comes.

    Args:
      params: those of the plan's model, by path.
    """
    merging = _plan_merging(params, plan.adapters, plan.precision)
    for path, value in params.items():
        if path in merging:
            parts = {name: params[part] for name, part in merging[path].parts.items()}
            value = _merge(merging[path], value, parts, value.sharding)
        if path not in plan.added:
            yield path, value


class MergedParams:
    """The parameters of a run, merged as they are read. The attributes are those of SavedParams."""

    def __init__(self, saved: SavedParams | BasedParams, adapters: Mapping[str, Adapter], precision: str) -> None:
        """Prepares to merge.

        Args:
          adapters: by the path of the kernel.
          precision: the compute type of the run.
        """
        self._saved, self.step = saved, saved.step
        self._merging = _plan_merging(saved.shapes, adapters, precision)
        added = {part for merging in self._merging.values() for part in merging.parts.values()}
        self.shapes = {path: leaf for path, leaf in saved.shapes.items() if path not in added}
        for path, merging in self._merging.items():
            shape = self.shapes[path].shape
            if merging.quantization is not None:
                shape = merging.quantization.kernel_shape(shape, saved.shapes[merging.parts[""]].shape)
            self.shapes[path] = jax.ShapeDtypeStruct(shape, merging.dtype)

    def read(self, path: str) -> np.ndarray:
        """Reads one parameter into host memory, merged layer by layer. Raises UserError if it is damaged."""
        value = self._saved.read(path)
        if (merging := self._merging.get(path)) is None:
            return value
        parts = {name: self._saved.read(part) for name, part in merging.parts.items()}
        merged = np.empty(self.shapes[path].shape, merging.dtype)
        for layer, kernel in enumerate(value):
            merged[layer] = merging.merge_layer(kernel, {name: part[layer] for name, part in parts.items()})
        return merged

    def restore(self, shardings: Mapping[str, jax.sharding.Sharding]) -> Iterator[tuple[str, jax.Array]]:
        """Yields paths and parameters with these shardings, one at a time. Raises UserError if one is damaged."""
        wanted: dict[str, jax.sharding.Sharding] = {}
        for path, sharding in shardings.items():
            parts = self._merging[path].parts.values() if path in self._merging else ()
            wanted |= dict.fromkeys(parts, _replicated(sharding))
            wanted[path] = _fit(sharding, self._saved.shapes[path].shape)
        pending: dict[str, jax.Array] = {}
        for path, value in self._saved.restore(wanted):  # a kernel comes after its parts
            if path not in shardings:
                pending[path] = value
            elif (merging := self._merging.get(path)) is not None:
                leaves = {name: pending.pop(part) for name, part in merging.parts.items()}
                yield path, _merge(merging, value, leaves, shardings[path])
            else:
                yield path, value


def merge_saved(folder: epath.Path, saved: SavedParams | BasedParams) -> SavedParams | BasedParams | MergedParams:
    """The parameters of a run or an imported folder, as those of a plain model.

    Raises:
      UserError: the run's config does not name its adapters.
    """
    kernels = {kernel for path in saved.shapes if (kernel := adapted_kernel(path)) in saved.shapes}
    if not kernels and not any(find_quantization(leaf.dtype) for leaf in saved.shapes.values()):
        return saved
    values = read_json(folder / "config.json")
    config = from_json(values) if isinstance(values, dict) else TrainConfig()
    refuse_code_in(folder, config.rules)
    adapters = find_kernel_adapters(parse_rules(config.rules), kernels)
    if missing := sorted(kernels - adapters.keys()):
        raise UserError(f"The rules in {folder / 'config.json'} name no adapter of {missing[0]}, but the run has one.")
    return MergedParams(saved, adapters, config.model.precision)


def _plan_merging(
    params: Mapping[str, jax.Array | jax.ShapeDtypeStruct], adapters: Mapping[str, Adapter], precision: str
) -> dict[str, _Merging]:
    """Returns how to merge each kernel that has an adapter or is quantized, by path."""
    leaves = _adapter_leaves(params, adapters)
    merging: dict[str, _Merging] = {}
    for path, value in params.items():
        if (kind := find_quantization(value.dtype)) is not None:
            parts = leaves.get(path, {}) | {"": scale_path(path)}
            merging[path] = _Merging(adapters.get(path), kind, jnp.dtype(precision), parts)
        elif path in leaves:
            merging[path] = _Merging(adapters[path], None, value.dtype, leaves[path])
    return merging


def _adapter_leaves(paths: Iterable[str], adapters: Mapping[str, Adapter]) -> dict[str, dict[str, str]]:
    """The paths of each adapter's parameters, by the path of its kernel and their names."""
    found: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for path in paths:
        if (kernel := adapted_kernel(path)) in adapters and kernel is not None:
            found[kernel][path.rpartition("/")[2]] = path
    return found


def _merge(
    merging: _Merging, kernel: jax.Array, parts: dict[str, jax.Array], sharding: jax.sharding.Sharding
) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        return _compile_merge(merging, sharding)(kernel, parts)


@functools.cache
def _compile_merge(
    merging: _Merging, sharding: jax.sharding.Sharding
) -> Callable[[jax.Array, dict[str, jax.Array]], jax.Array]:
    # Layer by layer, because all in float32 would take twice the memory of a bfloat16 kernel.
    def merge(*layers: Any) -> jax.Array:
        merged: jax.Array = jax.lax.map(lambda layer: merging.merge_layer(*layer), layers)
        return merged

    return jax.jit(merge, out_shardings=sharding)


def _fit(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    """The sharding of a kernel, for what is saved of it, which is whole if the mesh does not divide it."""
    try:
        sharding.shard_shape(shape)
    except ValueError:
        return _replicated(sharding)
    return sharding


def _replicated(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return sharding
