"""What a run would need and take: memory, work, traffic and time of its programs, and what the whole costs."""

import dataclasses
import math
from typing import Any

import jax

from stf_jax.config import TrainConfig
from stf_jax.data.pipeline import training_records
from stf_jax.inference.generator import ROOM
from stf_jax.planning.executed import PRIME, executed
from stf_jax.planning.hlo import traffic
from stf_jax.planning.program import OutOfMemory, Program, bytes_on_a_device, make_program, training_state
from stf_jax.planning.topology import memory_limit
from stf_jax.runtime.chips import CHIPS, chip_of
from stf_jax.runtime.cost import decode_flops, prefill_flops, step_flops
from stf_jax.runtime.mesh import make_mesh, row_shards

# What good programs attain of a chip's figures: products of models of billions run at 60 to 75 % of the peak, memory
# and links at 80 to 90 % of theirs. An assumption, the same for all chips.
ATTAINED = {"compute": 0.7, "memory": 0.8, "link": 0.8, "network": 0.8}


def report(config: TrainConfig, what: str, devices: list[jax.Device], price: float = 0.0) -> dict[str, Any]:
    """Compiles a run's program for these devices and tells what it comes to.

    Args:
      what: ``train``; ``prefill`` or ``decode`` of ``eval.batch`` questions; ``evaluate``, one batch of them with
        answers of 128 tokens: beside the training state where the run measures ``eval.benchmarks``, else by itself.
      price: of a chip for an hour.

    Returns:
      Plain data; bytes are a device's, FLOPs all devices' in one step (for ``decode`` one token a row).

    Raises:
      UserError: as :func:`stf_jax.planning.program.make_program`.
    """
    if what == "evaluate":
        told = _evaluation(*(report(config, part, devices) for part in ("prefill", "decode")))
        told |= _resident(config, told, devices)
    else:
        told = _program(config, make_program(config, what, devices), devices)
    told |= _whole(config, what, told, len(devices), price)
    return told


def _program(config, program, devices):
    limit, parts = memory_limit(devices[0]), {name: bytes_on_a_device(tree) for name, tree in program.parts.items()}
    told = {
        "what": program.what,
        "chip": chip_of(devices[0]).name,
        "devices": len(devices),
        "mesh": dict(program.mesh.shape),
        "rows": program.rows,
        "positions": program.length,
        "images": program.images,
        "memory_limit_bytes_per_device": limit,
    }
    counted = count(config, program.what, devices)
    work, activations = counted.work(config, program), counted.kept(config, program)
    try:
        compiled = program.compile()
    except OutOfMemory as error:
        peak = error.needed
        told |= {"fits": False, "peak_bytes_per_device": peak}
        told["memory"] = parts | {"activations": activations, "temporaries": None}
        return told | _speed(program, devices, work, [])
    memory = compiled.memory_analysis()
    peak = memory.peak_memory_in_bytes
    told |= {"fits": peak <= limit, "peak_bytes_per_device": peak}
    told["memory"] = parts | {
        "activations": activations,
        "temporaries": max(peak - sum(parts.values()) - activations, 0),
    }
    sent = traffic(compiled.as_text(), program.mesh, trips=1 if program.what == "decode" else None)  # one token
    jax.clear_caches()  # a program of billions is a gigabyte here, and there may be more to compile
    return told | _speed(program, devices, work, sent)


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one run of a program."""

    model_flops: int  # what the mathematics asks for (runtime/cost.py)
    executed_flops: float  # with what is recomputed or computed beside it
    memory_bytes: float  # that products, and the optimizer, read and write on a device


@dataclasses.dataclass(frozen=True)
class Counted:
    """What a program comes to by its trace, for any number of rows."""

    flops: float  # a row
    row_bytes: float  # that products read and write for a row, on its device
    fixed_bytes: float  # of weights, on a device, a pass over a batch or microbatch
    kept_bytes: float  # that a row keeps from forward to backward, on its device

    def work(self, config: TrainConfig, program: Program) -> Work:
        """Of a program with its rows and microbatches."""
        rows, moved = program.rows / row_shards(program.mesh), self.fixed_bytes
        if program.what == "train":
            # Of each parameter that learns: gradient, itself and both moments, read, read once more to see whether the
            # update is finite, and written.
            moved *= config.optimizer.accumulation_steps
            moved += 12 * bytes_on_a_device(program.arguments[0].trainable)
        return Work(_model_flops(config, program), self.flops * program.rows, moved + self.row_bytes * rows)

    def kept(self, config: TrainConfig, program: Program) -> int:
        """Bytes of activations that a device keeps from forward to backward."""
        return int(self.kept_bytes * program.rows / row_shards(program.mesh) / config.optimizer.accumulation_steps)


def count(config: TrainConfig, what: str, devices: list[jax.Device]) -> Counted:
    """Traces a program; nothing is compiled.

    With as many rows as tell an axis of rows from any other.
    """
    whole = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, accumulation_steps=1))
    shards = row_shards(make_mesh(config.mesh, devices))
    program = make_program(whole, what, devices, rows=PRIME * shards)
    found = executed(program.trace(), shards, len(devices))
    kept = sum(
        x.dtype.itemsize * math.prod(x.shape)
        for x in program.residuals()
        if any(length and length % PRIME == 0 for length in x.shape)
    )
    return Counted(found.flops / program.rows, found.bytes_by_rows / PRIME, found.bytes_fixed, kept / program.rows)


def _model_flops(config, program):
    shape = program.rows, program.length, program.images
    if program.what == "train":
        return step_flops(config.model, config.rules, *shape).step
    if program.what == "decode":
        return decode_flops(config.model, program.rows, program.length, program.images)
    return prefill_flops(config.model, *shape).forward


def _speed(program, devices, work, sent):
    what = chip_of(devices[0])
    links, network, by_kind = 0, 0, {}
    for entry in sent:
        over, axes = by_kind.setdefault(entry.kind, {}), "+".join(entry.axes)
        over[axes] = over.get(axes, 0) + entry.bytes  # within slices and between them
        if entry.between_slices:
            network += entry.bytes
        else:
            links += entry.bytes
    roofline = {
        "compute": work.executed_flops / len(devices) / what.flops,
        "memory": work.memory_bytes / what.bandwidth,
        "link": links / what.link,
        "network": network / what.network,
    }
    seconds = {name: value / ATTAINED[name] for name, value in roofline.items()}
    bound = max(seconds, key=seconds.get)
    tokens = program.rows * (1 if program.what == "decode" else program.length)
    return {
        "model_flops": work.model_flops,
        "executed_flops": round(work.executed_flops),
        "memory_traffic_bytes": round(work.memory_bytes),
        "collective_bytes": by_kind,
        "roofline_seconds": roofline,
        "bound": bound,
        "step_seconds_estimate": seconds[bound],
        "tokens_per_second": tokens / seconds[bound],
        "mfu_estimate": work.model_flops / seconds[bound] / len(devices) / what.flops,
    }


def _evaluation(prefill, decode):
    """A batch of questions: read, then answered in :data:`stf_jax.inference.generator.ROOM` tokens."""
    higher = max(prefill, decode, key=lambda told: told["peak_bytes_per_device"] or math.inf)
    told = prefill | {key: higher[key] for key in ("peak_bytes_per_device", "memory")}
    told |= {"what": "evaluate", "fits": prefill["fits"] and decode["fits"]}
    for key in ("model_flops", "executed_flops", "memory_traffic_bytes", "step_seconds_estimate"):
        told[key] = prefill[key] + ROOM * decode[key]
    told["roofline_seconds"] = {
        name: seconds + ROOM * decode["roofline_seconds"][name] for name, seconds in prefill["roofline_seconds"].items()
    }
    sent = prefill["collective_bytes"]
    for kind, by_axis in decode["collective_bytes"].items():
        mine = sent.setdefault(kind, {})
        for axes, size in by_axis.items():
            mine[axes] = mine.get(axes, 0) + ROOM * size
    seconds = told["step_seconds_estimate"]
    told["tokens_per_second"] = told["rows"] * ROOM / seconds
    told["mfu_estimate"] = told["model_flops"] / seconds / told["devices"] / CHIPS[told["chip"]].flops
    if 2 * prefill["step_seconds_estimate"] < seconds:  # most of it is answering
        told["bound"] = decode["bound"]
    return told


def _resident(config, told, devices):
    """The memory of a measurement with what is there besides: the training state, if the run itself measures."""
    during = bool(config.eval.benchmarks)
    if not during:
        return {"during_training": False}
    size, peak = bytes_on_a_device(training_state(config, devices)), told["peak_bytes_per_device"]
    peak = peak and peak + size
    fits = told["fits"] and peak <= told["memory_limit_bytes_per_device"]
    memory = {"training state": size} | told["memory"]
    return {"during_training": True, "fits": fits, "peak_bytes_per_device": peak, "memory": memory}


def _whole(config, what, told, devices, price):
    """The config's training: steps, hours and money."""
    steps = run_steps(config) if what == "train" else None
    hours = steps * told["step_seconds_estimate"] / 3600 if steps else None
    whole = {"steps": steps, "hours": hours}
    if price:
        whole["chip_hours"] = hours and hours * devices
        whole["cost"] = hours and hours * devices * price
    return whole


def run_steps(config: TrainConfig) -> int | None:
    """Steps of a run, as training counts them (data.sampling.Plan.steps); None where only the data could tell."""
    if config.steps:
        return config.steps
    if config.data.packing:
        return None  # rows hold several conversations
    here = config.data.annotations or config.data.source == "scenes"
    records = len(training_records(config)) if here else config.data.records
    batches = -(-records // config.global_batch_size)  # of an epoch, whose last is filled up with empty rows
    return max(1, math.ceil(config.epochs * batches - 1e-6)) if records else None
