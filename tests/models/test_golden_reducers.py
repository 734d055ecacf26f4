"""Reducers against expected values that the authors' own programs computed (golden/), from seeded inputs.

The programs ran unchanged but for import lines, in float32 on a CPU with torch 2.13 and transformers 4.37.2:

- FastV, pkunlp-icler/FastV at d165972: the Llama model of its fork of transformers, token drop in place, K = 2 and 3.
- PyramidDrop, Cooperx521/PyramidDrop at 6444f30: ``pdrop_forward`` with drops after layers 1, 2 and 3, ratios 0.5, 0.25
  and 0.125, for a prompt and then, with its cache, three more tokens. (The model has as many key heads as query heads,
  because that program cannot rank with fewer.)
- VisionZip, dvlab-research/VisionZip at 3151f6d: its forward pass of transformers' CLIP model; the class token, which
  it puts first, is left out.
- DivPrune, vbdi/divprune at 799e2d9: the method ``DivPrune``, for 7, 16 and 32 of 64 tokens. The picks are in their
  order.
- DART: ``get_retained_image_token`` in the copy of ModelTC/LightCompress at 9701d03, because the authors' repository
  was not in reach. Its pivots take turns in the order of a Python set, which for positions below 32 is ascending.

Golden files have 4 decimals, VisionZip's 3.
"""

import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx

from stf_jax.models.decoders.base import LLMConfig
from stf_jax.models.decoders.transformer import Decoder
from stf_jax.models.reducers import dart, divprune, visionzip
from stf_jax.models.reducers.base import Reduction, find_reducer, plan_stages
from stf_jax.models.towers.base import VisionConfig
from stf_jax.models.towers.vit import VisionTower

GOLDEN = pathlib.Path(__file__).parent / "golden"


def golden(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def draw(rng, shape, bias=False):
    x = rng.standard_normal(shape, np.float32)
    if bias:
        return np.float32(0.2) * x
    return 1 + np.float32(0.2) * x if len(shape) == 1 else np.float32(1.5 * shape[-1] ** -0.5) * x


# ---- In the decoder --------------------------------------------------------------------------------------------------

LLM = LLMConfig(vocab=62, width=32, layers=4, heads=4, kv_heads=4, head_dim=8, mlp=48, norm_eps=1e-3)
LAYER = (
    ("input_layernorm.weight", (32,)),
    *((f"self_attn.{name}_proj.weight", (32, 32)) for name in "qkvo"),
    ("post_attention_layernorm.weight", (32,)),
    ("mlp.gate_proj.weight", (48, 32)),
    ("mlp.up_proj.weight", (48, 32)),
    ("mlp.down_proj.weight", (32, 48)),
)
TEXT, IMAGE, PROMPT = 3, 16, 25  # text before the image, the image, and the prompt; 3 tokens of an answer follow


@functools.cache
def decoder_and_inputs():
    rng = np.random.default_rng(7)
    shapes = [("model.embed_tokens.weight", (62, 32)), ("model.norm.weight", (32,)), ("lm_head.weight", (62, 32))]
    shapes += [(f"model.layers.{layer}.{name}", shape) for layer in range(LLM.layers) for name, shape in LAYER]
    state = {name: draw(rng, shape) for name, shape in shapes}
    model = nnx.eval_shape(lambda: Decoder(nnx.Rngs(0), LLM))
    nnx.update(model, jax.tree.map(jnp.asarray, reference.decoder_params(state, LLM)))
    return model, jnp.asarray(np.random.default_rng(8).standard_normal((1, PROMPT + 3, 32), np.float32))


def prefill(name, keep):
    """The decoder's states after reading the prompt with a reducer, its cache and the reduction."""
    model, x = decoder_and_inputs()
    reducer, is_image = find_reducer(name), np.zeros((1, PROMPT), bool)
    is_image[:, TEXT : TEXT + IMAGE] = True
    stages = plan_stages(name, IMAGE, keep, reducer.drops(LLM.layers), LLM.layers, reducer.count)
    reduction = Reduction(name, IMAGE, keep, reducer, stages)

    @jax.jit
    def read(x):
        selections, length = reduction.select_tokens(jnp.asarray(is_image), jnp.array([PROMPT]), 1, model.norm)
        positions = jnp.arange(PROMPT)[None]
        return *model.prefill(x, positions, selections), length

    hidden, cache, length = read(x[:, :PROMPT])
    assert length.tolist() == [PROMPT - IMAGE + stages[-1].keep]
    return hidden[0], cache, reduction


@pytest.mark.parametrize("after", [2, 3])
def test_fastv(after):
    hidden, cache, _ = prefill(f"fastv:after={after}", 4)
    assert [keys.shape[2] for keys, _ in cache] == [25] * after + [13] * (4 - after)
    np.testing.assert_allclose(hidden, golden("fastv")[str(after)], atol=1e-4)


def test_pyramiddrop():
    expected, (model, x) = golden("pyramiddrop"), decoder_and_inputs()
    hidden, cache, reduction = prefill("pyramiddrop", 2)
    assert [keys.shape[2] for keys, _ in cache] == [25, 17, 13, 11]
    np.testing.assert_allclose(hidden, expected["prompt"], atol=1e-4)
    shifts = [reduction.position_shift(layer) for layer in range(LLM.layers)]
    assert shifts == [0, 8, 12, 14]
    cache = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 3), (0, 0))), cache)

    @jax.jit
    def extend(x, cache, i):
        lengths = [keys.shape[2] - 3 for keys, _ in cache]
        slots = [(length + i, jnp.arange(length + 3)[None] <= length + i) for length in lengths]
        return model.extend(x, [(PROMPT + i - shift)[None, None] for shift in shifts], cache, slots)

    for i in range(3):
        hidden, cache = extend(x[:, PROMPT + i : PROMPT + i + 1], cache, jnp.int32(i))
        np.testing.assert_allclose(hidden[0, 0], expected["answer"][i], atol=1e-4)


def test_dart():
    for case, (image, keep) in enumerate(((0, 12), (2, 12), (3, 12))):
        rng = np.random.default_rng([12, case])
        states, keys = rng.standard_normal((1, 31, 32), np.float32), rng.standard_normal((1, 31, 2, 8), np.float32)
        is_image = (np.arange(31) >= image) & (np.arange(31) < image + 20)
        arrays = map(jnp.asarray, (keys, keys, is_image[None], [31], states, [keep]))
        scores = jax.jit(dart.score_dissimilar)(*arrays)[0]
        assert np.flatnonzero(scores).tolist() == golden("dart")[case]


# ---- Before the decoder ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [7, 16, 32])
def test_divprune(keep):
    tokens = np.random.default_rng(11).standard_normal((3, 64, 12), np.float32)
    expected = [sorted(picks[:keep]) for picks in golden("divprune")]
    assert divprune.pick_diverse(jnp.asarray(tokens), keep).tolist() == expected


def test_visionzip():
    config = VisionConfig(
        family="clip", image_size=56, patch_size=7, width=32, layers=3, heads=2, mlp=48, norm_eps=1e-3,
        class_token=True, pre_norm=True, patch_bias=False, activation="quick_gelu",
        mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711),
    )  # fmt: skip
    vectors, matrices = {"weight": (32,), "bias": (32,)}, {"weight": (32, 32), "bias": (32,)}
    layer = {f"layer_norm{i}.{key}": shape for i in (1, 2) for key, shape in vectors.items()}
    layer |= {
        f"self_attn.{name}_proj.{key}": shape for name in ("k", "v", "q", "out") for key, shape in matrices.items()
    }
    layer |= {"mlp.fc1.weight": (48, 32), "mlp.fc1.bias": (48,), "mlp.fc2.weight": (32, 48), "mlp.fc2.bias": (32,)}
    shapes = {"embeddings.class_embedding": (32,), "embeddings.patch_embedding.weight": (32, 3, 7, 7)}
    shapes |= {"embeddings.position_embedding.weight": (65, 32)}
    shapes |= {f"{name}.{key}": shape for name in ("pre_layrnorm", "post_layernorm") for key, shape in vectors.items()}
    shapes |= {f"encoder.layers.{i}.{name}": shape for i in range(3) for name, shape in layer.items()}
    rng = np.random.default_rng(9)
    state = {
        f"vision_model.{name}": draw(rng, shapes[name], bias=name.endswith("bias")) for name in sorted(shapes)
    }  # fmt: skip
    images = rng.integers(0, 256, (2, 56, 56, 3), np.uint8)[:1]
    tower = nnx.eval_shape(lambda: VisionTower(nnx.Rngs(0), config))
    nnx.update(tower, jax.tree.map(jnp.asarray, reference.vision_params(state, config)))
    (tokens,) = jax.jit(lambda images: visionzip.visionzip(tower, images, (2,), jnp.float32, 16))(images)
    np.testing.assert_allclose(tokens, golden("visionzip"), atol=2e-3)
