"""A model small enough to compile in seconds, as presets and as a config: ``--config=tests/tiny.py:fusion=mlp``."""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist

import jax
import ml_collections
import numpy as np
import optax
from etils import epath

from stf_jax.checkpointing.manager import Checkpoints
from stf_jax.cli import parse
from stf_jax.config import (
    CheckpointConfig,
    MeshConfig,
    TrainConfig,
    default_config,
    parse_arg,
    resolve,
    to_json,
)
from stf_jax.data.packing import Batch
from stf_jax.data.pipeline import Batches, Preprocessor, load_training_records
from stf_jax.data.tiles import Tiles, with_newline
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.inference.generator import Generator
from stf_jax.models import spec
from stf_jax.models.blueprint import Blueprint, blueprint
from stf_jax.models.quantized import scale_path
from stf_jax.models.spec import resolve_model
from stf_jax.parallel.mesh import BATCH, compute_context, make_mesh
from stf_jax.training.optimizer import make_optimizer
from stf_jax.training.state import TrainState, learning_rate_factors, state_layout, training_blueprint
from stf_jax.training.step import make_train_step

spec.VISION["clip-tiny"] = dataclasses.replace(
    spec.VISION["clip-mini-16-96"], image_size=64, width=32, layers=3, heads=4, mlp=64
)
spec.LLM["llama-tiny"] = dataclasses.replace(
    spec.LLM["llama-mini"], width=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=64
)
spec.LLM["llama-deep-tiny"] = dataclasses.replace(spec.LLM["llama-tiny"], layers=4, qkv_bias=True)

TOKENIZER = load_tokenizer("miniature")


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Stage-2 training (``rules`` as in finetune.py) on embedded scenes, six steps of eight rows, in float32."""
    arg = parse_arg(arg, fusion="mbtf_stf", steps=6)
    config = default_config()
    config.model.update(vision="clip-tiny", llm="llama-tiny", precision="float32", remat="none")
    config.model.fusion.update(fusion=arg.fusion, mbtf_hidden=32, stf_hidden=64)
    config.data.update(source="scenes", tokenizer="miniature", max_length=192)
    config.data.scenes.update(size=256, edition=1)
    config.update(steps=arg.steps, global_batch_size=8, log_every_steps=1)
    config.init_missing = (".*",)
    config.rules = (("vision/.*", "freeze"), (".*", "train"))
    config.checkpoint.every_steps = 2
    config.mesh.fsdp = 1  # parameters are not sharded by default
    return config


def tiny(**changes) -> TrainConfig:
    """The config above, resolved, with dotted keys changed: ``tiny(**{"mesh.fsdp": 4})``."""
    config = get_config()
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return resolve(config)[0]


@dataclasses.dataclass(frozen=True)
class Setup:
    """The objects that training builds from a config before it has weights."""

    config: TrainConfig
    plan: Blueprint
    tx: optax.GradientTransformation
    mesh: jax.sharding.Mesh
    layout: TrainState

    @classmethod
    def of(cls, **changes) -> "Setup":
        """The setup of the tiny config with dotted keys changed."""
        config = tiny(**changes)
        plan, mesh = training_blueprint(config), make_mesh(config.mesh)
        tx = make_optimizer(config.optimizer, config.steps, learning_rate_factors(config.rules, plan))
        return cls(config, plan, tx, mesh, state_layout(config, plan, tx, mesh))

    def state(self, seed: int = 0) -> TrainState:
        """An initial state filled by numpy, which compiles nothing, unlike the initializers."""
        plain = {path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in self.plan.plain.items()}
        values = random_params(self.plan.shapes | plain, seed)
        for path in self.plan.quantized:
            values |= quantized_by_definition(self.plan, path, values[path])

        def put(leaf, value):
            return jax.device_put(np.asarray(value).astype(leaf.dtype), leaf.sharding)

        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape), self.layout)
        trainable, frozen = ({path: values[path] for path in tree} for tree in (zeros.trainable, zeros.frozen))
        return jax.tree.map(put, self.layout, dataclasses.replace(zeros, trainable=trainable, frozen=frozen))

    def step(self) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
        """The train step for numpy batches, compiled as in training/loop.py."""
        step, rows = make_train_step(self.config, self.plan, self.tx, self.layout), jax.NamedSharding(self.mesh, BATCH)

        def run(state, batch):
            with compute_context(self.mesh, self.plan.precision):
                return step(state, jax.device_put(batch, rows))

        return run


def train_and_save(workdir: epath.Path, setup: Setup, state: TrainState, data: Sequence[Batch]) -> tuple:
    """Trains on the batches, and saves the second step in ``workdir``.

    Returns:
      The train step; the last state, with numpy arrays; the losses.
    """
    (workdir / "config.json").write_text(json.dumps(to_json(setup.config)))
    step, losses = setup.step(), []
    for number, batch in enumerate(data, 1):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        if number == 2:
            with Checkpoints(workdir, CheckpointConfig()) as checkpoints:
                checkpoints.save(2, state, {}, {}, last=True)
    return step, jax.tree.map(np.array, state), losses


def load_recipe(file: str, *overrides: str) -> TrainConfig:
    """The single stage of a file in configs/ (``finetune.py``, ``demo.py:stage=pretrain``), with flags as overrides."""
    configs = pathlib.Path(__file__).parent.parent / "configs"
    (config,) = resolve(parse([f"--config={configs}/{file}", *overrides], "", workdir=False)[1])
    return config


def random_params(shapes: Mapping[str, jax.ShapeDtypeStruct], seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 parameters: scales around 1, all others around 0."""
    rng = np.random.default_rng(seed)
    return {
        path: 0.1 * rng.standard_normal(leaf.shape, np.float32) + np.float32(path.endswith("scale"))
        for path, leaf in sorted(shapes.items())
    }


def quantized_by_definition(plan: Blueprint, path: str, kernel: np.ndarray) -> dict[str, np.ndarray]:
    """The quantized kernels and float32 scales of stacked kernels [L, *inputs, *outputs] of a plan, by path."""
    quantized, scale = (plan.shapes[name].shape for name in (path, scale_path(path)))
    if plan.quantized[path].name == "int8":
        return int8_by_definition(path, kernel, len(scale) - 1)
    (axis,) = np.flatnonzero(np.subtract(quantized, kernel.shape))
    return nf4_by_definition(path, kernel, axis)


def nf4_values() -> np.ndarray:
    """NF4 by its definition: quantiles of the normal distribution for 8 numbers above 0 and 7 below, relative to ±1."""
    last = 1 - (1 / 30 + 1 / 32) / 2
    above, below = ([NormalDist().inv_cdf(p) for p in np.linspace(0.5, last, count)[1:]] for count in (9, 8))
    return np.array([*(-x for x in reversed(below)), 0, *above]) / above[-1]


def nf4_by_definition(path: str, kernel: np.ndarray, axis: int) -> dict[str, np.ndarray]:
    """The NF4 codes, two in a byte, and float32 scales of kernels in blocks of 64 along an axis, by path."""
    kernel = np.moveaxis(np.float64(kernel), axis, -1)
    codes, scales = [], []
    for start in range(0, kernel.shape[-1], 64):
        block = kernel[..., start : start + 64]
        scales.append(np.abs(block).max(-1))
        shares = block / np.where(scales[-1], scales[-1], 1)[..., None]
        codes.append(np.abs(shares[..., None] - nf4_values()).argmin(-1))
    whole = np.concatenate(codes, -1)
    packed = np.moveaxis(16 * whole[..., ::2] + whole[..., 1::2], -1, axis).astype(np.uint8)
    return {path: packed, scale_path(path): np.float32(np.stack(scales, axis))}


def int8_by_definition(path: str, kernel: np.ndarray, outputs: int) -> dict[str, np.ndarray]:
    """The int8 kernels and float32 scales of stacked kernels [L, *inputs, *outputs], channel by channel, by path."""
    kernel = np.float32(kernel)
    split = kernel.ndim - outputs
    columns = kernel.reshape(len(kernel), -1, np.prod(kernel.shape[split:], dtype=int)).swapaxes(1, 2)
    rounded, scales = [], []
    for column in columns.reshape(-1, columns.shape[2]):
        largest = max(abs(column))
        rounded.append(np.rint(column * (np.float32(127) / largest)) if largest else column)
        scales.append(largest * np.float32(1 / 127))
    values = np.reshape(rounded, columns.shape).swapaxes(1, 2).reshape(kernel.shape)
    scale = np.reshape(np.float32(scales), (len(kernel), *kernel.shape[split:]))
    return {path: values.astype(np.int8), scale_path(path): scale}


def large_params(shapes: Mapping[str, jax.ShapeDtypeStruct], seed: int = 0) -> dict[str, np.ndarray]:
    """Random parameters large enough that answers depend on the prompt."""
    return {path: x if path.endswith("scale") else 4 * x for path, x in random_params(shapes, seed).items()}


def make_generator(reduce: str = "", keep: int = 0, tiles: Tiles | None = None, **changes) -> Generator:
    """A generator of the tiny model with large random weights."""
    config = resolve_model(tiny(**{"model.reduce": reduce, "model.keep": keep} | changes).model)
    config = with_newline(config, tiles)
    plan, mesh = blueprint(config), make_mesh(MeshConfig(1, 1, 1))
    places = plan.shardings(mesh)
    params = ((path, jax.device_put(x, places[path])) for path, x in large_params(plan.shapes, 1).items())
    aspect = "pad" if tiles is None else "tiles"
    return Generator(config, TOKENIZER, mesh, "v1", aspect, tiles).load_params(params)


def make_preprocessor(config: TrainConfig) -> Preprocessor:
    """The preprocessor that turns the config's records into examples."""
    tokenizer, tower = load_tokenizer(config.data.tokenizer), spec.vision_preset(config.model.vision)
    reduction = resolve_model(config.model).reduction
    return Preprocessor(config.data, tokenizer, tower, reduction.slots, dropped=reduction.dropped)


def batches(config: TrainConfig, count: int) -> list[Batch]:
    """The first batches of the config's data."""
    stream = Batches(config, load_training_records(config), make_preprocessor(config), host=0, hosts=1)
    return list(itertools.islice(stream, count))
