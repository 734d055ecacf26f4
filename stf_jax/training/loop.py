"""Training, from a config to a trained model and its measurement: one page, read from top to bottom."""

import contextlib
import functools
import logging
import math
import time

import jax
import numpy as np
from etils import epath

from stf_jax.config import Stopped, TrainConfig, to_json
from stf_jax.data.packing import Batch
from stf_jax.data.pipeline import Batches, Prepare, training_records
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.evals.known import open_benchmarks
from stf_jax.evals.running import Results, check_images, measure_all, scalars
from stf_jax.inference.generator import Generator
from stf_jax.models.presets import llm_of, vision_of
from stf_jax.models.vlm import slots_per_image
from stf_jax.runtime.checkpoint import Checkpoints
from stf_jax.runtime.cost import step_flops
from stf_jax.runtime.ending import Termination, Watchdog
from stf_jax.runtime.files import write_json, writing
from stf_jax.runtime.hold import hold
from stf_jax.runtime.hosts import by_first
from stf_jax.runtime.journal import Events
from stf_jax.runtime.mesh import BATCH, check_batch, computing, make_mesh, share_of_rows
from stf_jax.runtime.telemetry import START, Telemetry
from stf_jax.training.optimizer import check_steps, learning_rate, make_optimizer
from stf_jax.training.resuming import changes
from stf_jax.training.state import TrainState, init_state, state_layout
from stf_jax.training.step import make_train_step
from stf_jax.training.watching import Watch
from stf_jax.weights.folder import load_params
from stf_jax.weights.model import save_description
from stf_jax.weights.origin import complete

_log = logging.getLogger(__name__)


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
      UserError: whatever in the config or the data cannot be used; another run is at work in ``workdir``.
      RunFailed, TryAgain, Stopped: the run ends before its last step (docs/operations.md).
    """
    with contextlib.ExitStack() as ends:
        results, told = _train(config, workdir, measured, ends)
    if told:
        raise Stopped(f"Stopped by SIGTERM when {config.name} was done; what follows begins with the same command.")
    return results


def _train(config, workdir, measured, ends):
    """The results, and whether SIGTERM came too late to stop before the last step."""
    # ---- Data ------------------------------------------------------------------------------------------------------
    began = time.monotonic()
    watchdog = ends.enter_context(Watchdog(config.faults.hang_seconds, workdir))
    mesh = make_mesh(config.mesh)
    check_batch(config, mesh)
    config = complete(config, workdir)
    vision = vision_of(config.model)
    benchmarks = open_benchmarks(config.eval.benchmarks, config.eval.data, config.eval.limit)
    check_images(benchmarks)
    source = training_records(config)
    tokenizer = load_tokenizer(config.data.tokenizer)
    generator = Generator(config.model, tokenizer, mesh, config.data.template, config.data.aspect)  # to be measured by
    prepare = Prepare(config.data, tokenizer, vision, slots_per_image(config.model), llm_of(config.model).vocab)
    host = jax.process_index()
    share, shares = share_of_rows(mesh, host)
    reading = functools.partial(watchdog.comes_to, "data were read")
    batches = Batches(config, source, prepare, host=share, hosts=shares, between=reading)
    ends.callback(batches.close)
    steps = config.steps or batches.plan.steps(config.epochs)
    warning = check_steps(config, steps, len(source))

    # ---- Model, optimizer, state -----------------------------------------------------------------------------------
    plan = generator.plan
    tx = make_optimizer(config.optimizer, steps)
    rate = learning_rate(config.optimizer, steps)
    layout = state_layout(config, plan, tx, mesh)

    by_first(lambda: ends.enter_context(hold(workdir)))
    termination = ends.enter_context(Termination(mesh))
    events = ends.enter_context(Events(workdir, active=host == 0))
    checkpoints = ends.enter_context(Checkpoints(workdir, config.checkpoint, config.faults, events.add))
    changed = changes(config, workdir) if checkpoints.latest is not None else {}
    found = checkpoints.newest(layout)
    if found is not None:
        step, arrays, position, clock = found
        batches.set_state(position)
        state = TrainState(step=jax.device_put(np.int32(step), layout.step.sharding), **arrays)
    else:
        loaded = load_params(config.init_from, layout.params, config.init_missing)
        state, clock = init_state(config, layout, tx, loaded), dict(START)
    if host == 0:
        sizes = [sum(math.prod(leaf.shape) for leaf in tree.values()) for tree in (layout.trainable, layout.params)]
        print(
            f"{config.name}: {config.model.vision} + {config.model.fusion.fusion} + {config.model.llm}, "
            f"{sizes[0]:,} of {sizes[1]:,} parameters learn; {steps} steps of {config.global_batch_size} rows; "
            f"mesh {', '.join(f'{axis} {size}' for axis, size in mesh.shape.items())}"
        )
        if warning:
            _log.warning(warning)
        with writing(workdir):
            write_json(workdir / "config.json", to_json(config))
            save_description(workdir, config, tokenizer)

    # ---- The step, compiled ----------------------------------------------------------------------------------------
    watchdog.comes_to("the weights were read")
    rows = jax.sharding.NamedSharding(mesh, BATCH)
    train_step = make_train_step(config, plan, tx, layout)
    programs, flops = {}, {}  # by length and images of a row

    def measure(step, params):
        def between():
            watchdog.comes_to(f"questions at step {step}")
            if termination.now():
                raise Stopped("")

        out = measured if step == steps else workdir / "evals" / f"step_{step}"
        origin = {"workdir": str(workdir), "step": step}
        how = {"rows": config.eval.batch, "between": between}
        return measure_all(benchmarks, generator, params, out, workdir.name, origin, **how)

    def log(step, values, measures):
        """Measures, if asked to, and writes the step's line; gives the results."""
        results = None
        if measures:
            with telemetry.waiting("measure"):
                results = measure(step, state.params)
            values |= {name: value for result in results for name, value in scalars(result).items()}
        telemetry.log(step, values)
        return results

    # ---- The loop --------------------------------------------------------------------------------------------------
    first, results, owed, in_a_row = int(state.step), None, clock.pop("owed", None), clock.pop("skipped_in_a_row", 0)
    how = dict(mesh=mesh, began=began, active=host == 0, events=events, owed=bool(owed))
    telemetry = ends.enter_context(Telemetry(workdir, config, steps, first, clock, **how))
    watch = Watch(config.faults, workdir, batches.records, events.add, telemetry.skipped, in_a_row)
    if first < steps or owed:
        events.add("begin", first, steps=steps, resumed=found is not None, changed=changed)
    if owed:  # the run was stopped in that measurement
        results = log(first, owed, measures=True)
    for step in range(first + 1, steps + 1):
        watchdog.comes_to(f"step {step}")
        with telemetry.waiting("data"):
            read: Batch = next(batches)
        batch = jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, x), read)
        shape = batch.tokens.shape[1], batch.images.shape[1]
        if shape not in programs:
            flops[shape] = step_flops(config.model, config.rules, config.global_batch_size, *shape).step
            with telemetry.waiting("compile"), computing(mesh, plan.precision):
                programs[shape] = train_step.lower(state, batch).compile()
        termination.stepping()
        with telemetry.step(step):
            state, metrics = programs[shape](state, batch)
        telemetry.advance(step, int((read.segment_ids > 0).sum()), batches.replaced, flops[shape], metrics["loss"])
        watch.note(step, read, metrics)
        last, owed = step == steps, None
        if last:
            watch.finish(step, steps - telemetry.updates_skipped)
        stop = termination.after_step() and not last
        measures = (
            benchmarks and not stop and (last or (config.eval.every_steps and step % config.eval.every_steps == 0))
        )
        if step % config.log_every_steps == 0 or last or measures:
            watch.catch_up()
            values = {name: float(metrics[name]) for name in ("loss", "gradient_norm", "learned_tokens")}
            values["learning_rate"] = float(rate(step - 1 - telemetry.updates_skipped))
            try:
                results = log(step, values, measures) or results
            except Stopped:
                stop, owed = True, values
        if checkpoints.due(step, last=last or stop):
            watch.catch_up()
            with telemetry.waiting("save"):
                clock = telemetry.clock() | {"skipped_in_a_row": watch.in_a_row} | ({"owed": owed} if owed else {})
                checkpoints.save(step, state, batches.get_state(), clock, last=last or stop)
        if stop:
            raise Stopped(f"Stopped by SIGTERM after step {step}, which is saved; the same command goes on from there.")
    # A run that had ended before has its answers already.
    results = measure(steps, state.params) if results is None else results
    return results, first < steps and termination.now()
