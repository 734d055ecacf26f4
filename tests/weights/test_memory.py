"""Weights pass one parameter at a time: peaks of memory, each measured in a process of its own."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from theirs import VISION
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from stf_jax.data.tokenizer import MINIATURE

SMALL = dict(vocab_size=64, hidden_size=512, intermediate_size=2032, num_attention_heads=8, num_key_value_heads=8)
LAYERS = {"small": 1, "large": 32}
LARGEST = 32 * 512 * 2032 * 2  # bytes of the large model's largest parameter, an MLP matrix of all layers
STEPS = {
    "import": "from stf_jax.weights.imports import import_weights; import_weights(source, to)",
    "import as float16": "from stf_jax.weights.imports import import_weights as f; f(source, to, dtype='float16')",
    "export": "from stf_jax.weights.exports import export_native; export_native(pathlib.Path(source), to)",
    "load": """
import os
os.environ.update(JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="8")
from stf_jax.config import MeshConfig, ModelConfig
from stf_jax.runtime.mesh import make_mesh
from stf_jax.training.state import blueprint
from stf_jax.weights.folder import load_params
plan = blueprint(ModelConfig(llm=source))
shardings = plan.shardings(make_mesh(MeshConfig(1, 4, 2)))
layout = {path: leaf.update(sharding=shardings[path]) for path, leaf in plan.shapes.items()}
loaded = load_params(source, layout, ("vision/.*", "fusion/.*"))
assert all(value.sharding == shardings[path] for path, value in loaded.items())
""",
    "answer": """
import os
os.environ.update(JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="8")
from etils import epath
from stf_jax.config import MeshConfig
from stf_jax.inference.loading import load_generator
from stf_jax.runtime.mesh import make_mesh
generator, _ = load_generator(epath.Path(source), make_mesh(MeshConfig(1, 4, 2)))
""",
}


def peak(step, source, to):
    """Bytes of memory that a process held at most while it did that step."""
    begin = "import pathlib, re, sys\nsource, to = sys.argv[1], pathlib.Path(sys.argv[2])\n"
    end = '\nprint(re.search("VmHWM:\\\\s+([0-9]+) kB", pathlib.Path("/proc/self/status").read_text())[1])'
    code = begin + STEPS[step] + end
    done = subprocess.run([sys.executable, "-c", code, source, to], capture_output=True, text=True, check=True)
    return 1024 * int(done.stdout.splitlines()[-1])


def write(folder, kind, config):
    """A model of noughts as transformers leaves it; bytes of its parameters."""
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in kind(config).state_dict().items()}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    values = {key: torch.zeros(shape, dtype=torch.bfloat16) for key, shape in shapes.items()}
    save_file(values, folder / "model.safetensors")
    return sum(2 * shape.numel() for shape in shapes.values())


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models, small and large, as transformers leaves them and as an import does; bytes of their parameters."""
    root, sizes = tmp_path_factory.mktemp("memory"), {}
    for name, layers in LAYERS.items():
        sizes[name] = write(root / name, LlamaForCausalLM, LlamaConfig(**SMALL, num_hidden_layers=layers))
    assert sizes["large"] > 4 * LARGEST
    grown = peak("import", root / "large", root / "large-ours") - peak("import", root / "small", root / "small-ours")
    return root, sizes["large"] - sizes["small"], grown


def test_an_import_needs_the_largest_parameter_and_not_the_model(models):
    _, _, grown = models
    assert LARGEST < grown < 3 * LARGEST, grown / LARGEST


@pytest.mark.slow  # half a minute
def test_a_cast_needs_no_more(models, tmp_path):
    root, _, _ = models
    peaks = [peak("import as float16", root / name, tmp_path / name) for name in LAYERS]
    assert peaks[1] - peaks[0] < 3 * LARGEST, (peaks[1] - peaks[0]) / LARGEST


def test_sources_are_not_held_twice(models, tmp_path):
    """Of two sources that have the same parameters, the first is not read."""
    root, size, _ = models
    twice = {name: f"{root / name}-ours,{root / name}-ours" for name in LAYERS}
    code = STEPS["load"].replace("ModelConfig(llm=source)", "ModelConfig(llm=source.split(',')[0])")
    STEPS["load twice"] = code
    grown = peak("load twice", twice["large"], tmp_path) - peak("load twice", twice["small"], tmp_path)
    assert size < grown < size + 2 * LARGEST, (grown - size) / LARGEST


def test_an_export_needs_the_largest_parameter_and_a_shard(models, tmp_path, monkeypatch):
    root, _, _ = models
    monkeypatch.setitem(
        STEPS, "export", "import stf_jax.weights.exports as e, functools\n"
        f"e.write_shards = functools.partial(e.write_shards, limit={LARGEST})\n" + STEPS["export"],
    )  # fmt: skip
    grown = peak("export", root / "large-ours", tmp_path / "large") - peak(
        "export", root / "small-ours", tmp_path / "small"
    )
    assert grown < 4.5 * LARGEST, grown / LARGEST


def test_weights_are_loaded_once_onto_their_devices(models, tmp_path):
    """Beside the arrays themselves, which lie in this machine's memory, no second copy of the model."""
    root, size, _ = models
    grown = peak("load", root / "large-ours", tmp_path) - peak("load", root / "small-ours", tmp_path)
    assert size < grown < size + 2 * LARGEST, (grown - size) / LARGEST


@pytest.mark.slow  # half a minute
def test_a_model_that_answers_is_held_once(tmp_path):
    """From its folder onto a mesh. Programs of 32 results apiece are held too, and on a CPU a checksum's terms."""
    sizes, peaks = {}, {}
    for name, layers in LAYERS.items():
        folder = shutil.copytree(MINIATURE, tmp_path / name)
        text = LlamaConfig(**SMALL | {"vocab_size": 512}, num_hidden_layers=layers)
        config = LlavaConfig(vision_config=CLIPVisionConfig(**VISION), text_config=text)
        sizes[name] = write(folder, LlavaForConditionalGeneration, config)
        peaks[name] = peak("answer", folder, tmp_path)
    size, grown = sizes["large"] - sizes["small"], peaks["large"] - peaks["small"]
    assert size < grown < size + 7 * LARGEST, (grown - size) / LARGEST
