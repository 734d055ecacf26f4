"""FastV and VisionZip against transformers' attention and a second implementation, image by image; a plug-in."""

import copy
import dataclasses
import functools
import json
import pathlib
import re
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import reference
import tiny  # noqa: F401 (defines llama-tiny)
import torch
from etils import epath
from flax import nnx

from stf_jax.config import DataConfig, FusionConfig, MeshConfig, ModelConfig, TrainConfig, UserError, to_json
from stf_jax.models.decoders.base import LLMConfig
from stf_jax.models.decoders.rows import Selection
from stf_jax.models.decoders.transformer import Decoder
from stf_jax.models.fusions.base import Fusion
from stf_jax.models.reducers import dart, divprune, fastv, pool, random_patches, resize, uniform, visionzip
from stf_jax.models.reducers.base import (
    REDUCERS,
    DecoderReducer,
    PatchReducer,
    Reduction,
    TokenReducer,
    find_reducer,
    grid_of,
)
from stf_jax.models.reducers.random_patches import sample_patches
from stf_jax.models.spec import resolve_model, vision_preset
from stf_jax.models.stages import Layout, Stage, Visible, make_selections
from stf_jax.models.towers.vit import VisionTower
from stf_jax.planning.program import make_program
from stf_jax.training.flops import decode_flops, prefill_flops
from stf_jax.weights.model import describe_folder

ROOT = pathlib.Path(__file__).parents[2]
NAMES = "dart, divprune, fastv, pool, pyramiddrop, random, resize, uniform, visionzip"

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
    found = jax.jit(visionzip.merge_visionzip, static_argnums=3)(received, keys, states, keep)
    assert visionzip.contextual_tokens(keep) == contextual
    for image in range(3):
        parts = [np.float64(x[image]) for x in (received, keys, *states)]
        for ours, expected in zip(found, visionzip_reference(*parts[:2], parts[2:], keep, contextual), strict=True):
            np.testing.assert_allclose(ours[image], expected, atol=1e-5)
            np.testing.assert_array_equal(ours[image, : keep - contextual], expected[: keep - contextual])


def test_proportion_of_dominant_tokens_is_the_authors():
    assert [keep - visionzip.contextual_tokens(keep) for keep in (64, 128, 192)] == [54, 108, 162]


def test_keeping_all_tokens_only_reorders_them():
    rng = np.random.default_rng(0)
    received, keys, state = (jnp.asarray(rng.random(shape, np.float32)) for shape in ((2, 16), (2, 16, 8), (2, 16, 5)))
    (kept,) = visionzip.merge_visionzip(received, keys, (state,), 16)
    assert (kept != state).any()  # in another order
    np.testing.assert_array_equal(np.sort(kept, axis=1), np.sort(state, axis=1))


def test_random_sample_is_the_same_for_all_images():
    states = tuple(jnp.asarray(np.random.default_rng(seed).random((2, 16, 5), np.float32)) for seed in (0, 1))
    places = [
        [np.flatnonzero((image == token).all(1)).item() for token in tokens]
        for state, kept in zip(states, sample_patches(states, 6), strict=True)
        for image, tokens in zip(state, kept, strict=True)
    ]
    assert all(one == places[0] for one in places)
    assert places[0] == sorted(set(places[0]))
    assert len(places[0]) == 6
    np.testing.assert_array_equal(sample_patches(states, 16)[0], states[0])
    assert len({tuple(np.asarray(sample_patches(states, keep)[0])[0, :, 0]) for keep in range(1, 17)}) == 16


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
        lambda state, images: visionzip.visionzip(nnx.merge(graph, state), images, taps, jnp.float32, keep=8)
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


# ---- Baselines -------------------------------------------------------------------------------------------------------


def test_uniform_is_a_stride():
    assert uniform.spaced_cells(4, 4).tolist() == [5, 7, 13, 15]
    assert uniform.spaced_cells(6, 6).tolist() == [6 * row + column for row in (1, 4) for column in (1, 3, 5)]
    assert uniform.spaced_cells(5, 25).tolist() == list(range(25))


@pytest.mark.parametrize("keep", [9, 16, 20, 25])
def test_pool_equals_torch(keep):
    tokens = np.random.default_rng(keep).standard_normal((2, 36, 3), np.float32)
    grid = torch.from_numpy(tokens).reshape(2, 6, 6, 3).permute(0, 3, 1, 2)
    expected = torch.nn.functional.adaptive_avg_pool2d(grid, grid_of(keep, 6)).flatten(2).permute(0, 2, 1)
    np.testing.assert_allclose(pool.pool(jnp.asarray(tokens), keep), expected, atol=1e-6)


@pytest.mark.parametrize("family", TOWERS)
def test_tower_reads_smaller_images_as_transformers_does(family):
    images = np.random.default_rng(4).integers(0, 256, (2, 14, 28, 3), np.uint8)
    model, config = randomized_model(reference.tower, family)[0], TOWERS[family]
    pixels = np.float32((images / 255 - config.mean) / config.std).transpose(0, 3, 1, 2)
    with torch.no_grad():
        outputs = model(torch.from_numpy(pixels), output_hidden_states=True, interpolate_pos_encoding=True)
    first = int(family == "clip")
    (found,) = jax.jit(lambda images: tower(family)(images, (3,), jnp.float32))(images)
    assert found.shape[1] == 8
    np.testing.assert_allclose(found, outputs.hidden_states[3][:, first:], atol=2e-4)


def test_resize_gives_the_tower_a_smaller_image():
    images = np.random.default_rng(5).integers(0, 256, (2, 28, 28, 3), np.uint8)
    small = resize.resize_images(jnp.asarray(images), 14, 21)
    for ours, image in zip(small, images, strict=True):
        expected = PIL.Image.fromarray(image).resize((21, 14), PIL.Image.Resampling.BICUBIC)
        difference = np.abs(np.int16(ours) - np.asarray(expected))  # Pillow rounds and clips after each axis
        assert difference.max() <= 4
        assert difference.mean() < 0.5
    vision = tower("clip")
    whole, fewer = (resize.resize(vision, jnp.asarray(images), (2,), jnp.float32, keep)[0] for keep in (16, 6))
    np.testing.assert_array_equal(whole, vision(jnp.asarray(images), (2,), jnp.float32)[0])
    np.testing.assert_array_equal(fewer, vision(small, (2,), jnp.float32)[0])


def test_grids_are_as_square_as_they_can_be():
    found = [grid_of(count, 24) for count in (576, 288, 192, 144, 128, 64, 182, 2, 1)]
    assert found == [(24, 24), (16, 18), (12, 16), (12, 12), (8, 16), (8, 8), (13, 14), (1, 2), (1, 1)]
    with pytest.raises(
        UserError, match=r"keep=191 .* up to twice as many columns as rows; the nearest are 190 and 192"
    ):
        grid_of(191, 24)


def test_random_draws_depend_on_image_question_and_seed():
    rng = np.random.default_rng(6)
    tokens, pixels = rng.integers(0, 500, (400, 20)), rng.integers(0, 256, (400, 30), np.uint8)
    tokens[1] = tokens[0, [1, 0, *range(2, 20)]]  # the same in another order
    is_text = np.broadcast_to(np.arange(20) < 15, (400, 20))
    padding, hash_values = np.full((400, 9), 7), jax.jit(random_patches.hash_values)
    hashes = hash_values(tokens, is_text)
    padded = hash_values(np.concatenate([tokens[:, :15], padding], 1), np.pad(is_text[:, :15], ((0, 0), (0, 9))))
    np.testing.assert_array_equal(hashes, padded)
    assert len(set(hashes.tolist())) == len(set(hash_values(pixels).tolist())) == 400
    draws = np.asarray(random_patches.draw_patches(hashes, 16, 4, 0))
    assert (np.diff(draws) > 0).all()
    counts = np.bincount(draws.ravel(), minlength=16)  # 100 of each are expected, with a standard deviation of 8.7
    assert (np.abs(counts - 100) < 35).all()
    assert (draws != np.asarray(random_patches.draw_patches(hashes, 16, 4, 1))).any(1).mean() > 0.9


# ---- DART ------------------------------------------------------------------------------------------------------------


def dart_reference(keys, states, is_image, keep):
    """DART of one row in float64, after the description in dart.py: keys [T, K, Dh], states [T, D]."""
    norms, states = np.abs(keys).sum((1, 2)), states / np.linalg.norm(states, axis=1, keepdims=True)
    images, text = np.flatnonzero(is_image), np.arange(np.flatnonzero(is_image)[-1] + 1, len(keys))
    best = [sorted(among, key=lambda p: -norms[p])[:4] for among in (images, text)]
    taken, rest = set(best[0]), keep - 4
    for turn, pivot in enumerate(sorted(best[0] + best[1])):
        free = sorted(set(images) - taken, key=lambda p, pivot=pivot: states[p] @ states[pivot])
        taken |= set(free[: rest // 8 + (turn < rest % 8)])
    return sorted(taken)


def test_dart_equals_reference_in_rows_of_several_images():
    rng, rows = np.random.default_rng(14), []
    for parts in ((3, 16, 2, 16, 6), (5, 16, 7), (9,)):  # lengths of text, image, text, …
        rows.append(np.concatenate([np.full(part, i % 2 == 1) for i, part in enumerate(parts)]))
    is_image, lengths = np.zeros((3, 48), bool), np.array([len(row) for row in rows])
    for i, row in enumerate(rows):
        is_image[i, : len(row)] = row
    keys, states = rng.standard_normal((3, 48, 2, 4), np.float32), rng.standard_normal((3, 48, 12), np.float32)
    keep = np.array([2 * 9, 9, 0])
    scores = np.asarray(jax.jit(dart.score_dissimilar)(keys, keys, is_image, lengths, states, keep))
    for i, row in enumerate(rows[:2]):
        expected = dart_reference(np.float64(keys[i, : len(row)]), np.float64(states[i, : len(row)]), row, keep[i])
        assert np.flatnonzero(scores[i]).tolist() == expected
        assert len(expected) == keep[i]
    assert not scores[2].any()
    few = np.asarray(jax.jit(dart.score_dissimilar)(keys, keys, is_image, lengths, states, np.array([2, 3, 0])))
    norms = np.where(is_image, np.abs(keys).sum((2, 3)), -1)
    for i, count in ((0, 2), (1, 3)):  # with fewer tokens than pivots those with the longest keys are kept
        assert set(np.argsort(-few[i])[:count]) == set(np.argsort(-norms[i])[:count])


def test_divprune_never_picks_twice():
    tokens = np.repeat(np.random.default_rng(15).standard_normal((2, 4, 5), np.float32), 4, axis=1)
    for keep in (1, 6, 16):
        picks = np.asarray(divprune.pick_diverse(jnp.asarray(tokens), keep))
        assert all(len(set(row)) == keep for row in picks.tolist())


# ---- FastV -----------------------------------------------------------------------------------------------------------

CONFIG = LLMConfig(vocab=62, width=32, layers=3, heads=4, kv_heads=2, head_dim=8, mlp=48, norm_eps=1e-3)


def test_last_token_attention_equals_transformers():
    (model, state), outputs = randomized_model(reference.decoder, "llama"), []
    ours = nnx.eval_shape(lambda: Decoder(nnx.Rngs(0), CONFIG))
    nnx.update(ours, jax.tree.map(jnp.asarray, reference.decoder_params(state, CONFIG)))
    tokens, lengths = np.random.default_rng(0).integers(0, 60, (3, 20)), np.array([20, 13, 1])
    no_image = jnp.zeros((3, 20), bool)

    def select(q, k, x):
        outputs.append(fastv.last_token_attention(q, k, no_image, jnp.asarray(lengths)))
        return jnp.broadcast_to(jnp.arange(20), (3, 20))

    positions = jnp.broadcast_to(jnp.arange(20), (3, 20))
    ours.prefill(ours.embed(jnp.asarray(tokens), jnp.float32), positions, [Selection(2, select)])
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
    keep, most = draw(st.integers(1, 3)), draw(st.integers(1, 3))
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
    return rows, most, keep, np.array(scores, np.float32).reshape(3, LENGTH) / 8


@hypothesis.settings(deadline=None, max_examples=60, derandomize=True)
@hypothesis.given(prompts())
def test_kept_positions_are_text_and_top_image_tokens(drawn_prompts):
    rows, most, keep, scores = drawn_prompts
    image = np.zeros((3, LENGTH), bool)
    for row, marks in enumerate(rows):
        image[row, : len(marks)] = marks
    lengths, kept = np.array([len(row) for row in rows]), image.sum(1) // 4 * keep
    visible = Visible(Layout(jnp.asarray(image), jnp.int32(np.arange(LENGTH) < lengths[:, None])))
    (selection,) = make_selections([Stage(1, keep)], visible, 4, most, lambda *_: jnp.asarray(scores))
    found = np.asarray(selection.select(None, None, jnp.zeros(())))
    shorter = LENGTH - most * (4 - keep)
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
        ("", 0, "mlp", (576, 576), 576, 0),
        ("fastv", 0, "mlp", (576, 144), 576, 432),
        ("fastv", 576, "mlp", (576, 576), 576, 0),
        ("fastv", 0, "mbtf_stf", (144, 36), 144, 108),
        ("random", 64, "mlp", (576, 64), 64, 0),
        ("visionzip", 0, "mbtf", (576, 144), 144, 0),
        ("visionzip", 64, "mlp", (576, 64), 64, 0),
    ],
)
def test_resolve_reduction(reduce, keep, fusion, found, slots, dropped):
    config = ModelConfig(fusion=FusionConfig(fusion), reduce=reduce, keep=keep)
    reduction = resolve_model(config).reduction
    assert (reduction.name, reduction.tokens, reduction.keep) == (reduce, *found)
    assert reduction.reducer is (find_reducer(reduce) if reduce else None)
    assert (reduction.slots, reduction.dropped) == (slots, dropped)
    assert resolve_model(config).slots == slots


@pytest.mark.parametrize("keep", [192, 144, 128, 64])
def test_every_reducer_takes_the_numbers_of_tokens_of_the_literature(keep):
    for name in REDUCERS.known:
        reduction = resolve_model(dataclasses.replace(MLP, reduce=name, keep=keep)).reduction
        assert reduction.slots - reduction.dropped == keep, name


@pytest.mark.parametrize(
    ("reduce", "keep", "stages", "average"),
    [
        ("fastv", 192, {2: 192}, 216),
        ("fastv:count=average", 192, {2: 166}, 192),  # as tables of LLaVA-1.5-7B equate them
        ("fastv:count=average", 128, {2: 98}, 128),
        ("fastv:count=average", 64, {2: 30}, 64),
        ("fastv:after=3,count=average", 192, {3: 152}, 192),
        ("dart:after=1", 60, {1: 60}, 76),
        ("thinning:short_keys:after=2", 192, {2: 192}, 216),
        ("pyramiddrop", 72, {8: 288, 16: 144, 24: 72}, 270),  # the authors' schedule
        ("pyramiddrop:count=average", 270, {8: 288, 16: 144, 24: 72}, 270),
        ("pyramiddrop:after=2+8,count=average", 128, {2: 203, 8: 72}, 128),
    ],
)
@pytest.mark.usefixtures("plugins")
def test_what_keep_counts(reduce, keep, stages, average):
    reduction = resolve_model(dataclasses.replace(MLP, reduce=reduce, keep=keep)).reduction  # a decoder of 32 layers
    assert {stage.after: stage.keep for stage in reduction.stages} == stages
    assert round(reduction.average_tokens(32)) == average
    assert (reduction.keep, reduction.slots) == (keep, 576)


@pytest.mark.parametrize(
    ("reduce", "message"),
    [
        ("fastv:K=3", r"reduce=fastv:K=3: unknown option 'K'; known: after, count\."),
        ("fastv:after=two", "after=two must be a whole number"),
        ("fastv:after=0", "the layers before a drop must be at least 1"),
        ("fastv:count=all", "count=all must be one of after, average"),
        ("fastv:after=2,after=3", "sets after twice"),
        ("fastv:count=average", "keep=30 is too low for an average over 32 layers, because the first 2 .* at least 37"),
        ("pyramiddrop:after=8+4", "in ascending order"),
        ("pyramiddrop:after=8+", "after=8\\+ must be a whole number, or several joined by \\+"),
        ("random:seed=-1", "seed=-1 must be a whole number"),
        ("divprune:seed=1", "divprune has no options"),
        ("thinning:SPACED:a=1", "thinning:SPACED has no options"),
    ],
)
@pytest.mark.usefixtures("plugins")
def test_invalid_options_are_rejected(reduce, message):
    with pytest.raises(UserError, match=message):
        _ = resolve_model(dataclasses.replace(MLP, reduce=reduce, keep=30)).reduction


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": 9}, f"keep=9 .* set reduce to one of {NAMES}"),
        ({"reduce": "fastvv"}, "did you mean 'fastv'"),
        ({"reduce": "fastv", "keep": 577}, "keep=577 must be 1 to 576, .* image tokens per image of mlp"),
        (
            {"reduce": "resize", "keep": 31},
            "keep=31 is not the number of cells of a grid of at most 24×24 .* 30 and 32",
        ),
        ({"reduce": "uniform", "keep": 31}, "keep=31 is not the number"),
        ({"reduce": "pool", "keep": 31}, "keep=31 is not the number"),
        ({"reduce": "random", "fusion": FusionConfig("stf")}, r"reduce=random .*mbtf, mlp\), but stf does not"),
        ({"reduce": "visionzip", "keep": -1}, "keep=-1 must be 1 to 576"),
        ({"reduce": "visionzip", "fusion": FusionConfig()}, r"mbtf, mlp\), but mbtf_stf does not"),
        ({"reduce": "visionzip", "fusion": FusionConfig("mlp", taps=(0,))}, r"taps=\(0,\)"),
        ({"reduce": "fastv", "llm": "llama-tiny"}, "after decoder layer 2, but llama-tiny has no more"),
    ],
)
def test_invalid_reductions_are_rejected(changes, message):
    with pytest.raises(UserError, match=message):
        _ = resolve_model(dataclasses.replace(MLP, **changes)).reduction


# ---- A reducer of one's own, tests/plugins/thinning.py ---------------------------------------------------------------

SMALL = ModelConfig("clip-mini-16-96", "llama-mini", FusionConfig("mlp"))  # 36 patches, 4 layers
SPACED, SHORT_KEYS = "thinning:SPACED", "thinning:SHORT_KEYS"
KEPT, DROPPED, SLOTS = 9, 27, 64


@pytest.fixture
def plugins(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests" / "plugins")


def reduced(name):
    return dataclasses.replace(SMALL, reduce=name, keep=KEPT)


def test_the_docs_show_the_plugin():
    page = (ROOT / "docs" / "evaluating.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?PatchReducer.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert (ROOT / "tests" / "plugins" / "thinning.py").read_text().split('"""\n\n', 1)[1] == code


@pytest.mark.usefixtures("plugins")
def test_its_flops_are_counted():
    assert prefill_flops(reduced(SPACED), 1, SLOTS, 1) == prefill_flops(reduced("random"), 1, SLOTS, 1)
    assert prefill_flops(reduced("thinning:STRONGEST"), 1, SLOTS, 1) == prefill_flops(SMALL, 1, SLOTS, 1)
    products = 2 * 36 * 36 * 128
    assert prefill_flops(reduced("divprune"), 1, SLOTS, 1) == prefill_flops(SMALL, 1, SLOTS, 1) | {"reduce": products}
    every, fewer = (prefill_flops(SMALL, 1, length, 1)["llm"] // 4 for length in (SLOTS, SLOTS - DROPPED))
    assert prefill_flops(reduced(SHORT_KEYS), 1, SLOTS, 1)["llm"] == every + 3 * fewer
    saved = decode_flops(SMALL, 1, SLOTS, 1) - decode_flops(reduced(SHORT_KEYS), 1, SLOTS, 1)
    assert saved == 3 * DROPPED * 2 * 2 * 128  # two products of three layers
    drops = [0, 13, 22, 27]
    saved = decode_flops(SMALL, 1, SLOTS, 1) - decode_flops(reduced("pyramiddrop"), 1, SLOTS, 1)
    assert saved == sum(drops) * 2 * 2 * 128
    layers = sum(prefill_flops(SMALL, 1, SLOTS - drop, 1)["llm"] // 4 for drop in drops)
    scores = [2 * (SLOTS - drop) * 128 * (128 + 64 + 1) for drop in drops[:3]]  # queries, keys and one row of scores
    assert prefill_flops(reduced("pyramiddrop"), 1, SLOTS, 1)["llm"] == layers + sum(scores)


@pytest.mark.usefixtures("plugins")
@pytest.mark.parametrize(
    ("name", "dropped"), [(SPACED, [0] * 4), (SHORT_KEYS, [0, *[DROPPED] * 3]), ("pyramiddrop", [0, 13, 22, 27])]
)
def test_it_is_planned(name, dropped):
    config = TrainConfig(model=reduced(name), data=DataConfig(max_length=SLOTS), mesh=MeshConfig(fsdp=1))
    caches = [
        [keys.shape[2] for keys, _ in make_program(config, "decode", jax.devices()).arguments[1].cache]
        for config in (dataclasses.replace(config, model=SMALL), config)
    ]
    assert [before - after for before, after in zip(*caches, strict=True)] == dropped


@pytest.mark.usefixtures("plugins")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"reduce": "thinning"},
            f"Unknown model.reduce 'thinning'; known: {NAMES}.",
        ),
        ({"reduce": "thining:SPACED"}, "no module thining; is its folder on PYTHONPATH"),
        ({"reduce": "thinning:spaced_patches"}, "is not a PatchReducer, TokenReducer or DecoderReducer"),
        ({"reduce": SPACED, "fusion": FusionConfig("stf")}, r"reduce=thinning:SPACED needs .*, but stf does not"),
        ({"reduce": SHORT_KEYS, "keep": 577}, "keep=577 must be 1 to 576"),
    ],
)
def test_its_misuse_is_explained(changes, message):
    with pytest.raises(UserError, match=message):
        _ = resolve_model(dataclasses.replace(MLP, **changes)).reduction


def test_a_wrong_number_of_tokens_is_reported():
    halving = TokenReducer(lambda tokens, keep: tokens[:, ::2])
    with pytest.raises(UserError, match=r"^mine returns tokens of shape \(1, 8, 5\); expected \(1, 7, 5\)\.$"):
        Reduction("mine", 16, 7, halving).reduce_tokens(jnp.zeros((1, 16, 5)))
    reducer = PatchReducer(lambda tower, images, taps, dtype, keep: tower(images, taps, dtype))
    message = r"^mine returns states of \[16\] tokens, one number per tap; expected \[8\]\.$"
    with pytest.raises(UserError, match=message):
        Reduction("mine", 16, 8, reducer).tower_states(
            tower("clip"), jnp.zeros((1, 28, 28, 3), jnp.uint8), (1,), jnp.float32
        )


def test_tokens_are_dropped_after_a_layer():
    with pytest.raises(ValueError, match="must be at least 1"):
        DecoderReducer(fastv.last_token_attention, after_layers=0)


def test_code_in_a_models_folder_is_never_run(tmp_path, monkeypatch):
    (tmp_path / "evil_reducer.py").write_text("THING = None\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("evil_reducer:THING", "evil_reducer:THING:after=2"):
        (tmp_path / "config.json").write_text(json.dumps(to_json(TrainConfig(model=reduced(name)))))
        with pytest.raises(UserError, match="Opening a model never runs code from its folder"):
            describe_folder(epath.Path(tmp_path))
    assert "evil_reducer" not in sys.modules
