"""Reference models: small models of transformers' classes, and their weights as parameters of our modules."""

import functools
import json
from collections.abc import Mapping

import numpy as np
import torch
from flax import nnx, traverse_util
from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from stf_jax.models.decoders import llama
from stf_jax.models.decoders.base import LLMConfig
from stf_jax.models.decoders.transformer import Decoder
from stf_jax.models.spec import vision_preset
from stf_jax.models.towers import clip
from stf_jax.models.towers.base import VisionConfig
from stf_jax.models.towers.vit import VisionTower
from stf_jax.weights.mapping import map_parameters, param_shapes

VISION = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 7, "layer_norm_eps": 1e-3}
TEXT = {"vocab_size": 62, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-3, "max_position_embeddings": 256}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 100}
DECODERS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**TEXT)),
    "llama-tied": (LlamaForCausalLM, LlamaConfig(**TEXT, tie_word_embeddings=True)),
    "llama-3": (LlamaForCausalLM, LlamaConfig(**TEXT, rope_parameters=LLAMA3)),
    "mistral": (MistralForCausalLM, MistralConfig(**TEXT, sliding_window=None)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**TEXT, tie_word_embeddings=True)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**TEXT, rope_parameters={"rope_type": "default", "rope_theta": 5e5})),
}


def make_model(model_class, config):
    """A model of transformers' with noise on all parameters, the same in any order of tests."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomize(model_class(config))


def randomize(model):
    """Adds noise to all parameters, so that biases and norms affect the outputs."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * (0.7 * p.shape[-1] ** -0.5 if p.ndim > 1 else 0.2))
    return model.eval()


@functools.cache
def decoder(family):
    model_class, config = DECODERS[family]
    return make_model(model_class, config)


@functools.cache
def tower(family):
    if family == "clip":
        return make_model(CLIPVisionModel, CLIPVisionConfig(**VISION))
    return make_model(SiglipVisionModel, SiglipVisionConfig(**VISION))


@functools.cache
def llava():
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**TEXT), image_token_index=60,
        vision_feature_layer=-2,
    )  # fmt: skip
    return make_model(LlavaForConditionalGeneration, config)


def normalize(images, family="clip"):
    """Images uint8 [B, H, W, 3] as that tower reads them in PyTorch."""
    config = vision_preset("clip-l-14-336" if family == "clip" else "siglip-so400m-14-384")
    values = (images / 255 - np.array(config.mean)) / np.array(config.std)
    return torch.from_numpy(values.transpose(0, 3, 1, 2)).float()


def to_original_names(state):
    """Renames tensors of transformers to LLaVA-1.5's own names."""
    renamed = {}
    for name, value in state.items():
        name = name.removeprefix("model.")
        name = name.replace("language_model.", "model.").replace(
            "multi_modal_projector.linear_1", "model.mm_projector.0"
        )
        name = name.replace("multi_modal_projector.linear_2", "model.mm_projector.2")
        name = name.replace("vision_tower.vision_model.", "vision_tower.")
        renamed[name.replace("vision_tower.", "model.vision_tower.vision_tower.vision_model.")] = value.contiguous()
    return renamed


def to_hub_names(state):
    """Renames tensors to llava-hf's names, those of transformers 4."""
    renamed = {}
    for name, value in state.items():
        name = name.removeprefix("model.").replace("lm_head.", "language_model.lm_head.")
        name = name.replace("language_model.", "language_model.model.") if "lm_head" not in name else name
        if "vision_tower.vision_model." not in name:
            name = name.replace("vision_tower.", "vision_tower.vision_model.")
        renamed[name] = value.contiguous()
    return renamed


def write(folder, state, config):
    """Writes a checkpoint."""
    folder.mkdir()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def vision_params(state: Mapping[str, np.ndarray], config: VisionConfig) -> dict:
    """Converts the weights of a CLIP or SigLIP tower under any prefix."""
    anchor = clip.TENSOR_NAMES["patch_embed/kernel"].name
    (prefix,) = (name.removesuffix(anchor) for name in state if name.endswith(anchor))
    return _convert(
        state, map_parameters(clip.TENSOR_NAMES, param_shapes(lambda: VisionTower(nnx.Rngs(0), config)), {"": prefix})
    )


def decoder_params(state: Mapping[str, np.ndarray], config: LLMConfig) -> dict:
    """Converts the weights of a Llama, Mistral, Qwen2 or Qwen3 model."""
    return _convert(
        state, map_parameters(llama.TENSOR_NAMES, param_shapes(lambda: Decoder(nnx.Rngs(0), config)), {"": ""})
    )


def _convert(state, mappings):
    values = {path: m.from_hf(np.asarray(state[name]) for name in m.names) for path, m in mappings.items()}
    return traverse_util.unflatten_dict(values, sep="/")
