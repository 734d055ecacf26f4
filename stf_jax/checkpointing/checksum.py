"""Checksums of an array's bits: independent of its sharding, and different if any single word differs."""

import jax
import jax.numpy as jnp
import numpy as np

_CHUNK = 2**22  # elements
_SMALL = 2**20  # elements up to which numpy is quicker than compiling a program for an array's shape


def checksum(x: jax.Array) -> jax.Array:
    """Computes the checksum, uint32, of an array inside a compiled program.

    Each word is multiplied by an odd number, which is invertible modulo 2³², so no other value of a single word gives
    the same sum.
    """
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    # The flat index of each element, built axis by axis: reshaping to one axis would gather it all on every device.
    index = jnp.uint32(0)
    for axis, size in enumerate(x.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    # Integers that wrap: the sum does not depend on the order in which devices add.
    return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)


def host_checksum(x: np.ndarray) -> int:
    """Computes the same checksum of an array in host memory, in chunks."""
    words, total = np.ascontiguousarray(x).reshape(-1).view(f"uint{8 * x.dtype.itemsize}"), 0
    for start in range(0, words.size, _CHUNK):
        chunk = words[start : start + _CHUNK].astype(np.uint32)
        index = np.arange(start, start + chunk.size, dtype=np.uint64).astype(np.uint32)
        total += int((chunk * (2 * index + np.uint32(1))).sum(dtype=np.uint32))
    return total % 2**32


def is_quick_on_host(x: jax.Array) -> bool:
    """Whether this process can read the array, and handle it faster in numpy than by a program for its shape."""
    return x.size <= _SMALL and x.is_fully_addressable


def compute_checksum(x: jax.Array) -> int:
    """Computes the checksum of an array outside a program."""
    return host_checksum(jax.device_get(x)) if is_quick_on_host(x) else int(_compiled(x))


_compiled = jax.jit(checksum)
