"""What a schedule is: which image tokens each decoder layer sees, in training as at inference.

A schedule cuts the decoder's layers into stages. In each of them text sees all tokens of an image, the best of them by
the attention of the next layer, their keys and values only, or none. It is an object in a file of this folder, or in
your own, named in a config as ``package.module:thing``:

    MINE = Schedule(plan)                # plan(layers, tokens) -> [Stage(2, 12), Stage(4, 3)]

or a function that returns one and whose keyword-only parameters are its options (registry.py).

Axis letters: N image tokens per image, L decoder layers.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

from stf_jax.config import UserError
from stf_jax.models.stages import Stage
from stf_jax.registry import Registry


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which image tokens each decoder layer sees.

    What is ranked, how, and how many positions a stage has: models/stages.py.

    Attributes:
      plan: called with L and N; returns the stages in the order of their layers. Before the first, all tokens are read.
        It may raise ValueError with a sentence about its options.
      renumber: whether positions are counted from 0 again after a drop; by default they stay.
      soft: λ of the soft top-k: a kept token of rank r, from 0, is multiplied by σ(λ·(k − r)); 0: it stays as it is.
      silent_prefix: whether text before a conversation's first image gets nothing from attention; no layer may then
        have image tokens in its rows.
    """

    plan: Callable[[int, int], Sequence[Stage]]
    renumber: bool = False
    soft: float = 0.0
    silent_prefix: bool = False


SCHEDULES: Registry[Schedule | Callable[..., Schedule]] = Registry("model.schedule", "stf_jax.models.schedules")


@functools.lru_cache
def find_schedule(name: str) -> Schedule:
    """The schedule of that name, with the options in it. Raises UserError for a wrong one, or what is no schedule."""
    found = SCHEDULES.make(name)
    if not isinstance(found, Schedule):
        raise UserError(f"model.schedule={name} is not a Schedule of stf_jax.models.schedules.base.")
    return found


def plan_schedule(name: str, layers: int, tokens: int) -> tuple[Stage, ...]:
    """The stages of a schedule for a decoder of L layers that gets N tokens per image.

    Raises:
      UserError: an unknown name, or stages that cannot be: layers that do not ascend or that the decoder lacks, more
        tokens than there are, or only some that come back.
    """
    try:
        schedule = find_schedule(name)
        stages = tuple(schedule.plan(layers, tokens))
        _check(stages, layers, tokens)
        if schedule.silent_prefix and (stages[0].after or any(stage.rows for stage in stages)):
            raise ValueError("silent_prefix needs stages with image tokens beside or none, from the first layer on.")
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"model.schedule={name}: {error}") from None
    return stages


def _check(stages: Sequence[Stage], layers: int, tokens: int) -> None:
    if not stages:
        raise ValueError("it has no stage.")
    afters = [stage.after for stage in stages]
    if not all(a < b for a, b in itertools.pairwise((-1, *afters))):
        raise ValueError(f"its stages begin after layers {', '.join(map(str, afters))}, which must ascend.")
    if afters[-1] >= layers:
        raise ValueError(f"a stage begins after layer {afters[-1]}, but the language model has {layers} layers.")
    for before, stage in itertools.pairwise((Stage(0, tokens), *stages)):
        most = tokens if stage.beside or not before.rows else before.rows
        if not 0 <= stage.keep <= most:
            raise ValueError(
                f"{stage.keep} image tokens per image after layer {stage.after} must be 0 to {most}, the number there."
            )
        if 0 < stage.keep < tokens and (stage.beside or not before.rows):
            raise ValueError(f"image tokens enter after layer {stage.after}, and must be all {tokens} of an image.")


def scale_layers(layers: Sequence[int], depth: int, to: int) -> tuple[int, ...]:
    """Layers of a decoder of ``depth`` layers as those of one of ``to``, in proportion, halves rounded up."""
    return tuple((2 * layer * to + depth) // (2 * depth) for layer in layers)
