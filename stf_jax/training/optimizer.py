"""AdamW with warm-up, equal to torch's AdamW with LLaVA's schedule."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from stf_jax.config import OptimizerConfig, TrainConfig, UserError
from stf_jax.models.blueprint import Params

_MIN_UPDATES = 10  # fewer in a run give a warning


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0 over ``warmup_ratio`` of the steps, then cosine decay to 0, or a constant rate.

    The number of warm-up steps is rounded up, as in Hugging Face.
    """
    warmup = _warmup_steps(config, steps)
    warmup_schedule = optax.linear_schedule(0.0, config.learning_rate, warmup)
    if config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(config.learning_rate, max(steps - warmup, 1))
    else:
        decay = optax.constant_schedule(config.learning_rate)
    return optax.join_schedules([warmup_schedule, decay], [warmup]) if warmup else decay


def _warmup_steps(config: OptimizerConfig, steps: int) -> int:
    return math.ceil(config.warmup_ratio * steps)


def check_steps(config: TrainConfig, steps: int, rows: int) -> str:
    """Returns a warning if the run has too few steps to learn much, else an empty string.

    Args:
      rows: rows in the data.

    Raises:
      UserError: the only step is the first of the warm-up, whose learning rate is 0.
    """
    if steps >= _MIN_UPDATES:
        return ""
    reason = f"steps={steps}" if config.steps else f"{rows:,} rows, epochs={config.epochs:g}"
    run = f"{steps} update{'s' * (steps > 1)} of global_batch_size={config.global_batch_size} ({reason})"
    advice = "Lower global_batch_size or raise epochs (or steps), as configs/small.py does for few rows"
    if steps <= 1 and _warmup_steps(config.optimizer, steps):
        raise UserError(
            f"The run would learn nothing: it has {run}, and the first step of warm-up has learning rate 0. {advice}, "
            "or set optimizer.warmup_ratio=0."
        )
    return f"The run has only {run}, and will learn little. {advice}."


def has_weight_decay(path: str) -> bool:
    """Whether weight decay applies to the parameter at that path: not to biases and norms, as in Hugging Face."""
    return path.rsplit("/", 1)[-1] not in ("bias", "scale")


def make_optimizer(
    config: OptimizerConfig, steps: int, factors: Mapping[str, Sequence[float]] | None = None
) -> optax.GradientTransformation:
    """The optimizer for a flat ``{path: parameter}`` tree over ``steps`` steps.

    Args:
      factors: what multiplies the learning rate of a parameter, by path: one number, or one per layer of a block; by
        default 1.
    """
    adamw = optax.adamw(
        learning_rate(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=lambda params: {path: has_weight_decay(path) for path in params},
    )
    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    parts.append(adamw)
    if others := {path: values for path, values in (factors or {}).items() if set(values) != {1}}:
        parts.append(optax.stateless(functools.partial(_scale_updates, others)))
    return optax.chain(*parts) if len(parts) > 1 else adamw


def _scale_updates(factors: Mapping[str, Sequence[float]], updates: Params, params: Any) -> Params:
    del params
    return {path: scale_layers(x, factors[path]) if path in factors else x for path, x in updates.items()}


def scale_layers(x: jax.Array, factors: Sequence[float]) -> jax.Array:
    """Multiplies an array by its factor, or each layer of a block [L, ...] by its own."""
    return x * np.reshape(np.array(factors, np.float32), (-1, *[1] * (x.ndim - 1)))


def map_moments(
    tx: optax.GradientTransformation,
    params: Mapping[str, jax.ShapeDtypeStruct],
    values: Mapping[str, Any],
    placeholder: Any,
) -> optax.OptState:
    """A tree shaped like ``tx.init(params)``, with the leaves of ``values`` in place of the parameters' moments.

    ``params`` is abstract and ``values`` has its paths. ``placeholder`` replaces leaves that belong to no parameter
    (counts).
    """
    abstract = jax.eval_shape(tx.init, params)
    return optax.tree_utils.tree_map_params(
        tx, lambda _, leaf: leaf, abstract, values, transform_non_params=lambda _: placeholder
    )
