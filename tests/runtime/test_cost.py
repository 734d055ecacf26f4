"""Model FLOPs against traced programs, against the compiler, by hand and by others; chips against their units."""

import dataclasses
import math
import types

import jax
import jax.numpy as jnp
import pytest
import tiny
from flax import nnx

from stf_jax.config import DataConfig, EvalConfig, FusionConfig, MeshConfig, ModelConfig, TrainConfig
from stf_jax.models import fusion
from stf_jax.models.presets import llm_preset, vision_preset
from stf_jax.models.vit import VisionTower
from stf_jax.models.vlm import slots_per_image
from stf_jax.planning.program import make_program
from stf_jax.runtime.chips import CHIPS, find_chip
from stf_jax.runtime.cost import decode_flops, forward_flops, fusion_flops, step_flops
from stf_jax.training.state import blueprint, trainable_paths

pytestmark = pytest.mark.usefixtures("optimized")

FREEZE = (".*", "freeze")
STAGE1 = (("fusion/.*", "train"), FREEZE)
STAGE2 = (("fusion/.*", "train"), ("llm/.*", "train"), FREEZE)
ROWS, LENGTH = 2, 44  # no other axis of the tiny model is 44 long


# ---- Against programs ------------------------------------------------------------------------------------------------


def products(jaxpr, causal=(LENGTH,)):
    """FLOPs of the matrix products in a traced program without loops; causal attention's halved."""
    total = 0
    for equation in jaxpr.eqns:
        assert equation.primitive.name not in ("scan", "while", "conv_general_dilated")
        if equation.primitive.name == "dot_general":
            (contracted, _), (batched, _) = equation.params["dimension_numbers"]
            left, (out,) = equation.invars[0].aval.shape, equation.outvars
            flops = 2 * math.prod(out.aval.shape) * math.prod(left[axis] for axis in contracted)
            halved = batched and {*causal} & {*left, *out.aval.shape}
            total += flops // 2 if halved else flops
        for inner in equation.params.values():
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                total += products(getattr(inner, "jaxpr", inner), causal)
    return total


def traced(config, rules, images_per_row, causal=False):
    """FLOPs of the model's forward pass, or of forward and backward where rules are given."""
    plan = blueprint(config)
    learned = trainable_paths(rules, plan.shapes) if rules else set()
    trees = [{path: leaf for path, leaf in plan.shapes.items() if (path in learned) == kept} for kept in (True, False)]
    side = vision_preset(config.vision).image_size
    tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    images = jax.ShapeDtypeStruct((ROWS, images_per_row, side, side, 3), jnp.uint8)

    def loss(trainable, frozen, tokens, images):
        if config.cells:
            return plan.merge(trainable, frozen).cell_scores(images).sum()
        return plan.merge(trainable, frozen)(tokens, tokens, tokens, tokens, images).sum()

    function = jax.grad(loss) if rules else loss
    return products(jax.make_jaxpr(function)(*trees, tokens, images).jaxpr)


def config_of(llm="llama-tiny", vision="clip-tiny", **how):
    how = {"fusion": "mbtf_stf", "mbtf_hidden": 24, "stf_hidden": 56, **how}
    return ModelConfig(vision, llm, FusionConfig(**how), "float32", scan_layers=False, remat="none")


CASES = {
    "forward": (config_of(), None, 2),
    "stage 1": (config_of(), STAGE1, 2),
    "stage 2": (config_of(), STAGE2, 2),
    "text alone": (config_of(), (("llm/.*", "train"), FREEZE), 0),
    "text beside a frozen fusion": (config_of(), (("llm/.*", "train"), FREEZE), 1),
    "all": (config_of(), ((".*", "train"),), 1),
    "tower": (config_of(), (("vision/.*", "train"), FREEZE), 1),
    "class token": (config_of(), (("vision/class_token", "train"), FREEZE), 1),
    "tower's norms": (config_of(), (("vision/blocks/mlp_norm/.*", "train"), FREEZE), 1),
    "keys": (config_of(), (("llm/blocks/attention/key/.*", "train"), FREEZE), 0),
    "values": (config_of(), (("llm/blocks/attention/value/.*", "train"), FREEZE), 0),
    "what MLPs give": (config_of(), (("llm/blocks/mlp/down/.*", "train"), FREEZE), 0),
    "last norm": (config_of(), (("llm/norm/.*", "train"), FREEZE), 1),
    "taps below the top": (config_of(taps=(2, 1)), STAGE2, 1),
    "the embedding tapped": (config_of(taps=(0,), fusion="mlp"), ((".*", "train"),), 1),
    "padded grid": (config_of(kernel=3, pad_grid=True), STAGE1, 1),
    "the figure's": (config_of(variant="paper"), STAGE2, 1),
    "Qwen2's biases": (config_of("qwen2-tiny"), (("llm/blocks/attention/query/bias", "train"), FREEZE), 0),
    "Qwen3's norms": (config_of("qwen3-tiny"), (("llm/blocks/attention/key_norm/.*", "train"), FREEZE), 0),
    "SigLIP": (config_of(vision="siglip-tiny"), ((".*", "train"),), 1),
    **{name: (config_of(fusion=name), STAGE1, 1) for name in fusion.FUSIONS},
    "queries": (config_of(fusion="resampler"), (("fusion/tokens/queries", "train"), FREEZE), 1),
    "norms of patches": (config_of(fusion="resampler"), (("fusion/tokens/blocks/patch_norm/.*", "train"), FREEZE), 1),
    "cells": (dataclasses.replace(config_of(), cells=2), (("(vision|cells)/.*", "train"), FREEZE), 2),
    "cells on a frozen tower": (dataclasses.replace(config_of(), cells=2), (("cells/.*", "train"), FREEZE), 1),
    "packer's values": (config_of(fusion="token_packer"), (("fusion/tokens/values/.*", "train"), FREEZE), 1),
    "packer, padded": (config_of(fusion="token_packer", kernel=3, pad_grid=True), STAGE1, 1),
    "resampler, not": (config_of(fusion="resampler", kernel=3, pad_grid=True), STAGE1, 1),
}


@pytest.fixture
def variants(monkeypatch):
    presets = tiny.presets
    tower, decoder = presets.VISION["clip-tiny"], presets.LLM["llama-tiny"]
    siglip = dataclasses.replace(presets.VISION["siglip-b-16-256"], image_size=64, width=32, layers=2, heads=4, mlp=48)
    monkeypatch.setitem(presets.VISION, "siglip-tiny", siglip)
    monkeypatch.setitem(presets.LLM, "llama-deep-tiny", dataclasses.replace(decoder, layers=4))
    monkeypatch.setitem(presets.LLM, "qwen2-tiny", dataclasses.replace(decoder, qkv_bias=True, tied=False))
    monkeypatch.setitem(presets.LLM, "qwen3-tiny", dataclasses.replace(decoder, qk_norm=True, head_dim=16))
    assert LENGTH not in (tower.width, tower.mlp, tower.grid**2 + 1, decoder.vocab, decoder.mlp)


# Depth-wise convolutions are nine shifted products a channel there, and no products of matrices: for 16 patches and 4
# tokens of 32 channels in each of two images_per_row, forward and twice backward. The abstractor has three at either.
DEPTHWISE = {"ldp_v2": 3 * 2 * 9 * 32 * 2 * 4, "c_abstractor": 3 * 2 * 9 * 32 * 2 * 3 * (16 + 4)}


@pytest.mark.usefixtures("variants")
@pytest.mark.parametrize("case", CASES)
def test_the_count_is_that_of_the_traced_program(case):
    config, rules, images_per_row = CASES[case]
    if rules is None:
        assert forward_flops(config, ROWS, LENGTH, images_per_row).forward == traced(config, None, images_per_row)
    else:
        found = step_flops(config, rules, ROWS, LENGTH, images_per_row).step
        assert found - DEPTHWISE.get(config.fusion.fusion, 0) == traced(config, rules, images_per_row)


def test_a_token_costs_what_the_traced_program_reads():
    config = config_of()
    plan, llm, slots = blueprint(config), tiny.presets.LLM["llama-tiny"], 21
    cache = [jax.ShapeDtypeStruct((ROWS, llm.kv_heads, slots, llm.head_dim), jnp.float32)] * 2

    def extend(params, tokens, cache, filled):
        model = plan.merge(params)
        places = [(jnp.int32(3), filled)] * llm.layers
        hidden, _ = model.llm.extend(model.llm.embed(tokens, model.dtype), tokens, cache, places)
        return model.llm.logits(hidden)

    tokens, filled = jax.ShapeDtypeStruct((ROWS, 1), jnp.int32), jax.ShapeDtypeStruct((ROWS, slots), bool)
    jaxpr = jax.make_jaxpr(extend)(plan.shapes, tokens, (tuple(cache),) * llm.layers, filled)
    assert decode_flops(config, ROWS, slots) == products(jaxpr.jaxpr)


# ---- Against the compiler --------------------------------------------------------------------------------------------

# The compiler counts norms, activations, softmax and AdamW too, so shapes are wide and rows many: that is 1 % then.
WITHIN = 0.02


@pytest.fixture
def wide(monkeypatch):
    presets = tiny.presets
    tower = dataclasses.replace(
        presets.VISION["clip-mini-16-96"], image_size=128, width=1024, layers=3, heads=16, mlp=4096
    )
    decoder = dataclasses.replace(
        presets.LLM["vicuna-7b"], vocab=4096, width=2048, layers=2, heads=16, kv_heads=8, mlp=5504
    )
    monkeypatch.setitem(presets.VISION, "clip-wide", tower)
    monkeypatch.setitem(presets.LLM, "llama-wide", decoder)


def wide_config(name="mbtf_stf", **how):
    how = {"depth": 1, **how}  # one block of the rivals tells what two would
    return ModelConfig("clip-wide", "llama-wide", FusionConfig(name, **how), "float32", scan_layers=False, remat="none")


def compiled(call, *arguments):
    """FLOPs as XLA's CPU compiler counts them in what it has made of the program."""
    return jax.jit(call).lower(*arguments).compile().cost_analysis()["flops"]


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("what", ["prefill", "decode", "stage 1", "stage 2"])
def test_the_count_is_the_compiler_s(what):
    rows, length, model = 2, 1024, wide_config()
    config = TrainConfig(
        global_batch_size=rows,
        rules={"stage 1": STAGE1}.get(what, STAGE2),
        model=model,
        data=DataConfig(max_length=length),
        mesh=MeshConfig(1, 1, 1),
        eval=EvalConfig(batch=rows),
    )
    program = make_program(config, what if what in ("prefill", "decode") else "train", jax.devices()[:1])
    found = program.compile().cost_analysis()["flops"]
    if what == "decode":
        wanted = decode_flops(model, rows, program.length)
    else:
        # The program computes five eighths of T², in four spans of queries, and masks one of them; we count the others.
        llm = llm_preset(model.llm)
        masked = llm.layers * rows * length**2 * llm.heads * llm.head_dim // 4  # of a product
        if what == "prefill":
            forward = forward_flops(model, rows, length, 1)
            wanted = forward.forward - forward.head + forward.head // length + 2 * masked
        else:
            wanted = step_flops(model, config.rules, rows, length, 1).step + 6 * masked
    assert wanted <= found <= (1 + WITHIN) * wanted


@pytest.mark.usefixtures("wide")
def test_the_tower_s_count_is_the_compiler_s():
    config, vision = wide_config("mlp"), vision_preset("clip-wide")
    graph, weights = nnx.split(nnx.eval_shape(lambda: VisionTower(nnx.Rngs(0), vision, scan=False)))
    images = jax.ShapeDtypeStruct((ROWS, vision.image_size, vision.image_size, 3), jnp.uint8)
    taps = fusion.tapped_blocks(config.fusion, vision.layers)
    found = compiled(lambda w, x: nnx.merge(graph, w)(x, taps, jnp.float32), weights, images)
    wanted = forward_flops(config, ROWS, 1, 1).vision
    assert wanted <= found <= (1 + WITHIN) * wanted


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("case", [*fusion.FUSIONS, "paper's STF"])
def test_a_fusion_s_count_is_the_compiler_s(case):
    config = wide_config("mbtf_stf", variant="paper") if case == "paper's STF" else wide_config(case)
    vision, width = vision_preset(config.vision), llm_preset(config.llm).width
    graph, weights = nnx.split(nnx.eval_shape(lambda: fusion.Fusion(nnx.Rngs(0), config.fusion, vision, width)))
    taps = fusion.tapped_blocks(config.fusion, vision.layers)
    states = (jax.ShapeDtypeStruct((ROWS, vision.grid**2, vision.width), jnp.float32),) * len(taps)

    def forward(weights, states):
        return nnx.merge(graph, weights)(states)

    def both(weights, states, cotangent):
        out, back = jax.vjp(lambda weights: forward(weights, states), weights)
        return out, back(cotangent)

    out = jax.eval_shape(forward, weights, states)
    found = compiled(forward, weights, states), compiled(both, weights, states, out)
    for ours, theirs in zip(fusion_flops(config, ROWS), found, strict=True):
        assert ours <= theirs <= (1 + WITHIN) * ours


@pytest.mark.usefixtures("variants")
@pytest.mark.parametrize(
    ("reduce", "keep", "vision", "how"),
    [
        ("fastv", 5, "clip-tiny", {"fusion": "mlp"}),
        ("fastv", 1, "clip-tiny", {"fusion": "mbtf_stf"}),
        ("random", 9, "clip-tiny", {"fusion": "mlp"}),
        ("visionzip", 9, "clip-tiny", {"fusion": "mlp"}),
        ("visionzip", 13, "clip-tiny", {"fusion": "mbtf", "taps": (3, 1)}),
        ("visionzip", 9, "siglip-tiny", {"fusion": "mlp"}),
    ],
)
def test_reading_and_answering_with_fewer_image_tokens(reduce, keep, vision, how):
    config = dataclasses.replace(config_of("llama-deep-tiny", vision, **how), reduce=reduce, keep=keep)
    plan, llm, side, images_per_row = blueprint(config), tiny.presets.LLM["llama-deep-tiny"], 64, 2
    tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    images = jax.ShapeDtypeStruct((ROWS, images_per_row, side, side, 3), jnp.uint8)
    lengths = jax.ShapeDtypeStruct((ROWS,), jnp.int32)

    def read(params, tokens, lengths, images):
        return plan.merge(params).prefill(tokens, tokens, lengths, images)[:2]

    jaxpr, (_, cache) = jax.make_jaxpr(read, return_shape=True)(plan.shapes, tokens, lengths, images)
    shorter = LENGTH - images_per_row * (slots_per_image(config) - keep)
    assert [keys.shape[2] for keys, _ in cache] == [LENGTH] * 2 + [shorter] * 2
    found = forward_flops(config, ROWS, LENGTH, images_per_row)
    ranking = 2 * ROWS * LENGTH * llm.heads * llm.head_dim * (reduce == "fastv")
    # The products that one position's attention makes are not halved, as a causal one's are.
    assert found.forward - found.head == products(jaxpr.jaxpr, (LENGTH, shorter)) + ranking // 2

    def extend(params, tokens, cache, filled):
        model = plan.merge(params)
        places = [(jnp.int32(3), of_it) for of_it in filled]
        hidden, _ = model.llm.extend(model.llm.embed(tokens, model.dtype), tokens, cache, places)
        return model.llm.logits(hidden)

    filled = [jax.ShapeDtypeStruct((ROWS, keys.shape[2]), bool) for keys, _ in cache]
    jaxpr = jax.make_jaxpr(extend)(plan.shapes, jax.ShapeDtypeStruct((ROWS, 1), jnp.int32), cache, filled)
    assert decode_flops(config, ROWS, LENGTH, images_per_row) == products(jaxpr.jaxpr, ())


# ---- By hand and by others -------------------------------------------------------------------------------------------

VICUNA = 32 * (4 * 4096**2 + 3 * 4096 * 11_008)  # parameters in matrices of the blocks
HEAD = 32_000 * 4096
CLIP = 4 * 1024**2 + 2 * 1024 * 4096  # of one block


def test_the_paper_s_model_by_hand():
    """Stage 1 and 2 with one image in a row of 2048 tokens, each part and each gradient."""
    matrices, head = 2048 * 2 * VICUNA, 2048 * 2 * HEAD
    attention = 32 * 2 * 2048 * 2048 * 4096  # layers × products × 2 · T²/2 · H·Dh
    blocks = 23 * (577 * 2 * CLIP + 2 * 2 * 577 * 577 * 1024)  # all but the last
    tower = 576 * 2 * (14 * 14 * 3 * 1024) + blocks
    first = 576 * 2 * (8192 * 4096)
    fusion = first + 576 * 2 * (4096 * 1024) + 144 * 2 * (2 * 2 * 1024 * 16_384 + 16_384 * 4096)
    for rules, times in ((STAGE1, 2), (STAGE2, 3)):
        found = step_flops(ModelConfig(), rules, 1, 2048, 1)
        assert (found.vision, found.fusion, found.llm, found.head) == (tower, fusion, matrices + attention, head)
        assert found.step == tower + 3 * fusion - first + times * (matrices + head) + 3 * attention
        assert step_flops(ModelConfig(), rules, 128, 2048, 1).step == 128 * found.step


def test_six_for_each_parameter_and_token():
    """The rule of thumb (arXiv 2001.08361), and PaLM's 6·N + 12·L·H·Q·T (appendix B) with causal attention at half."""
    found = step_flops(ModelConfig(), ((".*", "train"),), 4, 2048, 0).step / (4 * 2048)
    assert found == 6 * (VICUNA + HEAD) + 6 * 32 * 32 * 128 * 2048
    assert found == pytest.approx(6 * 6_738_415_616, rel=0.03)  # all of Llama-7B's parameters


@pytest.mark.parametrize(
    ("tower", "layers", "gflops"),  # open_clip, docs/model_profile.csv, without their projection
    [("clip-l-14-336", 24, 381.92 - 2 * 1024 * 768e-9), ("clip-b-16-224", 12, 35.13 - 2 * 768 * 512e-9)],
)
def test_towers_as_others_profile_them(tower, layers, gflops):
    config = ModelConfig(vision=tower, llm="llama-mini", fusion=FusionConfig("mlp", taps=(layers,)))
    assert forward_flops(config, 1, 8, 1).vision / 1e9 == pytest.approx(gflops, abs=0.005)


# ---- Chips -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "units", "each", "hertz"),
    [
        ("v4", 2 * 4, 128 * 128, 1.05e9),  # matrix units of so many multiply-adds a cycle
        ("v5e", 4, 128 * 128, 1.5e9),
        ("v5p", 2 * 4, 128 * 128, 1.75e9),
        ("a6000", 84, 512, 1.8e9),  # multiprocessors
        ("a100-40", 108, 1024, 1.41e9),
        ("a100-80", 108, 1024, 1.41e9),
        ("h100", 132, 2048, 1.83e9),
        ("h200", 132, 2048, 1.83e9),
    ],
)
def test_a_chip_multiplies_as_fast_as_its_units(name, units, each, hertz):
    assert CHIPS[name].flops == pytest.approx(2 * units * each * hertz, rel=0.003)


def test_chips_are_told_by_their_kind():
    for name, kind in {"v5e": "TPU v5 lite", "v5p": "TPU v5", "h100": "NVIDIA H100 80GB HBM3"}.items():
        assert find_chip(types.SimpleNamespace(device_kind=kind)) is CHIPS[name]
    assert find_chip(types.SimpleNamespace(device_kind="NVIDIA H100 PCIe")) is None  # which does less
    assert find_chip(jax.devices()[0]) is None
    kinds = [kind for chip in CHIPS.values() for kind in chip.kinds]
    assert len(kinds) == len(set(kinds))
    assert [name for name, chip in CHIPS.items() if name != chip.name] == []
