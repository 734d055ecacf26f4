"""Greedy answers equal a naive loop over unpadded prompts, whatever the batch and the mesh."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny

from stf_jax.config import MeshConfig
from stf_jax.data.conversation import Encoded, stop_token
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
    said = list(GreedyAnswers(plan, on_mesh, tokenizer, mesh, LIMIT, "v1")(prompts, images))
    expected = [_naive(plan, params, p, i, tokenizer) for p, i in zip(prompts, images, strict=True)]
    assert said == expected
    assert len(set(said)) > 1  # the pictures and prompts matter, or the comparison says little


def says(monkeypatch, tokenizer, template, tokens):
    """What is made of new tokens in that template."""
    row = np.array([tokens], np.int32)
    monkeypatch.setattr("stf_jax.inference.greedy._generate", lambda *_: row)
    monkeypatch.setattr("jax.jit", lambda call: call)
    mesh = make_mesh(MeshConfig(1, 1, 1))
    answers = GreedyAnswers(types.SimpleNamespace(precision="float32"), {}, tokenizer, mesh, LIMIT, template)
    prompt = Encoded(np.array([1], np.int32), np.zeros(1, bool), np.zeros(1, bool))
    return list(answers([prompt], [np.zeros((0, 2, 2, 3), np.uint8)]))


def test_stops_where_an_answer_ends_in_the_template(monkeypatch):
    tokenizer = load_tokenizer("miniature")
    names = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    a, b, c = (tokenizer.convert_tokens_to_ids(letter) for letter in "abc")
    for template, stop in (
        ("v1", "</s>"),
        ("plain", "</s>"),
        ("mistral", "</s>"),
        ("chatml", "<|im_end|>"),
        ("llama-3", "<|eot_id|>"),
    ):
        stop, other = (tokenizer.convert_tokens_to_ids(x) for x in (stop, "</s>" if stop != "</s>" else "<|im_end|>"))
        assert stop_token(template, tokenizer) == stop
        assert says(monkeypatch, tokenizer, template, [a, b, stop, c]) == [tokenizer.decode([a, b])]
        assert says(monkeypatch, tokenizer, template, [a, other, stop, c]) == [tokenizer.decode([a])]
        assert says(monkeypatch, tokenizer, template, [a, other, b, c]) == [tokenizer.decode([a, b, c])]
        assert says(monkeypatch, tokenizer, template, [stop, a, b, c]) == [""]
