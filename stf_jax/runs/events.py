"""The run's event log, ``events.jsonl``, and the JSON lines that it shares with ``metrics.jsonl``."""

import datetime
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from etils import epath

from stf_jax.config import short_message
from stf_jax.files import AppendOnlyFile, as_user_error

Event = Mapping[str, Any]  # a line of the event log
METRICS, EVENTS, TENSORBOARD = "metrics.jsonl", "events.jsonl", "tensorboard"  # in the workdir
_log = logging.getLogger(__name__)


class Events:
    """``events.jsonl``: the events of a run over all its restarts. Lines are only ever appended.

    docs/ARCHITECTURE.md lists the kinds. The file is open until the ``with`` block ends.

    Attributes:
      restarts: number of times the run resumed from a checkpoint.
      in_progress: whether the run has begun in this process, and has neither ended nor stopped since.
    """

    def __init__(self, workdir: epath.Path, *, active: bool) -> None:
        """Opens the file on the ``active`` host alone. Raises UserError if the workdir cannot be written to."""
        self._file: AppendOnlyFile | None = None
        self.restarts, self.in_progress = 0, False
        if active:
            with as_user_error(workdir):
                previous = read_lines(workdir / EVENTS)
                self._file = AppendOnlyFile(workdir / EVENTS, [line for line, _ in previous])
            self._try = log_errors_once(EVENTS)
            self.restarts = count_restarts(event for _, event in previous)

    def __enter__(self) -> "Events":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._try(self._file.close)

    def add(self, kind: str, step: int, **fields: Any) -> None:
        """Appends an event, at once even in a bucket. If that fails, logs a warning and writes the event later.

        Args:
          kind: name of the event; a ``begin`` with ``resumed`` counts as a restart.
          step: the step it happened at, or the last one before.
          **fields: JSON-serializable details.
        """
        if self._file is None:
            return
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        event = {"time": now, "event": kind, "step": step, **fields}
        self.restarts += count_restarts([event])
        self.in_progress = kind == "begin" or (self.in_progress and kind not in ("end", "stopped"))
        self._try(self._file.append, to_json_line(event), now=True)


def log_errors_once(name: str) -> Callable[..., None]:
    """Returns a function that runs a callable and logs only the first of consecutive failures.

    A run must not end because a log cannot be written.

    Args:
      name: what is being written, for the warning.
    """
    failing = False

    def call(function: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        nonlocal failing
        try:
            function(*args, **kwargs)
            failing = False
        except Exception as error:  # from a disk, a bucket or a library
            if not failing:
                _log.warning("%s cannot be written (%s); the run continues.", name, short_message(error))
            failing = True

    return call


def read_lines(path: epath.Path, tail: int = 0) -> list[tuple[str, dict[str, Any]]]:
    """Reads the lines of a JSONL file, each with its object. Skips incomplete lines; a missing file has none.

    Args:
      tail: reads only this many bytes at the end; 0 reads everything.
    """
    if not path.exists():
        return []
    with path.open("rb") as file:
        if tail:
            file.seek(max(file.seek(0, os.SEEK_END) - tail, 0))
        text = file.read().decode(errors="replace")
    found = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append((line, value))
    return found


def count_restarts(events: Iterable[Event]) -> int:
    """Counts the events that say that a run resumed from a checkpoint."""
    return sum(event.get("event") == "begin" and bool(event.get("resumed")) for event in events)


def to_json_line(values: Mapping[str, Any]) -> str:
    """Formats an object as standard JSON, which has no NaN: numbers that are not finite become null."""
    return json.dumps(_replace_non_finite(values), allow_nan=False, default=str)


def _replace_non_finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _replace_non_finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replace_non_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
