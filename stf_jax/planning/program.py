"""The programs that a run compiles, over abstract arrays: what `plan` looks at. Nothing is allocated.

Axis letters: B rows, T positions, M images per row, K kv heads, S slots of a cache, Dh head size.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stf_jax.config import TrainConfig
from stf_jax.data.packing import Batch
from stf_jax.inference import decoding
from stf_jax.inference.decoding import BLOCKS, Rules, Sampling
from stf_jax.inference.generator import ROOM
from stf_jax.models.cells import CLASSES
from stf_jax.models.presets import llm_of, vision_of
from stf_jax.models.selection import FULL_LAYERS, reduction
from stf_jax.runtime.mesh import BATCH, check_batch, computing, make_mesh, row_shards
from stf_jax.training.optimizer import make_optimizer
from stf_jax.training.state import Blueprint, TrainState, blueprint, state_layout
from stf_jax.training.step import loss_sum, make_train_step

_RULES = Rules(stops=(2,), unsayable=())  # the shapes do not depend on them


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled call to be: the function, and its arguments' shapes, types and shardings."""

    what: str  # train | prefill | decode
    rows: int  # B
    length: int  # T, or for decode S
    images: int  # M
    mesh: Mesh
    precision: str
    call: Callable
    arguments: tuple
    parts: Mapping[str, Any]  # trees of arguments, by what they are: parameters, optimizer, batch, cache
    kept: Callable | None = None  # gives, as shapes, what training keeps from forward to backward

    def trace(self) -> jax.stages.Traced:
        """The program as jax sees it."""
        with computing(self.mesh, self.precision):
            return self.call.trace(*self.arguments)

    def compile(self) -> jax.stages.Compiled:
        """The program as its devices would run it.

        Raises:
          OutOfMemory: it does not fit; TPUs' compiler says so itself.
        """
        with computing(self.mesh, self.precision):
            lowered = self.call.lower(*self.arguments)
            try:
                return lowered.compile()
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                raise OutOfMemory(_needed(str(error))) from None

    def residuals(self) -> list[jax.ShapeDtypeStruct]:
        """What the whole batch keeps from forward to backward, weights among it; nothing where nothing is trained."""
        if self.kept is None:
            return []
        state, batch = self.arguments
        with computing(self.mesh, self.precision):
            return jax.tree.leaves(jax.eval_shape(self.kept, state.trainable, state.frozen, batch))


class OutOfMemory(Exception):
    """The compiler's word that a program does not fit a device. ``needed``: bytes, None where it did not say."""

    def __init__(self, needed: int | None):
        super().__init__(needed)
        self.needed = needed


def _needed(message):
    found = re.search(r"(?:Used |\()([\d.]+)([KMGT])(?: of|\) exceeds)", message)
    return found and int(float(found[1]) * 2 ** (10 * (1 + "KMGT".index(found[2]))))


def make_program(config: TrainConfig, what: str, devices: list[jax.Device], rows: int | None = None) -> Program:
    """A program of a run with this config, on these devices.

    Args:
      what: ``train``, the step on rows of ``data.max_length``; ``prefill``, reading ``eval.batch`` prompts of that
        length; ``decode``, one more token for each of them.
      rows: a global batch other than the config's.

    Raises:
      UserError: the config does not suit the devices, or cannot be used.
    """
    mesh, plan = make_mesh(config.mesh, devices), blueprint(config.model)
    if what == "train":
        config = dataclasses.replace(config, global_batch_size=rows or config.global_batch_size)
        return _train(config, plan, mesh)
    return _ask(config, what, plan, mesh, rows)


def training_state(config: TrainConfig, devices: list[jax.Device]) -> TrainState:
    """What a run holds all along, while it is measured too. Raises UserError as :func:`make_program`."""
    tx = make_optimizer(config.optimizer, steps=1000)
    return state_layout(config, blueprint(config.model), tx, make_mesh(config.mesh, devices))


def _train(config, plan, mesh):
    check_batch(config, mesh)
    tx = make_optimizer(config.optimizer, steps=1000)
    layout = state_layout(config, plan, tx, mesh)
    shape = config.global_batch_size, config.data.max_length
    row = _array(shape, jnp.int32, mesh)
    images = _images(config, shape[0], mesh)
    labels = None
    if config.model.cells:
        side = vision_of(config.model).grid * config.model.cells
        labels = _array((*images.shape[:2], side, side, len(CLASSES)), jnp.uint8, mesh)
    batch = Batch(row, row, _array(shape, bool, mesh), row, row, row, images, labels)
    call = make_train_step(config, plan, tx, layout)
    parts = {"parameters": layout.params, "optimizer": layout.moments, "batch": batch}

    def kept(trainable, frozen, batch):
        return jax.vjp(lambda tree: loss_sum(plan, tree, frozen, batch, config.data.packing), trainable)[1]

    images_per_row = images.shape[1]
    return Program("train", *shape, images_per_row, mesh, plan.precision, call, (layout, batch), parts, kept)


def _ask(config, what, plan, mesh, rows):
    shards = row_shards(mesh)
    rows = -(-(rows or config.eval.batch) // shards) * shards  # as many as the mesh wants, as the generator has it
    prefill, extend, _ = decoding.programs(_RULES, plan, mesh)
    weights, length = _weights(plan, mesh), config.data.max_length
    tokens, images = _array((rows, length), jnp.int32, mesh), _images(config, rows, mesh)
    lengths = _array((rows,), jnp.int32, mesh)
    if what == "prefill":
        arguments = (ROOM, weights, tokens, tokens, lengths, images, Sampling())
        parts = {"parameters": weights, "batch": arguments[2:6]}
    else:
        llm, dtype = llm_of(config.model), jnp.dtype(plan.precision)
        slots = length + ROOM
        held = slots - images.shape[1] * reduction(config.model).dropped
        sizes = [slots if layer < FULL_LAYERS else held for layer in range(llm.layers)]
        layers = [jax.ShapeDtypeStruct((rows, llm.kv_heads, size, llm.head_dim), dtype) for size in sizes]
        shapes = decoding.State(
            cache=tuple((layer, layer) for layer in layers),
            lengths=lengths,
            held=lengths,
            said=jax.ShapeDtypeStruct((rows, ROOM), jnp.int32),
            count=jax.ShapeDtypeStruct((), jnp.int32),
            done=jax.ShapeDtypeStruct((rows,), bool),
        )
        state = jax.tree.map(_placed, shapes, jax.tree.broadcast(decoding.places(mesh), shapes))
        arguments = (weights, state, ROOM, Sampling())
        parts = {"parameters": weights, "cache": state.cache}
        length = slots
    call = prefill if what == "prefill" else extend
    return Program(what, rows, length, images.shape[1], mesh, plan.precision, call, arguments, parts)


def _array(shape, dtype, mesh):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, BATCH))


def _placed(x, sharding):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _images(config, rows, mesh):
    side = vision_of(config.model).image_size
    return _array((rows, config.data.images_per_row, side, side, 3), jnp.uint8, mesh)


def _weights(plan: Blueprint, mesh: Mesh) -> decoding.Weights:
    """As :func:`stf_jax.inference.decoding.layerwise` takes them."""
    dtype, weights = jnp.dtype(plan.precision), {}
    for path, sharding in plan.shardings(mesh).items():
        shape, apart = plan.shapes[path].shape, path.startswith(BLOCKS)
        place = NamedSharding(mesh, PartitionSpec(*sharding.spec[int(apart) :]))
        one = _placed(jax.ShapeDtypeStruct(shape[int(apart) :], dtype), place)
        weights[path] = (one,) * shape[0] if apart else one
    return weights


def bytes_on_a_device(tree: Any) -> int:
    """Of abstract arrays with shardings, what one device holds."""
    return sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(tree)
        if isinstance(leaf, jax.ShapeDtypeStruct)  # and not a number that is compiled in
    )
