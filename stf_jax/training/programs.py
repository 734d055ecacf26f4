"""The train step, compiled for every shape of a batch before the first step."""

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Iterable

import jax
import optax
from etils import epath
from jax.sharding import Mesh, NamedSharding

from stf_jax.config import TrainConfig
from stf_jax.data.sampling import BatchShape
from stf_jax.files import in_bucket
from stf_jax.models.blueprint import Blueprint
from stf_jax.parallel.mesh import BATCH, compute_context
from stf_jax.training.flops import abstract_batch, step_flops
from stf_jax.training.optimizer import make_optimizer
from stf_jax.training.state import Layout, learning_rate_factors, state_layout, training_blueprint
from stf_jax.training.step import make_train_step

_THREADS = 4  # compilations at a time: the compiler itself has threads


@dataclasses.dataclass(frozen=True)
class StepProgram:
    """The train step for one shape.

    Attributes:
      call: the compiled function of :func:`make_train_step`.
      flops: its model FLOPs, of all devices.
    """

    call: jax.stages.Compiled
    flops: int


def keep_programs(workdir: epath.Path) -> None:
    """Keeps compiled programs in ``workdir/programs``, so that a restart compiles none.

    Does nothing if jax has a folder for them already, or on CPUs, because those programs use the instructions of one
    machine and may be read on another. jax writes to local folders and to gs:// buckets.
    """
    is_writable = not in_bucket(workdir) or os.fspath(workdir).startswith("gs://")
    if jax.config.jax_compilation_cache_dir is None and jax.default_backend() != "cpu" and is_writable:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", os.fspath(workdir / "programs"))


class StepPrograms:
    """Compiles the train step for each shape of a batch, in threads."""

    def __init__(
        self,
        config: TrainConfig,
        plan: Blueprint,
        tx: optax.GradientTransformation,
        layout: Layout,
        shapes: Iterable[BatchShape],
    ) -> None:
        """Starts to compile ``shapes``, the largest first, because it takes longest and may not fit the memory."""
        self._config, self._plan, self._tx, self._layout = config, plan, tx, layout
        self._executor = concurrent.futures.ThreadPoolExecutor(_THREADS, "compile")
        self._programs: dict[BatchShape, concurrent.futures.Future[StepProgram]] = {}
        for shape in sorted(shapes, key=lambda shape: shape.size, reverse=True):
            self._programs[shape] = self._executor.submit(self._compile, shape)

    def wait(self, on_compiled: Callable[[], None]) -> None:
        """Waits until all shapes are compiled, with a call after each. Raises the error of one that cannot be."""
        for program in concurrent.futures.as_completed(self._programs.values()):
            program.result()
            on_compiled()

    def is_ready(self, shape: BatchShape) -> bool:
        """Whether :meth:`get` returns at once."""
        return shape in self._programs and self._programs[shape].done()

    def get(self, shape: BatchShape) -> StepProgram:
        """Returns the program for a shape, which is compiled now if it was not among the first ones."""
        if shape not in self._programs:
            self._programs[shape] = self._executor.submit(self._compile, shape)
        return self._programs[shape].result()

    def close(self) -> None:
        """Drops what has not begun to compile."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _compile(self, shape: BatchShape) -> StepProgram:
        config, start = self._config, (self._config.objective, self._config.init_from)
        flops = step_flops(config.model, config.rules, *shape[:3], *start, shape.budgets)
        return StepProgram(compile_step(config, self._plan, self._tx, self._layout, shape), flops)


def abstract_training(config: TrainConfig, mesh: Mesh) -> tuple[Blueprint, optax.GradientTransformation, Layout]:
    """Returns what :func:`compile_step` needs, for programs whose number of steps does not matter."""
    plan = training_blueprint(config)
    tx = make_optimizer(config.optimizer, 1000, learning_rate_factors(config.rules, plan))
    return plan, tx, state_layout(config, plan, tx, mesh)


def compile_step(
    config: TrainConfig, plan: Blueprint, tx: optax.GradientTransformation, layout: Layout, shape: BatchShape
) -> jax.stages.Compiled:
    """Compiles the train step for one shape of a batch."""
    mesh = layout.step.sharding.mesh
    rows = NamedSharding(mesh, BATCH)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows),
        abstract_batch(config.model, *shape),
    )
    with compute_context(mesh, plan.precision):
        return make_train_step(config, plan, tx, layout).lower(layout, batch).compile()
