"""Counts the FLOPs of traced programs.

A multiply-add is 2 FLOPs. Matrix products and convolutions count; norms, activations, softmax, rotations, lookups and
the optimizer do not: they are under 1 % of a model of billions. A loop counts as often as it runs (the compilers' own
counts include its body only once).

*Executed FLOPs* (:func:`count_executed`) are those of the program that runs, recomputation included.

*Model FLOPs* (:func:`count_model_flops`) are those that the mathematics requires, as in PaLM's MFU (arXiv 2204.02311,
appendix B), so that programs of the same model compare by their time alone. They are counted in a trace of the model
with unrolled layers and reference attention:

- Causal attention counts half of T². Packed segments do not reduce it, and padding counts: the count depends only on
  the shape of the batch.
- Recomputation does not count.
- Blocks above the highest tap and gradients of what is frozen are not in the trace.

In the backward pass, a product counts once more for each factor that needs a gradient. So a frozen tower counts once
and the fusion three times, less the input of its first layer; the language model counts twice in stage 1, except
attention, whose factors are all inputs and which counts three times; in stage 2 all of it counts three times.

The counter reads two named scopes that models set, and JAX's own scope of recomputed operations.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.extend import core

CAUSAL = "causal_attention"  # scope of products of which the mask hides half
CONVOLUTION = "convolution"  # scope in which elementwise multiplications are part of sums of products
RECOMPUTED = "rematted_computation"  # scope in which jax.checkpoint computes again

# With this prime number of rows per shard, exactly the arrays that grow with the rows have an axis divisible by it.
PRIME = 997


@dataclasses.dataclass(frozen=True)
class Executed:
    """Sums over matrix products, with :data:`PRIME` rows per shard."""

    flops: float = 0.0  # all devices together
    bytes_by_rows: float = 0.0  # per device, of operands and results that grow with the rows
    bytes_fixed: float = 0.0  # per device, of those that do not: weights


def count_executed(traced: jax.stages.Traced, shards: int, devices: int) -> Executed:
    """Counts a program that was traced with ``PRIME·shards`` rows.

    Args:
      shards: number of parts that the mesh splits the rows into.
      devices: number of devices of the mesh.
    """
    flops = bytes_by_rows = bytes_fixed = 0.0
    for product in _products(_open_jaxpr(traced.jaxpr)):
        flops += product.flops * product.times * (devices if product.local else 1)
        if product.eqn.primitive.name == "mul":
            continue  # fused with others
        for variable in (*product.eqn.invars, *product.eqn.outvars):
            aval: Any = variable.aval  # jax's base class of them has no shape
            if hasattr(aval, "shape"):
                size = product.times * math.prod(aval.shape) * aval.dtype.itemsize
                if any(length and length % PRIME == 0 for length in aval.shape):
                    bytes_by_rows += size if product.local else size / devices
                else:
                    bytes_fixed += size if product.local else size * shards / devices  # split over ``tensor`` only
    return Executed(flops, bytes_by_rows, bytes_fixed)


def count_model_flops(function: Callable[..., Any], *arguments: Any) -> dict[str, int]:
    """Counts the model FLOPs of a function of abstract arguments, by the outermost named scope.

    Args:
      function: called once, by tracing.
      *arguments: trees of ``jax.ShapeDtypeStruct``.
    """
    total: collections.Counter[str] = collections.Counter()
    for product in _products(jax.make_jaxpr(function)(*arguments).jaxpr):
        names = re.findall(r"\w+", product.scope)
        if RECOMPUTED not in names:
            flops = product.flops * product.times
            total[product.scope.split("/")[0]] += int(flops // 2 if CAUSAL in names else flops)
    return dict(total)


class _Product(NamedTuple):
    eqn: core.JaxprEqn
    flops: float
    times: int  # how often it runs
    scope: str
    local: bool  # whether shapes are those of one device, as inside a ``shard_map``


def _products(jaxpr: core.Jaxpr, times: int = 1, scope: str = "", local: bool = False) -> Iterator[_Product]:
    """Yields the products of a program."""
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        inner = "/".join(filter(None, (scope, str(eqn.source_info.name_stack))))
        if name == "dot_general":
            yield _Product(eqn, _dot_flops(eqn), times, inner, local)
        elif name == "conv_general_dilated":
            yield _Product(eqn, _conv_flops(eqn), times, inner, local)
        elif name == "mul" and re.search(rf"\b{CONVOLUTION}\b", inner):
            yield _Product(eqn, 2 * math.prod(_shape(eqn.outvars[0])), times, inner, local)
        elif name.startswith("dot_product_attention"):
            yield _Product(eqn, _flash_flops(eqn), times, inner, local)
        elif name == "pallas_call":
            yield _Product(eqn, _kernel_flops(eqn), times, inner, local)
        elif name == "scan":
            yield from _products(params["jaxpr"].jaxpr, times * params["length"], inner, local)
        elif name == "while":  # the decoding loop, counted for one token
            yield from _products(params["body_jaxpr"].jaxpr, times, inner, local)
        elif name == "cond":
            branches = [list(_products(branch.jaxpr, times, inner, local)) for branch in params["branches"]]
            yield from max(branches, key=lambda products: sum(product.flops * product.times for product in products))
        else:
            for called in _called_jaxprs(params):
                yield from _products(called, times, inner, local or name == "shard_map")


def _open_jaxpr(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> core.Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr


def _called_jaxprs(params: Mapping[str, Any]) -> Iterator[core.Jaxpr]:
    """Yields the jaxpr that an equation calls once (for a custom derivative, the one that computes the value)."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if isinstance(params.get(key), (core.Jaxpr, core.ClosedJaxpr)):
            yield _open_jaxpr(params[key])
            return


def _dot_flops(eqn: core.JaxprEqn) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    first, result = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
    return 2 * math.prod(result) * math.prod(first[axis] for axis in contracted)


def _conv_flops(eqn: core.JaxprEqn) -> int:
    """FLOPs of a convolution, padding included; zeros between the inputs, as in gradients of strides, do not count."""
    kernel, out_features = _shape(eqn.invars[1]), eqn.params["dimension_numbers"].rhs_spec[0]
    per_output = math.prod(kernel) // kernel[out_features]
    return 2 * math.prod(_shape(eqn.outvars[0])) * per_output // math.prod(eqn.params["lhs_dilation"])


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
    body = _products(_open_jaxpr(eqn.params["jaxpr"]))
    return sum(product.flops * product.times for product in body) * math.prod(grid) * unmasked


def _shape(variable: core.Var | core.Literal) -> tuple[int, ...]:
    aval: Any = variable.aval  # jax's base class of them has no shape
    return aval.shape
