"""The device mesh, and the rules that shard parameters and batches over it.

Mesh axes: ``data`` replicates parameters and splits the batch; ``fsdp`` splits both; ``tensor`` splits heads,
feed-forward and vocabulary. A size of 1 disables an axis.
"""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from stf_jax.config import MeshConfig, TrainConfig, UserError

LOGICAL_TO_MESH: Mapping[str, str | None] = {
    "embed": "fsdp",  # widths of residual streams, and the input widths of layers that read them
    "mlp": "tensor",  # hidden widths
    "heads": "tensor",
    "kv_heads": "tensor",
    "vocab": "tensor",
    "layers": None,  # scanned over
    "rank": None,  # of a low-rank adapter
    "head_dim": None,
    "norm": None,  # scales and biases of norms, the class token
    "position": None,  # learned positions of the vision tower
    "window": None,  # sides of a convolution's window
    "channel": None,  # colors; input channels of a convolution whose output is sharded
}
BLOCKS = "blocks of "  # begins the names of axes whose elements are blocks of another axis (models/quantized.py)
BATCH = PartitionSpec(("data", "fsdp"))
_log = logging.getLogger(__name__)
_LARGE = 2**20  # elements; larger parameters must not be replicated on a mesh that shards


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds a mesh of the configured shape; on one host it may use only the first devices.

    If both ``data`` and ``fsdp`` are -1, ``fsdp`` fills a slice, whose devices have fast links to each other, and
    ``data`` is the number of slices, so that only gradients pass between slices. ``tensor`` always stays in a slice.

    Args:
      devices: default: all devices. May be those of an abstract TPU topology.

    Raises:
      UserError: the sizes do not fit the devices, or would make ``tensor`` span slices.
    """
    devices = jax.devices() if devices is None else devices
    slices = count_slices(devices)
    single_host = len({device.process_index for device in devices}) == 1
    sizes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    if config.data == config.fsdp == -1:
        sizes["data"] = slices
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    fixed = 1
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise UserError(f"mesh.{axis}={size} must be at least 1, or -1 for all remaining devices.")
        fixed *= max(size, 1)
    if len(open_axes) > 1:
        raise UserError("Only one mesh axis may be -1, or mesh.data and mesh.fsdp both; set mesh.tensor to a size.")
    if open_axes:
        sizes[open_axes[0]] = len(devices) // fixed
    total = math.prod(sizes.values())
    fits = total == len(devices) or (total < len(devices) and not open_axes and single_host)
    if not fits or total == 0:
        raise UserError(
            f"A mesh of data×fsdp×tensor = {'×'.join(str(v) for v in (config.data, config.fsdp, config.tensor))} "
            f"does not fit the {len(devices)} {devices[0].platform} device(s) here; set mesh.data, mesh.fsdp and "
            "mesh.tensor to sizes whose product is that number."
            + (" (On CPU, JAX_NUM_CPU_DEVICES=8 simulates eight.)" if devices[0].platform == "cpu" else "")
        )
    arranged = _arrange_devices(tuple(sizes.values()), slices, devices[:total])
    return Mesh(arranged, tuple(sizes), axis_types=(AxisType.Auto,) * 3)


def _arrange_devices(sizes: tuple[int, ...], slices: int, devices: Sequence[jax.Device]) -> np.ndarray:
    """Arranges the devices as an array of these sizes, with the fastest links where most is communicated."""
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices=devices, allow_split_physical_axes=True)
    data, fsdp, tensor = sizes
    data_slices = math.gcd(data, slices)  # slices that each axis spans
    fsdp_slices = slices // data_slices
    if fsdp % fsdp_slices:
        raise UserError(
            f"mesh.data={data} and mesh.fsdp={fsdp} make mesh.tensor={tensor} span the {slices} slices here; set "
            f"mesh.data to a multiple of {slices}."
        )
    if fsdp_slices > 1 and jax.process_index() == 0:
        _log.warning(
            f"mesh.fsdp={fsdp} spans {fsdp_slices} slices, so parameters pass between slices at every layer; set "
            f"mesh.data to a multiple of {slices} to send only gradients between them."
        )
    within = (data // data_slices, fsdp // fsdp_slices, tensor)
    return mesh_utils.create_hybrid_device_mesh(
        within, (data_slices, fsdp_slices, 1), devices=devices, allow_split_physical_axes=True
    )


def row_shards(mesh: Mesh) -> int:
    """Number of shards that the rows of a batch are split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def count_slices(devices: Sequence[jax.Device]) -> int:
    """Counts the slices of TPUs, or machines of GPUs, that the devices belong to."""
    return len({getattr(device, "slice_index", 0) for device in devices})  # CPU devices have no slice_index


def get_row_share(mesh: Mesh, process: int) -> tuple[int, int]:
    """Returns which share of a batch's rows a process reads, and the number of shares, which are equal.

    Processes that ``tensor`` spans hold the same rows, so they read the same share.

    Raises:
      UserError: two processes have some rows in common, but not all.
    """
    shards = row_shards(mesh)
    rows_of: dict[int, set[int]] = {}
    indices: Mapping[jax.Device, tuple[slice, ...]] = NamedSharding(mesh, BATCH).devices_indices_map((shards,))
    for device, (rows,) in indices.items():
        rows_of.setdefault(device.process_index, set()).add(rows.indices(shards)[0])
    shares = sorted({tuple(sorted(rows)) for rows in rows_of.values()})
    if any(len(share) * len(shares) != shards for share in shares):
        tensor = mesh.shape["tensor"]
        raise UserError(f"mesh.tensor={tensor} gives the hosts unequal shares of the rows; set it to a power of two.")
    return shares.index(tuple(sorted(rows_of[process]))), len(shares)


@contextlib.contextmanager
def compute_context(mesh: Mesh, precision: str) -> Iterator[None]:
    """Sets the mesh and the matmul precision for compiled calls.

    By default, TPUs and GPUs multiply float32 matrices at reduced precision.
    """
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest" if precision == "float32" else "default"):
        yield


def fit_mesh(config: TrainConfig, devices: Sequence[jax.Device] | None = None) -> TrainConfig:
    """The config with a mesh for its batch, if it leaves all sizes of the mesh open.

    If there are more devices than the rows of a microbatch can be split over (128 rows on 256 devices), ``tensor``
    takes what remains.

    Args:
      devices: default: all devices.
    """
    rows, tensor = config.global_batch_size // config.optimizer.accumulation_steps, 1
    count = len(jax.devices() if devices is None else devices)
    if config.mesh == MeshConfig() and rows and count > rows and count % rows == 0:
        tensor = count // rows
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, tensor=tensor)) if tensor > 1 else config


def check_batch(config: TrainConfig, mesh: Mesh) -> None:
    """Raises UserError unless the mesh and the microbatches divide the global batch, and its rows can be as planned."""
    rows, shards, data = config.global_batch_size, row_shards(mesh), config.data
    parts = shards * config.optimizer.accumulation_steps
    if rows % parts:
        raise UserError(
            f"global_batch_size={rows} is not a multiple of {parts} (mesh.data {mesh.shape['data']} × mesh.fsdp "
            f"{mesh.shape['fsdp']} × optimizer.accumulation_steps {config.optimizer.accumulation_steps})."
        )
    if data.tokens_per_batch and data.packing:
        raise UserError("data.tokens_per_batch is for rows that are not packed: packed rows are equally long.")
    if 0 < data.tokens_per_batch < rows * data.max_length:
        raise UserError(
            f"data.tokens_per_batch={data.tokens_per_batch} must be at least global_batch_size × data.max_length = "
            f"{rows * data.max_length}; with it, global_batch_size may be as low as {parts}."
        )


def constrain(x: jax.Array, *spec: str | tuple[str, ...] | None) -> jax.Array:
    """Constrains the layout of ``x`` on the active mesh, by mesh axis; returns ``x`` unchanged without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def gather(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    """Gathers a layer's parameter with these logical axes over ``fsdp``; an axis of blocks becomes whole.

    Compilers gather what a product reads. So this is for parameters that are smaller than what is made of them.
    """
    spec = [LOGICAL_TO_MESH.get(axis) for axis in axes]
    return constrain(x, *(axis if axis == "tensor" else None for axis in spec))


def parameter_sharding(
    path: str, shape: Sequence[int], axes: Sequence[str], mesh: Mesh | AbstractMesh
) -> NamedSharding:
    """Returns the sharding of a parameter with these logical axes.

    An axis of blocks is sharded as the axis that they divide, or stays whole if the mesh does not divide it.

    Raises:
      UserError: the mesh does not divide one of its axes.
      ValueError: a large parameter would be replicated although the mesh shards parameters, or an axis has no rule.
        Both are bugs in the declaration of the axes.
    """
    unknown = [axis for axis in axes if axis.removeprefix(BLOCKS) not in LOGICAL_TO_MESH]
    if unknown:
        raise ValueError(f"Parameter {path} has axes without a rule: {unknown}.")
    spec = [LOGICAL_TO_MESH[axis.removeprefix(BLOCKS)] for axis in axes]
    for place, (size, axis, mesh_axis) in enumerate(zip(shape, axes, spec, strict=True)):
        if mesh_axis and size % mesh.shape[mesh_axis]:
            if axis.startswith(BLOCKS):
                spec[place] = None
                continue
            raise UserError(
                f"mesh.{mesh_axis}={mesh.shape[mesh_axis]} does not divide the {axis} axis of {path}, which is {size}."
            )
    size = 1
    for length in shape:
        size *= length
    sharded = any(axis is not None for axis in spec)
    if size >= _LARGE and not sharded and mesh.shape["fsdp"] * mesh.shape["tensor"] > 1:
        raise ValueError(f"Parameter {path} of {size} elements would be replicated.")
    return NamedSharding(mesh, PartitionSpec(*spec))
