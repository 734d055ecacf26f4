"""Exports under our own names and under the authors': nothing changed on the way, nothing half-written."""

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

from stf_jax.config import FusionConfig, ModelConfig
from stf_jax.convert import main
from stf_jax.data.tokenizer import MINIATURE
from stf_jax.models.llm import LLMConfig, RopeScaling
from stf_jax.models.presets import VISION
from stf_jax.runtime.cli import door
from stf_jax.runtime.parameters import write_params
from stf_jax.training.state import blueprint
from stf_jax.weights import shards
from stf_jax.weights.export_stf import export_llava_stf
from stf_jax.weights.exports import export_native
from stf_jax.weights.folder import load_params
from stf_jax.weights.imports import import_weights
from stf_jax.weights.model import Description, open_model

# The authors' depth in a width that a test can hold.
TOWER = dataclasses.replace(VISION["clip-l-14-336"], image_size=28, patch_size=7, width=64, layers=24, heads=1, mlp=32)
LLM = LLMConfig(512, width=32, layers=3, heads=4, kv_heads=2, head_dim=8, mlp=48, norm_eps=1e-4)
TAPS = (23, 21, 18, 15, 12, 9, 6, 3)
FUSION = FusionConfig(taps=TAPS)


def make(folder, fusion=FUSION, vision=TOWER, llm=LLM, dtype="float32", **how):
    """A folder of random weights as an import leaves it."""
    folder.mkdir(parents=True)
    Description(vision, llm, fusion, **how).save(folder)
    shutil.copytree(MINIATURE, folder / "tokenizer")
    plan, rng = blueprint(ModelConfig(str(folder), str(folder), fusion)), np.random.default_rng(0)

    def value(leaf):
        return (rng.normal(size=leaf.shape) * leaf.shape[-1] ** -0.5).astype(jnp.dtype(dtype))

    write_params(folder, ((path, value(leaf)) for path, leaf in plan.shapes.items()))
    return folder


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """Such a folder, for tests that leave it as it is."""
    return make(tmp_path_factory.mktemp("made") / "ours")


def same(first, second):
    """Two folders hold the same parameters, to the bit."""
    before, after = open_model(first), open_model(second)
    assert after.shapes == before.shapes
    for path in before.shapes:
        np.testing.assert_array_equal(before.read(path).view(np.uint8), after.read(path).view(np.uint8))


# ---- The authors' names ----------------------------------------------------------------------------------------------


def reference_image_tokens(state, states):
    """Tapped states [P, C], deepest first, to image tokens: written from the facts, in float64, without our code."""
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
def test_their_tensors_make_our_image_tokens(ours, tmp_path, adapter_only):
    report = export_llava_stf(ours, tmp_path / "theirs", adapter_only=adapter_only)
    if adapter_only:
        assert sorted(path.name for path in (tmp_path / "theirs").iterdir()) == ["export.json", "mm_projector.bin"]
        state = torch.load(tmp_path / "theirs" / "mm_projector.bin", weights_only=True)
        assert len(report["written"]) == 8
    else:
        state = load_file(tmp_path / "theirs" / "model.safetensors")
    eight = {
        f"model.mm_projector{part}.{i}.{end}"
        for part in ("", "_crosslayer")
        for i in (0, 2)
        for end in ("weight", "bias")
    }
    assert {name for name in state if "mm_projector" in name} == eight
    assert state["model.mm_projector_crosslayer.0.weight"].shape == (4 * 64, 8 * 64)
    assert state["model.mm_projector.0.weight"].shape == (16 * 64, 4 * 64)

    saved = open_model(ours)
    plan = blueprint(dataclasses.replace(saved.config, precision="float32"))
    model = plan.merge({path: jnp.asarray(saved.read(path)) for path in plan.shapes})
    states = [np.random.default_rng(tap).normal(size=(16, 64)) for tap in TAPS]
    tokens = model.fusion(tuple(jnp.asarray(x[None], jnp.float32) for x in states))[0]
    np.testing.assert_allclose(tokens, reference_image_tokens(state, [torch.from_numpy(x) for x in states]), atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_authors_layout_comes_back_to_the_bit(tmp_path, dtype):
    folder = make(tmp_path / "ours", dtype=dtype, aspect="pad")
    export_llava_stf(folder, tmp_path / "theirs")
    import_weights(str(tmp_path / "theirs"), tmp_path / "again")
    same(folder, tmp_path / "again")
    again = open_model(tmp_path / "again").description
    assert (again.llm, again.aspect, again.fusion.taps) == (LLM, "pad", TAPS)


def test_the_eight_tensors_come_back_to_the_bit(tmp_path):
    first = make(tmp_path / "ours", dtype="bfloat16")
    export_llava_stf(first, tmp_path / "theirs", adapter_only=True)
    import_weights(str(tmp_path / "theirs" / "mm_projector.bin"), tmp_path / "again")
    assert open_model(tmp_path / "again").description.llm is None
    export_llava_stf(tmp_path / "again", tmp_path / "theirs again", adapter_only=True)
    one, other = (torch.load(tmp_path / name / "mm_projector.bin") for name in ("theirs", "theirs again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert {value.dtype for value in one.values()} == {torch.bfloat16}


def test_the_whole_checkpoint_says_what_llava_reads(tmp_path, llama, capsys):
    folder = make(tmp_path / "ours", llm=dataclasses.replace(LLM, vocab=32_000), aspect="pad")
    assert door(main, ["export", str(folder), "--format=llava-stf", f"--to={tmp_path / 'bare'}"]) == 0
    assert "no tokenizer.model" in capsys.readouterr().out
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(llama.name_or_path, folder / "tokenizer")
    report = export_llava_stf(folder, tmp_path / "theirs")
    state = load_file(tmp_path / "theirs" / "model.safetensors")
    assert sorted(report["written"]) == sorted(state)
    assert len(state) == 8 + 5 + 24 * 16 + 3 * 9 + 3
    assert "model.vision_tower.vision_tower.vision_model.encoder.layers.23.mlp.fc2.bias" in state
    assert {"model.embed_tokens.weight", "model.layers.2.mlp.up_proj.weight", "lm_head.weight"} < state.keys()
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
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
    assert (tmp_path / "theirs" / "tokenizer.model").read_bytes() == (
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
def test_what_their_code_cannot_hold_is_refused(ours, tmp_path, changes, sentence, capsys):
    shutil.copytree(ours, tmp_path / "ours")
    Description(**{"vision": TOWER, "llm": LLM, "fusion": FUSION} | changes).save(tmp_path / "ours")
    assert door(main, ["export", str(tmp_path / "ours"), "--format=llava-stf", f"--to={tmp_path / 'theirs'}"]) == 2
    error = capsys.readouterr().err
    assert re.search(sentence, error), error
    assert "export" in error
    assert "hf" in error
    assert not (tmp_path / "theirs").exists()


# ---- Our own ---------------------------------------------------------------------------------------------------------


def test_native_weights_start_a_run(ours, tmp_path):
    report = export_native(ours, tmp_path / "native", only="fusion/.*", dtype="bfloat16")
    saved = open_model(ours)
    fusion = {path: leaf for path, leaf in saved.shapes.items() if path.startswith("fusion/")}
    assert report["written"] == list(fusion)
    assert len(fusion) == 8
    device = jnp.zeros(()).sharding
    layout = {path: leaf.update(sharding=device) for path, leaf in fusion.items()}
    for path, value in load_params(str(tmp_path / "native"), layout, ()).items():
        np.testing.assert_array_equal(np.asarray(value), saved.read(path).astype(jnp.bfloat16))


@pytest.mark.parametrize("form", ["hf", "llava-stf", "native"])
def test_a_full_disk_leaves_nothing_behind(ours, tmp_path, monkeypatch, form, capsys):
    def fails_half_way(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards, "save_file", fails_half_way)
    assert door(main, ["export", str(ours), f"--format={form}", f"--to={tmp_path / 'theirs'}"]) == 2
    assert "The disk is full" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--format=native", "--only=llm"], "matches none of"),
        (["--format=native", "--only=("], "not a regular expression"),
        (["--format=hf", "--adapter-only"], "--adapter-only goes with --format=llava-stf"),
        (["--format=hf", "--only=llm/.*"], "--only goes with --format=native"),
        (["--format=gguf"], "invalid choice: 'gguf'"),
    ],
)
def test_options_that_do_not_fit_are_refused(ours, tmp_path, options, sentence, capsys):
    assert door(main, ["export", str(ours), f"--to={tmp_path / 'theirs'}", *options]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "theirs").exists()
