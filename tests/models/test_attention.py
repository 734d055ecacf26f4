"""Attention kernels against the definition of attention, and masks against their docstring."""

import contextlib
import functools
import logging
import re

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from stf_jax.config import MeshConfig, UserError
from stf_jax.models import attention as module
from stf_jax.models.attention import Mask, attention, cached_attention, reference_attention
from stf_jax.parallel.mesh import compute_context, make_mesh

SEGMENTS = np.array([[1, 1, 1, 2, 2, 3, 0, 0], [1, 2, 2, 2, 2, 2, 2, 2]])
# Older versions compute a gradient of the mask.
PACKED_ON_GPU = "cudnn" if jax.__version_info__ >= (0, 11, 2) else "xla"
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


def attention_by_definition(q, k, v, allowed):
    """Attention by its definition, one query at a time, in float64."""
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
def test_attention_equals_its_definition(mask, kv_heads, implementation):
    q, k, v = inputs(kv_heads=kv_heads)
    out = attention(q, k, v, MASKS[mask], implementation)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, attention_by_definition(q, k, v, allowed(MASKS[mask])), atol=1e-5)


@pytest.mark.parametrize("mask", MASKS)
def test_bfloat16_is_close_to_reference(mask):
    q, k, v = inputs(kv_heads=2, dtype=jnp.bfloat16)
    out = attention(q, k, v, MASKS[mask], "xla")
    exact = reference_attention(*(x.astype(jnp.float32) for x in (q, k, v)), MASKS[mask])
    assert out.dtype == reference_attention(q, k, v, MASKS[mask]).dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.03)


def test_dense_masks_match_the_docstring():
    def dense(**mask):
        return Mask(**mask).dense(jnp.arange(4), 4)[:, 0].astype(int).tolist()

    segments = jnp.array([[1, 1, 2, 2]])
    assert Mask().dense(jnp.arange(4), 4) is None
    assert Mask(causal=True, segments=segments).dense(jnp.array([3]), 4).tolist() == [[[[False, False, True, True]]]]
    assert dense(causal=True) == [[[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]]
    assert dense(segments=segments) == [[[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]]
    assert dense(causal=True, segments=segments) == [[[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]]


def test_mask_is_a_pytree_under_jit():
    q, k, v = inputs()
    run = jax.jit(lambda mask: attention(q, k, v, mask))
    for name, mask in MASKS.items():
        np.testing.assert_allclose(run(mask), attention(q, k, v, mask), atol=1e-5, err_msg=name)


def value_and_gradients(implementation, case, mask, mesh=None):
    """The value and gradients of a loss that weighs every output differently."""
    weights = jnp.cos(jnp.arange(case[0].size)).reshape(case[0].shape)
    place = compute_context(make_mesh(MeshConfig(*mesh)), "float32") if mesh else contextlib.nullcontext()

    def loss(q, k, v):
        return (weights * attention(q, k, v, mask, implementation)).sum()

    with place:
        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*case)


def assert_equals_reference(implementation, case, mask, mesh=None):
    ours, expected = value_and_gradients(implementation, case, mask, mesh), value_and_gradients("reference", case, mask)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), ours, expected)


def packed_segments(rows, length):
    ends = np.sort(np.random.default_rng(0).integers(1, length, (rows, 3)))
    return jnp.asarray((np.arange(length) >= ends[:, :, None]).sum(1) + 1)


def test_blocks_of_splash_are_large():
    for length in range(1, 4097):
        padded, block = module._splash_blocks(length)
        assert length <= padded < length + 256
        assert padded % block == 0
        assert block >= 256 or block == padded == 128
    # Of the recipe's lengths, none is padded by more than to a multiple of 128.
    assert [module._splash_blocks(n) for n in (640, 896, 2048)] == [(640, 640), (896, 896), (2048, 512)]


@pytest.mark.parametrize("mesh", [None, (2, 2, 2)])
@pytest.mark.parametrize("segments", [False, True], ids=["causal", "packed"])
def test_splash_equals_reference_in_value_and_gradients(segments, mesh):
    case = inputs(4, 2, rows=4, length=200, size=64)  # not a multiple of the block size
    assert_equals_reference("splash", case, Mask(True, packed_segments(4, 200) if segments else None), mesh)


@pytest.fixture
def cudnn_on_cpu(monkeypatch):
    """Stands in for cuDNN, and refuses what jax refuses: gradients at odd lengths. Has the keywords of all calls."""
    real_attention, calls = jax.nn.dot_product_attention, []

    def cudnn(q, k, v, *, implementation, **keywords):
        assert implementation == "cudnn"
        calls.append(keywords)
        if q.shape[1] % 2 == 0:
            return real_attention(q, k, v, **keywords)

        @jax.custom_vjp
        def odd(q, k, v):
            return real_attention(q, k, v, **keywords)

        odd.defvjp(lambda q, k, v: (odd(q, k, v), None), lambda *_: pytest.fail("gradients at an odd length"))
        return odd(q, k, v)

    monkeypatch.setitem(module._REFUSALS, "cudnn", lambda q, mask: None)
    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
    return calls


@pytest.mark.parametrize("mesh", [None, (2, 2, 2)])
@pytest.mark.parametrize("length", [31, 32])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_cudnn_equals_reference_in_value_and_gradients(causal, packed, length, mesh, cudnn_on_cpu):
    mask = Mask(causal, packed_segments(4, length) if packed else None)
    assert_equals_reference("cudnn", inputs(4, 2, rows=4, length=length), mask, mesh)
    assert {keywords.get("is_causal", False) for keywords in cudnn_on_cpu} == {causal}  # it skips hidden blocks


def test_odd_lengths_are_padded_for_gradients_only(cudnn_on_cpu):
    q, k, v = inputs(length=7)
    out = attention(q, k, v, Mask(), "cudnn")
    np.testing.assert_allclose(out, reference_attention(q, k, v, Mask()), atol=1e-5)
    assert cudnn_on_cpu == [{}]


def test_cudnn_in_bfloat16_is_close_to_reference(cudnn_on_cpu):
    case, mask = inputs(4, 2, jnp.bfloat16, rows=4, length=31), Mask(True, packed_segments(4, 31))
    ours, expected = (value_and_gradients(name, case, mask)[1] for name in ("cudnn", "reference"))
    for x, y in zip(ours, expected, strict=True):
        assert x.dtype == jnp.bfloat16
        x, y = (np.asarray(z, np.float64) for z in (x, y))
        assert np.linalg.norm(x - y) < 0.02 * np.linalg.norm(y)


@pytest.mark.parametrize("mesh", [None, (2, 2, 2)])
@pytest.mark.parametrize("length", [127, 128, 200, 300])  # one to four spans, not all of equal length
@pytest.mark.parametrize("segments", [False, True], ids=["causal", "packed"])
def test_query_spans_skip_keys_hidden_by_the_causal_mask(segments, length, mesh):
    mask_spec = Mask(True, packed_segments(4, length) if segments else None)
    case = inputs(4, 2, rows=4, length=length)
    assert_equals_reference("xla", case, mask_spec, mesh)
    products = re.findall(
        r"dot_general.*-> tensor<4x2x(\d+)x(\d+)xf32>",
        jax.jit(lambda *x: attention(*x, mask_spec, "xla")).lower(*case).as_text(),
    )
    scores = sum(int(queries) * int(seen) for queries, seen in products if int(seen) > 16) / (2 * length**2)
    count = max(1, min(4, length // 64))
    assert scores == pytest.approx((count + 1) / (2 * count), rel=0.01)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_tiny_and_huge_scores(scale):
    q, k, v = inputs(length=8)
    case, mask = (scale * q, k, v), Mask(causal=True)
    out, grads = value_and_gradients("xla", case, mask)
    expected, expected_grads = value_and_gradients("reference", case, mask)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=2e-5)
    tolerance = max(1, scale) * 1e-5  # float32 rounding scales with the queries
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=tolerance), grads, expected_grads)


@pytest.mark.parametrize("mask", MASKS)
def test_long_rows_use_query_blocks(mask, monkeypatch):
    monkeypatch.setattr(module, "_QUERY_BLOCK", 16)
    segments = packed_segments(4, 70) if MASKS[mask].segments is not None else None
    mask_spec = Mask(MASKS[mask].causal, segments)
    case = inputs(4, 2, rows=4, length=70)
    assert_equals_reference("xla", case, mask_spec)
    # The full [T, T] scores are never materialized.
    programs = [
        jax.jit(lambda *x, n=n: attention(*x, mask_spec, n)).lower(*case).as_text() for n in ("reference", "xla")
    ]
    assert ["x70x70xf32" in program for program in programs] == [True, False]


@pytest.mark.parametrize(
    ("implementation", "case", "mask", "message"),
    [
        ("cudnn", {"dtype": jnp.bfloat16}, Mask(causal=True), "needs a GPU"),
        ("splash", {}, Mask(causal=True), "does not support heads of size 16"),
        ("splash", {"size": 64}, Mask(), "supports only causal attention"),
    ],
)
def test_named_kernel_rejects_unsupported_inputs(implementation, case, mask, message):
    with pytest.raises(UserError, match=rf"attention={implementation} {message}; set model\.attention=auto"):
        attention(*inputs(**case), mask, implementation)


@pytest.mark.parametrize(
    ("backend", "case", "mask", "expected_log"),
    [
        ("gpu", {"dtype": jnp.bfloat16}, Mask(causal=True), "causal attention with heads of 16 in bfloat16: cudnn"),
        ("gpu", {"dtype": jnp.bfloat16}, Mask(), "attention with heads of 16 in bfloat16: cudnn"),
        ("gpu", {}, Mask(), "xla: cudnn does not compute in float32"),
        (
            "gpu",
            {"dtype": jnp.bfloat16},
            MASKS["causal-segments"],
            "causal packed attention with heads of 16 in bfloat16: "
            + ("cudnn" if PACKED_ON_GPU == "cudnn" else "xla: cudnn needs jax 0.11.2 for packed conversations"),
        ),
        ("gpu", {"dtype": jnp.bfloat16, "size": 256}, Mask(), "xla: cudnn does not support heads of size 256"),
        (
            "tpu",
            {"size": 128},
            MASKS["causal-segments"],
            "causal packed attention with heads of 128 in float32: splash",
        ),
        ("tpu", {"size": 64}, Mask(), "xla: splash supports only causal attention"),
        ("tpu", {"size": 96}, Mask(causal=True), "xla: splash does not support heads of size 96"),
        ("cpu", {}, Mask(), "attention with heads of 16 in float32: xla"),
    ],
)
def test_auto_picks_a_kernel_and_logs_once(backend, case, mask, expected_log, monkeypatch, caplog):
    monkeypatch.setattr(module, "platform", lambda: backend)
    called = []

    def call(q, k, v, mask, name):
        called.append(name)
        return q

    for name in module._KERNELS:
        monkeypatch.setitem(module._KERNELS, name, functools.partial(call, name=name))
    module._log_once.cache_clear()
    with caplog.at_level(logging.INFO, module.__name__):
        for _ in range(2):
            attention(*inputs(**case), mask)
    assert module._log_once.cache_info().misses == 1  # several handlers may record the same line
    (line,) = {record.message for record in caplog.records if record.name == module.__name__}
    assert expected_log in line
    assert called == 2 * [line.split(": ")[1]]


@pytest.mark.parametrize("heads", [(6, 6), (6, 2)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_cached_attention_reads_only_filled_slots(heads, dtype):
    q, k, v = inputs(*heads, dtype=dtype)
    q, filled = q[:, :1], np.array([[1, 1, 0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1, 0, 0]], bool)
    out = cached_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), jnp.asarray(filled))
    assert (out.dtype, out.shape) == (dtype, q.shape)
    expected = attention_by_definition(q, k, v, filled[:, None])
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=1e-5 if dtype == jnp.float32 else 0.05)


@pytest.mark.parametrize("change", [lambda k: k[:1], lambda k: k.astype(jnp.int32), lambda k: k[..., :8]])
def test_signatures_are_checked_in_tests(change):
    """The hook of conftest.py is active: wrong axes and types are errors."""
    q, k, v = inputs()
    attention(q, k, v, Mask())
    with pytest.raises(jaxtyping.TypeCheckError):
        attention(q, change(k), v, Mask())
