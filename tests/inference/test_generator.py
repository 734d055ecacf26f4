"""Answers equal a loop that recomputes everything, without cache, padding or batch, for any batch and mesh."""

import copy
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import large_params, tiny

from stf_jax.config import MeshConfig, UserError
from stf_jax.data.conversation import CHATS, TEMPLATES, encode, stop_tokens, template_items
from stf_jax.data.image import to_square
from stf_jax.data.records import BadRow, Record, Turn
from stf_jax.data.tokenizer import load_tokenizer, untrained_tokens
from stf_jax.inference import decoding, generator
from stf_jax.inference.decoding import Sampling, TokenRules
from stf_jax.inference.generator import Generator
from stf_jax.models import spec
from stf_jax.models.blueprint import blueprint
from stf_jax.models.decoders.base import RopeScaling
from stf_jax.models.spec import resolve_model, vision_preset
from stf_jax.parallel.mesh import make_mesh

TINY = spec.LLM["llama-tiny"]
FAMILIES = {
    "llama": dataclasses.replace(TINY, tied=False),
    "llama, multi-head": dataclasses.replace(TINY, kv_heads=4),
    "llama-3": dataclasses.replace(TINY, rope_scaling=RopeScaling("llama3", 8.0, original_length=64)),
    "mistral": dataclasses.replace(TINY, rope_theta=1e6),
    "qwen2": dataclasses.replace(TINY, qkv_bias=True),
    "qwen3": dataclasses.replace(TINY, qk_norm=True),
}
LIMIT = 12


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("miniature")


def records(count, seed=1):
    """Conversations of unequal length with zero, one or two images."""
    rng, result = np.random.default_rng(seed), []
    for i in range(count):
        image_count = (1, 2, 0, 1)[i % 4]
        images = [PIL.Image.fromarray(rng.integers(0, 256, (50, 64, 3), np.uint8)) for _ in range(image_count)]
        words = " ".join(rng.choice(["red", "circle", "What", "is", "7", "left"], 1 + 5 * i))
        turns = (Turn("human", "<image>\n" * image_count + words), Turn("gpt", "blue"), Turn("human", f"And {i}?"))
        result.append(Record(str(i), tuple(p.copy for p in images), turns[2 * (i % 2) :] if not image_count else turns))
    return result


def model(family, precision="float32", seed=0):
    """A model of that family whose answers depend on the prompt."""
    config = spec.resolve_model(tiny(**{"model.precision": precision}).model)
    config = dataclasses.replace(config, llm=family, llm_shape=FAMILIES[family])
    plan = blueprint(config)
    return config, plan, large_params(plan.shapes, seed)


def make_generator(family, mesh, tokenizer, template="v1"):
    config, plan, values = model(family)
    mesh = make_mesh(mesh)
    places = plan.shardings(mesh)
    params = ((path, jax.device_put(x, places[path])) for path, x in values.items())
    return Generator(config, tokenizer, mesh, template, "pad").load_params(params)


def recompute(family, questions, tokenizer, limit, template="v1"):
    """Answers to the records one by one, each token from reading the complete text before it again."""
    config, plan, values = model(family)
    full_model = plan.merge({path: jnp.asarray(x) for path, x in values.items()})
    vision = vision_preset(config.vision)
    prompts = [encode(template_items(template, record), tokenizer, resolve_model(config).slots) for record in questions]
    # One padded length for all compiles one program; causal attention ignores the padding.
    length = max(len(prompt.tokens) for prompt in prompts) + limit
    read = jax.jit(lambda tokens, slots, images: full_model(tokens, jnp.arange(length)[None], None, slots, images))
    texts = []
    for record, prompt in zip(questions, prompts, strict=True):
        images = np.zeros((1, 2, vision.image_size, vision.image_size, 3), np.uint8)
        for i, image in enumerate(record.images):
            images[0, i] = to_square(image(), vision, "pad")
        count = len(prompt.tokens)
        tokens, slots = np.zeros((1, length), np.int32), np.full((1, length), -1, np.int32)
        tokens[0, :count] = prompt.tokens
        slots[0, :count] = np.where(prompt.is_image, np.cumsum(prompt.is_image) - 1, -1)
        end = count
        while end < count + limit:
            choice = int(read(tokens, slots, images)[0, end - 1, : len(tokenizer)].argmax())
            if choice in stop_tokens(template, tokenizer):
                break
            tokens[0, end] = choice
            end += 1
        texts.append(tokenizer.decode(tokens[0, count:end], skip_special_tokens=True).strip())
    return texts


@pytest.mark.parametrize(
    ("family", "mesh", "rows"),
    [
        ("llama", MeshConfig(1, 1, 1), 5),
        ("llama, multi-head", MeshConfig(2, 2, 2), 2),
        ("llama-3", MeshConfig(8, 1, 1), 5),
        ("mistral", MeshConfig(1, 4, 2), 3),
        ("qwen2", MeshConfig(2, 1, 2), 5),
        ("qwen3", MeshConfig(1, 1, 1), 1),
    ],
)
def test_answers_equal_recomputation(family, mesh, rows, tokenizer):
    questions = records(5)
    texts = list(make_generator(family, mesh, tokenizer).generate(questions, LIMIT, rows))
    assert texts == recompute(family, questions, tokenizer, LIMIT)
    assert len(set(texts)) == len(texts)  # images and prompts matter


def test_cache_and_weights_are_sharded(tokenizer):
    answers = make_generator("llama", MeshConfig(2, 2, 2), tokenizer)
    (batch,) = [answers._prepare_batch(pool, records(4), 4) for pool in [_ImmediatePool()]]
    with generator.compute_context(answers._mesh, "float32"):
        state = answers._prefill(8, answers._weights, *answers._make_arrays(*batch), Sampling())
        state = answers._extend(answers._weights, state, 8, Sampling())
    for keys, values in state.cache:
        for x in (keys, values):
            assert x.sharding.shard_shape(x.shape) == (1, 1, x.shape[2], 8)
    up = answers._weights["llm/blocks/mlp/up/kernel"]
    assert len(up) == 2
    assert up[0].sharding.shard_shape((32, 64)) == (16, 32)


class _ImmediatePool:
    """A pool that runs each call at once."""

    def submit(self, call, *args):
        result = call(*args)
        return type("Done", (), {"result": lambda self: result})()


@pytest.mark.usefixtures("optimized")
def test_decode_step_does_not_stack_layers(tokenizer):
    """With split_layers, no step copies weights together or apart."""
    answers = make_generator("llama", MeshConfig(1, 1, 1), tokenizer)
    batch = answers._prepare_batch(_ImmediatePool(), records(2), 2)
    with generator.compute_context(answers._mesh, "float32"):
        state = answers._prefill(8, answers._weights, *answers._make_arrays(*batch), Sampling())
        text = answers._extend.lower(answers._weights, state, 8, Sampling()).compile().as_text()
    stacked = [r"f32\[2,32,64\]", r"f32\[2,64,32\]", r"f32\[2,32,4,8\]"]
    assert not any(re.search(shape, text) for shape in stacked)
    assert re.search(r"f32\[32,64\]", text)


def test_bfloat16_model_has_a_bfloat16_cache(tokenizer):
    config, _plan, values = model("llama", "bfloat16")
    answers = Generator(config, tokenizer, make_mesh(MeshConfig(1, 1, 1)), "v1", "pad")
    answers.load_params((path, jnp.asarray(x)) for path, x in values.items())
    batch = answers._prepare_batch(_ImmediatePool(), records(2), 2)
    state = answers._prefill(8, answers._weights, *answers._make_arrays(*batch), Sampling())
    assert {x.dtype for pair in state.cache for x in pair} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(answers._weights)} == {jnp.dtype(jnp.bfloat16)}
    assert all(list(answers.generate(records(2), 6, rows=2)))


def test_fingerprint_depends_on_weights_but_not_on_the_mesh(tokenizer):
    def fingerprint(mesh, change=lambda values: None):
        config, plan, values = model("llama")
        change(values)
        answers = Generator(config, tokenizer, make_mesh(mesh), "v1", "pad")
        places = plan.shardings(answers._mesh)
        answers.load_params((p, jax.device_put(x, places[p])) for p, x in values.items())
        return answers.protocol(records(1)[0])["weights"]

    def swap(values):
        up = values["llm/blocks/mlp/up/kernel"]
        up[0, 0, [0, 1]] = up[0, 0, [1, 0]]

    def nudge(values):
        values["fusion/connector/stf/out/bias"] = np.nextafter(
            values["fusion/connector/stf/out/bias"], 9, dtype=np.float32
        )

    one = fingerprint(MeshConfig(1, 1, 1))
    assert fingerprint(MeshConfig(2, 2, 2)) == one
    assert len({one, fingerprint(MeshConfig(1, 1, 1), swap), fingerprint(MeshConfig(1, 1, 1), nudge)}) == 3


def test_capacity_grows_for_long_answers(tokenizer, monkeypatch):
    answers = make_generator("llama", MeshConfig(1, 1, 1), tokenizer)
    questions = records(3)
    texts = list(answers.generate(questions, 21, rows=3))
    monkeypatch.setattr(generator, "INITIAL_MAX_NEW_TOKENS", 4)
    assert list(answers.generate(questions, 21, rows=3)) == texts
    assert min(len(tokenizer(text).input_ids) for text in texts) > 8  # the capacity did grow


def test_prompt_lengths_share_programs(tokenizer):
    answers = make_generator("llama", MeshConfig(1, 1, 1), tokenizer)
    for words in (1, 5, 9, 12):
        record = Record("r", (), (Turn("human", "is " * words),))
        list(answers.generate([record], 3, rows=1))
    assert answers._prefill._cache_size() == 1
    assert answers._extend._cache_size() <= 1
    lengths = np.arange(1, 5000)
    buckets = np.array([generator.bucket_length(int(n)) for n in lengths])
    assert (buckets >= lengths).all()
    assert len(set(buckets.tolist())) < 45
    assert (buckets[512:] <= 1.126 * lengths[512:]).all()


def test_streamed_pieces_add_up_to_the_answers(tokenizer):
    answers, pieces = make_generator("qwen3", MeshConfig(1, 1, 1), tokenizer), {}
    questions = records(3)
    texts = list(
        answers.generate(questions, LIMIT, 3, on_text=lambda row, piece: pieces.setdefault(row, []).append(piece))
    )
    assert texts == list(answers.generate(questions, LIMIT, rows=3))
    assert ["".join(pieces[row]) for row in range(3)] == texts
    assert max(len(one) for one in pieces.values()) > 4  # text is streamed in pieces


@pytest.mark.parametrize("template", ["v1", "plain", "mistral", "chatml", "llama-3"])
def test_answers_end_at_stop_tokens(template, tokenizer):
    tokenizer = load_tokenizer("miniature")
    names = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    own = {"chatml": "<|im_end|>", "llama-3": "<|eot_id|>", "plain": "\u010a"}.get(template, "</s>")  # Ċ: a newline
    assert stop_tokens(template, tokenizer) == tuple(
        dict.fromkeys(tokenizer.convert_tokens_to_ids(x) for x in (own, "</s>"))
    )
    a, b, c, other = (tokenizer.convert_tokens_to_ids(x) for x in ("a", "b", "c", "<|im_start|>"))
    answers = Generator.__new__(Generator)
    answers._tokenizer, answers._stops = tokenizer, np.array(stop_tokens(template, tokenizer))
    stop = tokenizer.convert_tokens_to_ids(own)
    assert answers.decode_text(np.array([a, b, stop, c])) == tokenizer.decode([a, b])
    assert answers.decode_text(np.array([a, other, b, c])) == tokenizer.decode([a, b, c])
    # The end of sequence stops every template.
    assert answers.decode_text(np.array([a, 2, b, c])) == tokenizer.decode([a])
    assert answers.decode_text(np.array([stop, a, b, c])) == ""
    assert template == "plain" or template in CHATS


@pytest.fixture(scope="module", params=["miniature", "llama"])
def any_tokenizer(request):
    """A tokenizer with the control tokens of every template."""
    tokenizer = copy.deepcopy(
        request.getfixturevalue("llama") if request.param == "llama" else load_tokenizer("miniature")
    )
    names = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    return tokenizer


@given(words=st.lists(st.one_of(st.text(max_size=8), st.sampled_from(["</s>", "a.", "\n", "  ", "USER:"])), min_size=1))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("template", TEMPLATES)
def test_trained_end_of_an_answer_is_its_only_stop(template, any_tokenizer, words):
    answer = "".join(words).replace("\u2581", "").replace("<image>", "").strip()
    if template == "plain":  # plain ends with a newline
        answer = answer.replace("\n", " ").strip()
    turns = (Turn("human", "<image>\nWhat?"), Turn("gpt", answer))
    full, prompt = (
        encode(template_items(template, Record("r", (None,), turns[:count])), any_tokenizer, 3) for count in (2, 1)
    )
    tokens, is_target = (x[len(prompt.tokens) :] for x in (full.tokens, full.is_target))
    stops = stop_tokens(template, any_tokenizer)
    target_tokens = tokens[is_target]
    # Only the last token is a stop.
    assert np.flatnonzero(np.isin(target_tokens, stops)).tolist() == [len(target_tokens) - 1]
    answers = Generator.__new__(Generator)
    answers._tokenizer, answers._stops = any_tokenizer, np.array(stops)
    assert answers.decode_text(np.concatenate([tokens, [5, 6, 7]])) == answer


def test_untrained_tokens_are_never_sampled(tokenizer):
    rules = TokenRules((2,), (0, 3))
    logits = jnp.array([[9.0, 1.0, 2.0, 8.0], [0.0, 5.0, 1.0, 7.0]])
    assert decoding.sample_token(rules, logits, Sampling(), jnp.int32(0)).tolist() == [2, 1]
    draw = jax.jit(lambda step: decoding.sample_token(rules, jnp.tile(logits[:1], (50, 1)), Sampling(2.0), step))
    assert set(draw(jnp.int32(1)).tolist()) == {1, 2}
    assert untrained_tokens(tokenizer, len(tokenizer)) == ()
    assert untrained_tokens(tokenizer, len(tokenizer) + 2) == (len(tokenizer), len(tokenizer) + 1)
    marked = load_tokenizer("miniature")
    marked.add_tokens("<image>")
    assert untrained_tokens(marked, len(marked) + 1) == (len(tokenizer), len(marked))


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(0.7, 1.0, 0), (1.3, 0.8, 0), (1.0, 1.0, 5), (0.9, 0.6, 8)]
)
def test_sampling_distribution_equals_transformers(temperature, top_p, top_k):
    import torch
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = np.random.default_rng(0).normal(0, 2, 40).astype(np.float32)
    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    probabilities = LogitsProcessorList(warpers)(None, torch.tensor(logits)[None]).softmax(-1)[0].numpy()
    rows, rounds = 4000, 5
    draw = jax.jit(lambda step: decoding.sample_token(
        TokenRules((2,), ()), jnp.tile(logits, (rows, 1)), Sampling(temperature, top_p, top_k, 3), step
    ))  # fmt: skip
    counts = sum(np.bincount(np.asarray(draw(jnp.int32(i))), minlength=40) for i in range(rounds))
    assert (counts[probabilities == 0] == 0).all()
    deviation = np.sqrt(probabilities * (1 - probabilities) / (rows * rounds))
    assert (abs(counts / (rows * rounds) - probabilities) <= 5 * deviation + 1e-9).all()


def test_sampling_depends_only_on_seed_step_and_row(tokenizer):
    answers = make_generator("llama", MeshConfig(1, 1, 1), tokenizer)
    record = records(1)[0]
    texts = [list(answers.generate([record] * 3, LIMIT, 3, Sampling(1.0, seed=seed))) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) == 3


def test_bad_images_and_tokenizers_are_rejected(tokenizer):
    answers = make_generator("llama", MeshConfig(1, 1, 1), tokenizer)

    def missing():
        raise BadRow("missing", "Image a.jpg cannot be opened.", "a.jpg")

    bad = dataclasses.replace(records(1)[0], images=(missing,))
    with pytest.raises(UserError, match=r"a\.jpg"):
        list(answers.generate([bad], 3, rows=1))
    config, *_ = model("llama")
    text_config = dataclasses.replace(config, vision_shape=None)
    text_only = Generator(text_config, tokenizer, make_mesh(MeshConfig(1, 1, 1)), "v1", "pad")
    with pytest.raises(UserError, match="This image has no tokens: the model has no vision tower"):
        text_only.image_tokens(PIL.Image.new("RGB", (8, 8)))
    config = dataclasses.replace(config, llm_shape=dataclasses.replace(TINY, vocab=100))
    with pytest.raises(UserError, match="501 tokens exceed the 100"):
        Generator(config, tokenizer, make_mesh(MeshConfig(1, 1, 1)), "v1", "pad")
