"""Cost of a variant: parameters and FLOPs from its shapes; step and first-token times, measured in a subprocess."""

import dataclasses
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import PIL.Image
from etils import epath

from stf_jax.cli import Parser, add_model_arguments
from stf_jax.config import RunFailed, TrainConfig, from_json, replace
from stf_jax.data.sampling import plan_budgets
from stf_jax.data.tiles import find_tiles, with_newline
from stf_jax.evals.files import COST_FILE
from stf_jax.evals.registry import open_benchmarks
from stf_jax.files import read_json, write_json
from stf_jax.inference.generator import Generator
from stf_jax.inference.loading import load_generator
from stf_jax.models.spec import resolve_model
from stf_jax.parallel.mesh import make_mesh
from stf_jax.studies.method_cost import measure_methods
from stf_jax.studies.runner import Slot
from stf_jax.studies.study import Cell
from stf_jax.training.flops import step_flops
from stf_jax.training.timing import make_batch, time_train_steps
from stf_jax.weights.folder import load_params

_STEPS, _REPEATS = 20, 10  # timed training steps, and timed batches of questions


def measure_cost(cell: Cell, slot: Slot) -> dict[str, Any]:
    """Returns the cost of a finished cell; measures it in the slot, with nothing else running, unless it is saved.

    Raises:
      RunFailed: it could not be measured; the message names the log.
    """
    file = cell.folder / COST_FILE
    if not file.exists():
        command = [sys.executable, "-m", "stf_jax.studies.cost", str(cell.checkpoint), *cell.variant.eval_options]
        log, before = cell.folder / "cost.txt", os.sched_getaffinity(0)
        with log.open("w") as errors:
            environment = os.environ | slot.environment
            os.sched_setaffinity(0, slot.cpus)  # the child process inherits it
            try:
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
            finally:
                os.sched_setaffinity(0, before)
        if done.returncode:
            raise RunFailed(f"The cost of {cell.name} could not be measured: see {log}")
        write_json(epath.Path(file), json.loads(done.stdout.splitlines()[-1]))
    return read_json(epath.Path(file))


def _measure(workdir: pathlib.Path, eval_options: list[str]) -> dict[str, Any]:
    parser = Parser()
    add_model_arguments(parser)
    options = parser.parse_known_args(eval_options)[0]
    config = from_json(read_json(epath.Path(workdir / "config.json")))
    shapes = with_newline(resolve_model(config.model), find_tiles(config.data))
    config = dataclasses.replace(config, model=shapes)
    model = replace(config.model, "model.", reduce=options.reduce, keep=options.keep, tokens=options.tokens)
    if options.precision:
        model = replace(model, "model.", precision=options.precision)
    rows, length = config.global_batch_size, config.data.max_length
    mesh = make_mesh(config.mesh)
    chosen = options.precision, options.reduce, options.keep, options.tokens
    generator, saved = load_generator(epath.Path(workdir), mesh, *chosen)
    fusion_parameters = sum(leaf.size for path, leaf in saved.shapes.items() if path.startswith("fusion/"))
    first_token_seconds, rows_timed, prompt_length, image_tokens = _time_first_token(generator, config)
    del generator  # its memory
    data = dataclasses.replace(config.data, max_length=prompt_length, images_per_row=1)
    method = dataclasses.replace(config, model=model, data=data, global_batch_size=config.eval.batch)
    cost = measure_methods([method], _REPEATS)[0]
    cost |= {"first_token_ms": 1e3 * first_token_seconds, "first_token_rows": rows_timed}
    cost["fusion_parameters"] = fusion_parameters
    if data.aspect == "tiles":
        cost["image_tokens"] = image_tokens
    if not options.reduce and not options.tokens:
        start, budgets = (config.objective, config.init_from), plan_budgets(config, length, 1)
        places = data.image_places
        load = functools.partial(load_params, str(workdir), fresh=())
        timing = time_train_steps(config, load, make_batch(config), _STEPS)
        cost |= {
            "step_ms": 1e3 * statistics.median(timing.seconds),
            "step_rows": rows,
            "step_gflops": step_flops(config.model, config.rules, rows, length, places, *start, budgets) / 1e9,
            "step_mib": timing.peak_bytes / 2**20,
        }
    return cost


def _time_first_token(generator: Generator, config: TrainConfig) -> tuple[float, int, int, int]:
    """Returns the median seconds from a batch of questions to the first tokens of all answers, and three numbers.

    The images are already in memory. The numbers are the questions, the tokens of the longest prompt, and the largest
    number of image tokens in a prompt.
    """
    (benchmark, *_) = open_benchmarks(config.eval.benchmarks, config.eval.data, config.eval.limit)
    records = []
    for question in benchmark.questions[: config.eval.batch]:
        record = question.to_record()
        images = [image() for image in record.images]
        records.append(dataclasses.replace(record, images=tuple(map(_as_opener, images))))
    seconds = []
    for _ in range(_REPEATS + 1):  # the first one compiles
        begin = time.perf_counter()
        for _ in generator.generate(records, 1, len(records)):
            pass
        seconds.append(time.perf_counter() - begin)
    prompts = [generator.prompt(record) for record in records]
    image_tokens = max(int(prompt.is_image.sum()) for prompt in prompts)
    longest = max(len(prompt.tokens) for prompt in prompts)
    return statistics.median(seconds[1:]), len(records), longest, image_tokens


def _as_opener(image: PIL.Image.Image) -> Callable[[], PIL.Image.Image]:
    return lambda: image


if __name__ == "__main__":
    print(json.dumps(_measure(pathlib.Path(sys.argv[1]), sys.argv[2:])))
