"""Where a run stands, by what lies in its workdir: ``python -m stf_jax.main --workdir=DIR --status``. It only reads."""

import datetime
import json
import logging
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from stf_jax.config import UserError
from stf_jax.runtime.files import in_bucket
from stf_jax.runtime.hold import NAME, holder
from stf_jax.runtime.journal import EVENTS, METRICS, read, restarts
from stf_jax.runtime.table import facts, span

_WHOLE = "commit_success.txt"  # by which Orbax ends a checkpoint in a bucket, where no folder can be renamed
_END = 2**16  # bytes of metrics.jsonl that are looked at
_NEEDED = {"step", "loss", "seconds_per_step", "tokens_per_second", "seconds", "tokens", "rows_replaced"}  # of a line
_NEWS, _WIDTH = 5, 100  # events shown, and letters of what each says
_log = logging.getLogger(__name__)


def status(workdir: epath.Path) -> str:
    """Where a run stands, for people; of one with several stages, where each stands that was begun.

    It may be at work meanwhile, also on another machine: nothing is written, and nothing is asked of it.

    Raises:
      UserError: the folder is no run's, or cannot be read.
    """
    try:
        folders = _stages(workdir)
        held = {path: _holder(path) for path in dict.fromkeys([workdir, *folders, *_entries(workdir)])}
        told = [_stage(folder, held[folder]) for folder in folders]
        told += [
            f"{path}: {_running(who)}, and getting ready" for path, who in held.items() if who and path not in folders
        ]
        if told:
            return "\n\n".join(told)
    except OSError as error:
        raise UserError(f"The workdir {workdir} cannot be read: {error.strerror or error}.") from None
    raise UserError(f"{workdir} is no workdir of a run, for it holds no config.json; give what --workdir was there.")


def _stages(workdir):
    """The folders of the stages in the order in which they were begun; the workdir itself where it is one stage's."""
    if _begun(workdir):
        return [workdir]
    found = [path for path in _entries(workdir) if _begun(path)]
    begun = {path: next((event["time"] for event in _events(path)), "later") for path in found}
    return sorted(found, key=lambda path: (begun[path], path.name))


def _begun(folder):
    """Whether a folder holds a run's config.json; models have files of that name, too."""
    try:
        return "global_batch_size" in json.loads((folder / "config.json").read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
        return False


def _events(folder):
    return _lines(folder / EVENTS, {"time", "event", "step"})


def _lines(path, keys, end=0):
    """What the lines say that have all those keys."""
    return [values for _, values in read(path, end) if keys <= values.keys()]


def _holder(folder):
    if in_bucket(folder) and (folder / NAME).exists():
        _log.info("%s: waiting for whether its run is alive, for a bucket has no locks", folder)
    return holder(folder)


def _stage(folder, held):
    events = _events(folder)
    last = next(reversed(_lines(folder / METRICS, _NEEDED, _END)), {})
    steps = next((event["steps"] for event in reversed(events) if "steps" in event), 0)
    running, state = _state(events, held)
    whole, half = _checkpoints(folder / "checkpoints")
    damaged = sorted(path.name for path in _entries(folder / "damaged"))
    shown = {"step": "none is logged yet"}
    if last:
        age = span(max(time.time() - (folder / METRICS).stat().mtime, 0))
        left = (steps - last["step"]) * last["seconds_per_step"]
        shown = {
            "step": f"{last['step']:,}{f' of {steps:,}' if steps else ''}, logged {age} ago",
            "loss": "not finite" if last["loss"] is None else f"{last['loss']:.3f}",
            "speed": _speed(last),
            "left": f"{span(left)} at that speed" if running and left > 0 else "",
            "trained": f"{last['tokens']:,} tokens in {span(last['seconds'])}",
            "skipped": _skipped(last),
        }
    return facts(
        f"{folder}: {state}",
        shown
        | {
            "restarts": f"{restarts(events):,}" if restarts(events) else "",
            "checkpoints": ", ".join([*map(str, whole), *(f"{name} (not whole)" for name in half)]) or "none",
            "damaged": f"{', '.join(damaged)}, set aside in {folder / 'damaged'}" if damaged else "",
            "lately": f"\n{'':15}".join(map(_told, events[-_NEWS:])),
        },
    )


def _state(events, held):
    """Whether a process is at work on it, and what to say of that."""
    fate = next((event for event in reversed(events) if event["event"] in ("begin", "stopped", "end")), {})
    # One that is held again since was started again.
    ended = fate.get("event") == "end" and not (held and _when(held["since"]) > _when(fate["time"]))
    if held and not ended:
        return True, _running(held)
    if ended:
        return False, f"ended {_ago(fate)}"
    if fate.get("event") == "stopped":
        return False, f"stopped {_ago(fate)} at step {fate['step']:,}, exit status {fate.get('status', 'unknown')}"
    if fate:
        return False, "dead: it has not ended, and no process is at work on it; its command, given again, goes on"
    return False, "no process is at work on it"


def _running(held):
    return f"running since {held['since']}, process {held['pid']} on {held['host']}"


def _speed(last):
    named = {"MFU": "mfu", "data wait": "data_wait", "goodput": "goodput"}
    shares = [f"{name} {last[key]:.0%}" for name, key in named.items() if key in last]
    return ", ".join([f"{last['tokens_per_second']:,.0f} tok/s", *shares])


def _skipped(last):
    counts = {"rows": last["rows_replaced"], "updates": last.get("updates_skipped", 0)}
    return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)


def _checkpoints(folder):
    """The steps that are whole, in order, and the names of folders that are not: by names, for Orbax would tidy up."""
    found = {path.name: path for path in _entries(folder)}
    whole = [name for name in found if name.isdigit() and (not in_bucket(folder) or (found[name] / _WHOLE).exists())]
    return sorted(map(int, whole)), sorted(name for name in found.keys() - set(whole) if name.split(".")[0].isdigit())


def _entries(folder):
    return list(folder.iterdir()) if folder.is_dir() else []


def _told(event: Mapping[str, Any]) -> str:
    rest = {
        key: value for key, value in event.items() if key not in ("time", "event", "step") and value not in ("", {}, [])
    }
    text = ", ".join(f"{key} {json.dumps(value, ensure_ascii=False)}" for key, value in rest.items())
    text = text if len(text) <= _WIDTH else text[: _WIDTH - 1] + "…"
    when = event["time"][:19].replace("T", " ")
    return f"{when} UTC, step {event['step']:,}: {event['event']}{f' ({text})' if text else ''}"


def _ago(event):
    return f"{span(max(time.time() - _when(event['time']), 0))} ago"


def _when(text):
    return datetime.datetime.fromisoformat(text.replace(" UTC", "+00:00")).timestamp()
