"""Numbers that go wrong: an update is skipped, counted and told; too many in a row end the run, with what it was at."""

import dataclasses
import json
import pathlib
import re

import jax
import numpy as np
import optax
import pytest
from started import saved
from tiny import Setup, batches, preparation

from stf_jax.config import FaultsConfig, RunFailed
from stf_jax.data.pipeline import Batches, training_records
from stf_jax.main import main
from stf_jax.runtime.cli import door
from stf_jax.training.watching import Watch

ROOT = pathlib.Path(__file__).parents[2]


# ---- The step --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setup():
    return Setup.of(**{"mesh.data": 2, "optimizer.warmup_ratio": 0.0})


@pytest.fixture(scope="module")
def step(setup):
    return setup.step()


def _poisoned(state, path, value):
    """The state with one parameter's first number replaced."""
    leaf = np.array(state.trainable[path])
    leaf.flat[0] = value
    return dataclasses.replace(
        state, trainable=state.trainable | {path: jax.device_put(leaf, state.trainable[path].sharding)}
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38], ids=str)
def test_an_update_from_what_is_not_finite_is_not_made(setup, step, value):
    batch = batches(setup.config, 1)[0]
    path = "llm/norm/scale"
    before = _poisoned(setup.state(), path, value)
    kept = jax.tree.map(np.array, before)
    after, metrics = step(before, batch)
    assert metrics["skipped"]
    assert not np.isfinite(float(metrics["loss"])) or not np.isfinite(float(metrics["gradient_norm"]))
    assert int(after.step) == 1  # the batch is done with
    for name in ("trainable", "moments"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(kept, name))


@pytest.mark.parametrize(("moment", "value"), [("nu", -1.0), ("mu", np.inf)])
def test_an_update_that_would_write_what_is_not_finite_is_not_made(setup, step, moment, value):
    """Loss and gradients are finite; what AdamW makes of them is not."""
    before, path = setup.state(), "llm/norm/scale"
    leaf = np.array(optax.tree_utils.tree_get(before.moments, moment)[path])
    leaf.flat[0] = value
    tree = optax.tree_utils.tree_get(before.moments, moment) | {
        path: jax.device_put(leaf, before.trainable[path].sharding)
    }
    before = dataclasses.replace(before, moments=optax.tree_utils.tree_set(before.moments, **{moment: tree}))
    kept = jax.tree.map(np.array, before)
    after, metrics = step(before, batches(setup.config, 1)[0])
    assert metrics["skipped"]
    assert np.isfinite(float(metrics["loss"]))
    assert np.isfinite(float(metrics["gradient_norm"]))
    for name in ("trainable", "moments"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(kept, name))


def test_skipped_updates_leave_no_trace(setup, step):
    """Neither of a batch without a target token, nor of a count: the next update is the one it would have been."""
    first, second = batches(setup.config, 2)
    empty = dataclasses.replace(second, loss_mask=np.zeros_like(second.loss_mask))
    states = []
    for stream in ([first, second], [first, empty, empty, second]):
        state = setup.state()
        for batch in stream:
            state, metrics = step(state, batch)
            assert bool(metrics["skipped"]) == (batch is empty)
            assert (metrics["learned_tokens"] == 0) == (batch is empty)
        assert int(state.step) == len(stream)
        states.append(jax.tree.map(np.array, state))
    for name in ("trainable", "moments"):
        jax.tree.map(np.testing.assert_array_equal, *(getattr(state, name) for state in states))


def test_an_update_that_is_finite_is_made(setup, step):
    state = setup.state()
    before = jax.tree.map(np.array, state)
    after, metrics = step(state, batches(setup.config, 1)[0])
    assert not metrics["skipped"]
    for path, value in before.trainable.items():
        assert (np.asarray(after.trainable[path]) != value).any(), path


# ---- The watch -------------------------------------------------------------------------------------------------------


class _Watched:
    """A watch, and what it told."""

    def __init__(self, workdir, in_a_row=0, **faults):
        self.told, self.skipped = [], 0
        self.watch = Watch(FaultsConfig(**faults), workdir, self._records, self._tell, self._skipped, in_a_row)

    def _skipped(self):
        self.skipped += 1

    def _records(self, step):
        return [[f"{step}a", f"{step}b"], [], [f"{step}c"]]

    def _tell(self, kind, step, **facts):
        self.told.append((kind, step, facts))

    def note(self, step, loss=1.0, skipped=False, tokens=5):
        metrics = {"loss": loss, "gradient_norm": 2.0, "skipped": skipped or not tokens, "learned_tokens": tokens}
        batch = dataclasses.make_dataclass("Rows", ["tokens"])(np.full((2, 3), step))
        self.watch.note(step, batch, {name: np.asarray(value) for name, value in metrics.items()})


def test_steps_are_looked_at_two_later(tmp_path):
    """So that the devices always have one to work at."""
    watched = _Watched(tmp_path)
    for step in (1, 2, 3):
        watched.note(step, np.nan, skipped=True)
        assert watched.skipped == max(0, step - 2)
    watched.watch.catch_up()
    assert watched.skipped == 3
    assert [(kind, step) for kind, step, _ in watched.told] == [("skipped", 1), ("skipped", 2), ("skipped", 3)]
    assert watched.told[1][2]["records"] == ["2a", "2b", "2c"]
    json.dumps(watched.told, allow_nan=False)


def test_a_loss_that_leaps_is_told_once_with_its_records(tmp_path, caplog):
    watched = _Watched(tmp_path, spike=2.0)
    for step in range(1, 81):
        watched.note(step, {40: 2.1, 60: 9.0, 61: 8.0, 62: 7.0, 70: 1.9}.get(step, 1.0))
    watched.watch.catch_up()
    assert [(kind, step) for kind, step, _ in watched.told] == [("spike", 40), ("spike", 60)]
    assert watched.told[0][2] == {"loss": pytest.approx(2.1), "usual": 1.0, "records": ["40a", "40b", "40c"]}
    assert "Step 60: loss 9.000, where 1.000 is usual; its records: 60a, 60b, 60c." in caplog.text


def test_what_is_usual_is_so_of_late(tmp_path):
    watched = _Watched(tmp_path, spike=2.0)
    for step in range(1, 122):
        watched.note(step, 10.0 if step <= 60 else 3.0 if step == 121 else 1.0)
    watched.watch.catch_up()
    assert [(kind, step) for kind, step, _ in watched.told] == [("spike", 121)]


@pytest.mark.parametrize(("spike", "steps"), [(0.0, 80), (2.0, 20)])
def test_no_leap_is_told_where_none_is_asked_for_or_too_little_is_known(tmp_path, spike, steps):
    watched = _Watched(tmp_path, spike=spike)
    for step in range(1, steps + 1):
        watched.note(step, 50.0 if step == steps else 1.0)
    watched.watch.catch_up()
    assert not watched.told


def test_so_many_in_a_row_are_borne_and_no_more(tmp_path):
    watched = _Watched(tmp_path, skipped_updates=3)
    for step in range(1, 9):
        watched.note(step, np.nan, skipped=step != 4)  # three, one that is well, four
    with pytest.raises(RunFailed, match=rf"in 4 steps in a row .*skipped_updates=3.* the last of them 8.*{tmp_path}"):
        watched.watch.catch_up()
    folder = tmp_path / "failures" / "step_8"
    told = json.loads((folder / "step.json").read_text())
    assert (told["step"], told["records"]) == (8, [["8a", "8b"], [], ["8c"]])
    np.testing.assert_array_equal(np.load(folder / "batch.host0.npz", allow_pickle=False)["tokens"], np.full((2, 3), 8))


def test_skipped_updates_are_counted_over_a_restart(tmp_path):
    watched = _Watched(tmp_path, skipped_updates=3, in_a_row=2)
    watched.note(9, np.nan, skipped=True)
    watched.watch.catch_up()
    assert watched.watch.in_a_row == 3
    watched.note(10, np.nan, skipped=True)
    with pytest.raises(RunFailed, match="in 4 steps in a row"):
        watched.watch.catch_up()


def test_batches_without_a_learned_token_are_counted_and_do_not_end_a_run(tmp_path, caplog):
    watched = _Watched(tmp_path, skipped_updates=3)
    for step in range(1, 31):
        watched.note(step, 0.0 if step > 5 else 1.0, tokens=0 if step > 5 else 9)
    watched.watch.finish(30, 5)
    assert watched.skipped == 25
    assert [(kind, step) for kind, step, _ in watched.told] == [("empty", step) for step in range(6, 31)]
    lines = [line for line in caplog.messages if "has a target token" in line]
    assert len(lines) == 10
    assert lines[0].startswith("Step 6: no row of the batch has a target token, so no update was made; its records: 6a")
    assert lines[-1].endswith("Further such batches are only counted.")


def test_batches_without_a_learned_token_are_not_what_is_usual(tmp_path):
    """Their loss of 0 would make a leap of every other."""
    watched = _Watched(tmp_path, spike=2.0)
    for step in range(1, 81):
        watched.note(step, tokens=step % 3 == 0)
    watched.watch.catch_up()
    assert {kind for kind, _, _ in watched.told} == {"empty"}


@pytest.mark.parametrize("empty", [0, 2])
def test_a_run_does_not_end_in_skipped_updates(tmp_path, empty):
    """Nor where batches without a target token come after these."""
    watched = _Watched(tmp_path)
    for step in range(1, 11):
        watched.note(step, np.nan, skipped=step > 6, tokens=9 if step <= 10 - empty else 0)
    with pytest.raises(
        RunFailed, match=rf"ends with {4 - empty} skipped updates.* step 10 is not saved.*learning_rate"
    ):
        watched.watch.finish(10, 6)


def test_a_run_that_recovers_may_end(tmp_path):
    watched = _Watched(tmp_path)
    for step in range(1, 11):
        watched.note(step, np.nan if step < 10 else 1.0, skipped=step < 10)
    watched.watch.finish(10, 1)


def test_a_run_without_any_update_does_not_end_well(tmp_path):
    watched = _Watched(tmp_path)
    for step in range(1, 6):
        watched.note(step, 0.0, tokens=0)
    with pytest.raises(RunFailed, match="No update was made in 5 steps, because no batch has a target token"):
        watched.watch.finish(5, 0)


# ---- A run -----------------------------------------------------------------------------------------------------------


def test_a_run_that_diverges_ends_with_a_sentence_and_something_to_look_at(tmp_path, capsys):
    workdir = tmp_path / "run"
    changes = ["mesh.data=1", "optimizer.learning_rate=1e30", "faults.skipped_updates=2", "checkpoint.every_steps=3"]
    arguments = [f"--config={ROOT}/tests/tiny.py:steps=40", f"--workdir={workdir}", *(f"--config.{c}" for c in changes)]
    assert door(main, arguments) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: Updates were skipped in 3 steps in a row (faults.skipped_updates=2), because loss")
    events = [json.loads(line) for line in (workdir / "events.jsonl").read_text().splitlines()]
    skipped = [event["step"] for event in events if event["event"] == "skipped"]
    assert len(skipped) == 3
    assert skipped == list(range(skipped[0], skipped[0] + 3))
    assert (events[-1]["event"], events[-1]["status"]) == ("stopped", 1)
    # The lines are JSON to the letter, which has no NaN.
    lines = [
        json.loads(line, parse_constant=pytest.fail) for line in (workdir / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["updates_skipped"] for line in lines if line["step"] >= skipped[0]][:2] == [1, 2]
    # The dump is the batch of that step, with the ids of its records.
    folder = workdir / "failures" / f"step_{skipped[-1]}"
    config = Setup.of(steps=40, **{"mesh.data": 1}).config
    stream = Batches(config, training_records(config), preparation(config), host=0, hosts=1)
    for _ in range(skipped[-1]):
        batch = next(stream)
    found = np.load(folder / "batch.host0.npz", allow_pickle=False)
    assert {*found} == {name for name, array in vars(batch).items() if array is not None}
    for name in found:
        np.testing.assert_array_equal(found[name], getattr(batch, name))
    told = json.loads((folder / "step.json").read_text())
    assert told["records"] == stream.records(skipped[-1])
    assert [len(row) for row in told["records"]] == [1] * 8
    assert events[-2]["records"] == [name for row in told["records"] for name in row]


@pytest.mark.slow  # two runs
def test_a_run_that_ends_in_skipped_updates_is_not_done(tmp_path, capsys):
    """Its status is 1, its last step is not saved, and a restart in the middle of these updates changes nothing."""
    changes = ["mesh.data=1", "optimizer.learning_rate=1e30", "checkpoint.every_steps=3"]
    arguments = [f"--config={ROOT}/tests/tiny.py:steps=8", *(f"--config.{c}" for c in changes)]
    said = []
    for name, first in (("whole", []), ("again", ["--config.faults.skipped_updates=3"])):
        workdir = tmp_path / name
        if first:
            assert door(main, [*arguments, f"--workdir={workdir}", *first]) == 1
            assert "in 4 steps in a row (faults.skipped_updates=3)" in capsys.readouterr().err
        assert door(main, [*arguments, f"--workdir={workdir}"]) == 1
        said.append(capsys.readouterr().err.strip().splitlines()[-1])
        assert saved(workdir) == [3, 6]  # not 8
    assert re.match(r"error: The run ends with \d skipped updates, .* step 8 is not saved\.", said[0])
    assert said[1] == said[0]
