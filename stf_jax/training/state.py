"""The training state: trainable parameters in float32, frozen ones in the compute type, moments of the trainable ones.

Trees are flat: ``{"vision/blocks/mlp/up/kernel": array, …}``.
"""

import dataclasses
from collections.abc import Mapping
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stf_jax.checkpointing.rules import Decision, Rules, decide
from stf_jax.config import ModelConfig, TrainConfig, UserError
from stf_jax.models.blueprint import Blueprint, Params, blueprint, build_model
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


def training_blueprint(model: ModelConfig, rules: Rules) -> Blueprint:
    """The blueprint of a model with the adapters that the rules name. Raises UserError as :func:`decide` does."""
    plan = blueprint(model)
    adapters = {path: choice.adapter for path, choice in _decide(rules, plan).items() if choice.adapter is not None}
    return blueprint(model, adapters) if adapters else plan


def learning_rate_factors(rules: Rules, plan: Blueprint) -> dict[str, tuple[float, ...]]:
    """What multiplies the learning rate of each trainable parameter: one number, or one per layer of a block.

    A layer whose factor is 0 is frozen.

    Args:
      plan: of :func:`training_blueprint`.

    Raises:
      UserError: as :func:`decide`.
    """
    decisions = _decide(rules, plan)
    factors = {path: choice.factors for path, choice in decisions.items() if choice.adapter is None}
    factors |= {path: decisions[kernel].factors for path, kernel in plan.adapted.items()}
    return {path: factors[path] for path in plan.shapes if any(factors.get(path, ()))}


def _decide(rules: Rules, plan: Blueprint) -> dict[str, Decision]:
    return decide(rules, {path: plan.depth(path) for path in plan.shapes if path not in plan.adapted}, plan.linears)


def state_layout(config: TrainConfig, plan: Blueprint, tx: optax.GradientTransformation, mesh: Mesh) -> Layout:
    """The training state as abstract arrays with types and shardings, the target of initialization and of restoring.

    Args:
      plan: of :func:`training_blueprint`.

    Raises:
      UserError: as :func:`decide`; or the model is reduced, which is for inference only.
    """
    if config.model.reduce:
        raise UserError(
            f"model.reduce={config.model.reduce} is for inference only: train without it, "
            "and give --reduce to stf_jax.evaluate and stf_jax.chat."
        )
    names = learning_rate_factors(config.rules, plan)
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


def base_params(plan: Blueprint, layout: Layout) -> dict[str, jax.ShapeDtypeStruct]:
    """The layout of all parameters but those of adapters, which no weights have at the start."""
    return {path: leaf for path, leaf in layout.params.items() if path not in plan.adapted}


def init_state(
    config: TrainConfig, plan: Blueprint, layout: Layout, tx: optax.GradientTransformation, loaded: Params
) -> TrainState[jax.Array]:
    """A new state with the ``loaded`` parameters; the others are initialized from the seed, in place on their devices.

    One compiled program with the layout's shardings creates it. ``loaded`` is donated to it, so that weights exist only
    once.
    """

    def init(loaded: Params, key: jax.Array) -> TrainState[jax.Array]:
        initial = nnx.state(build_model(nnx.Rngs(key), config.model, plan.adapters), nnx.Param)
        params = {"/".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(initial)} | loaded

        def cast(tree: Mapping[str, jax.ShapeDtypeStruct]) -> Params:
            return {path: params[path].astype(leaf.dtype) for path, leaf in tree.items()}

        trainable = cast(layout.trainable)
        return TrainState(jnp.zeros((), jnp.int32), trainable, cast(layout.frozen), tx.init(trainable))

    shardings = jax.tree.map(lambda leaf: leaf.sharding, layout)
    return jax.jit(init, out_shardings=shardings, donate_argnums=0)(loaded, jax.random.key(config.seed))
