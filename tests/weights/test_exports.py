"""Exports under our own names and the authors' names: lossless and never incomplete."""

import dataclasses
import errno
import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stf_jax.checkpointing.params import write_params
from stf_jax.cli import run_command
from stf_jax.config import FusionConfig, ModelConfig
from stf_jax.convert import main
from stf_jax.data.tokenizer import MINIATURE
from stf_jax.models.blueprint import blueprint
from stf_jax.models.decoders.base import LLMConfig, RopeScaling
from stf_jax.models.spec import VISION
from stf_jax.weights import shards
from stf_jax.weights.export_stf import export_llava_stf
from stf_jax.weights.exports import export_native
from stf_jax.weights.folder import load_params
from stf_jax.weights.imports import import_weights
from stf_jax.weights.model import Description, open_model

# The authors' depth with a small width.
TOWER = dataclasses.replace(VISION["clip-l-14-336"], image_size=28, patch_size=7, width=64, layers=24, heads=1, mlp=32)
LLM = LLMConfig(512, width=32, layers=3, heads=4, kv_heads=2, head_dim=8, mlp=48, norm_eps=1e-4)
TAPS = (23, 21, 18, 15, 12, 9, 6, 3)
FUSION = FusionConfig(taps=TAPS)


def make(folder, fusion=FUSION, vision=TOWER, llm=LLM, dtype="float32", **settings):
    """Writes a folder of random weights, as an import does."""
    folder.mkdir(parents=True)
    Description(vision, llm, fusion, **settings).save(folder)
    shutil.copytree(MINIATURE, folder / "tokenizer")
    plan, rng = blueprint(ModelConfig(str(folder), str(folder), fusion)), np.random.default_rng(0)

    def value(leaf):
        return (rng.normal(size=leaf.shape) * leaf.shape[-1] ** -0.5).astype(jnp.dtype(dtype))

    write_params(folder, ((path, value(leaf)) for path, leaf in plan.shapes.items()))
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A folder of random weights, for tests that do not change it."""
    return make(tmp_path_factory.mktemp("made") / "model")


def assert_same_weights(first, second):
    """Asserts that two folders have bit-identical parameters."""
    before, after = open_model(first), open_model(second)
    assert after.shapes == before.shapes
    for path in before.shapes:
        np.testing.assert_array_equal(before.read(path).view(np.uint8), after.read(path).view(np.uint8))


# ---- The authors' names ----------------------------------------------------------------------------------------------


def reference_image_tokens(state, states):
    """Image tokens of tapped states [P, C], deepest first, in float64; written from the paper, without our code."""
    layer = {name: value.double() for name, value in state.items() if ".mm_projector" in name}

    def linear(name, x):
        return x @ layer[f"model.{name}.weight"].T + layer[f"model.{name}.bias"]

    x = torch.nn.functional.gelu(linear("mm_projector_crosslayer.0", torch.cat(states, -1)))
    x = linear("mm_projector_crosslayer.2", x).view(4, 4, -1)
    tokens = []
    for row in range(0, 4, 2):
        for column in range(0, 4, 2):
            window = x[row : row + 2, column : column + 2]  # [kh, kw, C], read channel by channel
            tokens.append(window.permute(2, 0, 1).reshape(-1))
    return linear("mm_projector.2", torch.nn.functional.gelu(linear("mm_projector.0", torch.stack(tokens))))


@pytest.mark.parametrize("adapter_only", [False, True])
def test_exported_tensors_give_our_image_tokens(model_folder, tmp_path, adapter_only):
    report = export_llava_stf(model_folder, tmp_path / "export", adapter_only=adapter_only)
    if adapter_only:
        assert sorted(path.name for path in (tmp_path / "export").iterdir()) == ["export.json", "mm_projector.bin"]
        state = torch.load(tmp_path / "export" / "mm_projector.bin", weights_only=True)
        assert len(report["written"]) == 8
    else:
        state = load_file(tmp_path / "export" / "model.safetensors")
    expected = {
        f"model.mm_projector{part}.{i}.{end}"
        for part in ("", "_crosslayer")
        for i in (0, 2)
        for end in ("weight", "bias")
    }
    assert {name for name in state if "mm_projector" in name} == expected
    assert state["model.mm_projector_crosslayer.0.weight"].shape == (4 * 64, 8 * 64)
    assert state["model.mm_projector.0.weight"].shape == (16 * 64, 4 * 64)

    saved = open_model(model_folder)
    plan = blueprint(dataclasses.replace(saved.config, precision="float32"))
    model = plan.merge({path: jnp.asarray(saved.read(path)) for path in plan.shapes})
    states = [np.random.default_rng(tap).normal(size=(16, 64)) for tap in TAPS]
    tokens = model.fusion(tuple(jnp.asarray(x[None], jnp.float32) for x in states))[0]
    np.testing.assert_allclose(tokens, reference_image_tokens(state, [torch.from_numpy(x) for x in states]), atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_authors_layout_round_trips_exactly(tmp_path, dtype):
    folder = make(tmp_path / "model", dtype=dtype, aspect="pad")
    export_llava_stf(folder, tmp_path / "export")
    import_weights(str(tmp_path / "export"), tmp_path / "again")
    assert_same_weights(folder, tmp_path / "again")
    again = open_model(tmp_path / "again").description
    assert (again.llm, again.aspect, again.fusion.taps) == (LLM, "pad", TAPS)


def test_the_eight_tensors_round_trip_exactly(tmp_path):
    first = make(tmp_path / "model", dtype="bfloat16")
    export_llava_stf(first, tmp_path / "export", adapter_only=True)
    import_weights(str(tmp_path / "export" / "mm_projector.bin"), tmp_path / "again")
    assert open_model(tmp_path / "again").description.llm is None
    export_llava_stf(tmp_path / "again", tmp_path / "export again", adapter_only=True)
    before, after = (torch.load(tmp_path / name / "mm_projector.bin") for name in ("export", "export again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {value.dtype for value in before.values()} == {torch.bfloat16}


def test_the_full_export_has_the_files_that_llava_reads(tmp_path, llama, capsys):
    folder = make(tmp_path / "model", llm=dataclasses.replace(LLM, vocab=32_000), aspect="pad")
    assert run_command(main, ["export", str(folder), "--format=llava-stf", f"--to={tmp_path / 'bare'}"]) == 0
    assert "no tokenizer.model" in capsys.readouterr().out
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(llama.name_or_path, folder / "tokenizer")
    report = export_llava_stf(folder, tmp_path / "export")
    state = load_file(tmp_path / "export" / "model.safetensors")
    assert sorted(report["written"]) == sorted(state)
    assert len(state) == 8 + 5 + 24 * 16 + 3 * 9 + 3
    assert "model.vision_tower.vision_tower.vision_model.encoder.layers.23.mlp.fc2.bias" in state
    assert {"model.embed_tokens.weight", "model.layers.2.mlp.up_proj.weight", "lm_head.weight"} < state.keys()
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    wanted = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_hidden_size": 64,
        "image_aspect_ratio": "pad",
        "use_mm_proj": True,
        "torch_dtype": "float32",
    }
    assert {key: config[key] for key in wanted} == wanted
    assert (tmp_path / "export" / "tokenizer.model").read_bytes() == (
        folder / "tokenizer" / "tokenizer.model"
    ).read_bytes()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"fusion": FusionConfig("stf")}, "fusion is stf, not mbtf_stf"),
        ({"fusion": FusionConfig(taps=TAPS, variant="paper")}, "variant is paper, not code"),
        ({"fusion": FusionConfig(taps=TAPS, kernel=4)}, "kernel is 4, not 2"),
        ({"fusion": FusionConfig(taps=(24, 12))}, r"taps is \(24, 12\), not \(24, 21"),
        ({"fusion": FusionConfig(taps=TAPS, stf_hidden=512)}, "stf_hidden is 512, not 1024"),
        ({"vision": dataclasses.replace(TOWER, class_token=False, pre_norm=False)}, "tower is not CLIP's"),
        ({"llm": dataclasses.replace(LLM, qkv_bias=True)}, "no language model but Llama"),
        ({"llm": dataclasses.replace(LLM, rope_scaling=RopeScaling("llama3", 8.0))}, "no llama3 positions"),
    ],
)
def test_models_that_the_authors_code_does_not_support_are_refused(model_folder, tmp_path, changes, sentence, capsys):
    shutil.copytree(model_folder, tmp_path / "model")
    Description(**{"vision": TOWER, "llm": LLM, "fusion": FUSION} | changes).save(tmp_path / "model")
    assert (
        run_command(main, ["export", str(tmp_path / "model"), "--format=llava-stf", f"--to={tmp_path / 'export'}"]) == 2
    )
    error = capsys.readouterr().err
    assert re.search(sentence, error), error
    assert "export" in error
    assert "hf" in error
    assert not (tmp_path / "export").exists()


# ---- Our names -------------------------------------------------------------------------------------------------------


def test_native_weights_can_be_loaded(model_folder, tmp_path):
    report = export_native(model_folder, tmp_path / "native", only="fusion/.*", dtype="bfloat16")
    saved = open_model(model_folder)
    fusion = {path: leaf for path, leaf in saved.shapes.items() if path.startswith("fusion/")}
    assert report["written"] == list(fusion)
    assert len(fusion) == 8
    device = jnp.zeros(()).sharding
    layout = {path: leaf.update(sharding=device) for path, leaf in fusion.items()}
    for path, value in load_params(str(tmp_path / "native"), layout, ()).items():
        np.testing.assert_array_equal(np.asarray(value), saved.read(path).astype(jnp.bfloat16))


@pytest.mark.parametrize("form", ["hf", "llava-stf", "native"])
def test_a_full_disk_leaves_no_files(model_folder, tmp_path, monkeypatch, form, capsys):
    def fail_half_way(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards, "save_file", fail_half_way)
    assert run_command(main, ["export", str(model_folder), f"--format={form}", f"--to={tmp_path / 'export'}"]) == 2
    assert "The disk is full" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--format=native", "--only=llm"], "matches none of"),
        (["--format=native", "--only=("], "not a regular expression"),
        (["--format=hf", "--adapter-only"], "--adapter-only requires --format=llava-stf"),
        (["--format=hf", "--only=llm/.*"], "--only requires --format=native"),
        (["--format=gguf"], "invalid choice: 'gguf'"),
    ],
)
def test_conflicting_options_are_refused(model_folder, tmp_path, options, sentence, capsys):
    assert run_command(main, ["export", str(model_folder), f"--to={tmp_path / 'export'}", *options]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "export").exists()
