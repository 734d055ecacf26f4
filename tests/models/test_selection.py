"""FastV and VisionZip against transformers' attention and a second implementation, image by image."""

import copy
import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny  # noqa: F401 (defines llama-tiny)
import torch
from flax import nnx

from stf_jax.config import FusionConfig, ModelConfig, UserError
from stf_jax.models import selection
from stf_jax.models.decoders.base import LLMConfig
from stf_jax.models.decoders.transformer import Decoder
from stf_jax.models.fusions.base import Fusion
from stf_jax.models.selection import Reduction, resolve_reduction
from stf_jax.models.spec import vision_preset
from stf_jax.models.towers.vit import VisionTower
from stf_jax.models.vlm import slots_per_image

# ---- VisionZip -------------------------------------------------------------------------------------------------------


def visionzip_reference(received, keys, states, keep, contextual):
    """VisionZip of one image in float64: received [P], keys [P, Dh], one state [P, C] per tap."""
    places = range(len(received))
    dominant = sorted(sorted(places, key=lambda p: (-received[p], p))[: keep - contextual])
    rest = [p for p in places if p not in dominant]
    targets = rest[:: len(rest) // contextual][:contextual] if contextual else []
    keys = keys / np.sqrt((keys**2).sum(1, keepdims=True))
    assigned = {target: [] for target in targets}
    for p in rest:
        if targets and p not in targets:
            assigned[max(targets, key=lambda target, p=p: keys[p] @ keys[target])].append(p)
    return [
        np.stack([state[p] for p in dominant] + [state[t] + sum(state[p] for p in ps) / max(len(ps), 1)
                                                 for t, ps in assigned.items()])
        for state in states
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("patches", "keep", "contextual"), [(16, 4, 1), (36, 9, 1), (36, 18, 3), (49, 32, 5), (16, 2, 0), (30, 29, 5)]
)
def test_merge_visionzip_equals_reference(patches, keep, contextual):
    rng = np.random.default_rng(keep)
    received, keys = rng.random((3, patches), np.float32), rng.standard_normal((3, patches, 8), np.float32)
    received[1, ::3] = received[1, 0]  # equal scores: the first is chosen
    states = tuple(rng.standard_normal((3, patches, 5), np.float32) for _ in range(2))
    found = jax.jit(selection.merge_visionzip, static_argnums=3)(received, keys, states, keep)
    assert selection.contextual_tokens(keep) == contextual
    for image in range(3):
        parts = [np.float64(x[image]) for x in (received, keys, *states)]
        for ours, expected in zip(found, visionzip_reference(*parts[:2], parts[2:], keep, contextual), strict=True):
            np.testing.assert_allclose(ours[image], expected, atol=1e-5)
            np.testing.assert_array_equal(ours[image, : keep - contextual], expected[: keep - contextual])


def test_proportion_of_dominant_tokens_is_the_authors():
    assert [keep - selection.contextual_tokens(keep) for keep in (64, 128, 192)] == [54, 108, 162]


def test_keeping_all_tokens_only_reorders_them():
    rng = np.random.default_rng(0)
    received, keys, state = (jnp.asarray(rng.random(shape, np.float32)) for shape in ((2, 16), (2, 16, 8), (2, 16, 5)))
    (kept,) = selection.merge_visionzip(received, keys, (state,), 16)
    assert (kept != state).any()  # in another order
    np.testing.assert_array_equal(np.sort(kept, axis=1), np.sort(state, axis=1))


def test_random_sample_is_the_same_for_all_images():
    states = tuple(jnp.asarray(np.random.default_rng(seed).random((2, 16, 5), np.float32)) for seed in (0, 1))
    places = [
        [np.flatnonzero((image == token).all(1)).item() for token in tokens]
        for state, kept in zip(states, selection.sample_patches(states, 6), strict=True)
        for image, tokens in zip(state, kept, strict=True)
    ]
    assert all(one == places[0] for one in places)
    assert places[0] == sorted(set(places[0]))
    assert len(places[0]) == 6
    np.testing.assert_array_equal(selection.sample_patches(states, 16)[0], states[0])
    assert len({tuple(np.asarray(selection.sample_patches(states, keep)[0])[0, :, 0]) for keep in range(1, 17)}) == 16


@functools.cache
def randomized_model(make, family):
    """A small model of transformers with fixed random weights and uneven attention."""
    model, generator = copy.deepcopy(make(family)), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (1.5 * p.shape[-1] ** -0.5 if p.ndim > 1 else 0.2))
            p.add_(float("norm" in name and name.endswith("weight")))
    model.set_attn_implementation("eager")
    return model, {name: tensor.numpy() for name, tensor in model.state_dict().items()}


SHAPE = {"patch_size": 7, "width": 128, "layers": 4, "heads": 2, "mlp": 96, "norm_eps": 1e-3}
TOWERS = {
    "clip": dataclasses.replace(vision_preset("clip-l-14-336"), image_size=28, **SHAPE),
    "siglip": dataclasses.replace(vision_preset("siglip-so400m-14-384"), image_size=28, **SHAPE),
}


def tower(family, *, scan=True):
    _, state = randomized_model(reference.tower, family)
    model = nnx.eval_shape(lambda: VisionTower(nnx.Rngs(0), TOWERS[family], scan=scan))
    nnx.update(model, jax.tree.map(jnp.asarray, reference.vision_params(state, TOWERS[family])))
    return model


def transformers_attention(family, images, block):
    """Transformers' hidden states, a block's attention [B, H, S, S], and its keys [B, S, D]."""
    model, config, keys = randomized_model(reference.tower, family)[0], TOWERS[family], []
    pixels = (images / 255 - config.mean) / config.std
    (projection,) = (
        module for name, module in model.named_modules() if name.endswith(f"layers.{block - 1}.self_attn.k_proj")
    )
    hook = projection.register_forward_hook(lambda module, inputs, output: keys.append(output.numpy()))
    with torch.no_grad():
        pixel_tensor = torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32))
        outputs = model(pixel_tensor, output_hidden_states=True, output_attentions=True)
    hook.remove()
    return [x.numpy() for x in outputs.hidden_states], outputs.attentions[block - 1].numpy(), keys[0]


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("taps", [(4,), (3, 1), (3, 2, 0)])
@pytest.mark.parametrize("family", TOWERS)
def test_visionzip_uses_the_attention_of_the_deepest_block(family, taps, scan):
    images = np.random.default_rng(3).integers(0, 256, (3, 28, 28, 3), np.uint8)
    states, attention, keys = transformers_attention(family, images, taps[0])
    graph, state = nnx.split(tower(family, scan=scan))
    found = jax.jit(
        lambda state, images: selection.visionzip(nnx.merge(graph, state), images, taps, jnp.float32, keep=8)
    )(state, images)
    first = int(family == "clip")
    queries = attention[:, :, :1] if first else attention
    received = queries.mean((1, 2))[:, first:]
    keys = keys.reshape(3, -1, 2, 64).mean(2)[:, first:]
    order = np.sort(received, axis=1)
    assert (order[:, -7] - order[:, -8]).min() > 1e-5, "scores too close: rounding decides"
    for image in range(3):
        image_states = [states[tap][image, first:] for tap in taps]
        for ours, expected in zip(
            found, visionzip_reference(received[image], keys[image], image_states, 8, 1), strict=True
        ):
            np.testing.assert_allclose(ours[image], expected, atol=2e-4)


def test_per_patch_fusions_accept_any_number_of_patches():
    rng = np.random.default_rng(0)
    states = [jnp.asarray(rng.standard_normal((2, 16, 128), np.float32)) for _ in range(2)]
    for name, taps in (("mlp", 1), ("mbtf", 2)):
        fusion = Fusion(nnx.Rngs(0), FusionConfig(name, taps=(4, 2)), TOWERS["clip"], 24)
        some = fusion(tuple(state[:, 3:8] for state in states[:taps]))
        assert some.shape == (2, 5, 24)
        np.testing.assert_allclose(some, fusion(tuple(states[:taps]))[:, 3:8], atol=1e-5)


# ---- FastV -----------------------------------------------------------------------------------------------------------

CONFIG = LLMConfig(vocab=62, width=32, layers=3, heads=4, kv_heads=2, head_dim=8, mlp=48, norm_eps=1e-3)


def test_last_token_attention_equals_transformers():
    (model, state), outputs = randomized_model(reference.decoder, "llama"), []
    ours = nnx.eval_shape(lambda: Decoder(nnx.Rngs(0), CONFIG))
    nnx.update(ours, jax.tree.map(jnp.asarray, reference.decoder_params(state, CONFIG)))
    tokens, lengths = np.random.default_rng(0).integers(0, 60, (3, 20)), np.array([20, 13, 1])

    def select(q, k):
        outputs.append(selection.last_token_attention(q, k, jnp.asarray(lengths)))
        return jnp.broadcast_to(jnp.arange(20), (3, 20))

    ours.prefill(ours.embed(jnp.asarray(tokens), jnp.float32), jnp.broadcast_to(jnp.arange(20), (3, 20)), 2, select)
    (scores,) = outputs
    for row, length in enumerate(lengths):
        with torch.no_grad():
            read = model(torch.from_numpy(tokens[row, :length])[None], output_attentions=True)
        expected = read.attentions[1][0, :, -1].mean(0).numpy()
        np.testing.assert_allclose(scores[row, :length], expected, rtol=1e-5)
        assert (scores[row, length:] == 0).all()
        assert length == 1 or expected.max() > 2 / length  # attention is uneven


LENGTH = 40  # fits three images of four tokens and text


@st.composite
def prompts(draw):
    """Rows of text and images of four tokens each, and how many of them to keep."""
    keep, most = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    rows = []
    for _ in range(3):
        images = draw(st.integers(0, most))
        parts = [draw(st.integers(0, 3)) for _ in range(images + 1)]
        image = [False] * parts[0]
        for text in parts[1:]:
            image += [True] * 4 + [False] * text
        rows.append(image)
    spare = LENGTH - max(len(row) + (most - sum(row) // 4) * (4 - keep) for row in rows)
    rows[0] += [False] * draw(st.integers(0, spare))
    scores = draw(st.lists(st.integers(0, 5), min_size=3 * LENGTH, max_size=3 * LENGTH))  # with ties
    return rows, LENGTH - most * (4 - keep), keep, np.array(scores, np.float32).reshape(3, LENGTH) / 8


@hypothesis.settings(deadline=None, max_examples=60, derandomize=True)
@hypothesis.given(prompts())
def test_kept_positions_are_text_and_top_image_tokens(drawn_prompts):
    rows, shorter, keep, scores = drawn_prompts
    image = np.zeros((3, LENGTH), bool)
    for row, marks in enumerate(rows):
        image[row, : len(marks)] = marks
    lengths, kept = np.array([len(row) for row in rows]), image.sum(1) // 4 * keep
    found = np.asarray(selection.kept_positions(*map(jnp.asarray, (scores, image, lengths, kept)), shorter))
    assert found.shape == (3, shorter)
    for row, marks in enumerate(rows):
        best = sorted(np.flatnonzero(marks), key=lambda p: (-scores[row, p], p))[: kept[row]]
        expected = sorted([*np.flatnonzero(~np.array(marks, bool)), *best])
        assert found[row, : len(expected)].tolist() == expected
        assert len(set(found[row].tolist())) == shorter  # no position is read twice


# ---- Configuration ---------------------------------------------------------------------------------------------------

MLP = ModelConfig(fusion=FusionConfig("mlp"))


@pytest.mark.parametrize(
    ("reduce", "keep", "fusion", "found", "slots", "dropped"),
    [
        ("", 0, "mlp", Reduction("", 576, 576), 576, 0),
        ("fastv", 0, "mlp", Reduction("fastv", 576, 144), 576, 432),
        ("fastv", 576, "mlp", Reduction("fastv", 576, 576), 576, 0),
        ("fastv", 0, "mbtf_stf", Reduction("fastv", 144, 36), 144, 108),
        ("random", 64, "mlp", Reduction("random", 576, 64), 64, 0),
        ("visionzip", 0, "mbtf", Reduction("visionzip", 576, 144), 144, 0),
        ("visionzip", 64, "mlp", Reduction("visionzip", 576, 64), 64, 0),
    ],
)
def test_resolve_reduction(reduce, keep, fusion, found, slots, dropped):
    config = ModelConfig(fusion=FusionConfig(fusion), reduce=reduce, keep=keep)
    assert resolve_reduction(config) == found
    assert (found.slots, found.dropped) == (slots, dropped)
    assert slots_per_image(config) == slots


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": 9}, "keep=9 .* set reduce to one of fastv, random, visionzip"),
        ({"reduce": "fastvv"}, "did you mean 'fastv'"),
        ({"reduce": "fastv", "keep": 577}, "keep=577 must be 1 to 576, .* image tokens per image of mlp"),
        ({"reduce": "random", "fusion": FusionConfig("stf")}, r"reduce=random .*mbtf, mlp\), but stf does not"),
        ({"reduce": "visionzip", "keep": -1}, "keep=-1 must be 1 to 576"),
        ({"reduce": "visionzip", "fusion": FusionConfig()}, r"mbtf, mlp\), but mbtf_stf does not"),
        ({"reduce": "visionzip", "fusion": FusionConfig("mlp", taps=(0,))}, r"taps=\(0,\)"),
        ({"reduce": "fastv", "llm": "llama-tiny"}, "after decoder layer 2, but llama-tiny has no more"),
    ],
)
def test_invalid_reductions_are_rejected(changes, message):
    with pytest.raises(UserError, match=message):
        resolve_reduction(dataclasses.replace(MLP, **changes))
