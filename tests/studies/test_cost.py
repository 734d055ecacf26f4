"""The cost of a variant is measured once, on its slot of the machine."""

import json
import os
import subprocess
import types

import make_study
import numpy as np
import pytest
from tiny import batches, tiny

from stf_jax.config import RunFailed
from stf_jax.studies import cost
from stf_jax.studies.runner import Slot
from stf_jax.studies.study import make_cells
from stf_jax.training.timing import make_batch


@pytest.fixture
def measurements(monkeypatch):
    """Replaces measurements: records their commands, CPUs and environments; ``status`` is their exit status."""
    recorded = types.SimpleNamespace(status=0, calls=[])

    def run(command, env, stderr, **_):
        recorded.calls.append((command[1:], os.sched_getaffinity(0), env))
        stderr.write("an error")
        output = f"something else\n{json.dumps(make_study.COST)}\n"
        return subprocess.CompletedProcess(command, recorded.status, output if not recorded.status else "")

    monkeypatch.setattr(cost.subprocess, "run", run)
    return recorded


@pytest.fixture
def cells(tmp_path):
    """Finished cells without costs."""
    cells = make_cells(make_study.study(), tmp_path)
    for cell in cells:
        make_study.finish(cell)
        (cell.folder / "cost.json").unlink()
    return cells


def test_it_is_measured_once(cells, measurements):
    before = os.sched_getaffinity(0)
    slot = Slot(frozenset([min(before)]), {"MALLOC_ARENA_MAX": "2"})
    mlp, _, fastv = cells[:3]
    for _ in range(2):
        assert cost.measure_cost(mlp, slot) == cost.measure_cost(fastv, slot) == make_study.COST
    first, second = measurements.calls
    assert first[0] == ["-m", "stf_jax.studies.cost", str(mlp.folder / "finetune")]
    assert second[0] == ["-m", "stf_jax.studies.cost", str(mlp.folder / "finetune"), "--reduce=fastv"]
    assert first[1] == {min(before)}
    assert first[2]["MALLOC_ARENA_MAX"] == "2"
    assert first[2]["PATH"] == os.environ["PATH"]
    assert os.sched_getaffinity(0) == before


def test_a_failed_measurement_names_its_log(cells, measurements):
    measurements.status = 1
    with pytest.raises(RunFailed, match=r"The cost of mlp, seed 0 could not be measured: see .*cost\.txt"):
        cost.measure_cost(cells[0], Slot(frozenset(os.sched_getaffinity(0)), {}))
    assert (cells[0].folder / "cost.txt").read_text() == "an error"
    assert not (cells[0].folder / "cost.json").exists()
    assert len(os.sched_getaffinity(0)) >= 1
    measurements.status = 0
    assert cost.measure_cost(cells[0], Slot(frozenset(os.sched_getaffinity(0)), {})) == make_study.COST


def test_the_questions_that_are_timed_may_be_fewer_than_a_batch():
    """The prompts' lengths are those of the questions, too."""
    asked = []

    def generate(records, most, rows):
        asked.append((len(records), most, rows))
        return iter(())

    prompt = types.SimpleNamespace(tokens=np.zeros(7), is_image=np.array([True, True, False]))
    generator = types.SimpleNamespace(generate=generate, prompt=lambda record: prompt)
    config = tiny(**{"eval.benchmarks": ("scenes",), "eval.limit": 3, "eval.batch": 64})
    _, rows, longest, image_tokens = cost._time_first_token(generator, config)
    assert (longest, image_tokens) == (7, 2)
    assert set(asked) == {(rows, 1, rows)}
    assert rows < 64


@pytest.mark.parametrize("marks", ["newline", "none"])
def test_the_batch_that_is_timed_has_the_tiles_of_a_run(marks):
    config = tiny(**{"data.aspect": "tiles", "data.tiles.marks": marks, "data.max_length": 256})
    (batch,), timed = batches(config, 1), make_batch(config)
    assert timed.images.shape == batch.images.shape == (8, 5, 64, 64, 3)
    for expected, found in zip(batch.image_slots, timed.image_slots, strict=True):
        np.testing.assert_array_equal(found[found != -1], expected[expected != -1])
