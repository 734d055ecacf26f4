"""Training, from a config to a trained model and its measurement: one page, read from top to bottom."""

import json
import math
import time

import jax
import numpy as np
from etils import epath

from stf_jax.config import TrainConfig, UserError, to_json
from stf_jax.data.packing import Batch
from stf_jax.data.pipeline import Batches, Prepare, training_records
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.evals.known import open_benchmarks
from stf_jax.evals.running import Results, measure_all, scalars
from stf_jax.inference.generator import Generator
from stf_jax.models.presets import vision_preset
from stf_jax.models.vlm import slots_per_image
from stf_jax.runtime.checkpoint import Checkpoints
from stf_jax.runtime.cost import step_flops
from stf_jax.runtime.mesh import BATCH, check_batch, computing, make_mesh, share_of_rows
from stf_jax.runtime.telemetry import START, Telemetry
from stf_jax.training.optimizer import learning_rate, make_optimizer
from stf_jax.training.state import TrainState, init_state, state_layout
from stf_jax.training.step import make_train_step
from stf_jax.weights.folder import load_params


def train(config: TrainConfig, workdir: epath.Path, measured: epath.Path) -> list[Results]:
    """Runs one stage in ``workdir``; where that holds a checkpoint, continues from it.

    The order of a step is a contract: take the batch, step, measure, log, *then* save, and only then take the next
    batch. So a checkpoint's iterator stands where its state does, and a run that is killed goes on bit for bit as if it
    had not.

    Args:
      measured: folder for the results of the last step; those on the way are in ``workdir/evals``.

    Returns:
      The results of ``config.eval.benchmarks`` at the end.

    Raises:
      UserError: whatever in the config or the data cannot be used.
    """
    # ---- Data ------------------------------------------------------------------------------------------------------
    began = time.monotonic()
    mesh = make_mesh(config.mesh)
    check_batch(config, mesh)
    vision = vision_preset(config.model.vision)
    benchmarks = open_benchmarks(config.eval.benchmarks, config.eval.data, config.eval.limit)
    source = training_records(config)
    tokenizer = load_tokenizer(config.data.tokenizer)
    generator = Generator(config.model, tokenizer, mesh, config.data.template, config.data.aspect)  # to be measured by
    prepare = Prepare(config.data, tokenizer, vision, slots_per_image(config.model))
    host = jax.process_index()
    share, shares = share_of_rows(mesh, host)
    batches = Batches(config, source, prepare, host=share, hosts=shares)
    steps = config.steps or batches.plan.steps(config.epochs)

    # ---- Model, optimizer, state -----------------------------------------------------------------------------------
    plan = generator.plan
    tx = make_optimizer(config.optimizer, steps)
    rate = learning_rate(config.optimizer, steps)
    layout = state_layout(config, plan, tx, mesh)

    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The workdir {workdir} cannot be made: {error.strerror or error}.") from None
    checkpoints = Checkpoints(workdir, config.checkpoint)
    if checkpoints.latest is not None:
        arrays, position, clock = checkpoints.restore(checkpoints.latest, layout)
        batches.set_state(position)
        step = jax.device_put(np.int32(checkpoints.latest), layout.step.sharding)
        state = TrainState(step=step, **arrays)
    else:
        loaded = load_params(config.init_from, layout.params, config.init_missing)
        state, clock = init_state(config, layout, tx, loaded), START
    if host == 0:
        sizes = [sum(math.prod(leaf.shape) for leaf in tree.values()) for tree in (layout.trainable, layout.params)]
        print(
            f"{config.name}: {config.model.vision} + {config.model.fusion.fusion} + {config.model.llm}, "
            f"{sizes[0]:,} of {sizes[1]:,} parameters learn; {steps} steps of {config.global_batch_size} rows; "
            f"mesh {', '.join(f'{axis} {size}' for axis, size in mesh.shape.items())}"
        )
        (workdir / "config.json").write_text(json.dumps(to_json(config), indent=2) + "\n")

    # ---- The step, compiled ----------------------------------------------------------------------------------------
    rows = jax.sharding.NamedSharding(mesh, BATCH)
    train_step = make_train_step(config, plan, tx, layout)
    programs, flops = {}, {}  # by length and pictures of a row

    def measure(step, params):
        out = measured if step == steps else workdir / "evals" / f"step_{step}"
        origin = {"workdir": str(workdir), "step": step}
        return measure_all(benchmarks, generator, params, out, workdir.name, origin, rows=config.eval.batch)

    # ---- The loop --------------------------------------------------------------------------------------------------
    first = int(state.step)
    telemetry = Telemetry(workdir, config, steps, first, clock, mesh=mesh, began=began, active=host == 0)
    results = None
    for step in range(first + 1, steps + 1):
        with telemetry.waiting("data"):
            batch: Batch = next(batches)
        tokens = int((batch.segment_ids > 0).sum())
        batch = jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, x), batch)
        shape = batch.tokens.shape[1], batch.images.shape[1]
        if shape not in programs:
            flops[shape] = step_flops(config.model, config.rules, config.global_batch_size, *shape).step
            with telemetry.waiting("compile"), computing(mesh, plan.precision):
                programs[shape] = train_step.lower(state, batch).compile()
        with telemetry.step(step):
            state, metrics = programs[shape](state, batch)
        telemetry.advance(step, tokens, batches.replaced, flops[shape], metrics["loss"])
        last = step == steps
        measures = benchmarks and (last or (config.eval.every_steps and step % config.eval.every_steps == 0))
        if step % config.log_every_steps == 0 or last or measures:
            values = {name: float(value) for name, value in metrics.items()} | {"learning_rate": float(rate(step - 1))}
            if measures:
                with telemetry.waiting("measure"):
                    results = measure(step, state.params)
                values |= {name: value for result in results for name, value in scalars(result).items()}
            telemetry.log(step, values)
        if checkpoints.due(step, last=last):
            with telemetry.waiting("save"):
                checkpoints.save(step, state, batches.get_state(), telemetry.clock())
    checkpoints.close()
    telemetry.close()
    # A run that had ended before has its answers already.
    return measure(steps, state.params) if results is None else results
