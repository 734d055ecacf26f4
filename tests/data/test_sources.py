"""Data sources by name: those of the package, and one of tests/plugins, which docs/your-own-data.md shows."""

import dataclasses
import pathlib
import re
import shlex
import sys

import pytest
from etils import epath
from tiny import batches, make_preprocessor, tiny

from stf_jax.api import load_config
from stf_jax.cli import run_command
from stf_jax.config import UserError
from stf_jax.data.pipeline import Batches, load_training_records
from stf_jax.data.sources.base import SOURCES
from stf_jax.main import main
from stf_jax.registry import load_object
from stf_jax.training.stages import resolve_stages, run_stages

ROOT = pathlib.Path(__file__).parents[2]
PLUGIN = ROOT / "tests" / "plugins" / "squares.py"
TINY = f"--config={ROOT / 'tests' / 'tiny.py'}"
SQUARES = "squares:open_squares"


@pytest.fixture(scope="module", autouse=True)
def plugins():
    sys.path.insert(0, str(PLUGIN.parent))
    yield
    sys.path.remove(str(PLUGIN.parent))


@pytest.fixture(scope="module")
def page():
    """The section of the page, from its title to the next."""
    text = (ROOT / "docs" / "your-own-data.md").read_text()
    return re.search(r"^## A source of your own\n(.*?)(^## |\Z)", text, re.MULTILINE | re.DOTALL)[1]


def test_the_page_shows_the_plugin(page):
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert code == PLUGIN.read_text().split('"""\n\n', 1)[1]


def test_the_command_of_the_page_names_it(page):
    (command,) = re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    words = shlex.split(command.replace("\\\n", ""))
    assert words[:3] == ["python", "-m", "stf_jax.main"]
    assert f"--config.data.source={SQUARES}" in words[3:]


def test_the_sources_of_the_package():
    assert sorted(SOURCES.known) == ["llava", "scenes"]


def test_one_of_your_own_gives_the_batches():
    config = tiny(**{"data.source": SQUARES})
    records = load_training_records(config)
    assert len(records) == 1000
    for record in (records[index] for index in range(8)):
        color = load_object("squares:COLORS", "")[record.turns[1].text.split()[-1].strip(".")]
        assert color in {color for _, color in record.images[0]().getcolors()}
    (batch,) = batches(config, 1)
    assert batch.images.shape == (8, 1, 64, 64, 3)
    assert (batch.images != 255).any((1, 2, 3, 4)).all()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("scene", "Unknown data.source 'scene'; did you mean 'scenes'?"),
        ("squares", "Unknown data.source 'squares'; known: llava, scenes."),
        ("circles:open_circles", "no module circles; is its folder on PYTHONPATH?"),
        ("squares:open_square", "module squares has no open_square."),
        ("squares:Squares", "data.source=squares:Squares is not a function that opens data sets."),
        ("squares:COLORS", "data.source=squares:COLORS is not a function that opens data sets."),
    ],
)
def test_wrong_names_are_refused(name, reason, tmp_path, capsys):
    options = [TINY, f"--config.data.source={name}", f"--workdir={tmp_path / 'run'}"]
    assert run_command(main, options) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_sources_of_all_stages_are_found_before_the_first(tmp_path):
    config = load_config("demo")
    config.data.source = "llava"  # the default, which stages may override
    config.stages.pretrain.data.source, config.stages.finetune.data.source = "scenes", "scene"
    with pytest.raises(UserError, match="did you mean 'scenes'"):
        resolve_stages(config, epath.Path(tmp_path))


class Short:
    name = "short"
    cells = 8

    def __init__(self, *records):
        self.records = records

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        return self.records[index]


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("model.fusion.fusion", "stff", "Unknown model.fusion.fusion 'stff'"),
        ("objective", "next", "Unknown objective 'next'"),
        ("rules", ((".*", "lora:rank=0"),), "adapter=lora:rank=0: rank must be at least 1"),
        ("data.template", "v2", "Unknown data.template='v2'"),
        ("eval.benchmarks", ("scene",), "Unknown benchmark 'scene'"),
    ],
)
def test_other_names_of_all_stages_are_checked_before_the_first(key, value, reason, tmp_path):
    stages = [dataclasses.replace(tiny(**changes), name=name) for name, changes in (("a", {}), ("b", {key: value}))]
    with pytest.raises(UserError, match=re.escape(reason)):
        next(run_stages(stages, epath.Path(tmp_path)))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("data_sets", "reason"),
    [
        (Short("a"), "must return a list of data sets with name, __len__ and __getitem__."),
        ([Short("a"), "b"], "must return a list of data sets with name, __len__ and __getitem__."),
        ([], "opens a data set without records."),
        ([Short("a"), Short()], "opens a data set without records."),
        ([Short("a")], "go together"),  # the model has no head for cells
    ],
)
def test_what_a_source_returns_is_checked(data_sets, reason, monkeypatch):
    monkeypatch.setattr("squares.open_squares", lambda config: data_sets)
    with pytest.raises(UserError, match=re.escape(reason)):
        load_training_records(tiny(**{"data.source": SQUARES}))


def test_the_labels_of_a_source_fit_the_model(monkeypatch):
    monkeypatch.setattr("squares.open_squares", lambda config: [Short("a")])
    with pytest.raises(UserError, match="Images of short have 8×8 cells"):
        load_training_records(tiny(**{"data.source": SQUARES, "model.cells": 3}))
    assert len(load_training_records(tiny(**{"data.source": SQUARES, "model.cells": 2}))) == 1  # a grid of 4×4 patches


def test_several_data_sets_are_mixed(monkeypatch):
    squares = load_object("squares:Squares", "")
    monkeypatch.setattr("squares.open_squares", lambda config: [squares(0, 10), squares(1, 30)])
    changes = {"data.source": SQUARES, "global_batch_size": 1}
    counts = [steps_per_epoch(**changes, **{"data.mix": mix}) for mix in ((), (2.0, 0.0))]
    assert counts == [40, 20]


def steps_per_epoch(**changes):
    config = tiny(**changes)
    stream = Batches(config, load_training_records(config), make_preprocessor(config), host=0, hosts=1)
    stream.close()
    return stream.plan.steps(1)
