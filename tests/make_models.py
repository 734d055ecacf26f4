"""Small models of random weights: imported folders, runs that start from these, and their exports."""

import dataclasses
import json
import pathlib
import shutil
import types

import jax.numpy as jnp
import numpy as np
import PIL.Image
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from stf_jax.checkpointing.manager import Checkpoints
from stf_jax.checkpointing.params import write_params
from stf_jax.config import CheckpointConfig, FusionConfig, ModelConfig, default_config, resolve, to_json
from stf_jax.data.tiles import with_newline
from stf_jax.data.tokenizer import MINIATURE
from stf_jax.models.blueprint import blueprint
from stf_jax.models.decoders.base import LLMConfig, RopeScaling
from stf_jax.models.spec import VISION, resolve_model
from stf_jax.weights.model import Description, open_model

SMALL = dict(image_size=36, patch_size=6, width=32, layers=4, heads=2, mlp=48)
TOWERS = {
    "clip": dataclasses.replace(VISION["clip-mini-16-96"], **SMALL),
    "siglip": dataclasses.replace(VISION["siglip-b-16-256"], **SMALL),
}
LLAMA = LLMConfig(512, width=32, layers=3, heads=4, kv_heads=2, head_dim=8, mlp=48, norm_eps=1e-4)
DECODERS = {
    "llama": LLAMA,
    "llama, full": dataclasses.replace(LLAMA, vocab=501),  # equal to its tokenizer's, as in Vicuna
    "mistral": dataclasses.replace(LLAMA, vocab=501, family="mistral"),
    "llama, tied": dataclasses.replace(LLAMA, tied=True),
    "llama-3": dataclasses.replace(LLAMA, rope_theta=5e5, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 64)),
    "linear": dataclasses.replace(LLAMA, rope_scaling=RopeScaling("linear", 2.0), tied=True),
    "qwen2": dataclasses.replace(LLAMA, qkv_bias=True, rope_theta=1e6, family="qwen2"),
    "qwen3": dataclasses.replace(LLAMA, qk_norm=True, tied=True, family="qwen3"),
}
CONTROL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]  # of all templates


def make(
    folder: pathlib.Path, fusion: FusionConfig, vision: str, llm: str, dtype="float32", **description
) -> pathlib.Path:
    """A folder of random weights as an import leaves it; they never sample the end of sequence.

    ``description``: further fields of its Description.
    """
    folder.mkdir()
    Description(TOWERS[vision], DECODERS[llm], fusion, **description).save(folder)
    shutil.copytree(MINIATURE, folder / "tokenizer")
    model = resolve_model(ModelConfig(str(folder), str(folder), fusion))
    plan, rng = blueprint(with_newline(model, description.get("tiles"))), np.random.default_rng(0)

    def value(path, leaf):
        # A head's kernel is [.., D, H, Dh]; with larger scores the softmax would magnify rounding errors.
        fan_in = 32 if "/attention/" in path else leaf.shape[-2] if path.endswith("kernel") else 1
        x = rng.normal(size=leaf.shape) * (1.2 * fan_in**-0.5 if path.endswith("kernel") else 0.3)
        if path.endswith("scale"):
            x = 1 + x
        if path in ("llm/head/kernel", "llm/embedding"):
            x[(slice(None), 2) if path == "llm/head/kernel" else 2] = 0
        if path == "llm/embedding" and DECODERS[llm].tied:
            x /= 4  # otherwise each token would predict itself
        return x.astype(jnp.dtype(dtype))

    write_params(folder, ((path, value(path, leaf)) for path, leaf in plan.shapes.items()))
    return folder


def make_run(folder: pathlib.Path, start: pathlib.Path, step: int) -> pathlib.Path:
    """A run at a step, with a frozen tower; its weights equal those of the imported folder."""
    saved = open_model(start)
    config = default_config()
    config.model.update(vision=str(start), llm=str(start), precision="float32")
    config.model.fusion.update(dataclasses.asdict(saved.description.fusion))
    config.data.update(source="scenes", tokenizer=str(start / "tokenizer"))
    config.data.update(template=saved.description.template, aspect=saved.description.aspect)
    params = {path: jnp.asarray(saved.read(path)) for path in saved.shapes}
    frozen = {path: value for path, value in params.items() if path.startswith("vision/")}
    trainable = {path: value for path, value in params.items() if path not in frozen}
    checkpoints = Checkpoints(folder, CheckpointConfig(every_steps=1))
    checkpoints.save(step, types.SimpleNamespace(trainable=trainable, frozen=frozen, moments={}), {}, {})
    checkpoints.close()
    (folder / "config.json").write_text(json.dumps(to_json(resolve(config)[0])))
    return folder


def make_image(seed: int, size: tuple[int, int] = (50, 41)) -> PIL.Image.Image:
    """A noise image of that height and width."""
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


def turn(text: str, *images: PIL.Image.Image) -> dict:
    """A question in transformers' format."""
    content = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


def load(folder: pathlib.Path, **options):
    """An export in PyTorch, in float32 by default, and its processor."""
    options = {"dtype": torch.float32} | options
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, **options).eval()
    return model, AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def to_uint8(inputs, config):
    """Returns the images of a processor's output as uint8 [M, H, W, 3]."""
    values = inputs["pixel_values"].permute(0, 2, 3, 1).numpy()
    return np.rint((values * np.array(config.std) + np.array(config.mean)) * 255).astype(np.uint8)
