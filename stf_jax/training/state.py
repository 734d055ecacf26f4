"""What training holds: a trainable tree in float32, a frozen one in the compute type, moments of the first only.

Trees are flat: ``{"vision/blocks/mlp/up/kernel": array, …}``.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stf_jax.config import ModelConfig, TrainConfig, UserError
from stf_jax.models.vlm import VLM
from stf_jax.runtime.mesh import parameter_sharding
from stf_jax.training.optimizer import moments_like

Params = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a step reads and writes."""

    step: jax.Array  # int32: optimizer steps taken
    trainable: Params  # float32
    frozen: Params  # in the compute type
    moments: optax.OptState  # of the trainable tree

    @property
    def params(self) -> Params:
        """Both trees as one."""
        return self.trainable | self.frozen


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """A model without its weights: structure, and shape and logical axes of every parameter by path."""

    precision: str  # as in the config
    graph: nnx.GraphDef
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    axes: Mapping[str, tuple[str, ...]]

    def merge(self, *params: Params) -> VLM:
        """The model with the given trees as its weights; between them they hold every parameter."""
        return nnx.merge(self.graph, *(flax.traverse_util.unflatten_dict(tree, sep="/") for tree in params))

    def shardings(self, mesh: Mesh) -> dict[str, NamedSharding]:
        """Where each parameter lies. Raises as :func:`stf_jax.runtime.mesh.parameter_sharding` does."""
        return {path: parameter_sharding(path, self.shapes[path].shape, self.axes[path], mesh) for path in self.shapes}


def blueprint(config: ModelConfig) -> Blueprint:
    """Declares the model without allocating. Raises UserError as :class:`stf_jax.models.vlm.VLM` does."""
    graph, state = nnx.split(nnx.eval_shape(lambda: VLM(nnx.Rngs(0), config)))
    leaves = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
    return Blueprint(
        precision=config.precision,
        graph=graph,
        shapes={path: leaf.get_value() for path, leaf in leaves.items()},
        axes={path: leaf.get_metadata()["axes"] for path, leaf in leaves.items()},
    )


def trainable_paths(rules: tuple[tuple[str, str], ...], paths: Mapping[str, Any]) -> set[str]:
    """The parameters that learn: for each path, the first rule whose pattern matches all of it decides.

    Raises:
      UserError: a parameter that no rule covers, a pattern that covers nothing, or a word other than train, freeze.
    """
    for pattern, word in rules:
        if word not in ("train", "freeze"):
            raise UserError(f"Freeze rule ({pattern!r}, {word!r}) should say 'train' or 'freeze'.")
        try:
            covers = any(re.fullmatch(pattern, path) for path in paths)
        except re.error as error:
            raise UserError(f"Freeze rule pattern {pattern!r} is not a regular expression: {error}.") from None
        if not covers:
            raise UserError(f"Freeze rule {pattern!r} covers no parameter; paths look like {min(paths)!r}.")
    learned = set()
    for path in paths:
        word = next((word for pattern, word in rules if re.fullmatch(pattern, path)), None)
        if word is None:
            raise UserError(f"No freeze rule covers parameter {path!r}; add one to config.rules.")
        if word == "train":
            learned.add(path)
    if not learned:
        raise UserError("The freeze rules leave nothing to train.")
    return learned


def state_layout(config: TrainConfig, plan: Blueprint, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state of abstract arrays with their types and shardings: target of initialisation and of restoring.

    Raises:
      UserError: as :func:`trainable_paths`; the model is one that only answers.
    """
    if config.model.reduce:
        raise UserError(
            f"model.reduce={config.model.reduce} is for answering: train without it, "
            "and give --reduce to stf_jax.evaluate and stf_jax.chat."
        )
    learned = trainable_paths(config.rules, plan.shapes)
    shardings = plan.shardings(mesh)
    compute = jnp.dtype(config.model.precision)

    def leaf(path):
        dtype = jnp.float32 if path in learned else compute
        return jax.ShapeDtypeStruct(plan.shapes[path].shape, dtype, sharding=shardings[path])

    whole = NamedSharding(mesh, PartitionSpec())
    trainable = {path: leaf(path) for path in plan.shapes if path in learned}
    abstract = jax.eval_shape(tx.init, trainable)
    places = moments_like(tx, trainable, {path: shardings[path] for path in trainable}, whole)
    return TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
        trainable=trainable,
        frozen={path: leaf(path) for path in plan.shapes if path not in learned},
        moments=jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, places),
    )


def init_state(config: TrainConfig, layout: TrainState, tx: optax.GradientTransformation, loaded: Params) -> TrainState:
    """A new state: ``loaded`` parameters taken over, the others initialised from the seed, in place on their devices.

    One compiled program with the layout's shardings makes it, and ``loaded`` is donated to it, so that weights exist
    once.
    """

    def init(loaded, key):
        fresh = nnx.state(VLM(nnx.Rngs(key), config.model))
        params = {"/".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(fresh)} | loaded

        def cast(tree):
            return {path: params[path].astype(leaf.dtype) for path, leaf in tree.items()}

        trainable = cast(layout.trainable)
        return TrainState(jnp.zeros((), jnp.int32), trainable, cast(layout.frozen), tx.init(trainable))

    shardings = jax.tree.map(lambda leaf: leaf.sharding, layout)
    return jax.jit(init, out_shardings=shardings, donate_argnums=0)(loaded, jax.random.key(config.seed))
