"""A checkpoint of theirs, opened: its tensors, its config, and the values of each parameter of ours."""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jax import numpy as jnp

from stf_jax.config import UserError
from stf_jax.models.vit import VisionConfig
from stf_jax.runtime.files import fetched, read_json
from stf_jax.weights.gguf import open_gguf
from stf_jax.weights.hf import Place
from stf_jax.weights.recognise import VOCABULARY, Recognised, recognise
from stf_jax.weights.tensors import Tensors, open_tensors


def open_theirs(source: str) -> tuple[Tensors, dict[str, Any]]:
    """The tensors of a folder or file in any layout that recognise.py knows, and its ``config.json``.

    The config's ``preprocessor`` is that file's content; it is empty where there is none.

    Raises:
      UserError: there is nothing, or nothing that reads.
    """
    path = fetched(source)
    if not path.exists():
        raise UserError(f"{source} does not exist; give a folder or file.")
    if (file := gguf_file(path)) is not None:
        return open_gguf(file)
    folder = path if path.is_dir() else path.parent
    config = _json(folder / "config.json")
    pixels = _json(folder / "preprocessor_config.json")
    pixels = pixels or _json(folder / "processor_config.json").get("image_processor")  # where transformers 5 saves it
    return open_tensors(path), config | {"preprocessor": pixels if isinstance(pixels, dict) else {}}


def gguf_file(path: pathlib.Path) -> pathlib.Path | None:
    """The GGUF file that a source is or, for want of safetensors, holds; None where there is none."""
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    files = [] if any(path.glob("*.safetensors")) else sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise UserError(f"{path} holds {len(files)} GGUF files; name the one to import.")
    return files[0] if files else None


def _json(file):
    if not file.is_file():
        return {}
    values = read_json(file)
    if not isinstance(values, dict):
        raise UserError(f"{file} should hold a JSON object.")
    return values


def recognised(
    source: str, tensors: Tensors, config: Mapping[str, Any], tower: VisionConfig | None = None
) -> Recognised:
    """:func:`stf_jax.weights.recognise.recognise`, whose UserErrors then name the source."""
    try:
        return recognise({name: tensors.shape(name) for name in tensors.names}, config, tower)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def values(tensors: Tensors, path: str, place: Place, dtype: str = "") -> Iterator[np.ndarray]:
    """The tensors that a parameter of ours is made of (``place.to_ours``), one by one.

    In that type, or each in its own.
    """
    for name in place.names:
        value = tensors.read(name)
        value = value[: place.theirs[0]] if path in VOCABULARY else value
        yield value.astype(jnp.dtype(dtype or value.dtype), copy=False)
