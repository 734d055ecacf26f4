"""A model that answers conversations in batches, on a mesh. Its compiled programs are in decoding.py.

Axis letters: B rows, T positions of prompts, M images per row, G new tokens.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from jax.sharding import Mesh, NamedSharding
from transformers import PreTrainedTokenizerFast

from stf_jax.config import ModelConfig, UserError
from stf_jax.data.conversation import (
    Encoded,
    check_record_ids,
    check_template,
    check_template_ids,
    encode,
    stop_tokens,
    template_items,
)
from stf_jax.data.records import IMAGE_MARK, BadRow, Record
from stf_jax.data.tiles import ImageLayout, Tiles, check_tiles, place_slots
from stf_jax.data.tokenizer import max_positions, untrained_tokens
from stf_jax.inference import decoding
from stf_jax.inference.decoding import Sampling, split_layers
from stf_jax.models.blueprint import blueprint
from stf_jax.models.decoders.chat import Mark, Text
from stf_jax.models.spec import resolve_model
from stf_jax.models.vlm import VLM
from stf_jax.parallel.mesh import BATCH, compute_context, row_shards

GREEDY = Sampling()
INITIAL_MAX_NEW_TOKENS = 128  # initial slots for new tokens; doubled when they are full
_THREADS = 2  # threads that prefetch images
NO_VISION_MESSAGE = "the model has no vision tower: leave images out, or choose a model that has one."
OnText = Callable[[int, str], None]
_Pending = list[list[Future[np.ndarray] | None]]  # by row: its images, None on other hosts
_Batch = tuple[list[Encoded], _Pending, int]  # prompts, images, and rows with padding


class Generator:
    """Answers conversations with a model on a mesh.

    Compiled programs are kept for each batch size and bucket of prompt lengths.

    Attributes:
      model: its shapes and its reduction.
      plan: the model's structure; :meth:`load_params` gives it weights.
      slots: image tokens per image in a prompt, or of each place of an image with tiles.
      tiles: of images; None for another aspect.
      row_shards: parts into which the mesh splits a batch.
    """

    def __init__(
        self,
        model: ModelConfig,
        tokenizer: PreTrainedTokenizerFast,
        mesh: Mesh,
        template: str,
        aspect: str,
        tiles: Tiles | None = None,
    ) -> None:
        """Prepares a generator without weights.

        Args:
          template, aspect: as in ``config.data``.
          tiles: with the aspect ``tiles``.

        Raises:
          UserError: the tokenizer does not fit the model or the template, or the model cannot read tiles.
        """
        check_template(template, tokenizer)
        model = resolve_model(model)
        check_tiles(tiles, model)
        self.plan, self._reduction, self.model = blueprint(model), model.reduction, model
        self.slots = self._reduction.slots
        self._vision, llm = model.vision_shape, model.llm_shape
        assert llm is not None  # its blueprint has one
        self._vocab = vocab = llm.vocab
        # Added tokens may have ids beyond the model's vocabulary: <image>, as in exports, or a <pad> of Llama 2. They
        # are never sampled, and a text that needs one is rejected.
        added = tokenizer.get_added_vocab()
        if any(token >= vocab for name, token in tokenizer.get_vocab().items() if name not in added):
            raise UserError(
                f"The tokenizer's {len(tokenizer)} tokens exceed the {vocab} of {model.llm}; use the model's own."
            )
        check_template_ids(template, tokenizer, vocab)
        self._tokenizer, self._mesh, self._template, self._aspect = tokenizer, mesh, template, aspect
        self.tiles = tiles
        self._layout = None if self._vision is None else ImageLayout(self._vision, aspect, self.slots, tiles)
        self._rows, self.row_shards = NamedSharding(mesh, BATCH), row_shards(mesh)
        rules = decoding.TokenRules(stop_tokens(template, tokenizer), untrained_tokens(tokenizer, vocab))
        self._stops = np.array(rules.stops)
        self.load_params(())
        self._prefill, self._extend, self._extend_capacity = decoding.make_programs(rules, self.plan, mesh)
        self._compiled: dict[Callable[..., Any], jax.stages.Wrapped] = {}

    def load_params(self, params: Iterable[tuple[str, jax.Array]]) -> "Generator":
        """Loads the parameters to answer with, dropping each before it reads the next; returns the generator."""
        dtype, shardings = jnp.dtype(self.plan.precision), self.plan.shardings(self._mesh)
        self._weights: dict[str, jax.Array | tuple[jax.Array, ...]] = {}
        checksums: dict[str, int] = {}
        for path, x in params:
            self._weights[path], checksums[path] = split_layers(path, x, dtype, self._mesh, shardings[path].spec)
            del x  # before the next is read
        self._fingerprint = hashlib.sha256(json.dumps(checksums, sort_keys=True).encode()).hexdigest()[:16]
        return self

    def generate(
        self,
        records: Sequence[Record],
        limit: int,
        rows: int,
        sampling: Sampling = GREEDY,
        on_text: OnText | None = None,
    ) -> Iterator[str]:
        """Yields answers in the order of the records, batch by batch, and prefetches the images of the next batch.

        Args:
          records: conversations that end with a question.
          limit: maximum number of new tokens per answer.
          rows: records per batch, which is padded to a multiple of the mesh's row shards.
          on_text: called with the row in the batch and each new piece of text; the pieces of a row add up to its
            answer.

        Raises:
          BadRow: an image cannot be opened, or a conversation does not fit the template or is too long.
        """
        size = self._batch_size(min(rows, len(records)))
        yield from self.answer_batches(records, limit, rows, size, sampling, on_text)

    def answer_batches(
        self,
        records: Sequence[Record],
        limit: int,
        rows: int,
        size: int,
        sampling: Sampling,
        on_text: OnText | None = None,
    ) -> Iterator[str]:
        """Yields answers as :meth:`generate` does, from batches that are all padded to ``size`` rows."""
        for batch in self._prepare_batches(records, rows, size):
            yield from (text for text, _ in self._generate_batch(*batch, limit, sampling, on_text))

    def _batch_size(self, rows: int) -> int:
        """The rows of a batch with its padding."""
        return -(-rows // self.row_shards) * self.row_shards

    def _prepare_batches(self, records: Sequence[Record], rows: int, size: int) -> Iterator[_Batch]:
        """Yields batches of ``rows`` records, and opens the images of the next one meanwhile."""
        with ThreadPoolExecutor(_THREADS) as pool:
            prefetched = None
            for start in range(0, len(records), rows):
                batch = prefetched or self._prepare_batch(pool, records[:rows], size)
                next_records = records[start + rows : start + 2 * rows]
                prefetched = self._prepare_batch(pool, next_records, size) if next_records else None
                yield batch

    def prompt(self, record: Record) -> Encoded:
        """The prompt of a record, image slots included. Raises BadRow as :meth:`generate` does."""
        if record.images and self._vision is None:
            raise BadRow("no_vision", f"Record {record.id!r} has an image, but {NO_VISION_MESSAGE}")
        items, slots = template_items(self._template, record), list[np.ndarray]()
        if self._layout is not None:
            # Only tiles need the sizes.
            sizes = record.image_sizes() if self.tiles is not None else [(1, 1)] * len(record.images)
            slots = self._layout.slots(sizes)
        prompt = encode(items, self._tokenizer, slots)
        check_record_ids(prompt, self._tokenizer, self._vocab, record.id)
        if len(prompt.tokens) > (max_length := max_positions(self._tokenizer)):
            raise BadRow(
                "over_length",
                f"Prompt {record.id!r} has {len(prompt.tokens):,} tokens, but the model supports {max_length:,}: "
                "shorten it.",
            )
        return prompt

    def answer_tokens(self, record: Record, limit: int) -> np.ndarray:
        """The tokens of the answer of :meth:`generate` to a record, with the one that ended it, int32 [G]."""
        with ThreadPoolExecutor(_THREADS) as pool:
            batch = self._prepare_batch(pool, [record], self.row_shards)
            ((_, tokens),) = self._generate_batch(*batch, limit, GREEDY, None)
        ends = np.flatnonzero(np.isin(tokens, self._stops))
        return tokens[: ends[0] + 1] if len(ends) else tokens

    def image_tokens(self, image: PIL.Image.Image) -> np.ndarray:
        """The image tokens of an image as the language model reads them, float32 [N, D].

        Raises:
          UserError: the model has no vision tower.
        """
        squares = self.squares(image)
        tokens = self.apply(VLM.image_tokens, jnp.asarray(squares)[None])[0]
        assert self._layout is not None  # the tower has read the image
        (slots,) = self._layout.slots([image.size])
        return np.asarray(tokens, np.float32)[place_slots(slots, 0, len(squares) * self.slots)]

    def squares(self, image: PIL.Image.Image) -> np.ndarray:
        """What the tower reads of an image, uint8 [M, H, W, 3]: one square, or its thumbnail and tiles.

        Raises:
          UserError: the model has no vision tower.
        """
        if self._layout is None:
            raise UserError(f"This image has no tokens: {NO_VISION_MESSAGE}")
        return self._layout.squares(image)

    def apply(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls ``function(model, *arguments)``, compiled with the model's weights on the mesh.

        The program is kept for further calls of the same function with arrays of the same shapes.
        """
        with compute_context(self._mesh, self.plan.precision):
            return self._program(function)(self._weights, *arguments)

    def compile(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Compiles what :meth:`apply` calls for such arguments, which the program does not read."""
        with compute_context(self._mesh, self.plan.precision):
            self._program(function).lower(self._weights, *arguments).compile()

    def _program(self, function: Callable[..., Any]) -> jax.stages.Wrapped:
        if function not in self._compiled:
            self._compiled[function] = jax.jit(
                lambda weights, *arguments: function(decoding.merge_weights(self.plan, weights), *arguments)
            )
        return self._compiled[function]

    def with_reduction(self, reduce: str, keep: int, tokens: int = 0) -> "Generator":
        """The same model with another reduction or budget of its image tokens; both share the weights.

        Raises:
          UserError: the model cannot be reduced as requested.
        """
        model = dataclasses.replace(self.model, reduce=reduce, keep=keep, tokens=tokens)
        other = Generator(model, self._tokenizer, self._mesh, self._template, self._aspect, self.tiles)
        other._weights, other._fingerprint = self._weights, self._fingerprint
        return other

    def protocol(self, record: Record) -> dict[str, Any]:
        """Describes the model, its weights (by a fingerprint) and the prompt format, with the prompt of ``record``."""
        names = {Mark.IMAGE: IMAGE_MARK, Mark.END: self._tokenizer.eos_token, Mark.NEWLINE: "\n"}
        items = template_items(self._template, record)
        prompt = "".join(
            names[item] if isinstance(item, Mark) else item.text if isinstance(item, Text) else item.token
            for item in items
        )
        details: dict[str, Any] = {
            "vision": self.model.vision,
            "fusion": self.model.fusion.fusion,
            "llm": self.model.llm,
        }
        details |= {"template": self._template, "image_aspect_ratio": self._aspect, "image_tokens": self.slots}
        if self.model.tokens:
            details["tokens"] = self.model.tokens
        if self.tiles is not None:
            details["tiles"] = dataclasses.asdict(self.tiles)
        if self._reduction.name:
            details |= {"reduce": self._reduction.name, "keep": self._reduction.keep}
        if self.model.schedule:
            details["schedule"] = self.model.schedule
        if self._reduction.stages:
            assert self.model.llm_shape is not None  # it drops the tokens
            details["kept_after_layer"] = {str(stage.after): stage.keep for stage in self._reduction.stages}
            details["average_image_tokens"] = self._reduction.average_tokens(self.model.llm_shape.layers)
        return details | {"precision": self.plan.precision, "weights": self._fingerprint, "first_prompt": prompt}

    def _prepare_batch(self, pool: ThreadPoolExecutor, records: Sequence[Record], size: int) -> _Batch:
        """Prompts of a batch of ``size`` rows, and futures of the images of the rows that belong to this host."""
        prompts = [self.prompt(record) for record in records]
        indices = self._rows.addressable_devices_indices_map((size,)).values()
        local_rows = {row for index in indices if index is not None for row in _index_range(index[0], size)}
        pending: _Pending = [
            [pool.submit(self._open_image, image) if row in local_rows else None for image in record.images]
            for row, record in enumerate(records)
        ]
        return prompts, pending, size

    def _open_image(self, image: Callable[[], PIL.Image.Image]) -> np.ndarray:
        return self.squares(image())

    def _generate_batch(
        self,
        prompts: Sequence[Encoded],
        pending: _Pending,
        size: int,
        limit: int,
        sampling: Sampling,
        on_text: OnText | None,
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the text of each answer, and its tokens, int32 [G]."""
        sent = [""] * len(prompts)
        with compute_context(self._mesh, self.plan.precision):
            capacity = min(limit, INITIAL_MAX_NEW_TOKENS)
            state = self._prefill(capacity, self._weights, *self._make_arrays(prompts, pending, size), sampling)
            while True:
                count, done = int(state.count), np.asarray(state.done)
                if on_text is not None:
                    for row, tokens in enumerate(np.asarray(state.output_ids)[: len(prompts), :count]):
                        text = self.decode_text(tokens)
                        # Incomplete characters, and text that the next token may still change, are held back.
                        if text.startswith(sent[row]) and not text.endswith("\ufffd") and text != sent[row]:
                            on_text(row, text[len(sent[row]) :])
                            sent[row] = text
                if done.all() or count == limit:
                    break
                if count == capacity:
                    capacity = min(limit, 2 * capacity)
                    state = self._extend_capacity(capacity, state)
                state = self._extend(self._weights, state, count + 1 if on_text is not None else capacity, sampling)
            output_ids = np.asarray(state.output_ids)[: len(prompts), :count]
        for row, tokens in enumerate(output_ids):
            text = self.decode_text(tokens)
            if on_text is not None and text != sent[row]:
                on_text(row, text.removeprefix(sent[row]))
            yield text, tokens

    def decode_text(self, tokens: np.ndarray) -> str:
        """The text of an answer's tokens, up to the one that ends it."""
        ends = np.flatnonzero(np.isin(tokens, self._stops))
        text = self._tokenizer.decode(tokens[: ends[0]] if len(ends) else tokens, skip_special_tokens=True)
        assert isinstance(text, str)  # of one sequence of tokens
        return text.strip()

    def _make_arrays(self, prompts: Sequence[Encoded], pending: _Pending, size: int) -> tuple[jax.Array, ...]:
        """Tokens, image slots, lengths and images of a batch, as for :func:`stf_jax.inference.decoding.prefill`."""
        max_images, places = max(map(len, pending)), self._count_places(pending)
        # A row with fewer images than others drops fewer tokens, so it needs extra positions to keep all of its text.
        extra = ((max_images - len(row)) * self._reduction.dropped for row in pending)
        length = bucket_length(
            max(len(prompt.tokens) + extra_tokens for prompt, extra_tokens in zip(prompts, extra, strict=True))
        )
        tokens, slots = np.zeros((size, length), np.int32), np.full((size, length), -1, np.int32)
        lengths = np.zeros(size, np.int32)
        for i, prompt in enumerate(prompts):
            count = lengths[i] = len(prompt.tokens)
            tokens[i, :count] = prompt.tokens
            slots[i, :count] = place_slots(prompt.image_slots, 0, places * self.slots)

        arrays = [jax.make_array_from_callback(x.shape, self._rows, x.__getitem__) for x in (tokens, slots, lengths)]
        return *arrays, self._make_images(pending, size)

    def _count_places(self, pending: _Pending) -> int:
        """The squares per row of a batch."""
        return max(map(len, pending)) * (1 if self.tiles is None else self.tiles.places)

    def _make_images(self, pending: _Pending, size: int) -> jax.Array:
        """The images of a batch, uint8 [B, M, H, W, 3]."""
        places, side = self._count_places(pending), self._vision.image_size if self._vision else 1

        def images(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # a device of this host has some rows
            rows = list(_index_range(index[0], size))
            local_images = np.zeros((len(rows), places, side, side, 3), np.uint8)
            for i, row in enumerate(rows):
                first = 0
                for future in pending[row] if row < len(pending) else ():
                    assert future is not None  # the row belongs to this host
                    squares = future.result()
                    local_images[i, first : first + len(squares)] = squares
                    first += len(squares)
            return local_images

        return jax.make_array_from_callback((size, places, side, side, 3), self._rows, images)


def _index_range(part: slice, size: int) -> range:
    return range(*part.indices(size))


def bucket_length(length: int) -> int:
    """Rounds a prompt length up to one of eight per octave, from 64: few compiled programs, little padding."""
    step = max(64, 2 ** ((length - 1).bit_length() - 4))
    return -(-length // step) * step
