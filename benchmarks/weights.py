"""Time and memory of importing, loading and exporting the weights of a full-size model."""

import argparse
import json
import pathlib
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath
from flax import nnx

from benchmarks.process import measure_process
from stf_jax.config import UserError
from stf_jax.models.decoders.base import DECODERS, LLMConfig, find_decoder_class
from stf_jax.models.decoders.rope import write_rope
from stf_jax.models.spec import llm_preset
from stf_jax.weights.mapping import TensorMapping, map_parameters, param_shapes
from stf_jax.weights.model import Description, open_model
from stf_jax.weights.shards import write_shards


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures ``gib`` of memory and ``seconds`` of each step in a separate process."""
    preset = llm_preset(options.model)
    if options.scratch is not None and not options.scratch.is_dir():
        raise UserError(f"--scratch={options.scratch} is not a folder.")
    table = DECODERS.find(preset.family).tensor_names
    mappings = map_parameters(table, param_shapes(lambda: find_decoder_class(preset)(nnx.Rngs(0), preset)), {"": ""})
    sizes = [2 * len(mapping.names) * int(np.prod(mapping.shape)) for mapping in mappings.values()]
    rows: list[dict[str, Any]] = [
        {"what": "model, in bfloat16", "gib": sum(sizes) / 2**30},
        {"what": "its largest parameter", "gib": max(sizes) / 2**30},
    ]
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        source, imported, native = (pathlib.Path(scratch) / name for name in ("source", "imported", "native"))
        source.mkdir()
        write_shards(source, _random_tensors(mappings))
        (source / "config.json").write_text(json.dumps(_hf_config(preset)))
        convert = ["-m", "stf_jax.convert"]
        rows.append(measure_process("import, peak", [*convert, "import", str(source), f"--to={imported}"]))
        rows.append(measure_process("load onto 8 devices, peak", ["-c", _LOAD, str(imported)]))
        rows.append(
            measure_process("export, peak", [*convert, "export", str(imported), "--format=native", f"--to={native}"])
        )
        assert open_model(epath.Path(imported)).description == Description(None, preset, None)
    return rows


# Loads imported weights as training does, on eight devices that share the memory of this machine.
_LOAD = """
import os, sys
os.environ.update(JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="8")
from stf_jax.config import MeshConfig, ModelConfig
from stf_jax.parallel.mesh import make_mesh
from stf_jax.models.blueprint import blueprint
from stf_jax.weights.folder import load_params
plan = blueprint(ModelConfig(llm=sys.argv[1]))
shardings = plan.shardings(make_mesh(MeshConfig(1, 8, 1)))
layout = {path: leaf.update(sharding=shardings[path]) for path, leaf in plan.shapes.items()}
load_params(sys.argv[1], layout, ("vision/.*", "fusion/.*"))
"""


def _random_tensors(mappings: Mapping[str, TensorMapping]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields tensors of bfloat16 noise, with their names."""
    noise = (0.02 * np.random.default_rng(0).standard_normal(2**20, np.float32)).astype(ml_dtypes.bfloat16)
    for mapping in mappings.values():
        for name in mapping.names:
            yield name, np.resize(noise, mapping.hf_shape)


def _hf_config(preset: LLMConfig) -> dict[str, Any]:
    """The transformers config of the preset."""
    family = DECODERS.find(preset.family)
    sizes = {key: getattr(preset, field) for field, key in family.fields.items()}
    return {"model_type": family.model_type, **sizes, **write_rope(preset.rope_theta, preset.rope_scaling)}
