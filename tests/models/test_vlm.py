"""The complete model: image tokens in their slots, and independent rows."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stf_jax.config import FusionConfig, ModelConfig, UserError
from stf_jax.models.layers import make_rngs
from stf_jax.models.spec import resolve_model
from stf_jax.models.vlm import VLM

CONFIG = ModelConfig(vision="clip-mini-16-96", llm="llama-mini", precision="float32", remat="none")
N = 9  # a 6×6 grid merged 2×2


@functools.cache
def model():
    """A model filled by numpy, which compiles nothing, unlike the initializers."""
    graph, state = nnx.split(nnx.eval_shape(lambda: VLM(nnx.Rngs(0), CONFIG)))
    rng = np.random.default_rng(0)

    def fill(path, p):
        return jnp.asarray(0.1 * rng.standard_normal(p.shape, np.float32) + ("scale" in jax.tree_util.keystr(path)))

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(fill, state))


@functools.cache
def compiled():
    """The jitted call, and a list that grows by one each time it is traced."""
    graph, _ = nnx.split(model())
    traces = []

    @jax.jit
    def run(state, *batch):
        traces.append(batch)
        return nnx.merge(graph, state)(*batch)

    return run, traces


def logits(tokens, slots, images, segments=None, positions=None):
    if positions is None:
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return np.asarray(compiled()[0](nnx.state(model()), tokens, positions, segments, slots, images))


def batch(rows=2, length=48, images_per_row=2, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 512, (rows, length), np.int32)
    images = rng.integers(0, 256, (rows, images_per_row, 96, 96, 3), np.uint8)
    return tokens, images


def slots_at(length, *starts, count=N):
    """Slots of one row with images 0, 1, … at ``starts``."""
    slots = np.full(length, -1, np.int32)
    for image, start in enumerate(starts):
        slots[start : start + count] = image * count + np.arange(count)
    return slots


@functools.cache
def jit_method(name):
    """A jitted method of the model."""
    graph, state = nnx.split(model())
    run = jax.jit(lambda state, *args: getattr(nnx.merge(graph, state), name)(*args))
    return functools.partial(run, state)


@hypothesis.settings(deadline=None, max_examples=30, derandomize=True)
@hypothesis.given(st.lists(st.integers(-1, 2 * N - 1), min_size=80, max_size=80))
def test_image_tokens_fill_exactly_their_slots(slots):
    slots = np.array(slots, np.int32).reshape(2, 40)
    tokens, _ = batch(length=40)
    image_tokens = np.random.default_rng(1).standard_normal((2, 2 * N, 128), np.float32)
    x = np.asarray(jit_method("embed")(tokens, slots, image_tokens))
    text = np.asarray(model().llm.embedding[...])[tokens]
    expected = np.where(slots[..., None] < 0, text, image_tokens[np.arange(2)[:, None], slots])
    np.testing.assert_array_equal(x, expected)


def test_image_tokens_are_in_image_order():
    _, images = batch()
    run = jit_method("image_tokens")
    tokens = run(images)
    assert tokens.shape == (2, 2 * N, 128)
    for row, image in np.ndindex(2, 2):
        alone = run(np.broadcast_to(images[row, image], images.shape))
        np.testing.assert_allclose(tokens[row, image * N : (image + 1) * N], alone[0, :N], atol=1e-5)


def test_rows_are_isolated():
    tokens, images = batch()
    slots = np.stack([slots_at(48, 1, 20), slots_at(48, 5)])
    before = logits(tokens, slots, images)
    changed = images.copy()
    changed[1] = 255 - changed[1]
    after = logits(tokens, slots, changed)
    np.testing.assert_array_equal(before[0], after[0])
    assert np.abs(before[1, :5] - after[1, :5]).max() == 0
    assert (np.abs(before[1, 5:] - after[1, 5:]).max(-1) > 1e-6).all()


def test_image_without_slots_is_ignored():
    tokens, images = batch()
    slots = np.stack([slots_at(48, 3), slots_at(48, 3)])  # the second image of each row has no slots
    changed = images.copy()
    changed[:, 1] = 0
    np.testing.assert_array_equal(logits(tokens, slots, images), logits(tokens, slots, changed))


def test_images_of_a_row_are_distinguished():
    tokens, images = batch()
    slots = np.stack([slots_at(48, 1, 20)] * 2)
    swapped_slots = np.where(slots >= 0, (slots + N) % (2 * N), -1)
    straight = logits(tokens, slots, images)
    np.testing.assert_allclose(straight, logits(tokens, swapped_slots, images[:, ::-1]), atol=1e-4)
    assert np.abs(straight - logits(tokens, slots, images[:, ::-1])).max() > 1e-3


def test_packed_conversations_see_only_their_own_image():
    tokens, images = batch()
    segments = np.repeat([[1, 2]], 24, axis=1).repeat(2, 0).astype(np.int32)
    positions = np.tile(np.arange(24, dtype=np.int32), (2, 2))
    slots = np.stack([slots_at(48, 2, 30)] * 2)
    before = logits(tokens, slots, images, segments, positions)
    changed = images.copy()
    changed[:, 0] = 0
    after = logits(tokens, slots, changed, segments, positions)
    np.testing.assert_allclose(before[:, 24:], after[:, 24:], atol=1e-6)
    assert np.abs(before[:, 2:24] - after[:, 2:24]).max() > 1e-3


def test_batch_without_images():
    tokens, _ = batch()
    none = np.zeros((2, 0, 96, 96, 3), np.uint8)
    text = np.full((2, 48), -1, np.int32)
    _, images = batch()
    np.testing.assert_allclose(logits(tokens, text, none), logits(tokens, text, images), atol=1e-5)


def test_slot_layouts_share_one_compilation():
    tokens, images = batch(rows=3, images_per_row=1)
    traces = compiled()[1]
    before = len(traces)
    for starts in ([(0,), (1,), (30,)], [(), (), ()], [(7,), (), (32,)]):
        logits(tokens, np.stack([slots_at(48, *row) for row in starts]), images)
    assert len(traces) == before + 1


def test_bfloat16_model_returns_float32_logits():
    config = dataclasses.replace(CONFIG, precision="bfloat16")
    graph, _ = nnx.split(nnx.eval_shape(lambda: VLM(nnx.Rngs(0), config)))
    state = nnx.state(model())
    tokens, images = batch(rows=1)
    slots = slots_at(48, 1, 20)[None]
    run = jax.jit(lambda state, *args: nnx.merge(graph, state)(*args))
    out = run(state, tokens, np.arange(48, dtype=np.int32)[None], None, slots, images)
    assert out.dtype == jnp.float32
    assert jax.eval_shape(nnx.merge(graph, state).image_tokens, images).dtype == jnp.bfloat16
    exact = logits(tokens, slots, images)
    assert 0 < np.linalg.norm(out - exact) < 0.05 * np.linalg.norm(exact)


@pytest.mark.parametrize(
    ("fusion", "slots"),
    [(FusionConfig(), 144), (FusionConfig(kernel=3), 64), (FusionConfig(fusion="mlp"), 576)],
)
def test_slots_per_image(fusion, slots):
    assert resolve_model(ModelConfig(fusion=fusion)).slots == slots


def test_invalid_models_are_rejected():
    with pytest.raises(UserError, match="pad_grid"):
        _ = resolve_model(ModelConfig(vision="siglip-so400m-14-384")).slots
    with pytest.raises(UserError, match="vicuna-7b"):
        VLM(nnx.Rngs(0), ModelConfig(llm="vicuna-7"))


def test_splash_applies_only_to_the_decoder():
    """The tower is not causal and keeps its own kernel; otherwise no model could use splash."""
    config = dataclasses.replace(CONFIG, attention="splash")
    model = nnx.eval_shape(lambda: VLM(nnx.Rngs(0), config))
    assert model.llm.attention == "splash"
    graph, state = nnx.split(model)
    images = jax.ShapeDtypeStruct((1, 1, 96, 96, 3), jnp.uint8)
    tokens = jax.eval_shape(lambda state, images: nnx.merge(graph, state).image_tokens(images), state, images)
    assert tokens.shape == (1, N, 128)


def test_keys_are_those_of_flax():
    def draw(make):
        return jax.jit(lambda key: [jax.random.key_data(make(key).params()) for _ in range(2)] + draws(make(key)))

    def draws(rngs):
        return [jax.random.key_data(rngs.params()), jax.random.key_data(rngs())]

    key = jax.random.key(3)
    for ours, expected in zip(draw(make_rngs)(key), draw(nnx.Rngs)(key), strict=True):
        np.testing.assert_array_equal(ours, expected)
    first, second = draws(make_rngs(3))
    assert (first != second).any()
