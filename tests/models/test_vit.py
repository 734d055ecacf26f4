"""The vision tower against transformers: same weights and pixels give the same hidden states at every depth."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from reference import vision_params
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from stf_jax.accounting.flops import count_model_flops
from stf_jax.config import UserError
from stf_jax.models.spec import vision_preset
from stf_jax.models.towers.vit import VisionTower

LAYERS = 4
SHAPE = {
    "patch_size": 7,
    "width": 32,
    "layers": LAYERS,
    "heads": 4,
    "mlp": 48,
    "norm_eps": 1e-3,
}  # an eps large enough to matter
CONFIGS = {
    "clip": dataclasses.replace(vision_preset("clip-l-14-336"), image_size=28, **SHAPE),
    # 31 = 4·7 + 3: some pixels remain at the right and bottom, as in 384 = 27·14 + 6.
    "siglip": dataclasses.replace(vision_preset("siglip-so400m-14-384"), image_size=31, **SHAPE),
}
FAMILIES = {"clip": (CLIPVisionConfig, CLIPVisionModel), "siglip": (SiglipVisionConfig, SiglipVisionModel)}


@functools.cache
def torch_model(family):
    config = CONFIGS[family]
    kind, model = FAMILIES[family]
    model = model(
        kind(
            hidden_size=config.width,
            intermediate_size=config.mlp,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            layer_norm_eps=config.norm_eps,
        )
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():  # biases, norms and positions large enough to matter
            is_weight = p.ndim > 1 and "position" not in name
            p.add_(torch.randn(p.shape, generator=generator) * (p[0].numel() ** -0.5 if is_weight else 0.3))
    return model.eval()


def state_dict(family):
    return {name: tensor.numpy() for name, tensor in torch_model(family).state_dict().items()}


def tower(family, *, scan=True, remat="none"):
    model = nnx.eval_shape(lambda: VisionTower(nnx.Rngs(0), CONFIGS[family], scan=scan, remat=remat))
    nnx.update(model, jax.tree.map(jnp.asarray, vision_params(state_dict(family), CONFIGS[family])))
    return model


def make_images(family, count=2):
    size = CONFIGS[family].image_size
    return np.random.default_rng(2).integers(0, 256, (count, size, size, 3), np.uint8)


def apply_tower(model, images, taps, dtype=jnp.float32):
    graph, state = nnx.split(model)
    return jax.jit(lambda state, images: nnx.merge(graph, state)(images, taps, dtype))(state, images)


@functools.cache
def expected(family):
    """Hidden states 0..L of transformers, without the class token, for pixels normalized like its processor does."""
    mean, std = {
        "clip": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
        "siglip": ([0.5] * 3, [0.5] * 3),
    }[family]
    values = (make_images(family) / 255 - mean) / std
    pixels = torch.from_numpy(values.transpose(0, 3, 1, 2).astype(np.float32))
    with torch.no_grad():
        states = torch_model(family)(pixels, output_hidden_states=True).hidden_states
    assert len(states) == LAYERS + 1
    return [state[:, int(family == "clip") :].numpy() for state in states]


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("family", CONFIGS)
def test_every_tap_equals_transformers(family, scan):
    taps = tuple(range(LAYERS + 1))
    states = apply_tower(tower(family, scan=scan), make_images(family), taps)
    for tap, ours, expected_state in zip(taps, states, expected(family), strict=True):
        assert ours.shape == (2, 16, 32)
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, expected_state, atol=1e-4, rtol=0, err_msg=f"tap {tap}")


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("taps", [(3, 1, 4, 0), (2,), (4, 4, 1)])
def test_taps_are_returned_in_order(taps, scan):
    states = apply_tower(tower("clip", scan=scan), make_images("clip"), taps)
    assert len(states) == len(taps)
    for tap, state in zip(taps, states, strict=True):
        np.testing.assert_allclose(state, expected("clip")[tap], atol=1e-4, rtol=0)


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
def test_blocks_above_the_highest_tap_do_not_matter(scan):
    model = tower("clip", scan=scan)
    before = apply_tower(model, make_images("clip"), (3, 1))
    broken = jax.tree.map(lambda p: p.at[3:].set(jnp.nan), nnx.state(model.blocks))
    nnx.update(model.blocks, broken)
    for a, b in zip(before, apply_tower(model, make_images("clip"), (3, 1)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.isnan(apply_tower(model, make_images("clip"), (4,))[0]).all()


def test_blocks_above_the_highest_tap_are_not_computed():
    model = tower("clip", scan=False)
    flops = [
        count_model_flops(lambda x, tap=tap: model(x, (tap,), jnp.float32), make_images("clip"))["vision"]
        for tap in range(LAYERS + 1)
    ]
    assert len(set(np.diff(flops))) == 1
    assert flops[1] > flops[0]


def test_remaining_pixels_are_ignored():
    model, images = tower("siglip"), make_images("siglip")
    changed = images.copy()
    changed[:, 28:], changed[:, :, 28:] = 0, 255
    np.testing.assert_array_equal(apply_tower(model, images, (4,))[0], apply_tower(model, changed, (4,))[0])


@pytest.mark.parametrize("tap", [-1, 5])
def test_tap_out_of_range_is_rejected(tap):
    with pytest.raises(UserError, match=f"Tap {tap} .* 1 to 4"):
        apply_tower(tower("clip"), make_images("clip"), (tap,))


@pytest.mark.parametrize("family", CONFIGS)
def test_bfloat16_is_close(family):
    for state, exact in zip(apply_tower(tower(family), make_images(family), (0, 4), jnp.bfloat16), (0, 4), strict=True):
        assert state.dtype == jnp.bfloat16
        error = np.asarray(state, np.float32) - expected(family)[exact]
        assert 0 < np.linalg.norm(error) < 0.02 * np.linalg.norm(expected(family)[exact])


@pytest.mark.parametrize("remat", ["dots", "mlp", "attention", "full", "offload"])
def test_remat_changes_nothing(remat):
    images = make_images("clip")
    for a, b in zip(
        apply_tower(tower("clip"), images, (4, 2)), apply_tower(tower("clip", remat=remat), images, (4, 2)), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-6)
