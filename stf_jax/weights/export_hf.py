"""Exports a model for PyTorch: a folder that transformers loads, with the code that it needs.

Models with LLaVA's plain projector become an ordinary ``LlavaForConditionalGeneration``, with the tensor names of hub
files, which every release reads. Other fusions need the classes in weights/torch_package, which are copied to the
folder. Both come with adapters for lmms-eval and VLMEvalKit.
"""

import itertools
import json
import pathlib
import shutil
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from tokenizers import AddedToken, decoders
from transformers import PreTrainedTokenizerFast

from stf_jax.config import UserError
from stf_jax.data.conversation import (
    CHATS,
    SYSTEM_PLACEHOLDER,
    Chat,
    Control,
    Item,
    Mark,
    Text,
    check_template,
    initial_tokens,
    stop_tokens,
    strip_space_prefix,
)
from stf_jax.data.records import IMAGE_MARK
from stf_jax.data.sentencepieces import SPACE
from stf_jax.data.tokenizer import BOS_IN_TEMPLATE, load_tokenizer, max_positions, prefixes_only_start, untrained_tokens
from stf_jax.models.baselines import DEPTHS
from stf_jax.models.fusion import tapped_blocks, tokens_per_image
from stf_jax.models.llm import LLMConfig
from stf_jax.models.vit import VisionConfig
from stf_jax.weights import hf
from stf_jax.weights.detect import VOCABULARY
from stf_jax.weights.exports import ExportStream, map_part, require_complete, widest_dtype
from stf_jax.weights.folder import new_folder
from stf_jax.weights.hf import TensorMapping
from stf_jax.weights.model import Description, SavedModel, open_model
from stf_jax.weights.shards import write_shards

PACKAGE = pathlib.Path(__file__).parent / "torch_package"
_MODEL_CODE = ("configuration_stf.py", "modeling_stf.py", "processing_stf.py")
_EVALUATION_CODE = ("lmms_eval_stf/lmms_eval_stf.py", "lmms_eval_stf/pyproject.toml", "vlmevalkit_stf.py")
_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
_IMAGES = "{%- for part in message.content if part is not string and part.type == 'image' -%}"
# A literal <image> in the text of a part is not an image: it is dropped, as in training.
_TEXT = (
    "{%- if message.content is string -%}{%- set text = message.content -%}{%- else -%}"
    "{%- set said = namespace(text='') -%}{%- for part in message.content if part.type == 'text' -%}"
    "{%- set said.text = said.text + part.text -%}{%- endfor -%}"
    "{%- set text = said.text | replace('" + IMAGE_MARK + "', '') -%}{%- endif -%}"
)
_TRIMMED = _TEXT + "{%- set text = text | trim -%}"
_NO_SYSTEM = '{{ raise_exception("This model was trained without system messages.") }}'


def make_chat_template(template: str, gap: str = "") -> str:
    """Returns the Jinja template for apply_chat_template; empty system messages are ignored, as in training.

    ``gap`` is a space that the template writes where a text starts or continues after an image, for tokenizers that add
    none there (see :func:`_save_tokenizer`).
    """
    return _make_chat(CHATS[template], gap) if template in CHATS else _make_plain(gap)


def _make_chat(chat: Chat, gap: str) -> str:
    begins_as_text = isinstance((*chat.start, *chat.before_question)[0], Text)
    answer_gap = gap if isinstance(chat.before_answer[0], Text) else ""
    return (
        _render([Text(gap)] * (bool(gap) and begins_as_text))
        + "{%- set system = '' -%}{%- if messages[0].role == 'system' -%}{%- set message = messages[0] -%}" + _TRIMMED
        + "{%- set system = text -%}{%- set messages = messages[1:] -%}{%- endif -%}"
        "{%- if system -%}" + _render(chat.start_with_system) + "{%- else -%}" + _render(chat.start) + "{%- endif -%}"
        "{%- for message in messages -%}" + _TRIMMED + "{%- if message.role == 'user' -%}"
        "{%- if not (system and loop.first) -%}" + _render(chat.before_question) + "{%- endif -%}"
        + _IMAGES + _render([Text(IMAGE_MARK)]) + "{%- if text or not loop.last -%}" + _render([Text(gap + "\n")])
        + ("{%- else -%}" + _render([Text(answer_gap)]) if answer_gap else "")
        + "{%- endif -%}{%- endfor -%}{{ text }}"
        "{%- if add_generation_prompt or not loop.last -%}" + _render(chat.before_answer) + "{%- endif -%}"
        "{%- else -%}" + _render([Text(chat.answer_space)]) + "{{ text }}" + _render(chat.after_answer)
        + "{%- endif -%}{%- endfor -%}"
    )  # fmt: skip


def _render(items: Sequence[Item]) -> str:
    """Returns Jinja that outputs the items, with the variable ``system`` for SYSTEM_PLACEHOLDER."""
    names: Mapping[Item, str] = {Mark.END: "eos_token", SYSTEM_PLACEHOLDER: "system"}
    values = []
    for item in items:
        if item in names:
            values.append(names[item])
        else:
            assert not isinstance(item, Mark)  # templates hold no other mark
            values.append(json.dumps(item.token if isinstance(item, Control) else item.text))
    return "{{ " + " + ".join(values) + " }}" if values else ""


def _make_plain(gap: str) -> str:
    """Returns the template of captions. A conversation without an image is a document: its texts are unchanged."""
    space = _render([Text(gap)]) if gap else ""
    return (
        "{%- if messages[0].role == 'system' -%}" + _NO_SYSTEM + "{%- endif -%}"
        "{%- set shown = namespace(any=false) -%}{%- for message in messages -%}" + _IMAGES
        + "{%- set shown.any = true -%}{%- endfor -%}{%- endfor -%}"
        "{%- for message in messages -%}{%- if not shown.any -%}" + _TEXT
        + ("{%- if loop.first -%}" + space + "{%- endif -%}" if space else "") + "{{ text }}"
        "{%- elif message.role == 'user' -%}" + _IMAGES + _render([Text(IMAGE_MARK)]) + "{%- endfor -%}"
        "{%- else -%}" + _TRIMMED + space + "{{ text + '\\n' }}{%- endif -%}{%- endfor -%}"
    )  # fmt: skip


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
        require_complete(saved, checkpoint)
        model = saved.description
        assert model.vision is not None  # as require_complete checked, here and below
        assert model.fusion is not None
        assert model.llm is not None
        assert saved.tokenizer is not None
        grid = model.vision.grid
        count, taps = tokens_per_image(model.fusion, grid), tapped_blocks(model.fusion, model.vision.layers)
        tokenizer = _load_tokenizer(saved.tokenizer, model)
        has_bos = initial_tokens(tokenizer) == [tokenizer.bos_token_id]
        image_id = tokenizer.convert_tokens_to_ids(IMAGE_MARK)
        assert isinstance(image_id, int)  # the id of one token
        config: dict[str, Any] = {
            "vision_config": vision_config_values(model.vision),
            "text_config": text_config_values(model.llm, tokenizer),
            "image_aspect_ratio": model.aspect,
            "conversation_template": model.template,
            "tie_word_embeddings": model.llm.tied,
            "dtype": dtype or widest_dtype(saved),
        }
        stream = ExportStream(saved, _map_tensors(saved), dtype)
        rows = max(image_id + 1, model.llm.vocab)
        config["text_config"]["vocab_size"] = rows
        if rows != model.llm.vocab:
            config["stf_vocab"] = model.llm.vocab  # further rows exist only for <image>
        tensors = _with_image_row(stream, rows)
        if model.fusion.fusion == "mlp":
            write_shards(folder, itertools.chain(tensors, _unused_norm(model, config["dtype"])))
            processor = _complete_llava_config(config, model, taps[0], count, image_id)
        else:
            write_shards(folder, tensors)
            processor = _complete_stf_config(config, model, taps, count, image_id)
            processor["begin"] = tokenizer.bos_token if has_bos else ""
            _copy_code(_MODEL_CODE, folder)
        _copy_code(_EVALUATION_CODE, folder)
        space = CHATS[model.template].answer_space if model.template in CHATS else ""
        _save_tokenizer(tokenizer, folder, model.template, has_bos, space)
        _write_json(folder / "config.json", config)
        _write_json(folder / "processor_config.json", {**processor, "image_token": IMAGE_MARK})
        _write_json(folder / "preprocessor_config.json", _image_processor(model))
        ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "pad_token_id")}
        ids["eos_token_id"] = list(stop_tokens(model.template, tokenizer))
        if suppressed := untrained_tokens(tokenizer, config["text_config"]["vocab_size"]):
            ids["suppress_tokens"] = list(suppressed)
        _write_json(folder / "generation_config.json", ids)
        _write_readme(folder, model, count, config, checkpoint, saved.step)
        stream.save_report(folder)
    return stream.report


def vision_config_values(config: VisionConfig) -> dict[str, Any]:
    """Returns transformers' ``vision_config``. Raises UserError if the tower is neither CLIP's nor SigLIP's."""
    kinds = {(True, True, False): "clip_vision_model", (False, False, True): "siglip_vision_model"}
    kind = kinds.get((config.class_token, config.pre_norm, config.patch_bias))
    if kind is None:
        raise UserError(
            "The vision tower has neither CLIP's architecture nor SigLIP's, so transformers has no class for it."
        )
    values: dict[str, Any] = {
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


def text_config_values(config: LLMConfig, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Returns transformers' config of a decoder: Llama's, or Qwen2's or Qwen3's if it has their biases or norms.

    Rotary positions are given both for transformers 5 and for earlier releases.
    """
    if config.qkv_bias and config.qk_norm:
        raise UserError("The language model has both query biases and query norms: transformers has no class for it.")
    values: dict[str, Any] = {
        "model_type": "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama",
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": max_positions(tokenizer),
        "tie_word_embeddings": config.tied,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    scaling = config.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        rope = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
            rope |= {"original_max_position_embeddings": scaling.original_length}
        values["rope_scaling"] = rope
    return values | {"rope_theta": config.rope_theta, "rope_parameters": {**rope, "rope_theta": config.rope_theta}}


def _map_tensors(saved: SavedModel) -> dict[str, TensorMapping]:
    fusion = saved.description.fusion
    assert fusion is not None
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
    return {path: mapping for part in tables for path, mapping in map_part(saved, *part).items()}


def _complete_stf_config(
    config: dict[str, Any], model: Description, taps: tuple[int, ...], count: int, image_id: int
) -> dict[str, Any]:
    """Completes the config for our classes; returns the processor's config."""
    assert model.fusion is not None
    assert model.vision is not None
    fusion, width = model.fusion, model.vision.width
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
        "image_token_id": image_id,
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


def _complete_llava_config(
    config: dict[str, Any], model: Description, tap: int, count: int, image_id: int
) -> dict[str, Any]:
    """Completes the config for transformers' LLaVA; returns the processor's config."""
    assert model.vision is not None
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


def _unused_norm(model: Description, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the norm above the taps, which transformers' LLaVA declares but never uses."""
    assert model.vision is not None
    norm = "vision_tower.vision_model.post_layernorm."
    yield f"{norm}weight", np.ones(model.vision.width, jnp.dtype(dtype))
    yield f"{norm}bias", np.zeros(model.vision.width, jnp.dtype(dtype))


def _load_tokenizer(folder: pathlib.Path, model: Description) -> PreTrainedTokenizerFast:
    tokenizer = load_tokenizer(str(folder))
    check_template(model.template, tokenizer)
    tokenizer.add_tokens([AddedToken(IMAGE_MARK, normalized=False, special=True)], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def _save_tokenizer(
    tokenizer: PreTrainedTokenizerFast, folder: pathlib.Path, template: str, has_bos: bool, space: str
) -> None:
    """Writes the tokenizer such that rendering the chat template and tokenizing the text gives the tokens of training.

    If training has a BOS token (``has_bos``), the template writes it, because servers add none. The tokenizer then adds
    nothing, or transformers' processors would add a second one. Names of special tokens in a text become those tokens,
    as in every Hugging Face model. All releases read the same ``tokenizer.json``.

    SentencePiece's space goes before each piece between special tokens, as in training. If it goes only before the
    first piece and after images (``legacy: false``), a tokenizer cannot distinguish those pieces from others: the
    template then writes the space, and the tokenizer adds one only at the start of the text.
    """
    gap = strip_space_prefix(tokenizer)[1] if prefixes_only_start(tokenizer) else ""
    backend = tokenizer.backend_tokenizer
    if space and backend.decode(backend.encode(space + "a", add_special_tokens=False).ids).startswith(space):
        # The template's space before an answer is not part of the answer.
        backend.decoder = decoders.Sequence([backend.decoder, decoders.Strip(space, 1, 0)])
    tokenizer.chat_template = ("{{ bos_token }}" if has_bos else "") + make_chat_template(template, gap)
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    values = json.loads(file.read_bytes())
    for unwanted in ("backend", "is_local", "local_files_only", "split_special_tokens", BOS_IN_TEMPLATE):
        values.pop(unwanted, None)
    if isinstance(values.get("extra_special_tokens"), list):  # releases before 5 expect a dictionary there
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    values |= {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left"}
    values |= {"model_input_names": ["input_ids", "attention_mask"]} | ({BOS_IN_TEMPLATE: True} if has_bos else {})
    _write_json(file, values)

    file = folder / "tokenizer.json"
    values = json.loads(file.read_bytes())
    if has_bos:
        values["post_processor"] = None
    if gap:
        steps = (values["normalizer"] or {}).get("normalizers", [])
        values["normalizer"] = {"type": "Sequence", "normalizers": [s for s in steps if s["type"] == "Precompiled"]}
        values["pre_tokenizer"] = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
    else:
        pre_tokenizer = values["pre_tokenizer"] or {}
        for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer]):
            if step.get("type") == "Metaspace" and step["prepend_scheme"] == "first":
                step["prepend_scheme"] = "always"
    _write_json(file, values)


def _write_readme(
    folder: pathlib.Path,
    model: Description,
    count: int,
    config: Mapping[str, Any],
    checkpoint: epath.Path,
    step: int | None,
) -> None:
    """Writes ``README.md``: what the export is, how to use it and how to serve it."""
    text = string.Template((PACKAGE / "README.md").read_text())
    assert model.fusion is not None
    assert model.vision is not None
    plain = model.fusion.fusion == "mlp"
    values = {
        "architecture": config["architectures"][0],
        "code": "It needs no custom code." if plain else "Loading it runs its code (`*_stf.py`).",
        "template": model.template,
        "tokens": count,
        "dtype": config["dtype"],
        "source": f"`{checkpoint}`" + (f", step {step:,}" if step is not None else ""),
        "image_size": model.vision.image_size,
        "trust": "" if plain else ", trust_remote_code=True",
        "flag": "" if plain else " --trust-remote-code",
    }
    (folder / "README.md").write_text(text.substitute(values))


def _image_processor(model: Description) -> dict[str, Any]:
    """Returns the image processor's config, which matches data/image.py."""
    assert model.vision is not None
    size = model.vision.image_size
    square = {"height": size, "width": size}
    cropped = {"size": {"shortest_edge": size}, "do_center_crop": True, "crop_size": square}
    values: dict[str, Any]
    if model.aspect == "pad":
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


def _copy_code(names: Iterable[str], folder: pathlib.Path) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(PACKAGE / name, folder / name)  # without the file mode of the installation


def _write_json(file: pathlib.Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
