"""A model on disk: what it is, and its parameters one at a time. What imports write; what is exported, or asked."""

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

from stf_jax.config import FusionConfig, TrainConfig, UserError, from_json
from stf_jax.data.tokenizer import EMBEDDED, FILES, save_tokenizer
from stf_jax.models.llm import LLMConfig
from stf_jax.models.presets import DESCRIPTION, ResolvedModel, llm_config, resolved, vision_config
from stf_jax.models.vit import VisionConfig
from stf_jax.runtime.files import fetched, make_folder, read_json, upload, write_json
from stf_jax.runtime.parameters import IMPORTED, SavedParams
from stf_jax.weights.recognise import Recognised
from stf_jax.weights.theirs import open_theirs, recognised, values

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Description:
    """What a model is; a part that is not there is None."""

    vision: VisionConfig | None
    llm: LLMConfig | None
    fusion: FusionConfig | None
    template: str = "v1"  # conversations, as config.data.template
    aspect: str = "square"  # images, as config.data.aspect

    def save(self, folder: pathlib.Path) -> None:
        """Writes ``model.json``."""
        (folder / DESCRIPTION).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")


def described(found: Recognised, config: Mapping[str, Any]) -> Description:
    """A checkpoint of theirs with that ``config.json``."""
    aspect = "pad" if config.get("image_aspect_ratio") == "pad" else "square"
    template = str(config.get("conversation_template", "v1"))  # whether there is one of that name is checked later
    return Description(found.vision, found.llm, found.fusion, template, aspect)


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """A run's newest checkpoint, a folder of imported weights, or an export for PyTorch.

    Attributes:
      config: the model with its shapes, under the names that a run's config gives them, or the folder's own.
      shapes: shape and dtype of every parameter, by path (``llm/blocks/mlp/up/kernel``, of all layers at once).
      read: one parameter, into host memory.
      restore: parameters on the devices named, one after the other.
      tokenizer: folder with the tokenizer, or None.
      step: of the run; None where it is none.
    """

    description: Description
    config: ResolvedModel
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    read: Callable[[str], np.ndarray]
    restore: Callable[[Mapping[str, jax.sharding.Sharding]], Iterator[tuple[str, jax.Array]]]
    tokenizer: pathlib.Path | None
    step: int | None = None


def open_model(folder: epath.Path) -> SavedModel:
    """Raises UserError where the folder is none of these, or its description does not read."""
    if not SavedParams.at(folder):
        described_there = (folder / "config.json").exists() or os.path.islink(folder / "config.json")
        if (described_there and any(folder.glob("*.safetensors"))) or (folder / "adapter_config.json").exists():
            return _open_export(folder)
        raise UserError(
            f"{folder} is neither the workdir of a run (it has no checkpoints/), nor imported weights, nor an export."
        )
    saved = SavedParams(folder)
    description, model, tokenizer = describe(folder)
    return SavedModel(description, model, saved.shapes, saved.read, saved.restore, tokenizer, saved.step)


def describe(folder: epath.Path) -> tuple[Description, ResolvedModel, pathlib.Path | None]:
    """What a run or a folder of imported weights is: no parameter is looked at.

    Returns:
      Its description; its model; the folder of its tokenizer, None where that is not there.

    Raises:
      UserError: its description does not read, or it is a run from before these were kept, whose weights are gone.
    """
    try:
        kept = _read_description(folder / DESCRIPTION) if (folder / DESCRIPTION).exists() else None
        if kept is not None and (folder / IMPORTED).is_dir():
            return kept, _named_after(folder, kept), _folder(fetched(folder / "tokenizer"))
        config = from_json(read_json(folder / "config.json"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} does not say what model it holds: {error!r}.") from None
    try:
        model = resolved(config.model, kept and kept.vision, kept and kept.llm)
    except UserError as error:
        raise UserError(
            f"The run in {folder} was made before runs kept their shapes, and where it had them is gone ({error}) "
            f"Import those weights again, and copy the model.json of that folder to {folder / DESCRIPTION}."
        ) from None
    data = config.data
    description = Description(model.vision_shape, model.llm_shape, model.fusion, data.template, data.aspect)
    tokenizer = _folder(fetched(folder / "tokenizer"))
    if tokenizer is None:
        tokenizer = EMBEDDED.get(data.tokenizer) or (data.tokenizer and _folder(fetched(data.tokenizer)))
    return description, model, tokenizer or None


def save_description(workdir: epath.Path, config: TrainConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    """Writes beside a run's ``config.json`` what else it takes to ask, export or move the run: shapes and tokenizer.

    ``config``: with its model's shapes (:func:`stf_jax.weights.origin.complete`) and the name of that tokenizer.
    """
    model, data = resolved(config.model), config.data
    description = Description(model.vision_shape, model.llm_shape, model.fusion, data.template, data.aspect)
    write_json(workdir / DESCRIPTION, dataclasses.asdict(description))
    source = EMBEDDED.get(data.tokenizer) or fetched(data.tokenizer)
    if source == fetched(workdir / "tokenizer"):
        return
    with tempfile.TemporaryDirectory() as local:
        save_tokenizer(tokenizer, source, pathlib.Path(local))
        if _files(workdir / "tokenizer") == _files(pathlib.Path(local)):
            return
        if (workdir / "tokenizer").exists():  # of a start that left no checkpoint, perhaps with another tokenizer
            (workdir / "tokenizer").rmtree()
        make_folder(workdir / "tokenizer")
        upload(pathlib.Path(local), workdir / "tokenizer")


def _files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()} if folder.is_dir() else {}


def _read_description(file):
    values = read_json(file)
    fusion = values["fusion"] and FusionConfig(**{**values["fusion"], "taps": tuple(values["fusion"]["taps"])})
    vision, llm = values["vision"] and vision_config(values["vision"]), values["llm"] and llm_config(values["llm"])
    return Description(vision, llm, fusion, values["template"], values["aspect"])


def _folder(path):
    return path if path.is_dir() else None


def _named_after(folder, description):
    fusion = description.fusion or FusionConfig()
    return ResolvedModel(str(folder), str(folder), fusion, vision_shape=description.vision, llm_shape=description.llm)


def _open_export(folder):
    tensors, config = open_theirs(str(folder))
    found = recognised(str(folder), tensors, config)
    for note in found.notes:
        _log.warning("%s: %s", folder, note)
    description = described(found, config)
    shapes = {
        path: jax.ShapeDtypeStruct(
            (len(place.names), *place.shape) if place.stacked else place.shape,
            jnp.result_type(*map(tensors.dtype, place.names)),
        )
        for path, place in found.places.items()
    }

    def read(path):
        return found.places[path].to_ours(values(tensors, path, found.places[path]))

    def restore(places):
        for path, where in places.items():
            value = read(path)  # device_put would send every host's copy to the others
            yield path, jax.make_array_from_callback(value.shape, where, value.__getitem__)

    model = _named_after(folder, description)
    local = fetched(folder)
    tokenizer = local if any((local / name).is_file() for name in FILES) else None
    return SavedModel(description, model, shapes, read, restore, tokenizer)
