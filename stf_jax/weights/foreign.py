"""Opens foreign checkpoints: tensors, config, and the values of each of our parameters."""

import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from stf_jax.config import UserError
from stf_jax.files import local_copy, read_json
from stf_jax.models.towers.base import VisionConfig
from stf_jax.registry import refuse_code_in
from stf_jax.weights.detect import VOCABULARY, DetectedModel, detect_model
from stf_jax.weights.locate import check_file, locate_weights
from stf_jax.weights.mapping import TensorMapping
from stf_jax.weights.tensors import TensorFile, open_tensors


def open_checkpoint(source: str) -> tuple[TensorFile, dict[str, Any]]:
    """Opens a folder or file in any layout that detect.py supports; returns its tensors and its ``config.json``.

    The config gets a key ``preprocessor``: the image processor's config, empty if there is none.

    Raises:
      UserError: the source does not exist or cannot be read.
    """
    path = local_copy(source)
    if not os.path.lexists(path):
        raise UserError(f"{source} does not exist; give a folder or file.")
    if (file := find_gguf(path)) is not None:
        from stf_jax.weights.gguf import open_gguf  # which needs an optional package

        return open_gguf(file)
    folder = path if path.is_dir() else path.parent
    config = _read_json(folder / "config.json")
    preprocessor: Any = _read_json(folder / "preprocessor_config.json")
    if not preprocessor:  # transformers 5 saves it in another file
        preprocessor = _read_json(folder / "processor_config.json").get("image_processor")
    tensors = open_tensors(path, config.get("transformers_weights") if path.is_dir() else None)
    return tensors, config | {"preprocessor": preprocessor if isinstance(preprocessor, dict) else {}}


def find_gguf(path: pathlib.Path) -> pathlib.Path | None:
    """Returns the GGUF file of a source, a file or a folder; None if its weights are in another format."""
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    if not any(path.glob("*.gguf")):
        return None
    files = locate_weights(path).files
    return files[0] if files[0].suffix == ".gguf" else None


def _read_json(file: pathlib.Path) -> dict[str, Any]:
    if not os.path.lexists(file):
        return {}
    check_file(file)
    values = read_json(file)
    if not isinstance(values, dict):
        raise UserError(f"{file} must hold a JSON object.")
    return values


def detect_or_raise(
    source: str,
    tensors: TensorFile,
    config: Mapping[str, Any],
    tower: VisionConfig | None = None,
    families: Sequence[str] = (),
) -> DetectedModel:
    """Calls :func:`stf_jax.weights.detect.detect_model`; its UserErrors then name the source.

    Families that an export of ours names are added to ``families``.
    """
    refuse_code_in(source, config)
    named = config.get("stf_families", [])
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise UserError(f"{source}: config.json has stf_families {named!r}, not a list of names.")
    try:
        return detect_model(tensors, config, tower, (*families, *named))
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def read_tensors(tensors: TensorFile, path: str, mapping: TensorMapping) -> Iterator[np.ndarray]:
    """Reads the tensors of one parameter, one by one, for ``mapping.from_hf``; each keeps its dtype."""
    for name in mapping.names:
        value = tensors.read(name)
        yield value[: mapping.hf_shape[0]] if path in VOCABULARY else value
