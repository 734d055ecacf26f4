"""Executed FLOPs of traced programs, against hand counts and model FLOPs."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec
from tiny import load_recipe

from stf_jax.accounting.flops import PRIME, Executed, count_executed
from stf_jax.config import MeshConfig
from stf_jax.inference.generator import INITIAL_MAX_NEW_TOKENS
from stf_jax.parallel.mesh import compute_context, make_mesh
from stf_jax.planning.program import make_program
from stf_jax.planning.report import trace_cost
from stf_jax.training.flops import decode_flops, prefill_flops

X, W = jax.ShapeDtypeStruct((PRIME, 8), jnp.float32), jax.ShapeDtypeStruct((8, 16), jnp.bfloat16)
PRODUCT = 2 * PRIME * 8 * 16


def trace_and_count(call, *arguments, shards=1, devices=1):
    return count_executed(jax.jit(call).trace(*arguments), shards, devices)


def test_arrays_with_rows_are_counted_separately():
    counts = trace_and_count(lambda x, w: x @ w.astype(jnp.float32), X, W)
    assert counts == Executed(PRODUCT, bytes_by_rows=4 * PRIME * (8 + 16), bytes_fixed=4 * 8 * 16)


def test_a_device_of_a_mesh_has_its_rows_and_its_shard_of_the_weights():
    x = jax.ShapeDtypeStruct((4 * PRIME, 8), jnp.float32)
    # Rows are split over 4 devices, tensor over 2.
    counts = trace_and_count(lambda x, w: x @ w.astype(jnp.float32), x, W, shards=4, devices=8)
    assert counts == Executed(4 * PRODUCT, 4 * 4 * PRIME * (8 + 16) / 8, 4 * 8 * 16 / 2)


def sum_of_squares(x):
    return jnp.square(jnp.sin(x)).sum()


def while_loop(x, w):
    return jax.lax.while_loop(lambda c: c[0] < 7, lambda c: (c[0] + 1, x @ w), (0, jnp.zeros((PRIME, 16))))


@pytest.mark.parametrize(
    ("call", "times"),
    [
        (lambda x, w: jax.lax.scan(lambda c, _: (c, x @ w), 0, length=5)[1], 5),
        (lambda x, w: jax.lax.map(lambda i: jax.lax.map(lambda j: x @ w, jnp.arange(3)), jnp.arange(2)), 6),
        (lambda x, w: jax.lax.cond(x.sum() > 0, lambda: (x @ w) + (x @ (2 * w)), lambda: x @ w), 2),
        (while_loop, 1),
        (lambda x, w: jax.jit(lambda x: x @ w)(x), 1),
        (lambda x, w: jax.value_and_grad(lambda x: sum_of_squares(x @ w))(x), 2),
        (lambda x, w: jax.value_and_grad(lambda w: sum_of_squares(x @ w))(w), 2),
        (lambda x, w: jax.value_and_grad(lambda x: sum_of_squares(jax.checkpoint(lambda x: jnp.sin(x @ w))(x)))(x), 3),
        (lambda x, w: jax.nn.relu(x @ w), 1),  # has a custom derivative
    ],
    ids=["scan", "nested", "cond", "while", "jit", "by-input", "by-weights", "remat", "custom"],
)
def test_loops_branches_and_derivatives(call, times):
    assert trace_and_count(lambda x, w: call(x, w.astype(jnp.float32)), X, W).flops == times * PRODUCT


def test_shapes_inside_a_shard_map_are_per_device():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    x = jax.ShapeDtypeStruct((4 * PRIME, 8), jnp.float32)
    specs = dict(in_specs=(PartitionSpec(("data", "fsdp")), PartitionSpec(None, "tensor")))
    specs["out_specs"] = PartitionSpec(("data", "fsdp"), "tensor")
    with compute_context(mesh, "float32"):
        counts = trace_and_count(jax.shard_map(lambda x, w: x @ w.astype(x.dtype), **specs), x, W, shards=4, devices=8)
    assert counts.flops == 4 * PRODUCT
    assert (counts.bytes_by_rows, counts.bytes_fixed) == (4 * PRIME * (8 + 8), 4 * 8 * 8)


def small_config(*overrides):
    model = ("--config.model.vision=clip-mini-16-96", "--config.model.llm=llama-mini", "--config.data.max_length=64")
    return load_recipe("finetune.py", *model, "--config.model.precision=float32", "--config.eval.batch=8", *overrides)


def test_prefill_and_decode_execute_the_model_flops():
    config, devices = small_config(), jax.devices()
    for kind in ("prefill", "decode"):
        program = make_program(config, kind, devices)
        work = trace_cost(config, kind, devices).work(config, program)
        assert program.rows == 8
        if kind == "decode":
            assert work.executed_flops == decode_flops(config.model, 8, program.length) == work.model_flops
        else:
            # XLA's attention also computes the masked half of its products.
            masked = 2 * 4 * 8 * 64 * 64 * 128  # two products of four layers
            assert work.executed_flops == sum(prefill_flops(config.model, 8, 64, 1).values()) + masked


def test_executed_flops_with_a_reducer_in_the_decoder():
    config, devices = small_config("--config.model.reduce=fastv"), jax.devices()
    reduced = 64 - 7  # two of nine image tokens remain
    program = make_program(config, "decode", devices)
    prompt_slots = [keys.shape[2] - INITIAL_MAX_NEW_TOKENS for keys, _ in program.arguments[1].cache]
    assert prompt_slots == [64, 64, reduced, reduced]
    work = trace_cost(config, "decode", devices).work(config, program)
    assert work.executed_flops == decode_flops(config.model, 8, program.length, 1) == work.model_flops
    work = trace_cost(config, "prefill", devices).work(config, make_program(config, "prefill", devices))
    assert work.executed_flops == work.model_flops + 2 * 8 * 128 * 2 * (64**2 + reduced**2)


def test_remat_executes_more_flops_and_keeps_fewer_activations():
    # The minimum number of arrays per layer of the size of the residual, by setting.
    saved = {"none": 8, "dots": 5, "mlp": 3, "attention": 2, "full": 1}
    costs = [trace_cost(small_config(f"--config.model.remat={name}"), "train", jax.devices()) for name in saved]
    for count, cost in zip(saved.values(), costs, strict=True):
        assert cost.activation_bytes_per_row > count * 4 * 64 * 128 * 4
    for cost, leaner in itertools.pairwise(costs):
        assert leaner.activation_bytes_per_row < cost.activation_bytes_per_row
        assert leaner.flops_per_row > cost.flops_per_row  # dots recomputes attention's products


def test_each_microbatch_reads_the_weights():
    devices = jax.devices()
    configs = [
        small_config(f"--config.optimizer.accumulation_steps={n}", "--config.global_batch_size=32") for n in (1, 4)
    ]
    costs = [trace_cost(config, "train", devices) for config in configs]
    programs = [make_program(config, "train", devices) for config in configs]
    works = [cost.work(*pair) for cost, *pair in zip(costs, configs, programs, strict=True)]
    assert works[0].executed_flops == works[1].executed_flops
    assert works[1].memory_bytes - works[0].memory_bytes == 3 * costs[0].weight_bytes
    activations = [cost.activation_bytes(*pair) for cost, *pair in zip(costs, configs, programs, strict=True)]
    assert activations[0] == 4 * activations[1]
