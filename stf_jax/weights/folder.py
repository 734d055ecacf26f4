"""Loads weights under our own parameter paths to start a run; and writes folders that appear only when complete.

A folder of weights holds safetensors (weights/locate.py chooses the files) whose tensors are named by parameter path
(``vision/blocks/mlp/up/kernel``). A run's workdir can be loaded too.
"""

import collections
import contextlib
import dataclasses
import errno
import os
import pathlib
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from stf_jax.checkpointing.adapted import MergedParams, merge_saved
from stf_jax.checkpointing.base import BASE, BasedParams
from stf_jax.checkpointing.items import to_absolute
from stf_jax.checkpointing.params import ParamSource, SavedParams
from stf_jax.checkpointing.renames import current_paths, path_matches
from stf_jax.config import UserError, from_json
from stf_jax.files import in_bucket, local_copy, read_json, to_path, upload
from stf_jax.models.positions import interpolate_positions, same_grid_kind
from stf_jax.models.quantized import find_quantization
from stf_jax.weights.tensors import TensorFile, open_tensors

MINIATURES = pathlib.Path(__file__).parent / "miniatures"
EMBEDDED = {
    "miniatures": MINIATURES,
    "miniatures/siglip": MINIATURES / "siglip",
    "miniatures/2": MINIATURES / "2",
}


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
    found = _Sources(_split(sources))
    shapes = {path: tuple(leaf.shape) for path, leaf in found.shapes.items()}
    compiled = [_compile(pattern) for pattern in fresh]

    def is_loaded(path: str) -> bool:
        return not any(path_matches(pattern, path) for pattern in compiled)

    if not found.folders and any(is_loaded(path) for path in layout):
        raise UserError(
            f"There are no weights to start from, and {next(filter(is_loaded, layout))} must not start at random: set "
            "--config.init_from=DIR, or try training on embedded weights with --config=configs/demo.py."
        )
    problems: dict[str, list[str]] = collections.defaultdict(list)  # by part
    for path in filter(is_loaded, layout.keys() | shapes.keys()):
        part = path.split("/")[0]
        if path not in shapes:
            problems[part].append(f"missing {path} {layout[path].shape}")
        elif path not in layout:
            problems[part].append(f"unknown {path} {shapes[path]}")
        elif shapes[path] != layout[path].shape and not _is_resizable(path, shapes[path], layout[path].shape):
            problems[part].append(f"{path} is {shapes[path]} there and {layout[path].shape} here")
    if problems:
        raise UserError(
            f"The weights in {sources!r} do not fit the model: {_suggest_fixes(found, layout, problems)} "
            + f"{'; '.join(sorted(line for lines in problems.values() for line in lines))}."
        )
    loaded: dict[str, dict[str, jax.Array]] = {}
    wanted = [path for path in layout if is_loaded(path)]
    same_shape = [path for path in wanted if shapes[path] == layout[path].shape]
    for path, value in found.restore({path: layout[path].sharding for path in same_shape}):
        loaded[path] = convert(path, value)
        del value  # before the next is read
    loaded |= {path: {path: _resize(found, path, layout[path])} for path in wanted if path not in same_shape}
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
    for name in reversed(_split(sources)):
        folder = epath.Path(EMBEDDED.get(name) or to_path(name))
        try:
            paths = [path for path in _open(folder).shapes if path.startswith(f"{part}/")]
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
    shapes, frozen = {**saved.shapes, **saved.base.shapes}, saved.frozen | saved.base.shapes.keys()
    leaves = {path: leaf for path, leaf in shapes.items() if path.startswith(f"{part}/")}  # adapters too
    if any(path not in frozen or find_quantization(leaf.dtype) for path, leaf in leaves.items()):
        return ""
    config = from_json(read_json(folder / "config.json"))
    return find_origin(config.init_from, config.init_missing, part)


def find_unchanged(sources: str, layout: Mapping[str, jax.ShapeDtypeStruct], fresh: Iterable[str]) -> set[str]:
    """The parameters that :func:`load_params` reads as they are, without initializing or interpolating them."""
    found, compiled = _Sources(_split(sources)).shapes, [_compile(pattern) for pattern in fresh]
    same = {path for path, leaf in layout.items() if path in found and tuple(found[path].shape) == leaf.shape}
    return {path for path in same if not any(path_matches(pattern, path) for pattern in compiled)}


def absolute_sources(sources: str) -> tuple[str, ...]:
    """The folders and names of a config's ``init_from``, with absolute paths."""
    return tuple(name if name in EMBEDDED else os.fspath(to_absolute(to_path(name))) for name in _split(sources))


def _split(sources: str) -> list[str]:
    return [part.strip() for part in sources.split(",") if part.strip()]


def _is_resizable(path: str, saved: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a parameter is a tower's position embeddings and both shapes are of square grids."""
    return path == "vision/position_embed" and saved[1:] == wanted[1:] and same_grid_kind(saved[0], wanted[0])


def _resize(source: ParamSource, path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    table = interpolate_positions(source.read(path), leaf.shape[0])
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: table[index])


def _suggest_fixes(sources: "_Sources", layout: Collection[str], problems: Mapping[str, Sequence[str]]) -> str:
    """Returns how to fix each part (``vision``, ``fusion``, ``llm``) that does not fit."""
    clauses = []
    for part in sorted(problems):
        having = [name for name, source in sources.folders if _has_part(source.shapes, part)]
        if not having:
            clauses.append(
                f"they have no {part} (add a folder that has one to init_from, or name {part}/.* in init_missing)"
            )
        elif all("fusion/newline" in problem for problem in problems[part]):
            if "fusion/newline" in layout:
                clauses.append(f"{having[-1]} was trained without tiles (name fusion/newline in init_missing)")
            else:
                clauses.append(f"{having[-1]} was trained with tiles (set data.aspect=tiles)")
        elif part == "fusion":
            clauses.append(f"model.fusion differs from the one that {having[-1]} was trained with (set it to that)")
        elif part == "chooser":
            clauses.append(f"{having[-1]} has a chooser (set model.chooser=True, or name chooser/.* in init_missing)")
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
    if to.is_symlink() or os.path.ismount(to):
        raise UserError(
            f"{to} is a link or a mount point, so it cannot be replaced; choose a new folder in it for --to."
        )
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


def open_params(folder: epath.Path) -> SavedParams | BasedParams | MergedParams:
    """Opens a run, with the weights that it started from if it did not save them, or an imported folder.

    Its parameters are those of a plain model.

    Raises:
      UserError: as SavedParams; the weights that the run started from are gone, or others now; the run's config does
        not name its adapters.
    """
    saved = SavedParams(folder)
    if not saved.base.shapes:
        return merge_saved(folder, saved)
    names = tuple(_find_source(name, folder) for name in saved.base.init_from)
    base = dataclasses.replace(saved.base, init_from=names)
    try:
        if os.fspath(to_absolute(folder)) in names:
            raise UserError(f"{folder / BASE} names the run itself.")
        source = _Sources(names)
    except UserError as error:
        raise base.missing(folder, error) from None
    return merge_saved(folder, BasedParams(folder, saved, base, source))


def _find_source(name: str, workdir: epath.Path) -> str:
    """A folder that a run started from, or, if that is gone, the one of its name beside the run, which was moved."""
    beside = to_absolute(workdir).parent / os.path.basename(name)
    return name if name in EMBEDDED or to_path(name).exists() or not beside.exists() else os.fspath(beside)


class _Sources:
    """The parameters of several folders, of which later ones win.

    Attributes:
      folders: each with its name.
      shapes: what has the shape of each parameter, by path.
    """

    def __init__(self, names: Iterable[str]) -> None:
        """Opens them. Raises UserError if one cannot be read."""
        self.folders = [(name, _open(EMBEDDED.get(name) or to_path(name))) for name in names]
        self._source_of = {path: source for _, source in self.folders for path in source.shapes}
        self.shapes = {path: source.shapes[path] for path, source in self._source_of.items()}

    def read(self, path: str) -> np.ndarray:
        """Reads one parameter into host memory. Raises UserError if that fails."""
        return self._source_of[path].read(path)

    def restore(self, shardings: Mapping[str, jax.sharding.Sharding]) -> Iterator[tuple[str, jax.Array]]:
        """Yields paths and parameters with these shardings, in their order. Raises UserError if that fails."""
        readers = [
            (source, source.restore({path: x for path, x in shardings.items() if self._source_of[path] is source}))
            for _, source in self.folders
        ]
        for path in shardings:
            yield next(next(reader for source, reader in readers if source is self._source_of[path]))


class _TensorParams:
    """The parameters of a folder with safetensors under their paths."""

    def __init__(self, tensors: TensorFile) -> None:
        self._tensors, self._names = tensors, current_paths(tensors.names)
        self.shapes = {path: tensors.entries[name] for path, name in self._names.items()}

    def read(self, path: str) -> np.ndarray:
        return self._tensors.read(self._names[path])

    def restore(self, shardings: Mapping[str, jax.sharding.Sharding]) -> Iterator[tuple[str, jax.Array]]:
        for path, sharding in shardings.items():
            yield path, _load_tensor(self._tensors, self._names[path], sharding)


def _open(folder: epath.Path) -> ParamSource:
    if SavedParams.exists_in(folder):
        return open_params(folder)
    local = local_copy(folder)
    if not any(local.glob("*.safetensors")):
        raise UserError(f"init_from names {folder}, which holds neither *.safetensors nor the checkpoints of a run.")
    return _TensorParams(open_tensors(local))


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
