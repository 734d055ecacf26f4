"""Rows of annotations: LLaVA's form and its relatives, to id, image paths and turns, with what of a row is not read.

Whatever in a row carries an image, another medium or a text that training would miss is read, or the row is refused by
name. All other keys are ignored, but listed, so that they can be counted.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stf_jax.config import shorten
from stf_jax.data.records import IMAGE_MARK, BadRow, Turn

_SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
TALK = ("conversations", "messages")  # the key of a row's turns
_IMAGES, _SYSTEM = ("image", "images"), ("system", "system_prompt")
_SPEAKER, _TEXT = ("from", "role"), ("value", "content")
_READ = {*TALK, *_IMAGES, *_SYSTEM, "id"}
# Keys that weigh a turn: every answer is learned, with weight one.
_WEIGHTS = {"weight", "loss", "loss_weight", "train", "trainable"}
_CONTENT = {"tools", "functions", "tool_calls", "function_call", "reasoning_content", "thinking", "history"}
_IMAGE_WORDS = {"image", "img", "picture", "pic", "photo"}
_MEDIA_WORDS = _IMAGE_WORDS | {"video", "audio", "media"}
# Last words of keys that say something about an image that is read: image_id, image_size, image_url.
_FACTS = {"id", "ids", "source", "type", "size", "sizes", "format", "width", "height", "hash", "caption", "license"}
_PLACES = {"path", "file", "filename", "name", "url"}
_MEDIUM = re.compile(
    r"data:(image|video|audio)/.*|\S+\.(jpe?g|png|gif|webp|bmp|tiff?|mp4|avi|mov|mkv|webm|wav|mp3|flac|ogg)",
    re.IGNORECASE | re.DOTALL,
)


@dataclasses.dataclass(frozen=True)
class Row:
    """What a row says."""

    id: str
    images: tuple[str, ...]  # paths
    turns: tuple[Turn, ...]
    unread: tuple[str, ...]  # keys that are passed over, and a first turn that chat templates drop

    @property
    def name(self) -> str:
        """The id, cut for messages where it is long."""
        return shorten(self.id)


def read_row(row: Any, name: str) -> Row:
    """Reads ``{id, image, conversations: [{from, value}, …]}``, or the same in the words of others.

    ``images`` and ``messages`` are other names of ``image`` and ``conversations``, ``role`` and ``content`` of ``from``
    and ``value``, ``user`` and ``assistant`` of ``human`` and ``gpt``; a content may be a list of parts of type
    ``text`` and ``image`` (or ``image_url``). ``image`` is a path or a list of such; a row where it is absent, null,
    NaN, ``""`` or ``[]`` is text. A system text is the first turn, by ``system``, or stands under ``system`` or
    ``system_prompt``.

    Args:
      row: any JSON value.
      name: says which row it is, where it has no id.

    Raises:
      BadRow: the row is of another form, an answer is empty, there is none, or it carries what is not read.
    """
    where = f"{name[:1].upper()}{name[1:]}"
    if not isinstance(row, dict):
        raise BadRow("no_object", f"{where} is {_kind(row)}, no object.")
    talk = _one_of(row, TALK, where)
    if not isinstance(talk, list):
        keys = shorten(", ".join(row))
        raise BadRow("no_turns", f"{where} has no list of turns under conversations or messages; its keys: {keys}.")
    turns, within, unread = [], [], []
    for number, turn in enumerate(talk, start=1):
        speaker, text, paths = _turn(turn, f"{where}: turn {number}")
        if speaker == "system" and number > 1:
            raise BadRow("roles", f"{where}: turn {number} is by 'system', which only the first may be.")
        turns.append(Turn(speaker, text))
        within += paths
    turns = _with_system(row, turns, where)
    images = _images(row, within, where)
    for key, value in row.items():
        if key not in _READ and not is_empty(value):
            _check_unread(key, value, bool(images), where)
            unread.append(shorten(key))
    for number, turn in enumerate(talk, start=1):
        for key, value in turn.items():
            if key not in (*_SPEAKER, *_TEXT) and not is_empty(value):
                if key in _WEIGHTS and value != 1:
                    sentence = f"{where}: turn {number} has {key}={shorten(str(value))}, but every answer is learned."
                    raise BadRow("unread", sentence)
                _check_unread(key, value, bool(images), f"{where}: turn {number}")
                unread.append(f"{shorten(key)} of turns")
    # LLaVA's own files always have an id; the place of a row that has none is its name.
    identity = name if is_empty(row.get("id")) else str(row["id"])
    try:
        "".join([identity, *images, *(turn.text for turn in turns)]).encode()
    except UnicodeEncodeError:
        raise BadRow("no_text", f"{where} has bytes that are not UTF-8, or half a character.") from None
    for number, turn in enumerate(turns, start=1):
        if turn.speaker == "gpt" and not turn.text.replace(IMAGE_MARK, "").strip():
            raise BadRow("empty_answer", f"Record {shorten(identity)!r}: turn {number} is an empty answer.")
    speakers = [turn.speaker for turn in turns if turn.speaker != "system"]
    if "gpt" not in speakers:
        raise BadRow("no_answer", f"Record {shorten(identity)!r} has no answer.")
    if speakers[0] == "gpt" and "human" in speakers:
        unread.append("a first turn by gpt")
    return Row(identity, tuple(images), tuple(turns), tuple(dict.fromkeys(unread)))


def is_empty(value: Any) -> bool:
    """Whether a value of JSON says nothing: null, NaN (which pandas writes), white space, or nothing but such."""
    if isinstance(value, (list, dict)):
        return all(map(is_empty, value.values() if isinstance(value, dict) else value))
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _kind(value):
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _one_of(values: Mapping[str, Any], keys: Sequence[str], where: str) -> Any:
    """The value under several names of one key; None where it has none."""
    found = [key for key in keys if not is_empty(values.get(key))]
    if any(values[key] != values[found[0]] for key in found):
        raise BadRow("unread", f"{where} has both {' and '.join(found)}, and they differ.")
    return next((values[key] for key in [*found, *keys] if key in values), None)


def _turn(turn, where):
    """Speaker, text, and image paths of a turn."""
    if not isinstance(turn, dict):
        raise BadRow("no_turn", f"{where} is {_kind(turn)}, no object.")
    speaker, text = _one_of(turn, _SPEAKER, where), _one_of(turn, _TEXT, where)
    if not isinstance(speaker, str):
        raise BadRow("no_turn", f"{where} does not say whose it is: it needs 'from', or 'role'.")
    if speaker.lower() not in _SPEAKERS:
        raise BadRow("speaker", f"{where} is by {shorten(speaker)!r}; known are {', '.join(_SPEAKERS)}.")
    paths = []
    if isinstance(text, list):
        said = [_part(part, where) for part in text]
        text, paths = "".join(part for part, _ in said), [path for _, path in said if path]
    if not isinstance(text, str):
        what = "no text" if text is None else f"{_kind(text)} for a text"
        raise BadRow("no_turn", f"{where} has {what} under 'value', or 'content'.")
    return _SPEAKERS[speaker.lower()], text, paths


def _part(part, where):
    """Text of a part of a content, and the path that an image part gives (it may leave that to the row)."""
    if isinstance(part, str):
        return part, ""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"], ""
    if kind not in ("image", "image_url"):
        raise BadRow("no_turn", f"{where} has a part of type {shorten(str(kind))!r}; known are text and image.")
    path = _one_of(part, ("image", "path", "url", "image_url"), where)
    path = path.get("url") if isinstance(path, dict) else path
    if not is_empty(path) and not isinstance(path, str):
        raise BadRow("image_value", f"{where} has an image that is {_kind(path)}, not a path.")
    return IMAGE_MARK, path or ""


def _with_system(row, turns, where):
    own = _one_of(row, _SYSTEM, where)
    if is_empty(own):
        return turns
    if not isinstance(own, str):
        raise BadRow("unread", f"{where} has a system text that is {_kind(own)}.")
    if turns and turns[0].speaker == "system":
        if turns[0].text.strip() not in ("", own.strip()):
            raise BadRow("unread", f"{where} has two system texts, and they differ.")
        turns = turns[1:]
    return [Turn("system", own), *turns]


def _images(row, within, where):
    value = _one_of(row, _IMAGES, where)
    if is_empty(value):
        return within
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list):
        raise BadRow("image_value", f"{where} has an image that is {_kind(value)}, neither a path nor a list of paths.")
    for path in paths:
        if not isinstance(path, str) or is_empty(path):
            raise BadRow("image_value", f"{where} has a list of images in which one is {_kind(path)}, not a path.")
    if within and within != paths:
        raise BadRow("unread", f"{where} has images both in its turns and under image, and they differ.")
    return paths


def _check_unread(key: str, value: Any, has_images: bool, where: str) -> None:
    """Raises BadRow where a key that is not read names media, or a text that belongs to the conversation."""
    texts = list(_texts(value))
    words = re.findall(r"[a-z]+|[0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower())
    media = {word.removesuffix("s") for word in words} & _MEDIA_WORDS
    if media and texts:
        facts = _FACTS | _PLACES if media <= _IMAGE_WORDS else _FACTS
        carries = not (has_images and words[-1] in facts)
    else:
        carries = key in _CONTENT and bool(texts)
        carries |= not has_images and any(_MEDIUM.fullmatch(text) for text in texts)
    if carries:
        raise BadRow(
            "unread", f"{where} has {shorten(key)!r}, which is not read; texts and the images under 'image' are."
        )


def _texts(value) -> Iterator[str]:
    """The texts in a value of JSON, but empty ones."""
    if isinstance(value, str):
        yield from [value] if value.strip() else []
    elif isinstance(value, (list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)
