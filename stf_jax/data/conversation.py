"""Encodes conversations as token ids: chat templates, target tokens and image slots.

A template turns a record into a list of items: spans of text (targets of the loss or not), control tokens, images and
ends of answers. :func:`encode` converts the items to ids. Targets follow from the spans themselves, so there is no
second tokenization that could disagree with the first (LLaVA's "tokenization mismatch" cannot happen).
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerFast

from stf_jax.config import UserError, did_you_mean
from stf_jax.data.records import IMAGE_MARK, BadRow, Record, Turn
from stf_jax.data.tokenizer import prefixes_only_start
from stf_jax.models.decoders.base import DECODERS
from stf_jax.models.decoders.chat import SYSTEM_PLACEHOLDER, Chat, Control, Item, Mark, Text
from stf_jax.registry import is_outside, load_object

_MIN_BATCH = 64  # with fewer texts, the tokenizer's threads cost more than they save


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Token ids int32 [T]; for each, whether it is a target, bool [T], and its image slot, int32 [T]."""

    tokens: np.ndarray
    is_target: np.ndarray
    image_slots: np.ndarray  # −1 for text, else as of stf_jax.data.tiles.ImageLayout.slots

    @property
    def is_image(self) -> np.ndarray:
        """Which tokens are image slots, bool [T]."""
        return self.image_slots != -1


CHATS: dict[str, Chat] = {name: chat for family in DECODERS.known.values() for name, chat in family.chats.items()}


def chat_items(chat: Chat, turns: Sequence[Turn]) -> list[Item]:
    """Returns the items of alternating turns; a conversation that ends with a question becomes a prompt.

    A turn's images move to its front, each followed by a newline, as in LLaVA; the last newline is left out if the
    question is empty. Images of a turn with ``in_place`` stay where they are. Turns are stripped of outer white space,
    in training and inference. LLaVA keeps it in turns without an image, and so trains answers to prompts that nobody
    types. A first turn by ``gpt`` is dropped, as in LLaVA (:func:`stf_jax.data.rows.read_row` reports it).
    """
    rounds = list(enumerate(turns, start=1))
    start = (*chat.start, *chat.before_question)
    if rounds and turns[0].speaker == "system":
        (_, turn), *rounds = rounds
        if IMAGE_MARK in turn.text:
            raise BadRow("mark_in_answer", f"turn 1 is a system text that contains {IMAGE_MARK}")
        if text := turn.text.strip():
            start = tuple(Text(text) if item is SYSTEM_PLACEHOLDER else item for item in chat.start_with_system)
    if rounds and rounds[0][1].speaker == "gpt":
        rounds = rounds[1:]
    items: list[Item] = []
    for i, (number, turn) in enumerate(rounds):
        if turn.speaker != ("human", "gpt")[i % 2]:
            raise BadRow("roles", f"turn {number} is by {turn.speaker!r}, but 'human' and 'gpt' must alternate")
        text = turn.text.replace(IMAGE_MARK, "").strip()
        if turn.speaker == "human":
            images: list[Item] = [Mark.IMAGE, Text("\n")] * turn.text.count(IMAGE_MARK)
            question = [*images, Text(text)] if text else images[:-1]
            if turn.in_place:
                question = document_items([Turn("human", turn.text.strip())])
            items += [*(chat.before_question if i else start), *question, *chat.before_answer]
        elif IMAGE_MARK in turn.text:
            raise BadRow("mark_in_answer", f"turn {number} is an answer that contains {IMAGE_MARK}")
        else:
            items += [Text(chat.answer_space + text, is_target=True), *chat.after_answer]
    return items


def plain_items(turns: Sequence[Turn]) -> list[Item]:
    """Returns the items of LLaVA's stage-1 template: ``<image>`` caption newline; caption and newline are targets.

    The newline ends the caption, so it is encoded as a separate token; some vocabularies (not Llama's) would merge it
    with a full stop. The instruction is dropped, and so is a system text (:func:`find_unplaced` reports it); without a
    caption the result is a prompt. A record without an image is a document (:func:`document_items`).
    """
    if turns and turns[0].speaker == "system":
        turns = turns[1:]
    images = sum(turn.text.count(IMAGE_MARK) for turn in turns)
    if not images:
        return document_items(turns)
    if len(turns) > 2 or any(turn.speaker != "gpt" for turn in turns[1:]):
        raise BadRow("roles", "template 'plain' takes one instruction and one caption")
    if any(IMAGE_MARK in turn.text for turn in turns[1:]):
        raise BadRow("mark_in_answer", f"the caption contains {IMAGE_MARK}")
    caption: list[Item] = [
        item for turn in turns[1:] for item in (Text(turn.text.strip(), is_target=True), Mark.NEWLINE)
    ]
    return [Mark.IMAGE] * images + caption


def document_items(turns: Sequence[Turn]) -> list[Item]:
    """Returns the items of turns without any template text; the model's turns are targets."""
    items: list[Item] = []
    for turn in turns:
        for i, text in enumerate(turn.text.split(IMAGE_MARK)):
            items += [Mark.IMAGE] * (i > 0) + [Text(text, is_target=turn.speaker == "gpt")] * bool(text)
    return items


TEMPLATES = ("plain", *CHATS)


def find_chat(template: str) -> Chat | None:
    """Returns the chat template of that name, or your own as ``package.module:CHAT``; None for ``plain``.

    Raises UserError for an unknown one.
    """
    if template in TEMPLATES:
        return CHATS.get(template)
    if not is_outside(template):
        raise UserError(f"Unknown data.template={template!r}; {did_you_mean(template, TEMPLATES)}")
    if not isinstance(chat := load_object(template, "data.template"), Chat):
        raise UserError(f"data.template={template} is a {type(chat).__name__}, not a Chat.")
    return chat


def stop_tokens(template: str, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Returns the ids that end an answer: the template's first token after an answer, and the end of sequence."""
    chat = find_chat(template)
    first = chat.after_answer[0] if chat else Mark.NEWLINE
    assert not isinstance(first, Text)  # in every template a single token ends an answer
    return tuple(dict.fromkeys(_token_id(end, tokenizer) for end in (first, Mark.END)))


def check_template(template: str, tokenizer: PreTrainedTokenizerFast | None) -> None:
    """Raises UserError for an unknown template, or one with control tokens that the tokenizer, where given, lacks."""
    chat = find_chat(template)
    if tokenizer is None or chat is None:
        return
    for item in (*chat.start_with_system, *chat.items):
        if isinstance(item, Control) and _token_id(item, tokenizer) in (None, tokenizer.unk_token_id):
            raise UserError(f"data.template={template!r} needs the token {item.token}, which the tokenizer lacks.")


def detect_template(tokenizer: PreTrainedTokenizerFast) -> str:
    """Detects the template from the tokenizer's control tokens or its chat template; ``v1`` if neither decides."""
    vocabulary, own = tokenizer.get_vocab(), tokenizer.chat_template
    for name, chat in CHATS.items():
        if chat.controls and chat.controls <= vocabulary.keys():
            return name
    signed = [name for name, chat in CHATS.items() if chat.sign and isinstance(own, str) and chat.sign in own]
    return signed[0] if signed else "v1"


def check_template_ids(template: str, tokenizer: PreTrainedTokenizerFast, rows: int) -> None:
    """Raises UserError if the template needs a token id that an embedding with that many rows lacks."""
    chat = find_chat(template)
    items = [item for item in chat.items if not _is_text(item)] if chat else []
    for token in (*encode(items, tokenizer, 0).tokens.tolist(), *stop_tokens(template, tokenizer)):
        if token >= rows:
            name = tokenizer.convert_ids_to_tokens(token)
            raise UserError(
                f"data.template={template!r} needs the token {name} (id {token}), but the model's embedding has only "
                f"{rows} rows: choose another template, or the tokenizer that the model was trained with."
            )


def check_record_ids(encoded: Encoded, tokenizer: PreTrainedTokenizerFast, rows: int, name: str) -> None:
    """Raises BadRow, with the record's name, if it has a token id that an embedding with that many rows lacks."""
    beyond = encoded.tokens[(encoded.tokens >= rows) & ~encoded.is_image]
    if len(beyond):
        token = tokenizer.convert_ids_to_tokens(int(beyond[0]))
        raise BadRow(
            "token_without_row",
            f"Record {name!r} contains the token {token} (id {beyond[0]}), but the model's embedding has only {rows} "
            "rows.",
        )


def template_items(template: str, record: Record) -> list[Item]:
    """Returns the record's items in a template.

    Raises:
      UserError: the template is unknown.
      BadRow: the record does not fit the template, or its images and ``<image>`` marks differ in number. The message
        has the record's id.
    """
    chat = find_chat(template)
    try:
        if record.document:
            items = document_items(record.turns)
        else:
            items = plain_items(record.turns) if chat is None else chat_items(chat, record.turns)
    except BadRow as error:
        raise BadRow(error.reason, f"Record {record.id!r}: {error}.") from None
    marks, images = len([item for item in items if item is Mark.IMAGE]), len(record.images)
    if marks != images:
        reason = "mark_without_image" if marks > images else "image_without_mark"
        raise BadRow(reason, f"Record {record.id!r} has {images} images but {marks} {IMAGE_MARK} marks.")
    return items


def find_unplaced(template: str, record: Record) -> tuple[str, ...]:
    """Returns what the template has no place for, and so leaves out: a system text, in template ``plain``."""
    has_system = bool(record.turns) and record.turns[0].speaker == "system" and bool(record.turns[0].text.strip())
    return (f"a system text, for which template {template!r} has no place",) * (has_system and template == "plain")


def training_items(template: str, record: Record) -> list[Item]:
    """Like :func:`template_items`, but also raises BadRow if there is no answer."""
    items = template_items(template, record)
    if not [item for item in items if isinstance(item, Text) and item.is_target]:
        raise BadRow("no_answer", f"Record {record.id!r} has no answer to train on with template {template!r}.")
    return items


def encode(items: Sequence[Item], tokenizer: PreTrainedTokenizerFast, slots: int | Sequence[np.ndarray]) -> Encoded:
    """Encodes a conversation, starting with the tokenizer's initial tokens (BOS, if it has one).

    Text between two marks or control tokens is tokenized in one piece, as LLaVA does between images. Names of special
    tokens in it are ordinary text. Each piece begins with SentencePiece's space if the tokenizer has one; with
    ``legacy: false``, only at the start and after an image, as in LLaVA. A token is a target if its last character is
    in a target span. Each image becomes its image slots; their id is the end of sequence's, but is never looked up.

    Args:
      slots: of each image (:meth:`stf_jax.data.tiles.ImageLayout.slots`), or the number of slots of every image.
    """
    if isinstance(slots, int):
        count = sum(item is Mark.IMAGE for item in items)
        slots = list(np.arange(count * slots, dtype=np.int32).reshape(count, slots))
    images = iter(slots)
    initial = initial_tokens(tokenizer)
    parts = [_Part(initial, [False] * len(initial))]
    encodings = iter(_tokenize(_split_pieces(items), tokenizer))
    for is_text, group in itertools.groupby(items, _is_text):
        if is_text:
            spans, encoding = [item for item in group if isinstance(item, Text)], next(encodings)
            target_chars = np.repeat([span.is_target for span in spans], [len(span.text) for span in spans])
            begins, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
            # A token that covers no character (a lone prefix mark of SentencePiece) belongs to the next character.
            parts.append(_Part(encoding.ids, target_chars[np.maximum(ends - 1, begins)]))
            continue
        for mark in (item for item in group if not isinstance(item, Text)):
            if mark is Mark.IMAGE:
                own = next(images)
                parts.append(_Part([tokenizer.eos_token_id] * len(own), [False] * len(own), own))
            else:
                is_target = isinstance(mark, Mark) or mark.is_target
                parts.append(_Part([_token_id(mark, tokenizer)], [is_target]))
    return Encoded(
        tokens=np.concatenate([np.array(part.tokens, np.int32) for part in parts]),
        is_target=np.concatenate([np.array(part.is_target, bool) for part in parts]),
        image_slots=np.concatenate(
            [np.full(len(part.tokens), -1, np.int32) if part.slots is None else part.slots for part in parts]
        ),
    )


def count_tokens(
    conversations: Sequence[Sequence[Item]], tokenizer: PreTrainedTokenizerFast, slots: int | Sequence[int]
) -> list[int]:
    """Counts the tokens that :func:`encode` would return for each conversation; one batch, so faster.

    Args:
      slots: of all images of each conversation, or of every image.
    """
    pieces: list[_Piece] = []
    owners: list[int] = []
    counts = [len(initial_tokens(tokenizer))] * len(conversations)
    for i, items in enumerate(conversations):
        marks = [item for item in items if not isinstance(item, Text)]
        images = len([item for item in marks if item is Mark.IMAGE])
        counts[i] += len(marks) - images
        counts[i] += images * slots if isinstance(slots, int) else slots[i]
        new = _split_pieces(items)
        pieces += new
        owners += [i] * len(new)
    distinct = list(dict.fromkeys(pieces))  # most conversations begin with the same system text
    backend, prefixes = _find_prefixes(distinct, tokenizer)
    texts = [prefix + text for prefix, (text, _) in zip(prefixes, distinct, strict=True)]
    sizes = dict(zip(distinct, map(len, _encode_texts(backend, texts, with_offsets=False)), strict=True))
    for i, piece in zip(owners, pieces, strict=True):
        counts[i] += sizes[piece]
    return counts


class _Part(NamedTuple):
    tokens: Sequence[int]
    is_target: Sequence[bool] | np.ndarray
    slots: np.ndarray | None = None  # of an image


_Piece = tuple[str, bool]  # a text, and whether it is at the start or after an image


def _is_text(item: Item) -> bool:
    return isinstance(item, Text)


def _token_id(item: Control | Mark, tokenizer: PreTrainedTokenizerFast) -> int:
    if item is Mark.NEWLINE:  # no vocabulary merges it with a letter
        return _encode_texts(_get_backend(tokenizer), ["a\n"])[0].ids[-1]
    if isinstance(item, Mark):
        return tokenizer.eos_token_id
    return tokenizer.convert_tokens_to_ids(item.token)  # type: ignore[return-value]  # a list only for a list


def _split_pieces(items: Sequence[Item]) -> list[_Piece]:
    """Returns the texts to tokenize in one piece each, and whether each is at the start or after an image."""
    pieces: list[_Piece] = []
    spans: list[str] = []  # since the last item that is not text
    before: Item = Mark.IMAGE  # that item
    for item in items:
        if isinstance(item, Text):
            spans.append(item.text)
            continue
        if spans:
            pieces.append(("".join(spans), before is Mark.IMAGE))
        spans, before = [], item
    return [*pieces, ("".join(spans), before is Mark.IMAGE)] if spans else pieces


@functools.lru_cache(maxsize=4)
def initial_tokens(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Returns the ids that the tokenizer puts before a text (BOS, if it has one)."""
    (encoding,) = _encode_texts(_get_backend(tokenizer), [""], add_special_tokens=True)
    return [token for token in encoding.ids if token != tokenizer.eos_token_id]


class _Encoding(NamedTuple):
    ids: Sequence[int]
    offsets: Sequence[tuple[int, int]]


def _tokenize(pieces: Sequence[_Piece], tokenizer: PreTrainedTokenizerFast) -> Sequence[Encoding | _Encoding]:
    """Returns ids and offsets of pieces, from the backend: transformers' own call takes 1.5 times as long."""
    backend, prefixes = _find_prefixes(pieces, tokenizer)
    encodings = _encode_texts(backend, [prefix + text for prefix, (text, _) in zip(prefixes, pieces, strict=True)])
    return [
        _shift_offsets(one, len(before)) if before else one for before, one in zip(prefixes, encodings, strict=True)
    ]


def _find_prefixes(pieces: Sequence[_Piece], tokenizer: PreTrainedTokenizerFast) -> tuple[Tokenizer, Sequence[str]]:
    """Returns the backend that tokenizes the pieces, and what to put before each: a space or nothing."""
    if not prefixes_only_start(tokenizer):
        return _get_backend(tokenizer), [""] * len(pieces)
    backend, space = strip_space_prefix(tokenizer)
    return backend, [space if starts and text else "" for text, starts in pieces]


def _shift_offsets(encoding: Encoding, count: int) -> _Encoding:
    return _Encoding(encoding.ids, [(max(begin - count, 0), max(end - count, 0)) for begin, end in encoding.offsets])


def _get_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    backend = tokenizer.backend_tokenizer
    if not backend.encode_special_tokens:
        backend.encode_special_tokens = True
    if backend.padding is not None or backend.truncation is not None:  # some published tokenizers set them
        backend.no_padding()
        backend.no_truncation()
    return backend


@functools.lru_cache(maxsize=4)
def strip_space_prefix(tokenizer: PreTrainedTokenizerFast) -> tuple[Tokenizer, str]:
    """Returns the backend without the space that it puts before a text, and that space (empty if there is none)."""
    values = json.loads(_get_backend(tokenizer).to_str())
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


def _encode_texts(
    backend: Tokenizer, texts: Sequence[str], *, add_special_tokens: bool = False, with_offsets: bool = True
) -> list[Encoding]:
    if len(texts) > _MIN_BATCH:
        encode_batch = backend.encode_batch if with_offsets else backend.encode_batch_fast
        return encode_batch(texts, add_special_tokens=add_special_tokens)
    return [backend.encode(text, add_special_tokens=add_special_tokens) for text in texts]
