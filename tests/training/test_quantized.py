"""Kernels frozen in int8 and NF4: their definition, what training makes of them, resuming, and reading such a run."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from flax import nnx
from jax.sharding import PartitionSpec as P
from tiny import (
    Setup,
    batches,
    int8_by_definition,
    nf4_by_definition,
    nf4_values,
    quantized_by_definition,
    random_params,
    train_and_save,
)

from stf_jax.checkpointing.adapted import merge_params
from stf_jax.checkpointing.items import read_shapes
from stf_jax.checkpointing.manager import Checkpoints
from stf_jax.config import CheckpointConfig, MeshConfig, UserError
from stf_jax.models import spec
from stf_jax.models.layers import Linear, apply_layers
from stf_jax.models.quantized import QUANTIZATIONS, scale_path
from stf_jax.parallel.mesh import BATCH, BLOCKS, compute_context, make_mesh, parameter_sharding
from stf_jax.training.state import base_params, init_state, quantize_loaded
from stf_jax.weights.folder import load_params, open_params

RULES = (("llm/blocks/attention/.*", "lora:rank=4@nf4"), ("llm/.*", "lora:rank=4@int8"), ("fusion/.*", "train"))
RULES += (("vision/blocks/mlp/up/.*", "freeze@nf4"), ("vision/blocks/mlp/.*", "freeze@int8"), ("vision/.*", "freeze"))
INT8, NF4 = QUANTIZATIONS.values()


def _setup(rules=RULES, mesh=(1, 1, 1), **changes):
    axes = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh, strict=True))
    return Setup.of(**{"rules": rules, "optimizer.warmup_ratio": 0.0}, **axes, **changes)


@functools.cache
def _data():
    return batches(_setup().config, 4)


def _copy(tree):
    return jax.tree.map(np.array, tree)


# ---- What is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_int8_kernels_and_scales_are_numpys_to_the_bit(dtype):
    kernel = np.random.default_rng(0).standard_normal((2, 3, 40, 4, 5), np.float32)
    kernel[1, :, :, 2, 3] = 0
    kernel = np.asarray(kernel, dtype)
    expected = int8_by_definition("layer/kernel", kernel, 2)
    found, scale = jax.jit(INT8.quantize, static_argnums=1)(kernel, (2, 4, 5))
    np.testing.assert_array_equal(found, expected["layer/kernel"], strict=True)
    np.testing.assert_array_equal(scale, expected["layer/scale"], strict=True)
    assert np.abs(expected["layer/kernel"].reshape(2, 120, 20)).max(1).tolist() == [
        20 * [127],
        13 * [127] + [0] + 6 * [127],
    ]
    for layer in range(2):
        whole = INT8.dequantize(found[layer], scale[layer])
        np.testing.assert_array_equal(whole, found[layer] * np.asarray(scale[layer], np.float32))
        assert (np.abs(whole - np.float32(kernel[layer])) <= 0.5001 * scale[layer]).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_nf4_kernels_are_the_nearest_values_of_its_definition(dtype):
    """In numpy and float64, over blocks of 64 and one of 8 inputs; a block may be 0."""
    kernel = np.random.default_rng(0).standard_normal((2, 3, 136, 4, 5), np.float32)
    kernel[1, 2, 64:128, 2, 3] = 0
    kernel = np.asarray(kernel, dtype)
    packed, scale = nf4_by_definition("layer/kernel", kernel, 2).values()
    found, scales = jax.jit(NF4.quantize, static_argnums=1)(kernel, (2, 3, 3, 4, 5))
    assert (packed.shape, scale.shape) == ((2, 3, 68, 4, 5), (2, 3, 3, 4, 5))
    np.testing.assert_array_equal(found, packed, strict=True)
    np.testing.assert_array_equal(scales, scale, strict=True)
    codes = np.stack([packed >> 4, packed & 15], 3).reshape(kernel.shape)
    whole = nf4_values()[codes] * np.repeat(np.float64(scale), 64, 2)[:, :, :136]
    widest = np.diff(nf4_values()).max() / 2 * np.repeat(scale, 64, 2)[:, :, :136]
    assert (np.abs(whole - np.float64(kernel)) <= widest * (1 + 1e-6)).all()
    for layer in range(2):
        on_host, on_device = (NF4.dequantize(x[layer], y[layer]) for x, y in ((packed, scale), (found, scales)))
        np.testing.assert_array_equal(on_device, on_host, strict=True)
        np.testing.assert_allclose(on_host, whole[layer], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "axes"), [(INT8, ("layers", "embed")), (NF4, ("layers", "heads", f"{BLOCKS}head_dim", "embed"))]
)
def test_a_layer_and_its_gradient_are_those_of_the_dequantized_kernel(kind, axes):
    """In float64, over several input and output axes."""
    layer = Linear(nnx.Rngs(0), [(3, "heads"), (72, "head_dim")], [(5, "embed")], stack=2)
    layer.quantize(kind)
    assert layer.scale.get_metadata()["axes"] == axes
    kernel, scale = (leaf.get_value()[1] for leaf in (layer.kernel, layer.scale))
    layer.kernel, layer.scale, layer.bias = nnx.Param(kernel), nnx.Param(scale), nnx.Param(jnp.zeros(5))
    rng = np.random.default_rng(0)
    x, gradient = rng.standard_normal((4, 3, 72), np.float32), rng.standard_normal((4, 5), np.float32)
    with jax.default_matmul_precision("highest"):
        y, backward = jax.vjp(layer, jnp.asarray(x))
        (found,) = backward(jnp.asarray(gradient))
    whole = np.float64(kind.dequantize(np.asarray(kernel), np.asarray(scale)))
    assert whole.std() > 0.05
    np.testing.assert_allclose(y, np.einsum("bhd,hdo->bo", x, whole), atol=1e-5)
    np.testing.assert_allclose(found, np.einsum("bo,hdo->bhd", gradient, whole), atol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "outputs", "kernel", "scale"),
    [
        ((512, "embed"), (24, "mlp"), P(None, "fsdp", "tensor"), P(None, "fsdp", "tensor")),
        ((192, "mlp"), (24, "embed"), P(None, "tensor", "fsdp"), P(None, None, "fsdp")),  # three blocks stay whole
    ],
)
def test_a_mesh_splits_nf4_kernels_and_computes_the_same(inputs, outputs, kernel, scale):
    layer, mesh = Linear(nnx.Rngs(0), [inputs], [outputs], stack=1), make_mesh(MeshConfig(1, 4, 2))
    layer.quantize(NF4)
    layer.bias = None
    graph, params = nnx.split(layer)
    placed = {
        path: parameter_sharding(path, leaf.get_value().shape, leaf.get_metadata()["axes"], mesh)
        for (path,), leaf in nnx.to_flat_state(params)
    }
    assert {path: sharding.spec for path, sharding in placed.items()} == {"kernel": kernel, "scale": scale}

    def call(params, x):
        layers = nnx.merge(graph, params)
        y, backward = jax.vjp(lambda x: apply_layers(layers, x, layers=range(1), scan=True, remat="none"), x)
        return y, backward(jnp.sin(y))

    x = jax.random.normal(jax.random.key(0), (8, inputs[0]))
    values = {path: leaf.get_value() for (path,), leaf in nnx.to_flat_state(params)}
    expected = jax.jit(call)(values, x)
    arguments = jax.device_put(values, placed), jax.device_put(x, jax.NamedSharding(mesh, BATCH))
    with compute_context(mesh, "float32"):
        program = jax.jit(call).lower(*arguments).compile()
    gathered = re.findall(r" = (\w+)\[([\d,]+)\]\S* all-gather\(", program.as_text())
    sizes = {name: math.prod(map(int, shape.split(","))) for name, shape in gathered}
    assert sizes.keys() == {"u8", "f32"}
    assert sizes["f32"] <= values["scale"].size  # no converted kernel
    for one, other in zip(jax.tree.leaves(program(*arguments)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_kernel_that_cannot_be_packed_is_refused(monkeypatch):
    monkeypatch.setitem(spec.LLM, "llama-odd", dataclasses.replace(spec.LLM["llama-tiny"], mlp=66))
    with pytest.raises(UserError, match=r"^llm/blocks/mlp/down/kernel cannot be frozen in nf4: its input axis has 66 "):
        _setup((("llm/.*", "freeze@nf4"), (".*", "train")), **{"model.llm": "llama-odd"})


PARTS = {
    "int8": (jax.ShapeDtypeStruct((16, 8), "int8"), jax.ShapeDtypeStruct((8,), "float32")),
    "nf4": (jax.ShapeDtypeStruct((8, 8), "uint8"), jax.ShapeDtypeStruct((1, 8), "float32")),
}


def _kept_matrices(kind, wrap):
    """Shapes and types of what the backward pass of a product keeps, but for scales."""

    def kept(x, *parts):
        return jax.vjp(wrap(lambda x: QUANTIZATIONS[kind].product(2 * x, *parts, ("embed", "mlp"))), x)[1]

    leaves = jax.tree.leaves(jax.eval_shape(kept, jnp.zeros((4, 16)), *PARTS[kind]))
    return {(leaf.shape, str(leaf.dtype)) for leaf in leaves if leaf.size > 8}


@pytest.mark.parametrize(("kind", "kernel"), [("int8", ((16, 8), "int8")), ("nf4", ((8, 8), "uint8"))])
def test_the_backward_pass_keeps_no_converted_kernel(kind, kernel):
    """Its conversion is two or four times as large, for every layer."""
    assert _kept_matrices(kind, lambda product: product) == {kernel}


@pytest.mark.parametrize(("kind", "kernel"), [("int8", ((16, 8), "int8")), ("nf4", ((8, 8), "uint8"))])
def test_rematerialization_keeps_products_with_quantized_kernels(kind, kernel):
    """``model.remat=dots``: what an activation function needs is kept, and the product's input is not."""
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    found = _kept_matrices(kind, lambda product: jax.checkpoint(lambda x: jnp.sin(product(x)), policy=policy))
    assert found == {kernel, ((4, 8), "float32")}


def _loss_and_gradients(rules, precision="float32"):
    """Of adapters and fusion, from the embedded weights; and the kernels that they are computed with, in one vector."""
    model = {"model.vision": "clip-mini-8-96", "model.llm": "llama-mini-6", "data.tokenizer": "miniature/2"}
    model |= {"model.precision": precision}
    setup = _setup(rules, **model, **{"model.fusion.init": "kaiming", "model.fusion.fusion": "avg_pool"})
    on_load = functools.partial(quantize_loaded, setup.plan, setup.layout)
    loaded = load_params("miniatures/2", base_params(setup.plan, setup.layout), ("fusion/.*",), on_load)
    state, rng = init_state(setup.config, setup.plan, setup.layout, setup.tx, loaded), np.random.default_rng(0)
    adapters = {path: value for path, value in sorted(state.trainable.items()) if path.endswith("adapter/b")}
    changed = {path: jnp.asarray(0.05 * rng.standard_normal(x.shape, np.float32)) for path, x in adapters.items()}

    def loss(trainable, frozen, batch):
        model = setup.plan.merge(trainable, frozen)
        logits = model(batch.tokens, batch.positions, None, batch.image_slots, batch.images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
        return jnp.where(batch.loss_mask, losses, 0).sum() / batch.loss_mask.sum()

    (batch,) = batches(setup.config, 1)
    with compute_context(setup.mesh, precision):
        value, gradients = jax.jit(jax.value_and_grad(loss))(state.trainable | changed, state.frozen, batch)
    kernels = np.concatenate([_read_kernel(setup.plan, state, path) for path in sorted(setup.plan.linears)])
    return setup, float(value), np.concatenate([np.ravel(gradients[path]) for path in sorted(gradients)]), kernels


def _read_kernel(plan, state, path):
    kernel = np.asarray(state.frozen[path])
    if (kind := plan.quantized.get(path)) is not None:
        kernel = np.stack([*map(kind.dequantize, kernel, np.asarray(state.frozen[scale_path(path)]))])
    return kernel.ravel()


@functools.cache
def _loss_and_gradients_of(kind):
    actions = (("llm/.*", "lora:rank=8"), ("vision/.*", "freeze"))
    rules = tuple((pattern, f"{action}@{kind}" if kind else action) for pattern, action in actions)
    return _loss_and_gradients((*rules, ("fusion/.*", "train")))


@pytest.mark.parametrize(
    ("kind", "losses", "shares", "kernels"),
    [("int8", (1e-5, 2e-4), (0.01, 0.05), (0.005, 0.009)), ("nf4", (1e-3, 8e-3), (0.3, 0.65), (0.08, 0.1))],
)
def test_loss_and_gradients_are_close_to_those_of_the_base(kind, losses, shares, kernels, record_property):
    """Of a loss of 2.34, and as shares of the norms of the gradients and of the kernels."""
    base, expected, gradients, original = _loss_and_gradients_of("")
    quantized, value, found, rounded = _loss_and_gradients_of(kind)
    assert not base.plan.quantized
    assert quantized.plan.quantized == dict.fromkeys(quantized.plan.linears, QUANTIZATIONS[kind])
    difference = np.linalg.norm(found - gradients) / np.linalg.norm(gradients)
    rounding = np.linalg.norm(rounded - original) / np.linalg.norm(original)
    record_property(
        f"difference that {kind} makes to the loss, the gradients and the kernels",
        f"{value - expected:.5f}, {difference:.1%}, {rounding:.2%}",
    )
    assert losses[0] < abs(value - expected) < losses[1]
    assert shares[0] < difference < shares[1]
    assert kernels[0] < rounding < kernels[1]


# ---- A run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a run that saved its second step, and the state and losses of four steps."""
    workdir = epath.Path(tmp_path_factory.mktemp("quantized"))
    setup = _setup()
    return workdir, setup, *train_and_save(workdir, setup, setup.state(), _data())


def test_steps_change_no_bit_of_quantized_kernels(run):
    _, setup, _, state, _ = run
    before = setup.state()
    kernels = {path for path in setup.plan.linears if path.startswith(("llm/", "vision/blocks/mlp/"))}
    types = {path: str(value.dtype) for path, value in state.frozen.items() if value.dtype != np.float32}
    in_nf4 = ("llm/blocks/attention/", "vision/blocks/mlp/up/")
    assert types == {path: "uint8" if path.startswith(in_nf4) else "int8" for path in kernels}
    assert len(kernels) == 7 + 2
    for path, old in before.frozen.items():
        assert state.frozen[path].tobytes() == np.asarray(old).tobytes(), path
    for path, old in before.trainable.items():
        assert not np.array_equal(old, state.trainable[path]), path


def test_a_resumed_run_ends_with_the_same_bits(run):
    workdir, setup, step, expected, losses = run
    with Checkpoints(workdir, CheckpointConfig()) as checkpoints:
        arrays, _, _ = checkpoints.restore(2, setup.layout)
    state = dataclasses.replace(setup.state(), step=jax.device_put(np.int32(2), setup.layout.step.sharding), **arrays)
    resumed = []
    for batch in _data()[2:]:
        state, metrics = step(state, batch)
        resumed.append(float(metrics["loss"]))
    assert resumed == losses[2:]
    assert jax.tree.map(lambda x: x.tobytes(), _copy(state)) == jax.tree.map(lambda x: x.tobytes(), expected)


def test_a_run_is_opened_as_a_plain_model(run):
    """Its kernels are those that the quantized ones stand for, plus s·A·B: on the host, on devices, during training."""
    workdir, setup, *_ = run
    opened, plain = open_params(workdir), _setup((("vision/.*", "freeze"), (".*", "train")), (2, 2, 2))
    item = workdir / "frozen" / "frozen"
    saved = {path for path, leaf in read_shapes(item).items() if leaf.dtype in ("int8", "uint8")}
    assert saved == setup.plan.quantized.keys()
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in opened.shapes.items()} == {
        path: (leaf.shape, "float32") for path, leaf in plain.plan.shapes.items()
    }
    with Checkpoints(workdir, CheckpointConfig()) as checkpoints:
        arrays, _, _ = checkpoints.restore(2, setup.layout)
    params = arrays["trainable"] | arrays["frozen"]
    merged, restored = dict(merge_params(params, setup.plan)), dict(opened.restore(plain.plan.shardings(plain.mesh)))
    assert merged.keys() == restored.keys() == opened.shapes.keys()
    for path, found in merged.items():
        expected = np.asarray(params[path])
        if path in setup.plan.quantized:
            layers = zip(expected, np.asarray(params[scale_path(path)]), strict=True)
            expected = np.stack([setup.plan.quantized[path].dequantize(*layer) for layer in layers])
        if path in setup.plan.adapters:
            a, b = (np.float64(params[f"{path.removesuffix('kernel')}adapter/{name}"]) for name in "ab")
            expected = expected + 2 * (a.reshape(len(a), -1, 4) @ b.reshape(len(b), 4, -1)).reshape(expected.shape)
        for value in (found, restored[path], opened.read(path)):
            assert value.dtype == np.float32
            np.testing.assert_allclose(value, expected, atol=1e-6, err_msg=path)


def test_a_kernel_is_read_onto_a_mesh_that_divides_it_but_not_its_codes(run):
    """Eight inputs of a head on eight devices, which are four bytes."""
    opened, path = open_params(run[0]), "llm/blocks/attention/out/kernel"
    sharding = jax.NamedSharding(make_mesh(MeshConfig(8, 1, 1)), P(None, None, "data"))
    ((_, found),) = opened.restore({path: sharding})
    assert found.sharding == sharding
    np.testing.assert_allclose(found, opened.read(path), atol=1e-6)


def test_loaded_kernels_are_quantized_the_same_on_every_mesh():
    setup = _setup(mesh=(2, 2, 2))
    base = base_params(setup.plan, setup.layout)
    for path, value in random_params({path: base[path] for path in setup.plan.quantized}).items():
        found = quantize_loaded(setup.plan, setup.layout, path, jax.device_put(value, base[path].sharding))
        expected = quantized_by_definition(setup.plan, path, value)
        assert found.keys() == expected.keys()
        for name, array in found.items():
            assert array.sharding == setup.layout.frozen[name].sharding
            np.testing.assert_array_equal(array, expected[name], strict=True)
