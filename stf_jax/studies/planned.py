"""What the training runs of a study take on a machine, by plan, before any of them starts."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from stf_jax.config import TrainConfig
from stf_jax.planning.report import make_report
from stf_jax.studies.study import Cell, Study
from stf_jax.weights.origin import complete_config


def plan_study(
    study: Study,
    cells: Sequence[Cell],
    devices: list[jax.Device],
    price: float,
    on_stage: Callable[[str, dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """Plans the training runs of a study that are not done. They run one after another, each on all devices.

    Args:
      cells: all cells.
      price: of a chip per hour; 0: not known.
      on_stage: called with the name of each stage that was compiled, which takes a minute, and its report.

    Returns:
      A row for each variant that trains, then the sum: ``what``; ``runs`` and how many are ``done``; whether a run
      ``fits``; the ``hours`` of one run; and ``chip_hours`` and ``cost`` of those not done. None where the number of
      steps is not known.

    Raises:
      UserError: as :func:`stf_jax.planning.report.make_report`; or a cell's folder contains another run.
    """
    reports: dict[TrainConfig, dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []
    for variant in (variant for variant in study.variants if not variant.source):
        runs = [cell for cell in cells if cell.variant == variant]
        done = sum(cell.done for cell in runs)
        fits, hours = True, list[float | None]()
        stages = study.resolve_stages(variant, study.seeds[0])
        for stage in stages:
            key = _prepare(stage, stages[0].init_from)
            if key not in reports:
                reports[key] = make_report(key, "train", devices)
                on_stage(f"{variant.name}, {stage.name}", reports[key])
            fits, hours = fits and reports[key]["fits"], [*hours, reports[key]["hours"]]
        each = _add(hours)
        left = None if each is None else each * (len(runs) - done)
        rows.append({"what": variant.name, "runs": len(runs), "done": done, "fits": fits, "hours": each})
        rows[-1]["chip_hours"] = None if left is None else left * len(devices)
    total: dict[str, Any] = {"what": "all", "runs": sum(row["runs"] for row in rows)}
    total |= {"done": sum(row["done"] for row in rows), "fits": all(row["fits"] for row in rows), "hours": None}
    rows.append(total | {"chip_hours": _add([row["chip_hours"] for row in rows])})
    if price:
        rows = [row | {"cost": row["chip_hours"] and price * row["chip_hours"]} for row in rows]
    return rows


def _prepare(stage: TrainConfig, init_from: str) -> TrainConfig:
    """The stage with the weights that the first stage starts from, and with the recipe's number of rows, if it has one.

    So neither weights nor data have to be at hand. The seed, which changes no time, is the same for all.
    """
    data = dataclasses.replace(stage.data, annotations="") if stage.data.records else stage.data
    return complete_config(dataclasses.replace(stage, seed=0, init_from=init_from, data=data))


def _add(values: Sequence[float | None]) -> float | None:
    """The sum, or None if any value is not known."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
