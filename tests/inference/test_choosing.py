"""Tokens chosen for each image: a planted chooser, answers equal to those with a fixed number, and the commands."""

import json

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from etils import epath
from make_evals import make_model
from tiny import large_params, tiny

import stf_jax
from stf_jax import chat, evaluate
from stf_jax.checkpointing.manager import Checkpoints
from stf_jax.cli import run_command
from stf_jax.comparisons.ours import read_folder
from stf_jax.config import CheckpointConfig, MeshConfig, UserError, to_json
from stf_jax.data.records import make_question
from stf_jax.evals.benchmarks.scenes import Scenes
from stf_jax.inference import choosing, loading
from stf_jax.inference.loading import load_generator
from stf_jax.models.blueprint import blueprint
from stf_jax.models.chooser import fewest_tokens
from stf_jax.parallel.mesh import make_mesh

BUDGETS = (16, 4, 1)
CONFIG = {"model.fusion.fusion": "mlp", "model.fusion.budgets": BUDGETS, "model.chooser": True}
TOLERANCE = 1.0


def test_a_higher_tolerance_never_gives_more_tokens():
    logs = np.random.default_rng(0).normal(size=(200, 2)) * 3
    tolerances = [0.0, 1e-3, 0.1, 1.0, 10.0, 1e9, np.inf]
    chosen = np.stack([fewest_tokens(logs, BUDGETS, tolerance) for tolerance in tolerances])
    assert (np.diff(chosen, axis=0) <= 0).all()
    assert (chosen[0] == 16).all()
    assert (chosen[-2:] == 1).all()
    assert {*chosen[3]} == {16, 4, 1}
    expected = [next((n for n, log in ((1, b), (4, a)) if np.exp(log) <= 0.1), 16) for a, b in logs]
    np.testing.assert_array_equal(chosen[2], expected)
    assert fewest_tokens(np.full((1, 2), np.nan), BUDGETS, 1e9) == 16


# ---- A planted chooser -----------------------------------------------------------------------------------------------

CHANNEL = 5  # of the mean over patches, normalized: the planted feature


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose chooser expects log-divergences of 8·feature − 1 for 4 tokens and 8·feature + 1 for 1."""
    folder = epath.Path(tmp_path_factory.mktemp("choosing")) / "run"
    config = tiny(**CONFIG)
    params = large_params(blueprint(config.model).shapes, 1)
    zeros = {path: np.zeros_like(x) for path, x in params.items() if path.startswith("chooser/")}
    zeros["chooser/norm/scale"] += 1
    zeros["chooser/hidden/kernel"][CHANNEL, :2] = 1, -1  # gelu(x) − gelu(−x) = x
    zeros["chooser/out/kernel"][0], zeros["chooser/out/kernel"][1] = 8, -8
    zeros["chooser/out/bias"][:] = -1, 1
    state = type("State", (), {"trainable": {p: jnp.asarray(x) for p, x in (params | zeros).items()}})
    state.frozen, state.moments = {}, {}
    with Checkpoints(folder, CheckpointConfig()) as checkpoints:
        checkpoints.save(3, state, {}, {}, last=True)
    (folder / "config.json").write_text(json.dumps(to_json(config)))
    return folder


def make_records():
    """Questions about noise of several kinds: one image, two images and none."""
    rng, records = np.random.default_rng(4), []
    for number in range(11):
        images = []
        for _ in range((1, 1, 2, 0)[number % 4]):
            noise = rng.integers(0, 256, (8, 8, 3), np.uint8) // np.uint8(rng.integers(1, 9))
            images.append(PIL.Image.fromarray(noise).resize((64, 64)).copy)
        records.append(make_question(str(number), images, f"What is {number}?"))
    return records


@pytest.fixture(scope="module")
def loaded(run):
    return load_generator(run, make_mesh(MeshConfig(1, 1, 1)), "float32", tokens="auto", tolerance=TOLERANCE)


@pytest.fixture(scope="module")
def generator(loaded):
    return loaded[0]


@pytest.fixture
def programs(loaded, monkeypatch):
    """Commands share the compiled programs of ``generator``."""
    generator, saved = loaded

    def load(checkpoint, mesh, precision, reduce, keep, tokens, tolerance, **_):
        assert (precision, reduce, keep) == ("float32", "", 0)
        assert tolerance == (TOLERANCE if tokens == "auto" else None)
        return (generator if tokens == "auto" else generator.at(tokens)), saved

    monkeypatch.setattr(loading, "load_generator", load)


def tower_state(model, images):
    return model.tower_states(images, model.taps)[model.taps[0]]


def by_definition(generator, record):
    """The most tokens that an image of the record needs; 16 without one."""
    needed = []
    for image in record.images:
        pooled = np.float64(generator.apply(tower_state, jnp.asarray(generator.squares(image()))[None]))[0].mean(0)
        feature = (pooled[CHANNEL] - pooled.mean()) / pooled.std()
        needed.append(1 if 8 * feature + 1 <= 0 else 4 if 8 * feature - 1 <= 0 else 16)
    return max(needed, default=16)


def test_a_planted_chooser_chooses_by_its_feature(generator):
    records = make_records()
    expected = [by_definition(generator, record) for record in records]
    assert generator.choose(records, 4) == expected
    assert {*expected} == {16, 4, 1}


def test_every_mesh_chooses_the_same(run, generator):
    other, _ = load_generator(run, make_mesh(MeshConfig(2, 2, 2)), "float32", tokens="auto", tolerance=TOLERANCE)
    assert other.choose(make_records(), 4) == generator.choose(make_records(), 4)


def test_answers_are_those_with_the_number_of_tokens_that_was_chosen(generator, monkeypatch):
    monkeypatch.setattr(choosing, "WINDOW", 2)  # the records are answered in two windows
    records = make_records()
    fixed = {tokens: list(generator.at(tokens).generate(records, 8, rows=4)) for tokens in BUDGETS}
    chosen = generator.choose(records, 4)
    assert list(generator.generate(records, 8, rows=4)) == [fixed[tokens][i] for i, tokens in enumerate(chosen)]
    assert all(texts != fixed[16] for texts in (fixed[4], fixed[1]))
    with_images = [i for i, record in enumerate(records) if record.images]
    assert any(chosen[i] < 16 and fixed[chosen[i]][i] != fixed[16][i] for i in with_images)


# ---- The commands ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("programs")
def test_evaluate_reports_the_tokens_that_were_chosen(run, generator, tmp_path, capsys):
    def ask(name, *options):
        argv = [f"--checkpoint={run}", "--benchmark=scenes", "--limit=6", f"--out={tmp_path / name}", "--batch=4"]
        assert run_command(evaluate.main, [*argv, "--precision=float32", *options]) == 0
        rows = (tmp_path / name / "answers.jsonl").read_text().splitlines()
        return [json.loads(row)["text"] for row in rows], json.loads((tmp_path / name / "results.json").read_text())

    found, results = ask("auto", "--tokens=auto", f"--tolerance={TOLERANCE}")
    printed = capsys.readouterr().out
    benchmark = Scenes()
    benchmark.limit(6)
    chosen = [by_definition(generator, question.to_record()) for question in benchmark.questions]
    fixed = {tokens: ask(str(tokens), f"--tokens={tokens}")[0] for tokens in {*chosen}}
    assert found == [fixed[tokens][i] for i, tokens in enumerate(chosen)]
    shown = chosen[::2]  # the others are about blank images
    assert results["image_tokens"]["mean"] == round(sum(shown) / 6, 2)
    assert results["image_tokens"]["shares"] == {str(n): shown.count(n) / 6 for n in BUDGETS if n in shown}
    assert f"{results['image_tokens']['mean']} tokens per image: " in printed
    asking = results["protocol"]["asking"]
    assert (asking["tokens"], asking["tolerance"], asking["image_tokens"]) == ("auto", TOLERANCE, list(BUDGETS))
    assert read_folder(epath.Path(tmp_path / "auto")).cost == {"image_tokens": results["image_tokens"]["mean"]}


@pytest.mark.usefixtures("programs")
def test_the_api_and_chat_choose(run, generator, tmp_path, capsys):
    model, record = stf_jax.load(run, precision="float32", tokens="auto", tolerance=TOLERANCE), make_records()[0]
    (image,) = (image() for image in record.images)
    (tokens,) = generator.choose([record], 1)
    assert model.tokens_per_image == 16
    assert len(model.image_tokens(image)) == tokens
    (expected,) = generator.at(tokens).generate([record], 8, 1)
    assert model.chat(image, "What is 0?", 8) == expected
    image.save(tmp_path / "image.png")
    argv = [f"--checkpoint={run}", "--precision=float32", "--tokens=auto", f"--tolerance={TOLERANCE}"]
    argv += [f"--image={tmp_path / 'image.png'}", "--prompt=What is 0?", "--max-new-tokens=8"]
    assert run_command(chat.main, argv) == 0
    assert capsys.readouterr().out == expected + "\n"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--tokens=auto"], "tokens=auto needs a tolerance, in nats per answer token: for example, tolerance=0.05."),
        (["--tolerance=1"], "tolerance has no effect without tokens=auto."),
        (["--tokens=auto", "--tolerance=nan"], "tolerance=nan must be at least 0."),
        (["--tokens=auto", "--tolerance=-1"], "tolerance=-1.0 must be at least 0."),
        (["--tokens=auto", "--tolerance=1", "--reduce=pool"], "tokens=auto and reduce=pool both say how many image "),
        (
            ["--tokens=auto", "--tolerance=1", "--web"],
            "--web has a menu of numbers of tokens: leave out --tokens=auto.",
        ),
        (["--tokens=some"], "Argument --tokens: 'some' is neither a number nor auto; see --help."),
    ],
)
def test_wrong_choices_are_explained(options, sentence, run, capsys):
    asked = [] if "--web" in options else ["--prompt=What is it?"]
    assert run_command(chat.main, [f"--checkpoint={run}", *asked, *options]) == 2
    assert capsys.readouterr().err.startswith(f"error: {sentence}")


def test_a_model_without_a_chooser_is_explained(tmp_path):
    plain = make_model(tmp_path / "plain", **{"model.fusion.fusion": "mlp", "model.fusion.budgets": BUDGETS})
    with pytest.raises(UserError, match="The model has no head that chooses tokens: train one"):
        stf_jax.load(plain, tokens="auto", tolerance=0.1)
