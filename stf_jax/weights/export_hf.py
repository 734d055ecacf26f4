"""A model for PyTorch: a folder that transformers loads, with the code it needs beside the weights.

A fusion other than LLaVA's plain projector takes the classes of weights/torch_package, which are copied along. The
plain projector makes an ordinary ``LlavaForConditionalGeneration``, under the tensor names that its hub files have and
every release reads. Either brings along what lmms-eval and VLMEvalKit ask it through.
"""

import itertools
import json
import pathlib
import shutil
import string
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from tokenizers import AddedToken, decoders
from transformers import PreTrainedTokenizerFast

from stf_jax.config import UserError
from stf_jax.data.conversation import (
    CHATS,
    OWN_SYSTEM,
    Control,
    Item,
    Mark,
    Text,
    begin_tokens,
    check_template,
    stop_tokens,
    without_prefix,
)
from stf_jax.data.records import IMAGE_MARK
from stf_jax.data.sentencepieces import SPACE
from stf_jax.data.tokenizer import BOS_IN_TEMPLATE, load_tokenizer, positions, prefixes_once, unsayable
from stf_jax.models.fusion import tapped_blocks, tokens_per_image
from stf_jax.models.llm import LLMConfig
from stf_jax.models.rivals import DEPTHS
from stf_jax.models.vit import VisionConfig
from stf_jax.weights import hf
from stf_jax.weights.exports import Tensors, part_places, whole, widest_dtype
from stf_jax.weights.folder import new_folder
from stf_jax.weights.hf import Place
from stf_jax.weights.model import Description, SavedModel, open_model
from stf_jax.weights.recognise import VOCABULARY
from stf_jax.weights.shards import write_shards

PACKAGE = pathlib.Path(__file__).parent / "torch_package"
_MODEL_CODE = ("configuration_stf.py", "modeling_stf.py", "processing_stf.py")
_EVALUATION_CODE = ("lmms_eval_stf/lmms_eval_stf.py", "lmms_eval_stf/pyproject.toml", "vlmevalkit_stf.py")
_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
_IMAGES = "{%- for part in message.content if part is not string and part.type == 'image' -%}"
# In parts, an <image> that is written out is no image: dropped, as training drops it.
_TEXT = (
    "{%- if message.content is string -%}{%- set text = message.content -%}{%- else -%}"
    "{%- set said = namespace(text='') -%}{%- for part in message.content if part.type == 'text' -%}"
    "{%- set said.text = said.text + part.text -%}{%- endfor -%}"
    "{%- set text = said.text | replace('" + IMAGE_MARK + "', '') -%}{%- endif -%}"
)
_TRIMMED = _TEXT + "{%- set text = text | trim -%}"
_NO_SYSTEM = '{{ raise_exception("This model was trained without system messages.") }}'


def chat_template(template: str, gap: str = "") -> str:
    """The template for transformers' apply_chat_template, in Jinja; an empty system message is none, as in training.

    ``gap``: a space that the template has to write where a text starts, or goes on after an image, for a tokenizer that
    puts none there (see :func:`_save_tokenizer`).
    """
    return _chat(CHATS[template], gap) if template in CHATS else _plain(gap)


def _chat(chat, gap):
    begins_as_text = isinstance((*chat.begin, *chat.ask)[0], Text)
    before_reply = gap if isinstance(chat.reply[0], Text) else ""
    return (
        _shown([Text(gap)] * (bool(gap) and begins_as_text))
        + "{%- set system = '' -%}{%- if messages[0].role == 'system' -%}{%- set message = messages[0] -%}" + _TRIMMED
        + "{%- set system = text -%}{%- set messages = messages[1:] -%}{%- endif -%}"
        "{%- if system -%}" + _shown(chat.opening) + "{%- else -%}" + _shown(chat.begin) + "{%- endif -%}"
        "{%- for message in messages -%}" + _TRIMMED + "{%- if message.role == 'user' -%}"
        "{%- if not (system and loop.first) -%}" + _shown(chat.ask) + "{%- endif -%}"
        + _IMAGES + _shown([Text(IMAGE_MARK)]) + "{%- if text or not loop.last -%}" + _shown([Text(gap + "\n")])
        + ("{%- else -%}" + _shown([Text(before_reply)]) if before_reply else "")
        + "{%- endif -%}{%- endfor -%}{{ text }}"
        "{%- if add_generation_prompt or not loop.last -%}" + _shown(chat.reply) + "{%- endif -%}"
        "{%- else -%}" + _shown([Text(chat.space)]) + "{{ text }}" + _shown(chat.end) + "{%- endif -%}{%- endfor -%}"
    )  # fmt: skip


def _shown(items: Sequence[Item]) -> str:
    """Jinja that says the items, its variable ``system`` in the place of OWN_SYSTEM."""
    names = {Mark.END: "eos_token", OWN_SYSTEM: "system"}
    said = [names.get(item) or json.dumps(item.token if isinstance(item, Control) else item.text) for item in items]
    return "{{ " + " + ".join(said) + " }}" if said else ""


def _plain(gap):
    """Without an image, a conversation is a document: its texts as they stand."""
    space = _shown([Text(gap)]) if gap else ""
    return (
        "{%- if messages[0].role == 'system' -%}" + _NO_SYSTEM + "{%- endif -%}"
        "{%- set shown = namespace(any=false) -%}{%- for message in messages -%}" + _IMAGES
        + "{%- set shown.any = true -%}{%- endfor -%}{%- endfor -%}"
        "{%- for message in messages -%}{%- if not shown.any -%}" + _TEXT
        + ("{%- if loop.first -%}" + space + "{%- endif -%}" if space else "") + "{{ text }}"
        "{%- elif message.role == 'user' -%}" + _IMAGES + _shown([Text(IMAGE_MARK)]) + "{%- endfor -%}"
        "{%- else -%}" + _TRIMMED + space + "{{ text + '\\n' }}{%- endif -%}{%- endfor -%}"
    )  # fmt: skip


def export_hf(checkpoint: pathlib.Path, to: pathlib.Path, dtype: str = "") -> dict[str, Any]:
    """Writes a folder for ``AutoModelForImageTextToText`` and ``AutoProcessor``; it appears when it is complete.

    Args:
      checkpoint: workdir of a run, or a folder of imported weights.
      to: the folder to write; it must not exist.
      dtype: the type to cast values to; empty: each keeps its own, and the config names the widest.

    Returns:
      The report of :class:`stf_jax.weights.exports.Tensors`.

    Raises:
      UserError: a checkpoint that cannot be read or lacks a part; ``to`` exists; a model that transformers' classes
        cannot hold.
    """
    with new_folder(to) as folder:
        saved = open_model(checkpoint)
        whole(saved, checkpoint)
        what = saved.description
        grid = what.vision.grid
        count, taps = tokens_per_image(what.fusion, grid), tapped_blocks(what.fusion, what.vision.layers)
        tokenizer = _tokenizer(saved.tokenizer, what)
        begun = begin_tokens(tokenizer) == [tokenizer.bos_token_id]
        mark = tokenizer.convert_tokens_to_ids(IMAGE_MARK)
        config = {
            "vision_config": vision_values(what.vision),
            "text_config": text_values(what.llm, tokenizer),
            "image_aspect_ratio": what.aspect,
            "conversation_template": what.template,
            "tie_word_embeddings": what.llm.tied,
            "dtype": dtype or widest_dtype(saved),
        }
        tensors = Tensors(saved, _places(saved), dtype)
        rows = max(mark + 1, what.llm.vocab)
        config["text_config"]["vocab_size"] = rows
        if rows != what.llm.vocab:
            config["stf_vocab"] = what.llm.vocab  # rows beyond are for <image> alone
        named = _with_image_row(tensors, rows)
        if what.fusion.fusion == "mlp":
            write_shards(folder, itertools.chain(named, _unread_norm(what, config["dtype"])))
            processor = _plain_config(config, what, taps[0], count, mark)
        else:
            write_shards(folder, named)
            processor = _stf_config(config, what, taps, count, mark)
            processor["begin"] = tokenizer.bos_token if begun else ""
            _copy_code(_MODEL_CODE, folder)
        _copy_code(_EVALUATION_CODE, folder)
        space = CHATS[what.template].space if what.template in CHATS else ""
        _save_tokenizer(tokenizer, folder, what.template, begun, space)
        _write(folder / "config.json", config)
        _write(folder / "processor_config.json", {**processor, "image_token": IMAGE_MARK})
        _write(folder / "preprocessor_config.json", _pixels(what))
        ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "pad_token_id")}
        ids["eos_token_id"] = list(stop_tokens(what.template, tokenizer))
        if never := unsayable(tokenizer, config["text_config"]["vocab_size"]):
            ids["suppress_tokens"] = list(never)
        _write(folder / "generation_config.json", ids)
        _write_readme(folder, what, count, config, checkpoint, saved.step)
        tensors.save_report(folder)
    return tensors.report


def vision_values(config: VisionConfig) -> dict[str, Any]:
    """transformers' ``vision_config`` of a tower. Raises UserError for one that is neither CLIP's nor SigLIP's."""
    kinds = {(True, True, False): "clip_vision_model", (False, False, True): "siglip_vision_model"}
    kind = kinds.get((config.class_token, config.pre_norm, config.patch_bias))
    if kind is None:
        raise UserError(
            "The vision tower is neither of CLIP's form nor of SigLIP's, so transformers has no class for it."
        )
    values = {
        "model_type": kind,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp,
        "hidden_act": _ACTIVATIONS[config.activation],
        "layer_norm_eps": config.norm_eps,
    }
    return values | ({"vision_use_head": False} if kind == "siglip_vision_model" else {})


def text_values(config: LLMConfig, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """transformers' config of a decoder: Llama's, or Qwen2's or Qwen3's where it has their biases or norms.

    Rotary positions are given both as transformers 5 reads them and as releases before it do.
    """
    if config.qkv_bias and config.qk_norm:
        raise UserError("The language model has both query biases and query norms: transformers has no class for it.")
    values = {
        "model_type": "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama",
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": positions(tokenizer),
        "tie_word_embeddings": config.tied,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    scaling = config.rope_scaling
    rope = {"rope_type": "default"}
    if scaling is not None:
        rope = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
            rope |= {"original_max_position_embeddings": scaling.original_length}
        values["rope_scaling"] = rope
    return values | {"rope_theta": config.rope_theta, "rope_parameters": {**rope, "rope_theta": config.rope_theta}}


def _places(saved: SavedModel) -> dict[str, Place]:
    fusion = saved.description.fusion
    if fusion.fusion == "mlp":
        prefixes = ({"": "vision_tower.vision_model."}, {"": "multi_modal_projector."}, {"": "language_model."})
        table = hf.LLAVA_HF
    else:
        prefixes = (
            {"": "model.vision_tower."},
            {"": "model."},
            {"model.": "model.language_model.", "lm_head.": "lm_head."},
        )
        table = hf.fusion_table(fusion)
    tables = zip(("vision", "fusion", "llm"), (hf.VISION, table, hf.DECODER), prefixes, strict=True)
    return {path: place for each in tables for path, place in part_places(saved, *each).items()}


def _stf_config(config, what, taps, count, mark):
    """Completes the config for our classes; gives the processor's."""
    fusion, width = what.fusion, what.vision.width
    mixes, merges = fusion.fusion.startswith("mbtf"), fusion.fusion.endswith("stf")
    window = ((mixes and fusion.mbtf_width) or width) * fusion.kernel**2
    config |= {
        "model_type": "llava_stf",
        "architectures": ["LlavaSTFForConditionalGeneration"],
        "auto_map": {
            "AutoConfig": "configuration_stf.LlavaSTFConfig",
            "AutoModel": "modeling_stf.LlavaSTFModel",
            "AutoModelForImageTextToText": "modeling_stf.LlavaSTFForConditionalGeneration",
        },
        "image_token_id": mark,
        "stf_config": {
            "fusion": fusion.fusion,
            "taps": list(taps),
            "kernel": fusion.kernel,
            "mbtf_hidden": fusion.mbtf_hidden or mixes * len(taps) * width // 2,
            "mbtf_width": fusion.mbtf_width or mixes * width,
            "stf_hidden": fusion.stf_hidden or merges * 4 * window,
            "depth": fusion.depth or DEPTHS.get(fusion.fusion, 0),
            "variant": fusion.variant,
            "pad_grid": fusion.pad_grid,
        },
    }
    return {
        "processor_class": "LlavaSTFProcessor",
        "auto_map": {"AutoProcessor": "processing_stf.LlavaSTFProcessor"},
        "num_image_tokens": count,
    }


def _plain_config(config, what, tap, count, mark):
    """Completes the config for transformers' LLaVA; gives the processor's."""
    strategy = "default" if what.vision.class_token else "full"
    config |= {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": mark,
        "image_seq_length": count,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": tap - what.vision.layers - 1,
        "vision_feature_select_strategy": strategy,
    }
    return {
        "processor_class": "LlavaProcessor",
        "patch_size": what.vision.patch_size,
        "vision_feature_select_strategy": strategy,
        "num_additional_image_tokens": int(what.vision.class_token),
    }


def _with_image_row(tensors: Tensors, rows: int) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors, with so many rows in the vocabulary: servers look ``<image>`` up before its tokens take its place.

    A new row is the mean of the others, so that its logit is never the largest.
    """
    wide = {name for path, place in tensors.places.items() if path in VOCABULARY for name in place.names}
    for name, value in tensors:
        if name in wide and len(value) < rows:
            mean = value.mean(0, dtype=np.float32).astype(value.dtype)
            value = np.concatenate([value, np.broadcast_to(mean, (rows - len(value), len(mean)))])
        yield name, value


def _unread_norm(what: Description, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """The norm above the taps, which transformers' LLaVA has and never reads."""
    norm = "vision_tower.vision_model.post_layernorm."
    yield f"{norm}weight", np.ones(what.vision.width, jnp.dtype(dtype))
    yield f"{norm}bias", np.zeros(what.vision.width, jnp.dtype(dtype))


def _tokenizer(folder: pathlib.Path, what: Description) -> PreTrainedTokenizerFast:
    tokenizer = load_tokenizer(str(folder))
    check_template(what.template, tokenizer)
    tokenizer.add_tokens([AddedToken(IMAGE_MARK, normalized=False, special=True)], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def _save_tokenizer(
    tokenizer: PreTrainedTokenizerFast, folder: pathlib.Path, template: str, begun: bool, space: str
) -> None:
    """Writes the tokenizer so that whoever renders the chat template and tokenises the text asks as training did.

    The template says the BOS itself where training had one (``begun``), for servers add none; so the tokenizer adds
    nothing, or transformers' processors would say it twice. Special tokens in a text are those tokens, as in every
    model of Hugging Face. Any release reads ``tokenizer.json`` as it stands.

    SentencePiece's space goes before each piece between special tokens, as training puts it. Where it goes only before
    the first and before what follows an image (``legacy: false``), no tokenizer can tell those pieces from others: the
    template writes the space, and the tokenizer puts one at the very start alone.
    """
    gap = without_prefix(tokenizer)[1] if prefixes_once(tokenizer) else ""
    backend = tokenizer.backend_tokenizer
    if space and backend.decode(backend.encode(space + "a", add_special_tokens=False).ids).startswith(space):
        # The space that the template teaches before an answer is not part of the answer.
        backend.decoder = decoders.Sequence([backend.decoder, decoders.Strip(space, 1, 0)])
    tokenizer.chat_template = ("{{ bos_token }}" if begun else "") + chat_template(template, gap)
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    values = json.loads(file.read_bytes())
    for unwanted in ("backend", "is_local", "local_files_only", "split_special_tokens", BOS_IN_TEMPLATE):
        values.pop(unwanted, None)
    if isinstance(values.get("extra_special_tokens"), list):  # which releases before 5 take for a dictionary
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    values |= {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left"}
    values |= {"model_input_names": ["input_ids", "attention_mask"]} | ({BOS_IN_TEMPLATE: True} if begun else {})
    _write(file, values)

    file = folder / "tokenizer.json"
    values = json.loads(file.read_bytes())
    if begun:
        values["post_processor"] = None
    if gap:
        steps = (values["normalizer"] or {}).get("normalizers", [])
        values["normalizer"] = {"type": "Sequence", "normalizers": [s for s in steps if s["type"] == "Precompiled"]}
        values["pre_tokenizer"] = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
    else:
        before = values["pre_tokenizer"] or {}
        for step in before.get("pretokenizers", [before]):
            if step.get("type") == "Metaspace" and step["prepend_scheme"] == "first":
                step["prepend_scheme"] = "always"
    _write(file, values)


def _write_readme(folder, what, count, config, checkpoint, step):
    """``README.md``: what the export is, how to ask it and how to serve it."""
    text = string.Template((PACKAGE / "README.md").read_text())
    plain = what.fusion.fusion == "mlp"
    values = {
        "architecture": config["architectures"][0],
        "code": "No code of its own is needed." if plain else "Its code (`*_stf.py`) is run.",
        "template": what.template,
        "tokens": count,
        "dtype": config["dtype"],
        "source": f"`{checkpoint}`" + (f", step {step:,}" if step is not None else ""),
        "image_size": what.vision.image_size,
        "trust": "" if plain else ", trust_remote_code=True",
        "flag": "" if plain else " --trust-remote-code",
    }
    (folder / "README.md").write_text(text.substitute(values))


def _pixels(what: Description) -> dict[str, Any]:
    """How the tower's images are prepared, as data/image.py does."""
    size = what.vision.image_size
    square = {"height": size, "width": size}
    cropped = {"size": {"shortest_edge": size}, "do_center_crop": True, "crop_size": square}
    if what.aspect == "pad":
        values = {"image_processor_type": "LlavaImageProcessor", "do_pad": True, **cropped}
    elif what.vision.crops:
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
        "image_mean": list(what.vision.mean),
        "image_std": list(what.vision.std),
    }


def _copy_code(names, folder):
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(PACKAGE / name, folder / name)  # not with its mode, which is the installation's


def _write(file, values):
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
