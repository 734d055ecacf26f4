"""A vision tower of one's own: DINOv2 (arXiv 2304.07193), whose blocks scale what they add to the residual stream."""

from stf_jax.models.layers import ones, parameter
from stf_jax.models.tensor_names import VECTOR, Tensor, name_layer, name_norm
from stf_jax.models.towers import clip, vit
from stf_jax.models.towers.base import TowerFamily, VisionConfig


class Block(vit.Block):
    def __init__(self, rngs, config, implementation):
        super().__init__(rngs, config, implementation)
        for name in ("attention_scale", "mlp_scale"):
            setattr(self, name, parameter(rngs, [(config.layers, "layers"), (config.width, "norm")], ones))

    def __call__(self, x):
        x = x + self.attention(self.attention_norm(x)) * self.attention_scale[...].astype(x.dtype)
        return x + self.mlp(self.mlp_norm(x)) * self.mlp_scale[...].astype(x.dtype)


class Tower(vit.VisionTower):
    block = Block


BLOCK, PATCHES = "encoder.layer.{layer}", "embeddings.patch_embeddings.projection"
NAMES = {
    **name_layer("patch_embed", PATCHES, clip.TENSOR_NAMES["patch_embed/kernel"].layout),
    "class_token": Tensor("embeddings.cls_token", ((), (), (0,))),
    "position_embed": Tensor("embeddings.position_embeddings", ((), (0,), (1,))),
    "blocks/attention_scale": Tensor(f"{BLOCK}.layer_scale1.lambda1", VECTOR),
    "blocks/mlp_scale": Tensor(f"{BLOCK}.layer_scale2.lambda1", VECTOR),
    **name_norm("blocks/attention_norm", f"{BLOCK}.norm1"),
    **name_norm("blocks/mlp_norm", f"{BLOCK}.norm2"),
    **name_layer("blocks/mlp/up", f"{BLOCK}.mlp.fc1"),
    **name_layer("blocks/mlp/down", f"{BLOCK}.mlp.fc2"),
}
for part, name in {"query": "attention.query", "key": "attention.key", "value": "attention.value"}.items():
    for leaf, end in {"kernel": "weight", "bias": "bias"}.items():
        layout = clip.TENSOR_NAMES[f"blocks/attention/{part}/{leaf}"].layout
        NAMES[f"blocks/attention/{part}/{leaf}"] = Tensor(f"{BLOCK}.attention.{name}.{end}", layout)
out = clip.TENSOR_NAMES["blocks/attention/out/kernel"].layout
NAMES |= name_layer("blocks/attention/out", f"{BLOCK}.attention.output.dense", out)

TRAITS = {"class_token": True, "pre_norm": False, "patch_bias": True}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
TINY = VisionConfig(*(32, 8, 32, 3, 4, 128), activation="gelu", norm_eps=1e-6, family="dino:DINO", **TRAITS, **IMAGENET)
DINO = TowerFamily(
    "dino:Tower",
    {"tiny": TINY},
    model_type="dinov2",
    fields={field: key for field, key in clip.FIELDS.items() if field != "mlp"},  # always 4·D
    traits=TRAITS,
    tensor_names=NAMES,
    extra={"use_mask_token": False},
    unused=("layernorm",),
    pretraining=("embeddings.mask_token",),
    **IMAGENET,
)
