"""Answers with fewer image tokens: FastV equals a full decoder that hides dropped tokens; both also on meshes."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from make_evals import make_model
from tiny import large_params, tiny

from stf_jax import chat, evaluate, main
from stf_jax.cli import run_command
from stf_jax.config import MeshConfig
from stf_jax.data.records import Record, Turn
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.inference import decoding
from stf_jax.inference.decoding import Sampling
from stf_jax.inference.generator import Generator
from stf_jax.models import spec
from stf_jax.models.blueprint import blueprint
from stf_jax.models.reducers.base import REDUCERS, find_reducer
from stf_jax.parallel.mesh import compute_context, make_mesh

ROOT = pathlib.Path(__file__).parents[2]
NAMES = ", ".join(REDUCERS.known)
LLM = spec.LLM["llama-deep-tiny"]
FULL_LAYERS = find_reducer("fastv").after_layers
N, KEEP, IMAGES = 16, 4, 2  # a 4×4 grid
DROPPED, NEW_TOKENS = N - KEEP, 7


@pytest.fixture(autouse=True)
def plugins(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests" / "plugins")


def changes(reduce="", keep=0, fusion="mlp"):
    """Changes of the tiny config."""
    changed = {"llm": "llama-deep-tiny", "fusion.fusion": fusion, "reduce": reduce, "keep": keep}
    return {f"model.{key}": value for key, value in changed.items()}


# ---- FastV, a second implementation ----------------------------------------------------------------------------------


class Reference:
    """The decoder in float64, one full-length row at a time, with dropped tokens masked in later layers."""

    def __init__(self, values):
        self.p = {path.removeprefix("llm/"): np.float64(x) for path, x in values.items() if path.startswith("llm/")}

    def norm(self, x, name, *layer):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + LLM.norm_eps) * self.p[f"{name}/scale"][layer]

    def rotate(self, x):
        half = LLM.head_dim // 2
        angles = np.arange(len(x))[:, None] * LLM.rope_theta ** (-np.arange(half) / half)
        c, s, a, b = np.cos(angles)[:, None], np.sin(angles)[:, None], x[..., :half], x[..., half:]
        return np.concatenate([a * c - b * s, b * c + a * s], -1)

    def read(self, x, image, prompt, keep):
        """Logits [T, V], and for each layer its cached positions and their keys [·, K, Dh]."""
        length, group = len(x), LLM.heads // LLM.kv_heads
        is_cached, layers = np.ones(length, bool), []
        for i in range(LLM.layers):
            p = {name: self.p[f"blocks/{name}"][i] for name in (
                *(f"attention/{h}/{w}" for h in ("query", "key", "value") for w in ("kernel", "bias")),
                "attention/out/kernel", "mlp/gate/kernel", "mlp/up/kernel", "mlp/down/kernel",
            )}  # fmt: skip
            y = self.norm(x, "blocks/attention_norm", i)
            q, k, v = (
                np.einsum("td,dhe->the", y, p[f"attention/{h}/kernel"]) + p[f"attention/{h}/bias"]
                for h in ("query", "key", "value")
            )
            q, k = self.rotate(q), self.rotate(k)
            layers.append((np.flatnonzero(is_cached), k[is_cached]))
            scores = np.einsum("the,she->hts", q, k.repeat(group, 1)) / np.sqrt(LLM.head_dim)
            scores[:, ~(np.tri(length, dtype=bool) & is_cached)] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            x = x + np.einsum(
                "the,hed->td", np.einsum("hts,she->the", weights, v.repeat(group, 1)), p["attention/out/kernel"]
            )
            y = self.norm(x, "blocks/mlp_norm", i)
            gate = y @ p["mlp/gate/kernel"]
            x = x + (gate / (1 + np.exp(-gate)) * (y @ p["mlp/up/kernel"])) @ p["mlp/down/kernel"]
            if i == FULL_LAYERS - 1 and image.any():
                scores = np.where(image, weights[:, prompt - 1].mean(0), -1)
                order = np.argsort(-scores)
                gap = scores[order[keep - 1]] - scores[order[keep]]
                assert gap > 1e-5 * scores.max(), "scores too close: rounding decides"
                is_cached[order[keep : image.sum()]] = False
        return self.norm(x, "norm") @ self.p["embedding"].T, layers


@functools.cache
def prompts():
    """Four rows of up to maximum length: text only, one image, two images; and a short one."""
    rng, length = np.random.default_rng(5), 72
    layouts = [  # text before each image and at the end
        (length - IMAGES * DROPPED,),
        (9, length - DROPPED - N - 9),
        (3, 20, length - 2 * N - 23),
        (5, 2),
    ]
    tokens, slots = np.zeros((4, length), np.int32), np.full((4, length), -1, np.int32)
    lengths = np.zeros(4, np.int32)
    for row, texts in enumerate(layouts):
        marks = np.concatenate([[-1] * texts[0], *([*range(i * N, i * N + N)] + [-1] * t
                                                   for i, t in enumerate(texts[1:]))])  # fmt: skip
        lengths[row] = len(marks)
        slots[row, : len(marks)] = marks
        tokens[row, : len(marks)] = rng.integers(3, 500, len(marks))
    assert lengths.tolist() == [48, 60, 72, 23]
    return tokens, slots, lengths, rng.integers(0, 256, (4, IMAGES, 64, 64, 3), np.uint8)


@functools.cache
def make_params(reduce, keep):
    plan = blueprint(tiny(**changes(reduce, keep)).model)
    return plan, large_params(plan.shapes, 3)


def final_state(reduce, keep, mesh, capacity=NEW_TOKENS):
    """The state after ``capacity`` tokens, with one extension of the capacity."""
    plan, values = make_params(reduce, keep)
    mesh = make_mesh(mesh)
    shardings = plan.shardings(mesh)
    weights = {
        path: decoding.split_layers(path, jnp.asarray(x), jnp.float32, mesh, shardings[path].spec)[0]
        for path, x in values.items()
    }
    prefill, extend, extend_capacity = decoding.make_programs(decoding.TokenRules((2,), (2,)), plan, mesh)
    with compute_context(mesh, "float32"):
        state = prefill(min(capacity, 3), weights, *prompts(), Sampling())
        if capacity > 3:
            state = extend(
                weights, extend_capacity(capacity, extend(weights, state, 3, Sampling())), capacity, Sampling()
            )
        return jax.tree.map(np.asarray, state)


@functools.cache
def expected():
    """For each row its token ids, and then the positions and keys of each layer."""
    plan, values = make_params("fastv", KEEP)
    model = plan.merge({path: jnp.asarray(x) for path, x in values.items()})
    tokens, slots, lengths, images = prompts()
    embed = jax.jit(lambda tokens, slots, images: model.embed(tokens, slots, model.image_tokens(images)))
    x = np.float64(embed(tokens, slots, images))
    reference, table, found = Reference(values), np.float64(values["llm/embedding"]), []
    for row, length in enumerate(lengths):
        image, token_ids = slots[row, :length] >= 0, []
        for _ in range(NEW_TOKENS):
            inputs = np.concatenate([x[row, :length], table[token_ids].reshape(-1, LLM.width)])
            is_image = np.concatenate([image, np.zeros(len(token_ids), bool)])
            logits, layers = reference.read(inputs, is_image, length, image.sum() // N * KEEP)
            logits[-1, 2] = -np.inf
            best = np.sort(logits[-1])[-2:]
            assert best[1] - best[0] > 1e-3, "logits too close: rounding decides"
            token_ids.append(int(logits[-1].argmax()))
        found.append((token_ids, layers))
    return found


@pytest.mark.parametrize("mesh", [MeshConfig(1, 1, 1), MeshConfig(2, 2, 2)], ids=str)
def test_dropped_tokens_equal_tokens_hidden_from_later_layers(mesh):
    state, (*_, lengths, _) = final_state("fastv", KEEP, mesh), prompts()
    assert [keys.shape[2] - NEW_TOKENS for keys, _ in state.cache] == [72, 72, 48, 48]
    last_lengths = lengths - state.image_counts * DROPPED
    assert last_lengths.tolist() == [48, 48, 48, 11]
    for row, (token_ids, layers) in enumerate(expected()):
        assert state.output_ids[row].tolist() == token_ids
        for layer, (cached_positions, keys) in enumerate(layers):
            prompt = lengths[row] if layer < FULL_LAYERS else last_lengths[row]
            ours = state.cache[layer][0][row]
            ours = np.concatenate([ours[:, :prompt], ours[:, -NEW_TOKENS:-1]], 1).swapaxes(0, 1)
            assert len(cached_positions) == prompt + NEW_TOKENS - 1
            np.testing.assert_allclose(ours, keys, atol=2e-5 * np.abs(keys).max())
    assert len({tuple(token_ids) for token_ids, _ in expected()}) == 4


def test_dropping_matters_and_keeping_all_does_not():
    unreduced, all_kept, reduced = (
        final_state(*reduction, MeshConfig(1, 1, 1), capacity=1)
        for reduction in (("", 0), ("fastv", N), ("fastv", KEEP))
    )
    jax.tree.map(np.testing.assert_array_equal, unreduced, all_kept)
    rows = np.arange(4)
    # The end of each prompt.
    lengths = prompts()[2]
    ends = lengths, lengths - reduced.image_counts * DROPPED
    last = [state.cache[-1][0][rows, :, end - 1] for state, end in zip((unreduced, reduced), ends, strict=True)]
    difference = np.abs(last[0] - last[1]).max((1, 2)) / np.abs(last[0]).max()
    assert difference[0] < 1e-5  # no image in this row
    assert (difference[1:] > 1e-3).all()


# ---- All reductions, as a user runs them -----------------------------------------------------------------------------


def records():
    rng = np.random.default_rng(1)
    for i, image_count in enumerate((1, 2, 0, 1, 2)):
        images = [PIL.Image.fromarray(rng.integers(0, 256, (50, 64, 3), np.uint8)) for _ in range(image_count)]
        text = "<image>\n" * image_count + "What is left? " * (1 + i if image_count else 20)
        yield Record(str(i), tuple(p.copy for p in images), (Turn("human", text),))


def generator(mesh, reduce="", keep=0):
    config = tiny(**changes(reduce, keep)).model
    plan, mesh = blueprint(config), make_mesh(mesh)
    places = plan.shardings(mesh)
    params = ((path, jax.device_put(x, places[path])) for path, x in large_params(plan.shapes, 1).items())
    return Generator(config, load_tokenizer("miniature"), mesh, "v1", "pad").load_params(params)


@pytest.fixture(scope="module")
def unreduced():
    return list(generator(MeshConfig(1, 1, 1)).generate(list(records()), 8, rows=5))


@pytest.mark.parametrize(
    ("reduce", "keep", "slots"),
    [
        ("fastv", 4, N),
        ("pyramiddrop", 4, N),
        pytest.param("random", 5, 5, marks=pytest.mark.slow),
        pytest.param("thinning:SHORT_KEYS", 4, N, marks=pytest.mark.slow),
        pytest.param("random:per=question", 5, 5, marks=pytest.mark.slow),
        pytest.param("visionzip", 5, 5, marks=pytest.mark.slow),
        pytest.param("fastv:after=1,count=average", 8, N, marks=pytest.mark.slow),
        pytest.param("dart", 9, N, marks=pytest.mark.slow),
        pytest.param("divprune", 5, 5, marks=pytest.mark.slow),
        pytest.param("pool", 4, 4, marks=pytest.mark.slow),
        pytest.param("resize", 6, 6, marks=pytest.mark.slow),
        pytest.param("uniform", 4, 4, marks=pytest.mark.slow),
    ],
)
def test_reduced_answers_are_the_same_on_a_mesh_and_in_any_batch(reduce, keep, slots, unreduced):
    questions, single = list(records()), generator(MeshConfig(1, 1, 1), reduce=reduce, keep=keep)
    texts = list(single.generate(questions, 8, rows=5))
    assert list(generator(MeshConfig(2, 2, 2), reduce=reduce, keep=keep).generate(questions, 8, rows=5)) == texts
    assert list(single.generate(questions[3:4], 8, rows=1)) == texts[3:4]  # before, it was padded to longer rows
    same = [a == b for a, b in zip(texts, unreduced, strict=True)]
    assert same[2]  # this row has no image
    assert not all(same)
    protocol = single.protocol(questions[0])
    assert (protocol["reduce"], protocol["keep"], protocol["image_tokens"]) == (reduce, keep, slots)


def test_protocol_says_what_keep_counts():
    found = [
        (protocol["kept_after_layer"], protocol["average_image_tokens"])
        for reduce, keep in (("fastv", 4), ("fastv:after=1,count=average", 8), ("pyramiddrop", 2))
        for protocol in [generator(MeshConfig(1, 1, 1), reduce, keep).protocol(next(records()))]
    ]
    assert found == [({"2": 4}, 10), ({"1": 5}, 7.75), ({"1": 8, "2": 4, "3": 2}, 7.5)]


def test_unreduced_protocol_is_unchanged():
    """Answers from before reductions existed can be continued."""
    assert not {"reduce", "keep", "kept_after_layer"} & set(generator(MeshConfig(1, 1, 1)).protocol(next(records())))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("reduced") / "model", 1, **changes())


@pytest.mark.parametrize("reduce", ["visionzip", "thinning:SPACED"])
def test_evaluate_command_reduces(reduce, folder, tmp_path):
    out = tmp_path / "out"
    arguments = [f"--checkpoint={folder}", "--benchmark=scenes", "--limit=2", f"--out={out}", "--batch=4"]
    assert run_command(evaluate.main, [*arguments, f"--reduce={reduce}", "--keep=5"]) == 0
    asking = json.loads((out / "results.json").read_text())["protocol"]["asking"]
    assert (asking["reduce"], asking["keep"], asking["image_tokens"]) == (reduce, 5, 5)
    # The folder holds answers of another protocol.
    assert run_command(evaluate.main, [*arguments, f"--reduce={reduce}"]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--reduce=fastv", "--keep=17"], "keep=17 must be 1 to 16"),
        (
            ["--keep=4"],
            f"set reduce to one of {NAMES}",
        ),
        (
            ["--reduce=zip"],
            f"error: Unknown model.reduce 'zip'; known: {NAMES}.",
        ),
        (["--reduce=thinning:SPACE"], "error: Unknown model.reduce 'thinning:SPACE': module thinning has no SPACE."),
        (["--reduce=fastv", "--keep=-1"], "-1 is not between 0"),
        (["--reduce=fastv:K=3"], "error: model.reduce=fastv:K=3: unknown option 'K'; known: after, count."),
        (["--reduce=fastv:after=x"], "error: model.reduce=fastv:after=x: after=x must be a whole number."),
    ],
)
def test_invalid_reductions_give_one_sentence_in_both_commands(options, message, folder, tmp_path, capsys):
    measuring = ["--benchmark=scenes", f"--out={tmp_path / 'out'}"]
    for command, own in ((evaluate.main, measuring), (chat.main, ["--prompt=What is it?"])):
        assert run_command(command, [f"--checkpoint={folder}", *own, *options]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_training_with_a_reduction_is_rejected(tmp_path, capsys):
    options = [f"--config={ROOT}/tests/tiny.py:fusion=mlp", f"--workdir={tmp_path / 'run'}"]
    assert run_command(main.main, [*options, "--config.model.reduce=visionzip"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: model.reduce=visionzip is for inference only: train without it")
    assert not (tmp_path / "run" / "checkpoints").exists()
