"""Models with random weights, for benchmarks here and in PyTorch."""

import pathlib
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from etils import epath

from stf_jax.checkpointing.params import write_params
from stf_jax.config import ModelConfig
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.models.blueprint import blueprint
from stf_jax.models.spec import llm_preset, vision_preset
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
