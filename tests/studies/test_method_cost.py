"""The timed part of a method is what the model computes between tower and decoder, and where the decoder drops."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from etils import epath

from stf_jax.bench import main
from stf_jax.checkpointing.params import write_params
from stf_jax.cli import run_command
from stf_jax.comparisons.runs import read_cost
from stf_jax.config import FusionConfig, ModelConfig
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.models.blueprint import blueprint
from stf_jax.models.decoders import transformer
from stf_jax.models.reducers.base import Question
from stf_jax.models.spec import llm_preset, resolve_model, vision_preset
from stf_jax.studies.method_cost import run_method
from stf_jax.weights.model import Description

ROWS = 2


def make(fusion, reduce="", keep=0, images=1):
    """A tiny model with a batch of prompts: its plan, its weights and the arguments of a prefill.

    ``images``: of each row; only the first is in the prompt.
    """
    config = ModelConfig("clip-tiny", "llama-tiny", FusionConfig(fusion), "float32", reduce=reduce, keep=keep)
    plan, spec, rng = blueprint(config), resolve_model(config), np.random.default_rng(0)
    weights = {path: jnp.asarray(x) for path, x in tiny.large_params(plan.shapes).items()}
    length, side = spec.slots + 5, spec.vision_shape.image_size
    tokens = rng.integers(3, 60, (ROWS, length))
    slots = np.broadcast_to(np.where(np.arange(length) < spec.slots, np.arange(length), -1), tokens.shape)
    images = rng.integers(0, 256, (ROWS, images, side, side, 3), np.uint8)
    prompt = jnp.asarray(tokens), jnp.asarray(slots), jnp.full(ROWS, length), jnp.asarray(images)
    return plan, spec, weights, prompt


def hidden(spec, length):
    """Hidden states, queries and keys of a decoder layer, for methods that do not read them."""
    llm = spec.llm_shape
    shapes = (llm.width,), (llm.heads, llm.head_dim), (llm.kv_heads, llm.head_dim)
    return tuple(jnp.ones((ROWS, length, *shape)) for shape in shapes)


@pytest.mark.parametrize(
    ("fusion", "reduce", "count"),
    [("mbtf_stf", "", 3), ("mlp", "visionzip", 1), ("mlp", "random:per=question", 2), ("mlp", "divprune", 1)],
)
def test_image_tokens_are_those_of_the_model(fusion, reduce, count):
    """Also of several images in a row, such as tiles."""
    plan, spec, weights, prompt = make(fusion, reduce, images=count)
    model, (tokens, slots, _, images) = plan.merge(weights), prompt
    squares = images.reshape(-1, *images.shape[2:])
    states = model.vision.states(squares, tuple(range(spec.vision_shape.layers + 1)), jnp.float32)
    (seen,), found = run_method(plan, weights, *prompt, states, *hidden(spec, tokens.shape[1]))
    expected = model.image_tokens(images, Question(tokens, slots < 0))
    # The model runs several blocks in a loop, which rounds otherwise: by 3e-7 of the largest value at most.
    found = found.reshape(expected.shape)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    np.testing.assert_array_equal(seen, squares)


def test_the_timed_part_of_resizing_is_the_smaller_image():
    plan, spec, weights, prompt = make("mlp", "resize", 4)
    vision = spec.vision_shape
    states = (jnp.ones((ROWS, vision.grid**2 + vision.class_token, vision.width)),) * (vision.layers + 1)
    (seen,), found = run_method(plan, weights, *prompt, states, *hidden(spec, prompt[0].shape[1]))
    assert seen.shape == (ROWS, 2 * vision.patch_size, 2 * vision.patch_size, 3)
    assert found.shape == (ROWS, 4, spec.llm_shape.width)


@pytest.mark.parametrize("reduce", ["dart:after=1", "pyramiddrop:after=1"])
def test_a_drop_in_the_decoder_keeps_what_the_model_keeps(reduce, monkeypatch):
    plan, spec, weights, prompt = make("mlp", reduce, 5)
    apply, calls = transformer.Selection.apply, []

    def record(selection, q, k, rows):
        after = apply(selection, q, k, rows)
        calls.append((rows.x, q, k, (after.x, after.positions)))
        return after

    monkeypatch.setattr(transformer.Selection, "apply", record)
    plan.merge(weights).prefill(*prompt)
    ((x, q, k, expected),) = calls
    if spec.reduction.reducer.scored_by == "next":  # computed again
        q, k = hidden(spec, prompt[0].shape[1])[1:]
    vision = spec.vision_shape
    states = (jnp.ones((ROWS, vision.grid**2 + vision.class_token, vision.width)),) * (vision.layers + 1)
    *_, found = run_method(plan, weights, *prompt, states, x, q, k)
    assert found[0].shape[1] == 5 + 5
    jax.tree.map(np.testing.assert_array_equal, found, expected)


# ---- The command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    """Results of a model with all tokens and with fewer, as evaluate leaves them."""
    config = ModelConfig("clip-tiny", "llama-tiny", FusionConfig("mlp"))
    shapes = blueprint(config).shapes
    (tmp_path / "model").mkdir()
    write_params(tmp_path / "model", tiny.random_params(shapes).items())
    Description(vision_preset("clip-tiny"), llm_preset("llama-tiny"), config.fusion).save(tmp_path / "model")
    load_tokenizer("miniature").save_pretrained(tmp_path / "model" / "tokenizer")
    asking = {"model": {"checkpoint": str(tmp_path / "model"), "step": None}, "precision": "float32"}
    changes = {"mlp": {}, "fastv": {"reduce": "fastv:after=1", "keep": 4}}
    for name, reduction in changes.items():
        (tmp_path / name).mkdir()
        results = {"benchmark": "pope", "metrics": {}, "protocol": {"asking": asking | reduction}}
        (tmp_path / name / "results.json").write_text(json.dumps([results] if name == "mlp" else results))
    return tmp_path


def test_methods_are_measured_in_turn_and_compared(folders, monkeypatch):
    (folders / "mlp" / "cost.json").write_text(json.dumps({"step_mib": 7.5, "method_ms": -0.0}))
    arguments = ["methods", str(folders / "mlp"), str(folders / "fastv"), "--rounds=2", "--rows=2", "--text=6"]
    assert run_command(main, [*arguments, f"--json={folders / 'rows.json'}"]) == 0
    mlp, fastv = (read_cost(epath.Path(folders / name / "cost.json")) for name in ("mlp", "fastv"))
    tokens = resolve_model(ModelConfig("clip-tiny", "llama-tiny", FusionConfig("mlp"))).slots
    assert (mlp["image_tokens"], fastv["image_tokens"]) == (tokens, (tokens + 4) / 2)  # one of two layers reads all
    for cost in (mlp, fastv):
        assert cost["method_ms"] > 0
        assert cost["first_token_ms"] > 0
        assert (cost["first_token_rows"], cost["device"]) == (2, "cpu")
    # The decoder's weights, in float32, are the least that answering needs.
    shapes = blueprint(ModelConfig("clip-tiny", "llama-tiny", FusionConfig("mlp"))).shapes
    assert mlp["prefill_mib"] > 4 * sum(x.size for path, x in shapes.items() if path.startswith("llm/")) / 2**20
    assert fastv["prefill_gflops"] < mlp["prefill_gflops"]
    assert (mlp["step_mib"], "step_mib" in fastv) == (7.5, False)
    rows = json.loads((folders / "rows.json").read_text())
    assert [row["what"] for row in rows] == ["cpu", str(folders / "mlp"), str(folders / "fastv")]
    assert rows[2]["method_ms"] == fastv["method_ms"]


def test_what_cannot_be_measured_ends_before_anything_is_written(folders, capsys):
    arguments = ["methods", str(folders / "mlp"), str(folders / "fastv")]
    for name, content, sentence in (
        ("cost.json", "[]", "is not a JSON object of costs"),
        ("results.json", json.dumps({"protocol": {"answers": {}}}), "does not say which model answered"),
    ):
        (folders / "fastv" / name).write_text(content)
        assert run_command(main, arguments) == 2
        assert sentence in capsys.readouterr().err
    (folders / "model").rename(folders / "moved")
    assert run_command(main, arguments) == 2
    assert f"{folders / 'model'} is neither the workdir of a run" in capsys.readouterr().err
    assert not (folders / "mlp" / "cost.json").exists()
