"""CLIP's vision tower (arXiv 2103.00020): a class token, a norm before the blocks, patches without bias."""

from stf_jax.models.tensor_names import CONV, FROM_HEADS, HEADS, LINEAR, MATRIX, TO_HEADS, VECTOR, Tensor, TensorNames
from stf_jax.models.towers.base import Channels, TowerFamily, VisionConfig

MODULE = "stf_jax.models.towers.vit:VisionTower"
FIELDS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp": "intermediate_size",
    "activation": "hidden_act",
    "norm_eps": "layer_norm_eps",
}
TENSOR_NAMES: TensorNames = {
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
_TRAITS = {"class_token": True, "pre_norm": True, "patch_bias": False}
_MEAN: Channels = (0.48145466, 0.4578275, 0.40821073)
_STD: Channels = (0.26862954, 0.26130258, 0.27577711)


def _clip(
    image_size: int, patch_size: int, width: int = 128, layers: int = 8, heads: int = 4, mlp: int = 512
) -> VisionConfig:
    """The defaults are the demo's: eight blocks provide eight depths to tap."""
    return VisionConfig(
        *(image_size, patch_size, width, layers, heads, mlp),
        activation="quick_gelu",
        norm_eps=1e-5,
        mean=_MEAN,
        std=_STD,
        family="clip",
        **_TRAITS,
    )


PRESETS = {
    "clip-l-14-336": _clip(336, 14, width=1024, layers=24, heads=16, mlp=4096),
    "clip-b-16-224": _clip(224, 16, width=768, layers=12, heads=12, mlp=3072),
    "clip-mini-16-384": _clip(384, 16),
    "clip-mini-16-96": _clip(96, 16),
    "clip-mini-8-96": _clip(96, 8),
    "clip-mini-8-48": _clip(48, 8),
}
COMPONENTS = {
    "clip": TowerFamily(
        MODULE,
        PRESETS,
        model_type="clip_vision_model",
        fields=FIELDS,
        traits=_TRAITS,
        mean=_MEAN,
        std=_STD,
        tensor_names=TENSOR_NAMES,
        wrapper="vision_model.",
        unused=("post_layernorm",),
    )
}
