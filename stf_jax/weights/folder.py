"""Weights under our own parameter paths, read to start a run; and folders that appear whole.

A folder of weights holds ``*.safetensors`` whose tensors are named by parameter path
(``vision/blocks/mlp/up/kernel``). A run's workdir serves as well.
"""

import contextlib
import pathlib
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from stf_jax.config import UserError
from stf_jax.runtime.checkpoint import SavedParams

MINIATURES = pathlib.Path(__file__).parent / "miniatures"


def load_params(sources: str, layout: Mapping[str, jax.ShapeDtypeStruct], fresh: Iterable[str]) -> dict[str, jax.Array]:
    """Reads the parameters that a model wants, each straight onto its devices.

    Args:
      sources: folders of weights or workdirs of runs, separated by commas; ``miniatures`` names the embedded ones. A
        later one wins over an earlier one.
      layout: every parameter of the model, with the sharding that it is to have.
      fresh: patterns of parameters that are not taken from the sources, whatever those hold.

    Returns:
      ``{path: array}`` in the types of the files; parameters that match ``fresh`` are left out.

    Raises:
      UserError: a source that cannot be read, or parameters that are missing, unknown or of another shape, all listed.
    """
    found: dict[str, jax.Array] = {}
    for source in filter(None, (part.strip() for part in sources.split(","))):
        found |= _read(MINIATURES if source == "miniatures" else pathlib.Path(source), layout)
    fresh = list(fresh)

    def taken(path):
        return not any(re.fullmatch(pattern, path) for pattern in fresh)

    if not sources and any(taken(path) for path in layout):
        raise UserError(
            f"No weights to start from, and {next(filter(taken, layout))} must not start at random: provide "
            "--config.init_from=DIR, or see training work on embedded weights with --config=configs/demo.py."
        )
    wrong = [f"missing {path} {layout[path].shape}" for path in layout if path not in found and taken(path)]
    wrong += [f"unknown {path} {found[path].shape}" for path in found if path not in layout and taken(path)]
    wrong += [
        f"{path} is {found[path].shape} there and {layout[path].shape} here"
        for path in found
        if path in layout and found[path].shape != layout[path].shape and taken(path)
    ]
    if wrong:
        raise UserError(
            f"The weights in {sources!r} do not fit the model (init_missing may name what is to start afresh): "
            + "; ".join(sorted(wrong))
        )
    return {path: found[path] for path in layout if path in found and taken(path)}


@contextlib.contextmanager
def new_folder(to: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to fill, which becomes ``to`` when all is well, and is removed when it is not.

    Raises:
      UserError: ``to`` exists and is not an empty folder.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"{to} exists and is not empty; choose another folder for --to.")
    partial = to.with_name(to.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial)
        raise
    if to.exists():
        to.rmdir()
    partial.rename(to)


def _read(folder, layout):
    if SavedParams.at(folder):
        return SavedParams(folder).restore(layout)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"init_from names {folder}, which holds neither *.safetensors nor a run's checkpoints.")
    params = {}
    for file in files:
        try:
            with safe_open(file, framework="numpy") as tensors:
                for path in tensors.keys():  # noqa: SIM118 (not a mapping)
                    tensor = tensors.get_tensor(path)
                    fits = path in layout and layout[path].shape == tensor.shape
                    params[path] = jax.device_put(np.asarray(tensor), layout[path].sharding if fits else None)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} cannot be read as safetensors: {error}.") from None
    return params
