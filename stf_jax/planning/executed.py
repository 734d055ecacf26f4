"""What a traced program executes: FLOPs, recomputation included, and bytes that its products read and write.

Counted in the program as jax traced it, forward, backward and rematerialised parts alike, loops as often as they run:
compilers' own counts take the body of a loop once.
"""

import dataclasses
import math

import jax
from jax.extend import core

# Of a batch as large as this prime number a device, whatever grows with the rows has an axis that it divides.
PRIME = 997


@dataclasses.dataclass(frozen=True)
class Executed:
    """Sums over products, by whether they grow with the rows (of :data:`PRIME` a shard) or not."""

    flops: float = 0.0  # all devices together
    bytes_by_rows: float = 0.0  # a device's, of factors and results that have rows
    bytes_fixed: float = 0.0  # a device's, of those that do not: weights

    def __add__(self, other: "Executed") -> "Executed":
        return Executed(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __mul__(self, times: float) -> "Executed":
        return Executed(*(value * times for value in dataclasses.astuple(self)))


def executed(traced: jax.stages.Traced, shards: int, devices: int) -> Executed:
    """Counts a program that was traced with ``PRIME·shards`` rows, over a mesh of so many devices.

    Args:
      shards: parts that the rows are split into.
    """
    return _executed(_inner(traced.jaxpr), shards, devices, local=False)


def _executed(jaxpr, shards, devices, local):
    """``local``: whether the shapes are one device's, as inside of a ``shard_map``."""
    total = Executed()
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            total += _product(eqn, _dot_flops(eqn), shards, devices, local)
        elif name.startswith("dot_product_attention"):
            total += _product(eqn, _flash_flops(eqn), shards, devices, local)
        elif name == "pallas_call":
            total += _product(eqn, _kernel_flops(eqn), shards, devices, local)
        elif name == "scan":
            total += _executed(params["jaxpr"].jaxpr, shards, devices, local) * params["length"]
        elif name == "while":  # the decoding loop: one token
            total += _executed(params["body_jaxpr"].jaxpr, shards, devices, local)
        elif name == "cond":
            branches = [_executed(branch.jaxpr, shards, devices, local) for branch in params["branches"]]
            total += max(branches, key=lambda branch: branch.flops)
        elif name == "shard_map":
            total += _executed(_inner(params["jaxpr"]), shards, devices, local=True)
        else:
            for inner in _inners(params):
                total += _executed(inner, shards, devices, local)
    return total


def _inner(jaxpr):
    return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr


def _inners(params):
    """Programs that an equation calls once (of a custom derivative's, the one that computes the value)."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if isinstance(params.get(key), (core.Jaxpr, core.ClosedJaxpr)):
            yield _inner(params[key])
            return


def _product(eqn, flops, shards, devices, local):
    by_rows = fixed = 0
    for variable in (*eqn.invars, *eqn.outvars):
        if not hasattr(variable.aval, "shape"):
            continue
        size = math.prod(variable.aval.shape) * variable.aval.dtype.itemsize
        if any(length and length % PRIME == 0 for length in variable.aval.shape):
            by_rows += size if local else size / devices
        else:
            fixed += size if local else size * shards / devices  # split over ``tensor`` alone
    return Executed(flops * devices if local else flops, by_rows, fixed)


def _dot_flops(eqn):
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)


def _flash_flops(eqn):
    """cuDNN's attention: two products forward, five backward, half of them where it is causal."""
    rows, length, heads, size = eqn.invars[0].aval.shape
    product = 2 * rows * heads * length**2 * size
    causal = "CAUSAL" in str(eqn.params.get("mask_type", ""))
    return product * (5 if "bwd" in eqn.primitive.name else 2) / (1 + causal)


def _kernel_flops(eqn):
    """Splash attention, the one kernel here: its products for a block, as often as blocks are not masked whole."""
    grid = eqn.params["grid_mapping"].grid
    blocks = grid[-1]
    seen = (blocks + 1) / (2 * blocks)  # of a causal mask's blocks
    return _body_flops(_inner(eqn.params["jaxpr"])) * math.prod(grid) * seen


def _body_flops(jaxpr):
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            total += _dot_flops(eqn)
        elif eqn.primitive.name == "cond":
            total += max(_body_flops(_inner(branch)) for branch in eqn.params["branches"])
        elif eqn.primitive.name == "scan":
            total += _body_flops(eqn.params["jaxpr"].jaxpr) * eqn.params["length"]
        else:
            total += sum(_body_flops(inner) for inner in _inners(eqn.params))
    return total
