"""Saves the tokenizer of an export for PyTorch, with a chat template that gives the tokens of training."""

import json
import pathlib
from collections.abc import Mapping, Sequence

from etils import epath
from tokenizers import AddedToken, decoders
from transformers import PreTrainedTokenizerFast

from stf_jax.data.conversation import check_template, find_chat, strip_space_prefix
from stf_jax.data.records import IMAGE_MARK
from stf_jax.data.sentencepieces import SPACE
from stf_jax.data.tokenizer import BOS_IN_TEMPLATE, load_tokenizer, prefixes_only_start
from stf_jax.files import write_json
from stf_jax.models.decoders.chat import SYSTEM_PLACEHOLDER, Chat, Control, Item, Mark, Text


def load_export_tokenizer(folder: pathlib.Path, template: str) -> PreTrainedTokenizerFast:
    """Loads a model's tokenizer and adds ``<image>`` and a padding token.

    Raises UserError if it lacks a control token of the conversation template.
    """
    tokenizer = load_tokenizer(str(folder))
    check_template(template, tokenizer)
    tokenizer.add_tokens([AddedToken(IMAGE_MARK, normalized=False, special=True)], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def save_export_tokenizer(
    tokenizer: PreTrainedTokenizerFast, folder: pathlib.Path, template: str, has_bos: bool
) -> None:
    """Writes the tokenizer such that rendering the chat template and tokenizing the text gives the tokens of training.

    If training has a BOS token (``has_bos``), the template writes it, because servers add none. The tokenizer then adds
    nothing, or transformers' processors would add a second one. Names of special tokens in a text become those tokens,
    as in every Hugging Face model. All releases read the same ``tokenizer.json``.

    SentencePiece's space goes before each piece between special tokens, as in training. If it goes only before the
    first piece and after images (``legacy: false``), a tokenizer cannot distinguish those pieces from others: the
    template then writes the space, and the tokenizer adds one only at the start of the text.
    """
    chat = find_chat(template)
    space = chat.answer_space if chat else ""
    gap = strip_space_prefix(tokenizer)[1] if prefixes_only_start(tokenizer) else ""
    backend = tokenizer.backend_tokenizer
    if space and backend.decode(backend.encode(space + "a", add_special_tokens=False).ids).startswith(space):
        # The template's space before an answer is not part of the answer.
        backend.decoder = decoders.Sequence([backend.decoder, decoders.Strip(space, 1, 0)])
    tokenizer.chat_template = ("{{ bos_token }}" if has_bos else "") + make_chat_template(template, gap)
    tokenizer.save_pretrained(folder)
    file = epath.Path(folder, "tokenizer_config.json")
    values = json.loads(file.read_bytes())
    for unwanted in ("backend", "is_local", "local_files_only", "split_special_tokens", BOS_IN_TEMPLATE):
        values.pop(unwanted, None)
    if isinstance(values.get("extra_special_tokens"), list):  # releases before 5 expect a dictionary there
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    values |= {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left"}
    values |= {"model_input_names": ["input_ids", "attention_mask"]} | ({BOS_IN_TEMPLATE: True} if has_bos else {})
    write_json(file, values)

    file = epath.Path(folder, "tokenizer.json")
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
    write_json(file, values)


# ---- Chat templates --------------------------------------------------------------------------------------------------

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
    none there (see :func:`save_export_tokenizer`).
    """
    chat = find_chat(template)
    return _make_chat(chat, gap) if chat else _make_plain(gap)


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
