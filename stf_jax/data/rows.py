"""Parses rows of annotations in LLaVA's format, the Hub's and their variants: id, images, turns and ignored keys.

A key that contains an image, other media or conversation text is either read, or the row is rejected with the key's
name, so that training never misses content silently. All other keys are ignored, but listed, so they can be counted.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stf_jax.config import shorten
from stf_jax.data.records import IMAGE_MARK, BadRow, Embedded, Turn

_SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
TURN_KEYS = ("conversations", "messages")  # keys under which a row has its turns
PAIRS_KEY = "texts"  # or its questions and answers, as in FineVision and the_cauldron
MAX_DEPTH = 100  # levels of lists and objects in a row; LLaVA's have three
_IMAGES, _SYSTEM = ("image", "images"), ("system", "system_prompt")
_SPEAKER, _TEXT = ("from", "role"), ("value", "content")
_TURN_READ = {*_SPEAKER, *_TEXT}
_READ = {*TURN_KEYS, *_IMAGES, *_SYSTEM, "id"}
_READ_WITH_PAIRS = {*_READ, PAIRS_KEY}
# Keys that give a turn a weight; training gives every answer weight 1.
_WEIGHTS = {"weight", "loss", "loss_weight", "train", "trainable"}
_CONTENT = {"tools", "functions", "tool_calls", "function_call", "reasoning_content", "thinking", "history"}
_IMAGE_WORDS = {"image", "img", "picture", "pic", "photo"}
_MEDIA_WORDS = _IMAGE_WORDS | {"video", "audio", "media"}
# Last words of keys with facts about an image that is read under another key: image_id, image_size, image_url.
_FACTS = {"id", "ids", "source", "type", "size", "sizes", "format", "width", "height", "hash", "caption", "license"}
_PLACES = {"path", "file", "filename", "name", "url"}
_MEDIUM = re.compile(
    r"data:(image|video|audio)/.*|\S+\.(jpe?g|png|gif|webp|bmp|tiff?|mp4|avi|mov|mkv|webm|wav|mp3|flac|ogg)",
    re.IGNORECASE | re.DOTALL,
)


@dataclasses.dataclass(frozen=True)
class Row:
    """A parsed row."""

    id: str
    images: tuple[str | Embedded, ...]  # paths, or the images themselves
    turns: tuple[Turn, ...]
    ignored_keys: tuple[str, ...]  # and a first turn that chat templates drop

    @property
    def name(self) -> str:
        """The id, shortened for messages."""
        return shorten(self.id)


def read_row(row: Any, name: str) -> Row:
    """Parses ``{id, image, conversations: [{from, value}, …]}``, or the same with other common key names.

    ``images`` and ``messages`` are aliases of ``image`` and ``conversations``, ``role`` and ``content`` of ``from`` and
    ``value``, ``user`` and ``assistant`` of ``human`` and ``gpt``. A content may be a list of parts of type ``text``
    and ``image`` (or ``image_url``): an image that follows text stays there. Without turns, a row may have
    ``texts: [{user, assistant}, …]``; if they contain no ``<image>``, the first question begins with all images.
    ``image`` is a path or a list of paths; if it is absent, null, NaN, ``""`` or ``[]``, the row has no image. A system
    text is the first turn, by ``system``, or the value of ``system`` or ``system_prompt``.

    Args:
      row: any JSON value, in which an :class:`Embedded` image may stand for a path.
      name: names the row in messages, and is its id if it has none.

    Raises:
      BadRow: the row is malformed, has no answer or an empty one, or has content under a key that is not read.
    """
    where = f"{name[:1].upper()}{name[1:]}"
    if not isinstance(row, dict):
        raise BadRow("no_object", f"{where} is {_describe_type(row)}, not an object.")
    raw_turns, read = _get_alias(row, TURN_KEYS, where), _READ
    if has_pairs := is_empty(raw_turns) and isinstance(row.get(PAIRS_KEY), list):
        raw_turns, read = _unpair(row[PAIRS_KEY], where), _READ_WITH_PAIRS
    if not isinstance(raw_turns, list):
        keys = shorten(", ".join(row))
        message = f"{where} has no list of turns under conversations, messages or {PAIRS_KEY}; its keys: {keys}."
        raise BadRow("no_turns", message)
    turns: list[Turn] = []
    turn_images: list[str] = []
    ignored: list[str] = []
    for number, turn in enumerate(raw_turns, start=1):
        parsed, paths = _parse_turn(turn, f"{where}: turn {number}")
        if parsed.speaker == "system" and number > 1:
            raise BadRow("roles", f"{where}: turn {number} is by 'system', but only the first turn may be.")
        turns.append(parsed)
        turn_images += paths
    images = _get_images(row, turn_images, where)
    if has_pairs and images and not any(IMAGE_MARK in turn.text for turn in turns):
        turns[:1] = [Turn(turn.speaker, IMAGE_MARK * len(images) + turn.text) for turn in turns[:1]]
    turns = _add_system(row, turns, where)
    for key, value in row.items():
        if key not in read and not is_empty(value):
            _check_ignored(key, value, bool(images), where)
            ignored.append(shorten(key))
    for number, turn in enumerate(raw_turns, start=1):
        for key, value in turn.items():
            if key not in _TURN_READ and not is_empty(value):
                if key in _WEIGHTS and value != 1:
                    weight = f"{key}={shorten(str(value))}"
                    message = f"{where}: turn {number} has {weight}, but every answer is trained on with weight 1."
                    raise BadRow("unread", message)
                _check_ignored(key, value, bool(images), f"{where}: turn {number}")
                ignored.append(f"{shorten(key)} of turns")
    # LLaVA's own files always have ids.
    row_id = name if is_empty(row.get("id")) else str(row["id"])
    try:
        "".join([row_id, *[x for x in images if isinstance(x, str)], *[turn.text for turn in turns]]).encode()
    except UnicodeEncodeError:
        raise BadRow("no_text", f"{where} has bytes that are not UTF-8, or half a surrogate pair.") from None
    for number, turn in enumerate(turns, start=1):
        if turn.speaker == "gpt" and not turn.text.replace(IMAGE_MARK, "").strip():
            raise BadRow("empty_answer", f"Record {shorten(row_id)!r}: turn {number} is an empty answer.")
    speakers = [turn.speaker for turn in turns if turn.speaker != "system"]
    if "gpt" not in speakers:
        raise BadRow("no_answer", f"Record {shorten(row_id)!r} has no answer.")
    if speakers[0] == "gpt" and "human" in speakers:
        ignored.append("a first turn by gpt")
    return Row(row_id, tuple(images), tuple(turns), tuple(dict.fromkeys(ignored)))


def turn_to_json(turn: Turn) -> dict[str, Any]:
    """Returns a turn from which :func:`read_row` reads the same turn."""
    if not turn.in_place:
        return {"from": turn.speaker, "value": turn.text}
    parts: list[dict[str, str]] = []
    for number, text in enumerate(turn.text.split(IMAGE_MARK)):
        parts += [{"type": "image"}] * (number > 0) + [{"type": "text", "text": text}] * bool(text)
    return {"from": turn.speaker, "value": parts}


def is_empty(value: Any) -> bool:
    """Whether a JSON value has no content: null, NaN (which pandas writes), white space, or a container of these."""
    if isinstance(value, str):
        return not value or value.isspace()
    if isinstance(value, (list, dict)):
        return all(map(is_empty, value.values() if isinstance(value, dict) else value))
    return value is None or value != value


def is_too_deep(value: Any) -> bool:
    """Whether a JSON value nests over :data:`MAX_DEPTH` levels deep: it could not be read or written recursively."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for each in level
            if isinstance(each, (dict, list))
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
    return bool(level)


def _describe_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _get_alias(values: Mapping[str, Any], keys: Sequence[str], where: str) -> Any:
    """Returns the value under any of several names of one key, or None."""
    first = None
    for key in keys:
        if key in values:
            if first is not None:
                return _get_filled(values, keys, where)
            first = key
    return None if first is None else values[first]


def _get_filled(values: Mapping[str, Any], keys: Sequence[str], where: str) -> Any:
    """Returns the value under the names that are present and not empty."""
    present = [key for key in keys if key in values]
    found = [key for key in present if not is_empty(values[key])] or present[:1]
    if any(values[key] != values[found[0]] for key in found[1:]):
        raise BadRow("unread", f"{where} has both {' and '.join(found)}, and they differ.")
    return values[found[0]]


def _unpair(pairs: Sequence[Any], where: str) -> list[Any]:
    """Returns pairs of a question and an answer as turns."""
    turns: list[Any] = []
    for number, pair in enumerate(pairs, start=1):
        if not isinstance(pair, dict):
            raise BadRow("no_turn", f"{where}: pair {number} of {PAIRS_KEY} is {_describe_type(pair)}, not an object.")
        rest = {key: value for key, value in pair.items() if key not in ("user", "assistant")}
        turns += [{"role": "user", "content": pair.get("user")} | rest]
        turns += [{"role": "assistant", "content": pair.get("assistant")}]
    return turns


def _parse_turn(turn: Any, where: str) -> tuple[Turn, list[str]]:
    """Returns a turn and the paths of its images."""
    if not isinstance(turn, dict):
        raise BadRow("no_turn", f"{where} is {_describe_type(turn)}, not an object.")
    speaker, text = _get_alias(turn, _SPEAKER, where), _get_alias(turn, _TEXT, where)
    if not isinstance(speaker, str):
        raise BadRow("no_turn", f"{where} has no speaker under 'from' or 'role'.")
    if speaker.lower() not in _SPEAKERS:
        raise BadRow("speaker", f"{where} is by {shorten(speaker)!r}; known speakers: {', '.join(_SPEAKERS)}.")
    paths: list[str] = []
    in_place = False
    if isinstance(text, list):
        parts = [_parse_part(part, where) for part in text]
        text, paths = "".join(part for part, _ in parts), [path for _, path in parts if path]
        in_place = bool(text.replace(IMAGE_MARK, " ").strip()) and not text.lstrip().startswith(
            IMAGE_MARK * text.count(IMAGE_MARK)
        )
    if not isinstance(text, str):
        found = "no string" if text is None else f"{_describe_type(text)} instead of a string"
        raise BadRow("no_turn", f"{where} has {found} under 'value' or 'content'.")
    return Turn(_SPEAKERS[speaker.lower()], text, in_place), paths


def _parse_part(part: Any, where: str) -> tuple[str, str]:
    """Returns the text of a part of a content, and the path of an image part (empty if the row has the path)."""
    if isinstance(part, str):
        return part, ""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"], ""
    if kind not in ("image", "image_url"):
        raise BadRow("no_turn", f"{where} has a part of type {shorten(str(kind))!r}; known types: text, image.")
    path = _get_alias(part, ("image", "path", "url", "image_url"), where)
    path = path.get("url") if isinstance(path, dict) else path
    if not is_empty(path) and not isinstance(path, str):
        raise BadRow("image_value", f"{where} has an image that is {_describe_type(path)}, not a path.")
    return IMAGE_MARK, path or ""


def _add_system(row: Mapping[str, Any], turns: list[Turn], where: str) -> list[Turn]:
    system = _get_alias(row, _SYSTEM, where)
    if is_empty(system):
        return turns
    if not isinstance(system, str):
        raise BadRow("unread", f"{where} has a system text that is {_describe_type(system)}.")
    if turns and turns[0].speaker == "system":
        if turns[0].text.strip() not in ("", system.strip()):
            raise BadRow("unread", f"{where} has two system texts, and they differ.")
        turns = turns[1:]
    return [Turn("system", system), *turns]


def _get_images(row: Mapping[str, Any], turn_images: list[str], where: str) -> Sequence[str | Embedded]:
    value = _get_alias(row, _IMAGES, where)
    if is_empty(value):
        return turn_images
    paths = [value] if isinstance(value, (str, Embedded)) else value
    if not isinstance(paths, list):
        found = _describe_type(value)
        raise BadRow("image_value", f"{where} has an image that is {found}, neither a path nor a list of paths.")
    for path in paths:
        if not isinstance(path, (str, Embedded)) or is_empty(path):
            found = _describe_type(path)
            raise BadRow("image_value", f"{where} has a list of images in which one is {found}, not a path.")
    if turn_images and turn_images != paths:
        raise BadRow("unread", f"{where} has images both in its turns and under image, and they differ.")
    return paths


def _check_ignored(key: str, value: Any, has_images: bool, where: str) -> None:
    """Raises BadRow if a key that is not read has media or conversation text as its value."""
    if _has_embedded(value):
        raise BadRow(
            "unread", f"{where} has {shorten(key)!r}, which is not read; images are under 'image' or 'images'."
        )
    texts = list(_find_texts(value))
    media, last = _find_media(key)
    if media and texts:
        facts = _FACTS | _PLACES if media <= _IMAGE_WORDS else _FACTS
        has_content = not (has_images and last in facts)
    else:
        has_content = key in _CONTENT and bool(texts)
        has_content |= not has_images and any(_MEDIUM.fullmatch(text) for text in texts)
    if has_content:
        message = f"{where} has {shorten(key)!r}, which is not read; only texts, and images under 'image', are."
        raise BadRow("unread", message)


@functools.lru_cache(maxsize=1024)
def _find_media(key: str) -> tuple[frozenset[str], str]:
    """Returns the words of a key that mean a medium, and its last word."""
    words = re.findall(r"[a-z]+|[0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower())
    return frozenset(word.removesuffix("s") for word in words) & _MEDIA_WORDS, words[-1] if words else ""


def _has_embedded(value: Any) -> bool:
    return isinstance(value, Embedded) or (isinstance(value, list) and any(map(_has_embedded, value)))


def _find_texts(value: Any) -> Iterator[str]:
    """Yields the non-empty strings in a JSON value."""
    if isinstance(value, str):
        yield from [value] if value.strip() else []
    elif isinstance(value, (list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _find_texts(inner)
