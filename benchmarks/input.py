"""The input pipeline compared with LLaVA's: images per second per core, and the fraction of positions not padding.

LLaVA's pipeline is what its training data set does per sample: open, convert, pad to a square, transformers'
CLIPImageProcessor (the one on Pillow and numpy), and tokenize the full conversation, then each round to mask it.
"""

import argparse
import dataclasses
import importlib.util
import json
import pathlib
import resource
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import PIL.Image
from etils import epath
from transformers import PreTrainedTokenizerFast

from benchmarks.mixture import jpegs, lengths
from stf_jax.config import DataConfig, TrainConfig, UserError
from stf_jax.data.conversation import encode, template_items
from stf_jax.data.image import open_image, read_image, to_square
from stf_jax.data.packing import to_row
from stf_jax.data.pipeline import Batches, ConcatenatedRecords, Preprocessor
from stf_jax.data.sampling import Plan
from stf_jax.data.sources.llava import LlavaRecords
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.models.decoders.llama import SYSTEM
from stf_jax.models.spec import vision_preset

_SLOTS = 144
_ROWS = 16  # of a batch
_BATCH, _DEVICES = 128, 8  # rows per step and devices in LLaVA's recipe
_Row = dict[str, Any]  # of LLaVA's JSON files
_Figures = list[dict[str, Any]]


def run(options: argparse.Namespace) -> _Figures:
    """Measures both pipelines on the same files, in one process except for the workers of torch."""
    if options.images < 1 or options.images % _ROWS or options.rows < 1:
        raise UserError(f"--images must be a multiple of {_ROWS}, the rows of a batch, and --rows at least 1.")
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        files = make_files(pathlib.Path(folder), options.images, rng)
        size = {"what": "JPEG files", "count": len(files), "kilobytes_each": _kilobytes(pathlib.Path(folder))}
        return [size, *_measure_speed(pathlib.Path(folder), files), *_count_positions(options.rows, rng)]


def _kilobytes(folder: pathlib.Path) -> float:
    return float(np.mean([path.stat().st_size for path in (folder / "images").iterdir()])) / 1000


def make_files(folder: pathlib.Path, count: int, rng: np.random.Generator) -> list[_Row]:
    """Writes JPEGs, and conversations of four rounds about them in LLaVA's schema."""
    (folder / "images").mkdir()
    rows = []
    for i, content in enumerate(jpegs(count, rng)):
        (folder / "images" / f"{i:06}.jpg").write_bytes(content)
        turns = []
        for j in range(4):
            question = "What is the color of the thing that stands beside the tree?"
            answer = "The thing beside the tree is red, and it stands in the light of the evening." * (1 + j % 2)
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        turns[0]["value"] = "<image>\n" + turns[0]["value"]
        rows.append({"id": str(i), "image": f"{i:06}.jpg", "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    return rows


# ---- Speed -----------------------------------------------------------------------------------------------------------


def _measure_speed(folder: pathlib.Path, rows: Sequence[_Row]) -> _Figures:
    vision, tokenizer = vision_preset("clip-l-14-336"), load_tokenizer("miniature")
    data = DataConfig(aspect="pad", images_per_row=1, max_length=2048, tokenizer="miniature")
    source = ConcatenatedRecords([LlavaRecords(str(folder / "rows.json"), str(folder / "images"))])
    preprocessor = Preprocessor(data, tokenizer, vision, _SLOTS)

    def ours() -> None:
        for i in range(len(source)):
            to_row([preprocessor(source[i])], 1024, 1, vision.image_size, preprocessor.layout.tokens)

    config = TrainConfig(global_batch_size=_ROWS, data=dataclasses.replace(data, max_length=1024))
    batches = Batches(config, source, preprocessor, host=0, hosts=1)

    def pipeline() -> None:
        for _ in range(len(source) // _ROWS):
            next(batches)

    reference = _LlavaDataset(folder, rows, tokenizer)
    pipelines: dict[str, Callable[[], None]] = {
        "ours, one thread": ours,
        "ours, the pipeline (2 threads)": pipeline,
        "LLaVA's way, plain loop": lambda: _exhaust(reference[i] for i in range(len(rows))),
    }
    if importlib.util.find_spec("torch") is not None:
        from torch.utils.data import DataLoader

        loader: DataLoader[Any] = DataLoader(
            reference,  # type: ignore[arg-type]  # torch accepts any object with a length and items
            batch_size=_ROWS,
            num_workers=2,
            collate_fn=list,
            multiprocessing_context="fork",
        )
        pipelines["LLaVA's way, DataLoader (2 workers)"] = lambda: _exhaust(loader)
    figures: dict[str, dict[str, Any]] = {}
    for name, call in pipelines.items():
        seconds, cpu_seconds = _time(call)
        if call is pipeline:
            batches.close()  # or its threads would read on while the others are timed
        figures[name] = {
            "what": name,
            "images_per_second_per_core": len(rows) / cpu_seconds,
            "images_per_second": len(rows) / seconds,
        }
    base = figures["LLaVA's way, plain loop"]["images_per_second_per_core"]
    for row in figures.values():
        row["ratio_per_core"] = row["images_per_second_per_core"] / base
    return [*figures.values(), *_time_parts(folder, rows, preprocessor, tokenizer, reference)]


def _time(call: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock seconds and CPU seconds of a call, including child processes, after a warm-up."""
    call()
    start, cpu_start = time.monotonic(), _cpu_seconds()
    call()
    return time.monotonic() - start, _cpu_seconds() - cpu_start


def _cpu_seconds() -> float:
    processes = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, processes))


def _exhaust(iterable: Iterable[Any]) -> None:
    for _ in iterable:
        pass


def _time_parts(
    folder: pathlib.Path,
    rows: Sequence[_Row],
    preprocessor: Preprocessor,
    tokenizer: PreTrainedTokenizerFast,
    reference: "_LlavaDataset",
) -> _Figures:
    """Time per image of each part of both pipelines."""
    images = epath.Path(folder / "images")
    files = [read_image(images, row["image"]) for row in rows]
    opened = [open_image(content, "") for content in files]
    records = LlavaRecords(str(folder / "rows.json"), str(folder / "images"))
    squares = [reference.square(image) for image in opened]
    parts: dict[str, Callable[[int], object]] = {
        "read the file": lambda i: read_image(images, rows[i]["image"]),
        "both: decode the JPEG": lambda i: open_image(files[i], ""),
        "ours: pad, resize, crop": lambda i: to_square(opened[i], preprocessor.layout.vision, "pad"),
        "ours: tokens and masks": lambda i: encode(template_items("v1", records[i]), tokenizer, _SLOTS),
        "reference: pad to a square": lambda i: reference.square(opened[i]),
        "reference: CLIPImageProcessor": lambda i: reference.processor(squares[i], return_tensors="np"),
        "reference: tokens and masks": lambda i: reference.text(rows[i]),
    }

    def time_part(part: Callable[[int], object]) -> float:
        return _time(lambda: [part(i) for i in range(len(rows))])[1]

    figures = []
    for name, part in parts.items():
        cpu_seconds = time_part(part)
        figures.append({"what": name, "milliseconds": 1000 * cpu_seconds / len(rows)})
    _, cpu_seconds = _time(lambda: preprocessor.measure(records))
    return [
        *figures,
        {"what": "ours: count tokens, once before training", "milliseconds": 1000 * cpu_seconds / len(rows)},
    ]


class _LlavaDataset:
    """What LLaVA's training data set does per sample, reimplemented from a description of its code."""

    def __init__(self, folder: pathlib.Path, rows: Sequence[_Row], tokenizer: PreTrainedTokenizerFast) -> None:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        self.folder, self.rows, self.tokenizer = folder, rows, tokenizer
        self.processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        image = PIL.Image.open(self.folder / "images" / self.rows[index]["image"]).convert("RGB")
        pixels = self.processor(self.square(image), return_tensors="np")["pixel_values"][0]
        return pixels, *self.text(self.rows[index])

    @staticmethod
    def square(image: PIL.Image.Image) -> PIL.Image.Image:
        """Pads to a square with CLIP's mean color."""
        side = max(image.size)
        canvas = PIL.Image.new("RGB", (side, side), (122, 116, 104))
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return canvas

    def text(self, row: _Row) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and labels; the lengths of each round and of its question decide what is masked."""
        text = SYSTEM + " "
        for turn in row["conversations"]:
            text += f"USER: {turn['value']} " if turn["from"] == "human" else f"ASSISTANT: {turn['value']}</s>"
        ids = self._ids(text)
        labels, begin = np.array(ids), 1
        labels[0] = -100
        for round_text in filter(None, text.split("</s>")):
            question = round_text.split(" ASSISTANT: ")[0] + " ASSISTANT: "
            labels[begin : begin + len(self._ids(question)) - 2] = -100
            begin += len(self._ids(round_text))
        return np.array(ids), labels

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = []
        for i, chunk in enumerate(text.split("<image>")):
            tokens = self.tokenizer(chunk).input_ids
            ids += [-200, *tokens[1:]] if i else tokens
        return ids


# ---- Positions -------------------------------------------------------------------------------------------------------


def _count_positions(rows: int, rng: np.random.Generator) -> _Figures:
    """Fraction of positions that hold a token, for lengths like those of the 665K mixture."""
    tokens, image_counts = lengths(rows, _SLOTS, rng)
    figures = []
    for name, data in {
        "ours, packed (8 images per row)": DataConfig(packing=True, images_per_row=8),
        "ours, packed (6 images per row)": DataConfig(packing=True, images_per_row=6),
        "ours, grouped (8 lengths)": DataConfig(buckets=8),
    }.items():
        start = time.monotonic()
        plan = Plan(data, 0, _BATCH, tokens, image_counts, [rows])
        planned = [plan[i] for i in range(plan.steps(1) * _BATCH)]
        figures.append(
            {
                "what": name,
                "useful_positions": float(tokens.sum() / sum(row.length for row in planned)),
                "useful_image_places": float(image_counts.sum() / sum(row.images for row in planned)),
                "seconds_to_plan": time.monotonic() - start,
            }
        )
    reference = _group_by_modality_length(tokens, image_counts, np.random.default_rng(0))
    padded = sum(len(batch) * tokens[batch].max() for batch in reference)
    # LLaVA runs a blank image through the tower for rows without an image.
    figures.append(
        {
            "what": "LLaVA's group_by_modality_length",
            "useful_positions": float(tokens.sum() / padded),
            "useful_image_places": float(image_counts.mean()),
        }
    )
    return figures


def _group_by_modality_length(
    tokens: np.ndarray, image_counts: np.ndarray, rng: np.random.Generator
) -> list[np.ndarray]:
    """Batches per device as in LLaVA's sampler: the groups of a step, sorted and distributed evenly by length."""
    groups, remainder = [], []
    for kind in (image_counts > 0, image_counts == 0):
        members = rng.permutation(np.flatnonzero(kind))
        end = len(members) // _BATCH * _BATCH
        groups += list(members[:end].reshape(-1, _BATCH))
        remainder.append(members[end:])
    groups.append(np.concatenate(remainder))
    batches = []
    for group in groups:
        chunks: list[list[int]] = [[] for _ in range(_DEVICES)]
        sums = np.zeros(_DEVICES)
        for i in group[np.argsort(-tokens[group], kind="stable")]:
            not_full = [c for c in range(_DEVICES) if len(chunks[c]) < -(-len(group) // _DEVICES)]
            shortest = min(not_full, key=lambda c: sums[c])
            chunks[shortest].append(i)
            sums[shortest] += tokens[i]
        batches += [np.array(chunk) for chunk in chunks if chunk]
    return batches
