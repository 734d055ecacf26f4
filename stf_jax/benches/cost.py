"""What a quarter of the vision tokens spares: `mlp` and `mbtf_stf` measured here, and foreseen for the paper's machine.

Measured is the run's own program, in float32, with the whole tower and few layers of the decoder: with more, weights
and moments would not lie in memory here. Layers are alike, so what one takes is told by two such models, and all of
them by a straight line through both.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stf_jax.benches.plan import TEXT, recipe
from stf_jax.benches.process import measured
from stf_jax.benches.synthetic import make_batch
from stf_jax.config import FusionConfig, MeshConfig, TrainConfig, UserError
from stf_jax.models.presets import llm_preset, vision_preset
from stf_jax.models.vlm import slots_per_image
from stf_jax.planning.program import Program, make_program
from stf_jax.planning.report import report
from stf_jax.planning.topology import topology_devices
from stf_jax.runtime.mesh import computing
from stf_jax.weights.model import Description

_FUSIONS = "mlp", "mbtf_stf"
_TIMES, _LONG = 3, 10.0  # a call is made so often, and the median counts; fewer times once they took so many seconds
_GIB = 2**30
_Rows = list[dict[str, Any]]


def run(options: argparse.Namespace) -> _Rows:
    """Measures, compiles, and draws both.

    Returns:
      Of :func:`measure` and :func:`foresee`.
    """
    layers, batches, rows = (_numbers(options, name) for name in ("layers", "batches", "rows"))
    if len(layers) != 2 or layers[0] >= layers[1]:
        raise UserError(f"--layers={options.layers} should be two numbers, the smaller first.")
    jax.config.update("jax_platforms", "cpu")  # of this process, which only compiles
    devices = topology_devices(options.topology)
    found = measure(options.vision, options.llm, layers, batches)
    found += foresee(options.vision, options.llm, rows, devices)
    if options.plot is not None:
        draw(found, options.plot)
    return found


def _numbers(options, name):
    text = getattr(options, name)
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        raise UserError(f"--{name}={text} should be numbers with commas between.") from None
    if min(numbers) < 1:
        raise UserError(f"--{name}={text} should be at least 1.")
    return numbers


def _config(what: str, vision: str, llm: str, fusion: str) -> TrainConfig:
    """The recipe's stage (prefill: of the second one's model), on rows of one image and as much text as is usual."""
    config = recipe("finetune" if what == "prefill" else what, "vicuna-7b")
    model = dataclasses.replace(config.model, vision=vision, llm=llm, fusion=FusionConfig(fusion))
    data = dataclasses.replace(config.data, max_length=slots_per_image(model) + TEXT[what], images_per_row=1)
    return dataclasses.replace(config, model=model, data=data)


# ---- Measured --------------------------------------------------------------------------------------------------------


def measure(vision: str, llm: str, layers: list[int], batches: list[int]) -> _Rows:
    """Prefill and both stages' steps on this machine, each model in a process of its own.

    Returns:
      Rows of ``what``, ``batch``, milliseconds with so many ``layers`` of the decoder, the few and the more, and with
      all its layers by a straight line; GiB with the few and the more; and ``times_mlp``, how often faster with all.
      What takes more memory than there is has none.
    """
    tower, decoder, found = vision_preset(vision), llm_preset(llm), []

    def one(what, fusion, count):
        with tempfile.TemporaryDirectory() as folder:
            shallow = dataclasses.replace(decoder, layers=count)
            Description(tower, shallow, FusionConfig(fusion)).save(pathlib.Path(folder))
            task = json.dumps([what, folder, fusion, batches])
            name = f"{what}, {fusion}, {count} layers"
            took = measured(name, ["-m", "stf_jax.benches.cost", task])
            print(name, took["ms"], file=sys.stderr)
            return took

    for what in TEXT:
        try:
            pair = {each: one(what, *each) for each in itertools.product(_FUSIONS, layers)}
        except MemoryError as error:
            print(f"{error} So {what} is left out.", file=sys.stderr)
            continue
        for i, batch in enumerate(batches):
            rows = []
            for fusion in _FUSIONS:
                few, more = (pair[fusion, count] for count in layers)
                slope = (more["ms"][i] - few["ms"][i]) / (layers[1] - layers[0])
                row = {"what": f"{what}, {fusion}", "batch": batch, "ms_few": few["ms"][i], "ms_more": more["ms"][i]}
                row["ms_all"] = few["ms"][i] + slope * (decoder.layers - layers[0])
                row |= {"gib_few": few["gib"][i], "gib_more": more["gib"][i]}
                rows.append(row)
            found += [row | {"times_mlp": rows[0]["ms_all"] / row["ms_all"]} for row in rows]
    return found


def timed(what: str, folder: str, fusion: str, batches: list[int]) -> dict[str, list[float]]:
    """Milliseconds and GiB of a program, for each batch; the folder has ``model.json`` alone."""
    found = {"ms": [], "gib": []}
    for batch in batches:
        config = _config(what, folder, folder, fusion)
        # Layers written out: a scan would copy each layer's weights out of their stack.
        model = dataclasses.replace(config.model, precision="float32", scan_layers=False)
        config = dataclasses.replace(config, model=model, mesh=MeshConfig(1, 1, 1), global_batch_size=batch)
        kind = "prefill" if what == "prefill" else "train"
        program = make_program(config, kind, jax.devices()[:1], rows=batch)
        compiled = program.compile()
        found["ms"].append(1e3 * _seconds(program, compiled, config))
        # Of a CPU's program the compiler's own peak leaves temporaries out.
        parts = compiled.memory_analysis()
        arguments = parts.argument_size_in_bytes + parts.output_size_in_bytes - parts.alias_size_in_bytes
        found["gib"].append((arguments + parts.temp_size_in_bytes) / _GIB)
    return found


def _seconds(program: Program, compiled, config):
    batch = make_batch(config)
    with computing(program.mesh, program.precision):
        if program.what == "train":
            state = _filled(program.arguments[0])
            batch = jax.device_put(batch, compiled.input_shardings[0][1])
            call = functools.partial(_step, compiled, [state], batch)
            del state
        else:
            _, weights, _, _, _, _, sampling = program.arguments
            lengths = np.full(program.rows, program.length, np.int32)
            prompt = (batch.tokens, batch.image_slots, lengths, batch.images)
            call = functools.partial(compiled, _filled(weights), *prompt, sampling)
        jax.block_until_ready(call())  # gigabytes of memory are touched for the first time
        seconds = []
        while len(seconds) < _TIMES and sum(seconds) < _LONG:
            begin = time.perf_counter()
            jax.block_until_ready(call())
            seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def _step(compiled, kept, batch):
    """Takes a step; ``kept`` has the state, whose memory the step takes over."""
    state, metrics = compiled(kept.pop(), batch)
    kept.append(state)
    return metrics


def _filled(tree):
    """Arrays of small numbers for abstract ones: no time depends on what they are."""
    return jax.tree.map(lambda x: jnp.full(x.shape, 0.01, x.dtype, device=x.sharding), tree)


# ---- Foreseen --------------------------------------------------------------------------------------------------------


def foresee(vision: str, llm: str, rows: list[int], devices: list[jax.Device]) -> _Rows:
    """The same programs as ``plan`` compiles them, in bfloat16, for devices that are not here.

    Returns:
      Rows of ``what``, ``rows`` a device, ``peak_gib`` of a device and whether that ``fits``, ``seconds`` by a
      roofline, and ``times_mlp``, how often faster.
    """
    found = []
    for what, count in itertools.product(TEXT, rows):
        slower = None
        for fusion in _FUSIONS:
            config = _config(what, vision, llm, fusion)
            total = count * len(devices)
            config = dataclasses.replace(
                config, global_batch_size=total, eval=dataclasses.replace(config.eval, batch=total)
            )
            told = report(config, "prefill" if what == "prefill" else "train", devices)
            seconds = told["step_seconds_estimate"]
            slower = slower or seconds
            row = {"what": f"{what}, {fusion}, {told['chip']}", "rows": count}
            row |= {"peak_gib": told["peak_bytes_per_device"] / _GIB, "fits": told["fits"]}
            row |= {"seconds": seconds, "times_mlp": slower / seconds}
            found.append(row)
            print(f"{row['what']}, {count} rows per device: {row['peak_gib']:.2f} GiB", file=sys.stderr)
    return found


# ---- Drawn -----------------------------------------------------------------------------------------------------------


def draw(rows: _Rows, file: pathlib.Path) -> None:
    """Seconds by rows, as measured and as foreseen, and memory by rows per device; what has no rows is left out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chip = next(row["what"] for row in rows if "peak_gib" in row).split(", ")[-1]
    kinds = (  # of rows: what they end with, along, up, and what is written there
        (
            "",
            "batch",
            lambda row: row["ms_all"] / 1e3,
            "rows",
            "seconds here, by a line\nthrough few layers",
        ),
        (f", {chip}", "rows", lambda row: row["seconds"], f"rows per card of {chip}", "seconds, foreseen"),
        (f", {chip}", "rows", lambda row: row["peak_gib"], f"rows per card of {chip}", "GiB of a card, foreseen"),
    )
    titles = {"prefill": "Reading a prompt", "pretrain": "A step of stage 1", "finetune": "A step of stage 2"}
    figure, axes = plt.subplots(len(kinds), len(titles), figsize=(12, 9), constrained_layout=True)
    for axis, ((end, along, up, x, y), (what, title)) in zip(
        axes.flat, itertools.product(kinds, titles.items()), strict=True
    ):
        for fusion, colour in zip(_FUSIONS, ("tab:gray", "tab:blue"), strict=True):
            here = [row for row in rows if row["what"] == f"{what}, {fusion}{end}"]
            ticks = [row[along] for row in here]
            axis.plot(ticks, [up(row) for row in here], "o-", color=colour, label=fusion)
        axis.set(title=title, xlabel=x, ylabel=y, xticks=ticks)
        axis.margins(y=0.1)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend()
        axis.set_visible(bool(ticks))
    figure.savefig(file, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    print(json.dumps(timed(*json.loads(sys.argv[1]))))
