"""Model FLOPs against products counted in traced programs, by hand and by others; chips against their units."""

import dataclasses
import math
import types

import jax
import jax.numpy as jnp
import pytest
import tiny

from stf_jax.config import FusionConfig, ModelConfig
from stf_jax.models import fusion
from stf_jax.models.presets import vision_preset
from stf_jax.runtime.cost import CHIPS, chip_of, decode_flops, forward_flops, step_flops
from stf_jax.training.state import blueprint, trainable_paths

FREEZE = (".*", "freeze")
STAGE1 = (("fusion/.*", "train"), FREEZE)
STAGE2 = (("fusion/.*", "train"), ("llm/.*", "train"), FREEZE)
ROWS, LENGTH = 2, 44  # no other axis of the tiny model is 44 long


# ---- Against programs ------------------------------------------------------------------------------------------------


def products(jaxpr):
    """FLOPs of the matrix products in a traced program without loops; causal attention's halved."""
    total = 0
    for equation in jaxpr.eqns:
        assert equation.primitive.name not in ("scan", "while", "conv_general_dilated")
        if equation.primitive.name == "dot_general":
            (contracted, _), (batched, _) = equation.params["dimension_numbers"]
            left, (out,) = equation.invars[0].aval.shape, equation.outvars
            flops = 2 * math.prod(out.aval.shape) * math.prod(left[axis] for axis in contracted)
            total += flops // 2 if batched and LENGTH in (*left, *out.aval.shape) else flops
        for inner in equation.params.values():
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                total += products(getattr(inner, "jaxpr", inner))
    return total


def traced(config, rules, pictures, causal=False):
    """FLOPs of the model's forward pass, or of forward and backward where rules are given."""
    plan = blueprint(config)
    learned = trainable_paths(rules, plan.shapes) if rules else set()
    trees = [{path: leaf for path, leaf in plan.shapes.items() if (path in learned) == kept} for kept in (True, False)]
    side = vision_preset(config.vision).image_size
    tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    images = jax.ShapeDtypeStruct((ROWS, pictures, side, side, 3), jnp.uint8)

    def loss(trainable, frozen, tokens, images):
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
}


@pytest.fixture
def variants(monkeypatch):
    presets = tiny.presets
    tower, decoder = presets.VISION["clip-tiny"], presets.LLM["llama-tiny"]
    siglip = dataclasses.replace(presets.VISION["siglip-b-16-256"], image_size=64, width=32, layers=2, heads=4, mlp=48)
    monkeypatch.setitem(presets.VISION, "siglip-tiny", siglip)
    monkeypatch.setitem(presets.LLM, "qwen2-tiny", dataclasses.replace(decoder, qkv_bias=True, tied=False))
    monkeypatch.setitem(presets.LLM, "qwen3-tiny", dataclasses.replace(decoder, qk_norm=True, head_dim=16))
    assert LENGTH not in (tower.width, tower.mlp, tower.grid**2 + 1, decoder.vocab, decoder.mlp)


@pytest.mark.usefixtures("variants")
@pytest.mark.parametrize("case", CASES)
def test_the_count_is_that_of_the_traced_program(case):
    config, rules, pictures = CASES[case]
    if rules is None:
        assert forward_flops(config, ROWS, LENGTH, pictures).forward == traced(config, None, pictures)
    else:
        assert step_flops(config, rules, ROWS, LENGTH, pictures).step == traced(config, rules, pictures)


def test_a_token_costs_what_the_traced_program_reads():
    config = config_of()
    plan, llm, slots = blueprint(config), tiny.presets.LLM["llama-tiny"], 21
    cache = [jax.ShapeDtypeStruct((ROWS, llm.kv_heads, slots, llm.head_dim), jnp.float32)] * 2

    def extend(params, tokens, cache, filled):
        model = plan.merge(params)
        hidden, _ = model.llm.extend(model.llm.embed(tokens, model.dtype), tokens, cache, jnp.int32(3), filled)
        return model.llm.logits(hidden)

    tokens, filled = jax.ShapeDtypeStruct((ROWS, 1), jnp.int32), jax.ShapeDtypeStruct((ROWS, slots), bool)
    jaxpr = jax.make_jaxpr(extend)(plan.shapes, tokens, (tuple(cache),) * llm.layers, filled)
    assert decode_flops(config, ROWS, slots) == products(jaxpr.jaxpr)


# ---- By hand and by others -------------------------------------------------------------------------------------------

VICUNA = 32 * (4 * 4096**2 + 3 * 4096 * 11_008)  # parameters in matrices of the blocks
HEAD = 32_000 * 4096
CLIP = 4 * 1024**2 + 2 * 1024 * 4096  # of one block


def test_the_paper_s_model_by_hand():
    """Stage 1 and 2 with one picture in a row of 2048 tokens, each part and each gradient."""
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
        assert chip_of(types.SimpleNamespace(device_kind=kind)) is CHIPS[name]
    assert chip_of(types.SimpleNamespace(device_kind="NVIDIA H100 PCIe")) is None  # which does less
    assert chip_of(jax.devices()[0]) is None
    kinds = [kind for chip in CHIPS.values() for kind in chip.kinds]
    assert len(kinds) == len(set(kinds))
    assert [name for name, chip in CHIPS.items() if name != chip.name] == []
