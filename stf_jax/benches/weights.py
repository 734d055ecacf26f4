"""Weights in and out of a model of real size: how long, and how much memory."""

import argparse
import json
import pathlib
import tempfile
from typing import Any

import ml_dtypes
import numpy as np
from flax import nnx

from stf_jax.benches.process import measured
from stf_jax.config import UserError
from stf_jax.models.llm import Decoder
from stf_jax.models.presets import llm_preset
from stf_jax.weights import hf
from stf_jax.weights.model import Description, open_model
from stf_jax.weights.shards import write_shards


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of ``what``, ``gib`` of memory and ``seconds``; each step is a process of its own."""
    preset = llm_preset(options.model)
    if options.scratch is not None and not options.scratch.is_dir():
        raise UserError(f"--scratch={options.scratch} is not a folder.")
    places = hf.places(hf.DECODER, hf.declared(lambda: Decoder(nnx.Rngs(0), preset)), {"": ""})
    sizes = [2 * len(place.names) * int(np.prod(place.shape)) for place in places.values()]
    rows = [
        {"what": "model, in bfloat16", "gib": sum(sizes) / 2**30},
        {"what": "its largest parameter", "gib": max(sizes) / 2**30},
    ]
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        theirs, ours, native = (pathlib.Path(scratch) / name for name in ("theirs", "ours", "native"))
        theirs.mkdir()
        write_shards(theirs, _random(places))
        (theirs / "config.json").write_text(json.dumps(_config(preset)))
        convert = ["-m", "stf_jax.convert"]
        rows.append(measured("import, peak", [*convert, "import", str(theirs), f"--to={ours}"]))
        rows.append(measured("load onto 8 devices, peak", ["-c", _LOAD, str(ours)]))
        rows.append(measured("export, peak", [*convert, "export", str(ours), "--format=native", f"--to={native}"]))
        assert open_model(ours).description == Description(None, preset, None)
    return rows


# What training does with imported weights, on eight devices that share this machine's memory.
_LOAD = """
import os, sys
os.environ.update(JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="8")
from stf_jax.config import MeshConfig, ModelConfig
from stf_jax.runtime.mesh import make_mesh
from stf_jax.training.state import blueprint
from stf_jax.weights.folder import load_params
plan = blueprint(ModelConfig(llm=sys.argv[1]))
shardings = plan.shardings(make_mesh(MeshConfig(1, 8, 1)))
layout = {path: leaf.update(sharding=shardings[path]) for path, leaf in plan.shapes.items()}
load_params(sys.argv[1], layout, ("vision/.*", "fusion/.*"))
"""


def _random(places):
    """Tensors of bfloat16 noise for those places."""
    noise = (0.02 * np.random.default_rng(0).standard_normal(2**20, np.float32)).astype(ml_dtypes.bfloat16)
    for place in places.values():
        for name in place.names:
            yield name, np.resize(noise, place.theirs)


def _config(preset):
    """transformers' config of the preset, a Llama."""
    return {
        "model_type": "llama",
        "vocab_size": preset.vocab,
        "hidden_size": preset.width,
        "num_hidden_layers": preset.layers,
        "num_attention_heads": preset.heads,
        "num_key_value_heads": preset.kv_heads,
        "head_dim": preset.head_dim,
        "intermediate_size": preset.mlp,
        "rms_norm_eps": preset.norm_eps,
        "rope_theta": preset.rope_theta,
        "tie_word_embeddings": preset.tied,
    }
