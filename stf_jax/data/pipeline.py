"""The Grain pipeline: records, shuffled and split by host, become batches; its iterator can be saved and restored."""

import dataclasses
from collections.abc import Sequence

import grain
import numpy as np
from transformers import PreTrainedTokenizerFast

from stf_jax.config import DataConfig, TrainConfig, UserError
from stf_jax.data.conversation import encode, template_items
from stf_jax.data.image import to_square
from stf_jax.data.packing import pad, to_batch, to_example
from stf_jax.data.records import LlavaRecords, Record
from stf_jax.data.scenes import SceneRecords
from stf_jax.models.vit import VisionConfig

_PACKING_BINS = 16  # rows open at once, for best-fit packing


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Makes a record into an example (data/packing.py)."""

    config: DataConfig
    tokenizer: PreTrainedTokenizerFast
    vision: VisionConfig
    slots: int  # image slots a picture

    def __call__(self, record: Record) -> dict[str, np.ndarray]:
        """Raises UserError, naming the record, where it does not fit the template or the row."""
        limit = self.config.images_per_row
        if len(record.pictures) > limit:
            raise UserError(
                f"Record {record.id!r} has {len(record.pictures)} pictures; raise data.images_per_row={limit}."
            )
        encoded = encode(template_items(self.config.template, record), self.tokenizer, self.slots)
        pictures = [to_square(picture, self.vision, self.config.aspect) for picture in record.pictures]
        side = self.vision.image_size
        images = np.stack(pictures) if pictures else np.zeros((0, side, side, 3), np.uint8)
        return to_example(encoded, images, self.config.max_length, record.id)


def training_records(config: TrainConfig) -> Sequence[Record]:
    """The source that the config names. Raises UserError where its files are missing or malformed."""
    data = config.data
    if data.source == "scenes":
        return SceneRecords(data.scenes.task, data.scenes.size, config.seed, most=data.scenes.things)
    return LlavaRecords(data.annotations, data.images)


def training_batches(
    config: TrainConfig, source: Sequence[Record], prepare: Prepare, *, host: int, hosts: int
) -> grain.IterDataset:
    """Endless batches of this host's share of the rows: ``global_batch_size / hosts`` a batch.

    Epochs are shuffled each in its own order, from the seed. An iterator over the result yields :class:`Batch` and has
    ``get_state`` and ``set_state``.
    """
    data = config.data
    records = grain.MapDataset.source(source).seed(config.seed).shuffle().repeat()[host::hosts].map(prepare)
    read = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=8 * data.threads)
    examples = records.to_iter_dataset(read)
    if data.packing:
        lengths = dict.fromkeys(("tokens", "targets", "loss_mask", "is_image"), data.max_length)
        rows = grain.experimental.BestFitPackIterDataset(
            examples,
            length_struct=lengths | {"images": data.images_per_row},
            num_packing_bins=_PACKING_BINS,
            seed=config.seed,
        )
    else:
        rows = examples.map(lambda example: pad(example, data.max_length, data.images_per_row))
    return rows.batch(config.global_batch_size // hosts, drop_remainder=True).map(to_batch)
