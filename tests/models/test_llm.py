"""The decoder against transformers: same weights and tokens give the same logits, for every supported family."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from reference import decoder_params
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from stf_jax.config import MeshConfig
from stf_jax.models.decoders.base import LLMConfig, RopeScaling
from stf_jax.models.decoders.transformer import Decoder, rope_angles, sharded_embedding_lookup
from stf_jax.parallel.mesh import compute_context, make_mesh

LLAMA = LLMConfig(vocab=61, width=32, layers=3, heads=4, kv_heads=2, head_dim=8, mlp=48, norm_eps=1e-3)
# Lengths at which an 8-channel head has one frequency of each kind: unchanged, on the ramp, scaled.
LLAMA3 = RopeScaling("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=100)
LINEAR = RopeScaling("linear", factor=4.0)


@dataclasses.dataclass(frozen=True)
class Family:
    kind: type
    model: type
    config: LLMConfig
    extra: tuple = ()

    @functools.cached_property
    def torch_model(self):
        config, scaling = self.config, self.config.rope_scaling
        rope = {"rope_type": "default", "rope_theta": config.rope_theta}
        if scaling is not None:
            rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling is LLAMA3:
            rope |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_length,
            }
        model = self.model(
            self.kind(
                vocab_size=config.vocab,
                hidden_size=config.width,
                intermediate_size=config.mlp,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.kv_heads,
                head_dim=config.head_dim,
                rms_norm_eps=config.norm_eps,
                tie_word_embeddings=config.tied,
                rope_parameters=rope,
                **dict(self.extra),
            )
        )
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():  # biases and norms large enough to matter, attention far from uniform
                p.add_(torch.randn(p.shape, generator=generator) * (1.5 * p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3))
        return model.eval()

    @functools.cached_property
    def state_dict(self):
        return {name: tensor.numpy() for name, tensor in self.torch_model.state_dict().items()}

    def logits(self, tokens):
        with torch.no_grad():
            return self.torch_model(torch.from_numpy(tokens).long()).logits.numpy()

    def decoder(self, *, scan=True, remat="none"):
        model = nnx.eval_shape(lambda: Decoder(nnx.Rngs(0), self.config, scan=scan, remat=remat))
        nnx.update(model, jax.tree.map(jnp.asarray, decoder_params(self.state_dict, self.config)))
        return model


def _llama(**changes):
    return Family(LlamaConfig, LlamaForCausalLM, dataclasses.replace(LLAMA, **changes))


FAMILIES = {
    "llama": _llama(),
    "llama-multihead": _llama(kv_heads=4),
    "llama-tied": _llama(tied=True, layers=2),
    "llama-rope-llama3": _llama(rope_theta=100.0, rope_scaling=LLAMA3),
    "llama-rope-linear": _llama(rope_scaling=LINEAR),
    "mistral": Family(MistralConfig, MistralForCausalLM, LLAMA, (("sliding_window", None),)),
    "qwen2": Family(Qwen2Config, Qwen2ForCausalLM, dataclasses.replace(LLAMA, qkv_bias=True, rope_theta=1e6)),
    "qwen3": Family(Qwen3Config, Qwen3ForCausalLM, dataclasses.replace(LLAMA, qk_norm=True, head_dim=12)),
}


def read(model, tokens, positions=None, segments=None, dtype=jnp.float32):
    if positions is None:
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    graph, state = nnx.split(model)

    @jax.jit
    def run(state):
        model = nnx.merge(graph, state)
        x = model(model.embed(jnp.asarray(tokens), dtype), jnp.asarray(positions), segments)
        return model.logits(x)

    return run(state)


def some_tokens(rows, length, seed=3):
    return np.random.default_rng(seed).integers(0, LLAMA.vocab, (rows, length), np.int32)


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers(name, scan):
    family, tokens = FAMILIES[name], some_tokens(2, 40)
    ours, expected = read(family.decoder(scan=scan), tokens), family.logits(tokens)
    assert ours.dtype == jnp.float32
    assert expected.std() > 0.5
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)


def test_packed_conversations_are_independent():
    model = FAMILIES["qwen3"].decoder()
    first, second = some_tokens(1, 7, seed=4), some_tokens(1, 9, seed=5)
    packed = np.concatenate([first, second, np.zeros((1, 4), np.int32)], axis=1)
    positions = np.concatenate([np.arange(7), np.arange(9), np.arange(4)])[None]
    segments = np.repeat([1, 2, 0], [7, 9, 4])[None]
    logits = read(model, packed, positions, jnp.asarray(segments))
    np.testing.assert_allclose(logits[:, :7], read(model, first), atol=1e-5)
    np.testing.assert_allclose(logits[:, 7:16], read(model, second), atol=1e-5)
    assert np.abs(logits[:, 7:16] - read(model, packed)[:, 7:16]).max() > 0.1  # the logits differ without segments


def test_decoder_is_causal():
    tokens = np.repeat(some_tokens(1, 12), 13, axis=0)
    for t in range(12):  # row t differs from the last row in token t alone
        tokens[t, t] = (tokens[t, t] + 1) % LLAMA.vocab
    logits = read(FAMILIES["llama"].decoder(), tokens)
    for t in range(12):
        difference = np.abs(logits[t] - logits[-1]).max(-1)
        assert (difference[:t] < 1e-6).all()
        assert (difference[t:] > 1e-3).all()


def value_and_gradients(remat, scan):
    """The value, the gradients, and how many numbers the forward pass keeps on the device for the backward pass."""
    graph, state = nnx.split(FAMILIES["llama-tied"].decoder(remat=remat, scan=scan))
    tokens = some_tokens(2, 10)

    def loss(state):
        model = nnx.merge(graph, state)
        positions = jnp.broadcast_to(jnp.arange(10), tokens.shape)
        x = model(model.embed(jnp.asarray(tokens), jnp.float32), positions, None)
        return jnp.square(model.logits(x)).mean()

    residuals = jax.make_jaxpr(lambda state: jax.vjp(loss, state)[1])(state).out_avals
    kept = sum(x.size for x in residuals if x.memory_space == jax.memory.Space.Device)
    return *jax.jit(jax.value_and_grad(loss))(state), kept


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
def test_remat_keeps_value_and_gradients_with_fewer_residuals(scan):
    value, gradients, kept = value_and_gradients("none", scan)
    for remat in ("dots", "mlp", "attention", "full", "offload"):
        before = kept
        same_value, same_gradients, kept = value_and_gradients(remat, scan)
        np.testing.assert_allclose(same_value, value, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), same_gradients, gradients)
        assert kept < before


@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_rope_angles_are_float32_exact(theta):
    positions = np.array([0, 1, 255, 256, 257, 1023, 2047, 4095])
    config = dataclasses.replace(LLAMA, head_dim=128, rope_theta=theta)
    cos, sin = rope_angles(config, jnp.asarray(positions, jnp.int32)[None])
    angles = positions[:, None] * theta ** (-np.arange(0, 128, 2, dtype=np.float64) / 128)
    assert cos.dtype == sin.dtype == jnp.float32
    # A float32 frequency has a relative error of a few ulp (6e-8), which the position multiplies.
    tolerance = (1e-6 + 3e-7 * positions)[:, None]
    assert (np.abs(cos[0, :, 0] - np.cos(angles)) < tolerance).all()
    assert (np.abs(sin[0, :, 0] - np.sin(angles)) < tolerance).all()


def test_bfloat16_is_accurate_at_late_positions():
    family, tokens = FAMILIES["llama"], some_tokens(1, 16)
    positions = 300 + np.arange(16)[None]
    model = family.decoder()
    exact = np.asarray(read(model, tokens, positions))
    error = np.asarray(read(model, tokens, positions, dtype=jnp.bfloat16)) - exact
    assert 0 < np.linalg.norm(error) < 0.03 * np.linalg.norm(exact)


@pytest.mark.parametrize("mesh", [None, (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)])
def test_embedding_lookup_and_its_gradients(mesh):
    """The gradient of a token that occurs 300 times would be too small in bfloat16, which cannot count beyond 256."""
    rng = np.random.default_rng(0)
    table, tokens = rng.standard_normal((16, 32), np.float32), rng.integers(0, 16, (8, 64)).astype(np.int32)
    tokens[:5, :60] = 3
    tokens[6, :20] = -1
    context = compute_context(make_mesh(MeshConfig(*mesh)), "bfloat16") if mesh else contextlib.nullcontext()
    with context:
        lookup = jax.jit(lambda table: sharded_embedding_lookup(table, jnp.asarray(tokens), jnp.bfloat16))
        rows, vjp = jax.vjp(lookup, table)
        (gradient,) = vjp(jnp.ones_like(rows))
    is_token = tokens >= 0
    np.testing.assert_array_equal(rows, np.where(is_token[..., None], table[tokens], 0).astype(jnp.bfloat16))
    assert gradient.dtype == jnp.float32
    counts = np.bincount(tokens[is_token], minlength=16)
    assert counts.max() > 300
    np.testing.assert_array_equal(gradient, np.broadcast_to(counts[:, None], (16, 32)))


@pytest.mark.usefixtures("optimized")
def test_embedding_table_does_not_cross_the_mesh():
    mesh, rows = make_mesh(MeshConfig(1, 8, 1)), jax.sharding.PartitionSpec(("data", "fsdp"))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("tensor", "fsdp"))
    table = jax.ShapeDtypeStruct((4096, 256), jnp.float32, sharding=sharding)
    tokens = jax.ShapeDtypeStruct((8, 4), jnp.int32, sharding=jax.sharding.NamedSharding(mesh, rows))

    def loss(table, tokens):
        return jnp.square(sharded_embedding_lookup(table, tokens, jnp.float32)).sum()

    with compute_context(mesh, "float32"):
        text = jax.jit(jax.grad(loss), out_shardings=sharding).lower(table, tokens).compile().as_text()
    assert "f32[4096,32]" in text  # what a device holds
    assert "f32[4096,256]" not in text
