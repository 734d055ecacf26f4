"""The input pipeline: measures records, plans rows (sampling.py), then reads and packs them in Grain threads."""

import collections
import concurrent.futures
import dataclasses
import hashlib
import itertools
import logging
import operator
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import grain
import jax
import numpy as np
import tqdm
from jax.experimental import multihost_utils
from transformers import PreTrainedTokenizerFast

from stf_jax.config import DataConfig, ModelConfig, TrainConfig, UserError
from stf_jax.data.conversation import (
    check_record_ids,
    check_template,
    count_tokens,
    encode,
    find_unplaced,
    training_items,
)
from stf_jax.data.packing import Batch, Example, to_batch, to_example, to_row
from stf_jax.data.records import BadRow, Record, format_reasons
from stf_jax.data.sampling import Plan, PlannedRow
from stf_jax.data.sources.base import DataSet, open_data_sets
from stf_jax.data.tiles import ImageLayout, find_tiles
from stf_jax.data.tokenizer import prefixes_only_start
from stf_jax.models.decoders.chat import Item
from stf_jax.models.spec import resolve_model, training_budgets
from stf_jax.models.towers.base import VisionConfig

_CHUNK = 1024  # conversations tokenized at once when they are measured
_SAMPLES = 32  # records checked before a run starts
_MAX_LOGGED = 10  # bad rows that a process logs
_ENDLESS = 2**48  # rows
_BATCHES_AHEAD = 2

_log = logging.getLogger(__name__)


class ConcatenatedRecords:
    """Several data sets, concatenated."""

    def __init__(self, sets: Sequence[DataSet]) -> None:
        self.sets, self.sizes = sets, [len(records) for records in sets]

    def __len__(self) -> int:
        return sum(self.sizes)

    def __getitem__(self, index: int) -> Record:
        for records, size in zip(self.sets, self.sizes, strict=True):
            if index < size:
                return records[index]
            index -= size
        raise IndexError


def load_training_records(config: TrainConfig) -> ConcatenatedRecords:
    """Opens the training data of a config.

    Raises:
      UserError: as :func:`stf_jax.data.sources.base.open_data_sets`, or only one of data and model uses labels of
        cells, or their numbers differ.
    """
    data_sets = open_data_sets(config)
    for data_set in data_sets:
        _check_cells(data_set, config.model)
    return ConcatenatedRecords(data_sets)


def _check_cells(data_set: DataSet, model: ModelConfig) -> None:
    cells = getattr(data_set, "cells", 0)
    if bool(cells) != bool(model.cells):
        raise UserError(
            "model.cells and data with labels of cells (data.scenes.task=cells) go together: set both or neither."
        )
    if not cells:
        return
    vision = resolve_model(model).vision_shape
    assert vision is not None  # a run trains a complete model
    if vision.grid * model.cells != cells:
        raise UserError(
            f"Images of {data_set.name} have {cells}×{cells} cells: choose a tower and model.cells that match, such as "
            "clip-mini-8-96 with model.cells=2."
        )


class Preprocessor:
    """Converts records to examples."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerFast,
        vision: VisionConfig,
        slots: int,
        rows: int = sys.maxsize,
        dropped: int = 0,
    ) -> None:
        """Checks that the template and the tokenizer fit together.

        Args:
          slots: image tokens of an image, or of each of its places.
          rows: of the embedding, if they may be fewer than the tokenizer's tokens.
          dropped: as of :class:`stf_jax.data.sampling.Plan`.

        Raises:
          UserError: the template is unknown, or needs tokens that the tokenizer lacks; or rows have no room for text.
        """
        check_template(config.template, tokenizer)
        if config.max_length <= (unused := config.images_per_row * dropped):
            raise UserError(
                f"data.max_length={config.max_length} leaves no room for text: with model.schedule, the image tokens "
                f"of data.images_per_row={config.images_per_row} take up to {unused} of it; raise it."
            )
        self.dropped = dropped
        self._config, self._tokenizer, self._rows = config, tokenizer, rows
        self.layout = ImageLayout(vision, config.aspect, slots, find_tiles(config))
        self._logged, self._lock = 0, threading.Lock()

    def __call__(self, record: Record) -> Example:
        """Raises BadRow if the record does not fit the template or the row, or an image cannot be opened."""
        items, side = self._make_items(record), self.layout.vision.image_size
        squares, sizes = [np.zeros((0, side, side, 3), np.uint8)], list[tuple[int, int]]()
        for image in map(operator.call, record.images):
            squares.append(self.layout.squares(image))
            sizes.append(image.size)
        encoded = encode(items, self._tokenizer, self.layout.slots(sizes))
        check_record_ids(encoded, self._tokenizer, self._rows, record.id)
        images = np.concatenate(squares)
        labels = record.labels()[None] if record.labels else None
        unused = (self._config.images_per_row - len(images)) * self.dropped
        return to_example(encoded, images, self._config.max_length - unused, record.id, labels)

    def _make_items(self, record: Record) -> list[Item]:
        """Checks what can be checked before an image is opened."""
        count, places = len(record.images), self._config.images_per_row
        if count > places:
            message = f"Record {record.id!r} has {count} images, more than data.images_per_row={places}; raise it."
            raise BadRow("too_many_images", message)
        return training_items(self._config.template, record)

    def fingerprint(self) -> str:
        """A fingerprint of the tokenizer; tokenizers with the same one make the same tokens."""
        # This text is part of fingerprints in checkpoints.
        suffix = " prefixes once" if prefixes_only_start(self._tokenizer) else ""
        return hashlib.sha256((self._tokenizer.backend_tokenizer.to_str() + suffix).encode()).hexdigest()[:16]

    def measure(
        self, records: DataSet, *, log: bool = True, on_chunk: Callable[[], None] = lambda: None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Counts the tokens and image places of every record of a data set, without decoding images.

        Only tiles need the sizes of images, which are read from their headers, if the data set does not know them.

        Args:
          log: show a progress bar, and log unusable rows and ignored keys.
          on_chunk: called before every chunk of records.

        Returns:
          Two int32 [R] arrays: tokens and image places; both are 0 for a record that cannot be used.

        Raises:
          UserError: none of a sample of records can be used.
        """
        self._check_samples(records)
        lengths, image_counts = np.zeros(len(records), np.int32), np.zeros(len(records), np.int32)
        bad: collections.Counter[str] = collections.Counter()
        ignored: collections.Counter[str] = collections.Counter()
        progress = iter(
            tqdm.tqdm(
                range(len(records)), "measuring", unit="row", delay=2, leave=False, mininterval=0.5, disable=not log
            )
        )
        counting: list[tuple[list[int], concurrent.futures.Future[list[int]]]] = []
        with concurrent.futures.ThreadPoolExecutor(1) as pool:  # counts a chunk while the next one is read
            while indices := list(itertools.islice(progress, _CHUNK)):
                on_chunk()
                good: list[int] = []
                items: list[list[Item]] = []
                slots: list[int] = []
                for index in indices:
                    try:
                        record = records[index]
                        made = self._make_items(record)
                        slot_count, image_counts[index] = self._count(record)
                    except BadRow as error:
                        bad[error.reason] += 1
                        continue  # it is logged when it is read for a batch
                    for key in record.ignored_keys + find_unplaced(self._config.template, record):
                        ignored[key] += 1
                    good.append(index)
                    items.append(made)
                    slots.append(slot_count)
                counting.append((good, pool.submit(count_tokens, items, self._tokenizer, slots)))
                if len(counting) > 1:
                    good, counted = counting.pop(0)
                    lengths[good] = counted.result()
            for good, counted in counting:
                lengths[good] = counted.result()
        if bad and log:
            counts = bad.total(), len(records), records.name, format_reasons(bad)
            _log.warning("%d of the %d rows of %s cannot be used (images not checked yet): %s.", *counts)
        if ignored and log:
            keys = ", ".join(f"{key} ({count:,} rows)" for key, count in ignored.most_common(_MAX_LOGGED))
            _log.warning("Rows of %s have keys that are ignored: %s.", records.name, keys)
        return lengths, image_counts

    def _count(self, record: Record) -> tuple[int, int]:
        """Returns how many image slots and places a record has. Raises BadRow if a size is needed and unknown."""
        if self.layout.tiles is None:
            return self.layout.tokens * len(record.images), len(record.images)
        sizes = record.image_sizes()
        return sum(map(len, self.layout.slots(sizes))), self.layout.count_places(sizes)

    def _check_samples(self, records: DataSet) -> None:
        errors: list[BadRow] = []
        for index in np.unique(np.linspace(0, len(records) - 1, _SAMPLES).astype(int)).tolist():
            try:
                self(records[index])
                return
            except BadRow as error:
                errors.append(error)
        reasons = format_reasons(collections.Counter(error.reason for error in errors))
        raise UserError(
            f"None of the {len(errors)} sampled rows of {records.name} can be used: {reasons}. First error: {errors[0]}"
        )

    def log_bad_row(self, error: BadRow) -> None:
        """Logs a bad row, if it is one of the first."""
        with self._lock:
            self._logged += 1
            number = self._logged
        if number <= _MAX_LOGGED:
            rest = " Further ones are only counted." if number == _MAX_LOGGED else ""
            _log.warning("%s It is left out, and counted in rows_replaced.%s", error, rest)


def plan_rows(
    config: TrainConfig,
    records: ConcatenatedRecords,
    preprocess: Preprocessor,
    *,
    log: bool = True,
    on_chunk: Callable[[], None] = lambda: None,
) -> Plan:
    """Plans the rows of a run, from the length of every record.

    Raises:
      UserError: as :class:`Plan` and :meth:`Preprocessor.measure`.
    """
    measured = [preprocess.measure(data_set, log=log, on_chunk=on_chunk) for data_set in records.sets]
    lengths, image_counts = (np.concatenate(counts) for counts in zip(*measured, strict=True))
    data, rows, budgets = config.data, config.global_batch_size, training_budgets(config.model)
    return Plan(
        data,
        config.seed,
        rows,
        lengths,
        image_counts,
        records.sizes,
        preprocess.dropped,
        budgets,
        config.budgets_per_step,
    )


@dataclasses.dataclass(frozen=True)
class _MakeRow:
    """Fills a planned row; members that cannot be used are left out."""

    records: ConcatenatedRecords
    preprocess: Preprocessor
    cells: int  # S of the images' labels; 0 if they have none

    def __call__(self, planned: PlannedRow) -> dict[str, np.ndarray | np.int64]:
        examples: list[Example] = []
        bad, tokens, places = 0, planned.length, planned.images
        for index in planned.members:
            try:
                example = self.preprocess(record := self.records[index])
                if len(example.tokens) > tokens or len(example.images) > places:
                    raise BadRow("resized", f"Record {record.id!r} has grown since its length was measured.")
                tokens, places = tokens - len(example.tokens), places - len(example.images)
                examples.append(example)
            except BadRow as error:
                self.preprocess.log_bad_row(error)
                bad += 1
        layout = self.preprocess.layout
        row = to_row(examples, planned.length, planned.images, layout.vision.image_size, layout.tokens, self.cells)
        return row | {"replaced": np.int64(bad)}


@dataclasses.dataclass(frozen=True)
class _HostRows:
    """A host's rows of every batch, as a random-access source for Grain."""

    plan: Plan
    host: int
    hosts: int

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> PlannedRow:
        return self.plan[index * self.hosts + self.host]


def _check_agreement(fingerprint: str) -> None:
    """Raises UserError on all processes of a run if their plans differ: rows would be lost or repeated."""
    if jax.process_count() == 1:
        return
    mine = np.frombuffer(bytes.fromhex(fingerprint), np.uint8)
    different = [host for host, other in enumerate(multihost_utils.process_allgather(mine)) if (other != mine).any()]
    if different:
        raise UserError(
            f"Host {jax.process_index()} has different data, or a different order, than host {different[0]}: give all "
            "hosts the same files and the same config."
        )


class Batches:
    """An endless iterator over batches with this host's rows: the batch's divided by the number of hosts.

    Attributes:
      plan: the conversations of each row.
      replaced: unusable conversations in this host's rows of the batches so far.
    """

    def __init__(
        self,
        config: TrainConfig,
        records: ConcatenatedRecords,
        preprocess: Preprocessor,
        *,
        host: int,
        hosts: int,
        on_chunk: Callable[[], None] = lambda: None,
    ) -> None:
        """Measures all conversations, and calls ``on_chunk`` before every chunk of them.

        Raises:
          UserError: as :func:`plan_rows`, or the plans of the processes differ.
        """
        self._records = records
        self._tokenizer = preprocess.fingerprint()
        self.plan = plan_rows(config, records, preprocess, log=jax.process_index() == 0, on_chunk=on_chunk)
        _check_agreement(self.plan.fingerprint())
        self.replaced = 0
        self._threads, self._hosts, self._chunk = config.data.threads, hosts, config.global_batch_size // hosts
        host_rows = grain.MapDataset.source(_HostRows(self.plan, host, hosts))
        cells = preprocess.layout.vision.grid * config.model.cells
        self._host_rows = host_rows.map(_MakeRow(records, preprocess, cells))
        self._start(0)

    def close(self) -> None:
        """Stops the prefetching threads, which otherwise run until garbage collection."""
        self._iterator.close()

    def _start(self, batch: int) -> None:
        self._batch = batch
        read = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=8 * self._threads)
        rows = self._host_rows[self.plan.batch_rows(batch).start // self._hosts :].to_iter_dataset(read)
        chunks = rows.batch(self._chunk, drop_remainder=True)
        # The threads read ahead a number of rows, which may be less than a batch; this one completes batches.
        ahead = _BATCHES_AHEAD * (self.plan.max_rows // self._hosts // self._chunk)
        self._iterator = iter(grain.experimental.ThreadPrefetchIterDataset(chunks, prefetch_buffer_size=ahead))

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch[np.ndarray]:
        count = len(self.plan.batch_rows(self._batch)) // self._hosts // self._chunk
        chunks = [next(self._iterator) for _ in range(count)]
        rows = chunks[0] if count == 1 else {key: np.concatenate([chunk[key] for chunk in chunks]) for key in chunks[0]}
        self.replaced += int(rows.pop("replaced").sum())
        budgets = self.plan.batch_budgets(self._batch)
        self._batch += 1
        return to_batch(rows, budgets)

    def get_state(self) -> dict[str, Any]:
        """Returns the position in the stream. It is the same on all hosts, and for any number of hosts."""
        rows = self.plan.batch_rows(self._batch).start
        return {"rows": rows, "plan": self.plan.fingerprint(), "tokenizer": self._tokenizer}

    def record_ids(self, batch: int) -> list[list[str]]:
        """Returns the ids of a batch's records on all hosts, by row; batches count from 1.

        A record that cannot be read is given by its index.
        """

        def get_id(index: int) -> str:
            try:
                return self._records[index].id
            except BadRow:
                return f"record {index}"

        return [[get_id(index) for index in self.plan[row].members] for row in self.plan.batch_rows(batch - 1)]

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues with the batch after the state's.

        Raises:
          UserError: the state is from other data, or another batch size, packing, mixture, seed or tokenizer.
        """
        if state.get("tokenizer", self._tokenizer) != self._tokenizer:
            raise UserError(
                "The checkpoint was made with a different tokenizer than data.tokenizer: continue with the same one, "
                "or start in another workdir with init_from."
            )
        if state.get("plan") != self.plan.fingerprint():
            raise UserError(
                "The checkpoint was made with different data, or a different order (seed, global_batch_size, "
                "budgets_per_step, data.*): continue with the values of its config.json, or start in another workdir "
                "with init_from."
            )
        self.close()
        self._start(self.plan.find_batch(state["rows"]))
