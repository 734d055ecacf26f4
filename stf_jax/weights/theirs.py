"""A checkpoint of theirs, opened: its tensors, its config, and the values of each parameter of ours."""

import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from stf_jax.config import UserError
from stf_jax.models.vit import VisionConfig
from stf_jax.runtime.files import fetched, read_json
from stf_jax.weights.hf import Place
from stf_jax.weights.locate import check_file, locate_weights
from stf_jax.weights.recognise import VOCABULARY, Recognised, recognise
from stf_jax.weights.tensors import Tensors, open_tensors


def open_theirs(source: str) -> tuple[Tensors, dict[str, Any]]:
    """The tensors of a folder or file in any layout that recognise.py knows, and its ``config.json``.

    The config's ``preprocessor`` is that file's content; it is empty where there is none.

    Raises:
      UserError: there is nothing, or nothing that reads.
    """
    path = fetched(source)
    if not os.path.lexists(path):
        raise UserError(f"{source} does not exist; give a folder or file.")
    if (file := gguf_file(path)) is not None:
        from stf_jax.weights.gguf import open_gguf  # which wants a package of its own

        return open_gguf(file)
    folder = path if path.is_dir() else path.parent
    config = _json(folder / "config.json")
    pixels = _json(folder / "preprocessor_config.json")
    pixels = pixels or _json(folder / "processor_config.json").get("image_processor")  # where transformers 5 saves it
    tensors = open_tensors(path, config.get("transformers_weights") if path.is_dir() else None)
    return tensors, config | {"preprocessor": pixels if isinstance(pixels, dict) else {}}


def gguf_file(path: pathlib.Path) -> pathlib.Path | None:
    """The GGUF file that a source is, or that a folder's weights are; None where it is another kind."""
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    if not any(path.glob("*.gguf")):
        return None
    files = locate_weights(path).files
    return files[0] if files[0].suffix == ".gguf" else None


def _json(file):
    if not os.path.lexists(file):
        return {}
    check_file(file)
    values = read_json(file)
    if not isinstance(values, dict):
        raise UserError(f"{file} should hold a JSON object.")
    return values


def recognised(
    source: str, tensors: Tensors, config: Mapping[str, Any], tower: VisionConfig | None = None
) -> Recognised:
    """:func:`stf_jax.weights.recognise.recognise`, whose UserErrors then name the source."""
    try:
        return recognise(tensors, config, tower)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def values(tensors: Tensors, path: str, place: Place) -> Iterator[np.ndarray]:
    """The tensors that a parameter of ours is made of (``place.to_ours``), one by one, each in its own type."""
    for name in place.names:
        value = tensors.read(name)
        yield value[: place.theirs[0]] if path in VOCABULARY else value
