"""Text output of `plan`."""

from collections.abc import Iterator, Mapping
from typing import Any

from stf_jax.table import format_table

_GIB = 2**30


def format_report(report: Mapping[str, Any]) -> str:
    """Formats the result of :func:`stf_jax.planning.report.make_report`."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
    limit, peak = report["memory_limit_bytes_per_device"], report["peak_bytes_per_device"]
    verdict = "fits" if report["fits"] else "DOES NOT FIT"
    where = report["topology"] + (f" × {report['slices']} slices" if report["slices"] > 1 else "")
    limit_gib = f"{limit / _GIB:.2f} GiB"
    needed = f"{peak / _GIB:.2f} GiB of {limit_gib}" if peak else f"more than {limit_gib}"
    lines = [
        f"{report['what']} on {where}: {verdict}. Peak memory per device: {needed}.",
        *_describe_evaluation(report),
        f"mesh {mesh}; {report['rows']} rows of {report['positions']} positions, {report['images']} images each"
        + (f"; model.remat={report['remat']}" if report.get("remat") else ""),
        "",
        format_table([_memory_row(report)]),
        "",
        format_table([_flops_row(report)]),
    ]
    if report["collective_bytes"]:
        lines += ["", format_table(list(_traffic_rows(report)))]
    lines += ["", format_table([_roofline_row(report)]), "", _format_times(report)]
    return "\n".join(lines)


def _describe_evaluation(report: Mapping[str, Any]) -> Iterator[str]:
    """Yields whether an evaluation includes the training state."""
    if report.get("during_training") is True:
        yield "This is an evaluation during training (eval.benchmarks), with the training state in memory."
    elif report.get("during_training") is False:
        yield "This is stf_jax.evaluate on its own; set eval.benchmarks to include the training state."


def _memory_row(report: Mapping[str, Any]) -> dict[str, Any]:
    return {"what": "memory per device, GiB"} | {
        name: "unknown" if size is None else size / _GIB for name, size in report["memory"].items()
    }


def _flops_row(report: Mapping[str, Any]) -> dict[str, Any]:
    model, executed = report["model_flops"], report["executed_flops"]
    return {"what": "work per step, TFLOP"} | {
        "model": model / 1e12,
        "executed": executed / 1e12,
        "recomputed": f"{executed / model - 1:.0%}",
    }


def _traffic_rows(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for kind, by_axis in report["collective_bytes"].items():
        for axes, size in by_axis.items():
            yield {"what": f"{kind} over {axes}, GB sent per device", "per step": size / 1e9}


def _roofline_row(report: Mapping[str, Any]) -> dict[str, Any]:
    return {"what": "roofline, s per step at peak speed"} | dict(report["roofline_seconds"])


def _format_times(report: Mapping[str, Any]) -> str:
    text = (
        f"about {report['step_seconds_estimate']:.3g} s per step, bound by {report['bound']}: "
        f"{report['tokens_per_second']:,.0f} tokens/s, MFU {report['mfu_estimate']:.0%}"
    )
    if report["hours"]:
        lengths = "with the lengths of the data" if report["of_the_data"] else f"of {report['positions']} positions"
        text += f"\n{report['steps']:,} steps {lengths}: {report['hours']:.1f} hours"
    if report.get("cost"):
        text += f", {report['chip_hours']:,.0f} chip hours, {report['cost']:,.0f} at that price"
    return text


def format_trial(trial: Mapping[str, Any]) -> str:
    """Formats one compiled candidate of a search as a line."""
    peak = trial["peak_bytes_per_device"]
    needed = f"{peak / _GIB:.1f} GiB" if peak else "too much"
    return f"{_format_flags(trial)}: {'fits' if trial['fits'] else 'does not fit'}, {needed}"


def _format_flags(trial: Mapping[str, Any]) -> str:
    return " ".join(f"--config.{key}={value}" for key, value in trial["settings"].items())


def format_ranking(result: Mapping[str, Any]) -> str:
    """Formats the result of :func:`stf_jax.planning.search.search`."""
    if not result["ranked"]:
        return (
            f"None of the {result['tried']} combinations of mesh, rematerialization and microbatches fits "
            f"{result['topology']}; {result['compiled']} were compiled."
        )
    rows = [
        {
            "what": " ".join(f"{key.split('.')[-1]}={value}" for key, value in trial["settings"].items()),
            "peak GiB": trial["peak_bytes_per_device"] / _GIB,
            "s per step": trial["step_seconds_estimate"],
            "bound": trial["bound"],
            "hours": trial["hours"] or "unknown",
        }
        for trial in result["ranked"]
    ]
    best = _format_flags(result["ranked"][0])
    return f"{format_table(rows)}\n\n{result['tried']} tried, {result['compiled']} compiled; the fastest: {best}"
