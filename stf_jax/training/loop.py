"""Training, from a config to a trained model and its evaluation, in one page."""

import contextlib
import functools
import logging
import math
import time

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding

from stf_jax.checkpointing.adapted import merge_params
from stf_jax.checkpointing.manager import Checkpoints
from stf_jax.checkpointing.rules import rate_factors
from stf_jax.config import Stopped, TrainConfig, to_json
from stf_jax.data.packing import Batch
from stf_jax.data.pipeline import Batches, Preprocessor, load_training_records
from stf_jax.data.sampling import BatchShape
from stf_jax.data.tiles import find_tiles
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.evals.registry import open_benchmarks
from stf_jax.evals.runner import Results, check_images, evaluate_all, flatten_metrics
from stf_jax.files import as_user_error, write_json
from stf_jax.inference.generator import Generator
from stf_jax.inference.mesh import inference_mesh
from stf_jax.models.blueprint import TEACHER, Blueprint, Params, blueprint
from stf_jax.models.spec import resolve_model
from stf_jax.parallel.hosts import run_on_host0
from stf_jax.parallel.mesh import BATCH, check_batch, fit_mesh, get_row_share, make_mesh
from stf_jax.runs.events import Events
from stf_jax.runs.lock import workdir_lock
from stf_jax.runs.shutdown import Termination, Watchdog
from stf_jax.runs.telemetry import INITIAL_CLOCK, Telemetry
from stf_jax.training.budgets import count_tokens
from stf_jax.training.monitor import LossMonitor
from stf_jax.training.optimizer import check_steps, learning_rate, make_optimizer
from stf_jax.training.programs import StepPrograms
from stf_jax.training.remat import resolve_remat
from stf_jax.training.resume import check_changes
from stf_jax.training.start import load_start
from stf_jax.training.state import (
    Layout,
    TrainState,
    init_state,
    learning_rate_factors,
    state_layout,
    training_blueprint,
)
from stf_jax.training.step import Metrics
from stf_jax.training.teacher import check_tokenizer, load_teacher
from stf_jax.weights.model import save_description
from stf_jax.weights.origin import complete_config

_log = logging.getLogger(__name__)


def train(config: TrainConfig, workdir: epath.Path, results_dir: epath.Path) -> list[Results]:
    """Runs one stage in ``workdir``, resuming from a checkpoint there.

    The order of a step is a contract: take the batch, step, evaluate, log, *then* save, and only then take the next
    batch. So the iterator and the state in a checkpoint are of the same step, and a run that is killed resumes bit for
    bit.

    Args:
      results_dir: folder for the results of the last step; earlier ones are in ``workdir/evals``.

    Returns:
      The results of ``config.eval.benchmarks`` at the end.

    Raises:
      UserError: the config or the data cannot be used, or another run is active in ``workdir``.
      RunFailed, TryAgain, Stopped: the run ends before its last step (docs/operations.md).
    """
    with contextlib.ExitStack() as stack:
        results, stop_requested = _train(config, workdir, results_dir, stack)
    if stop_requested:
        raise Stopped(f"Stopped by SIGTERM after {config.name} was complete; the same command starts the next stage.")
    return results


def _train(
    config: TrainConfig, workdir: epath.Path, results_dir: epath.Path, stack: contextlib.ExitStack
) -> tuple[list[Results], bool]:
    """The results, and whether SIGTERM arrived too late to stop before the last step."""
    # ---- Data ------------------------------------------------------------------------------------------------------
    start_time = time.monotonic()
    watchdog = stack.enter_context(Watchdog(config.faults.hang_seconds, workdir))
    mesh = make_mesh(fit_mesh(config).mesh)
    check_batch(config, mesh)
    config = complete_config(config, workdir)
    model = resolve_model(config.model)
    vision, llm = model.vision_shape, model.llm_shape
    assert vision is not None  # a run trains a complete model
    assert llm is not None
    benchmarks = open_benchmarks(config.eval.benchmarks, config.eval.data, config.eval.limit)
    check_images(benchmarks)
    records = load_training_records(config)
    tokenizer = load_tokenizer(config.data.tokenizer)
    evaluation_mesh = inference_mesh(blueprint(model), mesh)
    data = config.data
    generator = Generator(config.model, tokenizer, evaluation_mesh, data.template, data.aspect, find_tiles(data))
    preprocess = Preprocessor(data, tokenizer, vision, model.slots, llm.vocab, model.reduction.dropped)
    host = jax.process_index()
    share, shares = get_row_share(mesh, host)
    on_read = functools.partial(watchdog.heartbeat, "data were read")
    batches = Batches(config, records, preprocess, host=share, hosts=shares, on_chunk=on_read)
    stack.callback(batches.close)
    steps = config.steps or batches.plan.steps(config.epochs)
    warning = check_steps(config, steps, len(records))
    largest = max(batches.plan.shapes(0, steps), key=lambda shape: shape.size)
    config = resolve_remat(config, workdir, mesh, largest)

    # ---- Model, optimizer, state -----------------------------------------------------------------------------------
    plan = training_blueprint(config, workdir)
    check_tokenizer(plan, tokenizer)
    tx = make_optimizer(config.optimizer, steps, learning_rate_factors(config.rules, plan))
    rate = learning_rate(config.optimizer, steps)
    layout = state_layout(config, plan, tx, mesh)

    run_on_host0(lambda: stack.enter_context(workdir_lock(workdir)))
    termination = stack.enter_context(Termination(mesh))
    events = stack.enter_context(Events(workdir, active=host == 0))
    checkpoints = stack.enter_context(Checkpoints(workdir, config.checkpoint, config.faults, events.add))
    changed = check_changes(config, workdir) if checkpoints.latest is not None else {}
    # Compiled while the weights are read.
    programs = StepPrograms(config, plan, tx, layout, batches.plan.shapes(checkpoints.latest or 0, steps))
    stack.callback(programs.close)

    def start_state() -> TrainState[jax.Array]:
        loaded, base = load_start(config, plan, layout)
        checkpoints.set_base(base)
        loaded |= load_teacher(plan, layout.frozen)
        return init_state(config, plan, layout, tx, loaded)

    restored = checkpoints.restore_newest(layout, lambda: start_state().frozen)
    if restored is not None:
        step, arrays, position, clock = restored
        batches.set_state(position)
        state = TrainState(step=jax.device_put(np.int32(step), layout.step.sharding), **arrays)
    else:
        state, clock = start_state(), dict(INITIAL_CLOCK)
    if host == 0:
        print(_describe_run(config, plan, layout, steps, mesh))
        if warning:
            _log.warning(warning)
        with as_user_error(workdir):
            write_json(workdir / "config.json", to_json(config))
            save_description(workdir, config, tokenizer)

    # ---- Evaluation and the log ------------------------------------------------------------------------------------
    watchdog.heartbeat("the weights were read")
    rows = NamedSharding(mesh, BATCH)

    def evaluate(step: int, params: Params) -> list[Results]:
        def on_batch_end() -> None:
            watchdog.heartbeat(f"questions at step {step}")
            if termination.should_stop_now():
                raise Stopped("")

        out = results_dir if step == steps else workdir / "evals" / f"step_{step}"
        origin = {"workdir": str(workdir), "step": step}
        return evaluate_all(
            benchmarks,
            generator,
            merge_params(params, plan),
            out,
            workdir.name,
            origin,
            rows=config.eval.batch,
            on_batch_end=on_batch_end,
        )

    def evaluate_and_log(step: int, values: dict[str, float]) -> list[Results]:
        with telemetry.time_waiting("measure"):
            results = evaluate(step, state.params)
        telemetry.log(
            step, values | {name: value for result in results for name, value in flatten_metrics(result).items()}
        )
        return results

    def read_values(step: int, metrics: Metrics) -> dict[str, float]:
        """The values to log of a step, when the updates that were skipped up to it have been counted."""
        values = {name: float(metrics[name]) for name in ("loss", "gradient_norm", "learned_tokens")}
        values["learning_rate"] = float(rate(step - 1 - telemetry.updates_skipped))
        groups = rate_factors(config.rules).items()
        return values | {f"learning_rate/{name}": factor * values["learning_rate"] for name, factor in groups}

    def log(step: int, metrics: Metrics) -> None:
        telemetry.log(step, read_values(step, metrics))

    # ---- The loop --------------------------------------------------------------------------------------------------
    start_step = int(state.step)
    results: list[Results] | None = None
    pending_values, in_a_row = clock.pop("owed", None), clock.pop("skipped_in_a_row", 0)
    telemetry = stack.enter_context(
        Telemetry(
            workdir,
            config,
            steps,
            start_step,
            clock,
            mesh=mesh,
            start_time=start_time,
            active=host == 0,
            events=events,
            log_first_step=bool(pending_values),
        )
    )
    monitor = LossMonitor(
        config.faults, workdir, batches.record_ids, events.add, telemetry.count_skipped_update, in_a_row
    )
    if start_step < steps or pending_values:
        events.add("begin", start_step, steps=steps, resumed=restored is not None, changed=changed)
    if pending_values:  # the run was stopped during this evaluation
        results = evaluate_and_log(start_step, pending_values)
    with telemetry.time_waiting("compile"):
        # Several programs may take longer than a run may seem to hang.
        programs.wait(on_compiled=functools.partial(watchdog.heartbeat, "a program was compiled"))
    for step in range(start_step + 1, steps + 1):
        watchdog.heartbeat(f"step {step}")
        with telemetry.time_waiting("data"):
            host_batch: Batch[np.ndarray] = next(batches)
        batch = jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, x), host_batch)
        shape = BatchShape(len(batch.tokens), batch.tokens.shape[1], batch.images.shape[1], batch.budgets)
        if not programs.is_ready(shape):  # of a later epoch
            with telemetry.time_waiting("compile"):
                programs.get(shape)
        program = programs.get(shape)
        termination.enable_graceful_stop()
        with telemetry.step(step):
            state, metrics = program.call(state, batch)
        last, pending_values = step == steps, None
        stop = termination.should_stop_after_step() and not last
        evaluation_due = last or (config.eval.every_steps > 0 and step % config.eval.every_steps == 0)
        should_evaluate = bool(benchmarks) and evaluation_due and not stop
        log_due = should_evaluate or last or step % config.log_every_steps == 0
        tokens = count_tokens(host_batch, model.slots)
        telemetry.advance(step, tokens, batches.replaced, program.flops, metrics["loss"], log_due)
        # A step is logged when later ones are dispatched, so that the devices never wait for the log.
        then = functools.partial(log, step, metrics) if log_due and not should_evaluate else lambda: None
        monitor.enqueue(step, host_batch, metrics, then)
        if last or should_evaluate:
            monitor.drain()
        if last:
            monitor.finish(step, steps - telemetry.updates_skipped)
        if should_evaluate:
            values = read_values(step, metrics)
            try:
                results = evaluate_and_log(step, values)
            except Stopped:
                stop, pending_values = True, values
        elif stop and benchmarks and evaluation_due:  # the next start evaluates
            monitor.drain()
            pending_values = read_values(step, metrics)
        if checkpoints.should_save(step, last=last or stop):
            monitor.drain()
            with telemetry.time_waiting("save"):
                clock = (
                    telemetry.clock()
                    | {"skipped_in_a_row": monitor.in_a_row}
                    | ({"owed": pending_values} if pending_values else {})
                )
                checkpoints.save(step, state, batches.get_state(), clock, last=last or stop)
        if stop:
            raise Stopped(f"Stopped by SIGTERM after step {step}, which is saved; the same command resumes from there.")
    # A run that was already complete has its answers on disk.
    results = evaluate(steps, state.params) if results is None else results
    return results, start_step < steps and termination.should_stop_now()


def _describe_run(config: TrainConfig, plan: Blueprint, layout: Layout, steps: int, mesh: Mesh) -> str:
    """One line about what trains."""
    own = {path: leaf for path, leaf in layout.params.items() if not path.startswith(f"{TEACHER}/")}
    trained, total = (sum(math.prod(leaf.shape) for leaf in tree.values()) for tree in (layout.trainable, own))
    positions = config.data.tokens_per_batch
    batch = f"up to {positions:,} positions" if positions else f"{config.global_batch_size} rows"
    return (
        f"{config.name}: {config.model.vision} + {config.model.fusion.fusion} + {config.model.llm}, "
        f"{trained:,} of {total:,} parameters are trainable; {steps} steps of {batch}; "
        f"mesh {', '.join(f'{axis} {size}' for axis, size in mesh.shape.items())}"
        + ("" if plan.teacher is None else f"; teacher {plan.teacher.folder}")
    )
