"""A model without its weights."""

import dataclasses
import functools
import zlib
from collections.abc import Mapping

import flax
import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from stf_jax.config import ModelConfig, UserError
from stf_jax.models.adapters.base import Adapter, adapted_kernel
from stf_jax.models.layers import Linear, make_rngs
from stf_jax.models.quantized import Quantization, scale_path
from stf_jax.models.spec import ModelSpec
from stf_jax.models.vlm import VLM
from stf_jax.parallel.mesh import parameter_sharding

Params = dict[str, jax.Array]  # by path
Adapters = Mapping[str, Adapter]  # by the path of the kernel that each adapts
Quantizations = Mapping[str, Quantization]  # by the path of the kernel
TEACHER = "teacher"  # the attribute of a model, and so a part of paths: teacher/fusion/…


@dataclasses.dataclass(frozen=True)
class TeacherSpec:
    """A frozen model beside the one that trains.

    Attributes:
      folder: where its weights are.
      model: its shapes, and how it is computed.
      shared: the parts, ``vision`` and ``llm``, that it takes from the model that trains, where they are frozen too.
    """

    folder: str
    model: ModelSpec
    shared: frozenset[str]


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """A model without its weights: its structure, and the shape and logical axes of every parameter by path.

    Attributes:
      linears: paths of the kernels that an adapter may adapt, those of linear layers in blocks.
      adapters: those that the model has, each with its parameters beside the kernel's.
      quantized: of the kernels that are quantized, each with its scales beside it.
      teacher: the frozen model beside it, if it has one.
    """

    precision: str  # as in the config
    graph: nnx.GraphDef[VLM]
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    axes: Mapping[str, tuple[str, ...]]
    linears: frozenset[str]
    adapters: Adapters
    quantized: Quantizations
    teacher: TeacherSpec | None
    _noise: Mapping[str, int]  # layers of each stack of keys, by path

    def merge(self, *params: Params) -> VLM:
        """The model with the given trees as its weights; together they must hold every parameter, and :meth:`noise`."""
        return nnx.merge(self.graph, *(flax.traverse_util.unflatten_dict(tree, sep="/") for tree in params))

    def noise(self, key: jax.Array, rows: int) -> Params:
        """Keys for the random numbers of a training step, uint32 [L, B, 2] by path; empty if the model draws none."""
        return {
            path: jax.random.key_data(
                jax.random.split(jax.random.fold_in(key, zlib.crc32(path.encode())), (layers, rows))
            )
            for path, layers in self._noise.items()
        }

    @functools.cached_property
    def adapted(self) -> Mapping[str, str]:
        """The paths of the adapters' parameters, each with that of the kernel it belongs to."""
        kernels = ((path, adapted_kernel(path)) for path in self.shapes)
        return {path: kernel for path, kernel in kernels if kernel is not None and kernel in self.adapters}

    @functools.cached_property
    def added(self) -> frozenset[str]:
        """The paths of parameters that the plain model lacks: those of adapters and a teacher, and scales."""
        teacher = (path for path in self.shapes if path.startswith(f"{TEACHER}/"))
        return frozenset(self.adapted) | frozenset(map(scale_path, self.quantized)) | frozenset(teacher)

    @functools.cached_property
    def plain(self) -> Mapping[str, tuple[int, ...]]:
        """The shapes of the plain model's parameters: without what is added, and before kernels are quantized."""
        shapes = {path: leaf.shape for path, leaf in self.shapes.items()}
        whole = {
            path: kind.kernel_shape(shapes[path], shapes[scale_path(path)]) for path, kind in self.quantized.items()
        }
        return {path: whole.get(path, shape) for path, shape in shapes.items() if path not in self.added}

    def depth(self, path: str) -> int | None:
        """How many layers a parameter stacks; None if it belongs to no block."""
        return self.shapes[path].shape[0] if self.axes[path][:1] == ("layers",) else None

    def shardings(self, mesh: Mesh | AbstractMesh) -> dict[str, NamedSharding]:
        """The sharding of each parameter. Raises as :func:`stf_jax.parallel.mesh.parameter_sharding` does."""
        return {path: parameter_sharding(path, self.shapes[path].shape, self.axes[path], mesh) for path in self.shapes}


def build_model(
    rngs: nnx.Rngs,
    config: ModelConfig,
    adapters: Adapters,
    quantized: Quantizations,
    teacher: TeacherSpec | None = None,
) -> VLM:
    """A model with adapters, quantized kernels and a teacher; the rest is that of ``VLM(rngs, config)``.

    What adapters start as does not depend on what is quantized.

    Raises:
      UserError: as :class:`stf_jax.models.vlm.VLM`; a kernel has a size that its quantization cannot have.
    """
    model = VLM(rngs, config)

    def layer_of(kernel: str) -> Linear:
        layer: Linear = functools.reduce(getattr, kernel.split("/")[:-1], model)
        return layer

    for path, adapter in adapters.items():
        layer = layer_of(path)
        layer.adapter = nnx.data(adapter.build(rngs, layer))
    for path, kind in quantized.items():
        layer = layer_of(path)
        if (size := layer.inputs[-1]) % kind.multiple:
            raise UserError(
                f"{path} cannot be frozen in {kind.name}: its input axis has {size} elements, which must be a multiple "
                f"of {kind.multiple}."
            )
        layer.quantize(kind)
    if teacher is not None:
        model.teacher = VLM(rngs, teacher.model)
        for part in teacher.shared:
            delattr(model.teacher, part)
    return model


def blueprint(
    config: ModelConfig,
    adapters: Adapters | None = None,
    quantized: Quantizations | None = None,
    teacher: TeacherSpec | None = None,
) -> Blueprint:
    """The blueprint of a model, without allocating arrays. Raises UserError as :func:`build_model` does."""
    adapters, quantized = adapters or {}, quantized or {}
    model = nnx.eval_shape(lambda: build_model(make_rngs(0), config, adapters, quantized, teacher))
    graph, params, noise = nnx.split(model, nnx.Param, ...)
    leaves = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(params)}
    axes = {path: leaf.get_metadata()["axes"] for path, leaf in leaves.items()}
    kernels = {
        "/".join(map(str, (*path, "kernel")))
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Linear) and path[0] != TEACHER
    }
    return Blueprint(
        precision=config.precision,
        graph=graph,
        shapes={path: leaf.get_value() for path, leaf in leaves.items()},
        axes=axes,
        linears=frozenset(path for path in kernels if axes[path][0] == "layers"),
        adapters=adapters,
        quantized=quantized,
        teacher=teacher,
        _noise={"/".join(map(str, path)): leaf.get_value().shape[0] for path, leaf in nnx.to_flat_state(noise)},
    )
