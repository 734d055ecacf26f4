"""SigLIP's vision tower (arXiv 2303.15343): no class token, no norm before the blocks, tanh-GELU, patches with bias."""

from stf_jax.models.towers.base import Channels, TowerFamily, VisionConfig
from stf_jax.models.towers.clip import FIELDS, MODULE, TENSOR_NAMES

_TRAITS = {"class_token": False, "pre_norm": False, "patch_bias": True}
_HALF: Channels = (0.5, 0.5, 0.5)


def _siglip(
    image_size: int, patch_size: int, width: int = 128, layers: int = 8, heads: int = 4, mlp: int = 512
) -> VisionConfig:
    """The defaults are the demo's, as CLIP's are."""
    return VisionConfig(
        *(image_size, patch_size, width, layers, heads, mlp),
        activation="gelu_tanh",
        norm_eps=1e-6,
        mean=_HALF,
        std=_HALF,
        family="siglip",
        **_TRAITS,
    )


PRESETS = {
    "siglip-so400m-14-384": _siglip(384, 14, width=1152, layers=27, heads=16, mlp=4304),
    "siglip-b-16-384": _siglip(384, 16, width=768, layers=12, heads=12, mlp=3072),
    "siglip-b-16-256": _siglip(256, 16, width=768, layers=12, heads=12, mlp=3072),
    "siglip-mini-16-96": _siglip(96, 16),
    "siglip-mini-8-96": _siglip(96, 8),
}
COMPONENTS = {
    "siglip": TowerFamily(
        MODULE,
        PRESETS,
        model_type="siglip_vision_model",
        fields=FIELDS,
        traits=_TRAITS,
        mean=_HALF,
        std=_HALF,
        tensor_names=TENSOR_NAMES,
        extra={"vision_use_head": False},
        wrapper="vision_model.",
        unused=("post_layernorm",),
    )
}
