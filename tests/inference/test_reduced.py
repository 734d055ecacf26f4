"""Answers with fewer image tokens: FastV's are those of a whole decoder that hides what was dropped; both on meshes."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from make_evals import make_model
from tiny import tiny, vivid

from stf_jax import chat, evaluate, main
from stf_jax.config import MeshConfig
from stf_jax.data.records import Record, Turn
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.inference import decoding
from stf_jax.inference.decoding import Sampling
from stf_jax.inference.generator import Generator
from stf_jax.models import presets
from stf_jax.models.selection import FULL_LAYERS
from stf_jax.runtime.cli import door
from stf_jax.runtime.mesh import computing, make_mesh
from stf_jax.training.state import blueprint

ROOT = pathlib.Path(__file__).parents[2]
presets.LLM["llama-deep-tiny"] = dataclasses.replace(presets.LLM["llama-tiny"], layers=4, qkv_bias=True)
LLM = presets.LLM["llama-deep-tiny"]
N, KEEP, PICTURES = 16, 4, 2  # a 4×4 grid
DROPPED, ROOM = N - KEEP, 7


def changes(reduce="", keep=0, fusion="mlp"):
    """Of the tiny config."""
    changed = {"llm": "llama-deep-tiny", "fusion.fusion": fusion, "reduce": reduce, "keep": keep}
    return {f"model.{key}": value for key, value in changed.items()}


# ---- FastV, written again --------------------------------------------------------------------------------------------


class Reference:
    """The decoder in float64, a row at a time and of whole length; what layers must not see is hidden from them."""

    def __init__(self, values):
        self.p = {path.removeprefix("llm/"): np.float64(x) for path, x in values.items() if path.startswith("llm/")}

    def norm(self, x, name, *layer):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + LLM.norm_eps) * self.p[f"{name}/scale"][layer]

    def turned(self, x):
        half = LLM.head_dim // 2
        angles = np.arange(len(x))[:, None] * LLM.rope_theta ** (-np.arange(half) / half)
        c, s, a, b = np.cos(angles)[:, None], np.sin(angles)[:, None], x[..., :half], x[..., half:]
        return np.concatenate([a * c - b * s, b * c + a * s], -1)

    def read(self, x, image, prompt, keep):
        """Logits [T, V], and for each layer the positions that it holds, and their keys [·, K, Dh]."""
        length, group = len(x), LLM.heads // LLM.kv_heads
        held, layers = np.ones(length, bool), []
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
            q, k = self.turned(q), self.turned(k)
            layers.append((np.flatnonzero(held), k[held]))
            scores = np.einsum("the,she->hts", q, k.repeat(group, 1)) / np.sqrt(LLM.head_dim)
            scores[:, ~(np.tri(length, dtype=bool) & held)] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            x = x + np.einsum(
                "the,hed->td", np.einsum("hts,she->the", weights, v.repeat(group, 1)), p["attention/out/kernel"]
            )
            y = self.norm(x, "blocks/mlp_norm", i)
            gate = y @ p["mlp/gate/kernel"]
            x = x + (gate / (1 + np.exp(-gate)) * (y @ p["mlp/up/kernel"])) @ p["mlp/down/kernel"]
            if i == FULL_LAYERS - 1 and image.any():
                paid = np.where(image, weights[:, prompt - 1].mean(0), -1)
                order = np.argsort(-paid)
                gap = paid[order[keep - 1]] - paid[order[keep]]
                assert gap > 1e-5 * paid.max(), "so near that rounding chooses"
                held[order[keep : image.sum()]] = False
        return self.norm(x, "norm") @ self.p["embedding"].T, layers


@functools.cache
def asked():
    """Four rows that are as long as they may be: of text alone, with one image, with two; and a short one."""
    rng, length = np.random.default_rng(5), 72
    layouts = [  # text before each image, and behind
        (length - PICTURES * DROPPED,),
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
    return tokens, slots, lengths, rng.integers(0, 256, (4, PICTURES, 64, 64, 3), np.uint8)


@functools.cache
def made(reduce, keep):
    plan = blueprint(tiny(**changes(reduce, keep)).model)
    return plan, vivid(plan.shapes, 3)


def answered(reduce, keep, mesh, room=ROOM):
    """The state when so much has been said, with growing once."""
    plan, values = made(reduce, keep)
    mesh = make_mesh(mesh)
    places = plan.shardings(mesh)
    weights = {
        path: decoding.layerwise(path, jnp.asarray(x), jnp.float32, mesh, places[path].spec)[0]
        for path, x in values.items()
    }
    prefill, extend, grow = decoding.programs(decoding.Rules((2,), (2,)), plan, mesh)
    with computing(mesh, "float32"):
        state = prefill(min(room, 3), weights, *asked(), Sampling())
        if room > 3:
            state = extend(weights, grow(room, extend(weights, state, 3, Sampling())), room, Sampling())
        return jax.tree.map(np.asarray, state)


@functools.cache
def expected():
    """Of each row what is said, and each layer's positions and keys then."""
    plan, values = made("fastv", KEEP)
    model = plan.merge({path: jnp.asarray(x) for path, x in values.items()})
    tokens, slots, lengths, images = asked()
    x = np.float64(model.embed(tokens, slots, model.image_tokens(images)))
    reference, table, found = Reference(values), np.float64(values["llm/embedding"]), []
    for row, length in enumerate(lengths):
        image, said = slots[row, :length] >= 0, []
        for _ in range(ROOM):
            read = np.concatenate([x[row, :length], table[said].reshape(-1, LLM.width)])
            marks = np.concatenate([image, np.zeros(len(said), bool)])
            logits, layers = reference.read(read, marks, length, image.sum() // N * KEEP)
            logits[-1, 2] = -np.inf
            best = np.sort(logits[-1])[-2:]
            assert best[1] - best[0] > 1e-3, "so near that rounding says which"
            said.append(int(logits[-1].argmax()))
        found.append((said, layers))
    return found


@pytest.mark.parametrize("mesh", [MeshConfig(1, 1, 1), MeshConfig(2, 2, 2)], ids=str)
def test_dropped_tokens_are_as_if_hidden_from_later_layers(mesh):
    state, (*_, lengths, _) = answered("fastv", KEEP, mesh), asked()
    assert [keys.shape[2] - ROOM for keys, _ in state.cache] == [72, 72, 48, 48]
    assert state.held.tolist() == [48, 48, 48, 11]
    for row, (said, layers) in enumerate(expected()):
        assert state.said[row].tolist() == said
        for layer, (held, keys) in enumerate(layers):
            prompt = lengths[row] if layer < FULL_LAYERS else state.held[row]
            ours = state.cache[layer][0][row]
            ours = np.concatenate([ours[:, :prompt], ours[:, -ROOM:-1]], 1).swapaxes(0, 1)
            assert len(held) == prompt + ROOM - 1
            np.testing.assert_allclose(ours, keys, atol=2e-5 * np.abs(keys).max())
    assert len({tuple(said) for said, _ in expected()}) == 4


def test_what_is_dropped_matters_and_keeping_all_changes_nothing():
    whole, all_kept, fewer = (
        answered(*how, MeshConfig(1, 1, 1), room=1) for how in (("", 0), ("fastv", N), ("fastv", KEEP))
    )
    jax.tree.map(np.testing.assert_array_equal, whole, all_kept)
    rows = np.arange(4)
    last = [state.cache[-1][0][rows, :, state.held - 1] for state in (whole, fewer)]  # of each prompt's end
    difference = np.abs(last[0] - last[1]).max((1, 2)) / np.abs(last[0]).max()
    assert difference[0] < 1e-5  # it has no image
    assert (difference[1:] > 1e-3).all()


# ---- Both, asked as a user does --------------------------------------------------------------------------------------


def records():
    rng = np.random.default_rng(1)
    for i, shown in enumerate((1, 2, 0, 1, 2)):
        images = [PIL.Image.fromarray(rng.integers(0, 256, (50, 64, 3), np.uint8)) for _ in range(shown)]
        text = "<image>\n" * shown + "What is left? " * (1 + i if shown else 20)
        yield Record(str(i), tuple(p.copy for p in images), (Turn("human", text),))


def generator(mesh, **how):
    config = tiny(**changes(**how)).model
    plan, mesh = blueprint(config), make_mesh(mesh)
    places = plan.shardings(mesh)
    params = ((path, jax.device_put(x, places[path])) for path, x in vivid(plan.shapes, 1).items())
    return Generator(config, load_tokenizer("miniature"), mesh, "v1", "pad").take(params)


@pytest.fixture(scope="module")
def whole():
    return list(generator(MeshConfig(1, 1, 1)).answers(list(records()), 8, rows=5))


@pytest.mark.parametrize(
    ("reduce", "keep", "slots"),
    [("fastv", 4, N), ("random", 5, 5), pytest.param("visionzip", 5, 5, marks=pytest.mark.slow)],
)
def test_answers_are_the_same_on_a_mesh_and_alone(reduce, keep, slots, whole):
    asked, one = list(records()), generator(MeshConfig(1, 1, 1), reduce=reduce, keep=keep)
    said = list(one.answers(asked, 8, rows=5))
    assert list(generator(MeshConfig(2, 2, 2), reduce=reduce, keep=keep).answers(asked, 8, rows=5)) == said
    assert list(one.answers(asked[3:4], 8, rows=1)) == said[3:4]  # it had longer rows beside it
    same = [a == b for a, b in zip(said, whole, strict=True)]
    assert same[2]  # which has no image
    assert not all(same)
    protocol = one.protocol(asked[0])
    assert (protocol["reduce"], protocol["keep"], protocol["image_tokens"]) == (reduce, keep, slots)


def test_an_unreduced_protocol_is_as_it_was():
    """Answers that were begun before there was anything to reduce go on."""
    assert not {"reduce", "keep"} & set(generator(MeshConfig(1, 1, 1)).protocol(next(records())))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("reduced") / "model", 1, **changes())


def test_a_reduction_is_asked_for_at_the_door(folder, tmp_path):
    out = tmp_path / "out"
    asked = [f"--checkpoint={folder}", "--benchmark=scenes", "--limit=2", f"--out={out}", "--batch=4"]
    assert door(evaluate.main, [*asked, "--reduce=visionzip", "--keep=5"]) == 0
    asking = json.loads((out / "results.json").read_text())["protocol"]["asking"]
    assert (asking["reduce"], asking["keep"], asking["image_tokens"]) == ("visionzip", 5, 5)
    assert door(evaluate.main, [*asked, "--reduce=visionzip"]) == 2  # they hold another's answers


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--reduce=fastv", "--keep=17"], "keep=17 should be 1 to 16"),
        (["--keep=4"], "set reduce to one of fastv, random, visionzip"),
        (["--reduce=zip"], "invalid choice: 'zip'"),
        (["--reduce=fastv", "--keep=-1"], "-1 is not between 0"),
    ],
)
def test_what_cannot_be_is_one_sentence_at_both_doors(options, sentence, folder, tmp_path, capsys):
    measuring = ["--benchmark=scenes", f"--out={tmp_path / 'out'}"]
    for verb, own in ((evaluate.main, measuring), (chat.main, ["--prompt=What is it?"])):
        assert door(verb, [f"--checkpoint={folder}", *own, *options]) == 2
        assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_training_is_for_whole_images(tmp_path, capsys):
    options = [f"--config={ROOT}/tests/tiny.py:fusion=mlp", f"--workdir={tmp_path / 'run'}"]
    assert door(main.main, [*options, "--config.model.reduce=visionzip"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: model.reduce=visionzip is for answering: train without it")
    assert not (tmp_path / "run" / "checkpoints").exists()
