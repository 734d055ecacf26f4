"""Kernels frozen in int8: their definition, what training makes of them, resuming, and reading such a run."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from flax import nnx
from tiny import Setup, batches, int8_by_definition, random_params, train_and_save

from stf_jax.checkpointing.adapted import merge_params
from stf_jax.checkpointing.items import read_shapes
from stf_jax.checkpointing.manager import Checkpoints
from stf_jax.config import CheckpointConfig
from stf_jax.models.layers import Linear
from stf_jax.models.quantized import dequantize, product, quantize, scale_path
from stf_jax.parallel.mesh import compute_context
from stf_jax.training.state import base_params, init_state, quantize_loaded
from stf_jax.weights.folder import load_params, open_params

RULES = (("llm/.*", "lora:rank=4@int8"), ("vision/blocks/mlp/.*", "freeze@int8"), ("vision/.*", "freeze"))
RULES += (("fusion/.*", "train"),)


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
def test_kernels_and_scales_are_numpys_to_the_bit(dtype):
    kernel = np.random.default_rng(0).standard_normal((2, 3, 40, 4, 5), np.float32)
    kernel[1, :, :, 2, 3] = 0
    kernel = np.asarray(kernel, dtype)
    expected = int8_by_definition("layer/kernel", kernel, 2)
    found, scale = jax.jit(quantize, static_argnums=1)(kernel, 2)
    np.testing.assert_array_equal(found, expected["layer/kernel"], strict=True)
    np.testing.assert_array_equal(scale, expected["layer/scale"], strict=True)
    assert np.abs(expected["layer/kernel"].reshape(2, 120, 20)).max(1).tolist() == [
        20 * [127],
        13 * [127] + [0] + 6 * [127],
    ]
    for layer in range(2):
        whole = dequantize(found[layer], scale[layer])
        np.testing.assert_array_equal(whole, found[layer] * np.asarray(scale[layer], np.float32))
        assert (np.abs(whole - np.float32(kernel[layer])) <= 0.5001 * scale[layer]).all()


def test_a_layer_and_its_gradient_are_those_of_the_dequantized_kernel():
    """In float64, over several input and output axes."""
    layer, rng = Linear(nnx.Rngs(0), [(3, "heads"), (8, "head_dim")], [(5, "embed")], stack=2), np.random.default_rng(0)
    layer.quantize(nnx.Rngs(0))
    assert layer.scale.get_metadata()["axes"] == ("layers", "embed")
    kernel, scale = quantize(jnp.asarray(rng.standard_normal((2, 3, 8, 5), np.float32)), 1)
    layer.kernel, layer.scale, layer.bias = (
        nnx.Param(kernel[1]),
        nnx.Param(scale[1]),
        nnx.Param(jnp.zeros(5)),
    )
    x, gradient = rng.standard_normal((4, 3, 8), np.float32), rng.standard_normal((4, 5), np.float32)
    with jax.default_matmul_precision("highest"):
        y, backward = jax.vjp(layer, jnp.asarray(x))
        (found,) = backward(jnp.asarray(gradient))
    whole = np.float64(kernel[1]) * np.float64(scale[1])
    np.testing.assert_allclose(y, np.einsum("bhd,hdo->bo", x, whole), atol=1e-5)
    np.testing.assert_allclose(found, np.einsum("bo,hdo->bhd", gradient, whole), atol=1e-5)


def test_the_backward_pass_keeps_no_converted_kernel():
    """Its conversion is twice as large, for every layer."""
    kernel = jax.ShapeDtypeStruct((16, 8), "int8")
    kept = jax.eval_shape(lambda x, kernel: jax.vjp(lambda x: product(x, kernel), x)[1], jnp.zeros((4, 16)), kernel)
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(kept)] == [((16, 8), "int8")]


def test_rematerialization_keeps_products_with_int8_kernels():
    """``model.remat=dots``: what an activation function needs is kept, and the product's input is not."""

    def kept(x, kernel):
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        return jax.vjp(jax.checkpoint(lambda x: jnp.sin(product(2 * x, kernel)), policy=policy), x)[1]

    leaves = jax.tree.leaves(jax.eval_shape(kept, jnp.zeros((4, 16)), jnp.zeros((16, 8), jnp.int8)))
    assert {(leaf.shape, str(leaf.dtype)) for leaf in leaves} == {((4, 8), "float32"), ((16, 8), "int8")}


def _loss_and_gradients(rules, precision="float32"):
    """Of adapters and fusion, from the embedded weights."""
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
    return setup, float(value), np.concatenate([np.ravel(gradients[path]) for path in sorted(gradients)])


def test_loss_and_gradients_are_close_to_those_of_the_base(record_property):
    """Measured: 0.00011 of a loss of 2.34, and 4.4 % of the gradients' norm, which bfloat16 changes by 4.8 %."""
    actions = (("llm/.*", "lora:rank=8"), ("vision/.*", "freeze"))
    base, expected, gradients = _loss_and_gradients((*actions, ("fusion/.*", "train")))
    int8 = tuple((pattern, f"{action}@int8") for pattern, action in actions)
    quantized, value, found = _loss_and_gradients((*int8, ("fusion/.*", "train")))
    assert not base.plan.quantized
    assert quantized.plan.quantized == quantized.plan.linears
    difference = np.linalg.norm(found - gradients) / np.linalg.norm(gradients)
    record_property(
        "difference that int8 makes to the loss, and to the gradients", f"{value - expected:.5f}, {difference:.1%}"
    )
    assert 1e-5 < abs(value - expected) < 2e-4
    assert 0.01 < difference < 0.05


# ---- A run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a run that saved its second step, and the state and losses of four steps."""
    workdir = epath.Path(tmp_path_factory.mktemp("int8"))
    setup = _setup()
    return workdir, setup, *train_and_save(workdir, setup, setup.state(), _data())


def test_steps_change_no_bit_of_int8_kernels(run):
    _, setup, _, state, _ = run
    before = setup.state()
    kernels = {path for path in setup.plan.linears if path.startswith(("llm/", "vision/blocks/mlp/"))}
    assert {path for path, value in state.frozen.items() if value.dtype == np.int8} == kernels
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
    """Its kernels are K·scale + s·A·B: on the host, on devices, and during training."""
    workdir, setup, *_ = run
    opened, plain = open_params(workdir), _setup((("vision/.*", "freeze"), (".*", "train")), (2, 2, 2))
    item = workdir / "frozen" / "frozen"
    assert {path for path, leaf in read_shapes(item).items() if leaf.dtype == "int8"} == setup.plan.quantized
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
            scale = np.float64(params[scale_path(path)])
            expected = expected * scale.reshape(len(scale), *[1] * (expected.ndim - scale.ndim), *scale.shape[1:])
        if path in setup.plan.adapters:
            a, b = (np.float64(params[f"{path.removesuffix('kernel')}adapter/{name}"]) for name in "ab")
            expected = expected + 2 * (a.reshape(len(a), -1, 4) @ b.reshape(len(b), 4, -1)).reshape(expected.shape)
        for value in (found, restored[path], opened.read(path)):
            assert value.dtype == np.float32
            np.testing.assert_allclose(value, expected, atol=1e-6, err_msg=path)


def test_loaded_kernels_are_quantized_the_same_on_every_mesh():
    setup = _setup(mesh=(2, 2, 2))
    for path, value in random_params({path: setup.plan.shapes[path] for path in setup.plan.quantized}).items():
        loaded = jax.device_put(value, setup.layout.frozen[path].sharding)
        found, outputs = quantize_loaded(setup.plan, setup.layout, path, loaded), setup.plan.shapes[scale_path(path)]
        expected = int8_by_definition(path, value, len(outputs.shape) - 1)
        assert found.keys() == expected.keys()
        for name, array in found.items():
            assert array.sharding == setup.layout.frozen[name].sharding
            np.testing.assert_array_equal(array, expected[name], strict=True)
