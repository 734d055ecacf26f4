"""Tries meshes, rematerialisation and microbatches, and ranks those with which a step fits its devices."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax

from stf_jax.config import MeshConfig, TrainConfig, UserError
from stf_jax.planning.program import bytes_on_a_device, make_program
from stf_jax.planning.report import count, report
from stf_jax.planning.topology import chip, memory_limit

COMPILES = 6  # at most: each takes a minute for a model of billions
_TENSOR, _MICROBATCHES, _REMAT = (1, 2, 4, 8), (1, 2, 4, 8, 16), ("none", "dots", "full")


def search(config: TrainConfig, devices: list[jax.Device], price: float, told: Callable[[str], None]) -> dict[str, Any]:
    """The best ways to train with this config on these devices.

    What surely does not fit, since weights, moments, gradients and activations alone exceed the memory, is not
    compiled; of the rest those with the least work are, the leaner first among equals.

    Args:
      told: is called with a line for each that is compiled.

    Returns:
      ``tried`` and ``compiled``, how many; ``ranked``, what :func:`stf_jax.planning.report.report` tells of those that
      fit, the fastest first, each with the ``settings`` that it needs.
    """
    tried, hopeful = 0, []
    for changed, seconds, least in _estimates(config, devices):
        tried += 1
        if least <= memory_limit(devices[0]):
            hopeful.append((seconds, least, changed))
    hopeful.sort(key=lambda entry: entry[:2])
    ranked = []
    for _, _, changed in hopeful[:COMPILES]:
        settings = _settings(changed)
        words = " ".join(f"--config.{key}={value}" for key, value in settings.items())
        found = report(changed, "train", devices, price) | {"settings": settings}
        verdict = "fits" if found["fits"] else "does not fit"
        told(f"{words}: {verdict}, {(found['peak_bytes_per_device'] or 0) / 2**30:.1f} GiB")
        if found["fits"]:
            ranked.append(found)
    ranked.sort(key=lambda found: found["step_seconds_estimate"])
    return {"tried": tried, "compiled": min(len(hopeful), COMPILES), "ranked": ranked}


def _settings(config):
    mesh = config.mesh
    return {
        "mesh.data": mesh.data,
        "mesh.fsdp": mesh.fsdp,
        "mesh.tensor": mesh.tensor,
        "model.remat": config.model.remat,
        "optimizer.accumulation_steps": config.optimizer.accumulation_steps,
    }


def _estimates(config, devices) -> Iterator[tuple[TrainConfig, float, float]]:
    """Configs, seconds of a step by compute and memory alone, and bytes that it needs on a device at least."""
    what = chip(devices)
    for tensor in _TENSOR:
        slices = len({getattr(device, "slice_index", 0) for device in devices})
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
                yield mine, max(compute, work.memory_bytes / what.bandwidth), least
