"""MBTF, STF and simple baselines against torch, written from a description of the authors' program."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx

from stf_jax.config import FusionConfig, ModelConfig, UserError
from stf_jax.models.fusions.base import FUSIONS, Fusion, tapped_blocks, tokens_per_image
from stf_jax.models.spec import llm_preset, resolve_model, vision_preset

# 12 is divided by 1, 2, 3 and 4.
TOWER = dataclasses.replace(vision_preset("clip-mini-16-96"), image_size=12 * 12, patch_size=12, width=8, heads=2)
D = 20


def build(vision=TOWER, **keys):
    """A fusion with non-zero biases, and its parameters as torch tensors."""
    fusion = nnx.eval_shape(lambda: Fusion(nnx.Rngs(0), FusionConfig(**keys), vision, D))
    rng = np.random.default_rng(1)

    def fill(p):
        scale = math.prod(p.shape[:-1]) ** -0.5 if p.ndim > 1 else 0.3
        return np.float32(scale) * rng.standard_normal(p.shape, np.float32)

    values = jax.tree.map(fill, nnx.to_pure_dict(nnx.state(fusion)))
    nnx.update(fusion, jax.tree.map(jnp.asarray, values))
    return fusion, jax.tree.map(torch.from_numpy, values)


def tapped_states(fusion_config, vision=TOWER, seed=2):
    count = len(tapped_blocks(fusion_config, vision.layers))
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal((2, vision.grid**2, vision.width), np.float32) for _ in range(count))


def assert_equals_torch(fusion, states, expected):
    output = np.asarray(jax.jit(fusion)(states))
    assert output.shape == expected.shape
    assert expected.std() > 0.05
    np.testing.assert_allclose(output, expected.numpy(), atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# The reference, in torch


def torch_linear(p):
    layer = torch.nn.Linear(*p["kernel"].shape)
    layer.load_state_dict({"weight": p["kernel"].T.contiguous(), "bias": p["bias"]})
    return layer


def torch_conv(p):
    """Conv2d of stride k from an HWIO kernel; a Linear's kernel becomes a 1×1 convolution."""
    kernel = p["kernel"] if p["kernel"].ndim == 4 else p["kernel"][None, None]
    k, _, channels, out = kernel.shape
    layer = torch.nn.Conv2d(channels, out, k, stride=k)
    layer.load_state_dict({"weight": kernel.permute(3, 2, 0, 1).contiguous(), "bias": p["bias"]})
    return layer


def unfolded_linear(p):
    """The Linear over channel-major windows (index c·k² + kh·k + kw) that equals an HWIO kernel.

    The inverse of W.reshape(out, C, k, k).transpose(2, 3, 1, 0).
    """
    kernel = p["kernel"].permute(3, 2, 0, 1).flatten(1)
    layer = torch.nn.Linear(kernel.shape[1], kernel.shape[0])
    layer.load_state_dict({"weight": kernel, "bias": p["bias"]})
    return layer


def concat_states(states):
    return torch.cat([torch.from_numpy(state) for state in states], dim=-1)


def mlp(p, x):
    return torch_linear(p["second"])(F.gelu(torch_linear(p["first"])(x)))


def unfolded_stf(p, x, kernel):
    batch, patches, channels = x.shape
    grid = math.isqrt(patches)
    windows = x.view(batch, grid, grid, channels).unfold(1, kernel, kernel).unfold(2, kernel, kernel)
    windows = windows.reshape(batch, (grid // kernel) ** 2, channels * kernel**2)
    return torch_linear(p["out"])(F.gelu(unfolded_linear(p["conv"])(windows)))


def to_image(x):
    """[B, P, C] → [B, C, g, g]."""
    grid = math.isqrt(x.shape[1])
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], grid, grid)


def to_tokens(x):
    return x.flatten(2).transpose(1, 2)


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
@torch.no_grad()
def test_mbtf_stf_equals_the_authors_code(kernel):
    """Weights of freshly initialized torch layers are copied over by the documented mapping."""
    torch.manual_seed(0)
    config, window = FusionConfig(kernel=kernel), 8 * kernel**2
    mbtf = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))
    stf = torch.nn.Sequential(torch.nn.Linear(window, 4 * window), torch.nn.GELU(), torch.nn.Linear(4 * window, D))
    fusion, _ = build(kernel=kernel)
    connector = fusion.connector
    output = [connector.mbtf.first, connector.mbtf.second, connector.stf.conv, connector.stf.out]
    for layer, expected in zip(output, [mbtf[0], mbtf[2], stf[0], stf[2]], strict=True):
        weight = expected.weight.numpy()
        if layer is connector.stf.conv:
            weight = weight.reshape(-1, 8, kernel, kernel).transpose(2, 3, 1, 0)
        else:
            weight = weight.T
        assert layer.kernel.shape == weight.shape
        layer.kernel[...], layer.bias[...] = jnp.asarray(weight), jnp.asarray(expected.bias.numpy())

    states = tapped_states(config)
    assert len(states) == 8
    x = 3 * mbtf(concat_states(states)).view(2, 12, 12, 8)  # scaled so that GELU is nonlinear
    windows = x.unfold(1, kernel, kernel).unfold(2, kernel, kernel).reshape(2, (12 // kernel) ** 2, window)
    connector.mbtf.second.kernel[...] *= 3
    connector.mbtf.second.bias[...] *= 3
    assert_equals_torch(fusion, states, stf(windows))


@pytest.mark.parametrize("kernel", [1, 2, 3])
@torch.no_grad()
def test_paper_variant_equals_the_papers_figure(kernel):
    fusion, p = build(kernel=kernel, variant="paper")
    states = tapped_states(FusionConfig(variant="paper"))
    x = to_image(concat_states(states))
    for layer in (
        p["connector"]["mbtf"]["first"],
        p["connector"]["mbtf"]["second"],
        *(p["connector"]["stf"][name] for name in ("conv", "mix", "out")),
    ):
        x = F.gelu(torch_conv(layer)(x))
    assert p["connector"]["stf"]["conv"]["kernel"].shape == (kernel, kernel, 8, kernel**2 * 8)
    assert_equals_torch(fusion, states, to_tokens(x))


@torch.no_grad()
def test_mlp():
    fusion, p = build(fusion="mlp")
    states = tapped_states(FusionConfig(fusion="mlp"))
    assert len(states) == 1
    assert_equals_torch(fusion, states, mlp(p["connector"], concat_states(states)))


@torch.no_grad()
def test_mbtf():
    fusion, p = build(fusion="mbtf", mbtf_width=24)
    states = tapped_states(FusionConfig())
    assert_equals_torch(fusion, states, mlp(p["connector"]["mlp"], mlp(p["connector"]["mbtf"], concat_states(states))))


@pytest.mark.parametrize("kernel", [2, 3])
@torch.no_grad()
def test_stf(kernel):
    fusion, p = build(fusion="stf", kernel=kernel, stf_hidden=40)
    states = tapped_states(FusionConfig(fusion="stf"))
    assert_equals_torch(fusion, states, unfolded_stf(p["connector"], concat_states(states), kernel))


@pytest.mark.parametrize("kernel", [2, 3])
@torch.no_grad()
def test_avg_pool(kernel):
    fusion, p = build(fusion="avg_pool", kernel=kernel)
    states = tapped_states(FusionConfig(fusion="avg_pool"))
    pooled = to_tokens(F.avg_pool2d(to_image(concat_states(states)), kernel))
    assert_equals_torch(fusion, states, mlp(p["connector"]["projector"], pooled))


@pytest.mark.parametrize("kernel", [2, 3])
@torch.no_grad()
def test_pixel_shuffle(kernel):
    fusion, p = build(fusion="pixel_shuffle", kernel=kernel)
    states = tapped_states(FusionConfig(fusion="pixel_shuffle"))
    x = concat_states(states).view(2, 12, 12, -1)
    within, side = range(kernel), range(0, 12, kernel)
    windows = [torch.cat([x[:, i + h, j + w] for h in within for w in within], -1) for i in side for j in side]
    assert_equals_torch(fusion, states, mlp(p["connector"]["projector"], torch.stack(windows, 1)))


@pytest.mark.parametrize("fusion", ["mbtf_stf", "stf", "avg_pool", "pixel_shuffle"])
@torch.no_grad()
def test_grid_is_zero_padded_at_the_right_and_bottom(fusion):
    vision = dataclasses.replace(TOWER, image_size=5 * 12)
    module, p = build(vision, fusion=fusion, pad_grid=True)
    states = tapped_states(FusionConfig(fusion=fusion), vision)
    x = concat_states(states)
    x = F.pad(to_image(mlp(p["connector"]["mbtf"], x) if "mbtf" in p["connector"] else x), (0, 1, 0, 1))
    tokens = p["connector"].get("stf", p["connector"])
    if fusion.endswith("stf"):
        expected = to_tokens(torch_conv(tokens["out"])(F.gelu(torch_conv(tokens["conv"])(x))))
    elif fusion == "avg_pool":
        expected = mlp(tokens["projector"], to_tokens(F.avg_pool2d(x, 2)))
    else:  # pixel_unshuffle orders channels c, h, w; output is h, w, c
        windows = F.pixel_unshuffle(x, 2).unflatten(1, (8, 4)).transpose(1, 2).flatten(1, 2)
        expected = mlp(tokens["projector"], to_tokens(windows))
    assert expected.shape[1] == 9
    assert_equals_torch(module, states, expected)


def test_tokens_are_in_row_major_order_of_windows():
    """A change in one patch changes the one token whose window holds it, rows before columns."""
    fusion, _ = build(fusion="stf", kernel=3)
    (state,) = tapped_states(FusionConfig(fusion="stf"))
    state = jnp.asarray(state)
    changed = state.at[:, 7 * 12 + 4].add(1)  # row 7, column 4: window (2, 1) of 4×4
    difference = np.abs(np.asarray(fusion((changed,)) - fusion((state,)))).max((0, 2))
    assert np.flatnonzero(difference).tolist() == [2 * 4 + 1]


def test_gelu_uses_the_error_function():
    """The tolerance is far below 5e-4, the error of the tanh approximation."""
    fusion = Fusion(nnx.Rngs(0), FusionConfig(fusion="mlp"), TOWER, 8)
    for layer in (fusion.connector.first, fusion.connector.second):
        layer.kernel[...], layer.bias[...] = jnp.eye(8), jnp.zeros(8)
    x = np.linspace(-5, 5, 144 * 8, dtype=np.float32).reshape(1, 144, 8)
    exact = x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    np.testing.assert_allclose(fusion((jnp.asarray(x),)), exact, atol=2e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Shapes and parameter counts of full-size presets, without allocating them


def count_parameters(config, vision="clip-l-14-336", llm="vicuna-7b"):
    fusion = nnx.eval_shape(lambda: Fusion(nnx.Rngs(0), config, vision_preset(vision), llm_preset(llm).width))
    return sum(math.prod(p.shape) for p in jax.tree.leaves(nnx.state(fusion)))


@pytest.mark.parametrize(
    ("fusion", "llm", "count"),
    [
        ("mbtf_stf", "vicuna-7b", 171_992_064),
        ("mbtf_stf", "vicuna-13b", 188_770_304),
        ("stf", "vicuna-7b", 134_238_208),
        ("mlp", "vicuna-7b", 20_979_712),
        ("avg_pool", "vicuna-7b", 20_979_712),
        ("mlp", "vicuna-13b", 31_467_520),
        ("mbtf", "vicuna-7b", 37_753_856 + 20_979_712),
        ("pixel_shuffle", "vicuna-7b", 2 * (4096 * 4096 + 4096)),
    ],
)
def test_parameter_count(fusion, llm, count):
    assert count_parameters(FusionConfig(fusion=fusion), llm=llm) == count


def test_parameter_count_of_mqt():
    """That of the authors' program, whose positions are parameters that are not trained."""
    assert count_parameters(FusionConfig("mqt", budgets=(256, 1))) == 8_660_992


def test_parameter_count_of_the_paper_variant():
    mbtf = 8192 * 4096 + 4096 + 4096 * 1024 + 1024
    stf = 4096 * 4096 + 4096 + 4096 * 16384 + 16384 + 16384 * 4096 + 4096
    assert count_parameters(FusionConfig(variant="paper")) == mbtf + stf


@pytest.mark.parametrize(
    ("fusion", "kernel", "grid", "tokens"),
    [
        ("mbtf_stf", 1, 24, 576),
        ("mbtf_stf", 2, 24, 144),
        ("mbtf_stf", 3, 24, 64),
        ("stf", 4, 24, 36),
        ("avg_pool", 2, 24, 144),
        ("pixel_shuffle", 24, 24, 1),
        ("mlp", 2, 24, 576),
        ("mbtf", 5, 24, 576),  # merges nothing, so the kernel is ignored
        ("mbtf_stf", 3, 27, 81),
        ("ldp_v2", 2, 24, 144),
        ("c_abstractor", 3, 24, 64),
        ("resampler", 2, 24, 144),
        ("token_packer", 4, 24, 36),
    ],
)
def test_tokens_per_image(fusion, kernel, grid, tokens):
    config = FusionConfig(fusion=fusion, kernel=kernel)
    assert tokens_per_image(config, grid) == tokens
    vision = dataclasses.replace(TOWER, image_size=12 * grid)
    state = jax.ShapeDtypeStruct((1, grid**2, vision.width), jnp.bfloat16)
    states = (state,) * len(tapped_blocks(config, vision.layers))
    output = nnx.eval_shape(lambda states: Fusion(nnx.Rngs(0), config, vision, D)(states), states)
    assert output.shape == (1, tokens, D)
    assert output.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("keys", "layers", "taps"),
    [
        ({}, 24, (23, 21, 18, 15, 12, 9, 6, 3)),
        ({"variant": "paper"}, 24, (24, 21, 18, 15, 12, 9, 6, 3)),
        ({}, 8, (8, 7, 6, 5, 4, 3, 2, 1)),
        ({"variant": "paper"}, 8, (8, 7, 6, 5, 4, 3, 2, 1)),
        ({}, 4, (4, 3, 2, 1)),
        ({}, 12, (12, 11, 9, 8, 6, 5, 3, 2)),
        ({}, 27, (26, 24, 21, 17, 14, 11, 7, 4)),
        ({"fusion": "mlp"}, 24, (23,)),
        ({"fusion": "stf"}, 24, (23,)),
        ({"fusion": "mbtf"}, 24, (23, 21, 18, 15, 12, 9, 6, 3)),
        ({"taps": (23, 18, 12, 6)}, 24, (23, 18, 12, 6)),
        ({"taps": (24, 3), "fusion": "avg_pool"}, 24, (24,)),
    ],
)
def test_taps(keys, layers, taps):
    assert tapped_blocks(FusionConfig(**keys), layers) == taps


@pytest.mark.parametrize("layers", [12, 26, 27, 40])
@pytest.mark.parametrize("variant", ["code", "paper"])
def test_default_taps_span_the_depth_of_the_tower(layers, variant):
    taps = tapped_blocks(FusionConfig(variant=variant), layers)
    assert len(set(taps)) == 8
    assert list(taps) == sorted(taps, reverse=True)
    assert taps[0] in ((layers,) if variant == "paper" else (layers, layers - 1))
    assert taps[-1] >= 1


# ---------------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize("fusion", [name for name in FUSIONS.known if name not in ("mlp", "mbtf")])
def test_kernel_that_does_not_divide_the_grid_is_rejected(fusion):
    config = FusionConfig(fusion=fusion, kernel=2)
    with pytest.raises(UserError, match=r"27×27.*choose 1, 3, 9, 27.*pad_grid"):
        tokens_per_image(config, 27)
    with pytest.raises(UserError, match="pad_grid"):
        Fusion(nnx.Rngs(0), config, dataclasses.replace(TOWER, image_size=27 * 12), D)
    assert tokens_per_image(dataclasses.replace(config, pad_grid=True), 27) == 14**2


def test_unknown_fusion_suggests_the_closest():
    with pytest.raises(UserError, match=r"'mbtf_sft'.*did you mean 'mbtf_stf'"):
        Fusion(nnx.Rngs(0), FusionConfig(fusion="mbtf_sft"), TOWER, D)
    with pytest.raises(UserError, match="mbtf_stf"):
        tapped_blocks(FusionConfig(fusion="q-former"), 24)


# ---------------------------------------------------------------------------------------------------------------------
# Initialization


def initialized_layers(init):
    """(name, weights, biases, fan in, fan out) of each layer of a fusion large enough for statistics."""
    vision = dataclasses.replace(TOWER, width=32)
    fusion = Fusion(nnx.Rngs(5), FusionConfig(init=init), vision, 96)
    layers = {"mbtf.first": (256, 128), "mbtf.second": (128, 32), "stf.conv": (128, 512), "stf.out": (512, 96)}
    for name, (fan_in, fan_out) in layers.items():
        layer = functools.reduce(getattr, name.split("."), fusion.connector)
        kernel, bias = np.asarray(layer.kernel[...]), np.asarray(layer.bias[...])
        assert kernel.size == fan_in * fan_out
        assert bias.shape == (fan_out,)
        yield name, kernel.ravel(), bias, fan_in, fan_out


def is_uniform(values, bound):
    return 0.9 * bound < np.abs(values).max() <= bound and abs(values.std() / (bound / 3**0.5) - 1) < 0.15


def is_normal(values, stddev):
    beyond = np.mean(np.abs(values) > stddev)
    return abs(values.std() / stddev - 1) < 0.05 and abs(beyond - 0.317) < 0.03  # uniform: 0.423


@pytest.mark.parametrize("init", ["torch", "xavier", "kaiming", "normal"])
def test_init_schemes(init):
    for name, kernel, bias, fan_in, fan_out in initialized_layers(init):
        is_expected = {
            "torch": lambda i, o, w: is_uniform(w, i**-0.5),
            "xavier": lambda i, o, w: is_uniform(w, (6 / (i + o)) ** 0.5),
            "kaiming": lambda i, o, w: is_normal(w, (2 / i) ** 0.5),
            "normal": lambda i, o, w: is_normal(w, 0.02),
        }[init]
        assert is_expected(fan_in, fan_out, kernel), name
        assert is_uniform(bias, fan_in**-0.5) if init == "torch" else not bias.any(), name


def test_torch_init_equals_torch():
    """The same bounds as a fresh ``Conv2d`` or ``Linear`` in torch."""
    for name, kernel, _, fan_in, fan_out in initialized_layers("torch"):
        layer = torch.nn.Conv2d(fan_in // 4, fan_out, 2) if name == "stf.conv" else torch.nn.Linear(fan_in, fan_out)
        np.testing.assert_allclose(np.abs(kernel).max(), layer.weight.abs().max().item(), rtol=0.02, err_msg=name)


def test_seeds_and_layers_have_different_init():
    first = [kernel for _, kernel, *_ in initialized_layers("normal")]
    assert all(not np.array_equal(a[:64], b[:64]) for i, a in enumerate(first) for b in first[:i])
    one, two = (Fusion(nnx.Rngs(seed), FusionConfig(), TOWER, D).connector.stf.out.kernel[...] for seed in (0, 1))
    assert not np.array_equal(one, two)


# ---------------------------------------------------------------------------------------------------------------------
# Several budgets: mean pools (M3), nested STF, the first queries of MQT


def nested(fusion, states, budgets):
    """Tokens of a fusion at each budget, as torch tensors."""
    made = jax.jit(lambda states: fusion.nested(states, budgets))(states)
    assert [x.shape for x in made] == [(len(states[0]), budget, D) for budget in budgets]
    return [torch.from_numpy(np.array(x)) for x in made]


def assert_close(found, expected):
    assert expected.std() > 0.05
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5, rtol=0)


def to_grid(x):
    """Tokens or patches [B, P, C] as [B, C, g, g]."""
    return torch.as_tensor(x).mT.unflatten(2, (math.isqrt(x.shape[1]), -1))


@pytest.mark.parametrize("name", ["mlp", "avg_pool"])
def test_budgets_are_means_of_the_fusions_tokens(name):
    keys = {"fusion": name, "kernel": 1, "budgets": (144, 36, 16, 9, 1)}
    fusion, _ = build(**keys)
    states = tapped_states(FusionConfig(**keys))
    full, *smaller = nested(fusion, states, keys["budgets"])
    np.testing.assert_array_equal(full, np.asarray(jax.jit(build(fusion=name, kernel=1)[0])(states)))
    for budget, found in zip(keys["budgets"][1:], smaller, strict=True):
        pooled = F.avg_pool2d(to_grid(full), 12 // math.isqrt(budget))
        np.testing.assert_allclose(found, pooled.flatten(2).mT, atol=1e-6)


def unrolled(kernel, window):
    """The kernel of a larger or smaller window that shares the weights of a 2×2 kernel [2, 2, C, H]."""
    if window == 1:
        return kernel.sum((0, 1), keepdim=True)
    repeats = window // 2
    return kernel.repeat_interleave(repeats, 0).repeat_interleave(repeats, 1) / repeats**2


@pytest.mark.parametrize(("name", "variant"), [("stf", "code"), ("mbtf_stf", "paper")])
def test_nested_stf_is_a_plain_stf_of_each_window(name, variant):
    keys = {"fusion": name, "variant": variant, "budgets": (144, 36, 9, 1), "stf_hidden": 24}
    fusion, params = build(**keys)
    states = tapped_states(FusionConfig(**keys))
    x, p = torch.from_numpy(np.concatenate(states, axis=-1)), params["connector"]
    if name == "mbtf_stf":
        x = torch_linear(p["mbtf"]["second"])(F.gelu(torch_linear(p["mbtf"]["first"])(x)))
        x, p = F.gelu(x) if variant == "paper" else x, p["stf"]
    for budget, found in zip(keys["budgets"], nested(fusion, states, keys["budgets"]), strict=True):
        window = 12 // math.isqrt(budget)
        kernel = unrolled(p["conv"]["kernel"], window).permute(3, 2, 0, 1)
        y = F.gelu(F.conv2d(to_grid(x), kernel, p["conv"]["bias"], stride=window)).flatten(2).mT
        y = torch_linear(p["out"])(F.gelu(torch_linear(p["mix"])(y)) if variant == "paper" else y)
        assert_close(found, (F.gelu(y) if variant == "paper" else y).detach())


def sine(side, width):
    """The positions of a grid by the definition, one channel at a time."""
    table = np.zeros((side, side, width), np.float32)
    for row in range(side):
        for column in range(side):
            for half, place in enumerate((column, row)):
                for i in range(width // 4):
                    angle = place / 10_000 ** (i / (width / 4))
                    first = half * width // 2 + i
                    table[row, column, first], table[row, column, first + width // 4] = math.sin(angle), math.cos(angle)
    return torch.from_numpy(table).flatten(0, 1)


def test_mqt_is_the_first_of_its_queries():
    """Keys are positions alone, so they are the same for all images."""
    tower = dataclasses.replace(TOWER, width=128, heads=2)
    keys = {"fusion": "mqt", "budgets": (64, 36, 7, 1)}
    fusion, params = build(tower, **keys)
    states, p = tapped_states(FusionConfig(**keys), tower), params["connector"]
    for name in ("query_norm", "key_norm"):  # so large that each query attends to few places
        p[name]["scale"] *= 10
        getattr(fusion.connector, name).scale[...] = jnp.asarray(p[name]["scale"])
    attention, positions = torch.nn.MultiheadAttention(128, 2, batch_first=True), sine(8, 128)
    projections = [p["attention"][name] for name in ("query", "key", "value")]
    out = p["attention"]["out"]
    attention.load_state_dict({
        "in_proj_weight": torch.cat([each["kernel"].flatten(1).T for each in projections]),
        "in_proj_bias": torch.cat([each["bias"].flatten() for each in projections]),
        "out_proj.weight": out["kernel"].flatten(0, 1).T,
        "out_proj.bias": out["bias"],
    })  # fmt: skip

    def norm(name, x):
        return F.layer_norm(x, (128,), p[name]["scale"], p[name]["bias"], 1e-6)

    places = F.interpolate(to_grid(positions[None]), (12, 12), mode="bicubic").flatten(2).mT
    context = norm("key_norm", places).expand(2, -1, -1), norm("value_norm", torch.from_numpy(states[0]))
    made, shares = nested(fusion, states, keys["budgets"]), jax.jit(fusion.sources)(states)
    for budget, found in zip(keys["budgets"], made, strict=True):
        queries = norm("query_norm", p["queries"][:budget] + positions[:budget]).expand(2, -1, -1)
        tokens, weights = attention(queries, *context)
        assert_close(found, (tokens @ p["exit"]["kernel"]).detach())
        np.testing.assert_allclose(shares[:, :budget], weights.detach(), atol=1e-6)
    assert_close(nested(fusion, states, (7,))[0], made[2])
    assert made[0].std(0).mean() > 0.02  # images differ
    assert made[0].std(1).mean() > 0.02  # queries differ


@pytest.mark.parametrize("name", ["mlp", "avg_pool", "stf", "mbtf_stf"])
def test_the_sources_of_a_token_are_its_window(name):
    vision = dataclasses.replace(TOWER, image_size=11 * 12)  # windows of two pad its grid of 11×11
    keys = {"fusion": name, "budgets": (1,)} if name == "mlp" else {"fusion": name, "pad_grid": True, "budgets": (9,)}
    fusion, _ = build(vision, **keys)
    shares = np.asarray(jax.jit(fusion.sources)(tapped_states(FusionConfig(**keys), vision))).reshape(2, -1, 11, 11)
    if name == "mlp":
        np.testing.assert_allclose(shares, 1 / 121, rtol=1e-6)
        return
    for row, column in np.ndindex(3, 3):
        window = np.zeros((11, 11))
        window[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 1
        np.testing.assert_allclose(shares[:, 3 * row + column], [window / window.sum()] * 2, atol=1e-6)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("mlp", (576, 100)), "mlp cannot make 100 tokens of 24×24 patches; the nearest that it can are 144 and 64."),
        (("stf", (576, 256)), "stf cannot make 256 tokens of 24×24 patches; the nearest that it can are 576 and 144."),
        (("mbtf_stf", (144, 36, 16, 9, 4, 1)), None),
        (("mlp", (577,)), "the nearest that it can are 576."),
        (("resampler", (576,)), "the nearest that it can are 144."),
        (("mqt", (256, 255, 3)), None),
        (("mqt", (250, 3)), "mqt cannot make 250 tokens of 24×24 patches; the nearest that it can are 256 and 225."),
        (("mlp", (36, 144)), "model.fusion.budgets=(36, 144) must be distinct numbers in descending order."),
        (("mlp", (36, 36)), "must be distinct numbers in descending order."),
    ],
)
def test_budgets_that_cannot_be_are_explained(keys, message):
    config = FusionConfig(keys[0], budgets=keys[1])
    if message is None:
        assert tokens_per_image(config, 24) == keys[1][0]
        return
    with pytest.raises(UserError) as error:
        tokens_per_image(config, 24)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tokens": 36}, None),
        ({"tokens": 9}, "tokens=9 is not a budget of the model: mlp makes 576, 36 per image."),
        ({"tokens": 36, "reduce": "visionzip", "keep": 5}, "reduce=visionzip chooses among all patches: leave out tok"),
        ({"tokens": 36, "reduce": "pool", "keep": 9}, None),
        ({"tokens": 36, "reduce": "pool", "keep": 49}, "keep=49 must be 1 to 36"),
    ],
)
def test_a_model_is_set_to_one_of_its_budgets(keys, message):
    spec = resolve_model(ModelConfig(fusion=FusionConfig("mlp", budgets=(576, 36)), **keys))
    if message is None:
        assert (spec.slots, spec.reduction.tokens) == (keys.get("keep", 36), 36)
        return
    with pytest.raises(UserError) as error:
        _ = spec.slots
    assert message in str(error.value)
