"""A model that answers: conversations in, texts out, batch by batch, on a mesh. What runs on devices is decoding.py.

Axis letters: B rows, T positions of prompts, M images per row, G new tokens.
"""

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
    Mark,
    Text,
    check_ids,
    check_rows,
    check_template,
    encode,
    stop_tokens,
    template_items,
)
from stf_jax.data.image import to_square
from stf_jax.data.records import IMAGE_MARK, BadRow, Record
from stf_jax.data.tokenizer import positions, unsayable
from stf_jax.inference import decoding
from stf_jax.inference.decoding import Sampling, layerwise
from stf_jax.models.presets import llm_of, vision_of
from stf_jax.models.selection import reduction
from stf_jax.runtime.mesh import BATCH, computing, row_shards
from stf_jax.training.state import blueprint

GREEDY = Sampling()
ROOM = 128  # slots for new tokens at first; they are doubled when they are full
_THREADS = 2  # that open images ahead
TEXT_ALONE = "the model has no vision tower and answers text alone: leave images out, or choose a model that has one."
_Told = Callable[[int, str], None]


class Generator:
    """Answers conversations with a model on a mesh.

    Programs are compiled for a batch size and a bucket of prompt lengths, and kept.

    Attributes:
      plan: the model's structure; :meth:`take` gives it weights.
      slots: image tokens per image in a prompt.
    """

    def __init__(self, model: ModelConfig, tokenizer: PreTrainedTokenizerFast, mesh: Mesh, template: str, aspect: str):
        """``template``, ``aspect``: as ``config.data`` has them. Raises UserError where the tokenizer does not fit."""
        check_template(template, tokenizer)
        self.plan, self._reduction, self._model = blueprint(model), reduction(model), model
        self.slots = self._reduction.slots
        self._vision, self._vocab = vision_of(model), (vocab := llm_of(model).vocab)
        # Tokens that were added to a vocabulary may lie beyond: <image>, as in exports, or a <pad> of Llama 2. They are
        # never said, and a text that needs one is refused.
        added = tokenizer.get_added_vocab()
        if any(token >= vocab for name, token in tokenizer.get_vocab().items() if name not in added):
            raise UserError(f"The tokenizer's {len(tokenizer)} tokens exceed the {vocab} of {model.llm}.")
        check_rows(template, tokenizer, vocab)
        self._tokenizer, self._mesh, self._template, self._aspect = tokenizer, mesh, template, aspect
        self._rows = NamedSharding(mesh, BATCH)
        rules = decoding.Rules(stop_tokens(template, tokenizer), unsayable(tokenizer, vocab))
        self._stops = np.array(rules.stops)
        self.take(())
        self._prefill, self._extend, self._grow = decoding.programs(rules, self.plan, mesh)
        self._image_tokens = jax.jit(lambda weights, images: decoding.merged(self.plan, weights).image_tokens(images))

    def take(self, params: Iterable[tuple[str, jax.Array]]) -> "Generator":
        """Answers with these parameters from now on; each may be forgotten by the caller when the next is asked for."""
        dtype, places = jnp.dtype(self.plan.precision), self.plan.shardings(self._mesh)
        self._weights, sums = {}, {}
        for path, x in params:
            self._weights[path], sums[path] = layerwise(path, x, dtype, self._mesh, places[path].spec)
            del x  # before the next is read
        self._fingerprint = hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:16]
        return self

    def answers(
        self,
        records: Sequence[Record],
        limit: int,
        rows: int,
        sampling: Sampling = GREEDY,
        told: _Told | None = None,
    ) -> Iterator[str]:
        """Answers in the order of the records, a batch at a time; the next one's images are opened meanwhile.

        Args:
          records: conversations that end with a question.
          limit: new tokens per answer at most.
          rows: records at once; as many rows as the mesh wants are filled up.
          told: is called with the row in the batch and each piece of text as it is said; their sum is the answer.

        Raises:
          BadRow: an image cannot be opened, or a conversation does not fit the template or is over length.
        """
        shards = row_shards(self._mesh)
        size = -(-min(rows, len(records)) // shards) * shards
        with ThreadPoolExecutor(_THREADS) as pool:
            ahead = None
            for start in range(0, len(records), rows):
                batch = ahead or self._ready(pool, records[:rows], size)
                following = records[start + rows : start + 2 * rows]
                ahead = self._ready(pool, following, size) if following else None
                yield from self._answer(*batch, limit, sampling, told)

    def length(self, record: Record) -> int:
        """Tokens of the prompt that asks it, image tokens among them. Raises BadRow as :meth:`answers` does."""
        return len(self._prompt(record).tokens)

    def image_tokens(self, image: PIL.Image.Image) -> np.ndarray:
        """The image tokens of an image as the language model reads them, float32 [N, D]."""
        pixels = jnp.asarray(to_square(image, self._vision, self._aspect))[None, None]
        with computing(self._mesh, self.plan.precision):
            return np.asarray(self._image_tokens(self._weights, pixels)[0], np.float32)

    def protocol(self, record: Record) -> dict[str, Any]:
        """How a conversation is put to the model, with that one as it reads it; and a fingerprint of the weights."""
        names = {Mark.IMAGE: IMAGE_MARK, Mark.END: self._tokenizer.eos_token, Mark.NEWLINE: "\n"}
        items = template_items(self._template, record)
        prompt = "".join(names.get(item) or (item.text if isinstance(item, Text) else item.token) for item in items)
        how = {"vision": self._model.vision, "fusion": self._model.fusion.fusion, "llm": self._model.llm}
        how |= {"template": self._template, "image_aspect_ratio": self._aspect, "image_tokens": self.slots}
        if self._reduction.name:
            how |= {"reduce": self._reduction.name, "keep": self._reduction.keep}
        return how | {"precision": self.plan.precision, "weights": self._fingerprint, "first_prompt": prompt}

    def _ready(self, pool, records, size) -> tuple[list[Encoded], list[list[Future]], int]:
        """Prompts of a batch of ``size`` rows, and the images of the rows that this host holds, on their way."""
        prompts = [self._prompt(record) for record in records]
        mine = {
            row
            for (part,) in self._rows.addressable_devices_indices_map((size,)).values()
            for row in _range(part, size)
        }
        pending = [
            [pool.submit(self._open, image) if row in mine else None for image in record.images]
            for row, record in enumerate(records)
        ]
        return prompts, pending, size

    def _prompt(self, record):
        if record.images and self._vision is None:
            raise BadRow("no_vision", f"Record {record.id!r} shows an image, and {TEXT_ALONE}")
        prompt = encode(template_items(self._template, record), self._tokenizer, self.slots)
        check_ids(prompt, self._tokenizer, self._vocab, record.id)
        if len(prompt.tokens) > (most := positions(self._tokenizer)):
            sentence = f"Prompt {record.id!r} has {len(prompt.tokens):,} tokens; the model takes {most:,}: shorten it."
            raise BadRow("over_length", sentence)
        return prompt

    def _open(self, image):
        return to_square(image(), self._vision, self._aspect)

    def _answer(self, prompts, pending, size, limit, sampling, told):
        before = [""] * len(prompts)
        with computing(self._mesh, self.plan.precision):
            room = min(limit, ROOM)
            state = self._prefill(room, self._weights, *self._arrays(prompts, pending, size), sampling)
            while True:
                count, done = int(state.count), np.asarray(state.done)
                if told is not None:
                    for row, tokens in enumerate(np.asarray(state.said)[: len(prompts), :count]):
                        text = self._text(tokens)
                        # Half a character, or a word that the next token may change, waits.
                        if text.startswith(before[row]) and not text.endswith("\ufffd") and text != before[row]:
                            told(row, text[len(before[row]) :])
                            before[row] = text
                if done.all() or count == limit:
                    break
                if count == room:
                    room = min(limit, 2 * room)
                    state = self._grow(room, state)
                state = self._extend(self._weights, state, count + 1 if told is not None else room, sampling)
            said = np.asarray(state.said)[: len(prompts), :count]
        for row, tokens in enumerate(said):
            text = self._text(tokens)
            if told is not None and text != before[row]:
                told(row, text.removeprefix(before[row]))
            yield text

    def _text(self, tokens):
        ends = np.flatnonzero(np.isin(tokens, self._stops))
        return self._tokenizer.decode(tokens[: ends[0]] if len(ends) else tokens, skip_special_tokens=True).strip()

    def _arrays(self, prompts, pending, size):
        most, side = max(map(len, pending)), self._vision.image_size if self._vision else 1
        # A row with fewer images than others has fewer tokens to drop, and is not to lose text for it.
        spared = ((most - len(row)) * self._reduction.dropped for row in pending)
        length = bucket(max(len(prompt.tokens) + more for prompt, more in zip(prompts, spared, strict=True)))
        tokens, slots = np.zeros((size, length), np.int32), np.full((size, length), -1, np.int32)
        lengths = np.zeros(size, np.int32)
        for i, prompt in enumerate(prompts):
            count = lengths[i] = len(prompt.tokens)
            tokens[i, :count] = prompt.tokens
            slots[i, :count] = np.where(prompt.is_image, np.cumsum(prompt.is_image) - 1, -1)

        def images(index):
            rows = list(_range(index[0], size))
            share = np.zeros((len(rows), most, side, side, 3), np.uint8)
            for i, row in enumerate(rows):
                for j, future in enumerate(pending[row] if row < len(pending) else ()):
                    share[i, j] = future.result()
            return share

        arrays = [
            jax.make_array_from_callback(x.shape, self._rows, lambda index, x=x: x[index])
            for x in (tokens, slots, lengths)
        ]
        shape = (size, most, side, side, 3)
        return *arrays, jax.make_array_from_callback(shape, self._rows, images)


def _range(part, size):
    return range(*part.indices(size))


def bucket(length: int) -> int:
    """A prompt length rounded up to one of eight an octave, from 64: few programs are compiled, little is filling."""
    step = max(64, 2 ** ((length - 1).bit_length() - 4))
    return -(-length // step) * step
