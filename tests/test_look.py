"""Looking inside a model: maps agree with its answers, the command and the API write pages, and methods are planned."""

import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from etils import epath
from tiny import TOKENIZER, make_generator, tiny

from stf_jax import api, look
from stf_jax.cli import run_command
from stf_jax.config import UserError
from stf_jax.data.records import make_question
from stf_jax.data.tiles import Tiles
from stf_jax.data.tokenizer import untrained_tokens
from stf_jax.inference import loading
from stf_jax.looking.attribution import map_answer
from stf_jax.looking.look import look_at
from stf_jax.models.decoders.transformer import Decoder
from stf_jax.models.reducers.base import REDUCERS, DecoderReducer, find_reducer
from stf_jax.models.spec import resolve_model
from stf_jax.weights import model as saved_models

QUESTION = "What is it?"
MLP = {"model.fusion.fusion": "mlp", "model.fusion.taps": (1,)}
RNG = np.random.default_rng(0)
IMAGE = PIL.Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8))


@pytest.fixture(scope="module")
def unreduced():
    return make_generator(**MLP)


IN_THE_DECODER = [name for name in REDUCERS.known if isinstance(find_reducer(name), DecoderReducer)]


SCHEDULES = {
    "vica:layers=0+3": [16, 0, 0, 16],
    "pyramiddrop:after=1+3,keep=7+2": [16, 7, 7, 2],
    "hidrop:enter=1,layers=2,keep=5,exit=3,soft=0.5": [0, 16, 5, 0],
}
READ = {"": [16, 16], **{f"{name}:after=1": [16, 9] for name in IN_THE_DECODER}, **SCHEDULES}  # tokens, by layer


@pytest.mark.parametrize("name", READ)
def test_maps_of_an_answer_are_those_of_the_generator(name, unreduced, monkeypatch):
    if name in SCHEDULES:
        generator = unreduced = make_generator(**MLP | {"model.llm": "llama-deep-tiny", "model.schedule": name})
    else:
        generator = unreduced.with_reduction(name, 9 if name else 0)  # its programs are compiled in this test
    question = make_question("", [lambda: IMAGE], QUESTION)
    answer, prompt = generator.answer_tokens(question, 4), generator.prompt(question)
    compute, seen = Decoder.logits, []

    def record(self, x):
        logits = compute(self, x)
        jax.debug.callback(lambda x: seen.append(np.float64(x)), logits)
        return logits

    monkeypatch.setattr(Decoder, "logits", record)
    arguments = jnp.asarray(prompt.tokens), jnp.asarray(prompt.is_image), jnp.pad(answer, (0, 8 - len(answer)))
    image_tokens, rows, token, step = unreduced.image_tokens(IMAGE), np.arange(len(answer)), 5, 2e-1
    maps = generator.apply(map_answer, jnp.asarray(image_tokens), *arguments)
    jax.effects_barrier()
    logits = seen[0][: len(answer)]
    # The answer, from a cache, is that of one complete row.
    never = np.isin(np.arange(logits.shape[1]), untrained_tokens(TOKENIZER, logits.shape[1]))
    np.testing.assert_array_equal(np.where(never, -np.inf, logits).argmax(-1), answer)
    np.testing.assert_allclose(maps.log_probs[rows], jax.nn.log_softmax(logits)[rows, answer], rtol=1e-4, atol=1e-4)
    reads, attention, movement = (np.asarray(x) for x in (maps.reads, maps.attention, maps.movement[rows]))
    assert list(reads.sum(1)) == READ[name]
    np.testing.assert_allclose(attention.sum(-1), 1, rtol=1e-5)
    np.testing.assert_array_equal((attention[:, :, np.flatnonzero(prompt.is_image)] > 0).all(1), reads)
    assert (movement > 0).all()  # by tokens that are dropped too, which the first layer reads
    if name:
        return
    gradient = []
    for direction in np.eye(image_tokens.shape[1], dtype=np.float32):
        for sign in (1, -1):
            moved = image_tokens.copy()
            moved[token] += sign * step * direction
            generator.apply(map_answer, jnp.asarray(moved), *arguments)
            jax.effects_barrier()
        gradient.append((seen[-2] - seen[-1])[rows, answer] / (2 * step))
    expected = np.linalg.norm(gradient, axis=0) * np.linalg.norm(image_tokens[token])
    np.testing.assert_allclose(movement[:, token], expected, rtol=5e-3)


def test_the_command_and_the_api_write_pages(unreduced, tmp_path, capsys, monkeypatch):
    (tmp_path / "images").mkdir()
    for name in ("1.png", "2.png"):
        IMAGE.save(tmp_path / "images" / name)
    (tmp_path / "images" / "notes.txt").write_text("not an image")
    model = api.Model(unreduced, types.SimpleNamespace(step=None), epath.Path("runs/mine"))
    seen = model.look(tmp_path / "images" / "1.png", QUESTION, tmp_path / "one", max_new_tokens=4)
    assert "".join(seen.pieces).strip() == seen.answer == model.chat(IMAGE, QUESTION, max_new_tokens=4)
    assert seen.pixels.shape == (64, 64, 3)
    assert seen.probability == pytest.approx(np.prod(seen.probabilities))
    assert seen.sources.tolist() == np.eye(16).tolist()
    assert {file.name for file in (tmp_path / "one").iterdir()} == {"1.html", "1-mine-tokens.png", "1-mine-answer.png"}
    monkeypatch.setattr(loading, "load_generator", lambda *_: (unreduced, None))
    monkeypatch.setattr(saved_models, "open_model", lambda _: types.SimpleNamespace(config=unreduced.model))
    places = f"--checkpoint={tmp_path}", f"--image={tmp_path / 'images'}", f"--out={tmp_path / 'all'}"
    assert run_command(look.main, [*places, f"--question={QUESTION}", "--max-new-tokens=4"]) == 0
    pngs = {f"{number}-mlp-{kind}.png" for number in (1, 2) for kind in ("tokens", "answer")}
    assert {file.name for file in (tmp_path / "all").iterdir()} == {"index.html", "1.html", "2.html", *pngs}
    data = json.loads(re.search(r'id="data">(.*?)</script>', (tmp_path / "all" / "1.html").read_text())[1])
    assert [(one["name"], one["answer"], one["tokens"]) for one in data["methods"]] == [("mlp", seen.answer, 16)]
    assert f"1.png  mlp: {seen.answer!r} ({seen.probability:.0%})" in capsys.readouterr().out


@pytest.mark.parametrize("marks", ["newline", "none"])
def test_a_look_at_tiles_shows_all_squares(marks, tmp_path):
    """Each token's patch on the canvas is the one of its square, and the answer is the generator's."""
    generator = make_generator(tiles=Tiles(((1, 2), (2, 1), (2, 2)), marks), **MLP)
    wide = PIL.Image.fromarray(RNG.integers(0, 256, (50, 150, 3), np.uint8))
    question = make_question("", [lambda: wide], QUESTION)
    seen, prompt = look_at(generator, wide, QUESTION, "tiles", 4), generator.prompt(question)
    squares, (rows, columns) = generator.squares(wide), seen.grid
    assert (seen.tiles, seen.grid, seen.patches, len(squares)) == ((1, 2), (4, 13), 48, 3)
    patches = seen.pixels.reshape(rows, 16, columns, 16, 3).swapaxes(1, 2).reshape(-1, 16, 16, 3)
    of_squares = squares.reshape(3, 4, 16, 4, 16, 3).swapaxes(2, 3).reshape(-1, 16, 16, 3)
    slots = prompt.image_slots[prompt.is_image]
    assert len(slots) == {"newline": 16 + 2 * (8 + 1), "none": 48}[marks]  # two of four rows are padding alone
    for slot, shares, moved in zip(slots, seen.sources, seen.movement, strict=True):
        if slot < 0:
            assert not shares.any()
            assert not moved.any()
            continue
        (place,) = np.flatnonzero(shares)
        np.testing.assert_array_equal(patches[place], of_squares[slot])
        assert list(np.flatnonzero(moved[0])) == [place]
    drawn = {place for place, patch in enumerate(patches) if (patch != 128).any()}
    assert len(drawn) == 48
    (answer,) = generator.generate([question], 4, 1)
    assert seen.answer == answer
    ids = jnp.pad(generator.answer_tokens(question, 4), (0, 8 - len(seen.pieces)))
    inputs = generator.image_tokens(wide), jnp.asarray(prompt.tokens), jnp.asarray(prompt.is_image), ids
    maps = generator.apply(map_answer, *inputs)
    np.testing.assert_allclose(seen.probabilities, np.exp(maps.log_probs)[: len(seen.pieces)], rtol=1e-5)
    np.testing.assert_allclose(seen.dependence, maps.movement[: len(seen.pieces)], rtol=1e-4)
    assert seen.dependence.all()  # on newline tokens too


def test_a_reducer_is_used_with_the_models_that_it_fits():
    configs = {
        epath.Path(f"runs/{fusion}/finetune"): resolve_model(tiny(**{"model.fusion.fusion": fusion}).model)
        for fusion in ("mlp", "stf")
    }
    planned = look.plan_methods(configs, ["visionzip", "pool"], (4, 9))
    names = ["mlp", *(f"mlp + {name}, {keep}" for name in ("visionzip", "pool") for keep in (4, 9))]
    assert [method.name for method in planned] == [*names, "stf", "stf + pool, 4"]  # it has four tokens
    mlp, stf = configs.values()
    with pytest.raises(UserError, match="visionzip needs a fusion that keeps every patch"):
        look.plan_methods({epath.Path("runs/stf"): stf}, ["visionzip"], (0,))
    same = {epath.Path("runs/a/finetune"): mlp, epath.Path("runs/b/finetune"): mlp}
    assert [method.name for method in look.plan_methods(same, [], (0,))] == ["runs/a/finetune", "runs/b/finetune"]
    many = resolve_model(tiny(**{"model.fusion.fusion": "mlp", "model.fusion.budgets": (16, 4, 1)}).model)
    models = {epath.Path("runs/mlp"): mlp, epath.Path("runs/many"): many}
    planned = look.plan_methods(models, ["pool"], (4,), (16, 1))
    assert [method.name for method in planned] == ["mlp", "mlp + pool, 4", "many", "many, 1 token", "many + pool, 4"]
    assert [method.tokens for method in planned] == [0, 0, 0, 1, 0]
    with pytest.raises(UserError, match="tokens=9 is not a budget of the model: mlp makes 16, 4, 1 per image"):
        look.plan_methods({epath.Path("runs/many"): many}, [], (0,), (9,))
    apart = {epath.Path("runs/a"): mlp, epath.Path("runs/b"): mlp}
    assert [method.name for method in look.plan_methods(apart, [], (0,))] == ["a", "b"]


def test_images_of_a_folder_are_files(tmp_path):
    for name in ("b.png", "a.jpg", ".hidden.png", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "old.jpg").mkdir()
    assert [image.name for image in look._find_images(epath.Path(tmp_path))] == ["a.jpg", "b.png"]


def test_a_number_of_tokens_without_a_reducer_is_refused(tmp_path, capsys):
    argv = [f"--checkpoint={tmp_path}", f"--image={tmp_path}", "--question=What?", f"--out={tmp_path}", "--keep=4"]
    assert run_command(look.main, argv) == 2
    assert "--keep has no effect without --reduce" in capsys.readouterr().err


def test_a_mesh_that_splits_rows_is_refused():
    with pytest.raises(UserError, match="data and fsdp of the mesh must be 1"):
        look_at(types.SimpleNamespace(row_shards=2), IMAGE, QUESTION, "split")
