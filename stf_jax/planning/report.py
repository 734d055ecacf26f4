"""Estimates for a run: memory, work, traffic and time of its programs, and the cost of the training."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from stf_jax.accounting.chips import CHIPS
from stf_jax.accounting.flops import PRIME, count_executed
from stf_jax.accounting.memory import host_bytes, peak_bytes
from stf_jax.config import TrainConfig
from stf_jax.data.sampling import BatchShape
from stf_jax.inference.generator import INITIAL_MAX_NEW_TOKENS
from stf_jax.parallel.mesh import fit_mesh, make_mesh, row_shards
from stf_jax.planning.hlo import Traffic, count_traffic
from stf_jax.planning.program import OutOfMemory, Program, abstract_train_state, largest_batch, make_program
from stf_jax.planning.topology import get_chip, memory_limit
from stf_jax.training.flops import decode_flops, prefill_flops, step_flops
from stf_jax.training.remat import activation_bytes_per_row, bytes_per_device, choose_remat, with_remat

# Fractions of a chip's peak figures that good programs attain: matrix products of large models run at 60 to 75 % of the
# peak, memory and links at 80 to 90 %. An assumption, the same for all chips.
ATTAINED = {"compute": 0.7, "memory": 0.8, "link": 0.8, "network": 0.8}


def make_report(
    config: TrainConfig, program_kind: str, devices: list[jax.Device], price: float = 0.0
) -> dict[str, Any]:
    """Compiles a program of a run for these devices and reports its memory, work, traffic and time.

    Args:
      program_kind: ``train``; ``prefill`` or ``decode`` for ``eval.batch`` questions; ``evaluate``, one batch of them
        with answers of 128 tokens, including the training state in memory if ``eval.benchmarks`` is set.
      price: of a chip per hour.

    Returns:
      Plain data; bytes are per device, FLOPs those of all devices in one step (for ``decode``, of one token per row).

    Raises:
      UserError: as :func:`stf_jax.planning.program.make_program`.
    """
    if program_kind == "evaluate":
        report = _merge_evaluation(*(make_report(config, kind, devices) for kind in ("prefill", "decode")))
        report |= _add_train_state(config, report, devices)
    elif program_kind == "train" and config.model.remat == "auto":
        report = _report_fastest(config, devices)
    else:
        report = _report_program(config, make_program(config, program_kind, devices), devices)
    return report | _run_cost(config, program_kind, report, devices, price)


def _report_program(config: TrainConfig, program: Program, devices: list[jax.Device]) -> dict[str, Any]:
    limit, parts = memory_limit(devices[0]), {name: bytes_per_device(tree) for name, tree in program.parts.items()}
    report = {
        "what": program.kind,
        "chip": get_chip(devices[0]).name,
        "devices": len(devices),
        "mesh": dict(program.mesh.shape),
        "rows": program.rows,
        "positions": program.length,
        "images": program.images,
        "remat": config.model.remat if program.kind == "train" else None,
        "memory_limit_bytes_per_device": limit,
    }
    cost = trace_cost(config, program.kind, devices)
    work, activations = cost.work(config, program), cost.activation_bytes(config, program)
    try:
        compiled = program.compile()
    except OutOfMemory as error:
        peak = error.needed
        report |= {"fits": False, "peak_bytes_per_device": peak}
        report["memory"] = parts | {"activations": activations, "temporaries": None}
        return report | _estimate_speed(program, devices, work, [])
    peak, text = peak_bytes(compiled), compiled.as_text()
    assert text is not None  # all compilers that plan uses report it
    report |= {"fits": peak <= limit, "peak_bytes_per_device": peak}
    temporaries, host = max(peak - sum(parts.values()) - activations, 0), host_bytes(compiled)
    report["memory"] = (
        parts | {"activations": activations, "temporaries": temporaries} | ({"host": host} if host else {})
    )
    trips = 1 if program.kind == "decode" else None  # one token
    sent = count_traffic(text, program.mesh, trips)
    jax.clear_caches()  # a compiled program of a large model takes a gigabyte, and there may be more to compile
    return report | _estimate_speed(program, devices, work, sent)


def _report_fastest(config: TrainConfig, devices: list[jax.Device]) -> dict[str, Any]:
    """Reports a training step with the rematerialization that training chooses on these devices."""
    reports: dict[str, dict[str, Any]] = {}

    def add_report(candidate: TrainConfig) -> dict[str, Any]:
        report = _report_program(candidate, make_program(candidate, "train", devices), devices)
        return reports.setdefault(candidate.model.remat, report)

    mesh, shape = make_mesh(fit_mesh(config, devices).mesh, devices), largest_batch(config)
    chosen = choose_remat(config, mesh, shape, memory_limit(devices[0]), lambda c: add_report(c)["fits"])
    return reports[chosen] if chosen in reports else add_report(with_remat(config, chosen))


@dataclasses.dataclass(frozen=True)
class Work:
    """Work of one execution of a program."""

    model_flops: int  # required by the model (accounting/flops.py)
    executed_flops: float  # including recomputation and overhead
    memory_bytes: float  # per device, read and written by matrix products and the optimizer


@dataclasses.dataclass(frozen=True)
class TracedCost:
    """Cost of a program per row, from its trace."""

    flops_per_row: float
    bytes_per_row: float  # read and written by matrix products, on the device of the row
    weight_bytes: float  # of weights, per device and pass over a batch or microbatch
    activation_bytes_per_row: float  # kept from forward to backward, on the device of the row

    def work(self, config: TrainConfig, program: Program) -> Work:
        """Work of a program with its rows and microbatches."""
        rows, memory_bytes = program.rows / row_shards(program.mesh), self.weight_bytes
        if program.kind == "train":
            # For each trainable parameter: gradient, value and both moments are read, read again to check that the
            # update is finite, and written.
            memory_bytes *= config.optimizer.accumulation_steps
            memory_bytes += 12 * bytes_per_device(program.arguments[0].trainable)
        memory_bytes += self.bytes_per_row * rows
        return Work(_model_flops(config, program), self.flops_per_row * program.rows, memory_bytes)

    def activation_bytes(self, config: TrainConfig, program: Program) -> int:
        """Bytes of activations that a device keeps from forward to backward."""
        shards, microbatches = row_shards(program.mesh), config.optimizer.accumulation_steps
        return int(self.activation_bytes_per_row * program.rows / shards / microbatches)


def trace_cost(config: TrainConfig, program_kind: str, devices: list[jax.Device]) -> TracedCost:
    """Traces a program, without compiling it, with a number of rows that identifies the axes of rows."""
    config = fit_mesh(config, devices)
    optimizer = dataclasses.replace(config.optimizer, accumulation_steps=1)
    data = dataclasses.replace(config.data, tokens_per_batch=0)  # of other numbers of rows
    unsplit = dataclasses.replace(config, optimizer=optimizer, data=data)
    program = make_program(unsplit, program_kind, devices, rows=PRIME * row_shards(make_mesh(config.mesh, devices)))
    shards = row_shards(program.mesh)
    executed = count_executed(program.trace(), shards, len(devices))
    activation_bytes = 0.0
    if program_kind == "train":
        layout = program.arguments[0]
        activation_bytes = activation_bytes_per_row(config, program.mesh, layout, largest_batch(config))
    return TracedCost(
        executed.flops / program.rows,
        executed.bytes_by_rows * shards / program.rows,
        executed.bytes_fixed,
        activation_bytes,
    )


def _model_flops(config: TrainConfig, program: Program) -> int:
    shape = program.rows, program.length, program.images
    if program.kind == "train":
        budgets = program.arguments[1].budgets
        return step_flops(config.model, config.rules, *shape, config.objective, config.init_from, budgets)
    if program.kind == "decode":
        return decode_flops(config.model, program.rows, program.length, program.images)
    return sum(prefill_flops(config.model, *shape).values())


def _estimate_speed(
    program: Program, devices: Sequence[jax.Device], work: Work, sent: Sequence[Traffic]
) -> dict[str, Any]:
    links, network = 0, 0
    by_kind: dict[str, dict[str, int]] = {}
    for entry in sent:
        by_axes, axes = by_kind.setdefault(entry.kind, {}), "+".join(entry.axes)
        by_axes[axes] = by_axes.get(axes, 0) + entry.bytes  # within and between slices
        if entry.between_slices:
            network += entry.bytes
        else:
            links += entry.bytes
    chip = get_chip(devices[0])
    roofline = _work_seconds(work, devices) | {"link": links / chip.link, "network": network / chip.network}
    bound, seconds = _find_bound(roofline)
    tokens = program.rows * (1 if program.kind == "decode" else program.length)
    return {
        "model_flops": work.model_flops,
        "executed_flops": round(work.executed_flops),
        "memory_traffic_bytes": round(work.memory_bytes),
        "collective_bytes": by_kind,
        "roofline_seconds": roofline,
        "bound": bound,
        "step_seconds_estimate": seconds,
        "tokens_per_second": tokens / seconds,
        "mfu_estimate": work.model_flops / seconds / len(devices) / chip.flops,
    }


def _work_seconds(work: Work, devices: Sequence[jax.Device]) -> dict[str, float]:
    chip = get_chip(devices[0])
    return {
        "compute": work.executed_flops / len(devices) / chip.flops,
        "memory": work.memory_bytes / chip.bandwidth,
    }


def _find_bound(roofline: Mapping[str, float]) -> tuple[str, float]:
    """Returns what takes longest, and its seconds at the attained speed."""
    seconds = {name: value / ATTAINED[name] for name, value in roofline.items()}
    return max(seconds.items(), key=lambda item: item[1])


def _merge_evaluation(prefill: dict[str, Any], decode: dict[str, Any]) -> dict[str, Any]:
    """The report of a batch of questions: one prefill, then ``INITIAL_MAX_NEW_TOKENS`` decode steps."""
    larger = max(prefill, decode, key=lambda report: report["peak_bytes_per_device"] or math.inf)
    report = prefill | {key: larger[key] for key in ("peak_bytes_per_device", "memory")}
    report |= {"what": "evaluate", "fits": prefill["fits"] and decode["fits"]}
    for key in ("model_flops", "executed_flops", "memory_traffic_bytes", "step_seconds_estimate"):
        report[key] = prefill[key] + INITIAL_MAX_NEW_TOKENS * decode[key]
    report["roofline_seconds"] = {
        name: seconds + INITIAL_MAX_NEW_TOKENS * decode["roofline_seconds"][name]
        for name, seconds in prefill["roofline_seconds"].items()
    }
    sent = prefill["collective_bytes"]
    for kind, by_axis in decode["collective_bytes"].items():
        merged = sent.setdefault(kind, {})
        for axes, size in by_axis.items():
            merged[axes] = merged.get(axes, 0) + INITIAL_MAX_NEW_TOKENS * size
    seconds = report["step_seconds_estimate"]
    report["tokens_per_second"] = report["rows"] * INITIAL_MAX_NEW_TOKENS / seconds
    report["mfu_estimate"] = report["model_flops"] / seconds / report["devices"] / CHIPS[report["chip"]].flops
    if 2 * prefill["step_seconds_estimate"] < seconds:  # decoding takes most of the time
        report["bound"] = decode["bound"]
    return report


def _add_train_state(config: TrainConfig, report: Mapping[str, Any], devices: list[jax.Device]) -> dict[str, Any]:
    """The memory of an evaluation plus the training state, if the run evaluates during training."""
    if not config.eval.benchmarks:
        return {"during_training": False}
    size, peak = bytes_per_device(abstract_train_state(config, devices)), report["peak_bytes_per_device"]
    peak = peak and peak + size
    fits = report["fits"] and peak <= report["memory_limit_bytes_per_device"]
    memory = {"training state": size} | report["memory"]
    return {"during_training": True, "fits": fits, "peak_bytes_per_device": peak, "memory": memory}


def _run_cost(
    config: TrainConfig, program_kind: str, report: Mapping[str, Any], devices: list[jax.Device], price: float
) -> dict[str, Any]:
    """Steps, hours and cost of the training.

    The hours are those of the data's own lengths if the data are here, else as if all rows had ``data.max_length``.
    """
    cost: dict[str, Any] = {"steps": None, "hours": None, "of_the_data": False}
    if program_kind == "train":
        from stf_jax.planning.batches import count_batches, count_steps  # grain, which work and memory do not need

        batches = count_batches(config)
        if batches:
            seconds = sum(count * _step_seconds(config, shape, report, devices) for shape, count in batches.items())
            cost = {"steps": batches.total(), "hours": seconds / 3600, "of_the_data": True}
        elif steps := count_steps(config):
            cost |= {"steps": steps, "hours": steps * report["step_seconds_estimate"] / 3600}
    hours = cost["hours"]
    if price:
        cost["chip_hours"] = hours and hours * len(devices)
        cost["cost"] = hours and hours * len(devices) * price
    return cost


def _step_seconds(
    config: TrainConfig, shape: BatchShape, report: Mapping[str, Any], devices: list[jax.Device]
) -> float:
    """Estimates a step of another shape than the report's. It sends as much, because it has the same weights."""
    data = dataclasses.replace(config.data, max_length=shape.length, tokens_per_batch=0)
    data = dataclasses.replace(data, images_per_row=shape.images, aspect="square")  # so that an image takes one place
    config = with_remat(dataclasses.replace(config, data=data, global_batch_size=shape.rows), report["remat"])
    work = trace_cost(config, "train", devices).work(config, make_program(config, "train", devices))
    return _find_bound(report["roofline_seconds"] | _work_seconds(work, devices))[1]
