"""Models with random weights and random batches, for benchmarks here and in PyTorch."""

import pathlib
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from etils import epath

from stf_jax.checkpointing.params import write_params
from stf_jax.config import ModelConfig, TrainConfig
from stf_jax.data.packing import Batch
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.models.presets import llm_preset, vision_preset
from stf_jax.models.vlm import slots_per_image
from stf_jax.training.state import blueprint
from stf_jax.weights.export_hf import export_hf
from stf_jax.weights.model import Description


def make_export(config: ModelConfig, folder: pathlib.Path, export: pathlib.Path) -> None:
    """Writes a model with random weights, as a folder of imported weights and as an export."""
    rng = np.random.default_rng(0)
    shapes = blueprint(config).shapes
    folder.mkdir()
    noise = rng.standard_normal(2**20, np.float32)

    def values() -> Iterator[tuple[str, np.ndarray]]:
        for path, leaf in shapes.items():
            scale = 1 if path.endswith("scale") else 0.02
            yield path, (np.resize(noise, leaf.shape) * scale).astype(jnp.dtype(config.precision))

    write_params(folder, values())
    Description(vision_preset(config.vision), llm_preset(config.llm), config.fusion).save(folder)
    load_tokenizer("miniature").save_pretrained(folder / "tokenizer")
    export_hf(epath.Path(folder), epath.Path(export))


def make_batch(config: TrainConfig) -> Batch:
    """A global batch of random numpy arrays: one image per row, then text, which is all target tokens."""
    rng, slots = np.random.default_rng(1), slots_per_image(config.model)
    side = vision_preset(config.model.vision).image_size
    tokens = rng.integers(3, 500, (config.global_batch_size, config.data.max_length)).astype(np.int32)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return Batch(
        tokens=tokens,
        targets=np.concatenate([tokens[:, 1:], np.zeros_like(tokens[:, :1])], axis=1),
        loss_mask=(positions >= slots - 1) & (positions < tokens.shape[1] - 1),
        positions=positions,
        segment_ids=np.ones_like(tokens),
        image_slots=np.where(positions < slots, positions, -1),
        images=rng.integers(0, 256, (len(tokens), 1, side, side, 3), np.uint8),
    )
