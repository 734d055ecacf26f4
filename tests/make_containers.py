"""Writes the same rows as LLaVA's JSON, messages, Parquet, save_to_disk folders and tars, each with its own library."""

import io
import json
import pathlib
import tarfile
from collections.abc import Mapping, Sequence

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
PAIR = pa.struct([("user", pa.string()), ("assistant", pa.string())])
PAIRS = pa.schema([("images", pa.list_(IMAGE)), ("texts", pa.list_(PAIR)), ("relevance_ratings", pa.list_(pa.int64()))])
RATINGS = ([5, 1], [2, 3], [4, 4], [1, 1])


def make_image(number: int) -> bytes:
    """A PNG file of 20 + ``number`` pixels in width, of noise."""
    pixels = np.random.default_rng(number).integers(0, 256, (12, 20 + number, 3), dtype=np.uint8)
    with io.BytesIO() as file:
        PIL.Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()


def make_rows(count: int) -> list[tuple[list[bytes], list[tuple[str, str]]]]:
    """Images and pairs of texts of rows: every third without an image, every fourth with two."""
    images = [[make_image(10 * i + j) for j in range(0 if i % 3 == 2 else 1 + (i % 4 == 3))] for i in range(count)]
    return [(found, [(f"What is {i}?", f"It is {i}."), ("Sure?", "Yes.")]) for i, found in enumerate(images)]


def _turns(images: Sequence[bytes], pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    turns = [turn for user, assistant in pairs for turn in (("user", user), ("assistant", assistant))]
    return [("user", "<image>" * len(images) + turns[0][1]), *turns[1:]]


def _llava(images, pairs):
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names[who], "value": text} for who, text in _turns(images, pairs)]


def _write_images(folder: pathlib.Path, number: int, images: Sequence[bytes]) -> list[str]:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i, content in enumerate(images):
        (folder / "images" / f"{number}-{i}.png").write_bytes(content)
    return [f"{number}-{i}.png" for i in range(len(images))]


def write_llava(folder, rows) -> pathlib.Path:
    """LLaVA's JSON, and a folder of images beside it."""
    found = [
        {"id": f"r{i}", "image": _write_images(folder, i, images), "conversations": _llava(images, pairs)}
        for i, (images, pairs) in enumerate(rows)
    ]
    (folder / "llava.json").write_text(json.dumps(found))
    return folder / "llava.json"


def write_messages(folder, rows) -> pathlib.Path:
    """OpenAI's messages with parts, in JSON lines, and a folder of images beside it."""
    lines = []
    for i, (images, pairs) in enumerate(rows):
        parts = [{"type": "image_url", "image_url": {"url": name}} for name in _write_images(folder, i, images)]
        turns = [{"role": who, "content": [{"type": "text", "text": text}]} for pair in pairs
                 for who, text in zip(("user", "assistant"), pair, strict=True)]  # fmt: skip
        turns[0]["content"] = parts + turns[0]["content"]
        lines.append(json.dumps({"id": f"r{i}", "messages": turns}))
    (folder / "messages.jsonl").write_text("\n".join(lines))
    return folder / "messages.jsonl"


def pair_rows(rows) -> list[Mapping]:
    """FineVision's rows, with ratings of each text."""
    return [
        {
            "images": [{"bytes": content, "path": None} for content in images],
            "texts": [{"user": user, "assistant": assistant} for user, assistant in pairs],
            "relevance_ratings": RATINGS[i % len(RATINGS)],
        }
        for i, (images, pairs) in enumerate(rows)
    ]


def write_pairs(folder, rows) -> pathlib.Path:
    """FineVision's schema in two Parquet files, by ``datasets``, as on the Hub."""
    import datasets

    kinds = {"user": datasets.Value("string"), "assistant": datasets.Value("string")}
    features = datasets.Features(
        {"images": [datasets.Image()], "texts": [kinds], "relevance_ratings": [datasets.Value("int64")]}
    )
    (folder / "pairs").mkdir(parents=True)
    data = datasets.Dataset.from_list(pair_rows(rows), features=features)
    for shard in range(2):
        file = folder / "pairs" / f"train-{shard:05}-of-00002.parquet"
        data.shard(2, shard, contiguous=True).to_parquet(file, batch_size=4)
    return folder / "pairs"


def write_disk(folder, rows) -> pathlib.Path:
    """Images and messages with parts, by ``save_to_disk``, in two files."""
    import datasets

    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "images": [datasets.Image()],
            "messages": [
                {
                    "role": datasets.Value("string"),
                    "content": [{"type": datasets.Value("string"), "text": datasets.Value("string")}],
                }
            ],
        }
    )
    found = []
    for i, (images, pairs) in enumerate(rows):
        turns = [{"role": who, "content": [{"type": "text", "text": text}]} for pair in pairs
                 for who, text in zip(("user", "assistant"), pair, strict=True)]  # fmt: skip
        turns[0]["content"] = [{"type": "image", "text": None}] * len(images) + turns[0]["content"]
        embedded = [{"bytes": content, "path": f"{i}.png"} for content in images]
        found.append({"id": f"r{i}", "images": embedded, "messages": turns})
    datasets.Dataset.from_list(found, features=features).save_to_disk(folder / "disk", num_shards=2)
    return folder / "disk"


def write_paths(folder, rows) -> pathlib.Path:
    """LLaVA's rows in a Parquet file, by pyarrow, and a folder of images beside it."""
    found = [
        {"id": f"r{i}", "image": _write_images(folder, i, images), "conversations": _llava(images, pairs)}
        for i, (images, pairs) in enumerate(rows)
    ]
    pq.write_table(pa.Table.from_pylist(found), folder / "paths.parquet", row_group_size=5)
    return folder / "paths.parquet"


def write_single(folder, rows) -> pathlib.Path:
    """One image per row, with its path, null for none: a Parquet file by pyarrow. Only for rows with at most one."""
    schema = pa.schema([("image", IMAGE), ("texts", pa.list_(PAIR))])
    found = [
        {
            "image": {"bytes": images[0], "path": f"{i}.png"} if images else None,
            "texts": [{"user": user, "assistant": assistant} for user, assistant in pairs],
        }
        for i, (images, pairs) in enumerate(rows)
    ]
    pq.write_table(pa.Table.from_pylist(found, schema), folder / "single.parquet", row_group_size=4)
    return folder / "single.parquet"


def write_tar(file: pathlib.Path, members: Sequence[tuple[str, bytes]]) -> pathlib.Path:
    """Files of those names and contents in a tar."""
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


def write_tars(folder, rows) -> pathlib.Path:
    """WebDataset's layout in two tars: images and JSON with LLaVA's turns."""
    (folder / "tars").mkdir(parents=True)
    members = [
        [
            *((f"./part/r{i}.{j}.png" if j else f"./part/r{i}.png", content) for j, content in enumerate(images)),
            (f"./part/r{i}.json", json.dumps({"id": f"r{i}", "conversations": _llava(images, pairs)}).encode()),
        ]
        for i, (images, pairs) in enumerate(rows)
    ]
    half = len(rows) // 2
    for shard, some in enumerate((members[:half], members[half:])):
        write_tar(folder / "tars" / f"{shard:06}.tar", [member for sample in some for member in sample])
    return folder / "tars"


WRITERS = {
    "llava": write_llava,
    "messages": write_messages,
    "pairs": write_pairs,
    "disk": write_disk,
    "paths": write_paths,
    "tars": write_tars,
}
