"""LLaVA's JSON and image folders, checked row by row, to a TFDS data set of ArrayRecord shards.

The rows are cut into shards beforehand, in the order of the files. Worker processes check and write a shard each; it
appears under its name when it is whole, with a note beside it of what was kept and dropped. So what was interrupted
goes on with the shards that are missing. The data set is finished when ``dataset_info.json`` appears, written last.
"""

import collections
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import errno
import functools
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import pathlib
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds
import tqdm
from array_record.python.array_record_module import ArrayRecordWriter

from stf_jax.config import UserError, shorten
from stf_jax.data.conversation import check_template, count_tokens, training_items
from stf_jax.data.image import MOST_RATIO, open_image, read_image, to_rgb
from stf_jax.data.llava import INFO, KEPT, read_rows
from stf_jax.data.records import REASONS, BadRow, Record
from stf_jax.data.report import Report, draw_histograms
from stf_jax.data.rows import read_row
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.runtime.files import in_bucket, make_folder, move_in, new_text, read_json, to_path, write_json
from stf_jax.runtime.hold import lock

NAME = "llava"
NOTES = "unfinished"  # folder of the shards' notes while a data set is being made
REPORT, HISTOGRAMS = "report.json", "histograms.png"
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
_BYTES_A_TOKEN = 4  # of English, roughly, where no tokenizer is given
_QUALITY = 95  # of JPEGs that were shrunk


@dataclasses.dataclass(frozen=True)
class Options:
    """What to prepare, and what counts as unfit."""

    annotations: tuple[str, ...]  # LLaVA JSON files
    images: str  # folder that their image paths start from
    out: str  # folder of the data set
    workers: int
    limit: int = 0  # rows to read; 0: all
    max_side: int = 0  # pixels; larger images are shrunk to it; 0: files are kept as they are
    max_length: int = 2048  # tokens; longer conversations are dropped; 0: none are
    tokenizer: str = ""  # folder, to count tokens with; empty: estimated
    template: str = "v1"
    image_tokens: int = 144
    strict: bool = False
    shard_rows: int = 8192  # rows of the annotations, a shard; a reader holds a file and two threads open for each


def features() -> tfds.features.FeaturesDict:
    """Of a record: ``id``, ``conversations`` of ``from`` and ``value``, and ``images``, each a file's bytes."""
    turn = {"from": tfds.features.Text(), "value": tfds.features.Text()}
    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "conversations": tfds.features.Sequence(turn),
            "images": tfds.features.Sequence(tfds.features.Scalar(dtype=np.object_)),
        }
    )


def prepare(options: Options) -> Report:
    """Makes the data set, or goes on with one that was interrupted; a finished one is left as it is.

    Raises:
      UserError: input that cannot be read, or of which no row can be used; ``out`` holds something else, or work on
        other input, or another run is writing it; with ``strict``, a row that would be dropped.
    """
    out = to_path(options.out)
    if not to_path(options.images).is_dir():
        raise UserError(f"The image folder {options.images} does not exist.")
    check_template(options.template, load_tokenizer(options.tokenizer) if options.tokenizer else None)
    plan = _plan(options)
    make_folder(out)
    with _held(out):
        return _prepare(options, plan, out, out / NOTES)


def _prepare(options, plan, out, notes):
    if (out / INFO).exists():
        made = read_json(out / REPORT) if (out / REPORT).exists() else {}
        if made.get("made_from") != plan:
            raise UserError(f"{options.out} holds a data set made from other input; choose another --out.")
        if notes.exists():  # the last thing to go
            notes.rmtree()
        if options.strict and made["dropped"]:
            raise UserError(f"--strict: {made['dropped'][0]['why']}")
        print(f"{options.out} was finished before; nothing is checked again, unless the folder is removed.")
        return Report(made)
    if (notes / "plan.json").exists() and not any(read_json(n)["kept"] for n in notes.glob("0*.json")):
        _clear(out, notes)  # whatever was wrong may have been put right since
    if (notes / "plan.json").exists():
        if read_json(notes / "plan.json") != plan:
            raise UserError(f"{options.out} holds unfinished work on other input; finish that, or remove the folder.")
    elif out.exists() and any(path.name != NOTES for path in out.iterdir()):  # a bucket's empty folder does not
        raise UserError(f"{options.out} exists and is not empty; choose another --out.")
    else:
        make_folder(notes)
        write_json(notes / "plan.json", plan)
    _work(options, plan["shards"], notes)
    return _finish(options, plan, out, notes)


@contextlib.contextmanager
def _held(out):
    """Keeps other runs from the folder meanwhile. Buckets, and disks that have no such locks, are not kept."""
    if in_bucket(out):
        yield
        return
    folder = os.open(out, os.O_RDONLY)
    try:
        lock(folder, out, lambda: f"Another run is writing {os.fspath(out)}; wait for it, or choose another --out.")
        yield
    finally:
        os.close(folder)


def _clear(out, notes):
    """Removes what an unfinished run wrote, its notes last."""
    for path in out.iterdir():
        if path.name == REPORT or NAME in path.name:
            path.unlink()
    notes.rmtree()


def _plan(options: Options) -> dict[str, Any]:
    """What decides the outcome: the options, and the input's rows and digest."""
    digest, rows = hashlib.sha256(), 0
    for row in tqdm.tqdm(_rows(options), "reading", unit="row", delay=2, leave=False):
        digest.update(json.dumps(row).encode())
        rows += 1
    keys = ("images", "limit", "max_side", "max_length", "tokenizer", "template", "image_tokens", "shard_rows")
    chosen = {key: getattr(options, key) for key in keys}
    shards = -(-rows // options.shard_rows)
    return {"annotations": list(options.annotations)} | chosen | {"rows": digest.hexdigest(), "shards": shards}


def _rows(options: Options) -> Iterator[tuple[str, int, Any]]:
    """File, index in it, and row."""
    every = ((name, i, row) for name in options.annotations for i, row in enumerate(read_rows(to_path(name))))
    return itertools.islice(every, options.limit or None)


def _work(options, shards, notes):
    """Makes the shards that have no note yet, in worker processes."""
    missing = [not (notes / f"{shard:05}.json").exists() for shard in range(shards)]
    rows = _rows(options)
    chunks = ((shard, list(itertools.islice(rows, options.shard_rows))) for shard in range(shards))
    todo = ((shard, chunk) for shard, chunk in chunks if missing[shard])
    bar = tqdm.tqdm(total=shards, initial=shards - sum(missing), desc="checking", unit="shard", delay=2)
    # Forked processes would share locks that this one's threads hold.
    context = multiprocessing.get_context("spawn")
    workers, stop = max(1, min(options.workers, sum(missing))), context.RawValue(ctypes.c_bool, False)
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (stop,))
    waiting: set[concurrent.futures.Future] = set()
    # An exception in the midst of the pool's own waiting could leave its locks closed, and the pool without an end.
    before = signal.signal(signal.SIGINT, lambda *_: setattr(stop, "value", True))
    try:
        with bar:
            for shard, chunk in todo:
                waiting.add(pool.submit(_make_shard, options, shards, shard, chunk))
                if len(waiting) >= 2 * workers:  # so that the rows waiting are few
                    waiting = _collect(waiting, bar)
            while waiting:
                waiting = _collect(waiting, bar)
    except (InterruptedError, concurrent.futures.process.BrokenProcessPool):
        if stop.value:  # ^C in a terminal also ends workers that are only starting
            raise KeyboardInterrupt from None
        raise UserError("A worker process was killed, perhaps for want of memory; give fewer --workers.") from None
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError("The disk is full; with more room the same command goes on where it was.") from None
    finally:
        stop.value = True
        pool.shutdown(cancel_futures=True)
        signal.signal(signal.SIGINT, before)


def _collect(waiting, bar):
    done, waiting = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
    for future in done:
        future.result()
        bar.update()
    return waiting


# ---- In a worker -----------------------------------------------------------------------------------------------------


def _start_worker(stop):
    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever interrupts means the parent, which ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are as many as the cores


def _end_with_parent():
    """Else a worker whose parent is killed would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _make_shard(options, shards, shard, rows):
    _worker(options, shards).make_shard(shard, rows)


@functools.cache
def _worker(options, shards):
    return _Worker(options, shards)


class _Worker:
    def __init__(self, options: Options, shards: int):
        self._options, self._shards, self._features = options, shards, features()
        self._tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None
        self._images, self._out = to_path(options.images), to_path(options.out)

    def make_shard(self, shard: int, rows: Sequence[tuple[str, int, Any]]) -> None:
        """Writes a shard and its note."""
        note = {key: [] for key in ("kept", "dropped", "tokens", "sizes", "formats", "ids", "unread")} | {"bytes": 0}
        name = f"{NAME}-train.array_record-{shard:05}-of-{self._shards:05}"
        with tempfile.TemporaryDirectory() as scratch:
            local = pathlib.Path(scratch) / name
            writer = ArrayRecordWriter(str(local), "group_size:1")
            try:
                for file, index, row in rows:
                    if _stop.value:
                        raise InterruptedError
                    identity = _text(row.get("id")) if isinstance(row, dict) else ""
                    note["ids"].append(identity)
                    where = f"row {index} of {file}"
                    try:
                        note["bytes"] += self._write(writer, row, where, note)
                    except BadRow as error:
                        if self._options.strict:
                            raise UserError(f"--strict: {where}: {error}") from None
                        note["dropped"].append(
                            {
                                "id": shorten(identity),
                                "image": shorten(_text(error.image or _image(row))),
                                "reason": error.reason,
                                "file": file,
                                "row": index,
                                "why": str(error),
                            }
                        )
            finally:
                writer.close()
            move_in(local, self._out / name)
        write_json(self._out / NOTES / f"{shard:05}.json", note)

    def _write(self, writer, row, where, note):
        read = read_row(row, where)
        images = read.images
        items = training_items(self._options.template, Record(read.name, images, read.turns))
        tokens = self._tokens(items, read.turns, len(images))
        if 0 < self._options.max_length < tokens:
            if self._tokenizer is None:
                sentence = f"Record {read.name!r} has an estimated {tokens} tokens; give --tokenizer to count them."
                raise BadRow("over_estimate", sentence)
            raise BadRow("over_length", f"Record {read.name!r} has {tokens} tokens.")
        files, opened = [], []
        for name in images:
            content = read_image(self._images, name)
            image = open_image(content, name)
            side, most = max(image.size), self._options.max_side
            opened.append((image.size, image.format or "?"))
            files.append(_shrunk(image, most) if 0 < most < side else content)
        talk = [{"from": turn.speaker, "value": turn.text} for turn in read.turns]
        example = {"id": read.id, "conversations": talk, "images": files}
        coded = self._features.serialize_example(self._features.encode_example(example))
        writer.write(coded)
        named = {"image": images[0] if len(images) == 1 else list(images)} if images else {}
        note["kept"].append({"id": read.id} | named | {"conversations": talk})
        note["unread"] += read.unread
        note["tokens"].append(tokens)
        note["sizes"] += [size for size, _ in opened]
        note["formats"] += [kind for _, kind in opened]
        return len(coded)

    def _tokens(self, items, turns, image_count):
        if self._tokenizer is not None:
            return count_tokens([items], self._tokenizer, self._options.image_tokens)[0]
        text = sum(len(turn.text.encode(errors="replace")) for turn in turns)
        return text // _BYTES_A_TOKEN + image_count * self._options.image_tokens


def _text(value):
    """As can be written: nothing for what is not there, and halves of surrogate pairs by their numbers."""
    return "" if value is None else str(value).encode(errors="backslashreplace").decode()


def _image(row):
    image = (row.get("image") or row.get("images") or "") if isinstance(row, dict) else ""
    return image if isinstance(image, str) else json.dumps(image)


def _shrunk(image, side):
    """The image as a JPEG whose longer side is that."""
    small = to_rgb(image)
    small.thumbnail((side, side), PIL.Image.Resampling.LANCZOS)
    least = -(-side // MOST_RATIO)  # the short side may have been rounded to less than will be opened
    if min(small.size) < least:
        small = small.resize([max(length, least) for length in small.size])
    file = io.BytesIO()
    small.save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()


# ---- When all shards are there ---------------------------------------------------------------------------------------


def _finish(options, plan, out, notes):
    """Writes what describes the whole, TFDS's description last, and removes the notes."""
    every = [json.loads((notes / f"{shard:05}.json").read_text()) for shard in range(plan["shards"])]
    dropped = [row for note in every for row in note["dropped"]]
    ids = collections.Counter(identity for note in every for identity in note["ids"])
    tokens = np.array([count for note in every for count in note["tokens"]], np.int64)
    sizes = np.array([size for note in every for size in note["sizes"]], np.int64).reshape(-1, 2)
    kept = sum(len(note["kept"]) for note in every)
    counts = collections.Counter(row["reason"] for row in dropped)
    estimated = f"estimated, {_BYTES_A_TOKEN} bytes of text a token (give --tokenizer to count)"
    report = Report(
        {
            "rows_read": kept + len(dropped),
            "rows_kept": kept,
            "rows_dropped": {reason: counts[reason] for reason in {**REASONS, **counts} if counts[reason]},
            "dropped": dropped,
            "duplicate_ids": sorted(shorten(identity) for identity, count in ids.items() if identity and count > 1),
            "not_read": dict(
                collections.Counter(key for note in every for key in note.get("unread", ())).most_common()
            ),
            "text_only_rows": sum("image" not in row for note in every for row in note["kept"]),
            "images": len(sizes),
            "image_formats": dict(collections.Counter(kind for note in every for kind in note["formats"])),
            "image_sides": _spread(sizes.max(axis=1)) if len(sizes) else {},
            "tokens": _spread(tokens),
            "tokens_are": f"counted by {options.tokenizer}" if options.tokenizer else estimated,
            "token_histogram": _histogram(tokens),
            "image_side_histogram": _histogram(sizes.max(axis=1)) if len(sizes) else {},
            "made_from": plan,
        }
    )
    if not kept:
        write_json(out / REPORT, report.values)
        raise UserError(f"No row can be used: {report.reasons()}; {REPORT} in {options.out} names each.")
    with new_text(out / KEPT) as file:
        file.write("[")
        for i, row in enumerate(row for note in every for row in note["kept"]):
            file.write((",\n" if i else "\n") + json.dumps(row, ensure_ascii=False))
        file.write("\n]\n")
    draw_histograms(tokens, sizes, out / HISTOGRAMS)
    write_json(out / REPORT, report.values)
    _describe(out, [len(note["kept"]) for note in every], sum(note["bytes"] for note in every))
    notes.rmtree()
    return report


def _describe(out, lengths, size):
    """Writes TFDS's ``features.json`` and ``dataset_info.json``."""
    with tempfile.TemporaryDirectory() as scratch:
        template = tfds.core.ShardedFileTemplate(
            dataset_name=NAME, data_dir=scratch, template=_TEMPLATE, filetype_suffix="array_record"
        )
        split = tfds.core.SplitInfo(name="train", shard_lengths=lengths, num_bytes=size, filename_template=template)
        # It tells name and format by the files it finds; the shards may be in a bucket.
        (pathlib.Path(scratch) / f"{NAME}-train.array_record-00000-of-00001").touch()
        tfds.folder_dataset.write_metadata(
            data_dir=scratch,
            features=features(),
            split_infos=[split],
            filename_template=_TEMPLATE,
            description="Conversations about images in LLaVA's format, checked by stf_jax.prepare.",
            check_data=False,
        )
        for name in ("features.json", INFO):
            move_in(pathlib.Path(scratch) / name, out / name)


def _spread(values):
    if not len(values):
        return {}
    points = {"min": 0, "median": 50, "p95": 95, "max": 100}
    return {name: float(np.percentile(values, at)) for name, at in points.items()} | {"mean": float(values.mean())}


def _histogram(values):
    counts, edges = np.histogram(values, bins=24)
    return {"counts": counts.tolist(), "edges": [round(float(edge), 1) for edge in edges]}
