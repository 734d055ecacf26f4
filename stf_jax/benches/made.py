"""Models of random weights, here and for PyTorch, that benchmarks of both sides share."""

import pathlib

import jax.numpy as jnp
import numpy as np
from etils import epath

from stf_jax.config import ModelConfig
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.models.presets import llm_preset, vision_preset
from stf_jax.runtime.parameters import write_params
from stf_jax.training.state import blueprint
from stf_jax.weights.export_hf import export_hf
from stf_jax.weights.model import Description


def make_export(config: ModelConfig, folder: pathlib.Path, export: pathlib.Path) -> None:
    """A model of random weights, as a folder of imported ones and as an export."""
    rng = np.random.default_rng(0)
    shapes = blueprint(config).shapes
    folder.mkdir()
    noise = rng.standard_normal(2**20, np.float32)

    def values():
        for path, leaf in shapes.items():
            scale = 1 if path.endswith("scale") else 0.02
            yield path, (np.resize(noise, leaf.shape) * scale).astype(jnp.dtype(config.precision))

    write_params(folder, values())
    Description(vision_preset(config.vision), llm_preset(config.llm), config.fusion).save(folder)
    load_tokenizer("miniature").save_pretrained(folder / "tokenizer")
    export_hf(epath.Path(folder), epath.Path(export))
