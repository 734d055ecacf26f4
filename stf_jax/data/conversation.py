"""Conversations to token ids: the templates, which tokens are learned, and the slots of images.

A template turns a record into a list of items: spans of text, each learned or not, control tokens, places of
images, and ends of utterances. :func:`encode` makes ids of them. What is learned follows from the spans themselves,
so no second tokenisation can disagree with the first (LLaVA's "tokenization mismatch" cannot happen).
"""

import dataclasses
import enum
import functools
import itertools
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from stf_jax.config import UserError, did_you_mean
from stf_jax.data.records import IMAGE_MARK, BadRow, Record, Turn
from stf_jax.data.tokenizer import prefixes_once

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)  # Vicuna's, the prompt that its weights and LLaVA-1.5's were trained with

_MANY = 64  # texts that are worth waking the tokenizer's threads for


@dataclasses.dataclass(frozen=True)
class Text:
    """A span of text; whether the model learns to say it."""

    text: str
    learned: bool = False


@dataclasses.dataclass(frozen=True)
class Control:
    """One special token of the tokenizer, by its name; whether the model learns to say it."""

    token: str
    learned: bool = False


class Mark(enum.Enum):
    """What stands between spans of text."""

    IMAGE = "an image's slots"
    END = "the end-of-sequence token, learned"
    NEWLINE = "a newline that is a token of its own, learned"


Item = Text | Control | Mark
OWN_SYSTEM = Text("(the conversation's own system text)")  # stands for it in Chat.opening


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Token ids int32 [T], whether each is learned and whether it is an image slot, bool [T]."""

    tokens: np.ndarray
    learned: np.ndarray
    is_image: np.ndarray


@dataclasses.dataclass(frozen=True)
class Chat:
    """How a family of language models was taught to take turns.

    A conversation is ``begin`` and, a round, ``ask`` question ``reply`` answer ``end``, the answer and what of ``end``
    is learned. One with a system text of its own has ``opening`` instead of ``begin`` and the first ``ask``; an empty
    system text is none. A turn's images are moved to its front, each followed by a newline, as LLaVA does; behind the
    last, it goes with a question that is empty. Turns lose the white space at their ends, in training as in asking:
    LLaVA keeps it in turns without an image, and so teaches answers that a prompt as people type it never leads to.
    """

    ask: tuple[Item, ...]
    reply: tuple[Item, ...]
    end: tuple[Item, ...]
    opening: tuple[Item, ...]  # OWN_SYSTEM once in it
    begin: tuple[Item, ...] = ()
    space: str = ""  # before an answer, learned with it

    def __call__(self, turns: Sequence[Turn]) -> list[Item]:
        """The items of alternating turns; a conversation that ends with a question makes a prompt.

        A first turn by ``gpt`` is dropped, as LLaVA does (:func:`stf_jax.data.rows.read_row` reports it).
        """
        rounds = list(enumerate(turns, start=1))
        opening = (*self.begin, *self.ask)
        if rounds and turns[0].speaker == "system":
            (_, turn), *rounds = rounds
            if IMAGE_MARK in turn.text:
                raise BadRow("mark_in_answer", f"turn 1 is a system text that holds {IMAGE_MARK}")
            if text := turn.text.strip():
                opening = tuple(Text(text) if item is OWN_SYSTEM else item for item in self.opening)
        if rounds and rounds[0][1].speaker == "gpt":
            rounds = rounds[1:]
        items = []
        for i, (number, turn) in enumerate(rounds):
            if turn.speaker != ("human", "gpt")[i % 2]:
                raise BadRow("roles", f"turn {number} is by {turn.speaker!r}, but 'human' and 'gpt' must alternate")
            text = turn.text.replace(IMAGE_MARK, "").strip()
            if turn.speaker == "human":
                images = [Mark.IMAGE, Text("\n")] * turn.text.count(IMAGE_MARK)
                question = [*images, Text(text)] if text else images[:-1]
                items += [*(self.ask if i else opening), *question, *self.reply]
            elif IMAGE_MARK in turn.text:
                raise BadRow("mark_in_answer", f"turn {number} is an answer that holds {IMAGE_MARK}")
            else:
                items += [Text(self.space + text, learned=True), *self.end]
        return items


_TURN, _TURN_END = Control("<|im_start|>"), Control("<|im_end|>")
_HEADER, _HEADER_END, _EOT = Control("<|start_header_id|>"), Control("<|end_header_id|>"), Control("<|eot_id|>")
CHATS = {
    # Vicuna's, LLaVA's `v1`: SYSTEM USER: … ASSISTANT: …</s>USER: …
    "v1": Chat(
        begin=(Text(SYSTEM + " "),),
        opening=(OWN_SYSTEM, Text(" USER: ")),
        ask=(Text("USER: "),),
        reply=(Text(" ASSISTANT:"),),
        space=" ",
        end=(Mark.END,),
    ),
    # Meta's for Llama 3.
    "llama-3": Chat(
        opening=(
            *(_HEADER, Text("system"), _HEADER_END, Text("\n\n"), OWN_SYSTEM, _EOT),
            *(_HEADER, Text("user"), _HEADER_END, Text("\n\n")),
        ),
        ask=(_HEADER, Text("user"), _HEADER_END, Text("\n\n")),
        reply=(_EOT, _HEADER, Text("assistant"), _HEADER_END, Text("\n\n")),
        end=(Control("<|eot_id|>", learned=True),),
    ),
    # Qwen's and SmolLM2's.
    "chatml": Chat(
        begin=(_TURN, Text("system\nYou are a helpful assistant."), _TURN_END, Text("\n")),
        opening=(_TURN, Text("system\n"), OWN_SYSTEM, _TURN_END, Text("\n"), _TURN, Text("user\n")),
        ask=(_TURN, Text("user\n")),
        reply=(_TURN_END, Text("\n"), _TURN, Text("assistant\n")),
        end=(Control("<|im_end|>", learned=True), Text("\n")),
    ),
    # Mistral-Instruct's first, where a system text is the beginning of the first question.
    "mistral": Chat(
        opening=(Text("[INST] "), OWN_SYSTEM, Text("\n\n")),
        ask=(Text("[INST] "),),
        reply=(Text(" [/INST]"),),
        space=" ",
        end=(Mark.END,),
    ),
}


def plain(turns: Sequence[Turn]) -> list[Item]:
    """LLaVA's stage-1 template: ``<image>`` caption newline, the caption and the newline learned.

    The newline ends a caption, so it is one token whatever stands before it: Llama's vocabulary has it so, others would
    join it to a full stop. The instruction is dropped; without a caption after it, it makes a prompt. A record without
    an image is a document: its turns as they stand, the model's learned.
    """
    if turns and turns[0].speaker == "system":
        if turns[0].text.strip():
            raise BadRow("no_system", "template 'plain' has no place for a system text")
        turns = turns[1:]
    images = sum(turn.text.count(IMAGE_MARK) for turn in turns)
    if not images:
        return document(turns)
    if len(turns) > 2 or any(turn.speaker != "gpt" for turn in turns[1:]):
        raise BadRow("roles", "template 'plain' takes one instruction and one caption")
    caption = [item for turn in turns[1:] for item in (Text(turn.text.strip(), learned=True), Mark.NEWLINE)]
    return [Mark.IMAGE] * images + caption


def document(turns: Sequence[Turn]) -> list[Item]:
    """Turns as they stand, the model's learned, and images where they are marked: no template's words between."""
    items: list[Item] = []
    for turn in turns:
        for i, text in enumerate(turn.text.split(IMAGE_MARK)):
            items += [Mark.IMAGE] * (i > 0) + [Text(text, learned=turn.speaker == "gpt")] * bool(text)
    return items


TEMPLATES = {"plain": plain} | CHATS


def stop_tokens(template: str, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Ids that end an answer: the token that the template teaches as its end, and the tokenizer's end of sequence."""
    ends = (CHATS[template].end[0] if template in CHATS else Mark.NEWLINE, Mark.END)
    return tuple(dict.fromkeys(_id(end, tokenizer) for end in ends))


def check_template(template: str, tokenizer: PreTrainedTokenizerFast | None) -> None:
    """Raises UserError for an unknown template, or one with control tokens that the tokenizer, where given, lacks."""
    if template not in TEMPLATES:
        raise UserError(f"Unknown data.template={template!r}; {did_you_mean(template, TEMPLATES)}")
    chat = CHATS.get(template) if tokenizer is not None else None
    for item in (*chat.opening, *chat.begin, *chat.ask, *chat.reply, *chat.end) if chat else ():
        if isinstance(item, Control) and _id(item, tokenizer) in (None, tokenizer.unk_token_id):
            raise UserError(f"data.template={template!r} needs the token {item.token}, which the tokenizer lacks.")


def own_template(tokenizer: PreTrainedTokenizerFast) -> str:
    """The template that a tokenizer was made for, by its control tokens or its own chat template; else ``v1``."""
    known, chat = tokenizer.get_vocab(), tokenizer.chat_template
    for name in ("llama-3", "chatml"):
        items = (*CHATS[name].begin, *CHATS[name].ask, *CHATS[name].reply, *CHATS[name].end)
        if all(item.token in known for item in items if isinstance(item, Control)):
            return name
    return "mistral" if isinstance(chat, str) and "[INST]" in chat else "v1"


def check_rows(template: str, tokenizer: PreTrainedTokenizerFast, rows: int) -> None:
    """Raises UserError where every conversation would hold a token beyond that many rows of an embedding."""
    chat = CHATS.get(template)
    items = [item for item in (*chat.begin, *chat.ask, *chat.reply, *chat.end) if not _is_text(item)] if chat else []
    for token in (*encode(items, tokenizer, 0).tokens.tolist(), *stop_tokens(template, tokenizer)):
        if token >= rows:
            name = tokenizer.convert_ids_to_tokens(token)
            raise UserError(
                f"data.template={template!r} needs the token {name} (id {token}), for which the model's embedding of "
                f"{rows} rows has none: choose another template, or the tokenizer that the model was trained with."
            )


def check_ids(encoded: Encoded, tokenizer: PreTrainedTokenizerFast, rows: int, name: str) -> None:
    """Raises BadRow, naming the record, where it holds a token beyond that many rows of an embedding."""
    beyond = encoded.tokens[(encoded.tokens >= rows) & ~encoded.is_image]
    if len(beyond):
        token = tokenizer.convert_ids_to_tokens(int(beyond[0]))
        raise BadRow(
            "token_without_row",
            f"Record {name!r} holds the token {token} (id {beyond[0]}), for which the model's embedding of {rows} rows "
            "has none.",
        )


def template_items(template: str, record: Record) -> list[Item]:
    """The record's items in that template.

    Raises:
      UserError: an unknown template.
      BadRow: a record that does not fit it, or whose images and ``<image>`` marks differ in number, named by its id.
    """
    if template not in TEMPLATES:
        raise UserError(f"Unknown data.template={template!r}; {did_you_mean(template, TEMPLATES)}")
    try:
        items = (document if record.document else TEMPLATES[template])(record.turns)
    except BadRow as error:
        raise BadRow(error.reason, f"Record {record.id!r}: {error}.") from None
    marks, images = sum(item is Mark.IMAGE for item in items), len(record.images)
    if marks != images:
        reason = "mark_without_image" if marks > images else "image_without_mark"
        raise BadRow(reason, f"Record {record.id!r} has {images} images but {marks} {IMAGE_MARK} marks.")
    return items


def training_items(template: str, record: Record) -> list[Item]:
    """The record's items in that template. Raises as :func:`template_items`, and BadRow where there is no answer."""
    items = template_items(template, record)
    if not any(isinstance(item, Text) and item.learned for item in items):
        raise BadRow("no_answer", f"Record {record.id!r} has no answer to learn, as template {template!r} reads it.")
    return items


def encode(items: Sequence[Item], tokenizer: PreTrainedTokenizerFast, slots: int) -> Encoded:
    """Token ids of a conversation, begun as the tokenizer begins a text (with its BOS, where it has one).

    Text between two marks or control tokens is tokenised in one piece, as LLaVA does between images; the name of a
    special token in it is text like any other. Each piece begins with SentencePiece's space if the tokenizer has one;
    if it says ``legacy: false``, only at the start and after an image, as in LLaVA. A token is learned if its last
    character lies in a learned span; each image becomes ``slots`` image slots, whose id is the end of sequence's (they
    are never looked up).
    """
    end = tokenizer.eos_token_id
    begin = begin_tokens(tokenizer)
    parts = [_Part(begin, [False] * len(begin), is_image=False)]
    spoken = iter(_tokenize(_pieces(items), tokenizer))
    for is_text, group in itertools.groupby(items, _is_text):
        if is_text:
            spans, said = list(group), next(spoken)
            learns = np.repeat([span.learned for span in spans], [len(span.text) for span in spans])
            begins, ends = np.array(said.offsets, np.int64).reshape(-1, 2).T
            # A token that covers no character (a lone prefix mark of SentencePiece) belongs to what follows it.
            parts.append(_Part(said.ids, learns[np.maximum(ends - 1, begins)], is_image=False))
            continue
        for mark in group:
            if mark is Mark.IMAGE:
                parts.append(_Part([end] * slots, [False] * slots, is_image=True))
            else:
                learned = isinstance(mark, Mark) or mark.learned
                parts.append(_Part([_id(mark, tokenizer)], [learned], is_image=False))
    return Encoded(
        tokens=np.concatenate([np.array(part.tokens, np.int32) for part in parts]),
        learned=np.concatenate([np.array(part.learned, bool) for part in parts]),
        is_image=np.concatenate([np.full(len(part.tokens), part.is_image) for part in parts]),
    )


def count_tokens(conversations: Sequence[Sequence[Item]], tokenizer: PreTrainedTokenizerFast, slots: int) -> list[int]:
    """How many tokens :func:`encode` would give for each; tokenised all at once, which is faster."""
    pieces, owners, counts = [], [], [len(begin_tokens(tokenizer))] * len(conversations)
    for i, items in enumerate(conversations):
        counts[i] += sum(slots if item is Mark.IMAGE else 1 for item in items if not _is_text(item))
        new = _pieces(items)
        pieces += new
        owners += [i] * len(new)
    for i, said in zip(owners, _tokenize(pieces, tokenizer), strict=True):
        counts[i] += len(said.ids)
    return counts


class _Part(NamedTuple):
    tokens: Sequence[int]
    learned: Sequence[bool]
    is_image: bool


def _is_text(item):
    return isinstance(item, Text)


def _id(item, tokenizer):
    if item is Mark.NEWLINE:  # no vocabulary joins it to a letter
        return _run(_prepared(tokenizer), ["a\n"])[0].ids[-1]
    return tokenizer.eos_token_id if item is Mark.END else tokenizer.convert_tokens_to_ids(item.token)


def _pieces(items):
    """Texts that are tokenised in one piece each, and whether one starts as a conversation does, or after an image."""
    pieces, before = [], Mark.IMAGE
    for is_text, group in itertools.groupby(items, _is_text):
        group = list(group)
        if is_text:
            pieces.append(("".join(span.text for span in group), before is Mark.IMAGE))
        before = group[-1]
    return pieces


@functools.lru_cache(maxsize=4)
def begin_tokens(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids that a conversation begins with: what the tokenizer puts before a text (its BOS, where it has one)."""
    (begun,) = _run(_prepared(tokenizer), [""], begun=True)
    return [token for token in begun.ids if token != tokenizer.eos_token_id]


def _tokenize(pieces, tokenizer):
    """Ids and offsets of pieces, by the backend. Through transformers, a conversation would take half as long again."""
    if not prefixes_once(tokenizer):
        return _run(_prepared(tokenizer), [text for text, _ in pieces])
    backend, space = without_prefix(tokenizer)
    spaces = [space if starts and text else "" for text, starts in pieces]
    coded = _run(backend, [before + text for before, (text, _) in zip(spaces, pieces, strict=True)])
    return [_shifted(one, len(before)) for before, one in zip(spaces, coded, strict=True)]


class _Coded(NamedTuple):
    ids: Sequence[int]
    offsets: Sequence[tuple[int, int]]


def _shifted(coded, count):
    return _Coded(coded.ids, [(max(begin - count, 0), max(end - count, 0)) for begin, end in coded.offsets])


def _prepared(tokenizer):
    backend = tokenizer.backend_tokenizer
    if not backend.encode_special_tokens:
        backend.encode_special_tokens = True
    if backend.padding is not None or backend.truncation is not None:  # as some are published
        backend.no_padding()
        backend.no_truncation()
    return backend


@functools.lru_cache(maxsize=4)
def without_prefix(tokenizer: PreTrainedTokenizerFast) -> tuple[Tokenizer, str]:
    """The backend without the space that it puts before a text; and that space, empty if there is none."""
    values = json.loads(_prepared(tokenizer).to_str())
    normalizer, before = values["normalizer"] or {}, values["pre_tokenizer"] or {}
    steps = normalizer.get("normalizers", [])
    kept = [step for step in steps if step["type"] != "Prepend"]
    if steps:
        values["normalizer"] = normalizer | {"normalizers": kept}
    scheme = before.get("prepend_scheme", "never")  # Metaspace's
    if scheme != "never":
        values["pre_tokenizer"] = before | {"prepend_scheme": "never"}
    backend = Tokenizer.from_str(json.dumps(values))
    backend.encode_special_tokens = True
    return backend, " " if len(kept) < len(steps) or scheme != "never" else ""


def _run(backend, texts, begun=False):
    if len(texts) > _MANY:
        return backend.encode_batch(texts, add_special_tokens=begun)
    return [backend.encode(text, add_special_tokens=begun) for text in texts]
