"""The programs that a run compiles, over abstract arrays, for `plan`. Nothing is allocated.

Axis letters: B rows, T positions, M images per row, K kv heads, S cache slots, Dh head size.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from stf_jax.config import TrainConfig
from stf_jax.data.sampling import BatchShape, plan_budgets, rows_per_batch
from stf_jax.inference import decoding
from stf_jax.inference.decoding import BLOCKS, Sampling, TokenRules
from stf_jax.inference.generator import INITIAL_MAX_NEW_TOKENS
from stf_jax.inference.mesh import inference_mesh
from stf_jax.models.blueprint import Blueprint, blueprint
from stf_jax.models.spec import resolve_model
from stf_jax.parallel.mesh import BATCH, check_batch, compute_context, fit_mesh, make_mesh, row_shards
from stf_jax.training.flops import abstract_batch
from stf_jax.training.programs import abstract_training
from stf_jax.training.state import Layout
from stf_jax.training.step import make_train_step

_RULES = TokenRules(stops=(2,), suppressed_tokens=())  # the shapes do not depend on them


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function with the shapes, dtypes and shardings of its arguments."""

    kind: str  # train | prefill | decode
    rows: int  # B
    length: int  # T; for decode S
    images: int  # M
    mesh: Mesh
    precision: str
    call: jax.stages.Wrapped
    arguments: tuple[Any, ...]
    parts: Mapping[str, Any]  # trees of arguments by name: parameters, optimizer, batch, cache

    def trace(self) -> jax.stages.Traced:
        """Traces the program."""
        with compute_context(self.mesh, self.precision):
            return self.call.trace(*self.arguments)

    def compile(self) -> jax.stages.Compiled:
        """Compiles the program for its devices.

        Raises:
          OutOfMemory: the compiler for TPUs reports that the program does not fit.
        """
        with compute_context(self.mesh, self.precision):
            lowered = self.call.lower(*self.arguments)
            try:
                return lowered.compile()
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                raise OutOfMemory(_parse_needed_bytes(str(error))) from None


class OutOfMemory(Exception):
    """The compiler reports that a program does not fit. ``needed``: bytes per device, or None if not reported."""

    def __init__(self, needed: int | None):
        super().__init__(needed)
        self.needed = needed


def _parse_needed_bytes(message: str) -> int | None:
    match = re.search(r"(?:Used |\()([\d.]+)([KMGT])(?: of|\) exceeds)", message)
    return match and int(float(match[1]) * 2 ** (10 * (1 + "KMGT".index(match[2]))))


def make_program(config: TrainConfig, kind: str, devices: list[jax.Device], rows: int | None = None) -> Program:
    """Makes a program of a run with this config, on these devices.

    Args:
      kind: ``train``, a step on rows of ``data.max_length``; ``prefill``, for ``eval.batch`` prompts of that length;
        ``decode``, one more token for each of them.
      rows: overrides the rows of a batch.

    Raises:
      UserError: the config is invalid, or does not suit the devices.
    """
    mesh = make_mesh(fit_mesh(config, devices).mesh, devices)
    if kind == "train":
        return _train_program(config, mesh, rows)
    plan = blueprint(config.model)
    return _inference_program(config, kind, plan, inference_mesh(plan, mesh), rows)


def abstract_train_state(config: TrainConfig, devices: list[jax.Device]) -> Layout:
    """The training state, which stays in memory during evaluation. Raises UserError as :func:`make_program`."""
    return abstract_training(config, make_mesh(fit_mesh(config, devices).mesh, devices))[2]


def largest_batch(config: TrainConfig) -> BatchShape:
    """The shape of the batches with the longest rows that a run may have."""
    length, images = config.data.max_length, config.data.image_places
    rows = rows_per_batch(config.data, config.global_batch_size, length)
    return BatchShape(rows, length, images, plan_budgets(config, length, images))


def _train_program(config: TrainConfig, mesh: Mesh, override: int | None) -> Program:
    shape = largest_batch(config)
    if override:
        shape = shape._replace(rows=override)
        config = dataclasses.replace(config, global_batch_size=override)
    check_batch(config, mesh)
    plan, tx, layout = abstract_training(config, mesh)
    rows = NamedSharding(mesh, BATCH)
    batch = jax.tree.map(lambda x: _with_sharding(x, rows), abstract_batch(config.model, *shape))
    call = make_train_step(config, plan, tx, layout)
    parts = {"parameters": layout.params, "optimizer": layout.moments, "batch": batch}
    return Program("train", *shape[:3], mesh, plan.precision, call, (layout, batch), parts)


def _inference_program(config: TrainConfig, kind: str, plan: Blueprint, mesh: Mesh, rows: int | None) -> Program:
    shards = row_shards(mesh)
    rows = -(-(rows or config.eval.batch) // shards) * shards  # rounded up as in the generator
    prefill, extend, _ = decoding.make_programs(_RULES, plan, mesh)
    weights, length = _abstract_weights(plan, mesh), config.data.max_length
    tokens, images = _abstract_array((rows, length), jnp.int32, mesh), _abstract_images(config, rows, mesh)
    lengths = _abstract_array((rows,), jnp.int32, mesh)
    arguments: tuple[Any, ...]
    parts: dict[str, Any]
    if kind == "prefill":
        arguments = (INITIAL_MAX_NEW_TOKENS, weights, tokens, tokens, lengths, images, Sampling())
        parts = {"parameters": weights, "batch": arguments[2:6]}
    else:
        llm, dtype = resolve_model(config.model).llm_shape, jnp.dtype(plan.precision)
        assert llm is not None  # only models with both parts are planned
        slots, reduction = length + INITIAL_MAX_NEW_TOKENS, resolve_model(config.model).reduction
        sizes = [slots - images.shape[1] * reduction.dropped_before(layer) for layer in range(llm.layers)]
        layers = [jax.ShapeDtypeStruct((rows, llm.kv_heads, size, llm.head_dim), dtype) for size in sizes]
        shapes = decoding.DecodeState(
            cache=tuple((layer, layer) for layer in layers),
            lengths=lengths,
            image_counts=lengths,
            output_ids=jax.ShapeDtypeStruct((rows, INITIAL_MAX_NEW_TOKENS), jnp.int32),
            count=jax.ShapeDtypeStruct((), jnp.int32),
            done=jax.ShapeDtypeStruct((rows,), bool),
        )
        state = jax.tree.map(_with_sharding, shapes, jax.tree.broadcast(decoding.state_shardings(mesh), shapes))
        arguments = (weights, state, INITIAL_MAX_NEW_TOKENS, Sampling())
        parts = {"parameters": weights, "cache": state.cache}
        length = slots
    call = prefill if kind == "prefill" else extend
    return Program(kind, rows, length, images.shape[1], mesh, plan.precision, call, arguments, parts)


def _abstract_array(shape: Sequence[int], dtype: DTypeLike, mesh: Mesh) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, BATCH))


def _with_sharding(x: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _abstract_images(config: TrainConfig, rows: int, mesh: Mesh) -> jax.ShapeDtypeStruct:
    vision = resolve_model(config.model).vision_shape
    assert vision is not None  # only models with both parts are planned
    side = vision.image_size
    return _abstract_array((rows, config.data.image_places, side, side, 3), jnp.uint8, mesh)


_AbstractWeights = dict[str, jax.ShapeDtypeStruct | tuple[jax.ShapeDtypeStruct, ...]]


def _abstract_weights(plan: Blueprint, mesh: Mesh) -> _AbstractWeights:
    """The weights as :func:`stf_jax.inference.decoding.split_layers` returns them."""
    dtype = jnp.dtype(plan.precision)
    weights: _AbstractWeights = {}
    for path, sharding in plan.shardings(mesh).items():
        shape, stacked = plan.shapes[path].shape, path.startswith(BLOCKS)
        layer_sharding = NamedSharding(mesh, PartitionSpec(*sharding.spec[int(stacked) :]))
        weight = _with_sharding(jax.ShapeDtypeStruct(shape[int(stacked) :], dtype), layer_sharding)
        weights[path] = (weight,) * shape[0] if stacked else weight
    return weights
