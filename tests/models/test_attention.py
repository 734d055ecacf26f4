"""Attention against its definition, and the masks against theirs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stf_jax.config import UserError
from stf_jax.models.attention import Mask, attention, cached_attention, reference_attention

SEGMENTS = np.array([[1, 1, 1, 2, 2, 3, 0, 0], [1, 2, 2, 2, 2, 2, 2, 2]])
MASKS = {
    "full": Mask(),
    "causal": Mask(causal=True),
    "segments": Mask(segments=jnp.asarray(SEGMENTS)),
    "causal-segments": Mask(causal=True, segments=jnp.asarray(SEGMENTS)),
}


def inputs(heads=6, kv_heads=6, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    counts = heads, kv_heads, kv_heads
    return [2 * jax.random.normal(key, (2, 8, n, 16), dtype) for key, n in zip(keys, counts, strict=True)]


def by_definition(q, k, v, allowed):
    """One query at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.empty_like(q)
    for b, i, h in np.ndindex(q.shape[:3]):
        seen, kv = allowed[b, i], h * k.shape[2] // q.shape[2]
        weights = np.exp(k[b, seen, kv] @ q[b, i, h] / q.shape[-1] ** 0.5)
        out[b, i, h] = weights / weights.sum() @ v[b, seen, kv]
    return out


def allowed(mask):
    causal = np.tril(np.ones((8, 8), bool)) if mask.causal else np.ones((8, 8), bool)
    same = np.ones((2, 8, 8), bool) if mask.segments is None else SEGMENTS[:, :, None] == SEGMENTS[:, None]
    return causal & same


@pytest.mark.parametrize("implementation", ["reference", "xla", "auto"])
@pytest.mark.parametrize("kv_heads", [6, 2, 1])
@pytest.mark.parametrize("mask", MASKS)
def test_equals_the_definition(mask, kv_heads, implementation):
    q, k, v = inputs(kv_heads=kv_heads)
    out = attention(q, k, v, MASKS[mask], implementation)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, by_definition(q, k, v, allowed(MASKS[mask])), atol=1e-5)


@pytest.mark.parametrize("mask", MASKS)
def test_bfloat16_stays_near_the_reference(mask):
    q, k, v = inputs(kv_heads=2, dtype=jnp.bfloat16)
    out = attention(q, k, v, MASKS[mask], "xla")
    exact = reference_attention(*(x.astype(jnp.float32) for x in (q, k, v)), MASKS[mask])
    assert out.dtype == reference_attention(q, k, v, MASKS[mask]).dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.03)


def test_gradients_equal_the_references():
    def loss(implementation):
        return lambda q, k, v: jnp.sin(attention(q, k, v, MASKS["causal-segments"], implementation)).sum()

    ours, expected = (jax.grad(loss(name), (0, 1, 2))(*inputs(kv_heads=2)) for name in ("xla", "reference"))
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_dense_masks_of_the_docstring():
    def dense(**mask):
        return Mask(**mask).dense(4)[:, 0].astype(int).tolist()

    segments = jnp.array([[1, 1, 2, 2]])
    assert Mask().dense(4) is None
    assert dense(causal=True) == [[[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]]
    assert dense(segments=segments) == [[[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]]
    assert dense(causal=True, segments=segments) == [[[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]]


def test_a_mask_passes_through_jit_as_a_description():
    q, k, v = inputs()
    run = jax.jit(lambda mask: attention(q, k, v, mask))
    for name, mask in MASKS.items():
        np.testing.assert_allclose(run(mask), attention(q, k, v, mask), atol=1e-5, err_msg=name)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="cuDNN is here")
def test_cudnn_by_name_is_refused_without_a_gpu():
    q, k, v = inputs(dtype=jnp.bfloat16)
    with pytest.raises(UserError, match=r"needs a GPU; set model\.attention=xla"):
        attention(q, k, v, Mask(causal=True), "cudnn")


@pytest.mark.parametrize("heads", [(6, 6), (6, 2)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_cache_is_read_where_it_is_filled(heads, dtype):
    q, k, v = inputs(*heads, dtype=dtype)
    q, filled = q[:, :1], np.array([[1, 1, 0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1, 0, 0]], bool)
    out = cached_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), jnp.asarray(filled))
    assert (out.dtype, out.shape) == (dtype, q.shape)
    expected = by_definition(q, k, v, filled[:, None])
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=1e-5 if dtype == jnp.float32 else 0.05)
