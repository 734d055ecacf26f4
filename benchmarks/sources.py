"""Data sources compared: images per second per core from each container of rows, and the time to plan many rows.

All containers hold the same JPEGs and conversations. Rows are read in random order, as in training.
"""

import argparse
import io
import json
import pathlib
import resource
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.input import make_files
from benchmarks.mixture import jpegs
from stf_jax.config import DataConfig, TrainConfig, UserError
from stf_jax.data.packing import to_row
from stf_jax.data.pipeline import Batches, Preprocessor, load_training_records
from stf_jax.data.sources.llava import open_llava
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.models.spec import vision_preset

_SLOTS, _GROUP, _ROUNDS = 144, 100, 5  # rows per group, as datasets writes images
_PARQUET_GROUP = 1000  # rows per group of short rows
_SCHEMA = pa.schema(
    [
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        ("texts", pa.list_(pa.struct([("user", pa.string()), ("assistant", pa.string())]))),
        ("relevance_ratings", pa.list_(pa.int64())),
    ]
)
_Figures = list[dict[str, Any]]


def run(options: argparse.Namespace) -> _Figures:
    """Measures all sources in one process and one thread."""
    if options.images < 1 or options.rows < 1:
        raise UserError("--images and --rows must be at least 1.")
    with tempfile.TemporaryDirectory() as folder:
        planned = _plan_rows(pathlib.Path(folder), options.rows)
    with tempfile.TemporaryDirectory() as folder:
        return [*_measure_speed(pathlib.Path(folder), options.images), planned]


def _measure_speed(folder: pathlib.Path, count: int) -> _Figures:
    sources = _write_sources(folder, count)
    vision, tokenizer = vision_preset("clip-l-14-336"), load_tokenizer("miniature")
    readers: dict[str, Callable[[], None]] = {}
    first: dict[str, float] = {}
    for name, (path, images) in sources.items():
        data = DataConfig(annotations=str(path), images=str(images), aspect="pad", tokenizer="miniature")
        (records,) = open_llava(TrainConfig(data=data))
        preprocessor, order = Preprocessor(data, tokenizer, vision, _SLOTS), np.random.default_rng(0).permutation(count)

        def read(records: Any = records, preprocessor: Preprocessor = preprocessor, order: Any = order) -> None:
            for index in order.tolist():
                to_row([preprocessor(records[index])], 1024, 1, vision.image_size, preprocessor.layout.tokens)

        begin = time.process_time()
        read()
        first[name] = time.process_time() - begin
        readers[name] = read
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(_ROUNDS):  # in turns, so that other programs slow all of them
        for name, reader in readers.items():
            begin = time.process_time()
            reader()
            seconds[name].append(time.process_time() - begin)
    best = {name: min(values) for name, values in seconds.items()}
    base = next(iter(best.values()))
    return [
        {
            "what": name,
            "images_per_second_per_core": count / value,
            "ratio": base / value,
            "first_epoch_images_per_second_per_core": count / first[name],
        }
        for name, value in best.items()
    ]


def _write_sources(folder: pathlib.Path, count: int) -> dict[str, tuple[pathlib.Path, pathlib.Path | str]]:
    """Writes the containers; returns the path and the folder of images of each."""
    rows = make_files(folder, count, np.random.default_rng(0))
    contents = [(folder / "images" / row["image"]).read_bytes() for row in rows]
    pairs = []
    for row in rows:
        texts = [turn["value"] for turn in row["conversations"]]
        pairs.append([{"user": a, "assistant": b} for a, b in zip(texts[::2], texts[1::2], strict=True)])
    table = pa.Table.from_pylist(
        [
            {"images": [{"bytes": content, "path": None}], "texts": texts, "relevance_ratings": [5] * len(texts)}
            for content, texts in zip(contents, pairs, strict=True)
        ],
        _SCHEMA,
    )
    plain = {"use_dictionary": False, "row_group_size": _GROUP}
    pq.write_table(table, folder / "plain.parquet", compression="none", **plain)
    pq.write_table(table, folder / "snappy.parquet", compression="snappy", **plain)
    (folder / "disk").mkdir()
    with pa.ipc.new_stream(str(folder / "disk" / "data-00000-of-00001.arrow"), _SCHEMA) as writer:
        writer.write_table(table, max_chunksize=_GROUP)
    (folder / "disk" / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]})
    )
    with tarfile.open(folder / "samples.tar", "w") as tar:
        for row, content in zip(rows, contents, strict=True):
            for suffix, value in (("jpg", content), ("json", json.dumps(row).encode())):
                member = tarfile.TarInfo(f"{row['id']}.{suffix}")
                member.size = len(value)
                tar.addfile(member, io.BytesIO(value))
    return {
        "LLaVA's JSON and a folder of images": (folder / "rows.json", folder / "images"),
        "Parquet, images not compressed": (folder / "plain.parquet", ""),
        "Parquet, images compressed": (folder / "snappy.parquet", ""),
        "save_to_disk": (folder / "disk", ""),
        "tar": (folder / "samples.tar", ""),
    }


def _plan_rows(folder: pathlib.Path, count: int) -> dict[str, Any]:
    """Opens, measures and plans an epoch of short rows in a Parquet file."""
    file, (image,) = folder / "rows.parquet", jpegs(1, np.random.default_rng(0))
    with pq.ParquetWriter(file, _SCHEMA) as writer:  # the image is the same, so a dictionary holds it
        for rows in _make_short_rows(count, image):
            writer.write_table(pa.Table.from_pylist(list(rows), _SCHEMA))
    data = DataConfig(
        annotations=str(file), packing=True, images_per_row=8, max_length=1024, tokenizer="miniature", threads=1
    )
    config = TrainConfig(global_batch_size=128, data=data)
    begin, cpu = time.monotonic(), time.process_time()
    records = load_training_records(config)
    preprocessor = Preprocessor(data, load_tokenizer("miniature"), vision_preset("clip-l-14-336"), _SLOTS)
    batches = Batches(config, records, preprocessor, host=0, hosts=1)
    steps = batches.plan.steps(1)
    seconds, cpu_seconds = time.monotonic() - begin, time.process_time() - cpu
    batches.close()
    return {
        "what": f"plan {count:,} rows of Parquet",
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "steps": steps,
        "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def _make_short_rows(count: int, image: bytes) -> Iterator[Sequence[dict[str, Any]]]:
    for begin in range(0, count, _PARQUET_GROUP):
        yield [
            {
                "images": [{"bytes": image, "path": None}],
                "texts": [
                    {
                        "user": f"What is the color of the thing that stands beside tree {number}?",
                        "assistant": f"The thing beside tree {number} is red, and it stands in the light.",
                    }
                ],
                "relevance_ratings": [1 + number % 5],
            }
            for number in range(begin, min(begin + _PARQUET_GROUP, count))
        ]
