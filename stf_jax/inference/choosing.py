"""A generator that reads each image with as few tokens as keep answers within a tolerance (models/chooser.py).

The tower and the chooser run first, then the prompts with one number of tokens are answered together, so that every
program has static shapes. An image goes through the tower twice.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import PIL.Image
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from transformers import PreTrainedTokenizerFast

from stf_jax.config import UserError
from stf_jax.data.records import Record, make_question
from stf_jax.inference import decoding
from stf_jax.inference.decoding import Sampling
from stf_jax.inference.generator import GREEDY, Generator, OnText
from stf_jax.models.chooser import fewest_tokens
from stf_jax.models.spec import ModelSpec
from stf_jax.models.vlm import VLM
from stf_jax.parallel.mesh import compute_context

AUTO = "auto"  # as a number of tokens
# Batches of records that are answered in order. Each number of tokens has one batch that is not full.
WINDOW = 16


class ChoosingGenerator(Generator):
    """A generator whose model has a chooser.

    What it inherits beside :meth:`generate` and :meth:`image_tokens` reads images with the most tokens.

    Attributes:
      tolerance: the divergence that is accepted, in nats per answer token.
    """

    def __init__(
        self,
        model: ModelSpec,
        tokenizer: PreTrainedTokenizerFast,
        mesh: Mesh,
        template: str,
        aspect: str,
        tolerance: float,
    ) -> None:
        """Prepares a generator without weights.

        Raises:
          UserError: the model has no chooser, or as :class:`Generator`.
        """
        if not model.chooser:
            raise UserError("The model has no head that chooses tokens: train one (docs/budgets.md), or give a number.")
        super().__init__(model, tokenizer, mesh, template, aspect)
        self.tolerance = tolerance
        plan, replicated = self.plan, NamedSharding(mesh, PartitionSpec())  # all hosts choose the same

        def expect(weights: decoding.Weights, images: jax.Array) -> jax.Array:
            return VLM.expected_divergences(decoding.merge_weights(plan, weights), images)

        self._expect = jax.jit(expect, out_shardings=replicated)

    def load_params(self, params: Iterable[tuple[str, jax.Array]]) -> "Generator":
        self._at: dict[int, Generator] = {}  # drops those with the old weights
        return super().load_params(params)

    def at(self, tokens: int) -> Generator:
        """The generator that reads all images with that many tokens, one of the budgets."""
        if tokens not in self._at:
            self._at[tokens] = self.with_reduction("", 0, tokens)
        return self._at[tokens]

    def choose(self, records: Sequence[Record], rows: int) -> list[int]:
        """Chooses the tokens per image of each record: the most that one of its images needs.

        Args:
          records, rows: as of :meth:`generate`. A record without images gets the most.

        Raises:
          BadRow: as :meth:`generate`.
        """
        budgets, chosen = self.model.fusion.budgets, list[int]()
        for _, pending, size in self._prepare_batches(records, rows, self._batch_size(min(rows, len(records)))):
            counts = [len(images) for images in pending]
            if not any(counts):
                chosen += [budgets[0]] * len(counts)
                continue
            with compute_context(self._mesh, self.plan.precision):
                expected = np.asarray(self._expect(self._weights, self._make_images(pending, size)))
            fewest = fewest_tokens(expected, budgets, self.tolerance)
            chosen += [int(max(row[:count], default=budgets[0])) for row, count in zip(fewest, counts, strict=False)]
        return chosen

    def choose_for(self, image: PIL.Image.Image) -> Generator:
        """The generator that reads images with as many tokens as this image gets."""
        (tokens,) = self.choose([make_question("image", (lambda: image,), "")], 1)
        return self.at(tokens)

    def generate(
        self,
        records: Sequence[Record],
        limit: int,
        rows: int,
        sampling: Sampling = GREEDY,
        on_text: OnText | None = None,
        chosen: Sequence[int] | None = None,
    ) -> Iterator[str]:
        """Yields answers in the order of the records, after each :data:`WINDOW` batches of them.

        Args:
          records, limit, rows, sampling, on_text: as of :meth:`Generator.generate`; a batch has one number of tokens.
          chosen: what :meth:`choose` returned for the records, if it was called.

        Raises:
          BadRow: as :meth:`Generator.generate`.
        """
        chosen = self.choose(records, rows) if chosen is None else chosen
        size = self._batch_size(min(rows, len(records)))
        for start in range(0, len(records), WINDOW * rows):
            window, texts = range(len(records))[start : start + WINDOW * rows], dict[int, str]()
            for tokens in self.model.fusion.budgets:
                members = [index for index in window if chosen[index] == tokens]
                asked = [records[index] for index in members]
                answers = self.at(tokens).answer_batches(asked, limit, rows, size, sampling, on_text)
                texts |= zip(members, answers, strict=True)
            yield from (texts[index] for index in window)

    def image_tokens(self, image: PIL.Image.Image) -> np.ndarray:
        return self.choose_for(image).image_tokens(image)

    def protocol(self, record: Record) -> dict[str, Any]:
        details = {"tokens": AUTO, "tolerance": self.tolerance, "image_tokens": list(self.model.fusion.budgets)}
        return super().protocol(record) | details
