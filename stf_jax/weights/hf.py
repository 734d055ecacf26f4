"""Hugging Face's tensor names and layouts for our parameters.

One table per model family maps the path of a parameter to the name of its tensor and a layout. For each axis of the
tensor, the layout lists the axes of the parameter that it holds, outermost first. Layouts are data, so the same table
serves imports and exports:

    tensor [H·Dh, D], parameter [D, H, Dh]      layout ((1, 2), (0,))

A parameter of a block has a leading axis L here and is one tensor per layer in Hugging Face; layouts describe one
layer. Shapes come from the model's own declarations. Values keep their dtype.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from stf_jax.config import FusionConfig

Layout = tuple[tuple[int, ...], ...]


class Tensor(NamedTuple):
    """The name and layout of a parameter in a state dict; ``{layer}`` counts from 0."""

    name: str
    layout: Layout


#                                              tensor           parameter
VECTOR: Layout = ((0,),)  #                    [D]              [D]
MATRIX: Layout = ((0,), (1,))  #               [V, D]           [V, D]
LINEAR: Layout = ((1,), (0,))  #               [out, in]        [in, out]
TO_HEADS: Layout = ((1, 2), (0,))  #           [H·Dh, D]        [D, H, Dh]
HEADS: Layout = ((0, 1),)  #                   [H·Dh]           [H, Dh]
FROM_HEADS: Layout = ((2,), (0, 1))  #         [D, H·Dh]        [H, Dh, D]
CONV: Layout = ((3,), (2,), (0,), (1,))  #     [out, in, h, w]  [h, w, in, out]
POINTWISE: Layout = ((1,), (0,), (), ())  #    [out, in, 1, 1]  [in, out]
DEPTHWISE: Layout = ((2,), (), (0,), (1,))  #  [C, 1, h, w]     [h, w, C]
UNFOLDED: Layout = ((3,), (2, 0, 1))  #        [out, in·h·w]    [h, w, in, out]

# CLIPVisionModel and SiglipVisionModel, without the prefix, which differs between releases.
VISION: Mapping[str, Tensor] = {
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
DECODER: Mapping[str, Tensor] = {
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

# LLaVA's projector, and LLaVA-STF's two modules under LLaVA's names: "crosslayer" is MBTF. STF's convolution is a
# linear layer over the values of a window, channel by channel.
MBTF: Mapping[str, Tensor] = {
    "mbtf/first/kernel": Tensor("mm_projector_crosslayer.0.weight", LINEAR),
    "mbtf/first/bias": Tensor("mm_projector_crosslayer.0.bias", VECTOR),
    "mbtf/second/kernel": Tensor("mm_projector_crosslayer.2.weight", LINEAR),
    "mbtf/second/bias": Tensor("mm_projector_crosslayer.2.bias", VECTOR),
}
STF: Mapping[str, Tensor] = {
    "tokens/conv/kernel": Tensor("mm_projector.0.weight", UNFOLDED),
    "tokens/conv/bias": Tensor("mm_projector.0.bias", VECTOR),
    "tokens/out/kernel": Tensor("mm_projector.2.weight", LINEAR),
    "tokens/out/bias": Tensor("mm_projector.2.bias", VECTOR),
}
PROJECTOR: Mapping[str, Tensor] = {
    "tokens/first/kernel": Tensor("mm_projector.0.weight", LINEAR),
    "tokens/first/bias": Tensor("mm_projector.0.bias", VECTOR),
    "tokens/second/kernel": Tensor("mm_projector.2.weight", LINEAR),
    "tokens/second/bias": Tensor("mm_projector.2.bias", VECTOR),
}
POOLED: Mapping[str, Tensor] = {path.replace("tokens/", "tokens/projector/"): t for path, t in PROJECTOR.items()}
STF_PAPER: Mapping[str, Tensor] = {
    "tokens/conv/kernel": Tensor("mm_projector.0.weight", UNFOLDED),
    "tokens/conv/bias": Tensor("mm_projector.0.bias", VECTOR),
    "tokens/mix/kernel": Tensor("mm_projector.2.weight", LINEAR),
    "tokens/mix/bias": Tensor("mm_projector.2.bias", VECTOR),
    "tokens/out/kernel": Tensor("mm_projector.4.weight", LINEAR),
    "tokens/out/bias": Tensor("mm_projector.4.bias", VECTOR),
}


def _layer(path: str, name: str, kernel: Layout = LINEAR, bias: Layout = VECTOR) -> dict[str, Tensor]:
    return {f"{path}/kernel": Tensor(f"{name}.weight", kernel), f"{path}/bias": Tensor(f"{name}.bias", bias)}


def _norm(path: str, name: str) -> dict[str, Tensor]:
    return {f"{path}/scale": Tensor(f"{name}.weight", VECTOR), f"{path}/bias": Tensor(f"{name}.bias", VECTOR)}


def _mlp(path: str, name: str) -> dict[str, Tensor]:
    return _layer(f"{path}/first", f"{name}.0") | _layer(f"{path}/second", f"{name}.2")


def _attention(path: str, name: str) -> dict[str, Tensor]:
    heads = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
    table = _layer(f"{path}/out", f"{name}.out_proj", FROM_HEADS)
    for projection, hf_name in heads.items():
        table |= _layer(f"{path}/{projection}", f"{name}.{hf_name}", TO_HEADS, HEADS)
    return table


def _conv_block(path: str, name: str) -> dict[str, Tensor]:
    return {
        **_layer(f"{path}/first", f"{name}.conv1", POINTWISE),
        **_norm(f"{path}/first_norm", f"{name}.norm1"),
        **_layer(f"{path}/depthwise", f"{name}.conv2", DEPTHWISE),
        **_norm(f"{path}/depthwise_norm", f"{name}.norm2"),
        **_layer(f"{path}/squeeze", f"{name}.squeeze", POINTWISE),
        **_layer(f"{path}/excite", f"{name}.excite", POINTWISE),
        **_layer(f"{path}/last", f"{name}.conv3", POINTWISE),
        **_norm(f"{path}/last_norm", f"{name}.norm3"),
    }


# The classes in weights/torch_package/modeling_stf.py.
LDP_V2: Mapping[str, Tensor] = {
    **_mlp("tokens/projector", "mm_projector.mlp"),
    **_layer("tokens/position", "mm_projector.peg", DEPTHWISE),
}
C_ABSTRACTOR: Mapping[str, Tensor] = {
    **_mlp("tokens/projector", "mm_projector.mlp"),
    "tokens/position_embed": Tensor("mm_projector.position_embedding", MATRIX),
    **_conv_block("tokens/before", "mm_projector.before.{layer}"),
    **_conv_block("tokens/after", "mm_projector.after.{layer}"),
}
RESAMPLER: Mapping[str, Tensor] = {
    "tokens/queries": Tensor("mm_projector.query_tokens", MATRIX),
    **_layer("tokens/enter", "mm_projector.input"),
    **_norm("tokens/blocks/query_norm", "mm_projector.layers.{layer}.query_norm"),
    **_norm("tokens/blocks/patch_norm", "mm_projector.layers.{layer}.patch_norm"),
    **_attention("tokens/blocks/attention", "mm_projector.layers.{layer}.attention"),
    **_norm("tokens/blocks/mlp_norm", "mm_projector.layers.{layer}.mlp_norm"),
    **_layer("tokens/blocks/gate", "mm_projector.layers.{layer}.gate_proj"),
    **_layer("tokens/blocks/up", "mm_projector.layers.{layer}.up_proj"),
    **_norm("tokens/blocks/hidden_norm", "mm_projector.layers.{layer}.hidden_norm"),
    **_layer("tokens/blocks/down", "mm_projector.layers.{layer}.down_proj"),
    **_layer("tokens/exit", "mm_projector.output"),
}
TOKEN_PACKER: Mapping[str, Tensor] = {
    **_layer("tokens/coarse", "mm_projector.query"),
    **_mlp("tokens/keys", "mm_projector.key"),
    **_mlp("tokens/values", "mm_projector.value"),
    **_norm("tokens/query_norm", "mm_projector.query_norm"),
    **_norm("tokens/key_norm", "mm_projector.key_norm"),
    **_norm("tokens/value_norm", "mm_projector.value_norm"),
    **_attention("tokens/attention", "mm_projector.attention"),
    **_mlp("tokens/projector", "mm_projector.mlp"),
}


def fusion_table(config: FusionConfig) -> dict[str, Tensor]:
    """Returns the table of a fusion. Fusions other than the authors' use the names in weights/torch_package."""
    stf = STF_PAPER if config.variant == "paper" else STF
    tokens = {
        "mlp": PROJECTOR,
        "avg_pool": POOLED,
        "pixel_shuffle": POOLED,
        "ldp_v2": LDP_V2,
        "c_abstractor": C_ABSTRACTOR,
        "resampler": RESAMPLER,
        "token_packer": TOKEN_PACKER,
        "stf": stf,
        "mbtf": PROJECTOR,
        "mbtf_stf": stf,
    }[config.fusion]
    return {**(MBTF if config.fusion.startswith("mbtf") else {}), **tokens}


# The same projector under the names of transformers' LlavaForConditionalGeneration.
LLAVA_HF: Mapping[str, Tensor] = {
    path: Tensor(name.replace("mm_projector.0", "linear_1").replace("mm_projector.2", "linear_2"), layout)
    for path, (name, layout) in PROJECTOR.items()
}


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
    table: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], prefixes: Mapping[str, str]
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
