"""An import holds one parameter at a time: its peak of memory is measured in a process of its own."""

import json
import subprocess
import sys

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

SMALL = dict(vocab_size=64, hidden_size=512, intermediate_size=2032, num_attention_heads=8, num_key_value_heads=8)
IMPORT = """
import pathlib, re, sys
from stf_jax.weights.imports import import_weights
import_weights(sys.argv[1], pathlib.Path(sys.argv[2]))
print(1024 * int(re.search("VmHWM:\\s+([0-9]+) kB", pathlib.Path("/proc/self/status").read_text())[1]))
"""


def peak(source, to):
    """Bytes of memory that a process held at most while it imported."""
    done = subprocess.run([sys.executable, "-c", IMPORT, source, to], capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def test_an_import_needs_the_largest_parameter_and_not_the_model(tmp_path):
    sizes = {}
    for name, layers in (("small", 1), ("large", 32)):
        config = LlamaConfig(**SMALL, num_hidden_layers=layers)
        with torch.device("meta"):
            shapes = {key: value.shape for key, value in LlamaForCausalLM(config).state_dict().items()}
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config.to_dict()))
        save_file(
            {key: torch.zeros(shape, dtype=torch.bfloat16) for key, shape in shapes.items()},
            tmp_path / name / "model.safetensors",
        )
        sizes[name] = sum(2 * shape.numel() for shape in shapes.values())
    largest = 32 * 512 * 2032 * 2
    assert sizes["large"] > 4 * largest
    grown = peak(tmp_path / "large", tmp_path / "large-ours") - peak(tmp_path / "small", tmp_path / "small-ours")
    assert largest < grown < 3 * largest, grown / largest
