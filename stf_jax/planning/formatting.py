"""What was foreseen, as a page to read."""

from collections.abc import Mapping
from typing import Any

from stf_jax.runtime.table import table

_GIB = 2**30


def summary(found: Mapping[str, Any]) -> str:
    """Of :func:`stf_jax.planning.report.report`."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in found["mesh"].items())
    limit, peak = found["memory_limit_bytes_per_device"], found["peak_bytes_per_device"]
    verdict = "fits" if found["fits"] else "DOES NOT FIT"
    where = found["topology"] + (f" × {found['slices']} slices" if found["slices"] > 1 else "")
    needed = f"{peak / _GIB:.2f} GiB" if peak else "more than the compiler can tell"
    lines = [
        f"{found['what']} on {where}: {verdict}. At its peak a device needs {needed}, of {limit / _GIB:.2f} GiB.",
        *_about(found),
        f"mesh {mesh}; {found['rows']} rows of {found['positions']} positions, {found['images']} images each",
        "",
        table([_memory(found)]),
        "",
        table([_flops(found)]),
    ]
    if found["collective_bytes"]:
        lines += ["", table(list(_sent(found)))]
    lines += ["", table([_seconds(found)]), "", _times(found)]
    return "\n".join(lines)


def _about(found):
    """Which of the two an evaluation is."""
    if found.get("during_training") is True:
        yield "This is a measurement during training (eval.benchmarks), with the training state beside it."
    elif found.get("during_training") is False:
        yield "This is stf_jax.evaluate by itself; name eval.benchmarks to count the training state beside it."


def _memory(found):
    return {"what": "memory a device, GiB"} | {
        name: "unknown" if size is None else size / _GIB for name, size in found["memory"].items()
    }


def _flops(found):
    model, executed = found["model_flops"], found["executed_flops"]
    return {"what": "work a step, TFLOP"} | {
        "model": model / 1e12,
        "executed": executed / 1e12,
        "recomputed": f"{executed / model - 1:.0%}",
    }


def _sent(found):
    for kind, by_axis in found["collective_bytes"].items():
        for axes, size in by_axis.items():
            yield {"what": f"{kind} over {axes}, GB a device sends", "a step": size / 1e9}


def _seconds(found):
    return {"what": "roofline, s a step at full speed"} | dict(found["roofline_seconds"])


def _times(found):
    text = (
        f"about {found['step_seconds_estimate']:.3g} s a step, bound by {found['bound']}: "
        f"{found['tokens_per_second']:,.0f} tokens/s, MFU {found['mfu_estimate']:.0%}"
    )
    if found["hours"]:
        text += f"\n{found['steps']:,} steps: {found['hours']:.1f} hours"
    if found.get("cost"):
        text += f", {found['chip_hours']:,.0f} chip hours, {found['cost']:,.0f} at that price"
    return text


def trial(found: Mapping[str, Any]) -> str:
    """A line of one that a search compiled."""
    peak = found["peak_bytes_per_device"]
    needed = f"{peak / _GIB:.1f} GiB" if peak else "too much"
    return f"{_flags(found)}: {'fits' if found['fits'] else 'does not fit'}, {needed}"


def _flags(found):
    return " ".join(f"--config.{key}={value}" for key, value in found["settings"].items())


def ranking(found: Mapping[str, Any]) -> str:
    """Of :func:`stf_jax.planning.search.search`."""
    if not found["ranked"]:
        return (
            f"None of the {found['tried']} meshes, rematerialisations and microbatches that were tried fits "
            f"{found['topology']}; {found['compiled']} were compiled."
        )
    rows = [
        {
            "what": " ".join(f"{key.split('.')[-1]}={value}" for key, value in one["settings"].items()),
            "peak GiB": one["peak_bytes_per_device"] / _GIB,
            "s a step": one["step_seconds_estimate"],
            "bound": one["bound"],
            "hours": one["hours"] or "unknown",
        }
        for one in found["ranked"]
    ]
    best = _flags(found["ranked"][0])
    return f"{table(rows)}\n\n{found['tried']} tried, {found['compiled']} compiled; the fastest: {best}"
