"""A number for an array's bits, wherever they lie: the same on any mesh, and another if any one word is another."""

import jax
import jax.numpy as jnp
import numpy as np

_CHUNK = 2**22  # elements


def checksum(x: jax.Array) -> jax.Array:
    """uint32, inside a compiled program.

    Each word counts an odd number of times, which is invertible, so no single other word gives the same sum.
    """
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    # Where each stands, told axis by axis: laid in a row, all of them would be gathered on every device.
    where = jnp.uint32(0)
    for axis, size in enumerate(x.shape):
        where = where * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    # Whole numbers that wrap: the same in whatever order devices add them.
    return jnp.sum(bits * (2 * where + 1), dtype=jnp.uint32)


def host_checksum(x: np.ndarray) -> int:
    """The same of an array in host memory, little by little."""
    words, total = np.ascontiguousarray(x).reshape(-1).view(f"uint{8 * x.dtype.itemsize}"), 0
    for start in range(0, words.size, _CHUNK):
        part = words[start : start + _CHUNK].astype(np.uint32)
        where = np.arange(start, start + part.size, dtype=np.uint64).astype(np.uint32)
        total += int((part * (2 * where + np.uint32(1))).sum(dtype=np.uint32))
    return total % 2**32
