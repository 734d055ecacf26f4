"""Encoded conversations to rows of one static shape, alone or several in a row.

Axis letters: B rows, T positions, M images per row, N slots per image.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from stf_jax.data.conversation import Encoded
from stf_jax.data.records import BadRow


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of training data. Arrays are numpy on a host, and jax.Array, sharded on B, on devices."""

    tokens: np.ndarray  # int32 [B, T]; 0 where a row is not filled
    targets: np.ndarray  # int32 [B, T]: the next token of the same conversation
    loss_mask: np.ndarray  # bool [B, T]: whether the target is learned
    positions: np.ndarray  # int32 [B, T], counted anew in each conversation
    segment_ids: np.ndarray  # int32 [B, T]: 1, 2, … for the conversations of a row, 0 where it is not filled
    image_slots: np.ndarray  # int32 [B, T]: −1 for text, else index into the row's M·N image tokens
    images: np.ndarray  # uint8 [B, M, H, W, 3]; black where a row has fewer
    labels: np.ndarray | None = None  # uint8 [B, M, S, S, 3]: of S×S cells of each image (model.cells), if learned


@dataclasses.dataclass(frozen=True)
class Example:
    """One conversation of T' tokens with its M' images."""

    tokens: np.ndarray  # int32 [T']
    targets: np.ndarray  # int32 [T']
    loss_mask: np.ndarray  # bool [T']
    is_image: np.ndarray  # bool [T']
    images: np.ndarray  # uint8 [M', H, W, 3]
    labels: np.ndarray | None = None  # uint8 [M', S, S, 3]


def to_example(
    encoded: Encoded, images: np.ndarray, max_length: int, name: str, labels: np.ndarray | None = None
) -> Example:
    """One conversation, cut at ``max_length`` tokens, as LLaVA does.

    Raises:
      BadRow: the cut goes through an image, or leaves nothing to learn; ``name`` says of which record.
    """
    if encoded.is_image[max_length:].any():
        sentence = f"Record {name!r} has images beyond data.max_length={max_length} tokens; raise it."
        raise BadRow("over_length", sentence)
    tokens, learned, is_image = (x[:max_length] for x in (encoded.tokens, encoded.learned, encoded.is_image))
    if len(tokens) < len(encoded.tokens) and not learned[1:].any():
        raise BadRow("over_length", f"Record {name!r} begins to answer beyond data.max_length={max_length} tokens.")
    targets, learned = np.append(tokens[1:], 0).astype(np.int32), np.append(learned[1:], False)
    return Example(tokens, targets, learned, is_image, images, labels)


def to_row(
    examples: Sequence[Example], length: int, images_per_row: int, side: int, cells: int = 0
) -> dict[str, np.ndarray]:
    """Conversations one after the other as a row, the fields of :class:`Batch` without B.

    Args:
      length: T of the row.
      images_per_row: its M.
      side: H and W of its images.
      cells: S of their labels; 0 where they have none.
    """
    row = {key: np.zeros(length, np.int32) for key in ("tokens", "targets", "positions", "segment_ids")}
    row["loss_mask"], is_image = np.zeros(length, bool), np.zeros(length, bool)
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
        is_image[here] = example.is_image
        row["images"][first_image : first_image + len(example.images)] = example.images
        if example.labels is not None:
            row["labels"][first_image : first_image + len(example.images)] = example.labels
        begin, first_image = here.stop, first_image + len(example.images)
    # Since every image has all its slots, the n-th slot of a row is its image token n.
    row["image_slots"] = np.where(is_image, np.cumsum(is_image) - 1, -1).astype(np.int32)
    return row


def best_fit(lengths: Sequence[int], image_counts: Sequence[int], length: int, images_per_row: int) -> list[list[int]]:
    """Packs conversations into rows, the longest first, each into the fullest row that still takes it.

    Best-fit decreasing. Rows of the same room left are alike, so they are kept by that room: for each count of image
    places left, the bits of an integer say which numbers of free tokens some row has.

    Args:
      lengths: tokens of each conversation, at most ``length``.
      image_counts: images of each, at most ``images_per_row``.

    Returns:
      Rows, each the indices of its conversations.
    """
    rows: list[list[int]] = []
    free: dict[tuple[int, int], list[int]] = {}  # (image places, tokens) left → rows
    some = [0] * (images_per_row + 1)  # bit t of entry p: some row has p places and t tokens left
    for i in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        tokens, places = int(lengths[i]), int(image_counts[i])
        best = None
        for p in range(places, images_per_row + 1):
            fits = some[p] >> tokens
            if fits:
                room = (tokens + (fits & -fits).bit_length() - 1, p)
                best = room if best is None else min(best, room)
        if best is None:
            rows.append([i])
            t, p, row = length, images_per_row, len(rows) - 1
        else:
            t, p = best
            waiting = free[p, t]
            row = waiting.pop()
            rows[row].append(i)
            if not waiting:
                some[p] ^= 1 << t
        t, p = t - tokens, p - places
        free.setdefault((p, t), []).append(row)
        some[p] |= 1 << t
    return rows


def to_batch(rows: Mapping[str, np.ndarray]) -> Batch:
    """Rows stacked on B as a :class:`Batch`."""
    return Batch(**rows)
