"""Components outside the package, one file each in tests/plugins, named in a config: together they do all the rest."""

import json
import pathlib
import shutil
import sys

import jax
import numpy as np
import pytest
from etils import epath
from tiny import tiny

from stf_jax import evaluate
from stf_jax.cli import run_command
from stf_jax.config import UserError
from stf_jax.convert import main as convert
from stf_jax.evals.verify import verify
from stf_jax.main import main
from stf_jax.models.spec import resolve_model, vision_preset
from stf_jax.planning.report import trace_cost
from stf_jax.training.flops import prefill_flops
from stf_jax.weights.model import describe_folder, open_model

TESTS = pathlib.Path(__file__).parent
OWN = {
    "model.vision": "dino:TINY",
    "model.llm": "olmo:TINY",
    "model.fusion.fusion": "max_pool:MaxPool",
    "data.source": "squares:open_squares",
    "data.template": "olmo:CHAT",
    "objective": "z_loss:Z_LOSS",
    "rules": (("llm/.*", "outer:OUTER*2"), ("vision/.*", "freeze"), (".*", "train")),
}
STEPS, EVERY = 4, 2


@pytest.fixture(scope="module", autouse=True)
def plugins():
    sys.path.insert(0, str(TESTS / "plugins"))
    yield
    sys.path.remove(str(TESTS / "plugins"))


def train(workdir, **changes):
    """Calls stf_jax.main with all plug-ins; returns its exit status."""
    values = {"steps": STEPS, "checkpoint.every_steps": EVERY, "mesh.data": 1, "mesh.fsdp": 1} | OWN | changes
    options = [f"--config.{key}={value}" for key, value in values.items()]
    return run_command(main, [f"--config={TESTS / 'tiny.py'}", f"--workdir={workdir}", *options])


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("plugins") / "run"
    assert train(workdir) == 0
    return workdir


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").open()]


def test_they_train(workdir):
    assert [line["step"] for line in metrics(workdir)] == [1, 2, 3, 4]
    assert metrics(workdir)[-1]["loss"] < metrics(workdir)[0]["loss"]
    description = open_model(epath.Path(workdir)).description
    assert description.vision == resolve_model(tiny(**OWN).model).vision_shape
    assert (description.vision.family, description.llm.family) == ("dino:DINO", "olmo:OLMO")
    assert (description.fusion.fusion, description.template) == ("max_pool:MaxPool", "olmo:CHAT")


def test_they_resume_exactly(workdir, tmp_path):
    """As if the run had been killed after its first checkpoint."""
    resumed = tmp_path / "run"
    shutil.copytree(workdir, resumed)
    shutil.rmtree(resumed / "checkpoints" / str(STEPS))
    assert train(resumed) == 0
    expected, found = metrics(workdir), metrics(resumed)
    assert [line["loss"] for line in found] == [line["loss"] for line in expected]
    assert found[EVERY]["seconds"] != expected[EVERY]["seconds"]  # it was computed again
    before, after = (open_model(epath.Path(folder)) for folder in (workdir, resumed))
    for path in before.shapes:
        np.testing.assert_array_equal(before.read(path), after.read(path))


@pytest.mark.parametrize(("key", "other"), [("data.source", "scenes"), ("objective", "next_token")])
def test_a_run_keeps_them(workdir, capsys, key, other):
    assert train(workdir, **{key: other}) == 2
    assert f"cannot resume with a changed {key} (was '{OWN[key]}', now '{other}')" in capsys.readouterr().err


def test_they_are_evaluated(workdir, tmp_path):
    """On a benchmark of one's own, with a reducer of one's own."""
    options = [f"--checkpoint={workdir}", "--benchmark=brightness:Brightness", "--reduce=thinning:SHORT_KEYS"]
    assert run_command(evaluate.main, [*options, f"--out={tmp_path / 'out'}"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["benchmark"], results["questions"]) == ("brightness", 4)
    assert results["metrics"].keys() == {"accuracy"}


def test_they_are_planned_and_their_flops_counted():
    config = tiny(**OWN)
    assert trace_cost(config, "train", jax.devices()).flops_per_row > 0
    flops = prefill_flops(config.model, 1, 8, 1)
    # 16 patches of 8×8, a class token, three blocks of width 32; four tokens
    positions, width, layers, mlp = 17, 32, 3, 128
    blocks = layers * (2 * positions * (4 * width**2 + 2 * width * mlp) + 4 * positions**2 * width)
    assert flops["vision"] == blocks + 2 * 16 * 8 * 8 * 3 * width
    assert flops["fusion"] == 2 * 4 * width * width


def test_their_export_answers_the_same_in_pytorch_and_is_imported(workdir, tmp_path):
    export, imported = tmp_path / "export", tmp_path / "imported"
    assert run_command(convert, ["export", str(workdir), "--format=hf", f"--to={export}"]) == 0
    pairs = verify(epath.Path(workdir), export, 4, 6)
    assert [pair.jax for pair in pairs] == [pair.pytorch for pair in pairs]
    assert run_command(convert, ["import", str(export), f"--to={imported}"]) == 0
    first, second = open_model(epath.Path(workdir)), open_model(epath.Path(imported))
    for part in ("vision", "llm", "template"):
        assert getattr(first.description, part) == getattr(second.description, part)
    assert first.shapes.keys() == second.shapes.keys()
    for path in first.shapes:
        np.testing.assert_array_equal(first.read(path), second.read(path))


@pytest.mark.parametrize("name", ["dino:DINO", "olmo:OLMO", "olmo:CHAT", "max_pool:MaxPool"])
def test_a_folder_does_not_bring_the_code_of_its_model(workdir, tmp_path, monkeypatch, name):
    folder = shutil.copytree(workdir, tmp_path / "run")
    (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\nThing = None\n")
    (folder / "model.json").write_text((folder / "model.json").read_text().replace(name, "evil:Thing"))
    monkeypatch.syspath_prepend(folder)
    with pytest.raises(UserError, match="Opening a model never runs code from its folder"):
        describe_folder(epath.Path(folder))
    if name == "dino:DINO":
        with pytest.raises(UserError, match="Opening a model never runs code from its folder"):
            vision_preset(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", ["", ":rank=2", "*2", "@int8*2"])
def test_a_folder_does_not_bring_the_code_of_its_adapters(workdir, tmp_path, monkeypatch, suffix):
    folder = shutil.copytree(workdir, tmp_path / "run")
    (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\nThing = None\n")
    (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace("outer:OUTER*2", f"evil:Thing{suffix}")
    )
    monkeypatch.syspath_prepend(folder)
    with pytest.raises(UserError, match="Opening a model never runs code from its folder"):
        open_model(epath.Path(folder))
    assert not (tmp_path / "ran").exists()


def test_what_only_training_needs_is_never_imported_to_open_a_model(workdir, tmp_path, monkeypatch):
    folder = shutil.copytree(workdir, tmp_path / "run")
    config = (folder / "config.json").read_text()
    for key in ("data.source", "objective"):
        config = config.replace(OWN[key], "evil:Thing")
    (folder / "config.json").write_text(config)
    (tmp_path / "evil.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    options = [f"--checkpoint={folder}", "--benchmark=brightness:Brightness", f"--out={tmp_path / 'out'}"]
    assert run_command(evaluate.main, options) == 0
    assert not (tmp_path / "ran").exists()
