"""What a variant costs is measured once, on its share of the machine."""

import json
import os
import subprocess
import types

import make_study
import pytest

from stf_jax.config import RunFailed
from stf_jax.studies import cost
from stf_jax.studies.runner import Slot
from stf_jax.studies.study import cells


@pytest.fixture
def asked(monkeypatch):
    """Each measurement's command, processors and environment, instead of it; ``status`` is what it ends with."""
    seen = types.SimpleNamespace(status=0, times=[])

    def run(command, env, stderr, **_):
        seen.times.append((command[1:], os.sched_getaffinity(0), env))
        stderr.write("what it said")
        said = f"something else\n{json.dumps(make_study.COST)}\n"
        return subprocess.CompletedProcess(command, seen.status, said if not seen.status else "")

    monkeypatch.setattr(cost.subprocess, "run", run)
    return seen


@pytest.fixture
def made(tmp_path):
    """Cells that are done, but not measured."""
    every = cells(make_study.study(), tmp_path)
    for cell in every:
        make_study.finish(cell)
        (cell.folder / "cost.json").unlink()
    return every


def test_it_is_measured_once(made, asked):
    before = os.sched_getaffinity(0)
    slot = Slot(frozenset([min(before)]), {"MALLOC_ARENA_MAX": "2"})
    mlp, _, fastv = made[:3]
    for _ in range(2):
        assert cost.cost(mlp, slot) == cost.cost(fastv, slot) == make_study.COST
    first, second = asked.times
    assert first[0] == ["-m", "stf_jax.studies.cost", str(mlp.folder / "finetune")]
    assert second[0] == ["-m", "stf_jax.studies.cost", str(mlp.folder / "finetune"), "--reduce=fastv"]
    assert first[1] == {min(before)}
    assert first[2]["MALLOC_ARENA_MAX"] == "2"
    assert first[2]["PATH"] == os.environ["PATH"]
    assert os.sched_getaffinity(0) == before


def test_what_cannot_be_measured_says_where_the_log_is(made, asked):
    asked.status = 1
    with pytest.raises(RunFailed, match=r"What mlp, seed 0 costs could not be measured: see .*cost\.txt"):
        cost.cost(made[0], Slot(frozenset(os.sched_getaffinity(0)), {}))
    assert (made[0].folder / "cost.txt").read_text() == "what it said"
    assert not (made[0].folder / "cost.json").exists()
    assert len(os.sched_getaffinity(0)) >= 1
    asked.status = 0
    assert cost.cost(made[0], Slot(frozenset(os.sched_getaffinity(0)), {})) == make_study.COST
