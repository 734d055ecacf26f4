"""Opens models on disk: their description, and their parameters one at a time, for exports and inference."""

import dataclasses
import json
import logging
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from transformers import PreTrainedTokenizerFast

from stf_jax.checkpointing.params import IMPORTED, SavedParams
from stf_jax.config import FusionConfig, TrainConfig, UserError, from_json, fusion_from_json, to_json
from stf_jax.data.tiles import Tiles, find_tiles, with_newline
from stf_jax.data.tokenizer import EMBEDDED, FILES, save_tokenizer
from stf_jax.files import local_copy, make_folder, read_json, upload, write_json
from stf_jax.models.decoders.base import LLMConfig
from stf_jax.models.spec import DESCRIPTION, ModelSpec, parse_llm_config, parse_vision_config, resolve_model
from stf_jax.models.towers.base import VisionConfig
from stf_jax.registry import refuse_code_in
from stf_jax.weights.anyres import read_tiles
from stf_jax.weights.detect import DetectedModel
from stf_jax.weights.folder import open_params
from stf_jax.weights.foreign import detect_or_raise, open_checkpoint, read_tensors

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Description:
    """The shapes and data settings of a model; a missing part is None."""

    vision: VisionConfig | None
    llm: LLMConfig | None
    fusion: FusionConfig | None
    template: str = "v1"  # as config.data.template
    aspect: str = "square"  # as config.data.aspect
    schedule: str = ""  # as config.model.schedule
    tiles: Tiles | None = None  # with the aspect ``tiles``

    def save(self, folder: pathlib.Path) -> None:
        """Writes ``model.json``."""
        (folder / DESCRIPTION).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")


def describe_checkpoint(detected: DetectedModel, config: Mapping[str, Any]) -> Description:
    """Returns the description of a foreign checkpoint with that ``config.json``."""
    tiles = read_tiles(config, detected.vision) if detected.fusion is not None else None
    aspect = "pad" if config.get("image_aspect_ratio") == "pad" else "square"
    template = str(config.get("conversation_template", "v1"))  # checked when it is used
    shapes = detected.vision, detected.llm, detected.fusion
    return Description(*shapes, template, aspect if tiles is None else "tiles", tiles=tiles)


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """A run's newest checkpoint, a folder of imported weights, or an export for PyTorch.

    Attributes:
      description: shapes and data settings of the model.
      config: the model config with its shapes; parts are named as in the run's config, or by the folder.
      shapes: shape and dtype of every parameter, by path (``llm/blocks/mlp/up/kernel`` stacks all layers).
      read: reads one parameter into host memory.
      restore: reads parameters one by one onto the devices of the given shardings.
      tokenizer: folder of the tokenizer, or None.
      step: step of the run; None for other folders.
    """

    description: Description
    config: ModelSpec
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    read: Callable[[str], np.ndarray]
    restore: Callable[[Mapping[str, jax.sharding.Sharding]], Iterator[tuple[str, jax.Array]]]
    tokenizer: pathlib.Path | None
    step: int | None = None


def open_model(folder: epath.Path) -> SavedModel:
    """Opens a run, imported weights or an export. Raises UserError if the folder is none of these or unreadable."""
    if not SavedParams.exists_in(folder):
        has_config = (folder / "config.json").exists() or os.path.islink(folder / "config.json")
        if (has_config and any(folder.glob("*.safetensors"))) or (folder / "adapter_config.json").exists():
            return _open_export(folder)
        raise UserError(
            f"{folder} is neither the workdir of a run (it has no checkpoints/), nor imported weights, nor an export."
        )
    saved = open_params(folder)
    description, model, tokenizer = describe_folder(folder)
    return SavedModel(description, model, saved.shapes, saved.read, saved.restore, tokenizer, saved.step)


def describe_folder(folder: epath.Path) -> tuple[Description, ModelSpec, pathlib.Path | None]:
    """Describes a run or a folder of imported weights, without reading parameters.

    Returns:
      Its description; its model config; the folder of its tokenizer, None if that is missing.

    Raises:
      UserError: the description cannot be read; or the run is from before runs saved one, and the weights that it
        started from are gone.
    """
    try:
        saved = _read_description(folder / DESCRIPTION) if (folder / DESCRIPTION).exists() else None
        if saved is not None and (folder / IMPORTED).is_dir():
            return saved, _config_of_folder(folder, saved), _existing_folder(local_copy(folder / "tokenizer"))
        config = from_json(read_json(folder / "config.json"))
        refuse_code_in(folder, to_json(config))
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} does not describe its model: {error!r}.") from None
    try:
        vision, llm = (None, None) if saved is None else (saved.vision, saved.llm)
        model = with_newline(resolve_model(config.model, vision, llm), find_tiles(config.data))
    except UserError as error:
        raise UserError(
            f"The run in {folder} is from before runs saved their shapes, and the weights it started from are gone "
            f"({error}) Import those weights again, and copy the model.json of that folder to {folder / DESCRIPTION}."
        ) from None
    description = _describe(model, config)
    data = config.data
    tokenizer = _existing_folder(local_copy(folder / "tokenizer"))
    if tokenizer is None:
        tokenizer = EMBEDDED.get(data.tokenizer)
    if tokenizer is None and data.tokenizer:
        tokenizer = _existing_folder(local_copy(data.tokenizer))
    return description, model, tokenizer


def save_description(workdir: epath.Path, config: TrainConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    """Writes the shapes and the tokenizer beside a run's ``config.json``, so that the run can be used on its own.

    ``config`` has the model's shapes (:func:`stf_jax.weights.origin.complete_config`) and names the tokenizer.
    """
    data = config.data
    write_json(workdir / DESCRIPTION, dataclasses.asdict(_describe(resolve_model(config.model), config)))
    source = EMBEDDED.get(data.tokenizer) or local_copy(data.tokenizer)
    if source == local_copy(workdir / "tokenizer"):
        return
    with tempfile.TemporaryDirectory() as local:
        save_tokenizer(tokenizer, source, pathlib.Path(local))
        if _read_files(workdir / "tokenizer") == _read_files(pathlib.Path(local)):
            return
        if (workdir / "tokenizer").exists():  # from a start that saved no checkpoint, perhaps with another tokenizer
            (workdir / "tokenizer").rmtree()
        make_folder(workdir / "tokenizer")
        upload(pathlib.Path(local), workdir / "tokenizer")


def _describe(model: ModelSpec, config: TrainConfig) -> Description:
    data = config.data
    shapes = model.vision_shape, model.llm_shape, model.fusion
    return Description(*shapes, data.template, data.aspect, model.schedule, find_tiles(data))


def _read_files(folder: epath.Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()} if folder.is_dir() else {}


def _read_description(file: epath.Path) -> Description:
    values = read_json(file)
    refuse_code_in(file.parent, values)
    fusion = values["fusion"] and fusion_from_json(values["fusion"])
    vision = values["vision"] and parse_vision_config(values["vision"])
    llm = values["llm"] and parse_llm_config(values["llm"])
    tiles = values.get("tiles") and Tiles(tuple(map(tuple, values["tiles"]["grids"])), values["tiles"]["marks"])
    return Description(vision, llm, fusion, values["template"], values["aspect"], values.get("schedule", ""), tiles)


def _existing_folder(path: pathlib.Path) -> pathlib.Path | None:
    return path if path.is_dir() else None


def _config_of_folder(folder: epath.Path, description: Description) -> ModelSpec:
    fusion = description.fusion or FusionConfig()
    model = ModelSpec(
        str(folder),
        str(folder),
        fusion,
        schedule=description.schedule,
        vision_shape=description.vision,
        llm_shape=description.llm,
    )
    return with_newline(model, description.tiles)


def _open_export(folder: epath.Path) -> SavedModel:
    tensors, config = open_checkpoint(str(folder))
    detected = detect_or_raise(str(folder), tensors, config)
    for note in detected.notes:
        _log.warning("%s: %s", folder, note)
    description = describe_checkpoint(detected, config)
    shapes = {
        path: jax.ShapeDtypeStruct(
            (len(mapping.names), *mapping.shape) if mapping.stacked else mapping.shape,
            jnp.result_type(*map(tensors.dtype, mapping.names)),
        )
        for path, mapping in detected.mappings.items()
    }

    def read(path: str) -> np.ndarray:
        mapping = detected.mappings[path]
        return mapping.from_hf(read_tensors(tensors, path, mapping))

    def restore(shardings: Mapping[str, jax.sharding.Sharding]) -> Iterator[tuple[str, jax.Array]]:
        for path, sharding in shardings.items():
            value = read(path)  # device_put would send every host's copy to the others
            yield path, jax.make_array_from_callback(value.shape, sharding, value.__getitem__)

    model = _config_of_folder(folder, description)
    local = local_copy(folder)
    tokenizer = local if any((local / name).is_file() for name in FILES) else None
    return SavedModel(description, model, shapes, read, restore, tokenizer)
