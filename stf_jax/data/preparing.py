"""Checks annotations and images row by row and writes a TFDS data set of ArrayRecord shards.

Rows are assigned to shards in the order of the files. Worker processes, here or of a Beam runner, check and write one
shard each. A shard gets its final name when it is complete, with a note of what was kept and dropped, so an interrupted
run continues with the missing shards. ``dataset_info.json`` is written last: the data set is finished when it exists.
"""

import collections
import concurrent.futures
import contextlib
import ctypes
import errno
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import signal
import tempfile
import threading
import types
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
import tqdm
from etils import epath

from stf_jax.config import UserError, shorten
from stf_jax.data.conversation import check_template
from stf_jax.data.ratings import Filter
from stf_jax.data.records import REASONS
from stf_jax.data.report import Report, draw_histograms
from stf_jax.data.shard_writer import (
    BYTES_PER_TOKEN,
    NAME,
    NOTES,
    NumberedRow,
    Options,
    ShardWriter,
    Source,
    make_features,
    number_rows,
    open_sources,
    read_shard,
)
from stf_jax.data.sources.llava import INFO, KEPT, open_container
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.environment import suppress_stderr
from stf_jax.files import get_version, in_bucket, make_folder, move_file, open_atomic, read_json, to_path, write_json
from stf_jax.runs.lock import lock_file

REPORT, HISTOGRAMS = "report.json", "histograms.png"
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


def prepare(options: Options) -> Report:
    """Makes the data set, or continues an interrupted one. A finished one is not changed.

    Raises:
      UserError: the input cannot be read or has no usable row; ``out`` has other contents or work on other input, or
        another run is writing it; with ``strict``, a row would be dropped.
    """
    out = to_path(options.out)
    if options.images and not to_path(options.images).is_dir():
        raise UserError(f"The image folder {options.images} does not exist.")
    Filter(options.filter)
    for name in options.annotations:
        container = open_container(name)
        if not options.images and (container is None or container.needs_folder):
            raise UserError(f"{name} has paths of images; give their folder with --images=DIR.")
    if options.runner:
        _import_beam().open_pipeline(options.runner, options.beam_options)  # checks them before anything is written
    check_template(options.template, load_tokenizer(options.tokenizer) if options.tokenizer else None)
    plan = _make_plan(options)
    make_folder(out)
    with _lock_folder(out):
        return _prepare(options, plan, out, out / NOTES)


def _prepare(options: Options, plan: dict[str, Any], out: epath.Path, notes: epath.Path) -> Report:
    if (out / INFO).exists():
        report = read_json(out / REPORT) if (out / REPORT).exists() else {}
        if report.get("made_from") != plan:
            raise UserError(f"{options.out} has a data set made from other input; choose another --out.")
        if notes.exists():  # they are removed last
            notes.rmtree()
        if options.strict and report["dropped"]:
            raise UserError(f"--strict: {report['dropped'][0]['why']}")
        print(f"{options.out} is already finished; to check the input again, remove the folder.")
        return Report(report)
    if (notes / "plan.json").exists() and not any(read_json(n)["kept"] for n in notes.glob("0*.json")):
        _clear(out, notes)  # no row was usable, and the cause may be fixed now
    if (notes / "plan.json").exists():
        if read_json(notes / "plan.json") != plan:
            raise UserError(f"{options.out} has unfinished work on other input; finish that, or remove the folder.")
    elif out.exists() and any(path.name != NOTES for path in out.iterdir()):  # an empty folder in a bucket does not
        raise UserError(f"{options.out} exists and is not empty; choose another --out.")
    else:
        make_folder(notes)
        write_json(notes / "plan.json", plan)
    _make_shards(options, plan["shards"], notes)
    return _finish(options, plan, out, notes)


@contextlib.contextmanager
def _lock_folder(out: epath.Path) -> Iterator[None]:
    """Locks the folder against other runs. Buckets and file systems without locks are not protected."""
    if in_bucket(out):
        yield
        return
    folder = os.open(out, os.O_RDONLY)
    try:
        lock_file(
            folder, out, lambda: f"Another run is writing {os.fspath(out)}; wait for it, or choose another --out."
        )
        yield
    finally:
        os.close(folder)


def _clear(out: epath.Path, notes: epath.Path) -> None:
    """Removes the files of an unfinished run, its notes last."""
    for path in out.iterdir():
        if path.name == REPORT or NAME in path.name:
            path.unlink()
    notes.rmtree()


def _make_plan(options: Options) -> dict[str, Any]:
    """Returns what the result depends on: the options and a digest of the rows."""
    digest, rows = hashlib.sha256(), 0
    for row in tqdm.tqdm(number_rows(options), "reading", unit="row", delay=2, leave=False):
        digest.update(json.dumps(row, default=lambda _: "").encode())  # the sizes of its file stand for a function
        rows += 1
    for container in filter(None, map(open_container, options.annotations)):
        sizes = [(os.fspath(file), get_version(file)[0]) for file in container.files]
        digest.update(json.dumps(sizes).encode())
    keys = ("images", "limit", "max_side", "max_length", "tokenizer", "template", "image_tokens", "shard_rows")
    values = {key: getattr(options, key) for key in keys} | ({"filter": options.filter} if options.filter else {})
    shards = -(-rows // options.shard_rows)
    return {"annotations": list(options.annotations)} | values | {"rows": digest.hexdigest(), "shards": shards}


def _make_shards(options: Options, shards: int, notes: epath.Path) -> None:
    """Makes the shards that have no note yet, in worker processes or by Beam."""
    missing = [shard for shard in range(shards) if not (notes / f"{shard:05}.json").exists()]
    if options.runner:
        _make_shards_by_beam(options, shards, missing, notes)
        return
    rows = number_rows(options)
    chunks = ((shard, list(itertools.islice(rows, options.shard_rows))) for shard in range(shards))
    bar = tqdm.tqdm(total=shards, initial=shards - len(missing), desc="checking", unit="shard", delay=2)
    # Spawn, because forked processes would inherit locks that threads of this process hold.
    context = multiprocessing.get_context("spawn")
    workers, stop = max(1, min(options.workers, len(missing))), context.RawValue(ctypes.c_bool, False)
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (stop,))
    pending: set[concurrent.futures.Future[None]] = set()
    # A KeyboardInterrupt inside the pool's own code could leave its locks held, and the pool would never end.
    old_handler = signal.signal(signal.SIGINT, lambda *_: setattr(stop, "value", True))
    try:
        with bar:
            for shard, chunk in chunks:
                if shard not in missing:
                    continue
                pending.add(pool.submit(_make_shard, options, shards, shard, chunk))
                if len(pending) >= 2 * workers:  # limits the rows in memory
                    pending = _wait_for_one(pending, bar)
            while pending:
                pending = _wait_for_one(pending, bar)
    except (InterruptedError, concurrent.futures.process.BrokenProcessPool):
        if stop.value:  # ^C in a terminal also kills workers that are still starting
            raise KeyboardInterrupt from None
        raise UserError("A worker process was killed, perhaps for lack of memory; use fewer --workers.") from None
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError("The disk is full; free space and repeat the command to continue.") from None
    finally:
        stop.value = True
        pool.shutdown(cancel_futures=True)
        signal.signal(signal.SIGINT, old_handler)


def _wait_for_one(
    pending: set[concurrent.futures.Future[None]], bar: tqdm.tqdm
) -> set[concurrent.futures.Future[None]]:
    done, pending = concurrent.futures.wait(pending, return_when=concurrent.futures.FIRST_COMPLETED)
    for future in done:
        future.result()
        bar.update()
    return pending


def _import_beam() -> types.ModuleType:
    """Imports what needs Apache Beam, which warns about packages of runners that may not be used."""
    try:
        with suppress_stderr():
            from stf_jax.data import beam
    except ModuleNotFoundError as error:
        raise UserError(
            f"--runner needs Apache Beam, but there is no module {error.name}: install apache-beam as "
            "requirements-data.txt does (docs/your-own-data.md)."
        ) from None
    return beam


def _make_shards_by_beam(options: Options, shards: int, missing: Sequence[int], notes: epath.Path) -> None:
    beam = _import_beam()
    pipeline = beam.open_pipeline(options.runner, options.beam_options)
    for file in notes.glob("*.error"):
        file.unlink()
    beam.run_pipeline(pipeline, functools.partial(_make_shard_by_beam, options, shards), missing)
    for file in sorted(notes.glob("*.error")):
        raise UserError(file.read_text())


# ---- In a worker process ---------------------------------------------------------------------------------------------


_stop: ctypes.c_bool  # set by the parent when its workers should stop


def _start_worker(stop: ctypes.c_bool) -> None:
    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it and stops its workers
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is already one worker per core


def _exit_with_parent() -> None:
    """Exits when the parent ends; a worker whose parent was killed would otherwise wait forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    parent.join()
    os._exit(1)


def _make_shard(options: Options, shards: int, shard: int, rows: Sequence[NumberedRow]) -> None:
    _get_writer(options, shards).write(shard, rows, lambda: _stop.value)


def _make_shard_by_beam(options: Options, shards: int, shard: int) -> None:
    try:
        rows = read_shard(options, _get_sources(options), shard)
        _get_writer(options, shards).write(shard, rows, lambda: False)
    except UserError as error:  # a runner would wrap it in traces of its own, and try again
        (to_path(options.out) / NOTES / f"{shard:05}.error").write_text(str(error))


@functools.cache
def _get_sources(options: Options) -> list[Source]:
    return open_sources(options)


@functools.cache
def _get_writer(options: Options, shards: int) -> ShardWriter:
    return ShardWriter(options, shards)


# ---- When all shards are complete ------------------------------------------------------------------------------------


def _finish(options: Options, plan: dict[str, Any], out: epath.Path, notes: epath.Path) -> Report:
    """Writes the report, the rows and, last, TFDS's description; then removes the notes."""
    # Read twice, because the rows of a large set would not fit in memory.
    read_notes = functools.partial(map, read_json, [notes / f"{shard:05}.json" for shard in range(plan["shards"])])
    dropped: list[dict[str, Any]] = []
    ids, unread, formats = (collections.Counter[str]() for _ in range(3))
    shard_tokens, shard_sizes = [np.zeros(0, np.int64)], [np.zeros((0, 2), np.int64)]
    lengths, bytes_written, filtered, text_only = [], 0, 0, 0
    for note in read_notes():
        dropped += note["dropped"]
        ids.update(note["ids"])
        unread.update(note.get("unread", ()))
        formats.update(note["formats"])
        shard_tokens.append(np.array(note["tokens"], np.int64))
        shard_sizes.append(np.array(note["sizes"], np.int64).reshape(-1, 2))
        lengths.append(len(note["kept"]))
        bytes_written += note["bytes"]
        filtered += note.get("filtered", 0)  # older versions wrote none
        text_only += sum("image" not in row for row in note["kept"])
    tokens, sizes, kept = np.concatenate(shard_tokens), np.concatenate(shard_sizes), sum(lengths)
    counts = collections.Counter(row["reason"] for row in dropped)
    counts["filtered"] = filtered
    estimated = f"estimated at {BYTES_PER_TOKEN} bytes of text per token (give --tokenizer to count)"
    report = Report(
        {
            "rows_read": kept + counts.total(),
            "rows_kept": kept,
            "rows_dropped": {reason: counts[reason] for reason in {**REASONS, **counts} if counts[reason]},
            "dropped": dropped,
            "duplicate_ids": sorted(shorten(row_id) for row_id, count in ids.items() if row_id and count > 1),
            "not_read": dict(unread.most_common()),
            "text_only_rows": text_only,
            "images": len(sizes),
            "image_formats": dict(formats),
            "image_sides": _summarize(sizes.max(axis=1)) if len(sizes) else {},
            "tokens": _summarize(tokens),
            "tokens_are": f"counted by {options.tokenizer}" if options.tokenizer else estimated,
            "token_histogram": _histogram(tokens),
            "image_side_histogram": _histogram(sizes.max(axis=1)) if len(sizes) else {},
            "made_from": plan,
        }
    )
    if not kept:
        write_json(out / REPORT, report.values)
        raise UserError(f"No row can be used: {report.reasons()}; {REPORT} in {options.out} lists them all.")
    with open_atomic(out / KEPT) as file:
        file.write("[")
        for i, row in enumerate(row for note in read_notes() for row in note["kept"]):
            file.write((",\n" if i else "\n") + json.dumps(row, ensure_ascii=False))
        file.write("\n]\n")
    draw_histograms(tokens, sizes, out / HISTOGRAMS)
    write_json(out / REPORT, report.values)
    _write_metadata(out, lengths, bytes_written)
    notes.rmtree()
    return report


def _write_metadata(out: epath.Path, lengths: list[int], size: int) -> None:
    """Writes TFDS's ``features.json`` and ``dataset_info.json``."""
    with tempfile.TemporaryDirectory() as scratch:
        template = tfds.core.ShardedFileTemplate(
            dataset_name=NAME, data_dir=scratch, template=_TEMPLATE, filetype_suffix="array_record"
        )
        split = tfds.core.SplitInfo(name="train", shard_lengths=lengths, num_bytes=size, filename_template=template)
        # TFDS reads name and format from the files it finds here; the shards may be in a bucket.
        (pathlib.Path(scratch) / f"{NAME}-train.array_record-00000-of-00001").touch()
        tfds.folder_dataset.write_metadata(
            data_dir=scratch,
            features=make_features(),
            split_infos=[split],
            filename_template=_TEMPLATE,
            description="Conversations about images in LLaVA's format, checked by stf_jax.prepare.",
            check_data=False,
        )
        for name in ("features.json", INFO):
            move_file(pathlib.Path(scratch) / name, out / name)


def _summarize(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    points = {"min": 0, "median": 50, "p95": 95, "max": 100}
    return {name: float(np.percentile(values, p)) for name, p in points.items()} | {"mean": float(values.mean())}


def _histogram(values: np.ndarray) -> dict[str, list[float]]:
    counts, edges = np.histogram(values, bins=24)
    return {"counts": counts.tolist(), "edges": [round(float(edge), 1) for edge in edges]}
