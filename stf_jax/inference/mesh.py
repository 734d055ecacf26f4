"""The mesh on which a training run evaluates."""

from jax.sharding import AbstractMesh, Mesh

from stf_jax.config import UserError
from stf_jax.models.blueprint import Blueprint
from stf_jax.parallel.mesh import count_slices


def inference_mesh(plan: Blueprint, mesh: Mesh) -> Mesh:
    """Returns a mesh of the same devices for decoding: ``tensor`` as large as possible, ``data`` for the rest.

    A decoded token needs all weights. Where ``fsdp`` splits them, every device would receive the whole model for it;
    where ``tensor`` does, each device uses its own part. ``tensor`` divides what it splits, such as the kv heads, and
    stays within a slice of TPUs or a machine of GPUs. The order of the devices is kept, so parameters move between both
    meshes inside a compiled program.
    """
    devices = mesh.devices.flat
    per_slice = mesh.size // count_slices(list(devices))
    sizes = (size for size in range(per_slice, 0, -1) if per_slice % size == 0)
    tensor = next(size for size in sizes if size == 1 or _divides(plan, size))
    return Mesh(mesh.devices.reshape(-1, 1, tensor), mesh.axis_names, axis_types=mesh.axis_types)


def _divides(plan: Blueprint, tensor: int) -> bool:
    try:
        plan.shardings(AbstractMesh((1, 1, tensor), ("data", "fsdp", "tensor")))
    except UserError:
        return False
    return True
