"""Reading and checking files of questions and labels, and matching labels with questions."""

import contextlib
import hashlib
import itertools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from etils import epath

from stf_jax.config import UserError, shorten
from stf_jax.files import parse_json, read_json

RESULTS = "results.json"  # the metrics and protocol of an evaluation
ANSWERS = "answers.jsonl"  # its answers
COST_FILE = "cost.json"  # what the method costs; ablate writes it
_Label = TypeVar("_Label")


def read_text_lines(file: epath.Path) -> Iterator[tuple[int, str]]:
    """Yields the number and text of each nonempty line. Raises UserError if the file is not UTF-8 text."""
    try:
        lines = file.read_bytes().decode("utf-8-sig").split("\n")  # splitlines() also splits within JSON strings
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    yield from ((number, line) for number, line in enumerate(lines, start=1) if line.strip())


def read_jsonl(file: epath.Path) -> Iterator[tuple[int, Any]]:
    """Yields the line number and value of each line of JSON. Raises UserError for a line that is not JSON."""
    for number, line in read_text_lines(file):
        try:
            yield number, parse_json(line)
        except ValueError as error:
            raise UserError(f"{file}, line {number} is not JSON: {error}.") from None


def read_list(file: epath.Path) -> Any:
    """Reads a JSON file's value, or the list of objects if the file has one object per line.

    Raises:
      UserError: the file is neither.
    """
    value = _read_first_object(file)
    return read_json(file) if value is None else [value for _, value in read_jsonl(file)]


def _read_first_object(file: epath.Path) -> dict[str, Any] | None:
    """Returns the first line's object if the file has several lines and the first is a complete object."""
    lines = list(itertools.islice(read_text_lines(file), 2)) if file.exists() else []
    if len(lines) < 2 or not lines[0][1].lstrip().startswith("{"):
        return None
    with contextlib.suppress(ValueError):
        return parse_json(lines[0][1])
    return None


def sha256(file: epath.Path) -> str:
    """Computes the hash of a file's bytes, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def read_labels(file: epath.Path, under: str = "", **kinds: type | tuple[type, ...]) -> list[dict[str, Any]]:
    """Reads labels: a JSON list of objects, possibly under a key, or one object per line.

    Args:
      file: the file.
      under: the key of the list; empty if the file is the list itself.
      **kinds: the keys that each label must have, and their types.

    Raises:
      UserError: the file has another form.
    """
    value = read_list(file)
    if under and not (isinstance(value, list) and value):
        value = value.get(under) if isinstance(value, dict) else None
    if not isinstance(value, list):
        where = f" under {under!r}" if under else ""
        raise UserError(f"{file} has no list of labels{where}; use the file that the benchmark's authors publish.")
    for number, label in enumerate(value, start=1):
        if not isinstance(label, dict) or not all(isinstance(label.get(key), kind) for key, kind in kinds.items()):
            raise UserError(f"{file}, label {number}: a label needs {' and '.join(kinds)}.")
    return value


def index_by_id(labels: Sequence[dict[str, Any]], key: str, file: epath.Path) -> dict[str, dict[str, Any]]:
    """Maps ids, as text, to the labels read from ``file``. Raises UserError for two different labels with one id."""
    by_id: dict[str, dict[str, Any]] = {}
    for label in labels:
        label_id = str(label[key])
        if by_id.setdefault(label_id, label) | {key: label_id} != label | {key: label_id}:
            raise UserError(f"{file} has two different labels for {key} {label_id!r}; use the authors' own file.")
    return by_id


def match_labels(keys: Sequence[Hashable], labels: Mapping[Any, _Label], file: epath.Path) -> list[_Label]:
    """Returns the label, read from ``file``, of each question's key. Raises UserError if any is missing."""
    missing = [key for key in keys if key not in labels]
    if missing:
        raise UserError(
            f"{file} lacks {len(missing):,} of the {len(keys):,} questions, such as {shorten(repr(missing[0]))}: it "
            "belongs to another split or version. Replace it or move it away."
        )
    return [labels[key] for key in keys]
