"""Baselines of MBTF and STF against their torch versions in exports, and parameter counts against formulas."""

import dataclasses
import functools
import importlib
import itertools
import math
import pathlib
import shutil
import sys
import tempfile
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from stf_jax.config import FusionConfig, MeshConfig
from stf_jax.models.fusions.base import Fusion, input_grid, resolve_sizes, tapped_blocks
from stf_jax.models.spec import llm_preset, vision_preset
from stf_jax.models.tensor_names import CONV, LINEAR, POINTWISE, UNFOLDED, name_by_convention
from stf_jax.parallel.mesh import BATCH, make_mesh, parameter_sharding
from stf_jax.weights import mapping
from stf_jax.weights.export_hf import PACKAGE, find_torch_file

BASELINES = ("ldp_v2", "c_abstractor", "resampler", "token_packer")
# 12 is divided by 1, 2, 3 and 4. Heads of 64 and of 128 channels become three of 32.
TOWER = dataclasses.replace(vision_preset("clip-mini-16-96"), image_size=12 * 12, patch_size=12, width=96)
D = 40


def shallow(name, **keys):
    """A config of one block, which is sufficient and quick to compile."""
    return FusionConfig(name, **{"depth": 1, **keys})


def declare(config, vision=TOWER, out=D):
    """The fusion without values, and its parameters by path."""
    fusion = nnx.eval_shape(lambda: Fusion(nnx.Rngs(0), config, vision, out))
    return fusion, {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(fusion))}


def random_values(leaves):
    """Random values by path, scaled so that each layer keeps the scale of its input."""
    rng = np.random.default_rng(1)

    def value(path, leaf):
        fan_in = 96 if "/attention/" in path else 9 if leaf.shape[-3:-1] == (3, 3) else leaf.shape[-2:][0]
        scale = fan_in**-0.5 if path.endswith("kernel") else 0.3
        return np.float32(scale) * rng.standard_normal(leaf.shape, np.float32) + np.float32(path.endswith("scale"))

    return {path: value(path, leaf) for path, leaf in leaves.items()}


def make_function(fusion, params):
    """A function of parameters by path and of states."""
    graph, state = nnx.split(fusion)

    def run(params, states):
        flat = [(path, leaf.replace(params["/".join(map(str, path))])) for path, leaf in nnx.to_flat_state(state)]
        return nnx.merge(graph, nnx.from_flat_state(flat))(states)

    return run


def random_states(config, batch=2, vision=TOWER):
    rng = np.random.default_rng(2)
    taps = tapped_blocks(config, vision.layers)
    return tuple(rng.standard_normal((batch, vision.grid**2, vision.width), np.float32) for _ in taps)


def build_torch(config, vision=TOWER, out=D):
    """The same fusion as in an export, freshly initialized."""
    taps = list(tapped_blocks(config, vision.layers))
    fusion_config = dataclasses.asdict(resolve_sizes(config, vision)) | {"taps": taps, "crosslayer": False}
    vision_config = types.SimpleNamespace(
        image_size=vision.image_size, patch_size=vision.patch_size, hidden_size=vision.width
    )
    model_config = types.SimpleNamespace(
        vision_config=vision_config, text_config=types.SimpleNamespace(hidden_size=out), stf_config=fusion_config
    )
    return load_connector(config).Connector(model_config, input_grid(config, vision).side)


@functools.cache
def load_connector(config):
    """The module connector_stf.py of an export."""
    name = f"exported_{config.fusion}"
    with tempfile.TemporaryDirectory() as folder:
        package = pathlib.Path(folder, name)
        package.mkdir()
        shutil.copyfile(find_torch_file(config), package / "connector_stf.py")
        shutil.copyfile(PACKAGE / "layers_stf.py", package / "layers_stf.py")
        sys.path.insert(0, folder)
        try:
            return importlib.import_module(f"{name}.connector_stf")
        finally:
            sys.path.remove(folder)


def torch_tensors(config, params):
    """The parameters under the names of the torch module."""
    shapes = {path: value.shape for path, value in params.items()}
    table = {f"connector/{path}": tensor for path, tensor in mapping.fusion_table(config, TOWER, D).items()}
    mappings = mapping.map_parameters(table, shapes, {"mm_projector.": ""})
    return {name: tensor for path, mapping in mappings.items() for name, tensor in mapping.to_hf(params[path])}


@pytest.mark.parametrize("name", [*BASELINES, "mqt", "mlp", "avg_pool", "stf", "mbtf_stf"])
def test_layouts_by_convention_equal_the_published_ones(name):
    """Except where PyTorch has a 1×1 convolution or a linear layer over a window in place of our layer."""
    config = FusionConfig(name, depth=2)
    fusion, _ = declare(config)
    leaves = nnx.to_flat_state(nnx.state(fusion.connector))
    axes = {"/".join(map(str, path)): leaf.get_metadata()["axes"] for path, leaf in leaves}
    found, published = name_by_convention(axes, "mm_projector"), mapping.fusion_table(config, TOWER, D)
    assert found.keys() <= published.keys()
    for path, (_, layout) in found.items():
        alike = {POINTWISE: LINEAR, UNFOLDED: CONV}.get(published[path].layout, published[path].layout)
        assert layout == alike, path
    assert all(tensor.name.startswith("mm_projector.") for tensor in found.values())


def test_names_by_convention():
    axes = {
        "first/kernel": ("embed", "mlp"),
        "norm/scale": ("norm",),
        "queries": ("position", "embed"),
        "blocks/attention/out/kernel": ("layers", "heads", "head_dim", "embed"),
    }
    names = {path: name for path, (name, _) in name_by_convention(axes, "mm_projector").items()}
    assert names == {
        "first/kernel": "mm_projector.first.weight",
        "norm/scale": "mm_projector.norm.weight",
        "queries": "mm_projector.queries",
        "blocks/attention/out/kernel": "mm_projector.blocks.{layer}.attention.out.weight",
    }


# ---- Equality with torch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kernel"), [*itertools.product(BASELINES, (2, 3)), ("token_packer", 1), ("token_packer", 4)]
)
@torch.no_grad()
def test_fusion_equals_its_torch_export(name, kernel):
    assert_equals_torch(shallow(name, kernel=kernel, depth=2 if kernel == 2 else 1), 12 // kernel, TOWER)


@pytest.mark.parametrize("name", BASELINES)
@torch.no_grad()
def test_padded_grid(name):
    """5×5 patches become 3×3 tokens: windows are zero-padded, and the resampler has no windows."""
    vision = dataclasses.replace(TOWER, image_size=5 * 12)
    assert_equals_torch(shallow(name, pad_grid=True), 3, vision)


def assert_equals_torch(config, side, vision):
    fusion, leaves = declare(config, vision)
    params, states = random_values(leaves), random_states(config, vision=vision)
    torch_module = build_torch(config, vision).double()
    torch_module.load_state_dict({name: torch.from_numpy(one) for name, one in torch_tensors(config, params).items()})
    pad = input_grid(config, vision).side - vision.grid
    grid = torch.cat([torch.from_numpy(state) for state in states], -1).double().unflatten(1, (vision.grid,) * 2)
    expected = torch_module(torch.nn.functional.pad(grid, (0, 0, 0, pad, 0, pad))).flatten(1, 2).numpy()
    ours = jax.jit(make_function(fusion, params))(params, states)
    assert ours.shape == (2, side**2, D)
    assert ours.dtype == jnp.float32
    assert expected.std() > 0.1
    np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=0)
    # Tokens of different windows differ, so the comparison is not of constants.
    assert np.abs(expected[:, 0] - expected[:, -1]).max() > 0.05


@pytest.mark.parametrize("name", [*BASELINES, "mqt"])
def test_mesh_result_is_the_same_and_every_parameter_has_a_gradient(name):
    config = shallow(name)
    vision = dataclasses.replace(TOWER, width=256 if name == "token_packer" else 128)  # tensor divides the heads
    fusion, leaves = declare(config, vision)
    params, states = random_values(leaves), random_states(config, 8, vision)
    run = make_function(fusion, params)

    def loss(params, states):
        return jnp.square(run(params, states)).mean()

    full, grads = jax.jit(jax.value_and_grad(loss))(params, states)
    mesh = make_mesh(MeshConfig(2, 2, 2))
    shardings = {path: parameter_sharding(path, leaf.shape, leaf.axes, mesh) for path, leaf in leaves.items()}
    put = {path: jax.device_put(value, shardings[path]) for path, value in params.items()}
    with jax.set_mesh(mesh):
        rows = jax.device_put(states, jax.NamedSharding(mesh, BATCH))
        sharded, sharded_grads = jax.jit(jax.value_and_grad(loss), out_shardings=(None, shardings))(put, rows)
    np.testing.assert_allclose(sharded, full, rtol=1e-5)
    for path, gradient in grads.items():
        size = np.abs(gradient).max()
        if not path.endswith(("key/bias", "key_norm/bias")):  # these shift all scores of a query equally
            assert size > 1e-6 * np.sqrt(np.square(params[path]).mean()), path
        np.testing.assert_allclose(sharded_grads[path], gradient, atol=2e-5 * size + 1e-7, err_msg=path)
    split = [path for path, sharding in shardings.items() if not sharding.is_fully_replicated]
    assert {path for path, leaf in leaves.items() if leaf.get_value().ndim > 1 and "norm" not in path} <= set(split)


# ---- Parameter counts ------------------------------------------------------------------------------------------------

C, W = 1024, 4096  # CLIP-L's width and Vicuna-7B's
MLP = (C * W + W) + (W * W + W)
CONV_BLOCK = 2 * C * C + 9 * C + 3 * 2 * C + (C * C // 4 + C // 4) + (C // 4 * C + C)  # 1×1 twice, 3×3, norms, SE
SWIGLU = 2 * (C * 4 * C + 4 * C) + 2 * 4 * C + (4 * C * C + C)  # gate and up, a norm inside, down
ATTENTION = 4 * (C * C + C)
TOKEN_PACKER_MLP = (4 * C * C + C) + (C * C + C)  # keys of four taps; values likewise


@pytest.mark.parametrize(
    ("name", "formula", "count"),
    [
        # The authors' programs have the same counts at these sizes: MobileVLM's LDPNetV2Projector, Honeybee's
        # CAbstractor (c-abs.yaml: depth 3, 144 queries, positions; timm 0.9.8) and resampler (resampler.yaml with 144
        # instead of 64 queries), and TokenPacker's unmodified class.
        ("ldp_v2", MLP + 9 * W + W, 21_020_672),
        ("c_abstractor", 576 * C + 2 * 3 * CONV_BLOCK + MLP, 37_398_016),
        ("resampler", 144 * C + (C * C + C) + 6 * (3 * 2 * C + ATTENTION + SWIGLU) + (C * W + W), 106_224_640),
        ("token_packer", C * C + 2 * TOKEN_PACKER_MLP + 3 * 2 * C + ATTENTION + MLP, 36_722_688),
    ],
)
def test_parameter_count(name, formula, count):
    """At CLIP-L/14-336 and Vicuna-7B."""
    _, leaves = declare(FusionConfig(name), vision_preset("clip-l-14-336"), llm_preset("vicuna-7b").width)
    assert sum(math.prod(leaf.shape) for leaf in leaves.values()) == formula == count


@pytest.mark.parametrize(
    ("keys", "layers", "taps"),
    [
        ({}, 24, (23, 22, 16, 12)),  # the authors'
        ({"variant": "paper"}, 24, (24, 23, 17, 13)),
        ({}, 27, (26, 25, 18, 14)),
        ({}, 8, (8, 7, 6, 4)),
        ({}, 3, (3, 2)),
        ({}, 1, (0,)),
        ({"taps": (20, 7)}, 24, (20, 7)),
    ],
)
def test_token_packer_taps(keys, layers, taps):
    assert tapped_blocks(FusionConfig("token_packer", **keys), layers) == taps


@pytest.mark.parametrize(("width", "heads", "packer_heads"), [(1024, 16, 8), (1152, 18, 9), (768, 12, 6), (128, 2, 1)])
def test_heads_divide_the_width(width, heads, packer_heads):
    vision = dataclasses.replace(TOWER, width=width)
    _, leaves = declare(FusionConfig("resampler"), vision)
    assert leaves["connector/blocks/attention/query/kernel"].shape == (6, width, heads, 64)
    _, leaves = declare(FusionConfig("token_packer"), vision)
    assert leaves["connector/attention/query/kernel"].shape == (width, packer_heads, 128)


# ---- Initialization --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASELINES)
def test_init_equals_torch_layers(name):
    """Each tensor is in the range of a fresh one in torch; queries, positions and norms start as in their papers."""
    config = shallow(name)
    _, leaves = declare(config)
    fusion = Fusion(nnx.Rngs(3), config, TOWER, D)
    params = {"/".join(map(str, p)): np.asarray(leaf[...]) for p, leaf in nnx.to_flat_state(nnx.state(fusion))}
    assert params.keys() == leaves.keys()
    torch.manual_seed(0)
    fresh = build_torch(config).state_dict()
    for name_in_torch, value in torch_tensors(config, params).items():
        expected = fresh[name_in_torch].numpy()
        assert value.shape == expected.shape, name_in_torch
        if name_in_torch == "position_embedding":
            assert abs(value.std() / 0.02 - 1) < 0.05
        elif value.size > 200 and expected.any():
            assert abs(np.abs(value).max() / np.abs(expected).max() - 1) < 0.1, name_in_torch
        elif "norm" in name_in_torch or not expected.any():
            np.testing.assert_array_equal(value, expected, err_msg=name_in_torch)
        else:
            assert np.abs(value).max() <= 1.5 * np.abs(expected).max(), name_in_torch


@pytest.mark.parametrize("name", BASELINES)
def test_init_scheme_applies_to_every_layer(name):
    fusion = Fusion(nnx.Rngs(4), shallow(name, init="xavier"), TOWER, D)
    for path, leaf in nnx.to_flat_state(nnx.state(fusion)):
        where, value = "/".join(map(str, path)), np.asarray(leaf[...])
        if path[-1] == "bias":
            assert not value.any(), where
        elif path[-1] == "kernel":
            shape = value.shape[1:] if leaf.axes[0] == "layers" else value.shape
            fans = (9, 9) if shape[:2] == (3, 3) else (96, 96) if "attention" in path else shape
            assert abs(value.std() / (2 / sum(fans)) ** 0.5 - 1) < 0.12, where
