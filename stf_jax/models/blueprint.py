"""A model without its weights."""

import dataclasses
from collections.abc import Mapping

import flax
import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from stf_jax.config import ModelConfig
from stf_jax.models.vlm import VLM
from stf_jax.parallel.mesh import parameter_sharding

Params = dict[str, jax.Array]  # by path


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """A model without its weights: its structure, and the shape and logical axes of every parameter by path."""

    precision: str  # as in the config
    graph: nnx.GraphDef[VLM]
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    axes: Mapping[str, tuple[str, ...]]

    def merge(self, *params: Params) -> VLM:
        """The model with the given trees as its weights; together they must hold every parameter."""
        return nnx.merge(self.graph, *(flax.traverse_util.unflatten_dict(tree, sep="/") for tree in params))

    def shardings(self, mesh: Mesh | AbstractMesh) -> dict[str, NamedSharding]:
        """The sharding of each parameter. Raises as :func:`stf_jax.parallel.mesh.parameter_sharding` does."""
        return {path: parameter_sharding(path, self.shapes[path].shape, self.axes[path], mesh) for path in self.shapes}


def blueprint(config: ModelConfig) -> Blueprint:
    """The blueprint of a model, without allocating arrays. Raises UserError as :class:`stf_jax.models.vlm.VLM` does."""
    graph, state = nnx.split(nnx.eval_shape(lambda: VLM(nnx.Rngs(0), config)))
    leaves = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
    return Blueprint(
        precision=config.precision,
        graph=graph,
        shapes={path: leaf.get_value() for path, leaf in leaves.items()},
        axes={path: leaf.get_metadata()["axes"] for path, leaf in leaves.items()},
    )
