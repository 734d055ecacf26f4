"""Chooses what the backward pass recomputes (``model.remat=auto``): as little as fits the memory of the devices.

Axis letters: B rows, T positions, M images per row.
"""

import dataclasses
import logging
import math
import os
from collections.abc import Callable
from typing import Any, get_args

import jax
from etils import epath
from jax.sharding import Mesh

from stf_jax.accounting.memory import peak_bytes
from stf_jax.checkpointing.params import newest_step
from stf_jax.config import Remat, TrainConfig
from stf_jax.data.packing import Batch
from stf_jax.data.sampling import BatchShape
from stf_jax.files import read_json
from stf_jax.models.blueprint import Params
from stf_jax.parallel.mesh import compute_context, row_shards
from stf_jax.training.budgets import mean_loss_sum
from stf_jax.training.flops import abstract_batch
from stf_jax.training.objectives.base import find_objective
from stf_jax.training.programs import abstract_training, compile_step
from stf_jax.training.state import Layout, training_blueprint

SETTINGS: tuple[Remat, ...] = get_args(Remat)[1:]  # without auto; the fastest, which needs the most memory, first

_log = logging.getLogger(__name__)


def resolve_remat(config: TrainConfig, workdir: epath.Path, mesh: Mesh, shape: BatchShape) -> TrainConfig:
    """Replaces ``auto`` by the setting that the run has used, if it fits, or else by the fastest that fits.

    Args:
      shape: of the largest batch.
    """
    if config.model.remat != "auto":
        return config
    device = mesh.local_devices[0]
    limit = _memory_limit(device)

    def fits(candidate: TrainConfig) -> bool:
        return device.platform == "cpu" or _peak_bytes(candidate, mesh, shape) <= limit

    chosen = _read_choice(workdir)
    if chosen is None or not fits(with_remat(config, chosen)):  # the run goes on with less memory
        chosen = choose_remat(config, mesh, shape, limit, fits)
        if jax.process_index() == 0:
            _log.info("model.remat=%s: the fastest setting for %.1f GiB per device.", chosen, limit / 2**30)
    return with_remat(config, chosen)


def choose_remat(
    config: TrainConfig, mesh: Mesh, shape: BatchShape, limit: float, fits: Callable[[TrainConfig], bool]
) -> Remat:
    """Returns the fastest setting whose training step fits; ``offload`` if none does.

    Args:
      limit: bytes per device. Settings that certainly need more are not tried.
      fits: whether the step of a config fits.
    """
    for remat in SETTINGS[:-1]:
        candidate = with_remat(config, remat)
        if least_bytes(candidate, mesh, shape) <= limit and fits(candidate):
            return remat
    return SETTINGS[-1]


def with_remat(config: TrainConfig, remat: Remat) -> TrainConfig:
    """Returns the config with ``model.remat`` set."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))


def least_bytes(config: TrainConfig, mesh: Mesh, shape: BatchShape) -> int:
    """Computes what a step holds at least on each device: state, gradients, and activations for the backward pass."""
    layout = abstract_training(config, mesh)[2]
    microbatches = config.optimizer.accumulation_steps
    gradients = bytes_per_device(layout.trainable) * (1 + (microbatches > 1))
    rows = shape.rows / row_shards(mesh) / microbatches
    activations = rows * activation_bytes_per_row(config, mesh, layout, shape)
    return bytes_per_device(layout) + gradients + int(activations)


def activation_bytes_per_row(config: TrainConfig, mesh: Mesh, layout: Layout, shape: BatchShape) -> float:
    """Computes the bytes that a row adds to what devices keep from the forward to the backward pass.

    The number of rows does not matter.
    """
    plan = training_blueprint(config)
    objective = find_objective(config.objective, config.model)

    def residuals(trainable: Params, frozen: Params, batch: Batch[jax.Array]) -> Any:
        def loss(tree: Params) -> jax.Array:
            noise = plan.noise(jax.random.key(0), len(batch.tokens))
            return mean_loss_sum(objective, plan.merge(tree, frozen, noise), batch, config.data.packing)

        return jax.vjp(loss, trainable)[1]

    def count(rows: int) -> int:
        batch = abstract_batch(config.model, *shape._replace(rows=rows))
        with compute_context(mesh, plan.precision):
            kept = jax.make_jaxpr(residuals)(layout.trainable, layout.frozen, batch).out_avals
        on_device = [aval for aval in kept if aval.memory_space != jax.memory.Space.Host]  # not offloaded
        return sum(aval.dtype.itemsize * math.prod(aval.shape) for aval in on_device)

    shards = row_shards(mesh)
    return (count(2 * shards) - count(shards)) / shards


def bytes_per_device(tree: Any) -> int:
    """Computes the bytes that one device holds of a tree of abstract arrays with shardings."""
    return sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(tree)
        if isinstance(leaf, jax.ShapeDtypeStruct)  # skips static numbers
    )


def _read_choice(workdir: epath.Path) -> Remat | None:
    """Returns the setting that led to the run's checkpoint, so that it rounds alike after it; None without one."""
    if newest_step(workdir) is None:  # the setting may have failed in the first step
        return None
    try:
        remat = read_json(workdir / "config.json")["model"]["remat"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return remat if remat in SETTINGS else None


def _memory_limit(device: jax.Device) -> float:
    """Returns the bytes that programs can use on a device; for CPU devices, an equal share of the machine's memory."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / len(jax.local_devices())


def _peak_bytes(config: TrainConfig, mesh: Mesh, shape: BatchShape) -> float:
    """Compiles the step and returns the bytes that it needs on a device; infinity if the compiler refuses it."""
    try:
        return peak_bytes(compile_step(config, *abstract_training(config, mesh), shape))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return math.inf
