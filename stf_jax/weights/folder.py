"""Loads weights under our own parameter paths to start a run; and writes folders that appear only when complete.

A folder of weights holds safetensors (weights/locate.py chooses the files) whose tensors are named by parameter path
(``vision/blocks/mlp/up/kernel``). A run's workdir can be loaded too.
"""

import collections
import contextlib
import errno
import pathlib
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from stf_jax.checkpointing.adapted import open_params
from stf_jax.checkpointing.items import to_absolute
from stf_jax.checkpointing.params import SavedParams
from stf_jax.checkpointing.renames import current_paths, path_matches
from stf_jax.config import UserError, from_json
from stf_jax.files import in_bucket, local_copy, read_json, to_path, upload
from stf_jax.models.positions import interpolate_positions, same_grid_kind
from stf_jax.weights.tensors import TensorFile, open_tensors

MINIATURES = pathlib.Path(__file__).parent / "miniatures"
EMBEDDED = {
    "miniatures": MINIATURES,
    "miniatures/siglip": MINIATURES / "siglip",
    "miniatures/2": MINIATURES / "2",
}

_Shapes = Mapping[str, tuple[int, ...]]  # by path
# Reads arrays one by one with their paths, given shardings by path.
_Read = Callable[[Mapping[str, jax.sharding.Sharding]], Iterator[tuple[str, jax.Array]]]


def load_params(
    sources: str,
    layout: Mapping[str, jax.ShapeDtypeStruct],
    fresh: Iterable[str],
    convert: Callable[[str, jax.Array], dict[str, jax.Array]] = lambda path, value: {path: value},
) -> dict[str, jax.Array]:
    """Loads the parameters of a model, each directly onto its devices.

    Args:
      sources: folders of weights, workdirs of runs, or names in :data:`EMBEDDED`, separated by commas. Later ones win.
      layout: every parameter of the model, with its target sharding.
      fresh: patterns of parameters that are not loaded from the sources.
      convert: returns what to keep of a parameter, by path; called as soon as it is read.

    Position embeddings of a tower for another image size are interpolated (models/positions.py).

    Returns:
      ``{path: array}`` in the dtypes of the files, without the parameters that match ``fresh``, converted.

    Raises:
      UserError: a source cannot be read, or parameters are missing, unknown or of another shape (all are listed).
    """
    names = [part.strip() for part in sources.split(",") if part.strip()]
    opened = [_open(EMBEDDED.get(name) or to_path(name)) for name in names]
    found = {path: (shape, read) for shapes, read in opened for path, shape in shapes.items()}
    compiled = [_compile(pattern) for pattern in fresh]

    def is_loaded(path: str) -> bool:
        return not any(path_matches(pattern, path) for pattern in compiled)

    if not names and any(is_loaded(path) for path in layout):
        raise UserError(
            f"There are no weights to start from, and {next(filter(is_loaded, layout))} must not start at random: set "
            "--config.init_from=DIR, or try training on embedded weights with --config=configs/demo.py."
        )
    problems: dict[str, list[str]] = collections.defaultdict(list)  # by part
    for path in filter(is_loaded, layout.keys() | found.keys()):
        part = path.split("/")[0]
        if path not in found:
            problems[part].append(f"missing {path} {layout[path].shape}")
        elif path not in layout:
            problems[part].append(f"unknown {path} {found[path][0]}")
        elif found[path][0] != layout[path].shape and not _is_resizable(path, found[path][0], layout[path].shape):
            problems[part].append(f"{path} is {found[path][0]} there and {layout[path].shape} here")
    if problems:
        raise UserError(
            f"The weights in {sources!r} do not fit the model: {_suggest_fixes(names, opened, layout, problems)} "
            + f"{'; '.join(sorted(line for lines in problems.values() for line in lines))}."
        )
    loaded: dict[str, dict[str, jax.Array]] = {}
    for _, read in opened:  # each parameter once, from the last source that has it
        wanted = [path for path in layout if is_loaded(path) and path in found and found[path][1] is read]
        same_shape = [path for path in wanted if found[path][0] == layout[path].shape]
        for path, value in read({path: layout[path].sharding for path in same_shape}):
            loaded[path] = convert(path, value)
            del value  # before the next is read
        loaded |= {path: {path: _resize(read, path, layout[path])} for path in wanted if path not in same_shape}
    return {name: value for path in layout if path in loaded for name, value in loaded[path].items()}


def find_origin(sources: str, fresh: Iterable[str], part: str) -> str:
    """The folder that a part of a model comes from, if it starts from ``sources`` and freezes that part.

    A run that froze the part leads to what it started from. So parts of one origin are the same.

    Args:
      sources, fresh: as for :func:`load_params`.
      part: ``vision``, ``fusion`` or ``llm``.

    Returns:
      The absolute path; empty if no folder has the part, or it is not loaded.
    """
    compiled = [_compile(pattern) for pattern in fresh]
    for name in reversed([name.strip() for name in sources.split(",") if name.strip()]):
        folder = epath.Path(EMBEDDED.get(name) or to_path(name))
        try:
            paths = [path for path in _open(folder)[0] if path.startswith(f"{part}/")]
        except UserError:
            return ""
        if any(path_matches(pattern, path) for pattern in compiled for path in paths):
            return ""
        if paths:
            return _origin_of_run(folder, part) or str(to_absolute(folder))
    return ""


def _origin_of_run(folder: epath.Path, part: str) -> str:
    """The origin of a part that a run froze; empty if it trained or quantized it, or is not a run."""
    if not SavedParams.exists_in(folder):
        return ""
    saved = SavedParams(folder)
    leaves = {path: leaf for path, leaf in saved.shapes.items() if path.startswith(f"{part}/")}  # adapters too
    if any(path not in saved.frozen or leaf.dtype == np.int8 for path, leaf in leaves.items()):
        return ""
    config = from_json(read_json(folder / "config.json"))
    return find_origin(config.init_from, config.init_missing, part)


def _is_resizable(path: str, saved: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a parameter is a tower's position embeddings and both shapes are of square grids."""
    return path == "vision/position_embed" and saved[1:] == wanted[1:] and same_grid_kind(saved[0], wanted[0])


def _resize(read: _Read, path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    replicated = jax.sharding.NamedSharding(leaf.sharding.mesh, jax.sharding.PartitionSpec())
    table = interpolate_positions(np.asarray(dict(read({path: replicated}))[path]), leaf.shape[0])
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: table[index])


def _suggest_fixes(
    names: Sequence[str],
    opened: Sequence[tuple[_Shapes, _Read]],
    layout: Iterable[str],
    problems: Iterable[str],
) -> str:
    """Returns how to fix each part (``vision``, ``fusion``, ``llm``) that does not fit."""
    clauses = []
    for part in sorted(problems):
        having = [name for name, (shapes, _) in zip(names, opened, strict=True) if _has_part(shapes, part)]
        if not having:
            clauses.append(
                f"they have no {part} (add a folder that has one to init_from, or name {part}/.* in init_missing)"
            )
        elif part == "fusion":
            clauses.append(f"model.fusion differs from the one that {having[-1]} was trained with (set it to that)")
        elif _has_part(layout, part):
            clauses.append(f"model.{part} is a different model (set model.{part}={having[-1]}, or leave it out)")
        else:
            clauses.append(f"{part} is not a part of a model (vision, fusion, llm)")
    return f"{', and '.join(clauses)}:"


def _has_part(paths: Iterable[str], part: str) -> bool:
    return any(path.startswith(f"{part}/") for path in paths)


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"init_missing has {pattern!r}, which is not a regular expression: {error}.") from None


@contextlib.contextmanager
def new_folder(to: epath.Path) -> Iterator[pathlib.Path]:
    """Yields a local folder to fill. It becomes ``to`` on success and is removed on failure.

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
            raise UserError(f"The disk is full: {to} was not written, and no partial files remain.") from None
        raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _open(folder: epath.Path) -> tuple[_Shapes, _Read]:
    """Returns shapes by path, and a function that reads arrays by path, given shardings by path."""
    if SavedParams.exists_in(folder):
        saved = open_params(folder)
        return {path: leaf.shape for path, leaf in saved.shapes.items()}, saved.restore
    local = local_copy(folder)
    if not any(local.glob("*.safetensors")):
        raise UserError(f"init_from names {folder}, which holds neither *.safetensors nor the checkpoints of a run.")
    tensors = open_tensors(local)
    names = current_paths(tensors.names)

    def read(shardings: Mapping[str, jax.sharding.Sharding]) -> Iterator[tuple[str, jax.Array]]:
        for path, sharding in shardings.items():
            yield path, _load_tensor(tensors, names[path], sharding)

    return {path: tensors.shape(name) for path, name in names.items()}, read


def _load_tensor(tensors: TensorFile, path: str, sharding: jax.sharding.Sharding) -> jax.Array:
    """Loads a tensor onto its devices. Each host reads the slices of its devices; nothing is sent between hosts."""
    tensors.check_type(path)
    file = tensors.file(path)
    slices: dict[tuple[tuple[int | None, int | None], ...], np.ndarray] = {}
    try:
        with safe_open(file, framework="numpy") as opened:
            view = opened.get_slice(path)

            def read_slice(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None  # JAX's annotation allows None
                key = tuple((axis.start, axis.stop) for axis in index)
                if key not in slices:  # several devices may hold the same slice
                    slices[key] = view[index] if index else opened.get_tensor(path)
                return slices[key]

            return jax.make_array_from_callback(tensors.shape(path), sharding, read_slice)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: tensor {path} cannot be read: {error}.") from None
