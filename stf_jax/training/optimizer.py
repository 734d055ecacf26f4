"""AdamW with a warm-up, as torch's and LLaVA's."""

import math

import jax
import optax

from stf_jax.config import OptimizerConfig, TrainConfig, UserError

_FEW = 10  # updates


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Rises linearly from 0 over ``warmup_ratio`` of the steps, then falls to 0 by a cosine, or stays.

    A broken step of warm-up counts whole, as in Hugging Face.
    """
    warmup = _warmup(config, steps)
    rise = optax.linear_schedule(0.0, config.learning_rate, warmup)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(config.learning_rate, max(steps - warmup, 1))
    else:
        after = optax.constant_schedule(config.learning_rate)
    return optax.join_schedules([rise, after], [warmup]) if warmup else after


def _warmup(config, steps):
    return math.ceil(config.warmup_ratio * steps)


def check_steps(config: TrainConfig, steps: int, rows: int) -> str:
    """A warning where a run has so few steps that it learns little; otherwise empty.

    Args:
      rows: that the data hold.

    Raises:
      UserError: its only step is the first of the warm-up, whose learning rate is 0.
    """
    if steps >= _FEW:
        return ""
    why = f"steps={steps}" if config.steps else f"{rows:,} rows, epochs={config.epochs:g}"
    run = f"{steps} update{'s' * (steps > 1)} of global_batch_size={config.global_batch_size} ({why})"
    cure = "Lower global_batch_size or raise epochs (or steps), as configs/small.py does for few rows"
    if steps <= 1 and _warmup(config.optimizer, steps):
        raise UserError(
            f"The run would learn nothing: it has {run}, and the first of the warm-up has learning rate 0. {cure}, or "
            "set optimizer.warmup_ratio=0."
        )
    return f"The run has only {run}, and will learn little. {cure}."


def decays(path: str) -> bool:
    """Whether weight decay applies to the parameter of that path: not to biases and norms, as in Hugging Face."""
    return path.rsplit("/", 1)[-1] not in ("bias", "scale")


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The transformation for a flat ``{path: parameter}`` tree over ``steps`` steps."""
    adamw = optax.adamw(
        learning_rate(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=lambda params: {path: decays(path) for path in params},
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw) if config.clip_norm else adamw


def moments_like(tx: optax.GradientTransformation, params: dict, like: dict, other):
    """A tree shaped as ``tx.init(params)`` with the leaves of ``like`` in the places of parameters' moments.

    ``params`` is abstract, ``like`` has its paths, and ``other`` stands wherever there is no parameter (counts).
    """
    abstract = jax.eval_shape(tx.init, params)
    return optax.tree_utils.tree_map_params(
        tx, lambda _, leaf: leaf, abstract, like, transform_non_params=lambda _: other
    )
