"""Hugging Face's tensor names and layouts for our parameters.

One table per model family (models/tensor_names.py). Shapes come from the model's own declarations. Values keep their
dtype.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx

from stf_jax.config import FusionConfig
from stf_jax.models.fusions.base import Fusion, find_fusion
from stf_jax.models.tensor_names import (
    CONV,
    FROM_HEADS,
    HEADS,
    LINEAR,
    MATRIX,
    TO_HEADS,
    VECTOR,
    Layout,
    Tensor,
    TensorNames,
    name_by_convention,
    name_layer,
)
from stf_jax.models.vit import VisionConfig

# CLIPVisionModel and SiglipVisionModel, without the prefix, which differs between releases.
VISION: TensorNames = {
    "patch_embed/kernel": Tensor("embeddings.patch_embedding.weight", CONV),
    "patch_embed/bias": Tensor("embeddings.patch_embedding.bias", VECTOR),
    "class_token": Tensor("embeddings.class_embedding", VECTOR),
    "position_embed": Tensor("embeddings.position_embedding.weight", MATRIX),
    "pre_norm/scale": Tensor("pre_layrnorm.weight", VECTOR),  # transformers' spelling
    "pre_norm/bias": Tensor("pre_layrnorm.bias", VECTOR),
    "blocks/attention_norm/scale": Tensor("encoder.layers.{layer}.layer_norm1.weight", VECTOR),
    "blocks/attention_norm/bias": Tensor("encoder.layers.{layer}.layer_norm1.bias", VECTOR),
    "blocks/attention/query/kernel": Tensor("encoder.layers.{layer}.self_attn.q_proj.weight", TO_HEADS),
    "blocks/attention/query/bias": Tensor("encoder.layers.{layer}.self_attn.q_proj.bias", HEADS),
    "blocks/attention/key/kernel": Tensor("encoder.layers.{layer}.self_attn.k_proj.weight", TO_HEADS),
    "blocks/attention/key/bias": Tensor("encoder.layers.{layer}.self_attn.k_proj.bias", HEADS),
    "blocks/attention/value/kernel": Tensor("encoder.layers.{layer}.self_attn.v_proj.weight", TO_HEADS),
    "blocks/attention/value/bias": Tensor("encoder.layers.{layer}.self_attn.v_proj.bias", HEADS),
    "blocks/attention/out/kernel": Tensor("encoder.layers.{layer}.self_attn.out_proj.weight", FROM_HEADS),
    "blocks/attention/out/bias": Tensor("encoder.layers.{layer}.self_attn.out_proj.bias", VECTOR),
    "blocks/mlp_norm/scale": Tensor("encoder.layers.{layer}.layer_norm2.weight", VECTOR),
    "blocks/mlp_norm/bias": Tensor("encoder.layers.{layer}.layer_norm2.bias", VECTOR),
    "blocks/mlp/up/kernel": Tensor("encoder.layers.{layer}.mlp.fc1.weight", LINEAR),
    "blocks/mlp/up/bias": Tensor("encoder.layers.{layer}.mlp.fc1.bias", VECTOR),
    "blocks/mlp/down/kernel": Tensor("encoder.layers.{layer}.mlp.fc2.weight", LINEAR),
    "blocks/mlp/down/bias": Tensor("encoder.layers.{layer}.mlp.fc2.bias", VECTOR),
}

# LlamaForCausalLM, and Mistral, Qwen2 (biases) and Qwen3 (head norms), which use the same names.
DECODER: TensorNames = {
    "embedding": Tensor("model.embed_tokens.weight", MATRIX),
    "blocks/attention_norm/scale": Tensor("model.layers.{layer}.input_layernorm.weight", VECTOR),
    "blocks/attention/query/kernel": Tensor("model.layers.{layer}.self_attn.q_proj.weight", TO_HEADS),
    "blocks/attention/query/bias": Tensor("model.layers.{layer}.self_attn.q_proj.bias", HEADS),
    "blocks/attention/key/kernel": Tensor("model.layers.{layer}.self_attn.k_proj.weight", TO_HEADS),
    "blocks/attention/key/bias": Tensor("model.layers.{layer}.self_attn.k_proj.bias", HEADS),
    "blocks/attention/value/kernel": Tensor("model.layers.{layer}.self_attn.v_proj.weight", TO_HEADS),
    "blocks/attention/value/bias": Tensor("model.layers.{layer}.self_attn.v_proj.bias", HEADS),
    "blocks/attention/query_norm/scale": Tensor("model.layers.{layer}.self_attn.q_norm.weight", VECTOR),
    "blocks/attention/key_norm/scale": Tensor("model.layers.{layer}.self_attn.k_norm.weight", VECTOR),
    "blocks/attention/out/kernel": Tensor("model.layers.{layer}.self_attn.o_proj.weight", FROM_HEADS),
    "blocks/mlp_norm/scale": Tensor("model.layers.{layer}.post_attention_layernorm.weight", VECTOR),
    "blocks/mlp/gate/kernel": Tensor("model.layers.{layer}.mlp.gate_proj.weight", LINEAR),
    "blocks/mlp/up/kernel": Tensor("model.layers.{layer}.mlp.up_proj.weight", LINEAR),
    "blocks/mlp/down/kernel": Tensor("model.layers.{layer}.mlp.down_proj.weight", LINEAR),
    "norm/scale": Tensor("model.norm.weight", VECTOR),
    "head/kernel": Tensor("lm_head.weight", LINEAR),
}


def fusion_table(config: FusionConfig, vision: VisionConfig, out: int) -> dict[str, Tensor]:
    """Returns the table of a fusion that reads this tower: the names that its class gives, or names by convention.

    ``out`` is the width of the language model.
    """
    names = getattr(find_fusion(config), "tensor_names", None)
    if names is not None:
        return dict(names(config))
    connector = nnx.eval_shape(lambda: Fusion(nnx.Rngs(0), config, vision, out)).connector
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
        prefix = next(prefix for prefix in sorted(prefixes, key=len, reverse=True) if name.startswith(prefix))
        name = prefixes[prefix] + name.removeprefix(prefix)
        if "{layer}" in name:
            names = tuple(name.format(layer=i) for i in range(shape[0]))
            mappings[path] = TensorMapping(names, layout, shape[1:], stacked=True)
        else:
            mappings[path] = TensorMapping((name,), layout, shape, stacked=False)
    return mappings
