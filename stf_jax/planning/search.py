"""Search over meshes, rematerialization and microbatches for the fastest training step that fits its devices."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax

from stf_jax.config import MeshConfig, TrainConfig, UserError
from stf_jax.models.blueprint import blueprint
from stf_jax.parallel.mesh import count_slices
from stf_jax.planning.program import make_program
from stf_jax.planning.report import make_report, trace_cost
from stf_jax.planning.topology import get_chip, memory_limit
from stf_jax.training.remat import SETTINGS, bytes_per_device, with_remat

COMPILES = 6  # maximum; twice that if none of these fits. Each takes a minute for a model of billions of parameters
_TENSOR, _MICROBATCHES = (1, 2, 4, 8), (1, 2, 4, 8, 16)


def search(
    config: TrainConfig, devices: list[jax.Device], price: float, on_trial: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Searches for the fastest settings to train with this config on these devices.

    Settings whose weights, moments, gradients and activations alone exceed the memory are not compiled. Of the rest,
    those with the least work are compiled, and if none of them fits, those with the least memory.

    Args:
      on_trial: called with the report of each compiled candidate, as in ``ranked``.

    Returns:
      ``fits``, whether any candidate does; ``tried`` and ``compiled``, numbers of candidates; ``ranked``, those that
      fit, fastest first: the result of :func:`stf_jax.planning.report.make_report` plus the ``settings``.

    Raises:
      UserError: the model config is invalid.
    """
    blueprint(config.model)  # raises if the model is invalid; errors below concern only one candidate
    candidates = list(_candidates(config, devices))
    if not candidates:
        make_program(with_remat(config, SETTINGS[0]), "train", devices)  # raises what is wrong with all of them
    feasible = [candidate for candidate in candidates if candidate.min_bytes <= memory_limit(devices[0])]
    fastest = sorted(feasible, key=_Candidate.order)
    leanest = sorted(fastest[COMPILES:], key=lambda candidate: candidate.min_bytes)
    ranked: list[dict[str, Any]] = []
    compiled = 0
    for candidate in (*fastest[:COMPILES], *leanest[:COMPILES]):
        if compiled >= COMPILES and ranked:
            break
        compiled += 1
        trial = make_report(candidate.config, "train", devices, price) | {"settings": _settings(candidate.config)}
        on_trial(trial)
        if trial["fits"]:
            ranked.append(trial)
    ranked.sort(key=lambda trial: trial["step_seconds_estimate"])
    return {"fits": bool(ranked), "tried": len(candidates), "compiled": compiled, "ranked": ranked}


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """A config with lower bounds of its time and memory, from its trace."""

    config: TrainConfig
    seconds: float  # per step, by compute and memory only
    min_bytes: int  # per device

    def order(self) -> tuple[float, bool, int]:
        """Returns what sorts candidates, the fastest first. The seconds leave out copies to the host's memory."""
        return self.seconds, self.config.model.remat == "offload", self.min_bytes


def _settings(config: TrainConfig) -> dict[str, int | str]:
    mesh = config.mesh
    return {
        "mesh.data": mesh.data,
        "mesh.fsdp": mesh.fsdp,
        "mesh.tensor": mesh.tensor,
        "model.remat": config.model.remat,
        "optimizer.accumulation_steps": config.optimizer.accumulation_steps,
    }


def _candidates(config: TrainConfig, devices: list[jax.Device]) -> Iterator[_Candidate]:
    chip, slices = get_chip(devices[0]), count_slices(devices)
    for tensor in _TENSOR:
        if len(devices) % (slices * tensor):
            continue
        mesh = MeshConfig(data=slices, fsdp=len(devices) // slices // tensor, tensor=tensor)
        for remat in SETTINGS:
            changed = with_remat(dataclasses.replace(config, mesh=mesh), remat)
            try:
                cost = trace_cost(changed, "train", devices)
            except UserError:  # the mesh does not divide the model
                continue
            for microbatches in _MICROBATCHES:
                optimizer = dataclasses.replace(config.optimizer, accumulation_steps=microbatches)
                candidate = dataclasses.replace(changed, optimizer=optimizer)
                try:
                    program = make_program(candidate, "train", devices)
                except UserError:  # the shards do not divide the batch
                    continue
                work = cost.work(candidate, program)
                gradients = bytes_per_device(program.arguments[0].trainable) * (1 + (microbatches > 1))
                min_bytes = sum(map(bytes_per_device, program.parts.values()))
                min_bytes += gradients + cost.activation_bytes(candidate, program)
                compute = work.executed_flops / len(devices) / chip.flops
                yield _Candidate(candidate, max(compute, work.memory_bytes / chip.bandwidth), min_bytes)
