"""Greedy answers equal a naive loop over unpadded prompts, whatever the batch and the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny

from stf_jax.config import MeshConfig
from stf_jax.data.conversation import Encoded
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.inference.greedy import GreedyAnswers
from stf_jax.models.vlm import slots_per_image
from stf_jax.runtime.mesh import make_mesh
from stf_jax.training.state import blueprint

LIMIT = 4


@pytest.fixture(scope="module")
def model():
    config = tiny().model
    plan = blueprint(config)
    rng = np.random.default_rng(0)
    params = {path: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype) for path, leaf in plan.shapes.items()}
    return plan, params, slots_per_image(config)


def _prompts(slots, count):
    rng = np.random.default_rng(1)
    prompts, images = [], []
    for i in range(count):
        before, after = rng.integers(5, 400, 2 + i % 3), rng.integers(5, 400, 3 + 5 * (i % 4))
        is_image = np.repeat([False, True, False], [len(before), slots, len(after)])
        tokens = np.concatenate([before, np.zeros(slots, int), after]).astype(np.int32)
        prompts.append(Encoded(tokens, np.zeros(len(tokens), bool), is_image))
        images.append(rng.integers(0, 256, (1, 64, 64, 3)).astype(np.uint8))
    return prompts, images


def _naive(plan, params, prompt, image, tokenizer):
    model = plan.merge(params)
    tokens = list(prompt.tokens)
    slots = list(np.where(prompt.is_image, np.cumsum(prompt.is_image) - 1, -1))
    for _ in range(LIMIT):
        row = np.array([tokens], np.int32)
        logits = model(row, np.arange(len(tokens))[None], None, np.array([slots], np.int32), image[None])
        choice = int(logits[0, -1].argmax())
        if choice == tokenizer.eos_token_id:
            break
        tokens.append(choice)
        slots.append(-1)
    return tokenizer.decode(tokens[len(prompt.tokens) :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("mesh", [MeshConfig(1, 1, 1), MeshConfig(2, 2, 2)])
def test_equals_a_loop_without_padding_or_batch(model, mesh):
    plan, params, slots = model
    tokenizer = load_tokenizer("miniature")
    prompts, images = _prompts(slots, 6)
    mesh = make_mesh(mesh)
    on_mesh = {path: jax.device_put(x, plan.shardings(mesh)[path]) for path, x in params.items()}
    said = list(GreedyAnswers(plan, on_mesh, tokenizer, mesh, LIMIT)(prompts, images))
    expected = [_naive(plan, params, p, i, tokenizer) for p, i in zip(prompts, images, strict=True)]
    assert said == expected
    assert len(set(said)) > 1  # the pictures and prompts matter, or the comparison says little


def test_stops_at_the_end_of_sequence(model):
    plan, params, slots = model
    tokenizer = load_tokenizer("miniature")
    # A head that always prefers </s>: the final norm scales by 0 but for what the embedding of </s> picks up.
    params = params | {"llm/embedding": jnp.zeros_like(params["llm/embedding"]).at[tokenizer.eos_token_id].set(1.0)}
    params |= {"llm/norm/scale": jnp.ones_like(params["llm/norm/scale"])}
    prompts, images = _prompts(slots, 1)
    answers = GreedyAnswers(plan, params, tokenizer, make_mesh(MeshConfig(1, 1, 1)), LIMIT)
    (said,) = answers(prompts, images)
    assert "</s>" not in said
