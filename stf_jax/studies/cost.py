"""What a variant costs: its shapes counted, and its steps and first tokens timed, in a process of its own."""

import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
from etils import epath

from stf_jax.benches.synthetic import make_batch
from stf_jax.benches.timing import time_train_steps
from stf_jax.config import RunFailed, from_json
from stf_jax.evals.registry import open_benchmarks
from stf_jax.inference.loading import load_generator
from stf_jax.models.selection import resolve_reduction
from stf_jax.runtime.cli import Parser, add_model_arguments
from stf_jax.runtime.cost import prefill_flops, step_flops
from stf_jax.runtime.files import read_json, write_json
from stf_jax.runtime.mesh import make_mesh
from stf_jax.studies.runner import Slot
from stf_jax.studies.study import Cell

COST = "cost.json"  # beside a cell's results
_STEPS, _ANSWERS = 20, 10  # that are timed


def cost(cell: Cell, slot: Slot) -> dict[str, Any]:
    """What a done cell costs, measured where that was not done before, alone on that share of the machine.

    Raises:
      RunFailed: it could not be measured; says where the log is.
    """
    file = cell.folder / COST
    if not file.exists():
        command = [sys.executable, "-m", "stf_jax.studies.cost", str(cell.checkpoint), *cell.variant.asked]
        log, before = cell.folder / "cost.txt", os.sched_getaffinity(0)
        with log.open("w") as errors:
            environment = os.environ | slot.environment
            os.sched_setaffinity(0, slot.processors)  # which the child inherits
            try:
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
            finally:
                os.sched_setaffinity(0, before)
        if done.returncode:
            raise RunFailed(f"What {cell.name} costs could not be measured: see {log}")
        write_json(epath.Path(file), json.loads(done.stdout.splitlines()[-1]))
    return read_json(epath.Path(file))


def _measure(workdir: pathlib.Path, asked: list[str]) -> dict[str, Any]:
    parser = Parser()
    add_model_arguments(parser)
    how = parser.parse_known_args(asked)[0]
    config = from_json(read_json(epath.Path(workdir / "config.json")))
    model = dataclasses.replace(config.model, reduce=how.reduce, keep=how.keep)
    reduced, rows, length = resolve_reduction(model), config.global_batch_size, config.data.max_length
    mesh = make_mesh(config.mesh)
    generator, saved = load_generator(epath.Path(workdir), mesh, how.precision, how.reduce, how.keep)
    fusion = sum(leaf.size for path, leaf in saved.shapes.items() if path.startswith("fusion/"))
    first, prompt = _first_token(generator, config)
    figures = {
        "image_tokens": reduced.keep,
        "fusion_parameters": fusion,
        "first_token_ms": 1e3 * first,
        "first_token_rows": config.eval.batch,
        "prefill_gflops": prefill_flops(model, 1, prompt, 1).forward / 1e9,
    }
    if not reduced.name:
        del generator
        seconds, memory = time_train_steps(config, str(workdir), make_batch(config), _STEPS)[1:]
        figures |= {
            "step_ms": 1e3 * statistics.median(seconds),
            "step_rows": rows,
            "step_gflops": step_flops(config.model, config.rules, rows, length, 1).step / 1e9,
            "step_mib": memory / 2**20,
        }
    return figures | {"device": jax.devices()[0].device_kind}


def _first_token(generator, config):
    """Median seconds from a batch of questions to the first token of all answers; and the longest prompt's tokens.

    The images are in memory already.
    """
    (benchmark, *_) = open_benchmarks(config.eval.benchmarks, config.eval.data, config.eval.limit)
    records = []
    for question in benchmark.questions[: config.eval.batch]:
        record = question.record()
        opened = [image() for image in record.images]
        records.append(dataclasses.replace(record, images=tuple(lambda x=x: x for x in opened)))
    seconds = []
    for _ in range(_ANSWERS + 1):  # the first one compiles
        begin = time.perf_counter()
        for _ in generator.generate(records, 1, len(records)):
            pass
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:]), max(map(generator.length, records))


if __name__ == "__main__":
    print(json.dumps(_measure(pathlib.Path(sys.argv[1]), sys.argv[2:])))
