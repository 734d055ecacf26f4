"""docs/your-own-fusion.md: its code is that of examples/, and its fusion does all that the package's do."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from etils import epath
from tiny import tiny

from stf_jax.cli import run_command
from stf_jax.config import UserError
from stf_jax.convert import main as convert
from stf_jax.evals.verify import verify
from stf_jax.main import main
from stf_jax.models.fusions.base import FUSIONS, FusionSpec
from stf_jax.registry import load_object
from stf_jax.training.flops import prefill_flops
from stf_jax.weights.export_hf import find_torch_file
from stf_jax.weights.model import open_model

ROOT = pathlib.Path(__file__).parents[1]
NAME = "gated_pool:GatedPool"
FILES = ("gated_pool.py", "gated_pool_study.py", "gated_pool_torch.py")  # in the order of the page
TINY = f"--config={ROOT}/tests/tiny.py:fusion={NAME}"


@pytest.fixture(scope="module", autouse=True)
def examples():
    sys.path.insert(0, str(ROOT / "examples"))
    yield
    sys.path.remove(str(ROOT / "examples"))


def read_page():
    return (ROOT / "docs" / "your-own-fusion.md").read_text()


def test_the_page_shows_the_examples():
    code = re.findall(r"^```python\n(.*?)^```", read_page(), re.MULTILINE | re.DOTALL)
    for block, name in zip(code, FILES, strict=True):
        assert (ROOT / "examples" / name).read_text().split('"""\n\n', 1)[1] == block


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("plugin") / "run"
    assert run_command(main, [TINY, f"--workdir={workdir}", "--config.mesh.data=1", "--config.steps=4"]) == 0
    return workdir


def test_it_trains_and_resumes(workdir):
    assert run_command(main, [TINY, f"--workdir={workdir}", "--config.mesh.data=1"]) == 0
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_its_flops_are_counted():
    model = tiny(**{"model.fusion.fusion": NAME}).model
    patches, tokens, width, out = 16, 4, 32, 32
    expected = 2 * (patches * width + tokens * (width * out + out * out))
    assert prefill_flops(model, 3, 8, 1)["fusion"] == 3 * expected


def test_its_export_answers_the_same_in_pytorch_and_is_imported(workdir, tmp_path):
    assert run_command(convert, ["export", str(workdir), "--format=hf", f"--to={tmp_path / 'export'}"]) == 0
    pairs = verify(epath.Path(workdir), tmp_path / "export", 4, 6)
    assert [pair.jax for pair in pairs] == [pair.pytorch for pair in pairs]
    assert run_command(convert, ["import", str(tmp_path / "export"), f"--to={tmp_path / 'imported'}"]) == 0
    saved, imported = open_model(epath.Path(workdir)), open_model(epath.Path(tmp_path / "imported"))
    assert imported.description.fusion.fusion == NAME
    assert saved.shapes.keys() == imported.shapes.keys()
    for path in saved.shapes:
        np.testing.assert_array_equal(saved.read(path), imported.read(path))


def test_without_a_twin_it_is_not_exported_to_pytorch(workdir, tmp_path, monkeypatch, capsys):
    monkeypatch.delattr(load_object(NAME, ""), "torch_file")
    assert run_command(convert, ["export", str(workdir), "--format=hf", f"--to={tmp_path / 'export'}"]) == 2
    message = capsys.readouterr().err
    assert f"{NAME} has no PyTorch twin to export: set torch_file in its class" in message
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gated_pul:GatedPool", "no module gated_pul; is its folder on PYTHONPATH?"),
        ("gated_pool.more:GatedPool", "no module gated_pool.more; is its folder on PYTHONPATH?"),
        ("gated_pool:GatedPull", "module gated_pool has no GatedPull."),
        ("gated_pool:", "one from outside is named package.module:Thing."),
        ("gated_pool:gelu", "has no class attribute `spec = FusionSpec(...)`."),
        ("gated_pool", "did you mean 'avg_pool'?"),
    ],
)
def test_wrong_names_are_explained(name, reason, tmp_path, capsys):
    options = [
        f"--config={ROOT}/tests/tiny.py",
        f"--config.model.fusion.fusion={name}",
        f"--workdir={tmp_path / 'run'}",
    ]
    assert run_command(main, options) == 2
    message = capsys.readouterr().err
    assert "model.fusion.fusion" in message
    assert reason in message
    assert not (tmp_path / "run").exists()


def test_an_import_that_fails_in_a_module_is_not_a_wrong_name(tmp_path, monkeypatch):
    (tmp_path / "broken_fusion.py").write_text("import a_module_that_does_not_exist\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_does_not_exist"):
        FUSIONS.find("broken_fusion:Mine")


def test_every_fusion_of_the_package_has_a_twin():
    names = FUSIONS.known.keys() - {"mlp"}  # an export of which is transformers' own LLaVA
    assert all(find_torch_file(tiny(**{"model.fusion.fusion": name}).model.fusion).is_file() for name in names)


def test_a_twin_that_does_not_exist_is_reported_before_anything_is_written(workdir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(load_object(NAME, ""), "torch_file", "gone.py")
    assert run_command(convert, ["export", str(workdir), "--format=hf", f"--to={tmp_path / 'export'}"]) == 2
    assert "names torch_file='gone.py', but" in capsys.readouterr().err
    assert not (tmp_path / "export").exists()


def test_a_wrong_number_of_tokens_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(load_object(NAME, ""), "spec", FusionSpec(merges=False, windows=False))
    assert run_command(main, [TINY, f"--workdir={tmp_path / 'run'}", "--config.mesh.data=1"]) == 2
    sentence = f"{NAME} returns 4 tokens of width 32 per image; its spec and the model need 16 of width 32."
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["run", "export"])
@pytest.mark.parametrize("place", ["", "stranger"])  # the folder itself on the path, and its parent
def test_code_in_a_models_folder_is_never_run(workdir, tmp_path, monkeypatch, kind, place):
    """A downloaded folder may name its own file as its fusion."""
    folder = tmp_path / "stranger"
    if kind == "run":
        shutil.copytree(workdir, folder)
    else:
        assert run_command(convert, ["export", str(workdir), "--format=hf", f"--to={folder}"]) == 0
    (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\nThing = None\n")
    name = f"{place}.evil:Thing".lstrip(".")
    for file in folder.glob("*.json"):
        file.write_text(file.read_text().replace(NAME, name))
    monkeypatch.syspath_prepend(tmp_path if place else folder)
    with pytest.raises(UserError, match="Opening a model never runs code from its folder"):
        open_model(epath.Path(folder))
    assert not (tmp_path / "ran").exists()


def test_a_fusion_per_patch_does_not_merge():
    with pytest.raises(ValueError, match="does not merge"):
        FusionSpec(per_patch=True)


@pytest.mark.slow
def test_the_commands_of_the_page(tmp_path):
    """All of them, in an empty folder with copies of the files, ends with status 0. The study has fewer steps
    and questions."""
    for name in FILES:
        shutil.copyfile(ROOT / "examples" / name, tmp_path / name)
    study = tmp_path / "gated_pool_study.py"
    less = '    config.base += ":steps=20"\n    config.common += ("eval.limit=64",)\n    return config'
    study.write_text(study.read_text().replace("    return config", less))
    commands = "\n".join(re.findall(r"^```sh\n(.*?)^```", read_page(), re.MULTILINE | re.DOTALL))
    environment = os.environ | {"PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment.pop("JAX_NUM_CPU_DEVICES", None)
    subprocess.run(["bash", "-e", "-c", commands], cwd=tmp_path, env=environment, check=True)
    assert json.loads((tmp_path / "runs" / "study" / "report.json").read_text())
    assert "gated_pool" in (tmp_path / "runs" / "study" / "report.md").read_text()
