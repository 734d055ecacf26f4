"""Cross-entropy of next tokens, without ever holding all logits; and of the labels of image cells.

The logits of a batch are its largest array by far: a row of 2,048 positions and 32,000 words is 250 MiB in float32, and
as much again is their gradient. So they are made for some words at a time, read, and dropped: once for the sum that
normalises them, and, where gradients are wanted, once more for these. Neither the output head nor its gradient is
whole on any device of a mesh that shards it.

Axis letters: B rows, T positions, N = B·T, D width, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from stf_jax.models.cells import split_scores

_CHUNK = 2**27  # bytes of float32 logits at a time on a device
_LANES = 128  # words that chunks are multiples of, as TPUs lay arrays out
_ROWS = ("data", "fsdp")
_WEIGHTS = (1.0, 1.0, 2.0)  # of the losses of colors, shapes and characters
_UNLABELLED = 0.1  # weight of a cell without a label, as most are


def labels_loss_sum(scores: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy in nats, float32, of all cells' labels, summed over cells with weights.

    Args:
      scores: float32 [B, S, S, classes], as :class:`stf_jax.models.cells.CellHead` gives them.
      labels: uint8 [B, S, S, 3]: color, shape and character, 0 for none.
    """
    total = jnp.zeros(())
    for index, (part, weight) in enumerate(zip(split_scores(scores), _WEIGHTS, strict=True)):
        label = labels[..., index].astype(jnp.int32)
        losses = jax.nn.logsumexp(part, -1) - jnp.take_along_axis(part, label[..., None], -1)[..., 0]
        total += weight * (losses * jnp.where(label > 0, 1, _UNLABELLED)).sum()
    return total


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy_sum(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, learned: jax.Array, words_first: bool = False
) -> jax.Array:
    """Cross-entropy in nats of ``softmax(hidden · kernel)``, float32, summed over learned positions.

    On a mesh in use, rows are split over ``data`` and ``fsdp``, widths of the kernel over ``fsdp``, words over
    ``tensor``.

    Args:
      hidden: [B, T, D]; products are computed in its type and summed in float32.
      kernel: [D, V] of any type.
      targets: int32 [B, T].
      learned: bool [B, T].
      words_first: the kernel is [V, D], as an embedding is: turned round, it and its gradient would be copied.
    """
    return _sharded(hidden, kernel, targets, learned, words_first, ())[0]


def _forward(hidden, kernel, targets, learned, words_first):
    wanted = tuple(name for name, x in (("hidden", hidden), ("kernel", kernel)) if x.perturbed)
    return _sharded(hidden.value, kernel.value, targets.value, learned.value, words_first, wanted)


def _backward(words_first, gradients, cotangent):
    # The sum is linear in what comes after it, so its gradients could be made before that was known.
    return *(None if g is None else (g * cotangent).astype(g.dtype) for g in gradients), None, None


cross_entropy_sum.defvjp(_forward, _backward, symbolic_zeros=True)


def _sharded(hidden, kernel, targets, learned, words_first, wanted):
    """The sum, and its gradients by hidden and kernel, None where they are not wanted."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _local(hidden, kernel, targets, learned, words_first, wanted, axes=())
    rows, words = PartitionSpec(_ROWS), PartitionSpec(*(("tensor", "fsdp") if words_first else ("fsdp", "tensor")))
    gradients = (rows if "hidden" in wanted else None, words if "kernel" in wanted else None)
    return jax.shard_map(
        functools.partial(_local, words_first=words_first, wanted=wanted, axes=mesh.axis_names),
        in_specs=(rows, words, rows, rows),
        out_specs=(PartitionSpec(), gradients),
        check_vma=False,  # nothing is differentiated through it
    )(hidden, kernel, targets, learned)


def _local(hidden, kernel, targets, learned, words_first, wanted, axes):
    """The same on one device, which has its rows, and of the kernel some widths of some words."""

    def over(collective, x, *names, **how):
        names = tuple(name for name in names if axes and jax.lax.axis_size(name) > 1)  # alone, a device would copy
        return collective(x, names, **how) if names else x

    shape, dtype = hidden.shape, hidden.dtype
    hidden, targets, learned = hidden.reshape(-1, shape[-1]), targets.reshape(-1), learned.reshape(-1)
    words, widths = kernel.shape if words_first else kernel.shape[::-1]
    by_width, lie = (1, "vd") if words_first else (0, "dv")  # the kernel's axis of widths, and its axes
    first = words * jax.lax.axis_index("tensor") if axes else 0

    count = -(-4 * len(hidden) * words // _CHUNK)
    size = words if count == 1 else -(-words // count // _LANES) * _LANES
    count = -(-words // size)
    filling = (0, count * size - words)
    if words_first:
        chunks = jnp.pad(kernel, (filling, (0, 0))).reshape(count, size, widths)
    else:
        chunks = jnp.pad(kernel, ((0, 0), filling)).reshape(widths, count, size).swapaxes(0, 1)

    def each(read, start):
        """Calls ``read(carry, kernel, logits, hit)`` with chunk after chunk."""

        def step(carry, chunk):
            index, kernel = chunk
            kernel = over(jax.lax.all_gather, kernel.astype(dtype), "fsdp", axis=by_width, tiled=True)
            logits = jnp.einsum(f"nd,{lie}->nv", hidden, kernel, preferred_element_type=jnp.float32)
            word = index * size + jnp.arange(size)
            ours = word < words  # not what fills the last chunk up
            hit = (targets[:, None] - first == word) & ours
            return read(carry, kernel, jnp.where(ours, logits, -jnp.inf), hit)

        if count == 1:
            carry, out = step(start, (0, chunks[0]))
            return carry, None if out is None else out[None]
        return jax.lax.scan(step, start, (jnp.arange(count), chunks))

    def total(carry, kernel, logits, hit):
        before, powers, right = carry
        top = jnp.maximum(before, logits.max(-1))
        powers = powers * jnp.exp(before - top) + jnp.exp(logits - top[:, None]).sum(-1)
        return (top, powers, right + jnp.where(hit, logits, 0).sum(-1)), None

    nought = jnp.zeros(len(hidden))
    (top, powers, right), _ = each(total, (nought - jnp.inf, nought, nought))
    highest = over(jax.lax.pmax, top, "tensor")
    normaliser = jnp.log(over(jax.lax.psum, powers * jnp.exp(top - highest), "tensor")) + highest
    losses = jnp.where(learned, normaliser - over(jax.lax.psum, right, "tensor"), 0)
    value = over(jax.lax.psum, losses.sum(), *_ROWS)
    if not wanted:
        return value, (None, None)

    def slopes(by_hidden, kernel, logits, hit):
        by_logits = jnp.where(learned[:, None], jnp.exp(logits - normaliser[:, None]) - hit, 0).astype(dtype)
        if "hidden" in wanted:
            by_hidden += jnp.einsum(f"nv,{lie}->nd", by_logits, kernel, preferred_element_type=jnp.float32)
        if "kernel" not in wanted:
            return by_hidden, None
        factors = (f"nv,nd->{lie}", by_logits, hidden) if words_first else (f"nd,nv->{lie}", hidden, by_logits)
        by_kernel = jnp.einsum(*factors, preferred_element_type=jnp.float32)
        by_kernel = over(jax.lax.psum_scatter, by_kernel, "fsdp", scatter_dimension=by_width, tiled=True)
        return by_hidden, over(jax.lax.psum, by_kernel, "data")

    by_hidden, by_kernel = each(slopes, jnp.zeros(hidden.shape) if "hidden" in wanted else None)
    if by_hidden is not None:
        by_hidden = over(jax.lax.psum, by_hidden, "tensor").astype(dtype).reshape(shape)
    if by_kernel is not None:
        if words_first:
            by_kernel = by_kernel.reshape(-1, widths)[:words]
        else:
            by_kernel = by_kernel.swapaxes(0, 1).reshape(widths, -1)[:, :words]
        by_kernel = by_kernel.astype(kernel.dtype)
    return value, (by_hidden, by_kernel)
