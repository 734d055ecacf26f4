"""Weights under our own parameter paths, read to start a run; and folders that appear whole.

A folder of weights holds safetensors (weights/locate.py says which files) whose tensors are named by parameter path
(``vision/blocks/mlp/up/kernel``). A run's workdir serves as well.
"""

import collections
import contextlib
import errno
import pathlib
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping

import jax
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from stf_jax.config import UserError
from stf_jax.models.positions import interpolated, same_kind
from stf_jax.runtime.files import fetched, in_bucket, to_path, upload
from stf_jax.runtime.parameters import SavedParams
from stf_jax.weights.tensors import open_tensors

MINIATURES = pathlib.Path(__file__).parent / "miniatures"
EMBEDDED = {
    "miniatures": MINIATURES,
    "miniatures/siglip": MINIATURES / "siglip",
    "miniatures/2": MINIATURES / "2",
}


def load_params(sources: str, layout: Mapping[str, jax.ShapeDtypeStruct], fresh: Iterable[str]) -> dict[str, jax.Array]:
    """Reads the parameters that a model wants, each straight onto its devices.

    Args:
      sources: folders of weights or workdirs of runs, separated by commas; names of :data:`EMBEDDED` stand for
        those. A later one wins over an earlier one.
      layout: every parameter of the model, with the sharding that it is to have.
      fresh: patterns of parameters that are not taken from the sources, whatever those hold.

    Position embeddings of a tower for another image size are interpolated (models/positions.py).

    Returns:
      ``{path: array}`` in the types of the files; parameters that match ``fresh`` are left out.

    Raises:
      UserError: a source that cannot be read, or parameters that are missing, unknown or of another shape, all listed.
    """
    names = [part.strip() for part in sources.split(",") if part.strip()]
    opened = [_open(EMBEDDED.get(name) or to_path(name)) for name in names]
    found = {path: (shape, read) for shapes, read in opened for path, shape in shapes.items()}
    fresh = [_compiled(pattern) for pattern in fresh]

    def taken(path):
        return not any(pattern.fullmatch(path) for pattern in fresh)

    if not names and any(taken(path) for path in layout):
        raise UserError(
            f"No weights to start from, and {next(filter(taken, layout))} must not start at random: provide "
            "--config.init_from=DIR, or see training work on embedded weights with --config=configs/demo.py."
        )
    wrong = collections.defaultdict(list)  # by part
    for path in filter(taken, layout.keys() | found.keys()):
        part = path.split("/")[0]
        if path not in found:
            wrong[part].append(f"missing {path} {layout[path].shape}")
        elif path not in layout:
            wrong[part].append(f"unknown {path} {found[path][0]}")
        elif found[path][0] != layout[path].shape and not _resizable(path, found[path][0], layout[path].shape):
            wrong[part].append(f"{path} is {found[path][0]} there and {layout[path].shape} here")
    if wrong:
        raise UserError(
            f"The weights in {sources!r} do not fit the model: {_advice(names, opened, layout, wrong)} "
            + f"{'; '.join(sorted(line for lines in wrong.values() for line in lines))}."
        )
    loaded = {}
    for _, read in opened:  # each parameter once, from the last source that has it
        wanted = [path for path in layout if taken(path) and path in found and found[path][1] is read]
        fitting = [path for path in wanted if found[path][0] == layout[path].shape]
        loaded.update(read({path: layout[path].sharding for path in fitting}))
        loaded.update({path: _resized(read, path, layout[path]) for path in wanted if path not in fitting})
    return {path: loaded[path] for path in layout if path in loaded}


def _resizable(path, there, here):
    """Whether a parameter is a tower's position embeddings, of square grids of two sizes."""
    return path == "vision/position_embed" and there[1:] == here[1:] and same_kind(there[0], here[0])


def _resized(read, path, leaf):
    everywhere = jax.sharding.NamedSharding(leaf.sharding.mesh, jax.sharding.PartitionSpec())
    table = interpolated(np.asarray(read({path: everywhere})[path]), leaf.shape[0])
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: table[index])


def _advice(names, opened, layout, wrong):
    """What to do about each part (``vision``, ``fusion``, ``llm``) of which something is wrong."""
    clauses = []
    for part in sorted(wrong):
        holds = [name for name, (shapes, _) in zip(names, opened, strict=True) if _has(shapes, part)]
        if not holds:
            clauses.append(
                f"they have no {part} (add a folder that has one to init_from, or name {part}/.* in init_missing)"
            )
        elif part == "fusion":
            clauses.append(f"model.fusion differs from the one that {holds[-1]} was trained with (set it to that)")
        elif _has(layout, part):
            clauses.append(f"model.{part} is another (set model.{part}={holds[-1]}, or leave it out)")
        else:
            clauses.append(f"{part} is not a part of a model (vision, fusion, llm)")
    return f"{', and '.join(clauses)}:"


def _has(paths, part):
    return any(path.startswith(f"{part}/") for path in paths)


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
        return {path: _put(tensors, path, sharding) for path, sharding in places.items()}

    return {path: tensors.shape(path) for path in tensors.names}, read


def _put(tensors, path, sharding):
    """A tensor on its devices, of which this host reads what its own devices hold, and sends nothing to another's."""
    tensors.check_type(path)
    file, parts = tensors.file(path), {}
    try:
        with safe_open(file, framework="numpy") as opened:
            view = opened.get_slice(path)

            def part(index):
                key = tuple((axis.start, axis.stop) for axis in index)
                if key not in parts:  # several devices may hold the same
                    parts[key] = view[index] if index else opened.get_tensor(path)
                return parts[key]

            return jax.make_array_from_callback(tensors.shape(path), sharding, part)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: tensor {path} cannot be read: {error}.") from None
