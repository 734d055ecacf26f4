"""Weights under our own parameter paths, read to start a run; and folders that appear whole.

A folder of weights holds safetensors (weights/locate.py says which files) whose tensors are named by parameter path
(``vision/blocks/mlp/up/kernel``). A run's workdir serves as well.
"""

import contextlib
import errno
import pathlib
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping

import jax
from etils import epath

from stf_jax.config import UserError
from stf_jax.runtime.files import fetched, in_bucket, upload
from stf_jax.runtime.parameters import SavedParams
from stf_jax.weights.tensors import open_tensors

MINIATURES = pathlib.Path(__file__).parent / "miniatures"
_EMBEDDED = {"miniatures": MINIATURES, "miniatures/siglip": MINIATURES / "siglip"}


def load_params(sources: str, layout: Mapping[str, jax.ShapeDtypeStruct], fresh: Iterable[str]) -> dict[str, jax.Array]:
    """Reads the parameters that a model wants, each straight onto its devices.

    Args:
      sources: folders of weights or workdirs of runs, separated by commas; ``miniatures`` names the embedded ones,
        ``miniatures/siglip`` those with the other tower. A later one wins over an earlier one.
      layout: every parameter of the model, with the sharding that it is to have.
      fresh: patterns of parameters that are not taken from the sources, whatever those hold.

    Returns:
      ``{path: array}`` in the types of the files; parameters that match ``fresh`` are left out.

    Raises:
      UserError: a source that cannot be read, or parameters that are missing, unknown or of another shape, all listed.
    """
    names = [part.strip() for part in sources.split(",") if part.strip()]
    opened = [_open(_EMBEDDED.get(name) or epath.Path(name)) for name in names]
    found = {path: (shape, read) for shapes, read in opened for path, shape in shapes.items()}
    fresh = [_compiled(pattern) for pattern in fresh]

    def taken(path):
        return not any(pattern.fullmatch(path) for pattern in fresh)

    if not names and any(taken(path) for path in layout):
        raise UserError(
            f"No weights to start from, and {next(filter(taken, layout))} must not start at random: provide "
            "--config.init_from=DIR, or see training work on embedded weights with --config=configs/demo.py."
        )
    wrong = [f"missing {path} {layout[path].shape}" for path in layout if path not in found and taken(path)]
    wrong += [f"unknown {path} {found[path][0]}" for path in found if path not in layout and taken(path)]
    wrong += [
        f"{path} is {found[path][0]} there and {layout[path].shape} here"
        for path in found
        if path in layout and found[path][0] != layout[path].shape and taken(path)
    ]
    if wrong:
        raise UserError(
            f"The weights in {sources!r} do not fit the model (init_missing may name what is to start afresh): "
            + f"{'; '.join(sorted(wrong))}."
        )
    loaded = {}
    for _, read in opened:  # each parameter once, from the last source that has it
        wanted = [path for path in layout if taken(path) and path in found and found[path][1] is read]
        loaded.update(read({path: layout[path].sharding for path in wanted}))
    return {path: loaded[path] for path in layout if path in loaded}


def _compiled(pattern):
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"init_missing has {pattern!r}, which is not a regular expression: {error}.") from None


@contextlib.contextmanager
def new_folder(to: epath.Path) -> Iterator[pathlib.Path]:
    """A local folder to fill, which becomes ``to`` when all is well, and is removed when it is not.

    Raises:
      UserError: ``to`` exists and is not an empty folder, or cannot be written; the disk is full.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"{to} exists and is not empty; choose another folder for --to.")
    if in_bucket(to):
        with tempfile.TemporaryDirectory() as local:
            yield pathlib.Path(local)
            upload(pathlib.Path(local), to)
        return
    to = pathlib.Path(to).absolute()
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        partial = to.with_name(f"{to.name}.{uuid.uuid4().hex[:8]}.partial")
        partial.mkdir()
    except OSError as error:
        raise UserError(f"{to} cannot be written: {error.strerror}.") from None
    try:
        yield partial
        if to.exists():
            to.rmdir()
        partial.rename(to)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if error.errno == errno.ENOSPC:
            raise UserError(f"The disk is full: {to} was not written, and nothing was left behind.") from None
        raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _open(folder):
    """Shapes by path, and a function that reads: places by path → arrays by path."""
    if SavedParams.at(folder):
        saved = SavedParams(folder)
        return {path: leaf.shape for path, leaf in saved.shapes.items()}, saved.restore
    local = fetched(folder)
    if not any(local.glob("*.safetensors")):
        raise UserError(f"init_from names {folder}, which holds neither *.safetensors nor a run's checkpoints.")
    tensors = open_tensors(local)

    def read(places):
        return {path: jax.device_put(tensors.read(path), sharding) for path, sharding in places.items()}

    return {path: tensors.shape(path) for path in tensors.names}, read
