"""From records to batches: measured, planned (sampling.py), then read, decoded and laid in rows by Grain's threads."""

import collections
import dataclasses
import hashlib
import itertools
import logging
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

from stf_jax.config import DataConfig, TrainConfig, UserError
from stf_jax.data.conversation import check_ids, check_template, count_tokens, encode, training_items
from stf_jax.data.image import to_square
from stf_jax.data.llava import llava_records
from stf_jax.data.packing import Batch, Example, to_batch, to_example, to_row
from stf_jax.data.records import BadRow, Record, format_reasons
from stf_jax.data.sampling import Plan, PlannedRow
from stf_jax.data.scene_records import SceneRecords
from stf_jax.data.tokenizer import prefixes_once
from stf_jax.data.world_labels import CELLS
from stf_jax.models.presets import vision_of
from stf_jax.models.vit import VisionConfig

_CHUNK = 1024  # conversations tokenised at once when they are measured
_LOOK = 32  # records looked at before a run begins
_TOLD = 10  # bad rows that a process names
_ENDLESS = 2**48  # rows

_log = logging.getLogger(__name__)


def labelled(config: DataConfig) -> bool:
    """Whether images come with labels of their cells."""
    return config.source == "scenes" and config.scenes.task == "cells"


class Records:
    """Several data sets as one: their records one after the other."""

    def __init__(self, sets: Sequence[Sequence[Record]]):
        self.sets, self.sizes = sets, [len(one) for one in sets]

    def __len__(self) -> int:
        return sum(self.sizes)

    def __getitem__(self, index: int) -> Record:
        for records, size in zip(self.sets, self.sizes, strict=True):
            if index < size:
                return records[index]
            index -= size
        raise IndexError


def training_records(config: TrainConfig) -> Records:
    """The data that the config names.

    Raises:
      UserError: its files are missing or malformed; the data have labels and the model does not learn them, or the
        reverse.
    """
    data = config.data
    if labelled(data) != bool(config.model.cells):
        raise UserError("model.cells and data.scenes.task=cells go together: set both or neither.")
    if config.model.cells and vision_of(config.model).grid * config.model.cells != CELLS:
        raise UserError(
            f"data.scenes.task=cells labels {CELLS}×{CELLS} cells: choose a tower and a model.cells with as many, such "
            "as clip-mini-8-96 with model.cells=2."
        )
    if data.source == "scenes":
        world = data.scenes
        records = SceneRecords(world.task, world.size, config.seed, most=world.things, edition=world.edition)
        return Records([records])
    return Records(llava_records(data.annotations, data.images))


class Prepare:
    """Makes records into examples, and what cannot be used into None, counted and named."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerFast,
        vision: VisionConfig,
        slots: int,
        rows: int = sys.maxsize,
    ):
        """``slots``: of an image; ``rows``: of the embedding, if it may have fewer than the tokenizer has tokens.

        Raises UserError for a template that is unknown or not the tokenizer's.
        """
        check_template(config.template, tokenizer)
        self._config, self._tokenizer, self.vision, self._slots, self._rows = config, tokenizer, vision, slots, rows
        self.cells = CELLS if labelled(config) else 0
        self._told, self._lock = 0, threading.Lock()

    def __call__(self, record: Record) -> Example:
        """Raises BadRow, naming the record, where it does not fit the template or the row, or an image fails."""
        encoded = encode(self._items(record), self._tokenizer, self._slots)
        check_ids(encoded, self._tokenizer, self._rows, record.id)
        squares = [to_square(image(), self.vision, self._config.aspect) for image in record.images]
        side = self.vision.image_size
        images = np.stack(squares) if squares else np.zeros((0, side, side, 3), np.uint8)
        labels = record.labels()[None] if record.labels else None
        return to_example(encoded, images, self._config.max_length, record.id, labels)

    def _items(self, record):
        """What is known to be fit or not before an image is opened."""
        count, places = len(record.images), self._config.images_per_row
        if count > places:
            sentence = f"Record {record.id!r} has more images, {count}, than data.images_per_row={places}; raise it."
            raise BadRow("too_many_images", sentence)
        return training_items(self._config.template, record)

    def fingerprint(self) -> str:
        """Of the tokenizer: two with the same one make the same tokens."""
        once = " prefixes once" if prefixes_once(self._tokenizer) else ""
        return hashlib.sha256((self._tokenizer.backend_tokenizer.to_str() + once).encode()).hexdigest()[:16]

    def measure(
        self, source: Sequence[Record], *, shown: bool = True, between: Callable[[], None] = lambda: None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and images of every record of a data set, int32 [R]; both 0 where it is unfit, images unseen.

        Args:
          shown: whether there is a progress bar, and what is left out or not read is logged.
          between: is called now and then.

        Raises:
          UserError: none of the records that are looked at first can be used; says why.
        """
        self._look(source)
        lengths, image_counts = np.zeros(len(source), np.int32), np.zeros(len(source), np.int32)
        look = {"unit": "row", "delay": 2, "leave": False, "mininterval": 0.5, "disable": not shown}
        bad, unread = collections.Counter(), collections.Counter()
        every = iter(tqdm.tqdm(range(len(source)), "measuring", **look))
        while indices := list(itertools.islice(every, _CHUNK)):
            between()
            good, items = [], []
            for index in indices:
                try:
                    record = source[index]
                    items.append(self._items(record))
                except BadRow as error:
                    bad[error.reason] += 1
                    continue  # it is named when its turn comes
                unread.update(record.unread)
                good.append(index)
                image_counts[index] = len(record.images)
            lengths[good] = count_tokens(items, self._tokenizer, self._slots)
        if bad and shown:
            counts = bad.total(), len(source), source.name, format_reasons(bad)
            _log.warning("%d of the %d rows of %s cannot be used, images unseen: %s.", *counts)
        if unread and shown:
            keys = ", ".join(f"{key} ({count:,} rows)" for key, count in unread.most_common(_TOLD))
            _log.warning("Rows of %s have what is not read: %s.", source.name, keys)
        return lengths, image_counts

    def _look(self, source):
        errors = []
        for index in np.unique(np.linspace(0, len(source) - 1, _LOOK).astype(int)).tolist():
            try:
                self(source[index])
                return
            except BadRow as error:
                errors.append(error)
        reasons = format_reasons(collections.Counter(error.reason for error in errors))
        raise UserError(
            f"No row of {source.name} can be used, of {len(errors)} that were tried: {reasons}. The first: {errors[0]}"
        )

    def name(self, error: BadRow) -> None:
        """Logs one of the first bad rows."""
        with self._lock:
            self._told += 1
            told = self._told
        if told <= _TOLD:
            rest = " Further ones are only counted." if told == _TOLD else ""
            _log.warning("%s It is left out, and counted in rows_replaced.%s", error, rest)


@dataclasses.dataclass(frozen=True)
class _MakeRow:
    """Fills a planned row; a member that cannot be used leaves its place empty."""

    source: Sequence[Record]
    prepare: Prepare

    def __call__(self, planned: PlannedRow) -> dict[str, np.ndarray]:
        examples, bad = [], 0
        for index in planned.members:
            try:
                examples.append(self.prepare(self.source[index]))
            except BadRow as error:
                self.prepare.name(error)
                bad += 1
        side, cells = self.prepare.vision.image_size, self.prepare.cells
        row = to_row(examples, planned.length, planned.images, side, cells)
        return row | {"replaced": np.int64(bad)}


@dataclasses.dataclass(frozen=True)
class _Share:
    """A host's rows of every batch: a random-access source for Grain."""

    plan: Plan
    host: int
    hosts: int

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> PlannedRow:
        return self.plan[index * self.hosts + self.host]


def _check_agreement(fingerprint):
    """Ends all processes of a run where their plans differ, for they would read each other's rows."""
    if jax.process_count() == 1:
        return
    mine = np.frombuffer(bytes.fromhex(fingerprint), np.uint8)
    different = [host for host, other in enumerate(multihost_utils.process_allgather(mine)) if (other != mine).any()]
    if different:
        raise UserError(
            f"Host {jax.process_index()} has other data or another order of them than host {different[0]}: give all "
            "hosts the same files and the same config."
        )


class Batches:
    """Endless batches of this host's share of the rows: ``global_batch_size / hosts`` a batch.

    Attributes:
      plan: which conversations stand where.
      replaced: conversations that could not be used, of this host's share of the batches taken so far.
    """

    def __init__(
        self,
        config: TrainConfig,
        source: Records,
        prepare: Prepare,
        *,
        host: int,
        hosts: int,
        between: Callable[[], None] = lambda: None,
    ):
        """Measures all conversations first; meanwhile calls ``between`` now and then.

        Raises:
          UserError: as :class:`Plan` and :meth:`Prepare.measure` do, or this process and the others plan differently.
        """
        measured = [
            prepare.measure(records, shown=host == 0, between=between) for records in source.sets
        ]  # each is looked at
        lengths, image_counts = (np.concatenate(counts) for counts in zip(*measured, strict=True))
        rows = config.global_batch_size
        self._source = source
        self._tokenizer = prepare.fingerprint()
        self.plan = Plan(config.data, config.seed, rows, lengths, image_counts, source.sizes)
        _check_agreement(self.plan.fingerprint())
        self.replaced = 0
        self._threads, self._rows, self._local = config.data.threads, rows, rows // hosts
        share = grain.MapDataset.source(_Share(self.plan, host, hosts))
        self._share = share.map(_MakeRow(source, prepare))
        self._start(0)

    def close(self) -> None:
        """Ends the threads that read ahead, which else run until the garbage is collected."""
        self._iterator.close()

    def _start(self, batch):
        self._batch = batch
        read = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=8 * self._threads)
        rows = self._share[batch * self._local :].to_iter_dataset(read)
        self._iterator = iter(rows.batch(self._local, drop_remainder=True))

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        rows = next(self._iterator)
        self.replaced += int(rows.pop("replaced").sum())
        self._batch += 1
        return to_batch(rows)

    def get_state(self) -> dict[str, Any]:
        """Where the stream stands, the same for all hosts, however many they are."""
        return {"rows": self._batch * self._rows, "plan": self.plan.fingerprint(), "tokenizer": self._tokenizer}

    def records(self, batch: int) -> list[list[str]]:
        """Ids of a batch's records, of all hosts, row by row; of one that cannot be read, its place. The first is 1."""

        def name(index):
            try:
                return self._source[index].id
            except BadRow:
                return f"record {index}"

        rows = range((batch - 1) * self._rows, batch * self._rows)
        return [[name(index) for index in self.plan[row].members] for row in rows]

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on with the batch that follows the state's.

        Raises:
          UserError: the state is of other data, or of another batch size, packing, mixture, seed or tokenizer.
        """
        if state.get("tokenizer", self._tokenizer) != self._tokenizer:
            raise UserError(
                "The checkpoint was made with another tokenizer than data.tokenizer is now: continue with the same, or "
                "start in another workdir with init_from."
            )
        if state.get("plan") != self.plan.fingerprint():
            raise UserError(
                "The checkpoint was made with other data, or another order of them (seed, global_batch_size, data.*): "
                "continue with what its config.json says, or start in another workdir with init_from."
            )
        self.close()
        self._start(state["rows"] // self._rows)
