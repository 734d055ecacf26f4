"""Chunked cross-entropy against optax's over whole logits, in value and gradient, and that no whole logits are made."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stf_jax.config import MeshConfig
from stf_jax.runtime.mesh import computing, make_mesh
from stf_jax.training import loss
from stf_jax.training.loss import cross_entropy_sum

_MESHES = [None, (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)]


def _case(words=1000, rows=8, length=13, width=16, dtype=np.float32):
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((rows, length, width)).astype(dtype)
    kernel = rng.standard_normal((width, words)).astype(np.float32)
    return hidden, kernel, rng.integers(0, words, (rows, length)), rng.random((rows, length)) < 0.6


def _whole(hidden, kernel, targets, learned):
    losses = optax.softmax_cross_entropy_with_integer_labels(hidden.astype(np.float32) @ kernel, targets)
    return jnp.where(learned, losses, 0).sum()


def _value_and_gradients(call, mesh, case, by=(0, 1)):
    place = contextlib.nullcontext() if mesh is None else computing(make_mesh(MeshConfig(*mesh)), "float32")
    with place:
        return jax.jit(jax.value_and_grad(call, by))(*case)


@pytest.mark.parametrize("chunk", [2**30, 4 * 104 * 128 // 8], ids=["whole", "chunks"])
@pytest.mark.parametrize("mesh", _MESHES)
def test_value_and_gradients_are_those_of_whole_logits(mesh, chunk, monkeypatch):
    monkeypatch.setattr(loss, "_CHUNK", chunk)
    case = _case()
    ours, theirs = (_value_and_gradients(call, mesh, case) for call in (cross_entropy_sum, _whole))
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6)
    for mine, other in zip(ours[1], theirs[1], strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("words", [129, 383, 1024])
def test_words_that_no_chunk_divides(words, monkeypatch):
    monkeypatch.setattr(loss, "_CHUNK", 4 * 104 * 128)
    case = _case(words)
    ours, theirs = (_value_and_gradients(call, None, case) for call in (cross_entropy_sum, _whole))
    jax.tree.map(lambda mine, other: np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-5), ours, theirs)


def test_logits_far_from_nought_neither_overflow_nor_vanish(monkeypatch):
    monkeypatch.setattr(loss, "_CHUNK", 4 * 104 * 128)
    hidden, *rest = _case()
    case = (hidden * 40, *rest)  # up to 600: exp() of that is beyond float32
    ours, theirs = (_value_and_gradients(call, None, case) for call in (cross_entropy_sum, _whole))
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6)
    np.testing.assert_allclose(ours[1][1], theirs[1][1], rtol=1e-4, atol=1e-3)


def test_gradients_that_nobody_wants_are_not_made(monkeypatch):
    monkeypatch.setattr(loss, "_CHUNK", 4 * 104 * 128)
    hidden, kernel, targets, learned = _case()

    def products(by):
        call = jax.value_and_grad(cross_entropy_sum, by) if by else cross_entropy_sum
        return str(jax.make_jaxpr(call)(hidden, kernel, targets, learned)).count("dot_general")

    assert [products(by) for by in ((), (0,), (1,), (0, 1))] == [1, 3, 3, 4]


def test_bfloat16_sums_in_float32(monkeypatch):
    """Of logits rounded to bfloat16 the loss would be off by a hundredth; of the products' true sums it is not."""
    monkeypatch.setattr(loss, "_CHUNK", 4 * 104 * 128)
    hidden, kernel, targets, learned = _case(dtype=jnp.bfloat16)
    kernel = kernel.astype(jnp.bfloat16)
    true = _whole(hidden.astype(np.float32), kernel.astype(np.float32), targets, learned)
    logits = (jnp.asarray(hidden) @ kernel).astype(np.float32)
    rounded = _whole(logits, np.eye(1000, dtype=np.float32), targets, learned)
    ours = cross_entropy_sum(hidden, kernel, targets, learned)
    assert abs(ours - true) / true < 1e-6 < abs(rounded - true) / true
    gradients = jax.grad(cross_entropy_sum, (0, 1))(hidden, kernel, targets, learned)
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.bfloat16]


@pytest.mark.usefixtures("optimized")
def test_no_array_is_as_large_as_all_logits(monkeypatch):
    """Nor, on a mesh, as the whole head."""
    monkeypatch.setattr(loss, "_CHUNK", 4 * 128 * 128)
    case = _case(words=4096, rows=64, length=16, width=64)
    with computing(make_mesh(MeshConfig(1, 8, 1)), "float32"):
        compiled = jax.jit(jax.value_and_grad(cross_entropy_sum, (0, 1))).lower(*case).compile()
    text = compiled.as_text()
    assert "f32[128,128]" in text  # a device's 8 rows of 16, some words at a time
    assert "f32[128,4096]" not in text
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * (64 * 4096 + 128 * 4096)
