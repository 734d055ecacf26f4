"""Families of towers and language models: the package's, and two of tests/plugins."""

import dataclasses
import pathlib
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from etils import epath
from flax import nnx, traverse_util
from transformers import Dinov2Config, Dinov2Model, Olmo2Config, Olmo2ForCausalLM

from stf_jax.cli import run_command
from stf_jax.config import ModelConfig, UserError
from stf_jax.convert import main as convert
from stf_jax.models import spec
from stf_jax.models.blueprint import blueprint
from stf_jax.models.decoders.base import DECODERS, find_decoder_class
from stf_jax.models.spec import find_family, llm_preset, match_family, parse_llm_config, parse_vision_config
from stf_jax.models.towers.base import TOWERS, find_tower_class
from stf_jax.weights.model import open_model

TESTS = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def plugins():
    sys.path.insert(0, str(TESTS / "plugins"))
    yield
    sys.path.remove(str(TESTS / "plugins"))


def randomize(model):
    """Fills a torch model with values at which no part is a no-op."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    return model


def import_model(model, folder, family):
    """Imports a torch model; returns it as a SavedModel."""
    model.save_pretrained(folder / "torch")
    options = ["import", str(folder / "torch"), f"--to={folder / 'imported'}", f"--family={family}"]
    assert run_command(convert, options) == 0
    return open_model(epath.Path(folder / "imported"))


def save_dino(folder):
    """Saves a small DINOv2 as transformers does; returns the folder."""
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, image_size=32, patch_size=8)
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder)
    return folder


def build(module_class, shape, saved, part):
    """The module of one part with its imported weights."""
    graph = nnx.split(nnx.eval_shape(lambda: module_class(nnx.Rngs(0), shape)))[0]
    params = {path.removeprefix(f"{part}/"): jnp.asarray(saved.read(path)) for path in saved.shapes}
    return nnx.merge(graph, traverse_util.unflatten_dict(params, sep="/"))


def test_a_tower_of_ones_own_matches_transformers(tmp_path):
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8, layerscale_value=0.5
    )
    model = randomize(Dinov2Model(config)).eval()
    saved = import_model(model, tmp_path, "dino:DINO")
    vision = saved.description.vision
    assert vision == spec.vision_preset("dino:TINY")
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    pixels = (images / 255 - np.array(vision.mean)) / np.array(vision.std)
    with torch.no_grad():
        states = model(torch.tensor(pixels).permute(0, 3, 1, 2).float(), output_hidden_states=True).hidden_states
    found = build(find_tower_class(vision), vision, saved, "vision")(jnp.asarray(images), (3, 1), jnp.float32)
    for tap, state in zip((3, 1), found, strict=True):
        np.testing.assert_allclose(state, states[tap][:, 1:], atol=1e-4)


def test_a_language_model_of_ones_own_matches_transformers(tmp_path):
    sizes = dict(vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = randomize(Olmo2ForCausalLM(Olmo2Config(intermediate_size=64, pad_token_id=None, **sizes))).eval()
    saved = import_model(model, tmp_path, "olmo:OLMO")
    llm = saved.description.llm
    assert llm == llm_preset("olmo:TINY")
    decoder = build(find_decoder_class(llm), llm, saved, "llm")
    tokens = np.random.default_rng(0).integers(3, 500, (2, 9))
    positions = jnp.broadcast_to(jnp.arange(9), (2, 9))
    found = decoder.logits(decoder(decoder.embed(jnp.asarray(tokens), jnp.float32), positions, None))
    with torch.no_grad():
        np.testing.assert_allclose(found, model(torch.tensor(tokens)).logits, atol=2e-4)


# ---- Families of the package -----------------------------------------------------------------------------------------


def test_every_preset_has_its_familys_traits():
    for families in (TOWERS, DECODERS):
        for name, family in families.known.items():
            for shape in family.presets.values():
                assert shape.family == name
                assert find_family(families, shape, "part") == name


def test_shapes_of_earlier_versions_name_no_family():
    """The family then follows from the traits, which those versions read."""
    for name in ("clip-l-14-336", "siglip-b-16-256"):
        values = dataclasses.asdict(spec.VISION[name])
        family = values.pop("family")
        assert parse_vision_config(values) == spec.VISION[name]
        assert match_family(TOWERS, values) == family
    odd = dataclasses.replace(spec.VISION["clip-l-14-336"], pre_norm=False)  # no family's
    values = dataclasses.asdict(odd)
    values.pop("family")
    assert parse_vision_config(values) == odd
    for name in ("vicuna-7b", "qwen2.5-7b", "qwen3-8b"):
        values = dataclasses.asdict(spec.LLM[name])
        values.pop("family")
        assert parse_llm_config(values) == spec.LLM[name]


def test_a_shape_without_a_class_in_transformers():
    both = dataclasses.replace(spec.LLM["qwen2.5-7b"], qk_norm=True)
    with pytest.raises(UserError, match="transformers has no class for a language model with qkv_bias=True, qk_norm=T"):
        find_family(DECODERS, both, "language model")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("clip-l-14", r"Unknown preset model\.vision='clip-l-14'; did you mean 'clip-l-14-336'"),
        ("dino:DINO", r"model\.vision=dino:DINO is a TowerFamily, not a VisionConfig\."),
        ("dino:Missing", r"Unknown model\.vision 'dino:Missing': module dino has no Missing\."),
        ("missing:TINY", r"Unknown model\.vision 'missing:TINY': no module missing"),
    ],
)
def test_wrong_names_are_explained(name, reason):
    with pytest.raises(UserError, match=reason):
        blueprint(ModelConfig(vision=name, llm="llama-mini"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("dino:TINY", "dino:TINY is a VisionConfig, not a TowerFamily or a DecoderFamily."),
        ("dino:Missing", "module dino has no Missing."),
        ("dino", "one from outside is named package.module:Thing."),
    ],
)
def test_an_import_refuses_what_is_no_family(name, reason, tmp_path, capsys):
    source = save_dino(tmp_path / "torch")
    assert run_command(convert, ["import", str(source), f"--to={tmp_path / 'out'}", f"--family={name}"]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_architecture_is_refused_without_its_family(tmp_path, capsys):
    source = save_dino(tmp_path / "torch")
    assert run_command(convert, ["import", str(source), f"--to={tmp_path / 'out'}"]) == 2
    assert "holds no vision tower, language model or projector that is supported" in capsys.readouterr().err
