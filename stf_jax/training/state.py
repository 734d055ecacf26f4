"""The training state: trainable parameters in float32, frozen ones in the compute type, moments of the trainable ones.

Trees are flat: ``{"vision/blocks/mlp/up/kernel": array, …}``.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stf_jax.checkpointing.renames import path_matches
from stf_jax.config import TrainConfig, UserError
from stf_jax.models.blueprint import Blueprint, Params
from stf_jax.models.vlm import VLM
from stf_jax.training.optimizer import map_moments

Leaf = TypeVar("Leaf")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState(Generic[Leaf]):
    """Everything a step reads and writes. Leaves are arrays, or in a :data:`Layout` abstract arrays."""

    step: Leaf  # int32: optimizer steps taken
    trainable: dict[str, Leaf]  # float32
    frozen: dict[str, Leaf]  # in the compute type
    moments: optax.OptState  # of the trainable tree

    @property
    def params(self) -> dict[str, Leaf]:
        """Trainable and frozen parameters in one tree."""
        return self.trainable | self.frozen


Layout = TrainState[jax.ShapeDtypeStruct]  # with types and shardings


def trainable_paths(rules: tuple[tuple[str, str], ...], paths: Mapping[str, Any]) -> set[str]:
    """Paths of the trainable parameters. For each path, the first rule whose pattern matches all of it decides.

    Raises:
      UserError: a parameter that no rule covers, a pattern that covers nothing, or an action other than train, freeze.
    """
    for pattern, action in rules:
        if action not in ("train", "freeze"):
            raise UserError(f"Freeze rule ({pattern!r}, {action!r}) must say 'train' or 'freeze'.")
        try:
            matches = any(path_matches(pattern, path) for path in paths)
        except re.error as error:
            raise UserError(f"Freeze rule pattern {pattern!r} is not a regular expression: {error}.") from None
        if not matches:
            raise UserError(f"Freeze rule {pattern!r} covers no parameter; paths look like {min(paths)!r}.")
    trainable = set()
    for path in paths:
        decision = next((action for pattern, action in rules if path_matches(pattern, path)), None)
        if decision is None:
            raise UserError(f"No freeze rule covers parameter {path!r}; add one to config.rules.")
        if decision == "train":
            trainable.add(path)
    if not trainable:
        raise UserError("The freeze rules leave nothing to train.")
    return trainable


def state_layout(config: TrainConfig, plan: Blueprint, tx: optax.GradientTransformation, mesh: Mesh) -> Layout:
    """The training state as abstract arrays with types and shardings, the target of initialization and of restoring.

    Raises:
      UserError: as :func:`trainable_paths`; or the model is reduced, which is for inference only.
    """
    if config.model.reduce:
        raise UserError(
            f"model.reduce={config.model.reduce} is for inference only: train without it, "
            "and give --reduce to stf_jax.evaluate and stf_jax.chat."
        )
    names = trainable_paths(config.rules, plan.shapes)
    shardings = plan.shardings(mesh)
    compute = jnp.dtype(config.model.precision)

    def abstract_leaf(path: str) -> jax.ShapeDtypeStruct:
        dtype = jnp.float32 if path in names else compute
        return jax.ShapeDtypeStruct(plan.shapes[path].shape, dtype, sharding=shardings[path])

    replicated = NamedSharding(mesh, PartitionSpec())
    trainable = {path: abstract_leaf(path) for path in plan.shapes if path in names}
    abstract_moments = jax.eval_shape(tx.init, trainable)
    moment_shardings = map_moments(tx, trainable, {path: shardings[path] for path in trainable}, replicated)
    return TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated),
        trainable=trainable,
        frozen={path: abstract_leaf(path) for path in plan.shapes if path not in names},
        moments=jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract_moments, moment_shardings
        ),
    )


def init_state(
    config: TrainConfig, layout: Layout, tx: optax.GradientTransformation, loaded: Params
) -> TrainState[jax.Array]:
    """A new state with the ``loaded`` parameters; the others are initialized from the seed, in place on their devices.

    One compiled program with the layout's shardings creates it. ``loaded`` is donated to it, so that weights exist only
    once.
    """

    def init(loaded: Params, key: jax.Array) -> TrainState[jax.Array]:
        initial = nnx.state(VLM(nnx.Rngs(key), config.model))
        params = {"/".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(initial)} | loaded

        def cast(tree: Mapping[str, jax.ShapeDtypeStruct]) -> Params:
            return {path: params[path].astype(leaf.dtype) for path, leaf in tree.items()}

        trainable = cast(layout.trainable)
        return TrainState(jnp.zeros((), jnp.int32), trainable, cast(layout.frozen), tx.init(trainable))

    shardings = jax.tree.map(lambda leaf: leaf.sharding, layout)
    return jax.jit(init, out_shardings=shardings, donate_argnums=0)(loaded, jax.random.key(config.seed))
