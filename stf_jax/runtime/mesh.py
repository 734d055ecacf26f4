"""The device mesh, and the one table that lays parameters and batches out on it.

Mesh axes: ``data`` replicates parameters and splits the batch; ``fsdp`` splits both; ``tensor`` splits heads,
feed-forward and vocabulary. A size of 1 switches an axis off.
"""

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from stf_jax.config import MeshConfig, TrainConfig, UserError

LOGICAL_TO_MESH: Mapping[str, str | None] = {
    "embed": "fsdp",  # widths of residual streams, and whatever a layer reads from them
    "mlp": "tensor",  # hidden widths
    "heads": "tensor",
    "kv_heads": "tensor",
    "vocab": "tensor",
    "layers": None,  # scanned over
    "head_dim": None,
    "norm": None,  # scales and biases of norms, the class token
    "position": None,  # learned positions of the tower
    "window": None,  # sides of a convolution's window
    "channel": None,  # colours; input channels of a convolution whose output is sharded
}
BATCH = PartitionSpec(("data", "fsdp"))
_log = logging.getLogger(__name__)
_LARGE = 2**20  # elements; a larger parameter must not stay whole on every device of a mesh that shards


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of that shape over the devices, or over the first of them where it names fewer and one host has them.

    Where both ``data`` and ``fsdp`` are -1, ``fsdp`` fills a slice, whose devices have fast links to each other, and
    ``data`` counts the slices: gradients alone pass between them. Whatever the sizes, ``tensor`` stays in a slice.

    Args:
      devices: all there are, if not said. Those of a TPU topology that was only described will do.

    Raises:
      UserError: sizes that do not fit the devices, or leave ``tensor`` between slices.
    """
    devices = jax.devices() if devices is None else devices
    slices = slices_of(devices)
    one_host = len({device.process_index for device in devices}) == 1
    sizes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    if config.data == config.fsdp == -1:
        sizes["data"] = slices
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    named = 1
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise UserError(f"mesh.{axis}={size} must be at least 1, or -1 for all devices that are left.")
        named *= max(size, 1)
    if len(open_axes) > 1:
        raise UserError("Only one mesh axis may be -1, or mesh.data and mesh.fsdp both; set mesh.tensor to a size.")
    if open_axes:
        sizes[open_axes[0]] = len(devices) // named
    total = math.prod(sizes.values())
    fits = total == len(devices) or (total < len(devices) and not open_axes and one_host)
    if not fits or total == 0:
        raise UserError(
            f"A mesh of data×fsdp×tensor = {'×'.join(str(v) for v in (config.data, config.fsdp, config.tensor))} "
            f"does not fit the {len(devices)} {devices[0].platform} device(s) here; set mesh.data, mesh.fsdp and "
            "mesh.tensor to sizes whose product is that number."
            + (" (On CPU, JAX_NUM_CPU_DEVICES=8 simulates eight.)" if devices[0].platform == "cpu" else "")
        )
    placed = _placed(tuple(sizes.values()), slices, devices[:total])
    return Mesh(placed, tuple(sizes), axis_types=(AxisType.Auto,) * 3)


def _placed(sizes, slices, devices):
    """The devices as an array of these sizes, neighbours where there is most to say to each other."""
    how = {"devices": devices, "allow_split_physical_axes": True}
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, **how)
    data, fsdp, tensor = sizes
    data_over = math.gcd(data, slices)  # slices that each axis reaches over
    fsdp_over = slices // data_over
    if fsdp % fsdp_over:
        raise UserError(
            f"mesh.data={data} and mesh.fsdp={fsdp} leave mesh.tensor={tensor} between the {slices} slices here; set "
            f"mesh.data to a multiple of {slices}."
        )
    if fsdp_over > 1 and jax.process_index() == 0:
        _log.warning(
            f"mesh.fsdp={fsdp} reaches over {fsdp_over} slices, so parameters pass between them at every layer; with "
            f"mesh.data a multiple of {slices}, gradients alone would."
        )
    within = (data // data_over, fsdp // fsdp_over, tensor)
    return mesh_utils.create_hybrid_device_mesh(within, (data_over, fsdp_over, 1), **how)


def row_shards(mesh: Mesh) -> int:
    """Parts that a batch's rows are split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def slices_of(devices: Sequence[jax.Device]) -> int:
    """How many slices (of TPUs, or machines of GPUs) the devices are of."""
    return len({getattr(device, "slice_index", 0) for device in devices})  # those of CPUs have none


def share_of_rows(mesh: Mesh, process: int) -> tuple[int, int]:
    """Which share of a batch's rows a process reads, and how many shares there are: equal ones, of whole rows.

    Processes between which ``tensor`` reaches hold the same rows, so they read the same share.

    Raises:
      UserError: some rows, but not all, of two processes are the same.
    """
    shards, held = row_shards(mesh), {}
    for device, (rows,) in NamedSharding(mesh, BATCH).devices_indices_map((shards,)).items():
        held.setdefault(device.process_index, set()).add(rows.indices(shards)[0])
    shares = sorted({tuple(sorted(rows)) for rows in held.values()})
    if any(len(share) * len(shares) != shards for share in shares):
        tensor = mesh.shape["tensor"]
        raise UserError(f"mesh.tensor={tensor} leaves the hosts unequal shares of the rows; set it to a power of two.")
    return shares.index(tuple(sorted(held[process]))), len(shares)


@contextlib.contextmanager
def computing(mesh: Mesh, precision: str) -> Iterator[None]:
    """What compiled calls run in: the mesh, and products as exact as ``precision`` says.

    Left to themselves, TPUs and GPUs multiply float32 in fewer bits.
    """
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest" if precision == "float32" else "default"):
        yield


def check_batch(config: TrainConfig, mesh: Mesh) -> None:
    """Raises UserError where the mesh or the microbatches do not divide the global batch."""
    rows, shards = config.global_batch_size, row_shards(mesh)
    parts = shards * config.optimizer.accumulation_steps
    if rows % parts:
        raise UserError(
            f"global_batch_size={rows} is not a multiple of {parts} (mesh.data {mesh.shape['data']} × mesh.fsdp "
            f"{mesh.shape['fsdp']} × optimizer.accumulation_steps {config.optimizer.accumulation_steps})."
        )


def parameter_sharding(path: str, shape: Sequence[int], axes: Sequence[str], mesh: Mesh) -> NamedSharding:
    """How the parameter of these logical axes lies on the mesh.

    Raises:
      UserError: the mesh does not divide one of its axes.
      ValueError: a large parameter would stay whole although the mesh shards parameters, or an axis has no rule: our
        bug, where its axes are declared.
    """
    unknown = [axis for axis in axes if axis not in LOGICAL_TO_MESH]
    if unknown:
        raise ValueError(f"Parameter {path} has axes without a rule: {unknown}.")
    spec = [LOGICAL_TO_MESH[axis] for axis in axes]
    for size, axis, mesh_axis in zip(shape, axes, spec, strict=True):
        if mesh_axis and size % mesh.shape[mesh_axis]:
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
