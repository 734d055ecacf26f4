"""Plans which conversations are in which row of which batch, identically on every host, before anything is decoded.

A complete epoch is planned from the lengths of all conversations and a seed: mixed, shuffled, then packed or grouped.
So an epoch is exact for any number of hosts, all hosts know a batch's padded length, and the position of a run is a
single number.
"""

import dataclasses
import hashlib
import math
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stf_jax.config import DataConfig, UserError
from stf_jax.data.packing import best_fit

_GROUP = 32  # batches that are sorted by length together


class PlannedRow(NamedTuple):
    """A row: its conversations, its padded length, and its number of image places."""

    members: Sequence[int]
    length: int
    images: int


@dataclasses.dataclass(frozen=True)
class _Epoch:
    rows: list[list[int]]  # a multiple of the batch size; the last may be empty
    shapes: list[tuple[int, int]]  # length and image places per batch


class Plan:
    """An endless sequence of planned rows; ``plan[i]`` is in batch ``i // batch_size``.

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
    ) -> None:
        """
        Args:
          data: packing, grouping, mixing and the shape of rows.
          seed: for the order.
          batch_size: rows per batch, on all hosts.
          lengths: int [R], tokens of each conversation; 0 for one that cannot be used.
          image_counts: int [R], images of each, at most ``data.images_per_row``.
          sizes: conversations of each data set; the sets are concatenated.

        Raises:
          UserError: ``data.mix`` does not match the sets.
        """
        self._data, self._seed, self._batch = data, seed, batch_size
        self._lengths, self._image_counts = np.minimum(lengths, data.max_length), image_counts
        self._shares, self._begins = _get_shares(data, sizes), np.cumsum([0, *sizes])
        self._buckets = _choose_buckets(data, self._lengths)
        self._first = [0]  # first row of each epoch
        self._epochs: dict[int, _Epoch] = {}
        self._lock = threading.RLock()  # the pipeline's threads all read the plan

    def __getitem__(self, index: int) -> PlannedRow:
        with self._lock:
            epoch = 0
            while index >= self._end_row(epoch):
                epoch += 1
            offset, planned = index - self._first[epoch], self._get_epoch(epoch)
        return PlannedRow(planned.rows[offset], *planned.shapes[offset // self._batch])

    def steps(self, epochs: float) -> int:
        """Returns the number of batches in a number of epochs."""
        full = int(epochs)
        with self._lock:
            begin = self._end_row(full - 1) if full else 0
            last = (self._end_row(full) - begin) // self._batch if epochs > full else 0
        # Without the 1e-6, 0.07 of 100 batches would be 8, because of rounding.
        return max(1, begin // self._batch + math.ceil((epochs - full) * last - 1e-6))

    def shapes(self, start: int, stop: int) -> set[tuple[int, int]]:
        """Returns the shapes of batches: the length and the image places of their rows.

        Args:
          start: the first batch.
          stop: the batch after the last. Only those of the epoch that has ``start`` and of the next one are looked at.
        """
        with self._lock:
            epoch = 0
            while start * self._batch >= self._end_row(epoch):
                epoch += 1
            shapes = []
            for each in (epoch, epoch + 1):
                first = self._first[each] // self._batch
                if first < stop:
                    shapes += self._get_epoch(each).shapes[max(start - first, 0) : stop - first]
                    self._end_row(each)
        return set(shapes)

    def fingerprint(self) -> str:
        """A fingerprint of all that the order depends on; plans with the same one are the same."""
        keys = ("packing", "group_by_modality_length", "max_length", "images_per_row", "buckets", "mix", "mix_by")
        values = repr((self._seed, self._batch, self._begins.tolist(), [getattr(self._data, key) for key in keys]))
        arrays = self._lengths.astype(np.int64).tobytes() + self._image_counts.astype(np.int64).tobytes()
        return hashlib.sha256(values.encode() + arrays).hexdigest()[:16]

    def _end_row(self, epoch: int) -> int:
        while len(self._first) <= epoch + 1:
            self._first.append(self._first[-1] + len(self._get_epoch(len(self._first) - 1).rows))
        return self._first[epoch + 1]

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
            packed = best_fit(lengths, image_counts, data.max_length, data.images_per_row)
            rows = [order[packed[i]].tolist() for i in rng.permutation(len(packed))]
            rows += [[]] * (-len(rows) % batch)
            return _Epoch(rows, [(data.max_length, data.images_per_row)] * (len(rows) // batch))
        batches = self._group(order, rng) if data.group_by_modality_length else _split(order, batch)
        rows = [[i] for members in batches for i in members]
        rows += [[]] * (-len(rows) % batch)
        return _Epoch(rows, [self._get_shape(members) for members in batches])

    def _get_shape(self, members: np.ndarray) -> tuple[int, int]:
        """Returns the smallest bucket that fits a batch, and its image places: 0 if it has no images."""
        images = self._data.images_per_row if self._image_counts[members].any() else 0
        return int(self._buckets[np.searchsorted(self._buckets, self._lengths[members].max())]), images

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
