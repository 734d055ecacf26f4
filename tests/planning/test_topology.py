"""Devices of topologies, and our kernels compiled for them by the real compilers."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from tiny import tiny

from stf_jax.accounting.chips import CHIPS, find_chip
from stf_jax.accounting.memory import host_bytes, peak_bytes
from stf_jax.config import MeshConfig, UserError
from stf_jax.models.attention import Mask, attention
from stf_jax.models.layers import Linear, apply_layers
from stf_jax.models.quantized import QUANTIZATIONS
from stf_jax.parallel.mesh import BATCH, compute_context, make_mesh
from stf_jax.planning.program import make_program
from stf_jax.planning.topology import memory_limit, topology_devices

pytestmark = pytest.mark.usefixtures("optimized")

TPUS = {"v4:2x2x4": 16, "v5e:4x8": 32, "v5e:1x1": 1, "v5p:2x2x4": 16, "v6e:8x8": 64}
GPUS = {
    "l4:1": 1,
    "4090:1": 1,
    "a6000:8": 8,
    "a100-40:8": 8,
    "a100-80:8": 8,
    "h100:8": 8,
    "h200:1": 1,
    "h200:8": 8,
    "b200:8": 8,
}


@pytest.mark.parametrize("name", TPUS | GPUS)
def test_a_topology_has_its_chips_with_known_figures(name):
    devices = topology_devices(name)
    assert len(devices) == (TPUS | GPUS)[name]
    chip = find_chip(devices[0])
    assert chip is CHIPS[name.split(":")[0]]
    assert devices[0].platform == ("tpu" if name in TPUS else "gpu")
    assert 0.84 * chip.memory < memory_limit(devices[0]) < chip.memory  # an L4's error correction takes a sixteenth


def test_devices_have_slice_indices():
    devices = topology_devices("v5e:2x4", slices=2)
    assert [device.slice_index for device in devices] == 8 * [0] + 8 * [1]
    assert dict(make_mesh(MeshConfig(), devices).shape) == {"data": 2, "fsdp": 8, "tensor": 1}


@pytest.mark.parametrize(
    ("name", "slices", "sentence"),
    [
        ("v5:4x8", 1, r"--topology=v5:4x8: unknown device 'v5'; did you mean"),
        ("tpu", 1, "unknown device 'tpu'; known: v4, v5e"),
        ("v5e", 1, "should look like v5e:4x8"),
        ("v5e:32", 1, "should look like v5e:4x8"),
        ("h100:4x8", 1, "should look like h100:8, the GPUs of one machine"),
        ("h100:9", 1, "should look like h100:8"),
        ("h100:8", 2, "--slices=2 requires a TPU"),
        ("v5e:3x5", 1, "cannot be used: .*not divisible"),
    ],
)
def test_invalid_topologies_are_rejected(name, slices, sentence):
    with pytest.raises(UserError, match=sentence):
        topology_devices(name, slices)


@pytest.mark.parametrize(
    ("name", "package", "module"),
    [
        ("v5e:2x2", "libtpu", "libtpu"),
        ("h100:8", "jax-cuda12-pjrt", "jax_plugins.xla_cuda12"),
        ("h100:8", "nvidia-cudnn-cu12", "nvidia.cudnn"),
    ],
)
def test_a_missing_compiler_is_reported_with_the_install_command(name, package, module, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find(name))
    with pytest.raises(UserError, match=rf"{name} needs {package}: pip install .* requirements-plan\.txt"):
        topology_devices(name)
    for other in {"v5e:2x2", "h100:8"} - {name}:
        assert topology_devices(other)  # the other compiler is still available


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1"])
def test_splash_attention_compiles_for_tpus_with_packed_rows_and_gradients(name, size):
    mesh = make_mesh(MeshConfig(tensor=2), topology_devices(name))
    sharding = NamedSharding(mesh, BATCH)
    q, k, segments = (
        jax.ShapeDtypeStruct((4, 577, *rest), dtype, sharding=sharding)
        for rest, dtype in (((4, size), jnp.bfloat16), ((2, size), jnp.bfloat16), ((), jnp.int32))
    )

    def loss(q, k, v, segments):
        return attention(q, k, v, Mask(True, segments)).astype(jnp.float32).sum()

    with compute_context(mesh, "bfloat16"):
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k, segments).compile()
    assert compiled.as_text().count("tpu_custom_call") == 3  # forward, backward of q, backward of k and v


@pytest.mark.parametrize("packed", [False, True])
def test_cudnn_is_chosen_for_gpus_of_a_topology(packed):
    """Also for packed rows, where jax does not compute the gradient of their mask."""
    mesh = make_mesh(MeshConfig(tensor=2), topology_devices("h100:4"))
    q, k, segments = (
        jax.ShapeDtypeStruct((8, 255, *rest), dtype, sharding=NamedSharding(mesh, BATCH))
        for rest, dtype in (((4, 64), jnp.bfloat16), ((2, 64), jnp.bfloat16), ((), jnp.int32))
    )

    def loss(q, k, v, segments):
        return attention(q, k, v, Mask(True, segments if packed else None)).astype(jnp.float32).sum()

    with compute_context(mesh, "bfloat16"):
        text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k, segments).compile().as_text()
    calls = [line for line in text.splitlines() if "__cudnn$fmha" in line]
    assert len(calls) == (0 if packed and jax.__version_info__ < (0, 11, 2) else 2)
    # Each device has the mask of its own rows.
    assert all("[4,1,256,256]" not in line.split(" custom-call(")[0] for line in calls)
    assert ("bf16[4,1,256,256]" in text) == (packed and bool(calls))


@pytest.mark.parametrize(("causal", "length"), [(True, 64), (False, 64), (False, 63)])
def test_cudnn_takes_queries_and_keys_that_are_split_in_different_ways(causal, length):
    """XLA splits them so in a decoder with HiDrop at 7B, where jax's own rule ends with an error."""
    mesh = make_mesh(MeshConfig(fsdp=4), topology_devices("h100:4"))
    q, k = (
        jax.ShapeDtypeStruct((8, length, 4, 64), jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for spec in (BATCH, PartitionSpec())
    )
    with compute_context(mesh, "bfloat16"):
        call = jax.jit(lambda q, k, v: attention(q, k, v, Mask(causal), "cudnn"))
        assert "__cudnn$fmha" in call.lower(q, k, k).compile().as_text()


def test_gradients_without_a_mask_use_cudnn_at_an_odd_length():
    """A trainable tower of CLIP-L/14-336 has 577 positions; jax refuses gradients for them."""
    mesh = make_mesh(MeshConfig(), topology_devices("h100:1"))
    x = jax.ShapeDtypeStruct((2, 577, 4, 64), jnp.bfloat16, sharding=NamedSharding(mesh, BATCH))

    def loss(q, k, v):
        return attention(q, k, v, Mask()).astype(jnp.float32).sum()

    with compute_context(mesh, "bfloat16"):
        forward, backward = (jax.jit(call).lower(x, x, x).compile().as_text() for call in (loss, jax.grad(loss)))
    assert "__cudnn$fmhaSoftmax" in forward
    assert "bf16[2,4,577,64]" in forward  # not padded
    assert "__cudnn$fmhaSoftmaxBackward" in backward


def test_deterministic_steps_on_gpus_add_in_one_order():
    """Scatters are all of the program that adds with atomics: with unique indices, no two threads add to one number."""
    text_only = {"data.images_per_row": 0, "model.fusion.fusion": "mlp"}  # compiles faster
    config = tiny(**text_only | {"deterministic": True, "model.precision": "bfloat16"})
    program = make_program(config, "train", topology_devices("h100:1"))
    text = program.compile().as_text()
    assert "triton" not in text  # jax 0.11 refuses Triton's products where it may not time them
    scatters = [line for line in text.splitlines() if " scatter(" in line]
    assert scatters
    assert all("unique_indices=true" in line for line in scatters)


@pytest.mark.parametrize(("kind", "remat"), [("int8", "none"), ("int8", "full"), ("nf4", "none"), ("nf4", "full")])
def test_a_step_has_no_converted_copy_of_quantized_kernels(kind, remat):
    """Forward and backward convert the kernels layer by layer; a copy of all would take more than it saves."""
    sharding = NamedSharding(make_mesh(MeshConfig(), topology_devices("a6000:1")), PartitionSpec())
    layers, width = 16, 1024

    def measure(kind):
        def build():
            block = Linear(nnx.Rngs(0), [(width, "embed")], [(width, "mlp")], stack=layers)
            if kind:
                block.quantize(QUANTIZATIONS[kind])
            return block

        graph, params = nnx.split(nnx.eval_shape(build))
        params = {path[0]: leaf.get_value().update(sharding=sharding) for path, leaf in nnx.to_flat_state(params)}
        if not kind:
            params["kernel"] = params["kernel"].update(dtype=jnp.bfloat16)

        def loss(bias, frozen, x):
            block = nnx.merge(graph, frozen | {"bias": bias})
            y = apply_layers(block, x, layers=range(layers), scan=True, remat=remat)
            return jnp.square(y.astype(jnp.float32)).sum()

        x = jax.ShapeDtypeStruct((64, width), jnp.bfloat16, sharding=sharding)
        step = jax.jit(jax.grad(loss)).lower(params.pop("bias"), params, x)
        return peak_bytes(step.compile())

    saved = measure("") - measure(kind)
    assert saved > 0.95 * {"int8": 8, "nf4": 11.5}[kind] / 8 * layers * width**2


@pytest.mark.parametrize("name", ["a6000:1", "v5e:1x1"])
def test_offloaded_inputs_of_layers_leave_the_devices_memory(name):
    sharding = NamedSharding(make_mesh(MeshConfig(), topology_devices(name)), PartitionSpec())
    layers, width, rows = 16, 512, 2**14

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.up = Linear(rngs, [(width, "embed")], [(width, "mlp")], stack=layers)
            self.down = Linear(rngs, [(width, "mlp")], [(width, "embed")], stack=layers)

        def __call__(self, x):
            return x + self.down(jnp.tanh(self.up(x)))

    graph, params = nnx.split(nnx.eval_shape(lambda: Block(nnx.Rngs(0))))
    params = jax.tree.map(lambda leaf: leaf.update(dtype=jnp.bfloat16, sharding=sharding), params)
    x = jax.ShapeDtypeStruct((rows, width), jnp.bfloat16, sharding=sharding)

    def compile_gradient(remat):
        def loss(params, x):
            y = apply_layers(nnx.merge(graph, params), x, layers=range(layers), scan=True, remat=remat)
            return jnp.square(y.astype(jnp.float32)).sum()

        return jax.jit(jax.grad(loss)).lower(params, x).compile()

    inputs = layers * rows * width * 2
    full, offload = map(compile_gradient, ("full", "offload"))
    assert (host_bytes(full), host_bytes(offload)) == (0, inputs)
    saved = peak_bytes(full) - peak_bytes(offload)
    assert 0.7 * inputs < saved <= inputs


def test_the_compilers_are_installed():
    """Tests that need them must not be skipped silently."""
    for package in ("libtpu", "jax_plugins.xla_cuda12"):
        assert importlib.util.find_spec(package) is not None
