"""Greedy answers to prompts, by recomputing the whole text for each new token: right for short answers only.

Axis letters: B prompts, T positions, M pictures a prompt.
"""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from transformers import PreTrainedTokenizerFast

from stf_jax.data.conversation import Encoded, stop_token
from stf_jax.runtime.mesh import BATCH, computing
from stf_jax.training.state import Blueprint, Params

_ROWS = 64  # prompts at once on each device's share of the mesh
_STEP = 32  # prompt lengths are rounded up to its multiples, so that few programs are compiled


class GreedyAnswers:
    """Answers prompts with a model on a mesh."""

    def __init__(
        self,
        plan: Blueprint,
        params: Params,
        tokenizer: PreTrainedTokenizerFast,
        mesh: Mesh,
        limit: int,
        template: str,
    ):
        """``limit``: new tokens at most, the one that ends an answer in the template included."""
        self._params, self._tokenizer, self._mesh, self._limit = params, tokenizer, mesh, limit
        self._stop = stop_token(template, tokenizer)
        self._precision = plan.precision
        self._generate = jax.jit(functools.partial(_generate, plan, limit))

    def __call__(self, prompts: Sequence[Encoded], images: Sequence[np.ndarray]) -> Iterator[str]:
        """Answers in the order of the prompts, as they come.

        Args:
          prompts: encoded conversations that end where the answer begins.
          images: for each, uint8 [M, H, W, 3], M the same for all.
        """
        shards = self._mesh.shape["data"] * self._mesh.shape["fsdp"]
        rows = min(_ROWS, -(-len(prompts) // shards)) * shards
        longest = max(len(prompt.tokens) for prompt in prompts) + self._limit
        length = -(-longest // _STEP) * _STEP
        for start in range(0, len(prompts), rows):
            chosen = prompts[start : start + rows]
            tokens, slots = np.zeros((rows, length), np.int32), np.full((rows, length), -1, np.int32)
            lengths = np.ones(rows, np.int32)
            pictures = np.zeros((rows, *images[0].shape), np.uint8)
            for i, prompt in enumerate(chosen):
                count = lengths[i] = len(prompt.tokens)
                tokens[i, :count] = prompt.tokens
                slots[i, :count] = np.where(prompt.is_image, np.cumsum(prompt.is_image) - 1, -1)
                pictures[i] = images[start + i]
            on_mesh = NamedSharding(self._mesh, BATCH)
            arrays = [jax.device_put(x, on_mesh) for x in (tokens, lengths, slots, pictures)]
            with computing(self._mesh, self._precision):
                said = np.asarray(self._generate(self._params, *arrays))
            for row in said[: len(chosen)]:
                ends = np.flatnonzero(row == self._stop)
                answer = row[: ends[0]] if len(ends) else row
                yield self._tokenizer.decode(answer, skip_special_tokens=True).strip()


def _generate(plan, limit, params, tokens, lengths, slots, images):
    """New tokens int32 [B, limit] after prompts of those lengths."""
    model = plan.merge(params)
    rows = jnp.arange(tokens.shape[0])
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    image_tokens = model.image_tokens(images)

    def say(i, tokens):
        # What lies to the right of a prompt cannot be seen from it, so the filling needs no mask.
        hidden = model.llm(model.embed(tokens, slots, image_tokens), positions, None)
        here = lengths + i
        choice = model.llm.logits(hidden[rows, here - 1]).argmax(-1)
        return tokens.at[rows, here].set(choice.astype(tokens.dtype))

    tokens = jax.lax.fori_loop(0, limit, say, tokens)
    return jnp.take_along_axis(tokens, lengths[:, None] + jnp.arange(limit), axis=1)
