"""Exports a model for the authors' code (visresearch/LLaVA-STF), with their tensor names and config keys.

Their code hard-codes the shape of the fusion, so models of another shape are refused: eight taps of 24 blocks (the
deepest may be chosen, the others are blocks 21, 18, …, 3), MBTF 8C → 4C → C, windows of 2×2, and STF 4C → 16C → D.
"""

import json
import pathlib
import shutil
from typing import Any

import numpy as np
from etils import epath

from stf_jax.config import FusionConfig, UserError
from stf_jax.data.tokenizer import SENTENCEPIECE, load_tokenizer, max_positions, prefixes_only_start
from stf_jax.models.decoders.base import DECODERS, LLMConfig, find_decoder_class
from stf_jax.models.decoders.transformer import Decoder
from stf_jax.models.fusions.base import tapped_blocks
from stf_jax.models.fusions.stf import MBTFSTF
from stf_jax.models.spec import VISION
from stf_jax.models.towers.base import TOWERS, VisionConfig, find_tower_class
from stf_jax.models.towers.vit import VisionTower
from stf_jax.weights.exports import (
    CompleteModel,
    ExportStream,
    map_part,
    refuse_schedule,
    require_complete,
    widest_dtype,
)
from stf_jax.weights.folder import new_folder
from stf_jax.weights.model import open_model
from stf_jax.weights.shards import write_shards

CLIP, LLAMA = TOWERS.find("clip"), DECODERS.find("llama")  # the only ones that their code reads
ADAPTER = "mm_projector.bin"  # the output of their first stage
_TAPS = (21, 18, 15, 12, 9, 6, 3)  # below the deepest
_TOWERS = {  # by image size in pixels and width
    (336, 1024): "openai/clip-vit-large-patch14-336",
    (224, 1024): "openai/clip-vit-large-patch14",
}
_TOWER_PREFIX = {"": "model.vision_tower.vision_tower.vision_model."}


def export_llava_stf(
    checkpoint: epath.Path, to: epath.Path, dtype: str = "", adapter_only: bool = False
) -> dict[str, Any]:
    """Writes a folder for the authors' ``load_pretrained_model``; it appears when it is complete.

    Args:
      checkpoint: workdir of a run, or a folder of imported weights.
      to: the folder to write; it must not exist.
      dtype: the type to cast values to; empty: each keeps its own.
      adapter_only: write only MBTF and STF, the eight tensors of their ``--pretrain_mm_mlp_adapter``.

    Returns:
      The report of :class:`stf_jax.weights.exports.ExportStream`.

    Raises:
      UserError: the checkpoint cannot be read or lacks a part; ``to`` exists; the authors' code cannot represent the
        model; PyTorch, which writes the adapter's file, is not installed.
    """
    with new_folder(to) as folder:
        saved = open_model(checkpoint)
        fusion = saved.description.fusion
        if fusion is None:
            raise UserError(f"{checkpoint} holds no fusion to export.")
        taps = _check_fusion(fusion, saved.description.vision)
        mappings = map_part(saved.shapes, "fusion/connector", MBTFSTF.tensor_names(fusion), {"": "model."})
        if adapter_only:
            stream = ExportStream(saved, mappings, dtype)
            _save_adapter(folder / ADAPTER, stream)
        else:
            model = require_complete(saved, checkpoint)
            refuse_schedule(saved, checkpoint)
            _check_llm(model.llm)
            if model.tiles is not None:
                raise UserError("The authors' code reads one square per image, not tiles: export this model as hf.")
            mappings |= map_part(saved.shapes, "vision", CLIP.tensor_names, _TOWER_PREFIX)
            mappings |= map_part(saved.shapes, "llm", LLAMA.tensor_names, {"": ""})
            stream = ExportStream(saved, mappings, dtype)
            write_shards(folder, stream)
            config = _make_config(model, taps[0], dtype or widest_dtype(saved))
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            _save_tokenizer(model.tokenizer, folder, config, stream.report["notes"])
        stream.save_report(folder)
    return stream.report


def _check_fusion(fusion: FusionConfig, vision: VisionConfig | None) -> tuple[int, ...]:
    """Returns the taps. Raises UserError for a fusion that the authors' code does not compute."""
    tower = vision or VISION["clip-l-14-336"]
    taps = tapped_blocks(fusion, tower.layers)
    width = tower.width if vision else fusion.mbtf_width  # the eight tensors alone come without a tower
    expected = {
        "fusion": (fusion.fusion, "mbtf_stf"),
        "variant": (fusion.variant, "code"),
        "kernel": (fusion.kernel, 2),
        "budgets": (fusion.budgets, ()),
        "taps": (taps, (taps[0], *_TAPS)),
        "mbtf_hidden": (fusion.mbtf_hidden or 4 * width, 4 * width),
        "mbtf_width": (fusion.mbtf_width or width, width),
        "stf_hidden": (fusion.stf_hidden or 16 * width, 16 * width),
        "vision layers": (tower.layers, 24),
    }
    problems = [f"{key} is {value}, not {fixed}" for key, (value, fixed) in expected.items() if value != fixed]
    if find_tower_class(tower) is not VisionTower or not (tower.class_token and tower.pre_norm):
        problems.append("the vision tower is not CLIP's")
    if problems:
        raise UserError(
            f"The authors' code does not support this model ({'; '.join(problems)}): export it as hf instead."
        )
    return taps


def _check_llm(llm: LLMConfig) -> None:
    if find_decoder_class(llm) is not Decoder or llm.qkv_bias or llm.qk_norm or llm.head_dim * llm.heads != llm.width:
        raise UserError("The authors' code supports no language model but Llama: export this one as hf instead.")
    if llm.rope_scaling is not None and llm.rope_scaling.kind != "linear":
        raise UserError(
            f"The authors' code supports no {llm.rope_scaling.kind} positions: export this model as hf instead."
        )


def _save_adapter(file: pathlib.Path, stream: ExportStream) -> None:
    try:
        import torch
    except ImportError:
        raise UserError(f"{file.name} is a torch pickle: install torch to write it.") from None

    def to_torch(value: np.ndarray) -> torch.Tensor:
        if value.dtype.name == "bfloat16":  # which torch.from_numpy does not read
            return torch.from_numpy(value.view("uint16")).view(torch.bfloat16)
        return torch.from_numpy(value)

    torch.save({name: to_torch(value) for name, value in stream}, file)


def _make_config(model: CompleteModel, tap: int, dtype: str) -> dict[str, Any]:
    """Returns the authors' ``config.json``: transformers 4.37's keys for a Llama, and LLaVA's keys."""
    llm, tokenizer = model.llm, load_tokenizer(str(model.tokenizer))
    scaling = llm.rope_scaling
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        **{key: getattr(llm, field) for field, key in LLAMA.fields.items() if field != "head_dim"},
        **LLAMA.required,
        **dict.fromkeys(LLAMA.asks.values(), False),
        "rope_theta": llm.rope_theta,
        "rope_scaling": {"type": "linear", "factor": scaling.factor} if scaling else None,
        LLAMA.length: max_positions(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.unk_token_id,
        "torch_dtype": dtype,
        "use_cache": True,
        "mm_vision_tower": _TOWERS.get((model.vision.image_size, model.vision.width), ""),
        "mm_vision_select_layer": tap - model.vision.layers - 1,
        "mm_vision_select_feature": "patch",
        "mm_hidden_size": model.vision.width,
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "mm_projector_lr": None,
        "image_aspect_ratio": model.aspect,
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": max_positions(tokenizer),
    }


def _save_tokenizer(source: pathlib.Path, folder: pathlib.Path, config: dict[str, Any], notes: list[str]) -> None:
    """Saves the tokenizer for the authors' code, which reads only the SentencePiece file."""
    if not config["mm_vision_tower"]:
        notes.append("config.json has no mm_vision_tower: set it to a folder with the tower.")
    if not (source / SENTENCEPIECE).is_file():
        notes.append(f"There is no {SENTENCEPIECE} in {source}: copy the language model's file to the export.")
        return
    shutil.copyfile(source / SENTENCEPIECE, folder / SENTENCEPIECE)
    values = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": not prefixes_only_start(load_tokenizer(str(source))),
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["tokenizer_model_max_length"],
        "padding_side": "right",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(values, indent=2) + "\n")
