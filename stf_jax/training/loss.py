"""Cross-entropy of next tokens, and their divergence from a teacher's, without materializing all logits.

The logits of a batch are by far its largest array: a row of 2,048 positions and a vocabulary of 32,000 takes 250 MiB in
float32, and their gradient takes as much again. So logits are computed for one chunk of the vocabulary at a time, used
and dropped: once for their normalizer, and, where gradients are requested, once more for these. On a mesh that shards
the output head, no device holds all of the head or of its gradient.

Axis letters: B rows, T positions, N = B·T, D width, V vocabulary.
"""

import contextlib
import contextvars
import dataclasses
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
_Normalizer = tuple[jax.Array, jax.Array]  # maximum of the logits so far, and the sum of exp(logits − maximum); [N]
_Warm = tuple[jax.Array, jax.Array] | None
_WarmSums = tuple[_Normalizer, _Normalizer, jax.Array] | None
_Carry = TypeVar("_Carry")


@contextlib.contextmanager
def chunks_of(size: int) -> Iterator[None]:
    """Traces the losses with chunks of up to ``size`` bytes of float32 logits on a device."""
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
    return _loss_and_grads((hidden, kernel, targets, loss_mask), vocab_first, ())[0]


def _forward(
    hidden: CustomVJPPrimal,
    kernel: CustomVJPPrimal,
    targets: CustomVJPPrimal,
    loss_mask: CustomVJPPrimal,
    vocab_first: bool,
) -> tuple[jax.Array, _Gradients]:
    requested = tuple(name for name, x in (("hidden", hidden), ("kernel", kernel)) if x.perturbed)
    values = (hidden.value, kernel.value, targets.value, loss_mask.value)
    return _loss_and_grads(values, vocab_first, requested)


def _backward(vocab_first: bool, gradients: _Gradients, cotangent: jax.Array) -> tuple[jax.Array | None, ...]:
    # The cotangent is a scalar factor, so the forward pass has already computed the gradients without it.
    return *(None if g is None else (g * cotangent).astype(g.dtype) for g in gradients), None, None


cross_entropy_sum.defvjp(_forward, _backward, symbolic_zeros=True)


@dataclasses.dataclass(frozen=True)
class Teaching:
    """How a student learns from a teacher.

    Attributes:
      temperature: what divides the logits of both.
      weight: of the divergence, and 1 − weight of cross-entropy.
      vocab_first: whether the teacher's kernel is laid out like an embedding.
    """

    temperature: float
    weight: float
    vocab_first: bool = False


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def distillation_sum(
    hidden: Float[Array, "B T D"],
    kernel: Float[Array, "..."],
    targets: Int[Array, "B T"],
    loss_mask: Bool[Array, "B T"],
    teacher_hidden: Float[Array, "B T E"],
    teacher_kernel: Float[Array, "..."],
    teaching: Teaching,
    vocab_first: bool = False,
) -> Float[Array, ""]:
    """Cross-entropy mixed with the divergence from a teacher, summed over target tokens, in nats, float32.

    The divergence is KL(teacher ‖ student) of both distributions at the temperature t, times t², so that its gradient
    is as large at any t (arXiv 1503.02531). The teacher gets no gradient.

    Args:
      hidden, kernel, targets, loss_mask, vocab_first: as of :func:`cross_entropy_sum`.
      teacher_hidden: the teacher's hidden states at the student's positions, of any width.
      teacher_kernel: [E, V], or [V, E] with ``teaching.vocab_first``.
      teaching: the temperature and the weights.
    """
    arguments = (hidden, kernel, targets, loss_mask, teacher_hidden, teacher_kernel)
    return _loss_and_grads(arguments, vocab_first, (), teaching)[0]


def _forward_distillation(*arguments: Any) -> tuple[jax.Array, _Gradients]:
    *primals, teaching, vocab_first = arguments
    requested = tuple(name for name, x in zip(("hidden", "kernel"), primals, strict=False) if x.perturbed)
    return _loss_and_grads(tuple(x.value for x in primals), vocab_first, requested, teaching)


def _backward_distillation(
    teaching: Teaching, vocab_first: bool, gradients: _Gradients, cotangent: jax.Array
) -> tuple[jax.Array | None, ...]:
    return *_backward(vocab_first, gradients, cotangent), None, None


distillation_sum.defvjp(_forward_distillation, _backward_distillation, symbolic_zeros=True)


def divergences(
    hidden: Float[Array, "B T D"],
    kernel: Float[Array, "..."],
    loss_mask: Bool[Array, "B T"],
    teacher_hidden: Float[Array, "B T D"],
    vocab_first: bool = False,
) -> Float[Array, "B T"]:
    """KL(teacher ‖ student) at each target token, in nats, float32, and 0 elsewhere. It has no gradient.

    Args:
      hidden, kernel, loss_mask, vocab_first: as of :func:`cross_entropy_sum`.
      teacher_hidden: the teacher's hidden states at the student's positions; its head is the same.
    """
    arguments = (hidden, kernel, jnp.zeros_like(loss_mask, jnp.int32), loss_mask, teacher_hidden, kernel)
    arguments = jax.lax.stop_gradient(arguments)
    return _loss_and_grads(arguments, vocab_first, (), Teaching(1.0, 1.0, vocab_first), summed=False)[0]


def _loss_and_grads(
    arguments: tuple[jax.Array, ...],
    vocab_first: bool,
    requested: tuple[str, ...],
    teaching: Teaching | None = None,
    *,
    summed: bool = True,
) -> tuple[jax.Array, _Gradients]:
    """The sum, and its gradients for hidden and kernel, None where they are not requested.

    With ``summed=False`` it is the loss of each position [B, T], which has no gradients.
    """
    mesh = jax.sharding.get_abstract_mesh()
    local = functools.partial(
        _local_loss_and_grads,
        vocab_first=vocab_first,
        requested=requested,
        axes=mesh.axis_names,
        teaching=teaching,
        summed=summed,
    )
    if mesh.empty:
        return local(*arguments)

    def vocab_spec(vocab_first: bool) -> PartitionSpec:
        return PartitionSpec(*(("tensor", "fsdp") if vocab_first else ("fsdp", "tensor")))

    rows = PartitionSpec(_ROWS)
    gradients = (rows if "hidden" in requested else None, vocab_spec(vocab_first) if "kernel" in requested else None)
    teacher_specs = () if teaching is None else (rows, vocab_spec(teaching.vocab_first))
    return jax.shard_map(
        local,
        in_specs=(rows, vocab_spec(vocab_first), rows, rows, *teacher_specs),
        out_specs=(PartitionSpec() if summed else rows, gradients),
        check_vma=False,  # nothing is differentiated through it
    )(*arguments)


def _extend(normalizer: _Normalizer, logits: jax.Array) -> tuple[_Normalizer, jax.Array, jax.Array]:
    """Adds logits [N, v] to a normalizer; also returns what rescales earlier sums, and ``exp(logits − maximum)``."""
    previous_max, sum_exp = normalizer
    running_max = jnp.maximum(previous_max, logits.max(-1))
    rescale, exp = jnp.exp(previous_max - running_max), jnp.exp(logits - running_max[:, None])
    return (running_max, sum_exp * rescale + exp.sum(-1)), rescale, exp


def _local_loss_and_grads(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    loss_mask: jax.Array,
    *teacher_head: jax.Array,
    vocab_first: bool,
    requested: tuple[str, ...],
    axes: tuple[str, ...],
    teaching: Teaching | None,
    summed: bool,
) -> tuple[jax.Array, _Gradients]:
    """Computes :func:`_loss_and_grads` on one device, which has its rows and its slices of the kernels."""

    def apply_collective(op: Callable[..., jax.Array], x: jax.Array, *names: str, **options: Any) -> jax.Array:
        names = tuple(name for name in names if axes and jax.lax.axis_size(name) > 1)  # over one device it would copy
        return op(x, names, **options) if names else x

    shape, dtype = hidden.shape, hidden.dtype
    hidden, targets, loss_mask = hidden.reshape(-1, shape[-1]), targets.reshape(-1), loss_mask.reshape(-1)
    vocab, widths = kernel.shape if vocab_first else kernel.shape[::-1]
    width_axis, kernel_axes = (1, "vd") if vocab_first else (0, "dv")  # the axis of the width, and einsum letters
    first_id = vocab * jax.lax.axis_index("tensor") if axes else 0

    chunk_count = -(-4 * len(hidden) * vocab * (1 if teaching is None else 2) // _chunk_bytes.get())
    chunk_size = vocab if chunk_count == 1 else -(-vocab // chunk_count // _LANES) * _LANES
    chunk_count = -(-vocab // chunk_size)
    padding = (0, chunk_count * chunk_size - vocab)

    def split(kernel: jax.Array, vocab_first: bool) -> jax.Array:
        if vocab_first:
            return jnp.pad(kernel, (padding, (0, 0))).reshape(chunk_count, chunk_size, -1)
        return jnp.pad(kernel, ((0, 0), padding)).reshape(len(kernel), chunk_count, chunk_size).swapaxes(0, 1)

    def compute_logits(
        hidden: jax.Array, kernel: jax.Array, vocab_first: bool, scope: str
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the chunk of a kernel in full width, and its logits."""
        kernel = apply_collective(
            jax.lax.all_gather, kernel.astype(hidden.dtype), "fsdp", axis=int(vocab_first), tiled=True
        )
        product = "nd,vd->nv" if vocab_first else "nd,dv->nv"
        with jax.named_scope(scope):
            return kernel, jnp.einsum(product, hidden, kernel, preferred_element_type=jnp.float32)

    chunks = split(kernel, vocab_first)
    if teaching is None:
        teacher_hidden = teacher_chunks = None
    else:
        teacher_hidden, teacher_chunks = (
            teacher_head[0].reshape(len(hidden), -1),
            split(teacher_head[1], teaching.vocab_first),
        )

    def over_chunks(
        visit: Callable[[_Carry, jax.Array, jax.Array, jax.Array, _Warm], tuple[_Carry, jax.Array | None]],
        start: _Carry,
        scope: str,
    ) -> tuple[_Carry, jax.Array | None]:
        """Scans ``visit(carry, kernel, logits, is_target, warm)`` over the chunks of the vocabulary.

        ``warm`` are the logits of student and teacher divided by the temperature, or None without a teacher.
        """

        def step(
            carry: _Carry, chunk: tuple[jax.Array | int, jax.Array, jax.Array | None]
        ) -> tuple[_Carry, jax.Array | None]:
            index, kernel, teacher_kernel = chunk
            kernel, logits = compute_logits(hidden, kernel, vocab_first, scope)
            ids = index * chunk_size + jnp.arange(chunk_size)
            in_vocab = ids < vocab  # excludes padding of the last chunk
            is_target = (targets[:, None] - first_id == ids) & in_vocab
            logits = jnp.where(in_vocab, logits, -jnp.inf)
            if teaching is None or teacher_hidden is None or teacher_kernel is None:
                return visit(carry, kernel, logits, is_target, None)
            _, teacher_logits = compute_logits(teacher_hidden, teacher_kernel, teaching.vocab_first, scope)
            teacher_logits = jnp.where(in_vocab, teacher_logits, -jnp.inf)
            warm = logits / teaching.temperature, teacher_logits / teaching.temperature
            return visit(carry, kernel, logits, is_target, warm)

        if chunk_count == 1:
            carry, out = step(start, (0, chunks[0], None if teacher_chunks is None else teacher_chunks[0]))
            return carry, None if out is None else out[None]
        return jax.lax.scan(step, start, (jnp.arange(chunk_count), chunks, teacher_chunks))

    def accumulate_sums(
        carry: tuple[_Normalizer, jax.Array, _WarmSums],
        kernel: jax.Array,
        logits: jax.Array,
        is_target: jax.Array,
        warm: _Warm,
    ) -> tuple[tuple[_Normalizer, jax.Array, _WarmSums], None]:
        normalizer, target_logit, warm_sums = carry
        normalizer, _, _ = _extend(normalizer, logits)
        target_logit += jnp.where(is_target, logits, 0).sum(-1)
        if warm is not None and warm_sums is not None:
            student, teacher, gap = warm_sums
            teacher, rescale, exp = _extend(teacher, warm[1])
            difference = jnp.where(warm[1] > -jnp.inf, warm[1] - warm[0], 0)
            warm_sums = _extend(student, warm[0])[0], teacher, gap * rescale + (exp * difference).sum(-1)
        return (normalizer, target_logit, warm_sums), None

    def log_sum(normalizer: _Normalizer) -> jax.Array:
        running_max, sum_exp = normalizer
        global_max = apply_collective(jax.lax.pmax, running_max, "tensor")
        sum_exp = apply_collective(jax.lax.psum, sum_exp * jnp.exp(running_max - global_max), "tensor")
        return jnp.log(sum_exp) + global_max

    zeros = jnp.zeros(len(hidden))
    empty = (zeros - jnp.inf, zeros)
    start_sums = (empty, zeros, None if teaching is None else (empty, empty, zeros))
    (normalizer, target_logit, warm_sums), _ = over_chunks(accumulate_sums, start_sums, "logits")
    log_normalizer = log_sum(normalizer)
    losses = log_normalizer - apply_collective(jax.lax.psum, target_logit, "tensor")
    warm_logs = zeros, zeros
    if teaching is not None and warm_sums is not None:
        student, teacher, gap = warm_sums
        warm_logs = log_sum(student), log_sum(teacher)
        # The mean over the teacher's distribution of its logit minus the student's.
        gap = apply_collective(jax.lax.psum, gap * jnp.exp(teacher[0] - warm_logs[1]), "tensor")
        divergence = gap + warm_logs[0] - warm_logs[1]
        losses = (1 - teaching.weight) * losses + teaching.weight * teaching.temperature**2 * divergence
    losses = jnp.where(loss_mask, losses, 0)
    if not summed:
        return losses.reshape(shape[:2]), (None, None)
    value = apply_collective(jax.lax.psum, losses.sum(), *_ROWS)
    if not requested:
        return value, (None, None)

    def accumulate_grads(
        hidden_grad: jax.Array | None, kernel: jax.Array, logits: jax.Array, is_target: jax.Array, warm: _Warm
    ) -> tuple[jax.Array | None, jax.Array | None]:
        logits_grad = jnp.exp(logits - log_normalizer[:, None]) - is_target
        if teaching is not None and warm is not None:
            student, teacher = (jnp.exp(x - log[:, None]) for x, log in zip(warm, warm_logs, strict=True))
            factor = teaching.weight * teaching.temperature
            logits_grad = (1 - teaching.weight) * logits_grad + factor * (student - teacher)
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
