"""Runs, imported folders, exports and configs from before parameter paths changed keep working.

tests/old/made_by_1994f00.tar.xz was made by commit 1994f00 with tests/tiny.py: ``run``, six steps, of which only the
checkpoint of step 4 is kept; its exports ``native`` and ``hf``; and ``imported``, which is ``hf`` imported again.
"""

import json
import pathlib
import tarfile

import numpy as np
import pytest
from etils import epath
from tiny import Setup

from stf_jax.cli import run_command
from stf_jax.evals.verify import verify
from stf_jax.main import main
from stf_jax.weights.folder import load_params
from stf_jax.weights.model import open_model

ARCHIVE = pathlib.Path(__file__).parent / "old" / "made_by_1994f00.tar.xz"
LOSSES = {5: 6.0497002601623535, 6: 6.025450706481934}  # of the run
TINY = f"--config={pathlib.Path(__file__).parent}/tiny.py"


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


def read_all(folder):
    saved = open_model(epath.Path(folder))
    return {path: saved.read(path) for path in saved.shapes}


@pytest.fixture(scope="module")
def resumed(old):
    """The run, resumed for its last two steps."""
    options = ["--config.mesh.data=1", "--config.checkpoint.every_steps=4", "--config.data.scenes.size=64"]
    assert run_command(main, [TINY, f"--workdir={old / 'run'}", *options]) == 0
    return old / "run"


def read_losses(workdir):
    return [(line["step"], line["loss"]) for line in map(json.loads, (workdir / "metrics.jsonl").open())]


def test_an_old_run_resumes_where_it_stopped(resumed):
    *earlier, fifth, sixth = read_losses(resumed)
    assert [step for step, _ in earlier] == [1, 2, 3, 4]  # they are not repeated
    expected = [(5, LOSSES[5]), (6, LOSSES[6])]
    np.testing.assert_allclose([fifth, sixth], expected, rtol=1e-6)


def test_old_folders_have_todays_parameters(old):
    layout = Setup.of().plan.shapes
    imported = read_all(old / "imported")
    assert {path: value.shape for path, value in imported.items()} == {path: x.shape for path, x in layout.items()}
    for other in (read_all(old / "hf"), read_native(old / "native")):
        assert other.keys() == imported.keys()
        for path, value in imported.items():
            np.testing.assert_array_equal(other[path], value, path)


def read_native(folder):
    setup = Setup.of()
    return {path: np.asarray(value) for path, value in load_params(str(folder), setup.layout.params, ()).items()}


def test_an_old_export_answers_like_its_run(old, resumed):
    pairs = verify(epath.Path(resumed), old / "hf", 4, 6)
    assert [pair.jax for pair in pairs] == [pair.pytorch for pair in pairs]


def test_rules_of_old_configs_find_their_parameters():
    setup = Setup.of(rules=(("fusion/(mbtf|tokens)/.*", "train"), (".*", "freeze")))
    assert setup.layout.trainable.keys() == {path for path in setup.plan.shapes if path.startswith("fusion/")}


def test_init_missing_of_old_configs_finds_its_parameters(old):
    layout = Setup.of().layout.params
    loaded = load_params(str(old / "native"), layout, ("fusion/tokens/.*",))
    missing = {"conv/kernel", "conv/bias", "out/kernel", "out/bias"}
    assert layout.keys() - loaded.keys() == {f"fusion/connector/stf/{layer}" for layer in missing}
