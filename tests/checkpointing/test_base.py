"""Runs that do not save the frozen parameters of the weights that they start from."""

import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from run_process import ROOT, metric_lines
from safetensors.numpy import save_file
from tiny import Setup, quantized_by_definition, random_params, tiny

from stf_jax.checkpointing.items import read_shapes
from stf_jax.checkpointing.params import SavedParams
from stf_jax.cli import run_command
from stf_jax.config import UserError
from stf_jax.main import main
from stf_jax.models.blueprint import blueprint
from stf_jax.models.quantized import scale_path
from stf_jax.weights.folder import open_params

RULES = (("llm/blocks/attention/.*", "lora:rank=2@nf4"), ("llm/.*", "lora:rank=2@int8"), ("vision/.*", "freeze"))
RULES += (("fusion/.*", "train"),)
FRESH = "llm/norm/scale"  # frozen, and not in the base
CHANGES = {
    "mesh.data": 1,
    "model.fusion.fusion": "mlp",
    "model.precision": "bfloat16",
    "init_missing": ("fusion/.*", FRESH),
    "rules": RULES,
    "checkpoint.every_steps": 1,
    "checkpoint.keep_last": 3,
    "checkpoint.save_frozen": False,
}


def _main(folder, *options):
    """Trains in ``folder/run`` from ``folder/base``, which is named by a relative path."""
    flags = [f"--config.{key}={value}" for key, value in CHANGES.items()]
    os.chdir(folder)
    return run_command(
        main, [f"--config={ROOT}/tests/tiny.py:steps=2", *flags, "--config.init_from=base", "--workdir=run", *options]
    )


def _write_base(folder, change=None):
    params = random_params(blueprint(tiny(**CHANGES).model).shapes)
    if change:
        params[change].flat[-1] += 1
    folder.mkdir(exist_ok=True)
    params = {path: x for path, x in params.items() if path != FRESH and not path.startswith("fusion/")}
    save_file(params, folder / "model.safetensors")
    return params


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the base and a run of two steps, and the base's parameters."""
    folder, before = epath.Path(tmp_path_factory.mktemp("base")), os.getcwd()
    params = _write_base(folder / "base")
    assert _main(folder) == 0
    os.chdir(before)
    return folder, params


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """A copy of that folder in another place, as if that folder were gone."""
    shutil.copytree(made[0], tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "copy" / "run" / "base.json"
    file.write_text(file.read_text().replace(f"{made[0]}/base", f"{made[0]}/gone/base"))
    return epath.Path(tmp_path / "copy")


def test_the_run_has_no_array_of_its_base(made):
    folder, params = made
    items = {epath.Path(file.parent) for file in pathlib.Path(folder / "run").rglob("_METADATA")}
    assert {item.name for item in items} == {"frozen", "trainable", "moments"}
    paths = {path for item in items if item.name != "moments" for path in read_shapes(item)}
    assert FRESH in paths
    assert not paths & params.keys()
    assert not paths & set(map(scale_path, params))


def test_a_resumed_run_ends_with_the_same_bits_and_may_save_its_base(made, folder):
    """With save_frozen=True, the base is not needed from then on."""
    shutil.rmtree(folder / "run" / "checkpoints" / "2")
    assert _main(folder, "--config.checkpoint.save_frozen=True") == 0
    shutil.rmtree(folder / "base")
    expected, found = made[0] / "run", folder / "run"
    assert [json.loads(line)["loss"] for line in metric_lines(found)] == [
        json.loads(line)["loss"] for line in metric_lines(expected)
    ]
    for source in (SavedParams, open_params):
        params = source(expected)
        assert {path: source(found).read(path).tobytes() for path in params.shapes} == {
            path: params.read(path).tobytes() for path in params.shapes
        }
    assert not (found / "base.json").exists()


def test_it_is_opened_with_its_base(made, folder):
    """On the host and on devices, also when both folders were moved: bit by bit, but for the merged adapters."""
    _, params = made
    opened, own, setup = open_params(folder / "run"), SavedParams(folder / "run"), Setup.of(**CHANGES)
    restored = dict(opened.restore(blueprint(setup.config.model).shardings(setup.mesh)))
    assert restored.keys() == opened.shapes.keys() == blueprint(setup.config.model).shapes.keys()
    for path, value in params.items():
        expected = value
        if path in setup.plan.quantized:
            layers = zip(*quantized_by_definition(setup.plan, path, value).values(), strict=True)
            expected = np.stack([setup.plan.quantized[path].dequantize(*layer) for layer in layers])
            a, b = (np.float64(own.read(f"{path.removesuffix('kernel')}adapter/{name}")) for name in "ab")
            expected = expected + 2 * (a.reshape(len(a), -1, 2) @ b.reshape(len(b), 2, -1)).reshape(value.shape)
        for found in (opened.read(path), np.asarray(restored[path])):
            assert found.dtype == jnp.bfloat16
            tolerance = 0 if path not in setup.plan.quantized else np.abs(expected).max() / 128
            np.testing.assert_allclose(
                np.float32(found), np.float32(jnp.bfloat16(expected)), rtol=0, atol=tolerance, err_msg=path
            )


def test_a_base_with_other_values_is_refused(folder, capsys):
    """With the folder and the parameter; and nothing is changed."""
    first = "llm/blocks/mlp/up/kernel"
    _write_base(folder / "base", first)
    before = _files(folder)
    assert _main(folder) == 2
    message = capsys.readouterr().err
    assert f"{folder / 'base'} no longer has the weights that the run in {folder / 'run'} started from" in message
    assert f"{first} differs" in message
    assert _files(folder) == before
    for path in (first, "vision/blocks/mlp/up/bias"):
        _write_base(folder / "base", path)
        opened = open_params(folder / "run")
        with pytest.raises(UserError, match=f"^{folder}/base no longer .* {path} differs"):
            opened.read(path)
        with pytest.raises(UserError, match=f"{path} differs"):
            list(opened.restore({path: jax.sharding.SingleDeviceSharding(jax.devices()[0])}))


def _files(folder):
    files = (file for file in pathlib.Path(folder / "run").rglob("*") if file.is_file())
    return {file: file.read_bytes() for file in files if file.name not in ("events.jsonl", "run.lock")}


def test_a_missing_base_is_refused_until_it_is_named(made, folder, capsys):
    (folder / "base").rename(folder / "moved")
    assert _main(folder) == 2
    assert "did not save the frozen parameters that it started from: init_from names base" in capsys.readouterr().err
    with pytest.raises(UserError, match=f"did not save the frozen .* init_from names {made[0]}/gone/base"):
        open_params(folder / "run")
    assert _main(folder, "--config.init_from=moved") == 0
    assert json.loads((folder / "run" / "base.json").read_text())["init_from"] == [str(folder / "moved")]
    assert open_params(folder / "run").shapes.keys() == open_params(made[0] / "run").shapes.keys()


def test_a_run_with_a_wrong_base_json_is_refused(folder):
    """An object of another form counts as none."""
    file = folder / "run" / "base.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_from": [str(folder / "run")]}))
    with pytest.raises(UserError, match=r"run/base.json names the run itself"):
        open_params(folder / "run")
    for text in ("", '{"init_from": "base", "parameters": {}}'):
        (folder / "run" / "base.json").write_text(text)
        with pytest.raises(UserError, match=r"run/base.json.* did not save llm/.*, is damaged or missing"):
            open_params(folder / "run")
