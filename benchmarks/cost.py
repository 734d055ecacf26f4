"""Savings of a quarter of the image tokens: `mlp` and `mbtf_stf` measured here, and estimated for the paper's machine.

The measurements run the programs of a run in float32, with the full vision tower and few decoder layers, because more
layers would not fit in memory here. All layers cost the same, so two such models give the cost per layer, and linear
extrapolation the cost of all layers.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.process import measure_process
from benchmarks.recipes import TEXT, make_task
from benchmarks.timing import median_seconds
from stf_jax.accounting.memory import compiled_bytes
from stf_jax.config import FusionConfig, MeshConfig, TrainConfig, UserError
from stf_jax.data.packing import Batch
from stf_jax.models.spec import llm_preset, vision_preset
from stf_jax.parallel.mesh import compute_context
from stf_jax.planning.program import Program, make_program
from stf_jax.planning.report import make_report
from stf_jax.planning.topology import topology_devices
from stf_jax.training.state import TrainState
from stf_jax.training.step import Metrics
from stf_jax.training.timing import make_batch
from stf_jax.weights.model import Description

_FUSIONS = "mlp", "mbtf_stf"
_GIB = 2**30
_Rows = list[dict[str, Any]]


def run(options: argparse.Namespace) -> _Rows:
    """Measures, estimates, and plots both.

    Returns:
      The rows of :func:`measure` and :func:`estimate`.
    """
    layers, batches, rows = (_parse_numbers(options, name) for name in ("layers", "batches", "rows"))
    if len(layers) != 2 or layers[0] >= layers[1]:
        raise UserError(f"--layers={options.layers} must be two numbers, the smaller first.")
    jax.config.update("jax_platforms", "cpu")  # this process only compiles
    devices = topology_devices(options.topology)
    results = measure(options.vision, options.llm, layers, batches)
    results += estimate(options.vision, options.llm, rows, devices)
    if options.plot is not None:
        plot(results, options.plot)
    return results


def _parse_numbers(options: argparse.Namespace, name: str) -> list[int]:
    text = getattr(options, name)
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        raise UserError(f"--{name}={text} must be comma-separated integers.") from None
    if min(numbers) < 1:
        raise UserError(f"--{name}={text} must be at least 1.")
    return numbers


# ---- Measured --------------------------------------------------------------------------------------------------------


def measure(vision: str, llm: str, layers: list[int], batches: list[int]) -> _Rows:
    """Measures prefill and the steps of both stages on this machine, each model in a separate process.

    Returns:
      Rows of ``what``, ``batch``, milliseconds with the smaller and the larger of the numbers of ``layers``, and
      extrapolated to all layers; GiB with the two numbers; and ``times_mlp``, the speedup over ``mlp`` with all layers.
      Tasks that exceed the memory are left out.
    """
    tower, decoder = vision_preset(vision), llm_preset(llm)
    results: _Rows = []

    def measure_model(task: str, fusion: str, count: int) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            shallow = dataclasses.replace(decoder, layers=count)
            Description(tower, shallow, FusionConfig(fusion)).save(pathlib.Path(folder))
            arguments = json.dumps([task, folder, fusion, batches])
            name = f"{task}, {fusion}, {count} layers"
            figures = measure_process(name, ["-m", "benchmarks.cost", arguments])
            print(name, figures["ms"], file=sys.stderr)
            return figures

    for task in TEXT:
        try:
            models = {key: measure_model(task, *key) for key in itertools.product(_FUSIONS, layers)}
        except MemoryError as error:
            print(f"{error} Skipping {task}.", file=sys.stderr)
            continue
        for i, batch in enumerate(batches):
            rows: _Rows = []
            for fusion in _FUSIONS:
                few, more = (models[fusion, count] for count in layers)
                slope = (more["ms"][i] - few["ms"][i]) / (layers[1] - layers[0])
                row = {"what": f"{task}, {fusion}", "batch": batch, "ms_few": few["ms"][i], "ms_more": more["ms"][i]}
                row["ms_all"] = few["ms"][i] + slope * (decoder.layers - layers[0])
                row |= {"gib_few": few["gib"][i], "gib_more": more["gib"][i]}
                rows.append(row)
            results += [row | {"times_mlp": rows[0]["ms_all"] / row["ms_all"]} for row in rows]
    return results


def time_program(task: str, folder: str, fusion: str, batches: list[int]) -> dict[str, list[float]]:
    """Measures milliseconds and GiB of a program for each batch size; the folder contains only ``model.json``."""
    figures: dict[str, list[float]] = {"ms": [], "gib": []}
    for batch in batches:
        config = make_task(task, fusion, vision=folder, llm=folder)
        # Layers are unrolled, because a scan would copy the weights of each layer out of their stack.
        model = dataclasses.replace(config.model, precision="float32", scan_layers=False)
        config = dataclasses.replace(config, model=model, mesh=MeshConfig(1, 1, 1), global_batch_size=batch)
        kind = "prefill" if task == "prefill" else "train"
        program = make_program(config, kind, jax.devices()[:1], rows=batch)
        compiled = program.compile()
        figures["ms"].append(1e3 * _time(program, compiled, config))
        figures["gib"].append(compiled_bytes(compiled) / _GIB)
    return figures


def _time(program: Program, compiled: jax.stages.Compiled, config: TrainConfig) -> float:
    call: Callable[[], Any]
    batch = make_batch(config)
    with compute_context(program.mesh, program.precision):
        if program.kind == "train":
            state = _fill(program.arguments[0])
            batch = jax.device_put(batch, compiled.input_shardings[0][1])
            call = functools.partial(_run_step, compiled, [state], batch)
            del state
        else:
            _, weights, _, _, _, _, sampling = program.arguments
            lengths = np.full(program.rows, program.length, np.int32)
            prompt = (batch.tokens, batch.image_slots, lengths, batch.images)
            call = functools.partial(compiled, _fill(weights), *prompt, sampling)
        return median_seconds(lambda: jax.block_until_ready(call()))


def _run_step(compiled: jax.stages.Compiled, state_holder: list[TrainState], batch: Batch) -> Metrics:
    """Runs a step, which donates the state; ``state_holder`` is a list that holds it between steps."""
    state, metrics = compiled(state_holder.pop(), batch)
    state_holder.append(state)
    return metrics


def _fill(tree: Any) -> Any:
    """Concrete arrays of a small constant for abstract arrays; times do not depend on the values."""
    return jax.tree.map(lambda x: jnp.full(x.shape, 0.01, x.dtype, device=x.sharding), tree)


# ---- Estimated -------------------------------------------------------------------------------------------------------


def estimate(vision: str, llm: str, rows: list[int], devices: list[jax.Device]) -> _Rows:
    """Estimates the same programs with ``plan``, in bfloat16, for devices that this machine does not have.

    Returns:
      Rows of ``what``, ``rows`` per device, ``peak_gib`` per device and whether that ``fits``, roofline ``seconds``,
      and ``times_mlp``, the speedup over ``mlp``.
    """
    results = []
    for task, count in itertools.product(TEXT, rows):
        mlp_seconds: float | None = None
        for fusion in _FUSIONS:
            config = make_task(task, fusion, vision=vision, llm=llm)
            total = count * len(devices)
            config = dataclasses.replace(
                config, global_batch_size=total, eval=dataclasses.replace(config.eval, batch=total)
            )
            report = make_report(config, "prefill" if task == "prefill" else "train", devices)
            seconds = report["step_seconds_estimate"]
            mlp_seconds = mlp_seconds or seconds
            row = {"what": f"{task}, {fusion}, {report['chip']}", "rows": count}
            row |= {"peak_gib": report["peak_bytes_per_device"] / _GIB, "fits": report["fits"]}
            row |= {"seconds": seconds, "times_mlp": mlp_seconds / seconds}
            results.append(row)
            print(f"{row['what']}, {count} rows per device: {row['peak_gib']:.2f} GiB", file=sys.stderr)
    return results


# ---- Plotted ---------------------------------------------------------------------------------------------------------


def plot(rows: _Rows, file: pathlib.Path) -> None:
    """Plots measured and estimated seconds, and memory, against the number of rows; tasks without rows are omitted."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chip = next(row["what"] for row in rows if "peak_gib" in row).split(", ")[-1]
    panels: tuple[
        tuple[str, str, Callable[[dict[str, Any]], float], str, str], ...
    ] = (  # suffix of the rows' names, key of x, function of y, labels of x and y
        (
            "",
            "batch",
            lambda row: row["ms_all"] / 1e3,
            "rows",
            "seconds, extrapolated\nfrom few layers",
        ),
        (f", {chip}", "rows", lambda row: row["seconds"], f"rows per {chip}", "seconds, estimated"),
        (f", {chip}", "rows", lambda row: row["peak_gib"], f"rows per {chip}", "GiB per device, estimated"),
    )
    titles = {"prefill": "Prefill", "pretrain": "Training step, stage 1", "finetune": "Training step, stage 2"}
    figure, axes = plt.subplots(len(panels), len(titles), figsize=(12, 9), constrained_layout=True)
    for axis, ((suffix, x_key, y_of, x_label, y_label), (task, title)) in zip(
        axes.flat, itertools.product(panels, titles.items()), strict=True
    ):
        for fusion, color in zip(_FUSIONS, ("tab:gray", "tab:blue"), strict=True):
            selected = [row for row in rows if row["what"] == f"{task}, {fusion}{suffix}"]
            ticks = [row[x_key] for row in selected]
            axis.plot(ticks, [y_of(row) for row in selected], "o-", color=color, label=fusion)
        axis.set(title=title, xlabel=x_label, ylabel=y_label, xticks=ticks)
        axis.margins(y=0.1)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend()
        axis.set_visible(bool(ticks))
    figure.savefig(file, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    print(json.dumps(time_program(*json.loads(sys.argv[1]))))
