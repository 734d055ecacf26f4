"""Checksums depend on bits and their positions, and are the same on any mesh and on the host."""

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stf_jax.checkpointing import checksum as module
from stf_jax.checkpointing.checksum import checksum, host_checksum

_checksum = jax.jit(checksum)


def _reference(x):
    """Computes the checksum with Python integers."""
    words = np.asarray(x).reshape(-1).view(f"uint{8 * x.dtype.itemsize}")
    return sum(int(word) * (2 * index + 1) for index, word in enumerate(words)) % 2**32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8"])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4, 5)])
def test_checksum_matches_the_reference(dtype, shape):
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape) * 100, dtype)
    assert int(_checksum(x)) == host_checksum(np.asarray(x)) == _reference(x)


def test_chunks_do_not_change_the_checksum(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 7)
    x = np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32).T
    assert host_checksum(x) == _reference(x)


@pytest.mark.parametrize("spec", [("a",), (None, "a"), ("a", "b"), (None, ("a", "b"))], ids=str)
def test_sharding_does_not_change_the_checksum(spec):
    x = np.random.default_rng(1).standard_normal((16, 24)).astype(np.float32)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharded = jax.device_put(x, jax.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)))
    assert int(_checksum(sharded)) == _reference(x)


@hypothesis.given(arrays.arrays(np.uint32, (5, 3)), st.integers(0, 14), st.integers(0, 31), st.integers(0, 14))
def test_a_flipped_bit_or_swapped_words_change_the_checksum(x, index, bit, other):
    before, changed, swapped = int(_checksum(x)), x.copy(), x.copy()
    changed.flat[index] ^= np.uint32(1 << bit)
    assert int(_checksum(changed)) != before
    swapped.flat[[index, other]] = x.flat[[other, index]]
    difference = (int(x.flat[index]) - int(x.flat[other])) * 2 * (index - other) % 2**32
    assert (int(_checksum(swapped)) == before) == (difference == 0)
