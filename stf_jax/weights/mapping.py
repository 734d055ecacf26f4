"""Maps parameters to the tensors of a state dict by a table of names (models/tensor_names.py), in both directions.

Shapes come from the model's own declarations. Values keep their dtype.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx

from stf_jax.config import FusionConfig
from stf_jax.models.fusions.base import Fusion, find_fusion
from stf_jax.models.layers import make_rngs
from stf_jax.models.tensor_names import Layout, TensorNames, name_by_convention, name_layer
from stf_jax.models.towers.base import VisionConfig


def fusion_table(config: FusionConfig, vision: VisionConfig, out: int) -> TensorNames:
    """Returns the table of a fusion that reads this tower: the names that its class gives, or names by convention.

    ``out`` is the width of the language model.
    """
    names = getattr(find_fusion(config), "tensor_names", None)
    if names is not None:
        return names(config)
    connector = nnx.eval_shape(lambda: Fusion(make_rngs(0), config, vision, out)).connector
    leaves = nnx.to_flat_state(nnx.state(connector))
    axes = {"/".join(map(str, path)): leaf.get_metadata()["axes"] for path, leaf in leaves}
    return name_by_convention(axes, "mm_projector")


# LLaVA's projector under the names of transformers' LlavaForConditionalGeneration.
LLAVA_PROJECTOR: TensorNames = {**name_layer("first", "linear_1"), **name_layer("second", "linear_2")}


@dataclasses.dataclass(frozen=True)
class TensorMapping:
    """The tensors of one parameter in a state dict: one tensor, or one per layer for a stacked parameter."""

    names: tuple[str, ...]
    layout: Layout
    shape: tuple[int, ...]  # of the parameter; of one layer if stacked
    stacked: bool

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Shape of each tensor in Hugging Face's layout."""
        return tuple(math.prod(self.shape[axis] for axis in axes) for axes in self.layout)

    @property
    def transposed(self) -> bool:
        """Whether the conversion reorders or merges axes."""
        return self.layout != tuple((axis,) for axis in range(len(self.layout)))

    def from_hf(self, tensors: Iterable[np.ndarray]) -> np.ndarray:
        """Builds the parameter from its tensors, given in the order of ``names``."""
        order = [axis for axes in self.layout for axis in axes]
        layers = (t.reshape([self.shape[axis] for axis in order]).transpose(np.argsort(order)) for t in tensors)
        if not self.stacked:
            return next(layers)
        value: np.ndarray | None = None
        for layer, tensor in enumerate(layers):  # copied one by one, so that only one layer is in memory twice
            if value is None:
                value = np.empty((len(self.names), *self.shape), tensor.dtype)
            value = value.astype(jnp.promote_types(value.dtype, tensor.dtype), copy=False)  # layers may differ in dtype
            value[layer] = tensor
        assert value is not None  # a stacked parameter has a layer
        return value

    def to_hf(self, value: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the names and tensors of the parameter; the inverse of :meth:`from_hf`."""
        order = [axis for axes in self.layout for axis in axes]
        for name, layer in zip(self.names, value if self.stacked else [value], strict=True):
            yield name, np.ascontiguousarray(layer.transpose(order).reshape(self.hf_shape))


def param_shapes(build: Callable[[], nnx.Module]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a module's parameters by path, without allocating them."""
    flat = nnx.to_flat_state(nnx.state(nnx.eval_shape(build)))
    return {"/".join(map(str, path)): leaf.get_value().shape for path, leaf in flat}


def rename(name: str, prefixes: Mapping[str, str]) -> str:
    """Replaces the longest of the prefixes that the name has. Raises StopIteration if it has none."""
    prefix = next(prefix for prefix in sorted(prefixes, key=len, reverse=True) if name.startswith(prefix))
    return prefixes[prefix] + name.removeprefix(prefix)


def map_parameters(
    table: TensorNames, shapes: Mapping[str, tuple[int, ...]], prefixes: Mapping[str, str]
) -> dict[str, TensorMapping]:
    """Maps each parameter of a module, by its path in that module, to its tensors.

    Args:
      table: one of the tables above.
      shapes: shapes of the module's parameters.
      prefixes: prefixes of names in the table → their replacements in this state dict
        (``{"model.": "language_model."}``).
    """
    mappings: dict[str, TensorMapping] = {}
    for path, shape in shapes.items():
        name, layout = table[path]
        name = rename(name, prefixes)
        if "{layer}" in name:
            names = tuple(name.format(layer=i) for i in range(shape[0]))
            mappings[path] = TensorMapping(names, layout, shape[1:], stacked=True)
        else:
            mappings[path] = TensorMapping((name,), layout, shape, stacked=False)
    return mappings
