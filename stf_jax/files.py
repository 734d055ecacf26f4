"""Reads and writes files on disks and in buckets. A file appears only once it is complete."""

import contextlib
import io
import itertools
import json
import os
import pathlib
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from etils import epath

from stf_jax.config import TrainConfig, UserError, flatten, to_json

_BUCKETS = {"gs": "gcsfs", "s3": "s3fs"}  # URL schemes, and the package that reads each
_URL = re.compile(r"([A-Za-z][\w+.-]+):/|(data):[^,]*[;,]")  # one slash is enough: pathlib merges two into one
_PATH_KEYS = (
    "init_from",
    "data.annotations",
    "data.images",
    "data.tokenizer",
    "eval.data",
    "model.vision",
    "model.llm",
)
_LIST_KEYS = ("init_from", "data.annotations", "data.images")  # those whose value is a comma-separated list


def to_path(text: str | os.PathLike[str]) -> epath.Path:
    """Checks a path that a user gave, on a disk or in a bucket. It need not exist. Opens no connection.

    Raises:
      UserError: the path is empty, a URL of an unsupported scheme, in a bucket whose package is not installed, or one
        that the system cannot access.
    """
    text = os.fspath(text)
    short = text if len(text) <= 200 else f"{text[:100]}…"
    if not text:
        raise UserError("The path is empty; give a file or folder (. is the current one).")
    if found := _URL.match(text):
        scheme, rest = found[1] or found[2], text[found.end() :].lstrip("/")
        if scheme == "file":
            raise UserError(f"{short} is a URL; give the path itself, /{rest.removeprefix('localhost/')}.")
        if scheme not in _BUCKETS or not text.startswith(f"{scheme}://"):
            raise UserError(f"{short} is a URL; give a local path, or one in a bucket: gs://… or s3://…")
        if not rest:
            raise UserError(f"{short} names no bucket; it should be {scheme}://BUCKET/FOLDER.")
        import fsspec  # takes half a second, and local paths do not need it

        try:
            fsspec.get_filesystem_class(scheme)
        except ImportError:
            raise UserError(f"{short} needs a package that is not installed: pip install {_BUCKETS[scheme]}") from None
        return epath.Path(text)
    path = os.path.expanduser(text)  # shells do not expand the ~ in --workdir=~/runs
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass  # callers that need it to exist check that
    except (OSError, ValueError) as error:  # no permission, a name that is too long, a loop of links; a null byte
        raise UserError(f"{short!r} cannot be accessed: {getattr(error, 'strerror', None) or error}.") from None
    return epath.Path(path)


def check_paths(config: TrainConfig) -> None:
    """Checks all paths of a config. Raises UserError, which names the key, if one is invalid or contains a comma."""
    values = flatten(to_json(config))
    for key in _PATH_KEYS:
        parts = values[key].split(",") if key in _LIST_KEYS else [values[key]]
        try:
            for part in filter(None, map(str.strip, parts)):
                to_path(part)
        except UserError as error:
            raise UserError(f"Config key {key}: {error}") from None
        for begin, end in itertools.combinations(range(len(parts) + 1), 2):
            joined = ",".join(parts[begin:end]).strip()
            if end - begin > 1 and os.path.exists(joined):
                raise UserError(
                    f"Config key {key}: {joined} has a comma in its name, but commas separate paths there; rename it, "
                    "or give a symbolic link without a comma."
                )


@contextlib.contextmanager
def open_atomic(path: epath.Path) -> Iterator[TextIO]:
    """Opens a UTF-8 file for writing; it appears when the ``with`` block ends, and not at all if the block raises."""
    if in_bucket(path):
        with io.StringIO() as buffer:
            yield buffer
            path.write_text(buffer.getvalue())
        return
    partial = _partial(path)
    try:
        with pathlib.Path(partial).open("w", encoding="utf-8") as file:
            yield file
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: epath.Path, value: Any) -> None:
    """Writes a value as indented JSON, atomically."""
    with open_atomic(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def parse_json(text: str | bytes) -> Any:
    """Parses JSON. Raises ValueError if it is invalid, nested too deeply, or contains an unpaired surrogate."""
    try:
        value = json.loads(text)
        # Only such escapes give surrogates.
        if b"\\ud" in text.lower() if isinstance(text, bytes) else "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("it contains an unpaired surrogate, which is not valid text") from None


def read_json(path: epath.Path) -> Any:
    """Reads a JSON file. Raises UserError if it cannot be read or is not JSON."""
    try:
        return parse_json(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}.") from None


@contextlib.contextmanager
def as_user_error(path: epath.Path) -> Iterator[None]:
    """Turns an OSError from writing ``path`` into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        name = error.filename2 or error.filename or path
        raise UserError(f"{name} cannot be written: {error.strerror or error}.") from None


def make_folder(path: epath.Path) -> None:
    """Creates a folder and its parents if they do not exist. Raises UserError if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The folder {path} cannot be created: {error.strerror or error}.") from None


def move_file(local: pathlib.Path, path: epath.Path) -> None:
    """Moves a local file, possibly to another disk or a bucket; it appears there only when complete."""
    partial = path if in_bucket(path) else _partial(path)
    _copy(local, partial)
    if partial != path:
        partial.replace(path)
    local.unlink()


class AppendOnlyFile:
    """A text file to which lines are appended while others read it.

    Objects in a bucket cannot be appended to: there the complete file is rewritten, every 30 seconds at most and when
    it is closed.
    """

    _REWRITE_SECONDS = 30.0

    def __init__(self, path: epath.Path, lines: Sequence[str]) -> None:
        """Replaces the file with these lines."""
        self._path, self._lines, self._last_rewrite = path, list(lines), time.monotonic()
        self._rewrite()
        self._file = None if in_bucket(path) else pathlib.Path(path).open("ab", buffering=0)  # noqa: SIM115
        self._unwritten = b""  # what a full disk has not accepted yet

    def append(self, line: str, *, now: bool = False) -> None:
        """Appends a line; with ``now`` it is written at once even in a bucket.

        Raises:
          OSError: the line cannot be written now; the next call, or ``close``, tries again.
        """
        if self._file is not None:
            self._unwritten += f"{line}\n".encode()
            self._flush(self._file)
            return
        self._lines.append(line)
        if now or time.monotonic() - self._last_rewrite > self._REWRITE_SECONDS:
            self._rewrite()

    def close(self) -> None:
        """Writes what is pending and closes the file. Raises OSError if that fails."""
        if self._file is None:
            self._rewrite()
            return
        with self._file:
            self._flush(self._file)

    def _flush(self, file: io.FileIO) -> None:
        while self._unwritten:
            self._unwritten = self._unwritten[file.write(self._unwritten) :]

    def _rewrite(self) -> None:
        with open_atomic(self._path) as file:
            file.write("".join(line + "\n" for line in self._lines))
        self._last_rewrite = time.monotonic()


def _partial(path: epath.Path) -> epath.Path:
    return path.parent / f".{os.path.basename(path)}.partial"


def cache_folder() -> pathlib.Path:
    """Returns the folder of files that can be made again: ``$XDG_CACHE_HOME/stf_jax``, or ``~/.cache/stf_jax``."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "stf_jax"


def local_copy(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns a local path for a file or folder: the path itself, or an up-to-date cached copy from a bucket.

    For libraries that read only local files. The copy is in :func:`cache_folder`.
    """
    remote = to_path(path)
    if not in_bucket(remote):
        return pathlib.Path(remote)
    local = cache_folder() / os.fspath(remote).replace("://", "/")
    sources = {local / source.relative_to(remote) if source != remote else local: source for source in _files(remote)}
    for target, source in sources.items():
        size, modified = get_version(source)
        if not target.exists() or (target.stat().st_size, target.stat().st_mtime_ns) != (size, modified):
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.{os.getpid()}")  # hosts may share a cache
            _copy(source, partial)
            os.utime(partial, ns=(modified, modified))
            partial.replace(target)
    for old in [local, *local.rglob("[!.]*")]:  # leaves the partial files of other processes
        if old.is_file() and old not in sources:
            old.unlink(missing_ok=True)
    return local


def upload(local: pathlib.Path, to: epath.Path) -> None:
    """Copies the files of a local folder to a bucket."""
    for source in sorted(path for path in local.rglob("*") if path.is_file()):
        _copy(source, to / source.relative_to(local).as_posix())


def in_bucket(path: str | os.PathLike[str]) -> bool:
    """Whether a path is in a bucket (``gs://``, ``s3://``)."""
    return os.fspath(path).startswith(tuple(f"{scheme}://" for scheme in _BUCKETS))


def _copy(source: epath.Path | pathlib.Path, target: epath.Path | pathlib.Path) -> None:
    with source.open("rb") as opened, target.open("wb") as file:
        shutil.copyfileobj(opened, file, 2**22)


def get_version(path: epath.Path) -> tuple[int, int]:
    """Returns the size of a file in bytes, and when it was last modified, in nanoseconds."""
    if in_bucket(path):
        return path.stat().length, _modified_ns(path)
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def _modified_ns(path: epath.Path) -> int:
    """When a file in a bucket was last modified, in nanoseconds; etils does not report it for s3://."""
    import fsspec  # slow, as in to_path

    bucket, name = fsspec.core.url_to_fs(os.fspath(path))
    return round(bucket.modified(name).timestamp() * 1e6) * 1000


def _files(path: epath.Path) -> list[epath.Path]:
    if not path.is_dir():
        return [path] if path.exists() else []
    return [file for entry in path.iterdir() for file in _files(entry)]
