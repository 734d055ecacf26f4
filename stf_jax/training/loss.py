"""Cross-entropy of next tokens without materializing all logits.

The logits of a batch are by far its largest array: a row of 2,048 positions and a vocabulary of 32,000 takes 250 MiB in
float32, and their gradient takes as much again. So logits are computed for one chunk of the vocabulary at a time, used
and dropped: once for their normalizer, and, where gradients are requested, once more for these. On a mesh that shards
the output head, no device holds all of the head or of its gradient.

Axis letters: B rows, T positions, N = B·T, D width, V vocabulary.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from stf_jax.accounting.flops import RECOMPUTED

_chunk_bytes = contextvars.ContextVar("chunk_bytes", default=2**27)
_LANES = 128  # the chunk size is a multiple of the lanes of a TPU
_ROWS = ("data", "fsdp")
_Gradients = tuple[jax.Array | None, jax.Array | None]  # for hidden and kernel; None where not requested
_Carry = TypeVar("_Carry")


@contextlib.contextmanager
def chunks_of(size: int) -> Iterator[None]:
    """Traces :func:`cross_entropy_sum` with chunks of up to ``size`` bytes of float32 logits on a device."""
    token = _chunk_bytes.set(size)
    try:
        yield
    finally:
        _chunk_bytes.reset(token)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy_sum(
    hidden: Float[Array, "B T D"],
    kernel: Float[Array, "..."],
    targets: Int[Array, "B T"],
    loss_mask: Bool[Array, "B T"],
    vocab_first: bool = False,
) -> Float[Array, ""]:
    """Cross-entropy of ``softmax(hidden · kernel)``, summed over target tokens, in nats, float32.

    On the active mesh, rows are split over ``data`` and ``fsdp``, the kernel's width over ``fsdp`` and its vocabulary
    over ``tensor``.

    Args:
      hidden: the decoder's hidden states; products are computed in their type and summed in float32.
      kernel: [D, V], or [V, D] with ``vocab_first``, of any type.
      targets: the next token at each position.
      loss_mask: True at target tokens.
      vocab_first: whether the kernel is laid out like an embedding; transposing would copy it and its gradient.
    """
    return _loss_and_grads(hidden, kernel, targets, loss_mask, vocab_first, ())[0]


def _forward(
    hidden: CustomVJPPrimal,
    kernel: CustomVJPPrimal,
    targets: CustomVJPPrimal,
    loss_mask: CustomVJPPrimal,
    vocab_first: bool,
) -> tuple[jax.Array, _Gradients]:
    requested = tuple(name for name, x in (("hidden", hidden), ("kernel", kernel)) if x.perturbed)
    return _loss_and_grads(hidden.value, kernel.value, targets.value, loss_mask.value, vocab_first, requested)


def _backward(vocab_first: bool, gradients: _Gradients, cotangent: jax.Array) -> tuple[jax.Array | None, ...]:
    # The cotangent is a scalar factor, so the forward pass has already computed the gradients without it.
    return *(None if g is None else (g * cotangent).astype(g.dtype) for g in gradients), None, None


cross_entropy_sum.defvjp(_forward, _backward, symbolic_zeros=True)


def _loss_and_grads(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    loss_mask: jax.Array,
    vocab_first: bool,
    requested: tuple[str, ...],
) -> tuple[jax.Array, _Gradients]:
    """The sum, and its gradients for hidden and kernel, None where they are not requested."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _local_loss_and_grads(hidden, kernel, targets, loss_mask, vocab_first, requested, axes=())
    rows, vocab_spec = PartitionSpec(_ROWS), PartitionSpec(*(("tensor", "fsdp") if vocab_first else ("fsdp", "tensor")))
    gradients = (rows if "hidden" in requested else None, vocab_spec if "kernel" in requested else None)
    return jax.shard_map(
        functools.partial(_local_loss_and_grads, vocab_first=vocab_first, requested=requested, axes=mesh.axis_names),
        in_specs=(rows, vocab_spec, rows, rows),
        out_specs=(PartitionSpec(), gradients),
        check_vma=False,  # nothing is differentiated through it
    )(hidden, kernel, targets, loss_mask)


def _local_loss_and_grads(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    loss_mask: jax.Array,
    vocab_first: bool,
    requested: tuple[str, ...],
    axes: tuple[str, ...],
) -> tuple[jax.Array, _Gradients]:
    """Computes :func:`_loss_and_grads` on one device, which has its rows and its slice of the kernel."""

    def apply_collective(op: Callable[..., jax.Array], x: jax.Array, *names: str, **options: Any) -> jax.Array:
        names = tuple(name for name in names if axes and jax.lax.axis_size(name) > 1)  # over one device it would copy
        return op(x, names, **options) if names else x

    shape, dtype = hidden.shape, hidden.dtype
    hidden, targets, loss_mask = hidden.reshape(-1, shape[-1]), targets.reshape(-1), loss_mask.reshape(-1)
    vocab, widths = kernel.shape if vocab_first else kernel.shape[::-1]
    width_axis, kernel_axes = (1, "vd") if vocab_first else (0, "dv")  # the axis of the width, and einsum letters
    first_id = vocab * jax.lax.axis_index("tensor") if axes else 0

    chunk_count = -(-4 * len(hidden) * vocab // _chunk_bytes.get())
    chunk_size = vocab if chunk_count == 1 else -(-vocab // chunk_count // _LANES) * _LANES
    chunk_count = -(-vocab // chunk_size)
    padding = (0, chunk_count * chunk_size - vocab)
    if vocab_first:
        chunks = jnp.pad(kernel, (padding, (0, 0))).reshape(chunk_count, chunk_size, widths)
    else:
        chunks = jnp.pad(kernel, ((0, 0), padding)).reshape(widths, chunk_count, chunk_size).swapaxes(0, 1)

    def over_chunks(
        visit: Callable[[_Carry, jax.Array, jax.Array, jax.Array], tuple[_Carry, jax.Array | None]],
        start: _Carry,
        scope: str,
    ) -> tuple[_Carry, jax.Array | None]:
        """Scans ``visit(carry, kernel, logits, is_target)`` over the chunks of the vocabulary."""

        def step(carry: _Carry, chunk: tuple[jax.Array | int, jax.Array]) -> tuple[_Carry, jax.Array | None]:
            index, kernel = chunk
            kernel = apply_collective(jax.lax.all_gather, kernel.astype(dtype), "fsdp", axis=width_axis, tiled=True)
            with jax.named_scope(scope):
                logits = jnp.einsum(f"nd,{kernel_axes}->nv", hidden, kernel, preferred_element_type=jnp.float32)
            ids = index * chunk_size + jnp.arange(chunk_size)
            in_vocab = ids < vocab  # excludes padding of the last chunk
            is_target = (targets[:, None] - first_id == ids) & in_vocab
            return visit(carry, kernel, jnp.where(in_vocab, logits, -jnp.inf), is_target)

        if chunk_count == 1:
            carry, out = step(start, (0, chunks[0]))
            return carry, None if out is None else out[None]
        return jax.lax.scan(step, start, (jnp.arange(chunk_count), chunks))

    def accumulate_sums(
        carry: tuple[jax.Array, jax.Array, jax.Array], kernel: jax.Array, logits: jax.Array, is_target: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
        previous_max, sum_exp, target_logit = carry
        running_max = jnp.maximum(previous_max, logits.max(-1))
        sum_exp = sum_exp * jnp.exp(previous_max - running_max) + jnp.exp(logits - running_max[:, None]).sum(-1)
        return (running_max, sum_exp, target_logit + jnp.where(is_target, logits, 0).sum(-1)), None

    zeros = jnp.zeros(len(hidden))
    (running_max, sum_exp, target_logit), _ = over_chunks(accumulate_sums, (zeros - jnp.inf, zeros, zeros), "logits")
    global_max = apply_collective(jax.lax.pmax, running_max, "tensor")
    sum_exp = apply_collective(jax.lax.psum, sum_exp * jnp.exp(running_max - global_max), "tensor")
    log_normalizer = jnp.log(sum_exp) + global_max
    losses = jnp.where(loss_mask, log_normalizer - apply_collective(jax.lax.psum, target_logit, "tensor"), 0)
    value = apply_collective(jax.lax.psum, losses.sum(), *_ROWS)
    if not requested:
        return value, (None, None)

    def accumulate_grads(
        hidden_grad: jax.Array | None, kernel: jax.Array, logits: jax.Array, is_target: jax.Array
    ) -> tuple[jax.Array | None, jax.Array | None]:
        logits_grad = jnp.exp(logits - log_normalizer[:, None]) - is_target
        logits_grad = jnp.where(loss_mask[:, None], logits_grad, 0).astype(dtype)
        if hidden_grad is not None:
            hidden_grad += jnp.einsum(f"nv,{kernel_axes}->nd", logits_grad, kernel, preferred_element_type=jnp.float32)
        if "kernel" not in requested:
            return hidden_grad, None
        factors = (
            (f"nv,nd->{kernel_axes}", logits_grad, hidden)
            if vocab_first
            else (f"nd,nv->{kernel_axes}", hidden, logits_grad)
        )
        kernel_grad = jnp.einsum(*factors, preferred_element_type=jnp.float32)
        kernel_grad = apply_collective(
            jax.lax.psum_scatter, kernel_grad, "fsdp", scatter_dimension=width_axis, tiled=True
        )
        return hidden_grad, apply_collective(jax.lax.psum, kernel_grad, "data")

    start = jnp.zeros(hidden.shape) if "hidden" in requested else None
    hidden_grad, kernel_grad = over_chunks(accumulate_grads, start, RECOMPUTED)
    if hidden_grad is not None:
        hidden_grad = apply_collective(jax.lax.psum, hidden_grad, "tensor").astype(dtype).reshape(shape)
    if kernel_grad is not None:
        if vocab_first:
            kernel_grad = kernel_grad.reshape(-1, widths)[:vocab]
        else:
            kernel_grad = kernel_grad.swapaxes(0, 1).reshape(widths, -1)[:, :vocab]
        kernel_grad = kernel_grad.astype(kernel.dtype)
    return value, (hidden_grad, kernel_grad)
