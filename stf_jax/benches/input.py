"""The input pipeline beside LLaVA's way: images per second of a core, and how much of the rows is not filling.

LLaVA's way is what its training data set does for each sample: open, convert, pad to a square, transformers'
CLIPImageProcessor (the one on Pillow and numpy), and a conversation tokenised whole, then round by round to mask it.
"""

import argparse
import dataclasses
import importlib.util
import json
import pathlib
import resource
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import PIL.Image
from etils import epath

from stf_jax.benches.mixture import jpegs, lengths
from stf_jax.config import DataConfig, TrainConfig, UserError
from stf_jax.data.conversation import SYSTEM, encode, template_items
from stf_jax.data.image import open_image, read_image, to_square
from stf_jax.data.llava import LlavaRecords
from stf_jax.data.packing import to_row
from stf_jax.data.pipeline import Batches, Prepare, Records
from stf_jax.data.sampling import Plan
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.models.presets import vision_preset

_SLOTS = 144
_BATCH, _DEVICES = 128, 8  # rows per step, and how LLaVA's recipe deals them out


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of figures; all on one set of files, in one process but for torch's own workers."""
    if options.images < 1 or options.rows < 1:
        raise UserError("--images and --rows must be at least 1.")
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        files = _make(pathlib.Path(folder), options.images, rng)
        size = {"what": "JPEGs made", "count": len(files), "kilobytes_each": _kilobytes(pathlib.Path(folder))}
        return [size, *_speed(pathlib.Path(folder), files), *_positions(options.rows, rng)]


def _kilobytes(folder):
    return float(np.mean([path.stat().st_size for path in (folder / "images").iterdir()])) / 1000


def _make(folder, count, rng):
    """JPEGs, and conversations of four rounds about them, in LLaVA's schema."""
    (folder / "images").mkdir()
    rows = []
    for i, content in enumerate(jpegs(count, rng)):
        (folder / "images" / f"{i:06}.jpg").write_bytes(content)
        talk = []
        for j in range(4):
            ask = "What is the color of the thing that stands beside the tree?"
            answer = "The thing beside the tree is red, and it stands in the light of the evening." * (1 + j % 2)
            talk += [{"from": "human", "value": ask}, {"from": "gpt", "value": answer}]
        talk[0]["value"] = "<image>\n" + talk[0]["value"]
        rows.append({"id": str(i), "image": f"{i:06}.jpg", "conversations": talk})
    (folder / "rows.json").write_text(json.dumps(rows))
    return rows


# ---- Speed -----------------------------------------------------------------------------------------------------------


def _speed(folder, rows):
    vision, tokenizer = vision_preset("clip-l-14-336"), load_tokenizer("miniature")
    data = DataConfig(aspect="pad", images_per_row=1, max_length=2048, tokenizer="miniature")
    source = Records([LlavaRecords(str(folder / "rows.json"), str(folder / "images"))])
    prepare = Prepare(data, tokenizer, vision, _SLOTS)

    def ours():
        for i in range(len(source)):
            to_row([prepare(source[i])], 1024, 1, vision.image_size)

    config = TrainConfig(global_batch_size=16, data=dataclasses.replace(data, max_length=1024))
    batches = Batches(config, source, prepare, host=0, hosts=1)

    def pipeline():
        for _ in range(len(source) // 16):
            next(batches)

    theirs = _LlavaDataset(folder, rows, tokenizer)
    ways: dict[str, Callable[[], Any]] = {
        "ours, one thread": ours,
        "ours, the pipeline (2 threads)": pipeline,
        "LLaVA's way, plain loop": lambda: _exhaust(theirs[i] for i in range(len(rows))),
    }
    if importlib.util.find_spec("torch") is not None:
        from torch.utils.data import DataLoader

        loader = DataLoader(theirs, batch_size=16, num_workers=2, collate_fn=list, multiprocessing_context="fork")
        ways["LLaVA's way, DataLoader (2 workers)"] = lambda: _exhaust(loader)
    figures: dict[str, dict[str, Any]] = {}
    for name, way in ways.items():
        seconds, core = _clocked(way)
        figures[name] = {
            "what": name,
            "images_per_second_per_core": len(rows) / core,
            "images_per_second": len(rows) / seconds,
        }
    base = figures["LLaVA's way, plain loop"]["images_per_second_per_core"]
    for row in figures.values():
        row["ratio_per_core"] = row["images_per_second_per_core"] / base
    return [*figures.values(), *_parts(folder, rows, prepare, tokenizer, theirs)]


def _clocked(way):
    """Seconds by the clock, and of processors, children included; one round goes before, to warm up."""
    way()
    start, core = time.monotonic(), _processor_seconds()
    way()
    return time.monotonic() - start, _processor_seconds() - core


def _processor_seconds():
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, who))


def _exhaust(iterable: Iterable[Any]):
    for _ in iterable:
        pass


def _parts(folder, rows, prepare, tokenizer, theirs):
    """Where the time of an image goes, in ours and in theirs."""
    images = epath.Path(folder / "images")
    files = [read_image(images, row["image"]) for row in rows]
    opened = [open_image(content, "") for content in files]
    records = LlavaRecords(str(folder / "rows.json"), str(folder / "images"))
    squares = [theirs.square(image) for image in opened]
    parts = {
        "read the file": lambda i: read_image(images, rows[i]["image"]),
        "both: decode the JPEG": lambda i: open_image(files[i], ""),
        "ours: pad, resize, crop": lambda i: to_square(opened[i], prepare.vision, "pad"),
        "ours: tokens and masks": lambda i: encode(template_items("v1", records[i]), tokenizer, _SLOTS),
        "theirs: pad to a square": lambda i: theirs.square(opened[i]),
        "theirs: CLIPImageProcessor": lambda i: theirs.processor(squares[i], return_tensors="np"),
        "theirs: tokens and masks": lambda i: theirs.text(rows[i]),
    }
    figures = []
    for name, part in parts.items():
        _, core = _clocked(lambda part=part: [part(i) for i in range(len(rows))])
        figures.append({"what": name, "milliseconds": 1000 * core / len(rows)})
    _, core = _clocked(lambda: prepare.measure(records))
    return [*figures, {"what": "ours: measure it, once before training", "milliseconds": 1000 * core / len(rows)}]


class _LlavaDataset:
    """What LLaVA's training data set does for a sample, written anew from its description (facts of its code)."""

    def __init__(self, folder, rows, tokenizer):
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        self.folder, self.rows, self.tokenizer = folder, rows, tokenizer
        self.processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        image = PIL.Image.open(self.folder / "images" / self.rows[index]["image"]).convert("RGB")
        pixels = self.processor(self.square(image), return_tensors="np")["pixel_values"][0]
        return pixels, *self.text(self.rows[index])

    @staticmethod
    def square(image):
        """On a square of CLIP's mean colour."""
        side = max(image.size)
        canvas = PIL.Image.new("RGB", (side, side), (122, 116, 104))
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return canvas

    def text(self, row):
        """Ids of the whole; lengths of each round and of its question say what of them is masked."""
        text = SYSTEM + " "
        for turn in row["conversations"]:
            text += f"USER: {turn['value']} " if turn["from"] == "human" else f"ASSISTANT: {turn['value']}</s>"
        ids = self._ids(text)
        labels, begin = np.array(ids), 1
        labels[0] = -100
        for a_round in filter(None, text.split("</s>")):
            question = a_round.split(" ASSISTANT: ")[0] + " ASSISTANT: "
            labels[begin : begin + len(self._ids(question)) - 2] = -100
            begin += len(self._ids(a_round))
        return np.array(ids), labels

    def _ids(self, text):
        ids = []
        for i, chunk in enumerate(text.split("<image>")):
            tokens = self.tokenizer(chunk).input_ids
            ids += [-200, *tokens[1:]] if i else tokens
        return ids


# ---- Positions -------------------------------------------------------------------------------------------------------


def _positions(rows, rng):
    """Share of positions that hold a token, for lengths like the 665K mixture's."""
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
    theirs = _group_by_modality_length(tokens, image_counts, np.random.default_rng(0))
    filled = sum(len(batch) * tokens[batch].max() for batch in theirs)
    # A row of text alone runs a blank image through the tower there.
    figures.append(
        {
            "what": "LLaVA's group_by_modality_length",
            "useful_positions": float(tokens.sum() / filled),
            "useful_image_places": float(image_counts.mean()),
        }
    )
    return figures


def _group_by_modality_length(tokens, image_counts, rng):
    """Batches of a device as LLaVA's sampler makes them: groups of a step, sorted and dealt out evenly by length."""
    groups, left = [], []
    for kind in (image_counts > 0, image_counts == 0):
        mine = rng.permutation(np.flatnonzero(kind))
        whole = len(mine) // _BATCH * _BATCH
        groups += list(mine[:whole].reshape(-1, _BATCH))
        left.append(mine[whole:])
    groups.append(np.concatenate(left))
    batches = []
    for group in groups:
        chunks, sums = [[] for _ in range(_DEVICES)], np.zeros(_DEVICES)
        for i in group[np.argsort(-tokens[group], kind="stable")]:
            open_ones = [c for c in range(_DEVICES) if len(chunks[c]) < -(-len(group) // _DEVICES)]
            shortest = min(open_ones, key=lambda c: sums[c])
            chunks[shortest].append(i)
            sums[shortest] += tokens[i]
        batches += [np.array(chunk) for chunk in chunks if chunk]
    return batches
