"""Exports a model for PyTorch: a folder that transformers loads, with the code that it needs.

Models with LLaVA's plain projector become an ordinary ``LlavaForConditionalGeneration``, or, if they read tiles,
``LlavaNextForConditionalGeneration``, with the tensor names of hub files, which every release reads. Other fusions need
the classes in weights/torch_package, which are copied to the folder. Both come with adapters for lmms-eval and
VLMEvalKit.
"""

import dataclasses
import hashlib
import inspect
import itertools
import pathlib
import shutil
import string
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from transformers import PreTrainedTokenizerFast

from stf_jax.config import FusionConfig, UserError
from stf_jax.data.conversation import initial_tokens, stop_tokens
from stf_jax.data.records import IMAGE_MARK
from stf_jax.data.tiles import Tiles
from stf_jax.data.tokenizer import max_positions, untrained_tokens
from stf_jax.files import write_json
from stf_jax.models.decoders.base import DECODERS, LLMConfig
from stf_jax.models.decoders.rope import write_rope
from stf_jax.models.fusions.base import find_fusion, input_grid, resolve_sizes, tapped_blocks, tokens_per_image
from stf_jax.models.fusions.mlp import MLP
from stf_jax.models.spec import find_family
from stf_jax.models.towers.base import ACTIVATIONS, TOWERS, VisionConfig
from stf_jax.registry import is_outside
from stf_jax.weights.anyres import NEWLINE, write_grids
from stf_jax.weights.detect import VOCABULARY
from stf_jax.weights.export_tokenizer import load_export_tokenizer, save_export_tokenizer
from stf_jax.weights.exports import (
    CompleteModel,
    ExportStream,
    map_part,
    refuse_schedule,
    require_complete,
    widest_dtype,
)
from stf_jax.weights.folder import new_folder
from stf_jax.weights.mapping import LLAVA_PROJECTOR, TensorMapping, fusion_table
from stf_jax.weights.model import SavedModel, open_model
from stf_jax.weights.shards import write_shards

PACKAGE = pathlib.Path(__file__).parent / "torch_package"
_MODEL_CODE = ("configuration_stf.py", "layers_stf.py", "modeling_stf.py", "processing_stf.py", "tiles_stf.py")
_FUSION_KEYS = [field.name for field in dataclasses.fields(FusionConfig) if field.name not in ("taps", "init")]
_EVALUATION_CODE = ("lmms_eval_stf/lmms_eval_stf.py", "lmms_eval_stf/pyproject.toml", "vlmevalkit_stf.py")


def export_hf(checkpoint: epath.Path, to: epath.Path, dtype: str = "") -> dict[str, Any]:
    """Writes a folder for ``AutoModelForImageTextToText`` and ``AutoProcessor``; it appears when it is complete.

    Args:
      checkpoint: workdir of a run, or a folder of imported weights.
      to: the folder to write; it must not exist.
      dtype: the type to cast values to; empty: each keeps its own, and the config names the widest.

    Returns:
      The report of :class:`stf_jax.weights.exports.ExportStream`.

    Raises:
      UserError: the checkpoint cannot be read or lacks a part; ``to`` exists; transformers has no class for the model.
    """
    with new_folder(to) as folder:
        saved = open_model(checkpoint)
        model = require_complete(saved, checkpoint)
        refuse_schedule(saved, checkpoint)
        grid = model.vision.grid
        count, taps = tokens_per_image(model.fusion, grid), tapped_blocks(model.fusion, model.vision.layers)
        tokenizer = load_export_tokenizer(model.tokenizer, model.template)
        has_bos = initial_tokens(tokenizer) == [tokenizer.bos_token_id]
        image_id = tokenizer.convert_tokens_to_ids(IMAGE_MARK)
        assert isinstance(image_id, int)  # the id of one token
        keys = DECODERS.find(model.llm.family).fields
        config: dict[str, Any] = {
            "vision_config": vision_config_values(model.vision),
            "text_config": text_config_values(model.llm, tokenizer),
            "image_aspect_ratio": model.aspect,
            "conversation_template": model.template,
            keys["tied"]: model.llm.tied,
            "dtype": dtype or widest_dtype(saved),
        }
        if own := [name for name in (model.vision.family, model.llm.family) if is_outside(name)]:
            config["stf_families"] = own  # for our own reader
        if model.tiles is not None:
            config["image_grid_pinpoints"] = write_grids(model.tiles, model.vision)
        stream = ExportStream(saved, _map_tensors(saved, model), dtype)
        rows = max(image_id + 1, model.llm.vocab)
        config["text_config"][keys["vocab"]] = rows
        if rows != model.llm.vocab:
            config["stf_vocab"] = model.llm.vocab  # further rows exist only for <image>
        tensors = _with_image_row(stream, rows)
        torch_file = None if _is_llava(model.fusion) else find_torch_file(model.fusion)
        if torch_file is None:
            write_shards(folder, itertools.chain(tensors, _unused_norm(model, config["dtype"])))
            processor = _complete_llava_config(config, model, taps[0], count, image_id)
            if model.tiles is not None:
                _complete_llava_next_config(config, model.tiles, processor)
        else:
            write_shards(folder, tensors)
            processor = _complete_stf_config(config, model, taps, count, image_id)
            processor["begin"] = tokenizer.bos_token if has_bos else ""
            _write_model_code(torch_file, folder)
        _copy_code(_EVALUATION_CODE, folder)
        save_export_tokenizer(tokenizer, folder, model.template, has_bos)
        write_json(epath.Path(folder, "config.json"), config)
        write_json(epath.Path(folder, "processor_config.json"), {**processor, "image_token": IMAGE_MARK})
        write_json(epath.Path(folder, "preprocessor_config.json"), _image_processor(model))
        ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "pad_token_id")}
        ids["eos_token_id"] = list(stop_tokens(model.template, tokenizer))
        if suppressed := untrained_tokens(tokenizer, rows):
            ids["suppress_tokens"] = list(suppressed)
        write_json(epath.Path(folder, "generation_config.json"), ids)
        _write_readme(folder, model, count, config, checkpoint, saved.step)
        stream.save_report(folder)
    return stream.report


def vision_config_values(config: VisionConfig) -> dict[str, Any]:
    """Returns transformers' ``vision_config``. Raises UserError if none of its classes computes the tower."""
    family = TOWERS.find(find_family(TOWERS, config, "vision tower"))
    values = {key: getattr(config, field) for field, key in family.fields.items()}
    values[family.fields["activation"]] = ACTIVATIONS[config.activation]
    return {"model_type": family.model_type, **values, **family.extra}


def text_config_values(config: LLMConfig, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Returns transformers' ``text_config``. Raises UserError if none of its classes computes the language model."""
    family = DECODERS.find(find_family(DECODERS, config, "language model"))
    return {
        "model_type": family.model_type,
        **{key: getattr(config, field) for field, key in family.fields.items()},
        **write_rope(config.rope_theta, config.rope_scaling),
        family.length: max_positions(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **family.extra,
    }


def _is_llava(fusion: FusionConfig) -> bool:
    """Whether transformers' own LLaVA computes the model."""
    return find_fusion(fusion) is MLP and not fusion.budgets


def find_torch_file(config: FusionConfig) -> pathlib.Path:
    """Returns the file that computes a fusion in PyTorch.

    Raises:
      UserError: the fusion's class names no file, or one that does not exist.
    """
    fusion = find_fusion(config)
    name = getattr(fusion, "torch_file", None)
    if name is None:
        raise UserError(
            f"{config.fusion} has no PyTorch twin to export: set torch_file in its class to a file beside its own with "
            "a class Connector that computes the same in torch (stf_jax/models/fusions/stf_torch.py is an example)."
        )
    file = pathlib.Path(inspect.getfile(cast(type, fusion))).with_name(name)
    if not file.is_file():
        raise UserError(f"{config.fusion} names torch_file={name!r}, but {file} does not exist.")
    return file


def map_modules(
    shapes: Mapping[str, jax.ShapeDtypeStruct], vision: VisionConfig, fusion: FusionConfig, llm: LLMConfig
) -> dict[str, TensorMapping]:
    """Maps parameters to the names that they have in the model in PyTorch, which are also those in exports of ours.

    transformers renames the tensors of its own LLaVA when it reads them.
    """
    decoder = DECODERS.find(llm.family)
    table = LLAVA_PROJECTOR if _is_llava(fusion) else fusion_table(fusion, vision, llm.width)
    projector = "model.multi_modal_projector." if _is_llava(fusion) else "model."
    head = decoder.tensor_names["head/kernel"].name
    return {
        **map_part(shapes, "vision", TOWERS.find(vision.family).tensor_names, {"": "model.vision_tower."}),
        **map_part(shapes, "fusion/connector", table, {"": projector}),
        **_map_newline(shapes, "model."),
        **map_part(shapes, "llm", decoder.tensor_names, {decoder.root: "model.language_model.", head: head}),
    }


def _map_newline(shapes: Mapping[str, jax.ShapeDtypeStruct], prefix: str) -> dict[str, TensorMapping]:
    path = "fusion/newline"
    if path not in shapes:
        return {}
    return {path: TensorMapping((prefix + NEWLINE,), ((0,),), shapes[path].shape, stacked=False)}


def _map_tensors(saved: SavedModel, model: CompleteModel) -> dict[str, TensorMapping]:
    if not _is_llava(model.fusion):
        return map_modules(saved.shapes, model.vision, model.fusion, model.llm)
    tower = TOWERS.find(model.vision.family)
    return {
        **map_part(saved.shapes, "vision", tower.tensor_names, {"": f"vision_tower.{tower.wrapper}"}),
        **map_part(saved.shapes, "fusion/connector", LLAVA_PROJECTOR, {"": "multi_modal_projector."}),
        **_map_newline(saved.shapes, ""),
        **map_part(saved.shapes, "llm", DECODERS.find(model.llm.family).tensor_names, {"": "language_model."}),
    }


def _complete_stf_config(
    config: dict[str, Any], model: CompleteModel, taps: tuple[int, ...], count: int, image_id: int
) -> dict[str, Any]:
    """Completes the config for our classes; returns the processor's config."""
    fusion = resolve_sizes(model.fusion, model.vision)
    table = fusion_table(model.fusion, model.vision, model.llm.width)
    tiles = {} if model.tiles is None else {"tiles": {"tokens": count, "marks": model.tiles.marks}}
    config |= {
        "model_type": "llava_stf",
        "architectures": ["LlavaSTFForConditionalGeneration"],
        "auto_map": {
            "AutoConfig": "configuration_stf.LlavaSTFConfig",
            "AutoModel": "modeling_stf.LlavaSTFModel",
            "AutoModelForImageTextToText": "modeling_stf.LlavaSTFForConditionalGeneration",
        },
        "image_token_id": image_id,
        "stf_config": {
            **{key: getattr(fusion, key) for key in _FUSION_KEYS},
            "taps": list(taps),
            "side": input_grid(model.fusion, model.vision).side,
            "class_token": model.vision.class_token,
            "unused": list(TOWERS.find(model.vision.family).unused),
            **tiles,
            "crosslayer": any(name.startswith("mm_projector_crosslayer.") for name, _ in table.values()),
        },
    }
    return {
        "processor_class": "LlavaSTFProcessor",
        "auto_map": {"AutoProcessor": "processing_stf.LlavaSTFProcessor"},
        "num_image_tokens": count,
        "budgets": fusion.budgets,
        **tiles,
    }


def _complete_llava_config(
    config: dict[str, Any], model: CompleteModel, tap: int, count: int, image_id: int
) -> dict[str, Any]:
    """Completes the config for transformers' LLaVA; returns the processor's config."""
    strategy = "default" if model.vision.class_token else "full"
    config |= {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": image_id,
        "image_seq_length": count,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": tap - model.vision.layers - 1,
        "vision_feature_select_strategy": strategy,
    }
    return {
        "processor_class": "LlavaProcessor",
        "patch_size": model.vision.patch_size,
        "vision_feature_select_strategy": strategy,
        "num_additional_image_tokens": int(model.vision.class_token),
    }


def _complete_llava_next_config(config: dict[str, Any], tiles: Tiles, processor: dict[str, Any]) -> None:
    """Changes the configs of transformers' LLaVA to those of its LLaVA-NeXT."""
    if tiles.marks == "none":
        raise UserError(
            "transformers has no class for mlp with data.tiles.marks=none: choose newline, or another fusion."
        )
    config |= {"model_type": "llava_next", "architectures": ["LlavaNextForConditionalGeneration"]}
    processor["processor_class"] = "LlavaNextProcessor"


def _with_image_row(stream: ExportStream, rows: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors, with the vocabulary extended to ``rows``: servers embed ``<image>`` before they replace it.

    A new row is the mean of the others, so that its logit is never the largest.
    """
    extended = {name for path, mapping in stream.mappings.items() if path in VOCABULARY for name in mapping.names}
    for name, value in stream:
        if name in extended and len(value) < rows:
            mean = value.mean(0, dtype=np.float32).astype(value.dtype)
            value = np.concatenate([value, np.broadcast_to(mean, (rows - len(value), len(mean)))])
        yield name, value


def _unused_norm(model: CompleteModel, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the norm above the taps, which transformers' LLaVA declares but never uses."""
    tower = TOWERS.find(model.vision.family)
    for norm in tower.unused:
        yield f"vision_tower.{tower.wrapper}{norm}.weight", np.ones(model.vision.width, jnp.dtype(dtype))
        yield f"vision_tower.{tower.wrapper}{norm}.bias", np.zeros(model.vision.width, jnp.dtype(dtype))


def _write_readme(
    folder: pathlib.Path,
    model: CompleteModel,
    count: int,
    config: Mapping[str, Any],
    checkpoint: epath.Path,
    step: int | None,
) -> None:
    """Writes ``README.md``: what the export is, how to use it and how to serve it."""
    text = string.Template((PACKAGE / "README.md").read_text())
    plain = _is_llava(model.fusion)
    counts = " or ".join(map(str, model.fusion.budgets or (count,)))
    values = {
        "architecture": config["architectures"][0],
        "code": "It needs no custom code." if plain else "Loading it runs its code (`*_stf.py`).",
        "template": model.template,
        "tokens": f"{count} per thumbnail and tile" if model.tiles else f"{counts} per image",
        "dtype": config["dtype"],
        "source": f"`{checkpoint}`" + (f", step {step:,}" if step is not None else ""),
        "image_size": model.vision.image_size,
        "trust": "" if plain else ", trust_remote_code=True",
        "flag": "" if plain else " --trust-remote-code",
    }
    (folder / "README.md").write_text(text.substitute(values))


def _image_processor(model: CompleteModel) -> dict[str, Any]:
    """Returns the image processor's config, which matches data/image.py."""
    size = model.vision.image_size
    square = {"height": size, "width": size}
    cropped = {"size": {"shortest_edge": size}, "do_center_crop": True, "crop_size": square}
    values: dict[str, Any]
    if model.tiles is not None:
        pinpoints = write_grids(model.tiles, model.vision)
        values = {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": pinpoints, **cropped}
    elif model.aspect == "pad":
        values = {"image_processor_type": "LlavaImageProcessor", "do_pad": True, **cropped}
    elif model.vision.crops:
        values = {"image_processor_type": "CLIPImageProcessor", **cropped}
    else:
        values = {"image_processor_type": "SiglipImageProcessor", "size": square}
    return values | {
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(model.vision.mean),
        "image_std": list(model.vision.std),
    }


def _write_model_code(torch_file: pathlib.Path, folder: pathlib.Path) -> None:
    _copy_code(_MODEL_CODE, folder)
    shutil.copyfile(torch_file, folder / "connector_stf.py")
    # In a process, transformers uses the model class that it first loaded for a config class. So exports with different
    # code need different config classes, which it makes of files with different contents.
    files = [*(folder / name for name in _MODEL_CODE), folder / "connector_stf.py"]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    with (folder / "configuration_stf.py").open("a") as file:
        file.write(f"\n\nCODE = {digest[:16]!r}  # of this export\n")


def _copy_code(names: Iterable[str], folder: pathlib.Path) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(PACKAGE / name, folder / name)  # without the file mode of the installation
