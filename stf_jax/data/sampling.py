"""Plans which conversations are in which row of which batch, identically on every host, before anything is decoded.

A complete epoch is planned from the lengths of all conversations and a seed: mixed, shuffled, then packed or grouped.
So an epoch is exact for any number of hosts, all hosts know a batch's padded length, and the position of a run is a
single number.
"""

import bisect
import collections
import dataclasses
import hashlib
import itertools
import math
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stf_jax.config import BudgetsPerStep, DataConfig, TrainConfig, UserError
from stf_jax.data.packing import Budget, best_fit
from stf_jax.models.spec import training_budgets

_GROUP = 32  # batches that are sorted by length together
_ALIGNMENT = 8  # divides the lengths of rows at lower budgets where it divides that at the first


class BatchShape(NamedTuple):
    """The shape of a batch: its rows, their padded length, their number of image places, and the budgets to read at."""

    rows: int
    length: int
    images: int
    budgets: tuple[Budget, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """The number of positions, and of image places: the larger, the more work and memory."""
        length = sum(budget.length for budget in self.budgets) or self.length
        return self.rows * length, self.rows * self.images


class PlannedRow(NamedTuple):
    """A row: its conversations, its padded length, and its number of image places."""

    members: Sequence[int]
    length: int
    images: int


@dataclasses.dataclass(frozen=True)
class _Epoch:
    rows: list[list[int]]  # of all batches; the last may be empty
    shapes: list[BatchShape]
    begins: list[int]  # first row of each batch


class Plan:
    """An endless sequence of planned rows, which are those of the first batch, then of the second, and so on.

    Each epoch has each conversation once (or as often as ``data.mix`` says); its last batch is padded with empty rows.
    """

    def __init__(
        self,
        data: DataConfig,
        seed: int,
        batch_size: int,
        lengths: np.ndarray,
        image_counts: np.ndarray,
        sizes: Sequence[int],
        dropped: int = 0,
        budgets: Sequence[int] = (),
        budgets_per_step: BudgetsPerStep = "all",
    ) -> None:
        """
        Args:
          data: packing, grouping, mixing and the shape of rows.
          seed: for the order.
          batch_size: rows per batch, on all hosts; with ``data.tokens_per_batch``, all batches have multiples of it.
          lengths: int [R], tokens of each conversation; 0 for one that cannot be used.
          image_counts: int [R], image places of each, at most ``data.image_places``.
          sizes: conversations of each data set; the sets are concatenated.
          dropped: image tokens per image that some decoder layer does not have in its rows. A row must have room for
            its text where each of its image places lacks them, so an image place without an image takes as many.
          budgets: slots per image at which rows are read, most first; ``lengths`` are those at the first. Empty: those
            are the only ones.
          budgets_per_step: as in the config.

        Raises:
          UserError: ``data.mix`` does not match the sets.
        """
        self._data, self._seed, self._batch = data, seed, batch_size
        self._unused = dropped * data.images_per_row
        lengths = np.where(lengths > 0, lengths + self._unused - dropped * image_counts, 0)
        self._token_budgets, self._budgets_per_step = tuple(budgets), budgets_per_step
        self._lengths, self._image_counts = np.minimum(lengths, data.max_length), image_counts
        self._shares, self._begins = _get_shares(data, sizes), np.cumsum([0, *sizes])
        self._buckets = _choose_buckets(data, self._lengths)
        self._first = [(0, 0)]  # first row and first batch of each epoch
        self._epochs: dict[int, _Epoch] = {}
        self._lock = threading.RLock()  # the pipeline's threads all read the plan

    def __getitem__(self, index: int) -> PlannedRow:
        with self._lock:
            epoch = self._find_epoch(row=index)
            offset, planned = index - self._first[epoch][0], self._get_epoch(epoch)
        shape = planned.shapes[bisect.bisect(planned.begins, offset) - 1]
        return PlannedRow(planned.rows[offset], shape.length, shape.images)

    def batch_rows(self, batch: int) -> range:
        """Returns the indices of the rows of a batch."""
        with self._lock:
            epoch = self._find_epoch(batch=batch)
            row, first = self._first[epoch]
            planned = self._get_epoch(epoch)
            begin = row + planned.begins[batch - first]
            return range(begin, begin + planned.shapes[batch - first].rows)

    def batch_budgets(self, batch: int) -> tuple[Budget, ...]:
        """Returns the budgets at which a batch is read."""
        with self._lock:
            epoch = self._find_epoch(batch=batch)
            return self._get_epoch(epoch).shapes[batch - self._first[epoch][1]].budgets

    def find_batch(self, row: int) -> int:
        """Returns the batch that begins with a row."""
        with self._lock:
            epoch = self._find_epoch(row=row)
            first_row, first_batch = self._first[epoch]
            return first_batch + bisect.bisect_left(self._get_epoch(epoch).begins, row - first_row)

    def steps(self, epochs: float) -> int:
        """Returns the number of batches in a number of epochs."""
        full = int(epochs)
        with self._lock:
            begin = self._end(full - 1)[1] if full else 0
            last = self._end(full)[1] - begin if epochs > full else 0
        # Without the 1e-6, 0.07 of 100 batches would be 8, because of rounding.
        return max(1, begin + math.ceil((epochs - full) * last - 1e-6))

    def count_shapes(self, steps: int) -> collections.Counter[BatchShape]:
        """Counts the first batches by their shapes."""
        counts: collections.Counter[BatchShape] = collections.Counter()
        epoch = 0
        while counts.total() < steps:
            with self._lock:
                counts.update(self._get_epoch(epoch).shapes[: steps - counts.total()])
            epoch += 1
        return counts

    def shapes(self, start: int, stop: int) -> set[BatchShape]:
        """Returns the shapes of batches.

        Args:
          start: the first batch.
          stop: the batch after the last. Only those of the epoch that has ``start`` and of the next one are looked at.
        """
        with self._lock:
            epoch = self._find_epoch(batch=start)
            shapes: list[BatchShape] = []
            for each in (epoch, epoch + 1):
                _, first = self._first[each]
                if first < stop:
                    shapes += self._get_epoch(each).shapes[max(start - first, 0) : stop - first]
                    self._end(each)
        return set(shapes)

    @property
    def max_rows(self) -> int:
        """The rows of the largest batch."""
        return rows_per_batch(self._data, self._batch, int(self._buckets[0]))

    def fingerprint(self) -> str:
        """A fingerprint of all that the order depends on; plans with the same one are the same."""
        keys: tuple[str, ...] = (
            "packing",
            "group_by_modality_length",
            "max_length",
            "images_per_row",
            "buckets",
            "mix",
            "mix_by",
        )
        if self._data.tokens_per_batch:  # else the fingerprint is that of releases without this key
            keys = (*keys, "tokens_per_batch")
        if self._data.aspect == "tiles":
            keys = (*keys, "tiles")
        values = repr((self._seed, self._batch, self._begins.tolist(), [getattr(self._data, key) for key in keys]))
        if self._token_budgets:
            values += repr((self._token_budgets, self._budgets_per_step))
        arrays = self._lengths.astype(np.int64).tobytes() + self._image_counts.astype(np.int64).tobytes()
        return hashlib.sha256(values.encode() + arrays).hexdigest()[:16]

    def _end(self, epoch: int) -> tuple[int, int]:
        """The row and the batch after the last ones of an epoch."""
        while len(self._first) <= epoch + 1:
            (row, batch), planned = self._first[-1], self._get_epoch(len(self._first) - 1)
            self._first.append((row + len(planned.rows), batch + len(planned.shapes)))
        return self._first[epoch + 1]

    def _find_epoch(self, row: int = 0, batch: int = 0) -> int:
        epoch = 0
        while row >= self._end(epoch)[0] or batch >= self._end(epoch)[1]:
            epoch += 1
        return epoch

    def _get_epoch(self, epoch: int) -> _Epoch:
        planned = self._epochs.get(epoch)
        if planned is None:
            planned = self._plan_epoch(epoch)
            # Rows are prefetched, so two epochs may be in use.
            self._epochs = {e: p for e, p in self._epochs.items() if e >= epoch - 1} | {epoch: planned}
        return planned

    def _plan_epoch(self, epoch: int) -> _Epoch:
        rng = np.random.default_rng([self._seed, epoch])
        order = rng.permutation(self._choose_members(epoch))
        data, batch = self._data, self._batch
        if data.packing:
            lengths, image_counts = self._lengths[order], self._image_counts[order]
            lengths = np.maximum(lengths - self._unused, 0)
            packed = best_fit(lengths, image_counts, data.max_length - self._unused, data.image_places)
            rows = [order[packed[i]].tolist() for i in rng.permutation(len(packed))]
            if self._token_budgets and rows:
                rows = self._group_by_spare(rows, rng)
            shapes = [BatchShape(batch, data.max_length, data.image_places)] * -(-len(rows) // batch)
        else:
            if data.tokens_per_batch:
                batches = self._group_by_bucket(order, rng)
            else:
                groups = self._group(order, rng) if data.group_by_modality_length else _split(order, batch)
                batches = [(members, self._get_shape(members)) for members in groups]
            rows, shapes = [[i] for members, _ in batches for i in members], [shape for _, shape in batches]
        begins = list(itertools.accumulate((shape.rows for shape in shapes), initial=0))
        rows += [[]] * (begins.pop() - len(rows))
        if self._token_budgets:
            shapes = self._choose_budgets(epoch, rows, shapes, begins)
        return _Epoch(rows, shapes, begins)

    def _choose_budgets(
        self, epoch: int, rows: list[list[int]], shapes: list[BatchShape], begins: list[int]
    ) -> list[BatchShape]:
        """Returns the shapes with the budgets of each step, and the lengths that all rows of its batch fit."""
        chosen = np.random.default_rng([self._seed, epoch, 2]).integers(len(self._token_budgets), size=len(shapes))
        result = []
        for begin, shape, number in zip(begins, shapes, chosen, strict=True):
            budgets: tuple[Budget, ...] = ()
            if shape.images:
                spare = min(self._spare_images(row, shape) for row in rows[begin : begin + shape.rows])
                budgets = fit_budgets(self._token_budgets, shape.length, spare)
                budgets = budgets if self._budgets_per_step == "all" else (budgets[number],)
            result.append(shape._replace(budgets=budgets))
        return result

    def _spare_images(self, row: list[int], shape: BatchShape) -> int:
        """Returns the number of images, at most M, by whose slots a row is shortened, padding counted as images."""
        saved = self._token_budgets[0] - self._token_budgets[-1]  # a row that fits the last budget fits all
        padding = shape.length - int(self._lengths[row].sum())
        return min(shape.images, int(self._image_counts[row].sum()) + padding // saved)

    def _group_by_spare(self, rows: list[list[int]], rng: np.random.Generator) -> list[list[int]]:
        """Orders packed rows so that those of a batch become shorter alike at lower budgets; batches stay shuffled."""
        shape = BatchShape(self._batch, self._data.max_length, self._data.images_per_row)
        batches: list[np.ndarray] = []
        for group in _split(np.arange(len(rows)), self._batch * _GROUP):
            spare = np.array([self._spare_images(rows[i], shape) for i in group])
            batches += _split(group[np.argsort(-spare, kind="stable")], self._batch)
        *full, last = batches
        return [rows[i] for number in rng.permutation(len(full)) for i in full[number]] + [rows[i] for i in last]

    def _get_shape(self, members: np.ndarray, least: int = 0) -> BatchShape:
        """Returns the shape of a batch: the smallest bucket that fits it, and no image places if it has no images.

        Args:
          least: the length that it has at least.
        """
        images = self._data.image_places if self._image_counts[members].any() else 0
        longest = max(least, self._lengths[members].max())
        length = int(self._buckets[np.searchsorted(self._buckets, longest)])
        return BatchShape(rows_per_batch(self._data, self._batch, length), length, images)

    def _group(self, order: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        """Makes batches of similar lengths, each entirely with or entirely without images.

        This is LLaVA's rule: the conversations of each kind are split into random groups, each group is sorted by
        length and split into batches, and the batches are shuffled. The remainders of both kinds come last, together.
        In LLaVA, a group is one step, split into the batches of its devices. Here all devices of a step have the same
        shape, so a group is many steps.
        """
        batches: list[np.ndarray] = []
        remainders: list[np.ndarray] = []
        for is_kind in (self._image_counts[order] > 0, self._image_counts[order] == 0):
            members = order[is_kind]
            end = len(members) // self._batch * self._batch
            remainders.append(members[end:])
            for group in _split(members[:end], self._batch * _GROUP):
                batches += _split(group[np.argsort(-self._lengths[group], kind="stable")], self._batch)
        rest = np.concatenate(remainders)
        rest = rest[np.argsort(-self._lengths[rest], kind="stable")]
        return [batches[i] for i in rng.permutation(len(batches))] + _split(rest, self._batch)

    def _group_by_bucket(self, order: np.ndarray, rng: np.random.Generator) -> list[tuple[np.ndarray, BatchShape]]:
        """Makes full batches of the conversations of each bucket, in random order.

        What remains of a bucket goes to the next larger one; what remains of the largest comes last. With
        ``data.group_by_modality_length``, a batch is entirely with or entirely without images, but for the last ones.
        """
        batches: list[tuple[np.ndarray, BatchShape]] = []
        remainders: list[np.ndarray] = []
        has_images, separate = self._image_counts[order] > 0, self._data.group_by_modality_length
        buckets = np.searchsorted(self._buckets, self._lengths[order])
        for is_kind in (has_images, ~has_images) if separate else (np.full(len(order), True),):
            rest = order[:0]
            for bucket, length in enumerate(self._buckets.tolist()):
                members = np.concatenate([rest, order[is_kind & (buckets == bucket)]])
                rows = rows_per_batch(self._data, self._batch, length)
                end = len(members) // rows * rows
                batches += [(batch, self._get_shape(batch, length)) for batch in _split(members[:end], rows)]
                rest = members[end:]
            remainders.append(rest)
        batches, rest = [batches[i] for i in rng.permutation(len(batches))], np.concatenate(remainders)
        rest = rest[np.argsort(-self._lengths[rest], kind="stable")]
        while len(rest):
            shape = self._get_shape(rest[:1])
            batches.append((rest[: shape.rows], self._get_shape(rest[: shape.rows])))
            rest = rest[shape.rows :]
        return batches

    def _choose_members(self, epoch: int) -> np.ndarray:
        """Returns the conversations of an epoch: the next ``share`` of each set's own endless shuffled order."""
        chosen: list[np.ndarray] = []
        for number, (share, begin, end) in enumerate(zip(self._shares, self._begins, self._begins[1:], strict=False)):
            size, index = int(end - begin), math.floor(epoch * share + 1e-9)
            stop = math.floor((epoch + 1) * share + 1e-9)
            while index < stop:
                cycle, offset = divmod(index, size)
                count = min(size - offset, stop - index)
                order = np.random.default_rng([self._seed, number, cycle, 1]).permutation(size)
                chosen.append(begin + order[offset : offset + count])
                index += count
        return np.concatenate(chosen) if chosen else np.zeros(0, np.int64)


def fit_budgets(budgets: Sequence[int], length: int, images: int) -> tuple[Budget, ...]:
    """Returns budgets with the lengths of their rows.

    Args:
      budgets: slots per image, most first.
      length: of rows at the first budget.
      images: by whose slots rows become shorter at the others.
    """
    unit = math.gcd(length, _ALIGNMENT)
    return tuple(Budget(tokens, length - images * (budgets[0] - tokens) // unit * unit) for tokens in budgets)


def plan_budgets(config: TrainConfig, length: int, images: int) -> tuple[Budget, ...]:
    """Returns the budgets of a batch whose rows all have that many images; of those that are drawn, the first."""
    budgets = training_budgets(config.model)
    if not budgets or not images:
        return ()
    fitted = fit_budgets(budgets, length, min(images, length // budgets[0]))
    return fitted if config.budgets_per_step == "all" else fitted[:1]


def rows_per_batch(data: DataConfig, batch_size: int, length: int) -> int:
    """Returns the number of rows of a batch whose rows have this length, a multiple of ``batch_size``."""
    return batch_size * (data.tokens_per_batch // (batch_size * length) if data.tokens_per_batch else 1)


def _choose_buckets(data: DataConfig, lengths: np.ndarray) -> np.ndarray:
    """Returns the ``data.buckets`` padded lengths with the least padding, as if each row were a batch.

    They are multiples of 1/64 of ``max_length``, found by dynamic programming.
    """
    if data.buckets == 1:
        return np.array([data.max_length])
    step = math.ceil(data.max_length / 64)
    ends = np.arange(1, math.ceil(max(1, int(lengths.max(initial=1))) / step) + 1)  # in steps
    rows = np.searchsorted(np.sort(lengths), ends * step, side="right")  # number of rows that fit in ends steps
    # cost[e]: positions that the rows up to ends[e] need in the buckets so far, the last of which is ends[e].
    cost, chosen = rows * ends, [[end] for end in ends.tolist()]
    for _ in range(data.buckets - 1):
        previous = [int(np.argmin(cost[: e + 1] + (rows[e] - rows[: e + 1]) * ends[e])) for e in range(len(ends))]
        chosen = [
            chosen[p] + [end] if p != e else chosen[e]
            for e, (p, end) in enumerate(zip(previous, ends.tolist(), strict=True))
        ]
        cost = np.array([cost[p] + (rows[e] - rows[p]) * ends[e] for e, p in enumerate(previous)])
    return np.minimum(np.array(chosen[-1]) * step, data.max_length)


def _get_shares(data: DataConfig, sizes: Sequence[int]) -> list[float]:
    """Returns the number of conversations per epoch of each set."""
    if not data.mix:
        return [float(size) for size in sizes]
    if len(data.mix) != len(sizes):
        raise UserError(f"data.mix has {len(data.mix)} numbers for {len(sizes)} data sets.")
    if not all(0 <= number < math.inf for number in data.mix) or sum(data.mix) <= 0:
        raise UserError(f"data.mix={data.mix} must be numbers of at least 0, with a positive sum.")
    if data.mix_by == "epoch":
        return [size * times for size, times in zip(sizes, data.mix, strict=True)]
    return [sum(sizes) * weight / sum(data.mix) for weight in data.mix]


def _split(array: np.ndarray, size: int) -> list[np.ndarray]:
    return [array[start : start + size] for start in range(0, len(array), size)]
