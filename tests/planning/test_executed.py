"""What a traced program executes, against counts by hand and against the model FLOPs of runtime/cost.py."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec
from tiny import recipe

from stf_jax.config import MeshConfig
from stf_jax.inference.generator import ROOM
from stf_jax.planning.executed import PRIME, Executed, executed
from stf_jax.planning.program import make_program
from stf_jax.planning.report import count
from stf_jax.runtime.cost import decode_flops, forward_flops
from stf_jax.runtime.mesh import computing, make_mesh

X, W = jax.ShapeDtypeStruct((PRIME, 8), jnp.float32), jax.ShapeDtypeStruct((8, 16), jnp.bfloat16)
PRODUCT = 2 * PRIME * 8 * 16


def counted(call, *arguments, shards=1, devices=1):
    return executed(jax.jit(call).trace(*arguments), shards, devices)


def test_a_product_is_counted_by_what_has_rows():
    found = counted(lambda x, w: x @ w.astype(jnp.float32), X, W)
    assert found == Executed(PRODUCT, bytes_by_rows=4 * PRIME * (8 + 16), bytes_fixed=4 * 8 * 16)


def test_of_a_mesh_a_device_has_its_rows_and_all_of_the_weights():
    x = jax.ShapeDtypeStruct((4 * PRIME, 8), jnp.float32)
    found = counted(lambda x, w: x @ w.astype(jnp.float32), x, W, shards=4, devices=8)  # 4 of rows, 2 of words
    assert found == Executed(4 * PRODUCT, 4 * 4 * PRIME * (8 + 16) / 8, 4 * 8 * 16 / 2)


def squares(x):
    return jnp.square(jnp.sin(x)).sum()


def looping(x, w):
    return jax.lax.while_loop(lambda c: c[0] < 7, lambda c: (c[0] + 1, x @ w), (0, jnp.zeros((PRIME, 16))))


@pytest.mark.parametrize(
    ("call", "times"),
    [
        (lambda x, w: jax.lax.scan(lambda c, _: (c, x @ w), 0, length=5)[1], 5),
        (lambda x, w: jax.lax.map(lambda i: jax.lax.map(lambda j: x @ w, jnp.arange(3)), jnp.arange(2)), 6),
        (lambda x, w: jax.lax.cond(x.sum() > 0, lambda: (x @ w) + (x @ (2 * w)), lambda: x @ w), 2),
        (looping, 1),
        (lambda x, w: jax.jit(lambda x: x @ w)(x), 1),
        (lambda x, w: jax.value_and_grad(lambda x: squares(x @ w))(x), 2),
        (lambda x, w: jax.value_and_grad(lambda w: squares(x @ w))(w), 2),
        (lambda x, w: jax.value_and_grad(lambda x: squares(jax.checkpoint(lambda x: jnp.sin(x @ w))(x)))(x), 3),
        (lambda x, w: jax.nn.relu(x @ w), 1),  # a function with a derivative of its own
    ],
    ids=["scan", "nested", "cond", "while", "jit", "by-input", "by-weights", "remat", "custom"],
)
def test_loops_branches_and_derivatives(call, times):
    assert counted(lambda x, w: call(x, w.astype(jnp.float32)), X, W).flops == times * PRODUCT


def test_inside_a_shard_map_shapes_are_a_devices():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    x = jax.ShapeDtypeStruct((4 * PRIME, 8), jnp.float32)
    specs = dict(in_specs=(PartitionSpec(("data", "fsdp")), PartitionSpec(None, "tensor")))
    specs["out_specs"] = PartitionSpec(("data", "fsdp"), "tensor")
    with computing(mesh, "float32"):
        found = counted(jax.shard_map(lambda x, w: x @ w.astype(x.dtype), **specs), x, W, shards=4, devices=8)
    assert found.flops == 4 * PRODUCT
    assert (found.bytes_by_rows, found.bytes_fixed) == (4 * PRIME * (8 + 8), 4 * 8 * 8)


def small(*overrides):
    shapes = ("--config.model.vision=clip-mini-16-96", "--config.model.llm=llama-mini", "--config.data.max_length=64")
    return recipe("finetune.py", *shapes, "--config.model.precision=float32", "--config.eval.batch=8", *overrides)


def test_reading_and_answering_execute_what_the_model_asks_for():
    """By two ways that share nothing: the traced program here, the shapes of parameters there."""
    config, devices = small(), jax.devices()
    for what in ("prefill", "decode"):
        program = make_program(config, what, devices)
        work = count(config, what, devices).work(config, program)
        assert program.rows == 8
        if what == "decode":
            assert work.executed_flops == decode_flops(config.model, 8, program.length) == work.model_flops
        else:
            # XLA's attention computes what a causal mask leaves out, too: half of its products more.
            found = forward_flops(config.model, 8, 64, 1)
            masked = 2 * 4 * 8 * 64 * 64 * 128  # two products of four layers
            assert work.executed_flops == found.forward - found.head + found.head // 64 + masked


def test_with_fewer_image_tokens_in_later_layers_too():
    config, devices = small("--config.model.reduce=fastv"), jax.devices()
    shorter = 64 - 7  # of nine image tokens two remain
    program = make_program(config, "decode", devices)
    assert [keys.shape[2] for keys, _ in program.arguments[1].cache] == [64 + ROOM] * 2 + [shorter + ROOM] * 2
    work = count(config, "decode", devices).work(config, program)
    assert work.executed_flops == decode_flops(config.model, 8, program.length, 1) == work.model_flops
    work = count(config, "prefill", devices).work(config, make_program(config, "prefill", devices))
    assert work.executed_flops == work.model_flops + 2 * 8 * 128 * 2 * (64**2 + shorter**2)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_remat_executes_more_and_keeps_less(remat):
    config, devices = small(f"--config.model.remat={remat}"), jax.devices()
    found = count(config, "train", devices)
    saved = {"none": 8, "dots": 5, "full": 1}[remat]  # arrays a layer of the residual's size, at the least
    assert found.kept_bytes > saved * 4 * 64 * 128 * 4
    if remat != "none":
        leaner = {"dots": "none", "full": "dots"}[remat]
        other = count(
            dataclasses.replace(config, model=dataclasses.replace(config.model, remat=leaner)), "train", devices
        )
        assert found.kept_bytes < other.kept_bytes
        assert found.flops > other.flops  # dots recomputes attention's products


def test_microbatches_read_the_weights_again():
    devices = jax.devices()
    one, four = (small(f"--config.optimizer.accumulation_steps={n}", "--config.global_batch_size=32") for n in (1, 4))
    works = [count(c, "train", devices).work(c, make_program(c, "train", devices)) for c in (one, four)]
    assert works[0].executed_flops == works[1].executed_flops
    assert works[1].memory_bytes - works[0].memory_bytes == 3 * count(one, "train", devices).fixed_bytes
    kept = [count(c, "train", devices).kept(c, make_program(c, "train", devices)) for c in (one, four)]
    assert kept[0] == 4 * kept[1]
