"""A model on disk: what it is, and its parameters one at a time. What imports write; what is exported, or asked."""

import dataclasses
import json
import logging
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from stf_jax.config import FusionConfig, UserError, from_json
from stf_jax.data.tokenizer import FILES, MINIATURE
from stf_jax.models.llm import LLMConfig
from stf_jax.models.presets import DESCRIPTION, ResolvedModel, llm_config, resolved, vision_config
from stf_jax.models.vit import VisionConfig
from stf_jax.runtime.files import fetched, read_json
from stf_jax.runtime.parameters import SavedParams
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
    aspect: str = "square"  # pictures, as config.data.aspect

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
        if (folder / "config.json").exists() and any(folder.glob("*.safetensors")):
            return _open_export(folder)
        raise UserError(
            f"{folder} is neither the workdir of a run (it has no checkpoints/), nor imported weights, nor an export."
        )
    saved = SavedParams(folder)
    try:
        if (folder / DESCRIPTION).exists():
            values = read_json(folder / DESCRIPTION)
            description = Description(
                values["vision"] and vision_config(values["vision"]),
                values["llm"] and llm_config(values["llm"]),
                values["fusion"] and FusionConfig(**{**values["fusion"], "taps": tuple(values["fusion"]["taps"])}),
                values["template"],
                values["aspect"],
            )
            model = _named_after(folder, description)
            tokenizer = fetched(folder / "tokenizer")
        else:
            config = from_json(read_json(folder / "config.json"))
            model, data = resolved(config.model), config.data
            description = Description(model.vision_shape, model.llm_shape, model.fusion, data.template, data.aspect)
            tokenizer = MINIATURE if data.tokenizer == "miniature" else fetched(data.tokenizer)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} does not say what model it holds: {error!r}.") from None
    tokenizer = tokenizer if tokenizer.is_dir() else None
    return SavedModel(description, model, saved.shapes, saved.read, saved.restore, tokenizer, saved.step)


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
            yield path, jax.device_put(read(path), where)

    model = _named_after(folder, description)
    local = fetched(folder)
    tokenizer = local if any((local / name).is_file() for name in FILES) else None
    return SavedModel(description, model, shapes, read, restore, tokenizer)
