"""Model FLOPs against golden numbers, the compiler, calculations and published figures; chips against their units."""

import dataclasses
import json
import pathlib
import types

import jax
import jax.numpy as jnp
import pytest
import tiny
from flax import nnx

from stf_jax.accounting.chips import CHIPS, find_chip
from stf_jax.accounting.flops import CAUSAL, CONVOLUTION, RECOMPUTED, count_model_flops
from stf_jax.config import DataConfig, EvalConfig, FusionConfig, MeshConfig, ModelConfig, TrainConfig
from stf_jax.models.fusions.base import FUSIONS, Fusion, tapped_blocks
from stf_jax.models.spec import llm_preset, vision_preset
from stf_jax.models.towers.vit import VisionTower
from stf_jax.planning.program import make_program
from stf_jax.training.flops import decode_flops, prefill_flops, step_flops

FREEZE = (".*", "freeze")
STAGE1 = (("fusion/.*", "train"), FREEZE)
STAGE2 = (("fusion/.*", "train"), ("llm/.*", "train"), FREEZE)
ROWS, LENGTH = 2, 44


# ---- Golden numbers --------------------------------------------------------------------------------------------------

# Counted from the shapes of parameters, layer by layer, by code of before the counter of traces.
GOLDEN = json.loads((pathlib.Path(__file__).parent / "flops.json").read_text())


def make_config(llm="llama-tiny", vision="clip-tiny", **fusion_options):
    options = {"fusion": "mbtf_stf", "mbtf_hidden": 24, "stf_hidden": 56, **fusion_options}
    return ModelConfig(vision, llm, FusionConfig(**options), "float32", scan_layers=False, remat="none")


CASES = {
    "stage 1": (make_config(), STAGE1, 2),
    "stage 2": (make_config(), STAGE2, 2),
    "text only": (make_config(), (("llm/.*", "train"), FREEZE), 0),
    "text and a frozen fusion": (make_config(), (("llm/.*", "train"), FREEZE), 1),
    "all": (make_config(), ((".*", "train"),), 1),
    "tower": (make_config(), (("vision/.*", "train"), FREEZE), 1),
    "class token": (make_config(), (("vision/class_token", "train"), FREEZE), 1),
    "tower's norms": (make_config(), (("vision/blocks/mlp_norm/.*", "train"), FREEZE), 1),
    "keys": (make_config(), (("llm/blocks/attention/key/.*", "train"), FREEZE), 0),
    "values": (make_config(), (("llm/blocks/attention/value/.*", "train"), FREEZE), 0),
    "MLP outputs": (make_config(), (("llm/blocks/mlp/down/.*", "train"), FREEZE), 0),
    "last norm": (make_config(), (("llm/norm/.*", "train"), FREEZE), 1),
    "taps below the top": (make_config(taps=(2, 1)), STAGE2, 1),
    "tapping the embedding": (make_config(taps=(0,), fusion="mlp"), ((".*", "train"),), 1),
    "padded grid": (make_config(kernel=3, pad_grid=True), STAGE1, 1),
    "the paper's figure": (make_config(variant="paper"), STAGE2, 1),
    "Qwen2's biases": (make_config("qwen2-tiny"), (("llm/blocks/attention/query/bias", "train"), FREEZE), 0),
    "Qwen3's norms": (make_config("qwen3-tiny"), (("llm/blocks/attention/key_norm/.*", "train"), FREEZE), 0),
    "SigLIP": (make_config(vision="siglip-tiny"), ((".*", "train"),), 1),
    **{name: (make_config(fusion=name), STAGE1, 1) for name in FUSIONS.known},
    "queries": (make_config(fusion="resampler"), (("fusion/connector/queries", "train"), FREEZE), 1),
    "patch norms": (make_config(fusion="resampler"), (("fusion/connector/blocks/patch_norm/.*", "train"), FREEZE), 1),
    "cells": (dataclasses.replace(make_config(), cells=2), (("(vision|cells)/.*", "train"), FREEZE), 2),
    "cells on a frozen tower": (dataclasses.replace(make_config(), cells=2), (("cells/.*", "train"), FREEZE), 1),
    "token packer's values": (make_config(fusion="token_packer"), (("fusion/connector/values/.*", "train"), FREEZE), 1),
    "token packer, padded": (make_config(fusion="token_packer", kernel=3, pad_grid=True), STAGE1, 1),
    "resampler, which does not pad": (make_config(fusion="resampler", kernel=3, pad_grid=True), STAGE1, 1),
}


@pytest.fixture
def variants(monkeypatch):
    spec = tiny.spec
    decoder = spec.LLM["llama-tiny"]
    siglip = dataclasses.replace(spec.VISION["siglip-b-16-256"], image_size=64, width=32, layers=2, heads=4, mlp=48)
    monkeypatch.setitem(spec.VISION, "siglip-tiny", siglip)
    monkeypatch.setitem(spec.LLM, "llama-deep-tiny", dataclasses.replace(decoder, layers=4))
    monkeypatch.setitem(spec.LLM, "qwen2-tiny", dataclasses.replace(decoder, qkv_bias=True, tied=False))
    monkeypatch.setitem(spec.LLM, "qwen3-tiny", dataclasses.replace(decoder, qk_norm=True, head_dim=16))


@pytest.mark.usefixtures("variants")
@pytest.mark.parametrize("case", CASES)
def test_flops_of_each_part_and_gradient(case):
    config, rules, images_per_row = CASES[case]
    assert step_flops(config, rules, ROWS, LENGTH, images_per_row) == GOLDEN["tiny"][case]["step"]
    if not config.cells:
        assert prefill_flops(config, ROWS, LENGTH, images_per_row) == GOLDEN["tiny"][case]["prefill"]
        assert decode_flops(config, ROWS, 21) == GOLDEN["tiny"][case]["decode"]


@pytest.mark.usefixtures("variants")
@pytest.mark.parametrize(
    ("reduce", "keep", "vision", "fusion_options"),
    [
        ("fastv", 5, "clip-tiny", {"fusion": "mlp"}),
        ("fastv", 1, "clip-tiny", {"fusion": "mbtf_stf"}),
        ("random", 9, "clip-tiny", {"fusion": "mlp"}),
        ("visionzip", 9, "clip-tiny", {"fusion": "mlp"}),
        ("visionzip", 13, "clip-tiny", {"fusion": "mbtf", "taps": (3, 1)}),
        ("visionzip", 9, "siglip-tiny", {"fusion": "mlp"}),
    ],
)
def test_flops_with_fewer_image_tokens(reduce, keep, vision, fusion_options):
    config = dataclasses.replace(make_config("llama-deep-tiny", vision, **fusion_options), reduce=reduce, keep=keep)
    golden = GOLDEN["tiny"][f"{reduce} {keep} {vision} {config.fusion.fusion}"]
    assert prefill_flops(config, ROWS, LENGTH, 2) == golden["prefill"]
    assert decode_flops(config, ROWS, LENGTH, 2) == golden["decode"]


REAL = {
    "llama-3-8b, 2 images": (ModelConfig(llm="llama-3-8b"), 4096, 2),
    "siglip-so400m and qwen2.5-0.5b": (
        ModelConfig("siglip-so400m-14-384", "qwen2.5-0.5b", FusionConfig(kernel=3)), 2048, 1,
    ),
    "fastv": (ModelConfig(fusion=FusionConfig("mlp"), reduce="fastv", keep=144), 2048, 1),
}  # fmt: skip


@pytest.mark.parametrize("case", REAL)
def test_flops_of_published_models(case):
    config, length, images_per_row = REAL[case]
    golden = GOLDEN["real"][case]
    assert prefill_flops(config, 1, length, images_per_row) == golden["prefill"]
    assert decode_flops(config, 1, length, images_per_row) == golden["decode"]
    if not config.reduce:
        assert step_flops(config, STAGE1, 1, length, images_per_row) == golden["stage 1"]
        assert step_flops(config, STAGE2, 1, length, images_per_row) == golden["stage 2"]


def test_speed_options_do_not_change_model_flops():
    counts = [
        step_flops(dataclasses.replace(make_config(), **options), STAGE2, ROWS, LENGTH, 1)
        for options in ({}, {"remat": "full", "scan_layers": True}, {"precision": "bfloat16", "attention": "xla"})
    ]
    assert counts == [counts[0]] * 3


# ---- The counter -----------------------------------------------------------------------------------------------------

X, W = jax.ShapeDtypeStruct((4, 8), jnp.float32), jax.ShapeDtypeStruct((8, 16), jnp.float32)
PRODUCT = 2 * 4 * 8 * 16


def in_scope(name, call):
    def scoped(*arguments):
        with jax.named_scope(name):
            return call(*arguments)

    return scoped


def product(x, w):
    return jnp.sin(x @ w)


def test_parts_are_outermost_scopes():
    def call(x, w):
        y = in_scope("a", product)(x, w)
        return in_scope("b", lambda y: in_scope("a", jax.jit(product))(y, w.T))(y), product(x, w)

    assert count_model_flops(call, X, W) == {"a": PRODUCT, "b": PRODUCT, "": PRODUCT}


def test_causal_attention_counts_half_forward_and_backward():
    def loss(x, w):
        return in_scope(CAUSAL, jax.jit(product))(x, w).sum()

    assert sum(count_model_flops(loss, X, W).values()) == PRODUCT / 2
    assert sum(count_model_flops(jax.grad(loss, (0, 1)), X, W).values()) == 3 * PRODUCT / 2


def test_recomputation_is_no_model_flop():
    def loss(x, w):
        return jax.checkpoint(product)(x, w).sum()

    assert sum(count_model_flops(jax.grad(loss, (0, 1)), X, W).values()) == 3 * PRODUCT
    assert sum(count_model_flops(in_scope(RECOMPUTED, product), X, W).values()) == 0


@pytest.mark.parametrize(("stride", "groups", "padding"), [(1, 1, "VALID"), (2, 1, "VALID"), (1, 8, "VALID")])
def test_convolutions_count_as_their_products(stride, groups, padding):
    """Forward, and once more for each gradient that a stride of the kernel's size has."""
    size = 2

    def loss(x, kernel):
        options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": groups}
        return jnp.sin(jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, **options)).sum()

    x = jax.ShapeDtypeStruct((3, 6, 6, 8), jnp.float32)
    kernel = jax.ShapeDtypeStruct((size, size, 8 // groups, 16), jnp.float32)
    side = (6 - size) // stride + 1
    forward = 2 * 3 * side**2 * 16 * size**2 * 8 // groups
    assert sum(count_model_flops(loss, x, kernel).values()) == forward
    assert sum(count_model_flops(jax.grad(loss, 1), x, kernel).values()) == 2 * forward
    if stride == size:  # without it, the gradient for the input has a border of padding
        assert sum(count_model_flops(jax.grad(loss, (0, 1)), x, kernel).values()) == 3 * forward


def test_elementwise_products_count_in_a_convolution_only():
    def loss(x, y):
        return (in_scope(CONVOLUTION, jnp.multiply)(x, y) * 2 * y).sum()

    assert sum(count_model_flops(loss, X, X).values()) == 2 * 4 * 8
    assert sum(count_model_flops(jax.grad(loss, (0, 1)), X, X).values()) == 3 * 2 * 4 * 8


# ---- The compiler ----------------------------------------------------------------------------------------------------

# The compiler also counts norms, activations, softmax and AdamW; with wide shapes and many rows these are about 1 %.
TOLERANCE = 0.02


@pytest.fixture
def wide(monkeypatch):
    spec = tiny.spec
    tower = dataclasses.replace(
        spec.VISION["clip-mini-16-96"], image_size=128, width=1024, layers=3, heads=16, mlp=4096
    )
    decoder = dataclasses.replace(
        spec.LLM["vicuna-7b"], vocab=4096, width=2048, layers=2, heads=16, kv_heads=8, mlp=5504
    )
    monkeypatch.setitem(spec.VISION, "clip-wide", tower)
    monkeypatch.setitem(spec.LLM, "llama-wide", decoder)


def make_wide_config(name="mbtf_stf", **fusion_options):
    options = {"depth": 1, **fusion_options}  # one block of the baselines is enough
    return ModelConfig(
        "clip-wide", "llama-wide", FusionConfig(name, **options), "float32", scan_layers=False, remat="none"
    )


def count_compiled(function, *arguments):
    """Counts FLOPs of a function as XLA's CPU compiler does."""
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("program_kind", ["prefill", "decode", "stage 1", "stage 2"])
def test_flops_match_the_compiler(program_kind):
    rows, length, model = 2, 1024, make_wide_config()
    config = TrainConfig(
        global_batch_size=rows,
        rules={"stage 1": STAGE1}.get(program_kind, STAGE2),
        model=model,
        data=DataConfig(max_length=length),
        mesh=MeshConfig(1, 1, 1),
        eval=EvalConfig(batch=rows),
    )
    program = make_program(
        config, program_kind if program_kind in ("prefill", "decode") else "train", jax.devices()[:1]
    )
    found = program.compile().cost_analysis()["flops"]
    if program_kind == "decode":
        expected = decode_flops(model, rows, program.length)
    else:
        # The program computes five eighths of T², in four spans of queries; one eighth is masked and not counted.
        llm = llm_preset(model.llm)
        masked = llm.layers * rows * length**2 * llm.heads * llm.head_dim // 4  # per product
        if program_kind == "prefill":
            expected = sum(prefill_flops(model, rows, length, 1).values()) + 2 * masked
        else:
            expected = step_flops(model, config.rules, rows, length, 1) + 6 * masked
    assert expected <= found <= (1 + TOLERANCE) * expected


@pytest.mark.usefixtures("wide")
def test_vision_tower_flops_match_the_compiler():
    config, vision = make_wide_config("mlp"), vision_preset("clip-wide")
    graph, weights = nnx.split(nnx.eval_shape(lambda: VisionTower(nnx.Rngs(0), vision, scan=False)))
    images = jax.ShapeDtypeStruct((ROWS, vision.image_size, vision.image_size, 3), jnp.uint8)
    taps = tapped_blocks(config.fusion, vision.layers)
    found = count_compiled(lambda w, x: nnx.merge(graph, w)(x, taps, jnp.float32), weights, images)
    expected = prefill_flops(config, ROWS, 8, 1)["vision"]
    assert expected <= found <= (1 + TOLERANCE) * expected


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("case", [*FUSIONS.known, "paper's STF"])
def test_fusion_flops_match_the_compiler(case):
    config = make_wide_config("mbtf_stf", variant="paper") if case == "paper's STF" else make_wide_config(case)
    vision, width = vision_preset(config.vision), llm_preset(config.llm).width
    graph, weights = nnx.split(nnx.eval_shape(lambda: Fusion(nnx.Rngs(0), config.fusion, vision, width)))
    taps = tapped_blocks(config.fusion, vision.layers)
    states = (jax.ShapeDtypeStruct((ROWS, vision.grid**2, vision.width), jnp.float32),) * len(taps)

    def forward(weights, states):
        return nnx.merge(graph, weights)(states)

    def forward_backward(weights, states, cotangent):
        out, back = jax.vjp(lambda weights: forward(weights, states), weights)
        return out, back(cotangent)

    out = jax.eval_shape(forward, weights, states)
    for call, arguments in ((forward, (weights, states)), (forward_backward, (weights, states, out))):
        counted = sum(count_model_flops(call, *arguments).values())
        assert counted <= count_compiled(call, *arguments) <= (1 + TOLERANCE) * counted


# ---- Calculated and published figures --------------------------------------------------------------------------------

VICUNA = 32 * (4 * 4096**2 + 3 * 4096 * 11_008)  # parameters in matrices of the blocks
HEAD = 32_000 * 4096
CLIP = 4 * 1024**2 + 2 * 1024 * 4096  # of one block


def test_flops_of_the_paper_s_model():
    """Stages 1 and 2, with one image in a row of 2048 tokens: each part and each gradient."""
    matrices, head = 2048 * 2 * VICUNA, 2048 * 2 * HEAD
    attention = 32 * 2 * 2048 * 2048 * 4096  # layers × products × 2 · T²/2 · H·Dh
    blocks = 23 * (577 * 2 * CLIP + 2 * 2 * 577 * 577 * 1024)  # all but the last
    tower = 576 * 2 * (14 * 14 * 3 * 1024) + blocks
    first = 576 * 2 * (8192 * 4096)
    fusion = first + 576 * 2 * (4096 * 1024) + 144 * 2 * (2 * 2 * 1024 * 16_384 + 16_384 * 4096)
    for rules, times in ((STAGE1, 2), (STAGE2, 3)):
        found = step_flops(ModelConfig(), rules, 1, 2048, 1)
        assert found == tower + 3 * fusion - first + times * (matrices + head) + 3 * attention
        assert step_flops(ModelConfig(), rules, 128, 2048, 1) == 128 * found
    parts = {"vision": tower, "fusion": fusion, "llm": matrices + attention, "head": head // 2048}
    assert prefill_flops(ModelConfig(), 1, 2048, 1) == parts


def test_six_flops_per_parameter_and_token():
    """The rule of thumb (arXiv 2001.08361), and PaLM's 6·N + 12·L·H·Q·T (appendix B), causal attention counted half."""
    found = step_flops(ModelConfig(), ((".*", "train"),), 4, 2048, 0) / (4 * 2048)
    assert found == 6 * (VICUNA + HEAD) + 6 * 32 * 32 * 128 * 2048
    assert found == pytest.approx(6 * 6_738_415_616, rel=0.03)  # all of Llama-7B's parameters


@pytest.mark.parametrize(
    ("tower", "layers", "gflops"),  # open_clip, docs/model_profile.csv, without their projection
    [("clip-l-14-336", 24, 381.92 - 2 * 1024 * 768e-9), ("clip-b-16-224", 12, 35.13 - 2 * 768 * 512e-9)],
)
def test_vision_tower_flops_match_published_profiles(tower, layers, gflops):
    config = ModelConfig(vision=tower, llm="llama-mini", fusion=FusionConfig("mlp", taps=(layers,)))
    assert prefill_flops(config, 1, 64, 1)["vision"] / 1e9 == pytest.approx(gflops, abs=0.005)


# ---- Chips -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "units", "per_cycle", "hertz"),
    [
        ("v4", 2 * 4, 128 * 128, 1.05e9),  # matrix units, and multiply-adds per unit and cycle
        ("v5e", 4, 128 * 128, 1.5e9),
        ("v5p", 2 * 4, 128 * 128, 1.75e9),
        ("a6000", 84, 512, 1.8e9),  # multiprocessors
        ("l4", 58, 512, 2.04e9),
        ("4090", 128, 256, 2.52e9),
        ("a100-40", 108, 1024, 1.41e9),
        ("a100-80", 108, 1024, 1.41e9),
        ("h100", 132, 2048, 1.83e9),
        ("h200", 132, 2048, 1.83e9),
    ],
)
def test_chip_flops_match_their_units(name, units, per_cycle, hertz):
    assert CHIPS[name].flops == pytest.approx(2 * units * per_cycle * hertz, rel=0.003)


def test_find_chip():
    for name, kind in {"v5e": "TPU v5 lite", "v5p": "TPU v5", "h100": "NVIDIA H100 80GB HBM3"}.items():
        assert find_chip(types.SimpleNamespace(device_kind=kind)) is CHIPS[name]
    assert find_chip(types.SimpleNamespace(device_kind="NVIDIA H100 PCIe")) is None  # a slower card
    assert find_chip(jax.devices()[0]) is None
    kinds = [kind for chip in CHIPS.values() for kind in chip.kinds]
    assert len(kinds) == len(set(kinds))
    assert [name for name, chip in CHIPS.items() if name != chip.name] == []
