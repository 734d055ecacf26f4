"""A model for the authors' own code (visresearch/LLaVA-STF): their tensor names and their config keys.

Their program has the shape of the fusion written into it, so a model of another shape is refused: eight taps of 24
blocks (the deepest may be chosen, the others are blocks 21, 18, …, 3), MBTF 8C → 4C → C, windows of 2×2, and STF
4C → 16C → D.
"""

import json
import pathlib
import shutil
from typing import Any

from stf_jax.config import UserError
from stf_jax.data.tokenizer import SENTENCEPIECE, load_tokenizer, positions, prefixes_once
from stf_jax.models.fusion import tapped_blocks
from stf_jax.models.presets import VISION
from stf_jax.weights import hf
from stf_jax.weights.exports import Tensors, part_places, whole, widest_dtype
from stf_jax.weights.folder import new_folder
from stf_jax.weights.model import Description, open_model
from stf_jax.weights.shards import write_shards

ADAPTER = "mm_projector.bin"  # what their first stage leaves
_TAPS = (21, 18, 15, 12, 9, 6, 3)  # below the deepest
_TOWERS = {  # by pixels a side and width
    (336, 1024): "openai/clip-vit-large-patch14-336",
    (224, 1024): "openai/clip-vit-large-patch14",
}
_TOWER_PREFIX = {"": "model.vision_tower.vision_tower.vision_model."}


def export_llava_stf(
    checkpoint: pathlib.Path, to: pathlib.Path, dtype: str = "", adapter_only: bool = False
) -> dict[str, Any]:
    """Writes a folder that their ``load_pretrained_model`` reads; it appears when it is complete.

    Args:
      checkpoint: workdir of a run, or a folder of imported weights.
      to: the folder to write; it must not exist.
      dtype: the type to cast values to; empty: each keeps its own.
      adapter_only: only MBTF and STF, eight tensors, as their ``--pretrain_mm_mlp_adapter`` takes them.

    Returns:
      The report of :class:`stf_jax.weights.exports.Tensors`.

    Raises:
      UserError: a checkpoint that cannot be read or lacks a part; ``to`` exists; a model that their code has no room
        for; PyTorch, which alone writes the adapter's file, is not installed.
    """
    with new_folder(to) as folder:
        saved = open_model(checkpoint)
        what = saved.description
        if what.fusion is None:
            raise UserError(f"{checkpoint} holds no fusion to export.")
        taps = _checked_taps(what)
        found = part_places(saved, "fusion", hf.fusion_table(what.fusion), {"": "model."})
        if adapter_only:
            tensors = Tensors(saved, found, dtype)
            _save_adapter(folder / ADAPTER, tensors)
        else:
            whole(saved, checkpoint)
            _check_llm(what)
            found |= part_places(saved, "vision", hf.VISION, _TOWER_PREFIX)
            found |= part_places(saved, "llm", hf.DECODER, {"": ""})
            tensors = Tensors(saved, found, dtype)
            write_shards(folder, tensors)
            config = _config(what, taps[0], dtype or widest_dtype(saved), saved.tokenizer)
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            _save_tokenizer(saved.tokenizer, folder, config, tensors.report["notes"])
        tensors.save_report(folder)
    return tensors.report


def _checked_taps(what: Description) -> tuple[int, ...]:
    """The taps. Raises UserError for a fusion other than the one that their code computes."""
    fusion, tower = what.fusion, what.vision or VISION["clip-l-14-336"]
    taps = tapped_blocks(fusion, tower.layers)
    width = tower.width if what.vision else fusion.mbtf_width  # the eight tensors alone have no tower beside them
    wanted = {
        "fusion": (fusion.fusion, "mbtf_stf"),
        "variant": (fusion.variant, "code"),
        "kernel": (fusion.kernel, 2),
        "taps": (taps, (taps[0], *_TAPS)),
        "mbtf_hidden": (fusion.mbtf_hidden or 4 * width, 4 * width),
        "mbtf_width": (fusion.mbtf_width or width, width),
        "stf_hidden": (fusion.stf_hidden or 16 * width, 16 * width),
        "vision layers": (tower.layers, 24),
    }
    wrong = [f"{key} is {value}, not {theirs}" for key, (value, theirs) in wanted.items() if value != theirs]
    if not (tower.class_token and tower.pre_norm):
        wrong.append("the vision tower is not CLIP's")
    if wrong:
        raise UserError(f"The authors' code has no room for this model ({'; '.join(wrong)}): export it as hf instead.")
    return taps


def _check_llm(what: Description) -> None:
    llm = what.llm
    if llm.qkv_bias or llm.qk_norm or llm.head_dim * llm.heads != llm.width:
        raise UserError("The authors' code knows no language model but Llama: export this one as hf instead.")
    if llm.rope_scaling is not None and llm.rope_scaling.kind != "linear":
        raise UserError(f"The authors' code knows no {llm.rope_scaling.kind} positions: export this one as hf instead.")


def _save_adapter(file: pathlib.Path, tensors: Tensors) -> None:
    try:
        import torch
    except ImportError:
        raise UserError(f"{file.name} is a torch pickle: install torch to write it.") from None

    def to_torch(value):
        if value.dtype.name == "bfloat16":  # numpy has none of its own
            return torch.from_numpy(value.view("uint16")).view(torch.bfloat16)
        return torch.from_numpy(value)

    torch.save({name: to_torch(value) for name, value in tensors}, file)


def _config(what: Description, tap: int, dtype: str, tokenizer_folder: pathlib.Path) -> dict[str, Any]:
    """Their ``config.json``: transformers 4.37's of a Llama, and LLaVA's keys beside it."""
    llm, tokenizer = what.llm, load_tokenizer(str(tokenizer_folder))
    scaling = llm.rope_scaling
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "vocab_size": llm.vocab,
        "hidden_size": llm.width,
        "num_hidden_layers": llm.layers,
        "num_attention_heads": llm.heads,
        "num_key_value_heads": llm.kv_heads,
        "intermediate_size": llm.mlp,
        "hidden_act": "silu",
        "rms_norm_eps": llm.norm_eps,
        "rope_theta": llm.rope_theta,
        "rope_scaling": {"type": "linear", "factor": scaling.factor} if scaling else None,
        "attention_bias": False,
        "max_position_embeddings": positions(tokenizer),
        "tie_word_embeddings": llm.tied,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.unk_token_id,
        "torch_dtype": dtype,
        "use_cache": True,
        "mm_vision_tower": _TOWERS.get((what.vision.image_size, what.vision.width), ""),
        "mm_vision_select_layer": tap - what.vision.layers - 1,
        "mm_vision_select_feature": "patch",
        "mm_hidden_size": what.vision.width,
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "mm_projector_lr": None,
        "image_aspect_ratio": what.aspect,
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": positions(tokenizer),
    }


def _save_tokenizer(source: pathlib.Path, folder: pathlib.Path, config: dict[str, Any], notes: list[str]) -> None:
    """Their code reads the SentencePiece file alone, through transformers' slow tokenizer."""
    if not config["mm_vision_tower"]:
        notes.append("config.json names no mm_vision_tower: set it to a folder with the tower.")
    if not (source / SENTENCEPIECE).is_file():
        notes.append(f"There is no {SENTENCEPIECE} in {source}: put the language model's own beside the weights.")
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
        "legacy": not prefixes_once(load_tokenizer(str(source))),
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["tokenizer_model_max_length"],
        "padding_side": "right",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(values, indent=2) + "\n")
