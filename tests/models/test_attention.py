"""Attention against its definition, and the masks against theirs."""

import contextlib
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stf_jax.config import MeshConfig, UserError
from stf_jax.models import attention as module
from stf_jax.models.attention import Mask, attention, cached_attention, reference_attention
from stf_jax.runtime.mesh import computing, make_mesh

SEGMENTS = np.array([[1, 1, 1, 2, 2, 3, 0, 0], [1, 2, 2, 2, 2, 2, 2, 2]])
MASKS = {
    "full": Mask(),
    "causal": Mask(causal=True),
    "segments": Mask(segments=jnp.asarray(SEGMENTS)),
    "causal-segments": Mask(causal=True, segments=jnp.asarray(SEGMENTS)),
}


def inputs(heads=6, kv_heads=6, dtype=jnp.float32, rows=2, length=8, size=16):
    keys = jax.random.split(jax.random.key(0), 3)
    counts = heads, kv_heads, kv_heads
    return [2 * jax.random.normal(key, (rows, length, n, size), dtype) for key, n in zip(keys, counts, strict=True)]


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


def test_dense_masks_of_the_docstring():
    def dense(**mask):
        return Mask(**mask).dense(jnp.arange(4), 4)[:, 0].astype(int).tolist()

    segments = jnp.array([[1, 1, 2, 2]])
    assert Mask().dense(jnp.arange(4), 4) is None
    assert Mask(causal=True, segments=segments).dense(jnp.array([3]), 4).tolist() == [[[[False, False, True, True]]]]
    assert dense(causal=True) == [[[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]]
    assert dense(segments=segments) == [[[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]]
    assert dense(causal=True, segments=segments) == [[[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]]


def test_a_mask_passes_through_jit_as_a_description():
    q, k, v = inputs()
    run = jax.jit(lambda mask: attention(q, k, v, mask))
    for name, mask in MASKS.items():
        np.testing.assert_allclose(run(mask), attention(q, k, v, mask), atol=1e-5, err_msg=name)


def value_and_gradients(implementation, case, mask, mesh=None):
    """Of a loss that weighs every output otherwise."""
    weights = jnp.cos(jnp.arange(case[0].size)).reshape(case[0].shape)
    place = computing(make_mesh(MeshConfig(*mesh)), "float32") if mesh else contextlib.nullcontext()

    def loss(q, k, v):
        return (weights * attention(q, k, v, mask, implementation)).sum()

    with place:
        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*case)


def assert_as_the_reference(implementation, case, mask, mesh=None):
    ours, expected = value_and_gradients(implementation, case, mask, mesh), value_and_gradients("reference", case, mask)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), ours, expected)


def packed(rows, length):
    ends = np.sort(np.random.default_rng(0).integers(1, length, (rows, 3)))
    return jnp.asarray((np.arange(length) >= ends[:, :, None]).sum(1) + 1)


@pytest.mark.parametrize("mesh", [None, (2, 2, 2)])
@pytest.mark.parametrize("segments", [False, True], ids=["causal", "packed"])
def test_splash_equals_the_reference_in_value_and_gradients(segments, mesh):
    case = inputs(4, 2, rows=4, length=200, size=64)  # a length that its blocks do not divide
    assert_as_the_reference("splash", case, Mask(True, packed(4, 200) if segments else None), mesh)


@pytest.mark.parametrize("length", [7, 8])
def test_odd_lengths_are_filled_for_cudnn_which_has_no_gradients_of_them(length, monkeypatch):
    theirs = jax.nn.dot_product_attention

    def cudnn(q, k, v, is_causal, implementation):
        assert (q.shape[1] % 2, k.shape[1] % 2, implementation) == (0, 0, "cudnn")
        return theirs(q, k, v, is_causal=is_causal)

    monkeypatch.setitem(module._REFUSALS, "cudnn", lambda q, mask: None)
    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
    assert_as_the_reference("cudnn", inputs(4, 2, length=length), Mask(causal=True))


@pytest.mark.parametrize("mesh", [None, (2, 2, 2)])
@pytest.mark.parametrize("length", [127, 128, 200, 300])  # one span, two, three and four, not all as long as each other
@pytest.mark.parametrize("segments", [False, True], ids=["causal", "packed"])
def test_spans_of_queries_do_not_compute_what_a_causal_mask_hides(segments, length, mesh):
    described = Mask(True, packed(4, length) if segments else None)
    case = inputs(4, 2, rows=4, length=length)
    assert_as_the_reference("xla", case, described, mesh)
    products = re.findall(
        r"dot_general.*-> tensor<4x2x(\d+)x(\d+)xf32>",
        jax.jit(lambda *x: attention(*x, described, "xla")).lower(*case).as_text(),
    )
    scores = sum(int(queries) * int(seen) for queries, seen in products if int(seen) > 16) / (2 * length**2)
    count = max(1, min(4, length // 64))
    assert scores == pytest.approx((count + 1) / (2 * count), rel=0.01)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_scores_of_any_size_are_weighed(scale):
    q, k, v = inputs(length=8)
    case, mask = (scale * q, k, v), Mask(causal=True)
    out, grads = value_and_gradients("xla", case, mask)
    expected, theirs = value_and_gradients("reference", case, mask)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=2e-5)
    near = max(1, scale) * 1e-5  # float32 of what queries that large are multiplied by
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=near), grads, theirs)


@pytest.mark.parametrize("mask", MASKS)
def test_long_rows_are_read_in_blocks_of_queries(mask, monkeypatch):
    monkeypatch.setattr(module, "_QUERIES", 16)
    segments = packed(4, 70) if MASKS[mask].segments is not None else None
    described = Mask(MASKS[mask].causal, segments)
    case = inputs(4, 2, rows=4, length=70)
    assert_as_the_reference("xla", case, described)
    # All positions with all are not there at once.
    programs = [
        jax.jit(lambda *x, n=n: attention(*x, described, n)).lower(*case).as_text() for n in ("reference", "xla")
    ]
    assert ["x70x70xf32" in program for program in programs] == [True, False]


@pytest.mark.parametrize(
    ("implementation", "case", "mask", "sentence"),
    [
        ("cudnn", {"dtype": jnp.bfloat16}, Mask(causal=True), "needs a GPU"),
        ("splash", {}, Mask(causal=True), "does not take heads of size 16"),
        ("splash", {"size": 64}, Mask(), "is for causal attention"),
    ],
)
def test_a_kernel_by_name_refuses_what_it_cannot_do(implementation, case, mask, sentence):
    with pytest.raises(UserError, match=rf"attention={implementation} {sentence}; set model\.attention=auto"):
        attention(*inputs(**case), mask, implementation)


@pytest.mark.parametrize(
    ("backend", "case", "mask", "said"),
    [
        ("gpu", {"dtype": jnp.bfloat16}, Mask(causal=True), "causal attention with heads of 16 in bfloat16: cudnn"),
        ("gpu", {"dtype": jnp.bfloat16}, Mask(), "attention with heads of 16 in bfloat16: cudnn"),
        ("gpu", {}, Mask(), "xla: cudnn does not compute in float32"),
        (
            "gpu",
            {"dtype": jnp.bfloat16},
            MASKS["causal-segments"],
            "xla: cudnn does not keep packed conversations apart",
        ),
        ("gpu", {"dtype": jnp.bfloat16, "size": 256}, Mask(), "xla: cudnn does not take heads of size 256"),
        (
            "tpu",
            {"size": 128},
            MASKS["causal-segments"],
            "causal packed attention with heads of 128 in float32: splash",
        ),
        ("tpu", {"size": 64}, Mask(), "xla: splash is for causal attention"),
        ("tpu", {"size": 96}, Mask(causal=True), "xla: splash does not take heads of size 96"),
        ("cpu", {}, Mask(), "attention with heads of 16 in float32: xla"),
    ],
)
def test_the_backend_and_the_shape_choose_and_it_is_said_once(backend, case, mask, said, monkeypatch, caplog):
    monkeypatch.setattr(module, "platform", lambda: backend)
    called = []
    for name in module._KERNELS:
        monkeypatch.setitem(module._KERNELS, name, lambda q, k, v, mask, name=name: called.append(name))
    module._say.cache_clear()
    with caplog.at_level(logging.INFO, module.__name__):
        for _ in range(2):
            attention(*inputs(**case), mask)
    assert module._say.cache_info().misses == 1  # though whatever listens may hear it from several places
    (line,) = {record.message for record in caplog.records if record.name == module.__name__}
    assert said in line
    assert called == 2 * [line.split(": ")[1]]


@pytest.mark.parametrize("heads", [(6, 6), (6, 2)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_cache_is_read_where_it_is_filled(heads, dtype):
    q, k, v = inputs(*heads, dtype=dtype)
    q, filled = q[:, :1], np.array([[1, 1, 0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1, 0, 0]], bool)
    out = cached_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), jnp.asarray(filled))
    assert (out.dtype, out.shape) == (dtype, q.shape)
    expected = by_definition(q, k, v, filled[:, None])
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=1e-5 if dtype == jnp.float32 else 0.05)
