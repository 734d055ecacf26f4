"""The training state: trainable parameters in float32, frozen ones in the compute type or quantized, moments.

Trees are flat: ``{"vision/blocks/mlp/up/kernel": array, …}``.
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
import optax
from etils import epath
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stf_jax.checkpointing.rules import Decision, Rules, decide
from stf_jax.config import TrainConfig, UserError
from stf_jax.models.blueprint import Blueprint, Params, blueprint, build_model
from stf_jax.models.layers import make_rngs
from stf_jax.models.quantized import scale_path
from stf_jax.training.objectives.base import find_objective
from stf_jax.training.optimizer import map_moments
from stf_jax.training.teacher import find_teacher

Leaf = TypeVar("Leaf")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState(Generic[Leaf]):
    """Everything a step reads and writes. Leaves are arrays, or in a :data:`Layout` abstract arrays."""

    step: Leaf  # int32: optimizer steps taken
    trainable: dict[str, Leaf]  # float32
    frozen: dict[str, Leaf]  # in the compute type; quantized kernels (models/quantized.py), and their scales in float32
    moments: optax.OptState  # of the trainable tree

    @property
    def params(self) -> dict[str, Leaf]:
        """Trainable and frozen parameters in one tree."""
        return self.trainable | self.frozen


Layout = TrainState[jax.ShapeDtypeStruct]  # with types and shardings


def training_blueprint(config: TrainConfig, workdir: epath.Path | None = None) -> Blueprint:
    """The blueprint of a run's model with the adapters and quantized kernels of its rules, and its objective's teacher.

    Args:
      workdir: of the run, which goes on with the parts that its teacher had at the start.

    Raises:
      UserError: as :func:`decide`, :func:`stf_jax.training.teacher.find_teacher` and
        :func:`stf_jax.models.blueprint.build_model`.
    """
    plan = blueprint(config.model)
    decisions = _decide(config.rules, plan)
    adapters = {path: choice.adapter for path, choice in decisions.items() if choice.adapter is not None}
    quantized = {path: choice.quantization for path, choice in decisions.items() if choice.quantization is not None}
    own = {path.split("/")[0] for path, choice in decisions.items() if any(choice.factors) or path in quantized}
    teacher = find_teacher(config, own, workdir)
    return blueprint(config.model, adapters, quantized, teacher) if adapters or quantized or teacher else plan


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
    return decide(rules, {path: plan.depth(path) for path in plan.shapes if path not in plan.added}, plan.linears)


def state_layout(config: TrainConfig, plan: Blueprint, tx: optax.GradientTransformation, mesh: Mesh) -> Layout:
    """The training state as abstract arrays with types and shardings, the target of initialization and of restoring.

    Args:
      plan: of :func:`training_blueprint`.

    Raises:
      UserError: as :func:`decide`; the model is reduced or set to one budget, which is for inference only; or the
        config's objective refuses it.
    """
    check = getattr(find_objective(config.objective, config.model), "check", None)
    if check is not None:
        check(config)
    if config.model.reduce:
        raise UserError(
            f"model.reduce={config.model.reduce} is for inference only: train without it, "
            "and give --reduce to stf_jax.evaluate and stf_jax.chat."
        )
    if config.model.tokens:
        raise UserError(
            f"model.tokens={config.model.tokens} is for inference only: train with model.fusion.budgets, and give "
            "--tokens to stf_jax.evaluate and stf_jax.chat."
        )
    names = learning_rate_factors(config.rules, plan)
    shardings = plan.shardings(mesh)
    dtypes = dict.fromkeys(plan.shapes, jnp.dtype(config.model.precision)) | dict.fromkeys(names, jnp.dtype("float32"))
    for path in plan.quantized:
        dtypes |= {name: plan.shapes[name].dtype for name in (path, scale_path(path))}

    def abstract_leaf(path: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(plan.shapes[path].shape, dtypes[path], sharding=shardings[path])

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
    """The layout of the parameters that weights have at the start: those of the plain model, not quantized."""
    return {path: layout.params[path].update(shape=shape) for path, shape in plan.plain.items()}


def saved_by_base(plan: Blueprint, layout: Layout, unchanged: Collection[str]) -> dict[str, jax.ShapeDtypeStruct]:
    """The frozen parameters that follow from loaded ones: those that are ``unchanged``, and their scales."""
    scales = {scale_path(path) for path in plan.quantized.keys() & unchanged}
    return {path: leaf for path, leaf in layout.frozen.items() if path in unchanged or path in scales}


def quantize_loaded(plan: Blueprint, layout: Layout, path: str, value: jax.Array) -> Params:
    """A loaded parameter as the state has it: a kernel that the rules quantize with its scales, by path."""
    if path not in plan.quantized:
        return {path: value}
    shardings = {name: layout.frozen[name].sharding for name in (path, scale_path(path))}
    return jax.jit(functools.partial(_quantize, plan), out_shardings=shardings)({path: value})


def _quantize(plan: Blueprint, params: Params) -> Params:
    """The parameters with kernels that are not quantized yet, but should be, quantized."""
    quantized: Params = {}
    for path in plan.quantized.keys() & params.keys():
        kind, scale = plan.quantized[path], scale_path(path)
        if params[path].dtype != kind.dtype:
            quantized[path], quantized[scale] = kind.quantize(params[path], plan.shapes[scale].shape)
    return params | quantized


def init_state(
    config: TrainConfig, plan: Blueprint, layout: Layout, tx: optax.GradientTransformation, loaded: Params
) -> TrainState[jax.Array]:
    """A new state with the ``loaded`` parameters; the others are initialized from the seed, in place on their devices.

    Kernels that the rules quantize may be loaded in any type, but memory is lower with :func:`quantize_loaded`.

    One compiled program with the layout's shardings creates it. ``loaded`` is donated to it, so that weights exist only
    once.
    """

    def init(loaded: Params, key: jax.Array) -> TrainState[jax.Array]:
        initial = nnx.state(
            build_model(make_rngs(key), config.model, plan.adapters, plan.quantized, plan.teacher), nnx.Param
        )
        params = {"/".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(initial)}
        params |= _quantize(plan, loaded)

        def cast(tree: Mapping[str, jax.ShapeDtypeStruct]) -> Params:
            return {path: params[path].astype(leaf.dtype) for path, leaf in tree.items()}

        trainable = cast(layout.trainable)
        return TrainState(jnp.zeros((), jnp.int32), trainable, cast(layout.frozen), tx.init(trainable))

    shardings = jax.tree.map(lambda leaf: leaf.sharding, layout)
    return jax.jit(init, out_shardings=shardings, donate_argnums=0)(loaded, jax.random.key(config.seed))
