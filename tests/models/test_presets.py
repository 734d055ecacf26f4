"""Presets against transformers: each public configuration, built without memory, with its parameters counted."""

import math

import jax
import pytest
import torch
from flax import nnx
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from stf_jax.config import UserError
from stf_jax.models.decoders.transformer import Decoder
from stf_jax.models.spec import LLM, VISION, llm_preset, vision_preset
from stf_jax.models.towers.vit import VisionTower

LLAMA, MISTRAL = (LlamaConfig, LlamaForCausalLM), (MistralConfig, MistralForCausalLM)
QWEN2, QWEN3 = (Qwen2Config, Qwen2ForCausalLM), (Qwen3Config, Qwen3ForCausalLM)

# name → family; vocab, width, layers, heads, kv heads, mlp; tied, rope theta, norm eps; parameters
PUBLIC = {
    "vicuna-7b": (LLAMA, (32_000, 4096, 32, 32, 32, 11_008), (False, 1e4, 1e-5), 6_738_415_616),
    "vicuna-13b": (LLAMA, (32_000, 5120, 40, 40, 40, 13_824), (False, 1e4, 1e-5), 13_015_864_320),
    "llama-3-8b": (LLAMA, (128_256, 4096, 32, 32, 8, 14_336), (False, 5e5, 1e-5), 8_030_261_248),
    "mistral-7b": (MISTRAL, (32_000, 4096, 32, 32, 8, 14_336), (False, 1e6, 1e-5), 7_241_732_096),
    "qwen2.5-0.5b": (QWEN2, (151_936, 896, 24, 14, 2, 4864), (True, 1e6, 1e-6), 494_032_768),
    "qwen2.5-7b": (QWEN2, (152_064, 3584, 28, 28, 4, 18_944), (False, 1e6, 1e-6), 7_615_616_512),
    "qwen3-0.6b": (QWEN3, (151_936, 1024, 28, 16, 8, 3072), (True, 1e6, 1e-6), 596_049_920),
    "qwen3-8b": (QWEN3, (151_936, 4096, 36, 32, 8, 12_288), (False, 1e6, 1e-6), 8_190_735_360),
    "smollm2-135m": (LLAMA, (49_152, 576, 30, 9, 3, 1536), (True, 1e5, 1e-5), 134_515_008),
    "smollm2-360m": (LLAMA, (49_152, 960, 32, 15, 5, 2560), (True, 1e5, 1e-5), 361_821_120),
    "smollm2-1.7b": (LLAMA, (49_152, 2048, 24, 32, 32, 8192), (True, 1.3e5, 1e-5), 1_711_376_384),
}
CLIP, SIGLIP = (CLIPVisionConfig, CLIPVisionModel), (SiglipVisionConfig, SiglipVisionModel)

# name → family; image size, patch size, width, layers, heads, mlp; norm eps, activation
PUBLIC_TOWERS = {
    "clip-l-14-336": (CLIP, (336, 14, 1024, 24, 16, 4096), (1e-5, "quick_gelu")),
    "clip-b-16-224": (CLIP, (224, 16, 768, 12, 12, 3072), (1e-5, "quick_gelu")),
    "siglip-so400m-14-384": (SIGLIP, (384, 14, 1152, 27, 16, 4304), (1e-6, "gelu_pytorch_tanh")),
    "siglip-b-16-384": (SIGLIP, (384, 16, 768, 12, 12, 3072), (1e-6, "gelu_pytorch_tanh")),
    "siglip-b-16-256": (SIGLIP, (256, 16, 768, 12, 12, 3072), (1e-6, "gelu_pytorch_tanh")),
}


def count(build):
    return sum(math.prod(p.shape) for p in jax.tree.leaves(nnx.state(nnx.eval_shape(build))))


def test_every_public_preset_is_covered():
    own_marks = ("-mini", "-tiny")  # presets of the demo and of the tests
    assert {name for name in LLM if not any(suffix in name for suffix in own_marks)} == PUBLIC.keys()
    assert {name for name in VISION if not any(suffix in name for suffix in own_marks)} == PUBLIC_TOWERS.keys()


@pytest.mark.parametrize("name", PUBLIC)
def test_llm(name):
    (kind, model), (vocab, width, layers, heads, kv_heads, mlp), (tied, theta, eps), published = PUBLIC[name]
    config = kind(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=mlp,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        expected = sum(p.numel() for p in model(config).parameters())
    preset = llm_preset(name)
    assert expected == published
    assert count(lambda: Decoder(nnx.Rngs(0), preset)) == expected
    # Properties that the parameter count does not show.
    head_dim = getattr(config, "head_dim", width // heads)
    assert (preset.heads, preset.kv_heads, preset.head_dim) == (heads, kv_heads, head_dim)
    assert (preset.rope_theta, preset.norm_eps, preset.rope_scaling) == (theta, eps, None)


@pytest.mark.parametrize("name", PUBLIC_TOWERS)
def test_tower(name):
    (kind, model), (image, patch, width, layers, heads, mlp), (eps, activation) = PUBLIC_TOWERS[name]
    config = kind(
        image_size=image,
        patch_size=patch,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=mlp,
    )
    with torch.device("meta"):
        names = dict(model(config).named_parameters())
    expected = sum(p.numel() for name, p in names.items() if not name.startswith(("post_layernorm.", "head.")))
    preset = vision_preset(name)
    assert count(lambda: VisionTower(nnx.Rngs(0), preset)) == expected
    assert preset.heads == heads
    assert preset.norm_eps == config.layer_norm_eps == eps
    assert {"quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}[preset.activation] == activation
    assert config.hidden_act == activation


def test_grids():
    grids = {name: preset.grid for name, preset in VISION.items()}
    assert grids["clip-l-14-336"] == 24
    assert grids["siglip-so400m-14-384"] == 27
    assert grids["siglip-b-16-256"] == 16
    assert grids["siglip-b-16-384"] == 24
    assert grids["clip-mini-16-96"] == 6


def test_unknown_preset_suggests_the_closest():
    with pytest.raises(UserError, match=r"model\.llm='vicuna7b'; did you mean 'vicuna-7b'"):
        llm_preset("vicuna7b")
    with pytest.raises(UserError, match=r"model\.vision='clip-l-336'; did you mean 'clip-l-14-336'"):
        vision_preset("clip-l-336")
