"""Packs encoded conversations into rows of a static shape, one or several per row.

Axis letters: B rows, T positions, M images per row, N slots per image.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

import jax
import numpy as np

from stf_jax.data.conversation import Encoded
from stf_jax.data.records import BadRow
from stf_jax.data.tiles import place_slots

Array = TypeVar("Array")


class Budget(NamedTuple):
    """A number of slots per image, and the length of rows that have so many."""

    tokens: int
    length: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch(Generic[Array]):
    """A batch of training rows: numpy arrays on a host, jax.Array sharded on B on devices.

    Attributes:
      budgets: those at which a step reads the rows (N and T of each); empty if the rows are read as they are.
    """

    tokens: Array  # int32 [B, T]; 0 for padding
    targets: Array  # int32 [B, T]: the next token of the same conversation
    loss_mask: Array  # bool [B, T]: whether the loss counts the target
    positions: Array  # int32 [B, T], from 0 in each conversation
    segment_ids: Array  # int32 [B, T]: 1, 2, … for the conversations of a row, 0 for padding
    image_slots: Array  # int32 [B, T]: −1 for text, else index into the row's M·N image tokens, newline behind them
    images: Array  # uint8 [B, M, H, W, 3]; unused ones are black
    labels: Array | None = None  # uint8 [B, M, S, S, 3]: labels of S×S cells per image, with model.cells
    budgets: tuple[Budget, ...] = dataclasses.field(default=(), metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Example:
    """One conversation of T' tokens with its M' images."""

    tokens: np.ndarray  # int32 [T']
    targets: np.ndarray  # int32 [T']
    loss_mask: np.ndarray  # bool [T']
    image_slots: np.ndarray  # int32 [T'], as of :class:`stf_jax.data.conversation.Encoded`
    images: np.ndarray  # uint8 [M', H, W, 3]
    labels: np.ndarray | None = None  # uint8 [M', S, S, 3]


def to_example(
    encoded: Encoded, images: np.ndarray, max_length: int, name: str, labels: np.ndarray | None = None
) -> Example:
    """Makes an example of a conversation, truncated to ``max_length`` tokens like LLaVA's.

    Raises:
      BadRow: truncation would cut off image slots or all targets; ``name`` is the record's name for the message.
    """
    if encoded.is_image[max_length:].any():
        message = f"Record {name!r} has images beyond data.max_length={max_length} tokens; raise it."
        raise BadRow("over_length", message)
    tokens, is_target, slots = (x[:max_length] for x in (encoded.tokens, encoded.is_target, encoded.image_slots))
    if len(tokens) < len(encoded.tokens) and not is_target[1:].any():
        raise BadRow(
            "over_length", f"Record {name!r} has no answer within data.max_length={max_length} tokens; raise it."
        )
    targets, loss_mask = np.append(tokens[1:], 0).astype(np.int32), np.append(is_target[1:], False)
    return Example(tokens, targets, loss_mask, slots, images, labels)


def to_row(
    examples: Sequence[Example], length: int, images_per_row: int, side: int, slots: int, cells: int = 0
) -> dict[str, np.ndarray]:
    """Concatenates conversations into a row: the fields of :class:`Batch` without B.

    Args:
      length: T.
      images_per_row: M.
      side: H and W of the images.
      slots: N.
      cells: S of the images' labels; 0 if they have none.
    """
    row = {key: np.zeros(length, np.int32) for key in ("tokens", "targets", "positions", "segment_ids")}
    row["loss_mask"], row["image_slots"] = np.zeros(length, bool), np.full(length, -1, np.int32)
    row["images"] = np.zeros((images_per_row, side, side, 3), np.uint8)
    if cells:
        row["labels"] = np.zeros((images_per_row, cells, cells, 3), np.uint8)
    begin = first_image = 0
    for segment, example in enumerate(examples, start=1):
        here = slice(begin, begin + len(example.tokens))
        for key in ("tokens", "targets", "loss_mask"):
            row[key][here] = getattr(example, key)
        row["positions"][here] = np.arange(len(example.tokens))
        row["segment_ids"][here] = segment
        row["image_slots"][here] = place_slots(example.image_slots, first_image * slots, images_per_row * slots)
        row["images"][first_image : first_image + len(example.images)] = example.images
        if example.labels is not None:
            row["labels"][first_image : first_image + len(example.images)] = example.labels
        begin, first_image = here.stop, first_image + len(example.images)
    return row


def best_fit(lengths: Sequence[int], image_counts: Sequence[int], length: int, images_per_row: int) -> list[list[int]]:
    """Packs conversations into rows by best-fit decreasing: longest first, each into the fullest row that has room.

    Rows with the same free space are interchangeable, so they are grouped by it. For each count of free image places,
    the bits of an integer tell which numbers of free tokens occur.

    Args:
      lengths: tokens of each conversation, at most ``length``.
      image_counts: images of each, at most ``images_per_row``.

    Returns:
      The rows, each a list of indices of conversations.
    """
    rows: list[list[int]] = []
    free: dict[tuple[int, int], list[int]] = {}  # (free image places, free tokens) → rows
    occurs = [0] * (images_per_row + 1)  # bit t of entry p: some row has p free places and t free tokens
    for i in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        tokens, places = int(lengths[i]), int(image_counts[i])
        best: tuple[int, int] | None = None
        for p in range(places, images_per_row + 1):
            fits = occurs[p] >> tokens
            if fits:
                space = (tokens + (fits & -fits).bit_length() - 1, p)
                best = space if best is None else min(best, space)
        if best is None:
            rows.append([i])
            t, p, row = length, images_per_row, len(rows) - 1
        else:
            t, p = best
            candidates = free[p, t]
            row = candidates.pop()
            rows[row].append(i)
            if not candidates:
                occurs[p] ^= 1 << t
        t, p = t - tokens, p - places
        free.setdefault((p, t), []).append(row)
        occurs[p] |= 1 << t
    return rows


def to_batch(rows: Mapping[str, np.ndarray], budgets: tuple[Budget, ...] = ()) -> Batch[np.ndarray]:
    """Makes a :class:`Batch` of rows that are stacked on B."""
    return Batch(**rows, budgets=budgets)
