"""Hugging Face's names and layouts for our parameters.

One table a family: path of our parameter → name of their tensor, and its layout. A layout says, for each axis of their
tensor, which axes of ours it holds, the outermost first; it is data, so that it can be followed in both directions:

    theirs [H·Dh, D], ours [D, H, Dh]      layout ((1, 2), (0,))

A parameter of a block is one tensor a layer over there, and a leading axis L here; layouts speak of one layer. Shapes
are the model's own declarations. Values keep their type.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from stf_jax.config import UserError
from stf_jax.models.llm import Decoder, LLMConfig
from stf_jax.models.vit import VisionConfig, VisionTower

Layout = tuple[tuple[int, ...], ...]


class Tensor(NamedTuple):
    """Where a parameter lies in a state dict; ``{layer}`` counts from 0."""

    name: str
    layout: Layout


#                                              theirs           ours
VECTOR: Layout = ((0,),)  #                    [D]              [D]
MATRIX: Layout = ((0,), (1,))  #               [V, D]           [V, D]
LINEAR: Layout = ((1,), (0,))  #               [out, in]        [in, out]
TO_HEADS: Layout = ((1, 2), (0,))  #           [H·Dh, D]        [D, H, Dh]
HEADS: Layout = ((0, 1),)  #                   [H·Dh]           [H, Dh]
FROM_HEADS: Layout = ((2,), (0, 1))  #         [D, H·Dh]        [H, Dh, D]
CONV: Layout = ((3,), (2,), (0,), (1,))  #     [out, in, h, w]  [h, w, in, out]

# CLIPVisionModel and SiglipVisionModel, without the prefix, which differs between releases.
VISION: Mapping[str, Tensor] = {
    "patch_embed/kernel": Tensor("embeddings.patch_embedding.weight", CONV),
    "patch_embed/bias": Tensor("embeddings.patch_embedding.bias", VECTOR),
    "class_token": Tensor("embeddings.class_embedding", VECTOR),
    "position_embed": Tensor("embeddings.position_embedding.weight", MATRIX),
    "pre_norm/scale": Tensor("pre_layrnorm.weight", VECTOR),  # their spelling
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

# LlamaForCausalLM, and Mistral, Qwen2 (biases) and Qwen3 (head norms), which name theirs alike.
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


def vision_tower(state: Mapping[str, np.ndarray], config: VisionConfig) -> dict:
    """Parameters of a :class:`VisionTower` from a CLIP or SigLIP state dict.

    The tower may lie under any prefix (``vision_model.``, beside a text model, inside a LLaVA checkpoint). What stands
    above the blocks is left unread.

    Raises:
      UserError: a tensor is missing, misshapen, or of a layer or kind that the tower does not have.
    """
    anchor = VISION["patch_embed/kernel"].name
    prefixes = [name.removesuffix(anchor) for name in state if name.endswith(anchor)]
    if len(prefixes) != 1:
        raise UserError(f"The weights hold {len(prefixes)} vision towers (tensors named *{anchor}), not one.")
    return _read(state, VISION, prefixes[0], lambda: VisionTower(nnx.Rngs(0), config))


def decoder(state: Mapping[str, np.ndarray], config: LLMConfig) -> dict:
    """Parameters of a :class:`Decoder` from a Llama, Mistral, Qwen2 or Qwen3 state dict.

    Raises:
      UserError: a tensor is missing, misshapen, or of a layer or kind that the decoder does not have.
    """
    return _read(state, DECODER, "", lambda: Decoder(nnx.Rngs(0), config))


def _read(state, table, prefix, build: Callable[[], nnx.Module]):
    tree = nnx.to_pure_dict(nnx.state(nnx.eval_shape(build)))
    read = set()

    def tensor(name, layout, shape):
        read.add(name)
        theirs = tuple(math.prod(shape[axis] for axis in axes) for axes in layout)
        if name not in state:
            raise UserError(f"The weights lack {name}, which the model needs in shape {theirs}.")
        value = np.asarray(state[name])
        if value.shape != theirs:
            raise UserError(f"Tensor {name} has shape {value.shape}; the model needs {theirs}.")
        order = [axis for axes in layout for axis in axes]
        return value.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))

    def parameter(path, declared):
        name, layout = table["/".join(key.key for key in path)]
        if "{layer}" not in name:
            return tensor(prefix + name, layout, declared.shape)
        layers, *shape = declared.shape
        return np.stack([tensor(prefix + name.format(layer=i), layout, tuple(shape)) for i in range(layers)])

    tree = jax.tree_util.tree_map_with_path(parameter, tree)
    # A layer too many, or a bias that goes unread, would load in silence and answer wrongly.
    in_layers = {prefix + name.partition("{layer}")[0] for name, _ in table.values() if "{layer}" in name}
    for name in state:
        if name.startswith(tuple(in_layers)) and name not in read and not name.endswith("rotary_emb.inv_freq"):
            raise UserError(f"Tensor {name} of shape {np.shape(state[name])} has no place in the model.")
    return tree
