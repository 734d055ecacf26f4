"""Files of questions and labels: read, checked, matched with each other."""

import contextlib
import hashlib
import itertools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from stf_jax.config import UserError, shorten
from stf_jax.runtime.files import parse_json, read_json

RESULTS = "results.json"  # what a measurement comes to


def read_text_lines(file: epath.Path) -> Iterator[tuple[int, str]]:
    """Numbers and texts of a file's lines; empty ones are skipped. Raises UserError for what is no UTF-8 text."""
    try:
        lines = file.read_bytes().decode("utf-8-sig").split("\n")  # splitlines() also splits within JSON strings
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    yield from ((number, line) for number, line in enumerate(lines, start=1) if line.strip())


def read_jsonl(file: epath.Path) -> Iterator[tuple[int, Any]]:
    """Line numbers and values of a file of JSON lines. Raises UserError for what is none."""
    for number, line in read_text_lines(file):
        try:
            yield number, parse_json(line)
        except ValueError as error:
            raise UserError(f"{file}, line {number} is not JSON: {error}.") from None


def read_list(file: epath.Path) -> Any:
    """A JSON file's value, or, where it holds several lines of an object each, the list of these.

    Raises:
      UserError: it is neither.
    """
    value = _first_of_lines(file)
    return read_json(file) if value is None else [value for _, value in read_jsonl(file)]


def _first_of_lines(file):
    """The first of several lines, if it is an object of its own."""
    lines = list(itertools.islice(read_text_lines(file), 2)) if file.exists() else []
    if len(lines) < 2 or not lines[0][1].lstrip().startswith("{"):
        return None
    with contextlib.suppress(ValueError):
        return parse_json(lines[0][1])
    return None


def sha256(file: epath.Path) -> str:
    """Hash of a file's bytes, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def read_labels(file: epath.Path, under: str = "", **kinds: type | tuple[type, ...]) -> list[dict[str, Any]]:
    """The labels in a file: a list of objects, which may stand ``under`` a key, or a label a line.

    Args:
      file: the file.
      under: the key; none where the list is all there is.
      **kinds: keys that a label must have, and of which type.

    Raises:
      UserError: it is not so.
    """
    value = read_list(file)
    if under and not (isinstance(value, list) and value):
        value = value.get(under) if isinstance(value, dict) else None
    if not isinstance(value, list):
        where = f" under {under!r}" if under else ""
        raise UserError(f"{file} has no list of labels{where}; take the file that the benchmark's authors give.")
    for number, label in enumerate(value, start=1):
        if not isinstance(label, dict) or not all(isinstance(label.get(key), kind) for key, kind in kinds.items()):
            raise UserError(f"{file}, label {number}: a label needs {' and '.join(kinds)}.")
    return value


def index_by_id(labels: Sequence[dict[str, Any]], key: str, file: epath.Path) -> dict[str, dict[str, Any]]:
    """Labels, read from ``file``, by their ids as text. Raises UserError for two of one id that differ."""
    found = {}
    for label in labels:
        name = str(label[key])
        if found.setdefault(name, label) | {key: name} != label | {key: name}:
            raise UserError(f"{file} has two labels of {key} {name!r}, which differ; take the authors' own file.")
    return found


def match_labels(keys: Sequence[Hashable], labels: Mapping[Any, Any], file: epath.Path) -> list[Any]:
    """What ``labels``, read from ``file``, has under each question's key. Raises UserError where it lacks some."""
    missing = [key for key in keys if key not in labels]
    if missing:
        raise UserError(
            f"{file} lacks {len(missing):,} of the {len(keys):,} questions, such as {shorten(repr(missing[0]))}; "
            "it is of another split or version: replace it, or move it away."
        )
    return [labels[key] for key in keys]
