"""Which conversations make which row of which batch: a plan, the same on every host, made before anything is decoded.

From the lengths of all conversations and a seed, an epoch is planned whole: mixed, shuffled, then packed or grouped. So
an epoch is exact, whatever the number of hosts; a batch's padded length is known to all of them; and where a run stands
is one number.
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
    """A row: the conversations in it, the length it is filled up to, and its image places."""

    members: Sequence[int]
    length: int
    images: int


@dataclasses.dataclass(frozen=True)
class _Epoch:
    rows: list[list[int]]  # a multiple of the batch size; the last may be empty
    shapes: list[tuple[int, int]]  # length and image places, a batch


class Plan:
    """Rows without end, by index; ``rows[i]`` stands in batch ``i // batch_size``.

    Each epoch holds each conversation once (or as often as ``data.mix`` says) and ends with a batch that is filled up
    with empty rows.
    """

    def __init__(
        self,
        data: DataConfig,
        seed: int,
        batch_size: int,
        lengths: np.ndarray,
        image_counts: np.ndarray,
        sizes: Sequence[int],
    ):
        """
        Args:
          data: packing, grouping, mixing and the shape of rows.
          seed: of the order.
          batch_size: rows per batch, over all hosts.
          lengths: int [R], tokens of each conversation, 0 for one that cannot be used.
          image_counts: int [R], images of each, at most ``data.images_per_row``.
          sizes: conversations of each data set; the sets stand one after the other.

        Raises:
          UserError: weights that do not match the sets.
        """
        self._data, self._seed, self._batch = data, seed, batch_size
        self._lengths, self._image_counts = np.minimum(lengths, data.max_length), image_counts
        self._shares, self._begins = _shares(data, sizes), np.cumsum([0, *sizes])
        self._buckets = _buckets(data, self._lengths)
        self._first = [0]  # row that each epoch begins with
        self._epochs: dict[int, _Epoch] = {}
        self._lock = threading.RLock()  # the pipeline's threads all read the plan

    def __getitem__(self, index: int) -> PlannedRow:
        with self._lock:
            epoch = 0
            while index >= self._end(epoch):
                epoch += 1
            within, planned = index - self._first[epoch], self._epoch(epoch)
        return PlannedRow(planned.rows[within], *planned.shapes[within // self._batch])

    def steps(self, epochs: float) -> int:
        """Batches of so many epochs."""
        whole = int(epochs)
        with self._lock:
            begin = self._end(whole - 1) if whole else 0
            last = (self._end(whole) - begin) // self._batch if epochs > whole else 0
        # 0.07 of 100 batches are 7, though not in binary.
        return max(1, begin // self._batch + math.ceil((epochs - whole) * last - 1e-6))

    def fingerprint(self) -> str:
        """Of all that the order depends on: two plans with the same one are the same."""
        keys = ("packing", "group_by_modality_length", "max_length", "images_per_row", "buckets", "mix", "mix_by")
        facts = repr((self._seed, self._batch, self._begins.tolist(), [getattr(self._data, key) for key in keys]))
        arrays = self._lengths.astype(np.int64).tobytes() + self._image_counts.astype(np.int64).tobytes()
        return hashlib.sha256(facts.encode() + arrays).hexdigest()[:16]

    def _end(self, epoch):
        while len(self._first) <= epoch + 1:
            self._first.append(self._first[-1] + len(self._epoch(len(self._first) - 1).rows))
        return self._first[epoch + 1]

    def _epoch(self, epoch):
        planned = self._epochs.get(epoch)
        if planned is None:
            planned = self._make(epoch)
            # Rows are read a little ahead, so two epochs may be in use.
            self._epochs = {e: p for e, p in self._epochs.items() if e >= epoch - 1} | {epoch: planned}
        return planned

    def _make(self, epoch):
        rng = np.random.default_rng([self._seed, epoch])
        order = rng.permutation(self._members(epoch))
        data, batch = self._data, self._batch
        if data.packing:
            lengths, image_counts = self._lengths[order], self._image_counts[order]
            packed = best_fit(lengths, image_counts, data.max_length, data.images_per_row)
            rows = [order[packed[i]].tolist() for i in rng.permutation(len(packed))]
            rows += [[]] * (-len(rows) % batch)
            return _Epoch(rows, [(data.max_length, data.images_per_row)] * (len(rows) // batch))
        batches = self._grouped(order, rng) if data.group_by_modality_length else _chunks(order, batch)
        rows = [[i] for members in batches for i in members]
        rows += [[]] * (-len(rows) % batch)
        return _Epoch(rows, [self._shape(members) for members in batches])

    def _shape(self, members):
        """The smallest of the buckets that holds a batch; no image places where it has no image."""
        images = self._data.images_per_row if self._image_counts[members].any() else 0
        return int(self._buckets[np.searchsorted(self._buckets, self._lengths[members].max())]), images

    def _grouped(self, order, rng):
        """Batches of like length, each all with images or all without.

        The rule is LLaVA's: each kind is cut at random into groups, a group sorted by length and cut into batches, the
        batches shuffled, and what is left of both kinds comes last, together. There a group is a step, cut into the
        batches of its devices; here, where all devices of a step have one shape, it is many steps.
        """
        batches, left = [], []
        for kind in (self._image_counts[order] > 0, self._image_counts[order] == 0):
            mine = order[kind]
            whole = len(mine) // self._batch * self._batch
            left.append(mine[whole:])
            for group in _chunks(mine[:whole], self._batch * _GROUP):
                batches += _chunks(group[np.argsort(-self._lengths[group], kind="stable")], self._batch)
        rest = np.concatenate(left)
        rest = rest[np.argsort(-self._lengths[rest], kind="stable")]
        return [batches[i] for i in rng.permutation(len(batches))] + _chunks(rest, self._batch)

    def _members(self, epoch):
        """Conversations of an epoch: of each set the next ``share``, from its own endless shuffled order."""
        chosen = []
        for number, (share, begin, end) in enumerate(zip(self._shares, self._begins, self._begins[1:], strict=False)):
            size, index = int(end - begin), math.floor(epoch * share + 1e-9)
            stop = math.floor((epoch + 1) * share + 1e-9)
            while index < stop:
                turn, offset = divmod(index, size)
                count = min(size - offset, stop - index)
                order = np.random.default_rng([self._seed, number, turn, 1]).permutation(size)
                chosen.append(begin + order[offset : offset + count])
                index += count
        return np.concatenate(chosen) if chosen else np.zeros(0, np.int64)


def _buckets(data, lengths):
    """The ``data.buckets`` lengths to fill batches up to that leave the least unfilled, as if each row were a batch.

    They are multiples of a 64th of ``max_length``, and found by dynamic programming over these.
    """
    if data.buckets == 1:
        return np.array([data.max_length])
    step = math.ceil(data.max_length / 64)
    ends = np.arange(1, math.ceil(max(1, int(lengths.max(initial=1))) / step) + 1)  # in steps
    rows = np.searchsorted(np.sort(lengths), ends * step, side="right")  # that a bucket of so many steps holds
    # least[e]: positions that the rows up to ends[e] take in the buckets so far, the last of which is ends[e].
    least, chosen = rows * ends, [[end] for end in ends.tolist()]
    for _ in range(data.buckets - 1):
        before = [int(np.argmin(least[: e + 1] + (rows[e] - rows[: e + 1]) * ends[e])) for e in range(len(ends))]
        chosen = [
            chosen[b] + [end] if b != e else chosen[e]
            for e, (b, end) in enumerate(zip(before, ends.tolist(), strict=True))
        ]
        least = np.array([least[b] + (rows[e] - rows[b]) * ends[e] for e, b in enumerate(before)])
    return np.minimum(np.array(chosen[-1]) * step, data.max_length)


def _shares(data, sizes):
    """Conversations that each set gives an epoch."""
    if not data.mix:
        return [float(size) for size in sizes]
    if len(data.mix) != len(sizes):
        raise UserError(f"data.mix has {len(data.mix)} numbers for {len(sizes)} data sets.")
    if not all(0 <= number < math.inf for number in data.mix) or sum(data.mix) <= 0:
        raise UserError(f"data.mix={data.mix} should hold numbers that are not negative, one of them positive.")
    if data.mix_by == "epoch":
        return [size * times for size, times in zip(sizes, data.mix, strict=True)]
    return [sum(sizes) * weight / sum(data.mix) for weight in data.mix]


def _chunks(array, size):
    return [array[start : start + size] for start in range(0, len(array), size)]
