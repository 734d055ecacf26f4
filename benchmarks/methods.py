"""What evaluated methods cost on this machine's device, for comparisons: writes ``cost.json`` next to their results."""

import argparse
import dataclasses
import pathlib
from typing import Any

from etils import epath

from stf_jax.comparisons.runs import read_cost
from stf_jax.config import DataConfig, TrainConfig, UserError, replace
from stf_jax.evals.files import COST_FILE, RESULTS
from stf_jax.files import as_user_error, read_json, to_path, write_json
from stf_jax.models.spec import ModelSpec
from stf_jax.studies.method_cost import measure_methods
from stf_jax.weights.exports import require_complete
from stf_jax.weights.model import open_model

_COLUMNS = (
    "image_tokens",
    "prefill_gflops",
    "first_token_ms",
    "method_ms",
    "prefill_mib",
    "first_token_rows",
    "device",
)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures the methods that made the results, in turn; writes the files once all are measured.

    Other keys of existing files stay, such as those of training steps.

    Returns:
      A row that describes the setup, then one for each method: ``what``, and keys of its ``cost.json``.
    """
    if options.rows < 1 or options.text < 1 or options.rounds < 1:
        raise UserError("--rows, --text and --rounds must be at least 1.")
    models = [read_method(folder) for folder in options.results]
    for folder in options.results:
        read_cost(epath.Path(folder / COST_FILE))  # a malformed one is refused before anything is measured
    configs = [
        TrainConfig(
            global_batch_size=options.rows,
            model=model,
            data=dataclasses.replace(DataConfig(), max_length=model.slots + options.text, images_per_row=1),
        )
        for model in models
    ]
    costs = measure_methods(configs, options.rounds)
    for folder, cost in zip(options.results, costs, strict=True):
        file = epath.Path(folder / COST_FILE)
        with as_user_error(file):
            write_json(file, (read_json(file) if file.exists() else {}) | cost)
    rows: list[dict[str, Any]] = [
        {"what": str(folder)} | {key: cost[key] for key in _COLUMNS}
        for folder, cost in zip(options.results, costs, strict=True)
    ]
    return [{"what": costs[0]["device"], "rows": options.rows, "text_tokens": options.text}, *rows]


def read_method(folder: pathlib.Path) -> ModelSpec:
    """Reads which model gave the results in a folder, and with which reduction.

    Raises:
      UserError: it has no results, or they do not say; or the model is gone.
    """
    results = read_json(epath.Path(folder / RESULTS))
    try:
        asking = (results[0] if isinstance(results, list) else results)["protocol"]["asking"]
        origin = asking["model"]
        place = to_path(origin["checkpoint"] if "checkpoint" in origin else origin["workdir"])
        defaults = {"reduce": "", "keep": 0, "tokens": 0}
        changes = {"precision": asking["precision"]} | {key: asking.get(key, x) for key, x in defaults.items()}
    except (KeyError, TypeError, IndexError):
        raise UserError(
            f"{folder / RESULTS} does not say which model answered: only results of a model that was asked by "
            "stf_jax.evaluate or main can be measured."
        ) from None
    if changes["tokens"] == "auto":
        raise UserError(f"{folder}: --tokens=auto chose tokens for each image, so no one number can be measured.")
    saved = open_model(place)
    require_complete(saved, place)
    return replace(saved.config, "model.", **changes)
