"""The status of a run, read from its workdir without changing it: ``python -m stf_jax.main --workdir=DIR --status``."""

import datetime
import json
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from stf_jax.config import UserError
from stf_jax.files import in_bucket
from stf_jax.runs.events import EVENTS, METRICS, Event, count_restarts, read_lines
from stf_jax.runs.lock import LOCK_NAME, Owner, lock_owner
from stf_jax.table import format_duration, format_facts

_COMMIT = "commit_success.txt"  # marks a complete Orbax checkpoint in a bucket, where folders cannot be renamed
_TAIL = 2**16  # bytes of metrics.jsonl that are read
_REQUIRED = {"step", "loss", "seconds_per_step", "tokens_per_second", "seconds", "tokens", "rows_replaced"}
_EVENTS_SHOWN, _WIDTH = 5, 100  # and characters of each event's details
_log = logging.getLogger(__name__)


def format_status(workdir: epath.Path) -> str:
    """Formats the status of a run for people; with several stages, of each that has begun.

    The run may be in progress, also on another machine: nothing is written, and the run is not contacted.

    Raises:
      UserError: the folder is not a run's workdir, or cannot be read.
    """
    try:
        stages = _find_stages(workdir)
        owners = {path: _find_owner(path) for path in dict.fromkeys([workdir, *stages, *_entries(workdir)])}
        parts = [_format_stage(folder, owners[folder]) for folder in stages]
        parts += [
            f"{path}: {_format_owner(owner)}, preparing to train"
            for path, owner in owners.items()
            if owner and path not in stages
        ]
        if parts:
            return "\n\n".join(parts)
    except OSError as error:
        raise UserError(f"The workdir {workdir} cannot be read: {error.strerror or error}.") from None
    raise UserError(f"{workdir} is not a run's workdir: it has no config.json of a run. Give the run's --workdir.")


def _find_stages(workdir: epath.Path) -> list[epath.Path]:
    """Lists the folders of the stages in the order in which they began; of a single-stage run, the workdir itself."""
    if _is_stage(workdir):
        return [workdir]
    stages = [path for path in _entries(workdir) if _is_stage(path)]
    begin_times = {path: next((event["time"] for event in _read_events(path)), "later") for path in stages}
    return sorted(stages, key=lambda path: (begin_times[path], path.name))


def _is_stage(folder: epath.Path) -> bool:
    """Whether a folder has a run's config.json; models have files of that name, too."""
    try:
        return "global_batch_size" in json.loads((folder / "config.json").read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
        return False


def _read_events(folder: epath.Path) -> list[dict[str, Any]]:
    return _read_objects(folder / EVENTS, {"time", "event", "step"})


def _read_objects(path: epath.Path, keys: set[str], tail: int = 0) -> list[dict[str, Any]]:
    """Reads the objects of a JSONL file that have all these keys."""
    return [values for _, values in read_lines(path, tail) if keys <= values.keys()]


def _find_owner(folder: epath.Path) -> Owner | None:
    if in_bucket(folder) and (folder / LOCK_NAME).exists():
        _log.info("%s: waiting to see whether its run is alive, because a bucket has no locks", folder)
    return lock_owner(folder)


def _format_stage(folder: epath.Path, owner: Owner | None) -> str:
    events = _read_events(folder)
    last: Mapping[str, Any] = next(reversed(_read_objects(folder / METRICS, _REQUIRED, _TAIL)), {})
    steps = next((event["steps"] for event in reversed(events) if "steps" in event), 0)
    running, state = _describe_state(events, owner)
    complete, incomplete = _list_checkpoints(folder / "checkpoints")
    damaged = sorted(path.name for path in _entries(folder / "damaged"))
    progress = {"step": "none logged yet"}
    if last:
        age = format_duration(max(time.time() - (folder / METRICS).stat().mtime, 0))
        left = (steps - last["step"]) * last["seconds_per_step"]
        progress = {
            "step": f"{last['step']:,}{f' of {steps:,}' if steps else ''}, logged {age} ago",
            "loss": "not finite" if last["loss"] is None else f"{last['loss']:.3f}",
            "speed": _format_speed(last),
            "left": f"{format_duration(left)} at that speed" if running and left > 0 else "",
            "trained": f"{last['tokens']:,} tokens in {format_duration(last['seconds'])}",
            "skipped": _format_skipped(last),
        }
    return format_facts(
        f"{folder}: {state}",
        progress
        | {
            "restarts": f"{count_restarts(events):,}" if count_restarts(events) else "",
            "checkpoints": ", ".join([*map(str, complete), *(f"{name} (incomplete)" for name in incomplete)]) or "none",
            "damaged": f"{', '.join(damaged)}, moved to {folder / 'damaged'}" if damaged else "",
            "events": f"\n{'':15}".join(map(_format_event, events[-_EVENTS_SHOWN:])),
        },
    )


def _describe_state(events: Sequence[Event], owner: Owner | None) -> tuple[bool, str]:
    """Returns whether a process is running the stage, and the state as text."""
    latest: Event = next((event for event in reversed(events) if event["event"] in ("begin", "stopped", "end")), {})
    # A lock taken after the end means that the run was started again.
    ended = latest.get("event") == "end" and not (owner and _timestamp(owner["since"]) > _timestamp(latest["time"]))
    if owner and not ended:
        return True, _format_owner(owner)
    if ended:
        return False, f"ended {_format_age(latest)}"
    if latest.get("event") == "stopped":
        status = latest.get("status", "unknown")
        return False, f"stopped {_format_age(latest)} at step {latest['step']:,}, exit status {status}"
    if latest:
        return False, "dead: it has not ended, and no process is running it; run the same command to resume"
    return False, "no process is running it"


def _format_owner(owner: Owner) -> str:
    return f"running since {owner['since']}, process {owner['pid']} on {owner['host']}"


def _format_speed(last: Mapping[str, Any]) -> str:
    keys = {"MFU": "mfu", "data wait": "data_wait", "goodput": "goodput"}
    shares = [f"{name} {last[key]:.0%}" for name, key in keys.items() if key in last]
    return ", ".join([f"{last['tokens_per_second']:,.0f} tok/s", *shares])


def _format_skipped(last: Mapping[str, Any]) -> str:
    counts = {"rows": last["rows_replaced"], "updates": last.get("updates_skipped", 0)}
    return ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)


def _list_checkpoints(folder: epath.Path) -> tuple[list[int], list[str]]:
    """Lists complete steps in order, and the names of incomplete folders; without Orbax, which would delete those."""
    found = {path.name: path for path in _entries(folder)}
    complete = [
        name for name in found if name.isdigit() and (not in_bucket(folder) or (found[name] / _COMMIT).exists())
    ]
    incomplete = (name for name in found.keys() - set(complete) if name.split(".")[0].isdigit())
    return sorted(map(int, complete)), sorted(incomplete)


def _entries(folder: epath.Path) -> list[epath.Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _format_event(event: Event) -> str:
    details = {
        key: value for key, value in event.items() if key not in ("time", "event", "step") and value not in ("", {}, [])
    }
    text = ", ".join(f"{key} {json.dumps(value, ensure_ascii=False)}" for key, value in details.items())
    text = text if len(text) <= _WIDTH else text[: _WIDTH - 1] + "…"
    time_text = event["time"][:19].replace("T", " ")
    return f"{time_text} UTC, step {event['step']:,}: {event['event']}{f' ({text})' if text else ''}"


def _format_age(event: Event) -> str:
    return f"{format_duration(max(time.time() - _timestamp(event['time']), 0))} ago"


def _timestamp(text: str) -> float:
    return datetime.datetime.fromisoformat(text.replace(" UTC", "+00:00")).timestamp()
