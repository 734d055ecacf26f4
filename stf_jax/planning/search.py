"""Tries meshes, rematerialisation and microbatches, and ranks those with which a step fits its devices."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax

from stf_jax.config import MeshConfig, TrainConfig, UserError
from stf_jax.planning.program import bytes_on_a_device, make_program
from stf_jax.planning.report import count, report
from stf_jax.planning.topology import memory_limit
from stf_jax.runtime.chips import chip_of
from stf_jax.runtime.mesh import slices_of
from stf_jax.training.state import blueprint

COMPILES = 6  # at most, and as many again where none of them fits: each takes a minute for a model of billions
_TENSOR, _MICROBATCHES, _REMAT = (1, 2, 4, 8), (1, 2, 4, 8, 16), ("none", "dots", "full")


def search(
    config: TrainConfig, devices: list[jax.Device], price: float, told: Callable[[dict], None]
) -> dict[str, Any]:
    """The best ways to train with this config on these devices.

    What surely does not fit, since weights, moments, gradients and activations alone exceed the memory, is not
    compiled; of the rest those with the least work are, and if none of these fits, the leanest.

    Args:
      told: is called with what is found of each that is compiled, as ``ranked`` has it.

    Returns:
      ``fits``, whether any does; ``tried`` and ``compiled``, how many; ``ranked``, those that fit, the fastest first:
      what :func:`stf_jax.planning.report.report` tells of each, and the ``settings`` that it needs.

    Raises:
      UserError: a model that cannot be.
    """
    blueprint(config.model)  # what cannot be is the config's fault; below, what raises is a setting that does not suit
    estimates = list(_estimates(config, devices))
    hopeful = [found for found in estimates if found.least_bytes <= memory_limit(devices[0])]
    quickest = sorted(hopeful, key=lambda found: (found.seconds, found.least_bytes))
    leanest = sorted(quickest[COMPILES:], key=lambda found: found.least_bytes)
    ranked, compiled = [], 0
    for candidate in (*quickest[:COMPILES], *leanest[:COMPILES]):
        if compiled >= COMPILES and ranked:
            break
        compiled += 1
        found = report(candidate.config, "train", devices, price) | {"settings": _settings(candidate.config)}
        told(found)
        if found["fits"]:
            ranked.append(found)
    ranked.sort(key=lambda found: found["step_seconds_estimate"])
    return {"fits": bool(ranked), "tried": len(estimates), "compiled": compiled, "ranked": ranked}


@dataclasses.dataclass(frozen=True)
class _Estimate:
    """Of a config, before anything is compiled."""

    config: TrainConfig
    seconds: float  # of a step, by compute and memory alone
    least_bytes: int  # that a device needs


def _settings(config):
    mesh = config.mesh
    return {
        "mesh.data": mesh.data,
        "mesh.fsdp": mesh.fsdp,
        "mesh.tensor": mesh.tensor,
        "model.remat": config.model.remat,
        "optimizer.accumulation_steps": config.optimizer.accumulation_steps,
    }


def _estimates(config, devices) -> Iterator[_Estimate]:
    what, slices = chip_of(devices[0]), slices_of(devices)
    for tensor in _TENSOR:
        if len(devices) % (slices * tensor):
            continue
        mesh = MeshConfig(data=slices, fsdp=len(devices) // slices // tensor, tensor=tensor)
        for remat in _REMAT:
            changed = dataclasses.replace(config, mesh=mesh, model=dataclasses.replace(config.model, remat=remat))
            try:
                counted = count(changed, "train", devices)
            except UserError:  # the mesh does not divide the model
                continue
            for parts in _MICROBATCHES:
                optimizer = dataclasses.replace(config.optimizer, accumulation_steps=parts)
                mine = dataclasses.replace(changed, optimizer=optimizer)
                try:
                    program = make_program(mine, "train", devices)
                except UserError:  # nor the batch
                    continue
                work = counted.work(mine, program)
                gradients = bytes_on_a_device(program.arguments[0].trainable) * (1 + (parts > 1))
                least = sum(map(bytes_on_a_device, program.parts.values())) + gradients + counted.kept(mine, program)
                compute = work.executed_flops / len(devices) / what.flops
                yield _Estimate(mine, max(compute, work.memory_bytes / what.bandwidth), least)
