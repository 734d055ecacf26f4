"""The Python API agrees with the commands, and importing the package is cheap."""

import json
import os
import pathlib
import subprocess
import sys
import tomllib

import numpy as np
import pytest
import tiny
from make_models import make, make_image

import stf_jax
from stf_jax import chat, evaluate
from stf_jax.cli import run_command
from stf_jax.config import FusionConfig, UserError
from stf_jax.files import to_path

ROOT = pathlib.Path(__file__).parents[1]
QUESTION = "How many shapes are there?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An imported model with random weights."""
    return make(tmp_path_factory.mktemp("api") / "model", FusionConfig("mbtf_stf"), "clip", "llama")


@pytest.fixture(scope="module")
def model(folder):
    return stf_jax.load(folder)


@pytest.mark.parametrize("to", ["gs://bucket/weights", "~/weights"])
def test_weights_are_imported_into_buckets_and_home_folders(to, monkeypatch):
    monkeypatch.setattr("stf_jax.weights.imports.import_weights", lambda source, to, *_: to)
    assert stf_jax.import_weights("model", to) == to_path(to)


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, stf_jax; print(stf_jax.__version__, sorted({'jax', 'numpy', 'PIL', 'flax'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"{stf_jax.__version__} []\n"


def test_the_wheel_contains_every_package_and_file():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    files = [*(ROOT / "stf_jax").rglob("*.py"), *(ROOT / "configs").rglob("*.py")]
    folders = {file.parent.relative_to(ROOT) for file in files if "torch_package" not in file.parts}
    names = {".".join(folder.parts) for folder in folders}
    assert {*project["packages"]} == {f"stf_jax.{name}" if name.startswith("configs") else name for name in names}
    places = {ROOT / name.replace(".", "/"): patterns for name, patterns in project["package-data"].items()}
    packed = {file for place, patterns in places.items() for pattern in patterns for file in place.glob(pattern)}
    others = {file for file in (ROOT / "stf_jax").rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")}
    assert others <= packed


@pytest.mark.parametrize("name", ["demo:stage=finetune", "small"])
def test_an_installed_package_finds_its_configs_by_name(name, tmp_path):
    """From an empty folder. In a wheel, configs/ is inside the package."""
    package = tmp_path / "site" / "stf_jax"
    package.mkdir(parents=True)
    for item in (*(ROOT / "stf_jax").iterdir(), ROOT / "configs"):
        (package / item.name).symlink_to(item)
    folder = tmp_path / "empty"
    folder.mkdir()
    command = [sys.executable, "-m", "stf_jax.plan", f"--config={name}"]
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    # The config was read.
    assert done.stderr.splitlines()[-1].startswith("error: --topology is missing"), done.stderr


def test_all_public_names_exist():
    for name in stf_jax.__all__:
        assert getattr(stf_jax, name) is not None
    assert set(stf_jax.__all__) <= set(dir(stf_jax))
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        _ = stf_jax.laod


def test_a_model_answers_as_the_chat_command_does(model, folder, tmp_path, capsys):
    make_image(1).save(tmp_path / "a.png")
    options = [f"--checkpoint={folder}", f"--image={tmp_path / 'a.png'}", f"--prompt={QUESTION}", "--max-new-tokens=8"]
    assert run_command(chat.main, options) == 0
    assert model.chat(tmp_path / "a.png", QUESTION, max_new_tokens=8) == capsys.readouterr().out.strip()


def test_images_may_be_paths_arrays_or_pil_images(model, tmp_path):
    make_image(1).save(tmp_path / "a.png")
    images = [str(tmp_path / "a.png"), tmp_path / "a.png", make_image(1), np.asarray(make_image(1))]
    answers = model.generate([(image, QUESTION) for image in images], max_new_tokens=8)
    assert answers == [answers[0]] * 4
    other, none = model.generate([(make_image(2), QUESTION), (None, QUESTION)], max_new_tokens=8)
    assert len({answers[0], other, none}) > 1


def test_image_tokens_have_the_width_of_the_language_model(model, folder):
    tokens = model.image_tokens(make_image(1))
    assert tokens.shape == (model.tokens_per_image, 32) == (9, 32)
    assert tokens.dtype == np.float32
    np.testing.assert_array_equal(tokens, model.image_tokens(np.asarray(make_image(1))))
    assert np.abs(tokens - model.image_tokens(make_image(2))).max() > 1e-3


def test_options_of_load_are_checked(folder):
    for options, message in (
        ({"precision": "float16"}, "Config key model.precision is 'float16': did you mean 'bfloat16'?"),
        ({"reduce": "fastV"}, "Unknown model.reduce 'fastV'; did you mean 'fastv'?"),
        ({"keep": -1}, "Config key model.keep is -1; it must be between 0 and 1,000,000,000."),
    ):
        with pytest.raises(UserError) as raised:
            stf_jax.load(folder, **options)
        assert str(raised.value) == message


def test_configs_are_read_by_name_argument_and_override():
    config = stf_jax.load_config("demo:fusion=stf", "seed=3", "stages.pretrain.steps=7")
    assert (config.model.fusion.fusion, config.seed, config.stages.pretrain.steps) == ("stf", 3, 7)
    with pytest.raises(UserError, match="did you mean 'seed'"):
        stf_jax.load_config("demo", "sead=3")
    with pytest.raises(ValueError, match=r"^Config argument .fusion. is not known; did you mean .fusion=.?.$"):
        stf_jax.load_config("demo:fusion")


def test_an_invalid_image_raises_a_user_error(model, tmp_path):
    (tmp_path / "a.png").write_text("no image")
    for image in (tmp_path / "a.png", tmp_path / "none.png"):
        with pytest.raises(UserError, match=r"\.png"):
            model.chat(image, QUESTION)


def test_evaluate_agrees_with_the_command(model, folder, tmp_path):
    results = stf_jax.evaluate(model, "scenes", tmp_path / "api", limit=2, batch_size=4)
    assert stf_jax.evaluate(model, "scenes", limit=2, batch_size=4) == results  # keeps no files
    options = [
        f"--checkpoint={folder}",
        "--benchmark=scenes",
        "--limit=2",
        "--batch=4",
        f"--out={tmp_path / 'command'}",
    ]
    assert run_command(evaluate.main, options) == 0
    written = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("api", "command")]
    assert json.loads(json.dumps(results)) == written[0] == written[1]


def test_train_returns_results_and_writes_a_model_to_load_and_export(tmp_path):
    config = tiny.get_config("steps=2")
    config.eval.update(benchmarks=("shapes",), limit=2)
    (results,) = stf_jax.train(config, tmp_path / "run")
    assert (results["benchmark"], results["questions"]) == ("shapes", 2)
    trained = stf_jax.load(tmp_path / "run")
    assert trained.step == 2
    assert isinstance(trained.chat(make_image(1), QUESTION, max_new_tokens=2), str)
    report = stf_jax.export(tmp_path / "run", tmp_path / "exported", format="native")
    assert report["parameters"] > 1000
    assert (tmp_path / "exported" / "model.safetensors").exists()
    with pytest.raises(UserError, match="did you mean 'hf'"):
        stf_jax.export(tmp_path / "run", tmp_path / "other", format="hff")
