"""FLOPs that a traced program executes, including recomputation, and bytes that its matrix products read and write.

The counts come from the jaxpr, with its forward, backward and rematerialized parts, and count a loop as often as it
runs: the compilers' own counts include the body of a loop only once.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.extend import core

# With this prime number of rows per shard, exactly the arrays that grow with the rows have an axis divisible by it.
PRIME = 997


@dataclasses.dataclass(frozen=True)
class Executed:
    """Sums over matrix products, with :data:`PRIME` rows per shard."""

    flops: float = 0.0  # all devices together
    bytes_by_rows: float = 0.0  # per device, of operands and results that grow with the rows
    bytes_fixed: float = 0.0  # per device, of those that do not: weights

    def __add__(self, other: "Executed") -> "Executed":
        return Executed(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __mul__(self, times: float) -> "Executed":
        return Executed(*(value * times for value in dataclasses.astuple(self)))


def count_executed(traced: jax.stages.Traced, shards: int, devices: int) -> Executed:
    """Counts a program that was traced with ``PRIME·shards`` rows.

    Args:
      shards: number of parts that the mesh splits the rows into.
      devices: number of devices of the mesh.
    """
    return _count_jaxpr(_open_jaxpr(traced.jaxpr), shards, devices, local=False)


def _count_jaxpr(jaxpr: core.Jaxpr, shards: int, devices: int, local: bool) -> Executed:
    """Counts a jaxpr. ``local``: its shapes are those of one device, as inside a ``shard_map``."""
    total = Executed()
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            total += _count_product(eqn, _dot_flops(eqn), shards, devices, local)
        elif name.startswith("dot_product_attention"):
            total += _count_product(eqn, _flash_flops(eqn), shards, devices, local)
        elif name == "pallas_call":
            total += _count_product(eqn, _kernel_flops(eqn), shards, devices, local)
        elif name == "scan":
            total += _count_jaxpr(params["jaxpr"].jaxpr, shards, devices, local) * params["length"]
        elif name == "while":  # the decoding loop, counted for one token
            total += _count_jaxpr(params["body_jaxpr"].jaxpr, shards, devices, local)
        elif name == "cond":
            branches = [_count_jaxpr(branch.jaxpr, shards, devices, local) for branch in params["branches"]]
            total += max(branches, key=lambda branch: branch.flops)
        elif name == "shard_map":
            total += _count_jaxpr(_open_jaxpr(params["jaxpr"]), shards, devices, local=True)
        else:
            for called in _called_jaxprs(params):
                total += _count_jaxpr(called, shards, devices, local)
    return total


def _open_jaxpr(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> core.Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr


def _called_jaxprs(params: Mapping[str, Any]) -> Iterator[core.Jaxpr]:
    """Yields the jaxpr that an equation calls once (for a custom derivative, the one that computes the value)."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if isinstance(params.get(key), (core.Jaxpr, core.ClosedJaxpr)):
            yield _open_jaxpr(params[key])
            return


def _count_product(eqn: core.JaxprEqn, flops: float, shards: int, devices: int, local: bool) -> Executed:
    by_rows: float = 0
    fixed: float = 0
    for variable in (*eqn.invars, *eqn.outvars):
        aval: Any = variable.aval  # jax's base class of them has no shape
        if not hasattr(aval, "shape"):
            continue
        size = math.prod(aval.shape) * aval.dtype.itemsize
        if any(length and length % PRIME == 0 for length in aval.shape):
            by_rows += size if local else size / devices
        else:
            fixed += size if local else size * shards / devices  # split over ``tensor`` only
    return Executed(flops * devices if local else flops, by_rows, fixed)


def _dot_flops(eqn: core.JaxprEqn) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    first, result = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
    return 2 * math.prod(result) * math.prod(first[axis] for axis in contracted)


def _flash_flops(eqn: core.JaxprEqn) -> float:
    """FLOPs of cuDNN's attention: two products forward, five backward; half of that if causal."""
    rows, length, heads, size = _shape(eqn.invars[0])
    product = 2 * rows * heads * length**2 * size
    causal = "CAUSAL" in str(eqn.params.get("mask_type", ""))
    return product * (5 if "bwd" in eqn.primitive.name else 2) / (1 + causal)


def _kernel_flops(eqn: core.JaxprEqn) -> float:
    """FLOPs of splash attention, the only Pallas kernel: the products of a block times the blocks not fully masked."""
    grid = eqn.params["grid_mapping"].grid
    blocks = grid[-1]
    unmasked = (blocks + 1) / (2 * blocks)  # fraction of blocks under a causal mask
    return _body_flops(_open_jaxpr(eqn.params["jaxpr"])) * math.prod(grid) * unmasked


def _shape(variable: core.Var | core.Literal) -> tuple[int, ...]:
    aval: Any = variable.aval  # jax's base class of them has no shape
    return aval.shape


def _body_flops(jaxpr: core.Jaxpr) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            total += _dot_flops(eqn)
        elif eqn.primitive.name == "cond":
            total += max(_body_flops(_open_jaxpr(branch)) for branch in eqn.params["branches"])
        elif eqn.primitive.name == "scan":
            total += _body_flops(eqn.params["jaxpr"].jaxpr) * eqn.params["length"]
        else:
            total += sum(_body_flops(called) for called in _called_jaxprs(eqn.params))
    return total
