"""Chunked cross-entropy against optax's over full logits, in value and gradient, and its memory."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stf_jax.config import MeshConfig
from stf_jax.parallel.mesh import compute_context, make_mesh
from stf_jax.training.loss import chunks_of, cross_entropy_sum

_MESHES = [None, (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)]


def _case(vocab=1000, rows=8, length=13, width=16, dtype=np.float32):
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((rows, length, width)).astype(dtype)
    kernel = rng.standard_normal((width, vocab)).astype(np.float32)
    return hidden, kernel, rng.integers(0, vocab, (rows, length)), rng.random((rows, length)) < 0.6


def _full_loss(hidden, kernel, targets, loss_mask):
    losses = optax.softmax_cross_entropy_with_integer_labels(hidden.astype(np.float32) @ kernel, targets)
    return jnp.where(loss_mask, losses, 0).sum()


def _value_and_gradients(call, mesh, case, by=(0, 1)):
    context = contextlib.nullcontext() if mesh is None else compute_context(make_mesh(MeshConfig(*mesh)), "float32")
    with context:
        return jax.jit(jax.value_and_grad(call, by))(*case)


@pytest.mark.parametrize("chunk", [2**30, 4 * 104 * 128 // 8], ids=["full", "chunks"])
@pytest.mark.parametrize("mesh", _MESHES)
def test_value_and_gradients_equal_full_logits(mesh, chunk):
    case = _case()
    with chunks_of(chunk):
        ours, expected = (_value_and_gradients(call, mesh, case) for call in (cross_entropy_sum, _full_loss))
    np.testing.assert_allclose(ours[0], expected[0], rtol=1e-6)
    for gradient, other in zip(ours[1], expected[1], strict=True):
        np.testing.assert_allclose(gradient, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vocab", [129, 383, 1024])
@chunks_of(4 * 104 * 128)
def test_vocabularies_that_chunks_do_not_divide(vocab):
    case = _case(vocab)
    ours, expected = (_value_and_gradients(call, None, case) for call in (cross_entropy_sum, _full_loss))
    jax.tree.map(
        lambda gradient, other: np.testing.assert_allclose(gradient, other, rtol=1e-5, atol=1e-5), ours, expected
    )


@chunks_of(4 * 104 * 128)
def test_large_logits_do_not_overflow():
    hidden, *rest = _case()
    case = (hidden * 40, *rest)  # up to 600: exp() of that is beyond float32
    ours, expected = (_value_and_gradients(call, None, case) for call in (cross_entropy_sum, _full_loss))
    np.testing.assert_allclose(ours[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(ours[1][1], expected[1][1], rtol=1e-4, atol=1e-3)


@chunks_of(4 * 104 * 128)
def test_only_requested_gradients_are_computed():
    hidden, kernel, targets, loss_mask = _case()

    def products(by):
        call = jax.value_and_grad(cross_entropy_sum, by) if by else cross_entropy_sum
        return str(jax.make_jaxpr(call)(hidden, kernel, targets, loss_mask)).count("dot_general")

    assert [products(by) for by in ((), (0,), (1,), (0, 1))] == [1, 3, 3, 4]


@chunks_of(4 * 104 * 128)
def test_bfloat16_sums_in_float32():
    """Logits rounded to bfloat16 would change the loss by one percent."""
    hidden, kernel, targets, loss_mask = _case(dtype=jnp.bfloat16)
    kernel = kernel.astype(jnp.bfloat16)
    true = _full_loss(hidden.astype(np.float32), kernel.astype(np.float32), targets, loss_mask)
    logits = (jnp.asarray(hidden) @ kernel).astype(np.float32)
    rounded = _full_loss(logits, np.eye(1000, dtype=np.float32), targets, loss_mask)
    case = [jnp.asarray(x) for x in (hidden, kernel, targets, loss_mask)]
    ours = cross_entropy_sum(*case)
    assert abs(ours - true) / true < 1e-6 < abs(rounded - true) / true
    gradients = jax.grad(cross_entropy_sum, (0, 1))(*case)
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.bfloat16]


@pytest.mark.usefixtures("optimized")
@chunks_of(4 * 128 * 128)
def test_no_array_is_as_large_as_all_logits():
    """Nor, on a mesh, as large as the full head."""
    case = _case(vocab=4096, rows=64, length=16, width=64)
    with compute_context(make_mesh(MeshConfig(1, 8, 1)), "float32"):
        compiled = jax.jit(jax.value_and_grad(cross_entropy_sum, (0, 1))).lower(*case).compile()
    text = compiled.as_text()
    assert "f32[128,128]" in text  # a device's 8 rows of 16 positions, one chunk of the vocabulary
    assert "f32[128,4096]" not in text
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * (64 * 4096 + 128 * 4096)
