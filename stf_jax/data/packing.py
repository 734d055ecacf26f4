"""Encoded conversations to rows of one static shape, alone or several in a row.

Axis letters: B rows, T positions, M pictures a row, N slots a picture.
"""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from stf_jax.config import UserError
from stf_jax.data.conversation import Encoded


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


def to_example(encoded: Encoded, images: np.ndarray, max_length: int, name: str) -> dict[str, np.ndarray]:
    """One conversation as the features that are packed: ``tokens, targets, loss_mask, is_image`` [T'], ``images``.

    A conversation over ``max_length`` loses its end, as in LLaVA.

    Raises:
      UserError: the cut would go through a picture; ``name`` says of which record.
    """
    if encoded.is_image[max_length:].any():
        raise UserError(f"Record {name!r} has pictures beyond data.max_length={max_length} tokens; raise it.")
    tokens, learned, is_image = (x[:max_length] for x in (encoded.tokens, encoded.learned, encoded.is_image))
    return {
        "tokens": tokens,
        "targets": np.append(tokens[1:], 0).astype(np.int32),
        "loss_mask": np.append(learned[1:], False),
        "is_image": is_image,
        "images": images,
    }


def pad(example: Mapping[str, np.ndarray], max_length: int, images_per_row: int) -> dict[str, np.ndarray]:
    """One example as a row of its own, in the form that Grain's packing gives."""
    row = {}
    for key, value in example.items():
        size = images_per_row if key == "images" else max_length
        row[key] = np.zeros((size, *value.shape[1:]), value.dtype)
        row[key][: len(value)] = value
    count = len(example["tokens"])
    row["tokens_segment_ids"] = (np.arange(max_length) < count).astype(np.int32)
    row["tokens_positions"] = np.where(np.arange(max_length) < count, np.arange(max_length), 0).astype(np.int32)
    return row


def to_batch(rows: Mapping[str, np.ndarray]) -> Batch:
    """Rows [B, …] as a :class:`Batch`. Since every picture has all its slots, the n-th slot of a row is token n."""
    is_image = rows["is_image"]
    return Batch(
        tokens=rows["tokens"],
        targets=rows["targets"],
        loss_mask=rows["loss_mask"],
        positions=rows["tokens_positions"].astype(np.int32),
        segment_ids=rows["tokens_segment_ids"].astype(np.int32),
        image_slots=np.where(is_image, np.cumsum(is_image, axis=1) - 1, -1).astype(np.int32),
        images=rows["images"],
    )
