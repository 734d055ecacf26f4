"""Writes a shard of a prepared data set: checks its rows and their images, and notes what was kept and dropped."""

import dataclasses
import functools
import io
import itertools
import json
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from stf_jax.config import UserError, shorten
from stf_jax.data.conversation import count_tokens, find_unplaced, training_items
from stf_jax.data.image import MAX_ASPECT_RATIO, open_image, read_image, to_rgb
from stf_jax.data.ratings import Filter
from stf_jax.data.records import BadRow, Embedded, Record, Turn, name_image
from stf_jax.data.rows import read_row, turn_to_json
from stf_jax.data.sources.containers import Rows
from stf_jax.data.sources.llava import SIZES, open_container, read_rows
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.files import move_file, to_path, write_json
from stf_jax.models.decoders.chat import Item

# A row's file, its index in it, and the row, or a function that reads it: a worker need not be sent its images.
NumberedRow = tuple[str, int, Any]
NAME = "llava"
NOTES = "unfinished"  # folder of the shards' notes until the data set is finished
BYTES_PER_TOKEN = 4  # roughly, in English; used without a tokenizer
_QUALITY = 95  # of shrunk JPEGs


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of :func:`prepare`."""

    annotations: tuple[str, ...]  # JSON, tables or tars
    images: str  # folder of the images; may be empty if the rows contain them
    out: str  # folder of the data set
    workers: int
    limit: int = 0  # rows to read; 0: all
    max_side: int = 0  # pixels; larger images are shrunk to it; 0: files are copied unchanged
    max_length: int = 2048  # tokens; longer conversations are dropped; 0: no limit
    tokenizer: str = ""  # folder of the tokenizer that counts tokens; empty: tokens are estimated
    template: str = "v1"
    image_tokens: int = 144  # per image
    filter: str = ""  # of ratings (ratings.py)
    strict: bool = False  # stop at the first row that would be dropped
    shard_rows: int = 8192  # rows of the annotations per shard; a reader keeps a file and two threads open per shard
    runner: str = ""  # of Apache Beam, whose workers make the shards; empty: processes of this machine
    beam_options: str = ""  # of the runner


def make_features() -> tfds.features.FeaturesDict:
    """Returns the features of a record: ``id``, ``conversations`` of ``from`` and ``value``, and ``images`` (bytes)."""
    turn = {"from": tfds.features.Text(), "value": tfds.features.Text()}
    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "conversations": tfds.features.Sequence(turn),
            "images": tfds.features.Sequence(tfds.features.Scalar(dtype=np.object_)),
        }
    )


def number_rows(options: Options) -> Iterator[NumberedRow]:
    """Yields the file, the index in it, and the row or a function that reads it."""
    return itertools.islice(
        itertools.chain.from_iterable(map(_number_file, options.annotations)), options.limit or None
    )


def _number_file(name: str) -> Iterator[NumberedRow]:
    container = open_container(name)
    if container is None:
        return ((name, i, row) for i, row in enumerate(read_rows(to_path(name))))
    return ((*container.locate(i), functools.partial(_read_row, container, i)) for i in range(len(container)))


def _read_row(rows: Rows, index: int) -> Any:
    return rows[index]


Source = list[Any] | Rows  # a JSON file's rows, or a container whose rows are read one by one


def open_sources(options: Options) -> list[Source]:
    """Opens each file of annotations. A JSON file is read as a whole."""
    containers = {name: open_container(name) for name in options.annotations}
    return [
        list(read_rows(to_path(name))) if container is None else container for name, container in containers.items()
    ]


def read_shard(options: Options, sources: Sequence[Source], shard: int) -> list[NumberedRow]:
    """Returns a shard's rows, numbered as :func:`number_rows` does."""
    start, end = shard * options.shard_rows, (shard + 1) * options.shard_rows
    end = min(end, options.limit or end)
    rows: list[NumberedRow] = []
    for name, source in zip(options.annotations, sources, strict=True):
        for i in range(max(start, 0), min(end, len(source))):
            if isinstance(source, list):
                rows.append((name, i, source[i]))
            else:
                rows.append((*source.locate(i), functools.partial(_read_row, source, i)))
        start, end = start - len(source), end - len(source)
    return rows


class ShardWriter:
    """Writes shards of one data set."""

    def __init__(self, options: Options, shards: int) -> None:
        self._options, self._shards, self._features = options, shards, make_features()
        self._tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None
        self._images, self._out = to_path(options.images) if options.images else None, to_path(options.out)
        self._filter = Filter(options.filter)

    def write(self, shard: int, rows: Sequence[NumberedRow], should_stop: Callable[[], bool]) -> None:
        """Writes a shard and its note."""
        lists = ("kept", "dropped", "tokens", "sizes", "formats", "ids", "unread")
        note: dict[str, Any] = {key: [] for key in lists} | {"bytes": 0, "filtered": 0}
        name = f"{NAME}-train.array_record-{shard:05}-of-{self._shards:05}"
        with tempfile.TemporaryDirectory() as scratch:
            local = pathlib.Path(scratch) / name
            writer = ArrayRecordWriter(str(local), "group_size:1")
            try:
                for file, index, row in rows:
                    if should_stop():
                        raise InterruptedError
                    where, row_id = f"row {index} of {file}", ""
                    try:
                        row = row() if callable(row) else row
                        row_id = _to_text(row.get("id")) if isinstance(row, dict) else ""
                        note["bytes"] += self._write_row(writer, self._filter.keep(row, where), where, note)
                    except BadRow as error:
                        if error.reason == "filtered":  # as wished, and perhaps millions
                            note["filtered"] += 1
                            continue
                        if self._options.strict:
                            raise UserError(f"--strict: {where}: {error}") from None
                        note["dropped"].append(
                            {
                                "id": shorten(row_id),
                                "image": shorten(_to_text(error.image or _get_image(row))),
                                "reason": error.reason,
                                "file": file,
                                "row": index,
                                "why": str(error),
                            }
                        )
                    note["ids"].append(row_id)
            finally:
                writer.close()
            move_file(local, self._out / name)
        write_json(self._out / NOTES / f"{shard:05}.json", note)

    def _write_row(self, writer: ArrayRecordWriter, row: Any, where: str, note: dict[str, Any]) -> int:
        parsed = read_row(row, where)
        images = parsed.images
        openers = tuple(functools.partial(self._open, image) for image in images)  # only counted
        record = Record(parsed.name, openers, parsed.turns)
        items = training_items(self._options.template, record)
        tokens = self._count_tokens(items, parsed.turns, len(images))
        if 0 < self._options.max_length < tokens:
            if self._tokenizer is None:
                message = f"Record {parsed.name!r} has an estimated {tokens} tokens; give --tokenizer to count them."
                raise BadRow("over_estimate", message)
            raise BadRow("over_length", f"Record {parsed.name!r} has {tokens} tokens.")
        files, sizes, kept_sizes, formats, names = [], [], [], [], []
        for each in images:
            name = name_image(each)
            names.append(name)
            content = read_image(self._images, each)
            image = open_image(content, name)
            max_side = self._options.max_side
            sizes.append(image.size)
            formats.append(image.format or "?")
            kept_sizes.append(image.size)
            if 0 < max_side < max(image.size):
                content, kept_sizes[-1] = shrink(image, max_side)
            files.append(content)
        turns = [{"from": turn.speaker, "value": turn.text} for turn in parsed.turns]
        example = {"id": parsed.id, "conversations": turns, "images": files}
        serialized = self._features.serialize_example(self._features.encode_example(example))
        writer.write(serialized)
        about_images = {"image": names[0] if len(names) == 1 else names, SIZES: kept_sizes} if names else {}
        kept = [turn_to_json(turn) for turn in parsed.turns]
        note["kept"].append({"id": parsed.id} | about_images | {"conversations": kept})
        note["unread"] += parsed.ignored_keys + find_unplaced(self._options.template, record)
        note["tokens"].append(tokens)
        note["sizes"] += sizes
        note["formats"] += formats
        return len(serialized)

    def _open(self, image: str | Embedded) -> PIL.Image.Image:
        return open_image(read_image(self._images, image), name_image(image))

    def _count_tokens(self, items: Sequence[Item], turns: Sequence[Turn], image_count: int) -> int:
        if self._tokenizer is not None:
            return count_tokens([items], self._tokenizer, self._options.image_tokens)[0]
        text = sum(len(turn.text.encode(errors="replace")) for turn in turns)
        return text // BYTES_PER_TOKEN + image_count * self._options.image_tokens


def _to_text(value: Any) -> str:
    """Converts a value to text that can be written: empty for None, with lone surrogates escaped."""
    return "" if value is None else str(value).encode(errors="backslashreplace").decode()


def _get_image(row: Any) -> str:
    image = (row.get("image") or row.get("images") or "") if isinstance(row, dict) else ""
    return image if isinstance(image, str) else json.dumps(image, default=lambda each: getattr(each, "name", ""))


def shrink(image: PIL.Image.Image, side: int) -> tuple[bytes, tuple[int, int]]:
    """Encodes the image as a JPEG with the given longer side; also returns its width and height."""
    small = to_rgb(image)
    small.thumbnail((side, side), PIL.Image.Resampling.LANCZOS)
    min_side = -(-side // MAX_ASPECT_RATIO)  # rounding may make the short side too small for open_image
    if min(small.size) < min_side:
        small = small.resize([max(length, min_side) for length in small.size])
    file = io.BytesIO()
    small.save(file, "JPEG", quality=_QUALITY)
    return file.getvalue(), small.size
