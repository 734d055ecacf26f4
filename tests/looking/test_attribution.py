"""Maps of tokens and answers: planted dependencies, all fusions and reducers, finite differences, and the generator."""

import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stf_jax.config import FusionConfig
from stf_jax.looking.attribution import map_answer, map_tokens
from stf_jax.models import spec
from stf_jax.models.decoders.rows import Rows
from stf_jax.models.fusions.base import FUSIONS, Fusion, FusionSpec, tapped_blocks
from stf_jax.models.reducers.base import REDUCERS, DecoderReducer, Reduction, TokenReducer, find_reducer
from stf_jax.models.reducers.pool import pooling_weights
from stf_jax.models.towers.vit import VisionTower

SIDE, KERNEL, WIDTH, OUT = 5, 2, 8, 12  # windows of 2×2 do not divide 5×5 patches
TOWER = dataclasses.replace(
    spec.VISION["clip-mini-16-96"], image_size=8 * SIDE, patch_size=8, width=WIDTH, layers=4, heads=2, mlp=16
)
PATCHES = SIDE**2
WINDOWS = ("stf", "mbtf_stf", "avg_pool", "pixel_shuffle", "token_packer")
RNG = np.random.default_rng(0)
PROMPT, IS_TEXT = jnp.arange(3), jnp.ones(3, bool)


class FixedTower(VisionTower):
    """A tower with given states, the same for all images."""

    def __init__(self, taps):
        self.config = TOWER
        self.fixed = nnx.data({tap: jnp.asarray(RNG.normal(size=(1, PATCHES, WIDTH)), jnp.float32) for tap in taps})

    def __call__(self, images, taps, dtype):
        return tuple(self.fixed[tap] for tap in taps)


def make_model(fusion, reduction=None, tower=None):
    """What map_tokens needs of a model, with random parameters."""
    config = FusionConfig(fusion, kernel=KERNEL, pad_grid=True, depth=1)
    made = Fusion(nnx.Rngs(0), config, TOWER, OUT)
    taps = tapped_blocks(config, TOWER.layers)
    graph, params = nnx.split(made)
    made = nnx.merge(graph, jax.tree.map(lambda x: jnp.asarray(RNG.normal(size=x.shape) / 3, x.dtype), params))
    reduction = reduction or Reduction("", made.tokens, made.tokens)
    return types.SimpleNamespace(
        vision=tower or FixedTower(taps), taps=taps, dtype=jnp.float32, reduction=reduction, fusion=made
    )


def compute_maps(model, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (8 * SIDE, 8 * SIDE, 3), np.uint8)
    maps = jax.jit(functools.partial(map_tokens, model))(pixels, PROMPT, IS_TEXT)
    return types.SimpleNamespace(**{key: x if x is None else np.asarray(x) for key, x in maps._asdict().items()})


def states_of(model):
    return [np.asarray(model.vision.fixed[tap][0]) for tap in model.taps]


def window_members(token):
    """The patches of a window, by definition."""
    row, column = divmod(token, math.ceil(SIDE / KERNEL))
    rows, columns = (range(KERNEL * i, min(KERNEL * (i + 1), SIDE)) for i in (row, column))
    return [SIDE * y + x for y in rows for x in columns]


# ---- What a token is made of -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUSIONS.known)
def test_fusions_state_what_moves_their_tokens(name):
    model = make_model(name)
    maps = compute_maps(model)
    moved = maps.movement.sum(1)
    assert maps.movement.shape == (model.fusion.tokens, len(model.taps), PATCHES)
    assert (maps.movement.sum((0, 2)) > 0).all()  # by each tap
    expected = model.fusion(tuple(model.vision.fixed[tap] for tap in model.taps))[0]
    np.testing.assert_allclose(maps.tokens, np.asarray(expected), rtol=1e-5, atol=1e-5)
    if name in ("c_abstractor", "ldp_v2"):  # convolutions read beyond windows
        assert maps.sources is None
        assert all(moved[token, window_members(token)].sum() < 0.999 * moved[token].sum() for token in range(9))
        return
    np.testing.assert_allclose(maps.sources.sum(1), 1, rtol=1e-6)
    np.testing.assert_array_equal(moved > 0, maps.sources > 0)
    if name in WINDOWS:
        for token, shares in enumerate(maps.sources):
            members = window_members(token)
            assert list(np.flatnonzero(shares)) == members
            if name != "token_packer":
                np.testing.assert_allclose(shares[members], 1 / len(members), rtol=1e-6)
    elif name not in ("resampler", "mqt"):
        np.testing.assert_array_equal(maps.sources, np.eye(PATCHES))


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def layer_norm(x, eps):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def test_shares_of_a_resampler_are_its_attention():
    """By numpy in float64, with norms that have no parameters."""
    model = make_model("resampler")
    connector = model.fusion.connector
    for norm in (connector.blocks.query_norm, connector.blocks.patch_norm):
        norm.scale[...], norm.bias[...] = jnp.ones_like(norm.scale[...]), jnp.zeros_like(norm.bias[...])
    get = lambda parameter: np.float64(parameter[...])  # noqa: E731
    (states,) = states_of(model)
    patches = layer_norm(states @ get(connector.enter.kernel) + get(connector.enter.bias), 1e-5)
    queries = layer_norm(get(connector.queries), 1e-5)
    attention = connector.blocks.attention
    q, k = (
        np.einsum("tc,chd->htd", x, get(layer.kernel)[0]) + get(layer.bias)[0][:, None]
        for x, layer in ((queries, attention.query), (np.concatenate([queries, patches]), attention.key))
    )
    weights = softmax(np.einsum("htd,hsd->hts", q, k) / math.sqrt(q.shape[-1])).mean(0)[:, len(queries) :]
    expected = weights / weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(compute_maps(model).sources, expected, rtol=1e-4)


class Copies(nnx.Module):
    """Token n copies the state of the second tap at one patch."""

    spec = FusionSpec(taps=lambda layers, deepest: (4, 2, 1))
    chosen = (7, 3, 24, 0, 11, 12, 19, 5, 3)

    def __init__(self, rngs, config, grid, out):
        del rngs, config, out
        self.width = grid.width

    def __call__(self, x):
        states = x[:, :SIDE, :SIDE, self.width : 2 * self.width].reshape(len(x), PATCHES, -1)
        return jnp.pad(states[:, self.chosen], ((0, 0), (0, 0), (0, OUT - self.width)))


def test_a_token_that_copies_a_patch_is_moved_by_it_alone(monkeypatch):
    monkeypatch.setitem(FUSIONS.known, "copies", Copies)
    maps = compute_maps(model := make_model("copies"))
    expected = np.zeros((9, 3, PATCHES))
    lengths = np.linalg.norm(states_of(model)[1], axis=-1)
    expected[np.arange(9), 1, Copies.chosen] = lengths[np.array(Copies.chosen)]
    assert maps.sources is None  # the class does not say, so shares of movement are shown
    np.testing.assert_allclose(maps.movement, expected, rtol=1e-5)


def test_movement_equals_finite_differences():
    model = make_model("mbtf_stf")
    maps, (*states,) = compute_maps(model), states_of(model)
    lengths = jax.jit(lambda states: jnp.linalg.norm(model.fusion(states), axis=-1))
    step = 1e-2
    for tap, patch in ((0, 0), (2, 12), (3, 24)):
        batch = [np.repeat(state[None], 2 * WIDTH, 0) for state in states]
        batch[tap][:, patch] += np.concatenate([np.eye(WIDTH), -np.eye(WIDTH)]) * step
        both = np.asarray(lengths(tuple(batch)), np.float64)
        gradient = (both[:WIDTH] - both[WIDTH:]) / (2 * step)  # of the length of each token
        expected = np.linalg.norm(gradient, axis=0) * np.linalg.norm(states[tap][patch])
        np.testing.assert_allclose(maps.movement[:, tap, patch], expected, rtol=2e-3, atol=2e-4)


BEFORE_THE_DECODER = [name for name in REDUCERS.known if not isinstance(find_reducer(name), DecoderReducer)]


@pytest.mark.parametrize("name", BEFORE_THE_DECODER)
def test_reduced_tokens_are_the_shares_of_patches_that_they_say(name):
    """Each token is computed again from the states of all patches, weighted by its shares."""
    reducer, keep = find_reducer(name), 9
    tower = VisionTower(nnx.Rngs(0), dataclasses.replace(TOWER, layers=1))
    model = make_model("mlp", Reduction(name, PATCHES, keep, reducer), tower)
    model.taps = (1,)
    maps = compute_maps(model)
    assert len(maps.tokens) == keep
    np.testing.assert_allclose(maps.sources.sum(1), 1, rtol=1e-5)
    if name == "resize":
        assert maps.pixels.shape == (24, 24, 3)
        np.testing.assert_array_equal(maps.sources, np.eye(keep))
        return
    (states,) = tower(jnp.asarray(maps.pixels)[None], (1,), jnp.float32)
    if isinstance(reducer, TokenReducer):
        again = maps.sources @ np.asarray(model.fusion((states,))[0])
    else:
        # A contextual token of VisionZip is a patch, and added to it the mean of others: shares of twice a mean.
        weights = maps.sources * (1 + (maps.sources.max(1, keepdims=True) < 0.999))
        again = np.asarray(model.fusion((jnp.asarray(weights @ states[0])[None],))[0])
    np.testing.assert_allclose(maps.tokens, again, atol=1e-4)
    one_patch = (maps.sources > 0).sum(1) == 1
    assert one_patch.sum() == {"pool": 0, "visionzip": 8}.get(name, keep)
    if name == "pool":
        expected = np.kron(pooling_weights(SIDE, 3), pooling_weights(SIDE, 3))
        np.testing.assert_allclose(maps.sources, expected, atol=1e-6)
    np.testing.assert_array_equal(maps.movement[:, 0] > 0, maps.sources > 0)


# ---- What an answer is made from -------------------------------------------------------------------------------------


class ReadsOneSlot:
    """A decoder whose logits are those of the image token in one slot."""

    norm = staticmethod(lambda x: x)

    def __init__(self, position):
        self.position = position

    def prefill(self, x, positions, selections, observe):
        observe(Rows(x, positions), jnp.zeros((1, x.shape[1], 2, 4)), jnp.zeros((1, x.shape[1], 1, 4)))
        return jnp.broadcast_to(x[:, self.position, None], x.shape) ** 2, None

    def logits(self, x):
        return x


def test_an_answer_that_reads_one_slot_depends_on_it_alone():
    def embed(tokens, slots, image_tokens):
        return jnp.where(slots[:, :, None] >= 0, image_tokens[:, slots[0]], 0.5)

    model = types.SimpleNamespace(llm=ReadsOneSlot(3), embed=embed, reduction=Reduction("", 4, 4))
    image_tokens = jnp.asarray(RNG.normal(size=(4, 6)), jnp.float32)
    is_image = jnp.array([False, True, True, True, True, False])
    answer = jnp.array([5, 0])
    maps = jax.jit(functools.partial(map_answer, model))(image_tokens, jnp.arange(6), is_image, answer)
    token = np.asarray(image_tokens)[2]  # in the slot at position 3
    expected = np.zeros((2, 4))
    expected[:, 2] = abs(2 * token[[5, 0]]) * np.linalg.norm(token)
    np.testing.assert_allclose(maps.movement, expected, rtol=1e-5)
    np.testing.assert_allclose(maps.log_probs, np.log(softmax(token**2))[[5, 0]], rtol=1e-5)
    # Equal keys get equal attention; a position sees those up to it.
    np.testing.assert_allclose(maps.attention[0], [[1 / 6] * 6 + [0] * 2, [1 / 7] * 7 + [0]], rtol=1e-6)
