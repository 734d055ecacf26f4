"""A model on disk: what it is, and its parameters one at a time. What exports read and imports write."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping

import jax
import numpy as np
from etils import epath

from stf_jax.config import FusionConfig, ModelConfig, UserError, from_json
from stf_jax.data.tokenizer import MINIATURE
from stf_jax.models.llm import LLMConfig
from stf_jax.models.presets import DESCRIPTION, llm_config, llm_preset, vision_config, vision_preset
from stf_jax.models.vit import VisionConfig
from stf_jax.runtime.checkpoint import SavedParams
from stf_jax.runtime.files import fetched


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


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """A run's newest checkpoint, or a folder of imported weights.

    Attributes:
      config: the model as a run's config names it; a folder of imported weights is its own preset.
      shapes: shape and dtype of every parameter, by path (``llm/blocks/mlp/up/kernel``, of all layers at once).
      read: one parameter, into host memory.
      tokenizer: folder with the tokenizer, or None.
    """

    description: Description
    config: ModelConfig
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    read: Callable[[str], np.ndarray]
    tokenizer: pathlib.Path | None


def open_model(folder: epath.Path) -> SavedModel:
    """Raises UserError where the folder is neither, or its description does not read."""
    if not SavedParams.at(folder):
        raise UserError(f"{folder} is neither the workdir of a run (it has no checkpoints/) nor imported weights.")
    saved = SavedParams(folder)
    try:
        if (folder / DESCRIPTION).exists():
            values = json.loads((folder / DESCRIPTION).read_bytes())
            description = Description(
                values["vision"] and vision_config(values["vision"]),
                values["llm"] and llm_config(values["llm"]),
                values["fusion"] and FusionConfig(**{**values["fusion"], "taps": tuple(values["fusion"]["taps"])}),
                values["template"],
                values["aspect"],
            )
            model = ModelConfig(str(folder), str(folder), description.fusion or FusionConfig())
            tokenizer = fetched(folder / "tokenizer")
        else:
            config = from_json(json.loads((folder / "config.json").read_bytes()))
            model, data = config.model, config.data
            description = Description(
                vision_preset(model.vision), llm_preset(model.llm), model.fusion, data.template, data.aspect
            )
            tokenizer = MINIATURE if data.tokenizer == "miniature" else fetched(data.tokenizer)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} does not say what model it holds: {error!r}.") from None
    return SavedModel(description, model, saved.shapes, saved.read, tokenizer if tokenizer.is_dir() else None)
