"""The command and the API that look inside a model: pages for images and methods, with the answers of the model."""

import json
import re

import numpy as np
import pytest
from etils import epath
from make_models import make, make_image

import stf_jax
from stf_jax import look
from stf_jax.cli import run_command
from stf_jax.config import FusionConfig, UserError
from stf_jax.inference import loading
from stf_jax.weights.model import open_model

QUESTION = "What is it?"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make(epath.Path(tmp_path_factory.mktemp("models") / "mine"), FusionConfig("mlp"), "clip", "llama")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number in (1, 2):
        make_image(number).save(folder / f"{number}.png")
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_the_command_and_the_api_show_the_answer_of_the_model(model, images, tmp_path, capsys, monkeypatch):
    loaded = stf_jax.load(model)
    answer = loaded.chat(images / "1.png", QUESTION, max_new_tokens=3)
    seen = loaded.look(images / "1.png", QUESTION, tmp_path / "one", max_new_tokens=3)
    assert seen.answer == answer
    assert "".join(seen.pieces).strip() == answer
    assert seen.pixels.shape == (36, 36, 3)
    assert 0 < seen.probability < 1
    assert seen.probability == pytest.approx(np.prod(seen.probabilities))
    assert seen.sources.tolist() == np.eye(36).tolist()
    assert {file.name for file in (tmp_path / "one").iterdir()} == {"1.html", "1-mine-tokens.png", "1-mine-answer.png"}
    # The command, with the programs that are compiled already.
    monkeypatch.setattr(loading, "load_generator", lambda *_: (loaded._generator, None))
    argv = [f"--checkpoint={model}", f"--image={images}", f"--question={QUESTION}", f"--out={tmp_path / 'all'}"]
    assert run_command(look.main, [*argv, "--max-new-tokens=3"]) == 0
    pngs = {f"{number}-mlp-{kind}.png" for number in (1, 2) for kind in ("tokens", "answer")}
    assert {file.name for file in (tmp_path / "all").iterdir()} == {"index.html", "1.html", "2.html", *pngs}
    data = json.loads(re.search(r'id="data">(.*?)</script>', (tmp_path / "all" / "1.html").read_text())[1])
    assert [(one["name"], one["answer"], one["tokens"]) for one in data["methods"]] == [("mlp", answer, 36)]
    assert f"1.png  mlp: {answer!r} ({seen.probability:.0%})" in capsys.readouterr().out


def test_a_reducer_is_used_with_the_models_that_it_fits(model, tmp_path):
    merged = make(epath.Path(tmp_path / "merged"), FusionConfig("stf"), "clip", "llama")
    configs = {folder: open_model(folder).config for folder in (model, merged)}
    planned = look.plan_methods(configs, ["visionzip", "pool"], (4, 9))
    names = ["mlp", *(f"mlp + {name}, {keep}" for name in ("visionzip", "pool") for keep in (4, 9))]
    assert [method.name for method in planned] == [*names, "stf", "stf + pool, 4", "stf + pool, 9"]
    with pytest.raises(UserError, match="visionzip needs a fusion that keeps every patch"):
        look.plan_methods({merged: configs[merged]}, ["visionzip"], (0,))
    same = {epath.Path("runs/a/finetune"): configs[model], epath.Path("runs/b/finetune"): configs[model]}
    assert [method.name for method in look.plan_methods(same, [], (0,))] == ["runs/a/finetune", "runs/b/finetune"]
