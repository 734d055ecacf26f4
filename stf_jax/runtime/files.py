"""Files that appear whole, here or in a bucket (where an object is there whole or not at all)."""

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

_BUCKETS = {"gs": "gcsfs", "s3": "s3fs"}  # kinds of bucket, and the package that reads each
_URL = re.compile(r"([A-Za-z][\w+.-]+):/|(data):[^,]*[;,]")  # of one slash, too: pathlib writes two as one
_PATHS = ("init_from", "data.annotations", "data.images", "data.tokenizer", "eval.data", "model.vision", "model.llm")
_LISTS = ("init_from", "data.annotations", "data.images")  # of these, those that hold several, with commas between


def to_path(text: str | os.PathLike) -> epath.Path:
    """The path that a user gave, of a disk or a bucket. All paths come from here; no connection is opened.

    Raises:
      UserError: it is empty, a URL of another kind, of a bucket whose package is not installed, or no path that the
        system can look at (there may be nothing there, though).
    """
    text = os.fspath(text)
    shown = text if len(text) <= 200 else f"{text[:100]}…"
    if not text:
        raise UserError("The path is empty; give a file or folder (. is the current one).")
    if found := _URL.match(text):
        scheme, rest = found[1] or found[2], text[found.end() :].lstrip("/")
        if scheme == "file":
            raise UserError(f"{shown} is a URL; give the path itself, /{rest.removeprefix('localhost/')}.")
        if scheme not in _BUCKETS or not text.startswith(f"{scheme}://"):
            raise UserError(f"{shown} is a URL; paths are those of files and folders, or of buckets: gs://… and s3://…")
        if not rest:
            raise UserError(f"{shown} names no bucket; it should be {scheme}://BUCKET/FOLDER.")
        import fsspec  # takes half a second, and disks need none

        try:
            fsspec.get_filesystem_class(scheme)
        except ImportError:
            raise UserError(f"{shown} cannot be opened here; pip install {_BUCKETS[scheme]}") from None
        return epath.Path(text)
    path = os.path.expanduser(text)  # shells leave the ~ in --workdir=~/runs as it is
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass  # who needs it there says so
    except (OSError, ValueError) as error:  # no permission, a name that is too long, links in a circle; a null byte
        raise UserError(f"{shown!r} cannot be looked at: {getattr(error, 'strerror', None) or error}.") from None
    return epath.Path(path)


def check_paths(config: TrainConfig) -> None:
    """Raises UserError, which names the key, where a path of a config could be none, or has a comma in its name."""
    values = flatten(to_json(config))
    for key in _PATHS:
        parts = values[key].split(",") if key in _LISTS else [values[key]]
        try:
            for part in filter(None, map(str.strip, parts)):
                to_path(part)
        except UserError as error:
            raise UserError(f"Config key {key}: {error}") from None
        for begin, end in itertools.combinations(range(len(parts) + 1), 2):
            whole = ",".join(parts[begin:end]).strip()
            if end - begin > 1 and os.path.exists(whole):
                raise UserError(
                    f"Config key {key}: {whole} has a comma in its name, and commas separate paths there; rename it, "
                    "or give a link whose name has none."
                )


@contextlib.contextmanager
def new_text(path: epath.Path) -> Iterator[TextIO]:
    """A UTF-8 file to write, which has its name only after the ``with`` block; nothing remains of one that fails."""
    if in_bucket(path):
        with io.StringIO() as file:
            yield file
            path.write_text(file.getvalue())
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
    """Writes a value, indented, as a file that appears whole."""
    with new_text(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def parse_json(text: str | bytes) -> Any:
    """What JSON says. Raises ValueError where it is none, nests too deep to be read, or has half a surrogate pair."""
    try:
        value = json.loads(text)
        if (b"\\ud" if isinstance(text, bytes) else "\\ud") in text.lower():  # elsewhere, all is text already
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError:
        raise ValueError("it nests too deep") from None
    except UnicodeEncodeError:
        raise ValueError("it has half a surrogate pair, which is no text") from None


def read_json(path: epath.Path) -> Any:
    """A JSON file's value. Raises UserError for what is none."""
    try:
        return parse_json(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}.") from None


@contextlib.contextmanager
def writing(path: epath.Path) -> Iterator[None]:
    """What cannot be written there is told: raises UserError in place of OSError."""
    try:
        yield
    except OSError as error:
        place = error.filename2 or error.filename or path
        raise UserError(f"{place} cannot be written: {error.strerror or error}.") from None


def make_folder(path: epath.Path) -> None:
    """Makes a folder, and those above it, where they are not there. Raises UserError where it cannot."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The folder {path} cannot be made: {error.strerror or error}.") from None


def move_in(local: pathlib.Path, path: epath.Path) -> None:
    """Moves a local file to where it belongs, which may be another disk or a bucket; it appears whole."""
    partial = path if in_bucket(path) else _partial(path)
    _copy(local, partial)
    if partial != path:
        partial.replace(path)
    local.unlink()


class GrowingFile:
    """A text file that lines are added to, as it is read by others.

    A bucket's files cannot grow: there, all of it is written again, twice a minute at most, and when it is closed.
    """

    _EVERY = 30.0  # seconds

    def __init__(self, path: epath.Path, lines: Sequence[str]):
        """Begins with those lines, whatever the file held."""
        self._path, self._lines, self._written = path, list(lines), time.monotonic()
        self._write()
        self._file = None if in_bucket(path) else pathlib.Path(path).open("ab", buffering=0)  # noqa: SIM115
        self._rest = b""  # of lines that a full disk did not take

    def append(self, line: str, *, now: bool = False) -> None:
        """Adds a line; ``now`` writes it at once in a bucket, too.

        Raises:
          OSError: it cannot be written now; the next call, or ``close``, writes it as well.
        """
        if self._file is not None:
            self._rest += f"{line}\n".encode()
            self._write_rest()
            return
        self._lines.append(line)
        if now or time.monotonic() - self._written > self._EVERY:
            self._write()

    def close(self) -> None:
        """Nothing more comes. Raises OSError where lines remain that cannot be written."""
        if self._file is None:
            self._write()
            return
        with self._file:
            self._write_rest()

    def _write_rest(self):
        while self._rest:
            self._rest = self._rest[self._file.write(self._rest) :]

    def _write(self):
        with new_text(self._path) as file:
            file.write("".join(line + "\n" for line in self._lines))
        self._written = time.monotonic()


def _partial(path):
    return path.parent / f".{os.path.basename(path)}.partial"


def fetched(path: str | os.PathLike) -> pathlib.Path:
    """A file or folder as a local path: itself, or, of a bucket, a copy in the cache, brought up to date.

    Many libraries read local files alone. The cache is ``$XDG_CACHE_HOME/stf_jax``, or ``~/.cache/stf_jax``.
    """
    remote = to_path(path)
    if not in_bucket(remote):
        return pathlib.Path(remote)
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "stf_jax"
    local = cache / os.fspath(remote).replace("://", "/")
    there = {local / source.relative_to(remote) if source != remote else local: source for source in _files(remote)}
    for target, source in there.items():
        size, changed = source.stat().length, _changed(source)
        if not target.exists() or (target.stat().st_size, target.stat().st_mtime_ns) != (size, changed):
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.{os.getpid()}")  # hosts may share a cache
            _copy(source, partial)
            os.utime(partial, ns=(changed, changed))
            partial.replace(target)
    for old in [local, *local.rglob("[!.]*")]:  # not the others' partial files
        if old.is_file() and old not in there:
            old.unlink(missing_ok=True)
    return local


def upload(local: pathlib.Path, to: epath.Path) -> None:
    """Copies a local folder's files to a bucket."""
    for source in sorted(path for path in local.rglob("*") if path.is_file()):
        _copy(source, to / source.relative_to(local).as_posix())


def in_bucket(path: str | os.PathLike) -> bool:
    """Whether a path is a URI (``gs://``, ``s3://``)."""
    return os.fspath(path).startswith(tuple(f"{scheme}://" for scheme in _BUCKETS))


def _copy(source, target):
    with source.open("rb") as opened, target.open("wb") as file:
        shutil.copyfileobj(opened, file, 2**22)


def _changed(path):
    """When a file in a bucket was written last, in nanoseconds; etils does not say so of s3://."""
    import fsspec  # as in to_path

    bucket, name = fsspec.core.url_to_fs(os.fspath(path))
    return round(bucket.modified(name).timestamp() * 1e6) * 1000


def _files(path):
    if not path.is_dir():
        return [path] if path.exists() else []
    return [file for entry in path.iterdir() for file in _files(entry)]
