"""Peak memory of imports, exports and loading, which handle one parameter at a time; each in a separate process."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from reference import VISION
from safetensors.torch import save_file
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
from stf_jax.parallel.mesh import make_mesh
from stf_jax.models.blueprint import blueprint
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
from stf_jax.parallel.mesh import make_mesh
generator, _ = load_generator(epath.Path(source), make_mesh(MeshConfig(1, 4, 2)))
""",
}


def peak(step, source, to):
    """Returns the peak memory, in bytes, of a process that runs one step."""
    setup = "import pathlib, re, sys\nsource, to = sys.argv[1], pathlib.Path(sys.argv[2])\n"
    end = '\nprint(re.search("VmHWM:\\\\s+([0-9]+) kB", pathlib.Path("/proc/self/status").read_text())[1])'
    code = setup + STEPS[step] + end
    process = subprocess.run([sys.executable, "-c", code, source, to], capture_output=True, text=True, check=True)
    return 1024 * int(process.stdout.splitlines()[-1])


def write(folder, model_class, config):
    """Writes a model of zeros as transformers saves it; returns the bytes of its parameters."""
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in model_class(config).state_dict().items()}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    values = {key: torch.zeros(shape, dtype=torch.bfloat16) for key, shape in shapes.items()}
    save_file(values, folder / "model.safetensors")
    return sum(2 * shape.numel() for shape in shapes.values())


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Writes a small and a large model, and imports them; returns the root, their difference in bytes, and in peaks."""
    root, sizes = tmp_path_factory.mktemp("memory"), {}
    for name, layers in LAYERS.items():
        sizes[name] = write(root / name, LlamaForCausalLM, LlamaConfig(**SMALL, num_hidden_layers=layers))
    assert sizes["large"] > 4 * LARGEST
    growth = peak("import", root / "large", root / "large-imported") - peak(
        "import", root / "small", root / "small-imported"
    )
    return root, sizes["large"] - sizes["small"], growth


def test_import_needs_memory_for_the_largest_parameter_only(models):
    _, _, growth = models
    assert LARGEST < growth < 3 * LARGEST, growth / LARGEST


@pytest.mark.slow  # half a minute
def test_casting_needs_no_more_memory(models, tmp_path):
    root, _, _ = models
    peaks = [peak("import as float16", root / name, tmp_path / name) for name in LAYERS]
    assert peaks[1] - peaks[0] < 3 * LARGEST, (peaks[1] - peaks[0]) / LARGEST


def test_overridden_sources_are_not_loaded(models, tmp_path):
    """If two sources have the same parameters, the first one is not read."""
    root, size, _ = models
    twice = {name: f"{root / name}-imported,{root / name}-imported" for name in LAYERS}
    STEPS["load twice"] = STEPS["load"].replace("ModelConfig(llm=source)", "ModelConfig(llm=source.split(',')[0])")
    growth = peak("load twice", twice["large"], tmp_path) - peak("load twice", twice["small"], tmp_path)
    assert size < growth < size + 2 * LARGEST, (growth - size) / LARGEST


def test_export_needs_memory_for_the_largest_parameter_and_a_shard(models, tmp_path, monkeypatch):
    root, _, _ = models
    monkeypatch.setitem(
        STEPS, "export", "import stf_jax.weights.exports as e, functools\n"
        f"e.write_shards = functools.partial(e.write_shards, limit={LARGEST})\n" + STEPS["export"],
    )  # fmt: skip
    growth = peak("export", root / "large-imported", tmp_path / "large") - peak(
        "export", root / "small-imported", tmp_path / "small"
    )
    assert growth < 4.5 * LARGEST, growth / LARGEST


def test_loading_makes_no_second_copy(models, tmp_path):
    """The arrays are in this machine's memory; there is no second copy of the model."""
    root, size, _ = models
    growth = peak("load", root / "large-imported", tmp_path) - peak("load", root / "small-imported", tmp_path)
    assert size < growth < size + 2 * LARGEST, (growth - size) / LARGEST


@pytest.mark.slow  # half a minute
def test_inference_makes_no_second_copy(tmp_path):
    """Loads a folder onto a mesh. Compiled programs of 32 results, and the checksum on a CPU, use memory too."""
    sizes, peaks = {}, {}
    for name, layers in LAYERS.items():
        folder = shutil.copytree(MINIATURE, tmp_path / name)
        text_config = LlamaConfig(**SMALL | {"vocab_size": 512}, num_hidden_layers=layers)
        config = LlavaConfig(vision_config=CLIPVisionConfig(**VISION), text_config=text_config)
        sizes[name] = write(folder, LlavaForConditionalGeneration, config)
        peaks[name] = peak("answer", folder, tmp_path)
    size, growth = sizes["large"] - sizes["small"], peaks["large"] - peaks["small"]
    assert size < growth < size + 7 * LARGEST, (growth - size) / LARGEST
