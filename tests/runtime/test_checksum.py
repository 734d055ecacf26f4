"""Checksums: of the bits and their places, the same on any mesh and on the host."""

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stf_jax.runtime import checksum as module
from stf_jax.runtime.checksum import checksum, host_checksum

_checksum = jax.jit(checksum)


def _reference(x):
    """In Python's whole numbers."""
    words = np.asarray(x).reshape(-1).view(f"uint{8 * x.dtype.itemsize}")
    return sum(int(word) * (2 * place + 1) for place, word in enumerate(words)) % 2**32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8"])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4, 5)])
def test_it_is_as_defined(dtype, shape):
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape) * 100, dtype)
    assert int(_checksum(x)) == host_checksum(np.asarray(x)) == _reference(x)


def test_it_is_the_same_in_chunks(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 7)
    x = np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32).T
    assert host_checksum(x) == _reference(x)


@pytest.mark.parametrize("spec", [("a",), (None, "a"), ("a", "b"), (None, ("a", "b"))], ids=str)
def test_it_is_the_same_however_the_array_lies(spec):
    x = np.random.default_rng(1).standard_normal((16, 24)).astype(np.float32)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    there = jax.device_put(x, jax.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)))
    assert int(_checksum(there)) == _reference(x)


@hypothesis.given(arrays.arrays(np.uint32, (5, 3)), st.integers(0, 14), st.integers(0, 31), st.integers(0, 14))
def test_one_other_bit_or_two_words_exchanged_is_seen(x, place, bit, other):
    before, changed, swapped = int(_checksum(x)), x.copy(), x.copy()
    changed.flat[place] ^= np.uint32(1 << bit)
    assert int(_checksum(changed)) != before
    swapped.flat[[place, other]] = x.flat[[other, place]]
    difference = (int(x.flat[place]) - int(x.flat[other])) * 2 * (place - other) % 2**32
    assert (int(_checksum(swapped)) == before) == (difference == 0)
