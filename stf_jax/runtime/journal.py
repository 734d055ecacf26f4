"""What a run writes down in its workdir, line by line: its logged steps, and what befell it."""

import datetime
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from etils import epath

from stf_jax.config import short_message
from stf_jax.runtime.files import GrowingFile, writing

METRICS, EVENTS, BOARD = "metrics.jsonl", "events.jsonl", "tensorboard"  # in the workdir
_log = logging.getLogger(__name__)


class Metrics:
    """``metrics.jsonl``: an object a logged step."""

    name = METRICS

    def __init__(self, workdir: epath.Path, first: int):
        """A run that was killed had gone on past the checkpoint that this one continues from: step ``first``."""
        path = workdir / METRICS
        self._file = GrowingFile(path, [line for line, value in read(path) if value.get("step", first + 1) <= first])

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._file.append(_line({"step": step, **values}))

    def close(self, status: int) -> None:
        self._file.close()


class Events:
    """``events.jsonl``: what befell a run, over its restarts. Lines are added, and never go.

    docs/ARCHITECTURE.md lists the kinds. It is open until the ``with`` block ends.

    Attributes:
      restarts: how often the run went on from a checkpoint.
      under_way: whether it has begun in this process, and neither ended nor stopped since.
    """

    def __init__(self, workdir: epath.Path, *, active: bool):
        """Of hosts, only the ``active`` one writes. Raises UserError where the workdir cannot be written to."""
        self._file, self.restarts, self.under_way = None, 0, False
        if active:
            with writing(workdir):
                before = read(workdir / EVENTS)
                self._file = GrowingFile(workdir / EVENTS, [line for line, _ in before])
            self._try = enduring(EVENTS)
            self.restarts = restarts(event for _, event in before)

    def __enter__(self) -> "Events":
        return self

    def __exit__(self, *_) -> None:
        if self._file is not None:
            self._try(self._file.close)

    def add(self, kind: str, step: int, **facts: Any) -> None:
        """Writes down what befell, at once also in a bucket; where that fails, it is told, and made up for later.

        Args:
          kind: a ``begin`` that is ``resumed`` counts as a restart.
          step: that it befell, or the last one before.
          **facts: plain data.
        """
        if self._file is None:
            return
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        event = {"time": now, "event": kind, "step": step, **facts}
        self.restarts += restarts([event])
        self.under_way = kind == "begin" or (self.under_way and kind not in ("end", "stopped"))
        self._try(self._file.append, _line(event), now=True)


def enduring(name: str) -> Callable[..., None]:
    """Calls what it is given; a failure is told, once in a row, and kept from the run, which is worth more than a log.

    Args:
      name: what cannot be written then.
    """
    failing = False

    def call(do, *args, **options):
        nonlocal failing
        try:
            do(*args, **options)
            failing = False
        except Exception as error:  # a disk's, a bucket's, a library's
            if not failing:
                _log.warning("%s cannot be written (%s); the run goes on.", name, short_message(error))
            failing = True

    return call


def read(path: epath.Path, end: int = 0) -> list[tuple[str, dict[str, Any]]]:
    """The lines of such a file, each with what it says, without those that are cut short; none where there is no file.

    Args:
      end: so many bytes of its end are looked at; 0: all.
    """
    if not path.exists():
        return []
    with path.open("rb") as file:
        if end:
            file.seek(max(file.seek(0, os.SEEK_END) - end, 0))
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


def restarts(events: Iterable[Mapping[str, Any]]) -> int:
    """How many of the events are of a run that went on from a checkpoint."""
    return sum(event.get("event") == "begin" and bool(event.get("resumed")) for event in events)


def _line(values):
    """JSON, to the letter of the standard: it has no NaN."""
    return json.dumps(_finite(values), allow_nan=False, default=str)


def _finite(value):
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
