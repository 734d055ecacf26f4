"""Non-finite numbers: updates are skipped, counted and reported; too many in a row end the run with a dump."""

import dataclasses
import json
import pathlib
import re

import jax
import numpy as np
import optax
import pytest
from run_process import saved_steps
from tiny import Setup, batches, make_preprocessor

from stf_jax.cli import run_command
from stf_jax.config import FaultsConfig, RunFailed
from stf_jax.data.pipeline import Batches, load_training_records
from stf_jax.main import main
from stf_jax.training.monitor import LossMonitor

ROOT = pathlib.Path(__file__).parents[2]


# ---- The step --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setup():
    return Setup.of(**{"mesh.data": 2, "optimizer.warmup_ratio": 0.0})


@pytest.fixture(scope="module")
def step(setup):
    return setup.step()


def _with_bad_value(state, path, value):
    """The state with the first number of one parameter replaced."""
    leaf = np.array(state.trainable[path])
    leaf.flat[0] = value
    return dataclasses.replace(
        state, trainable=state.trainable | {path: jax.device_put(leaf, state.trainable[path].sharding)}
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38], ids=str)
def test_update_from_non_finite_gradients_is_skipped(setup, step, value):
    batch = batches(setup.config, 1)[0]
    path = "llm/norm/scale"
    before = _with_bad_value(setup.state(), path, value)
    kept = jax.tree.map(np.array, before)
    after, metrics = step(before, batch)
    assert metrics["skipped"]
    assert not np.isfinite(float(metrics["loss"])) or not np.isfinite(float(metrics["gradient_norm"]))
    assert int(after.step) == 1  # the batch is consumed
    for name in ("trainable", "moments"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(kept, name))


@pytest.mark.parametrize(("moment", "value"), [("nu", -1.0), ("mu", np.inf)])
def test_update_to_non_finite_parameters_is_skipped(setup, step, moment, value):
    """Loss and gradients are finite, but the result of AdamW is not."""
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


def test_skipped_updates_have_no_effect(setup, step):
    """A batch without target tokens changes no count: the next update is the same as without it."""
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


def test_finite_update_is_applied(setup, step):
    state = setup.state()
    before = jax.tree.map(np.array, state)
    after, metrics = step(state, batches(setup.config, 1)[0])
    assert not metrics["skipped"]
    for path, value in before.trainable.items():
        assert (np.asarray(after.trainable[path]) != value).any(), path


# ---- The monitor -----------------------------------------------------------------------------------------------------


class _Recorder:
    """A monitor and the events that it reports."""

    def __init__(self, workdir, in_a_row=0, **faults):
        self.events_seen, self.skipped = [], 0
        self.monitor = LossMonitor(
            FaultsConfig(**faults), workdir, self._records, self._on_event, self._on_skip, in_a_row
        )

    def _on_skip(self):
        self.skipped += 1

    def _records(self, step):
        return [[f"{step}a", f"{step}b"], [], [f"{step}c"]]

    def _on_event(self, kind, step, **facts):
        self.events_seen.append((kind, step, facts))

    def enqueue(self, step, loss=1.0, skipped=False, tokens=5):
        metrics = {"loss": loss, "gradient_norm": 2.0, "skipped": skipped or not tokens, "learned_tokens": tokens}
        batch = dataclasses.make_dataclass("Rows", ["tokens"])(np.full((2, 3), step))
        self.monitor.enqueue(step, batch, {name: np.asarray(value) for name, value in metrics.items()})


def test_steps_are_checked_with_a_lag_of_two(tmp_path):
    """So that the devices always have a step queued."""
    recorder = _Recorder(tmp_path)
    for step in (1, 2, 3):
        recorder.enqueue(step, np.nan, skipped=True)
        assert recorder.skipped == max(0, step - 2)
    recorder.monitor.drain()
    assert recorder.skipped == 3
    assert [(kind, step) for kind, step, _ in recorder.events_seen] == [("skipped", 1), ("skipped", 2), ("skipped", 3)]
    assert recorder.events_seen[1][2]["records"] == ["2a", "2b", "2c"]
    json.dumps(recorder.events_seen, allow_nan=False)


def test_loss_spike_is_reported_once_with_its_records(tmp_path, caplog):
    recorder = _Recorder(tmp_path, spike=2.0)
    for step in range(1, 81):
        recorder.enqueue(step, {40: 2.1, 60: 9.0, 61: 8.0, 62: 7.0, 70: 1.9}.get(step, 1.0))
    recorder.monitor.drain()
    assert [(kind, step) for kind, step, _ in recorder.events_seen] == [("spike", 40), ("spike", 60)]
    assert recorder.events_seen[0][2] == {"loss": pytest.approx(2.1), "usual": 1.0, "records": ["40a", "40b", "40c"]}
    assert "Step 60: loss 9.000, but the recent median is 1.000; records: 60a, 60b, 60c." in caplog.text


def test_spikes_are_relative_to_recent_losses(tmp_path):
    recorder = _Recorder(tmp_path, spike=2.0)
    for step in range(1, 122):
        recorder.enqueue(step, 10.0 if step <= 60 else 3.0 if step == 121 else 1.0)
    recorder.monitor.drain()
    assert [(kind, step) for kind, step, _ in recorder.events_seen] == [("spike", 121)]


@pytest.mark.parametrize(("spike", "steps"), [(0.0, 80), (2.0, 20)])
def test_no_spike_when_disabled_or_after_too_few_losses(tmp_path, spike, steps):
    recorder = _Recorder(tmp_path, spike=spike)
    for step in range(1, steps + 1):
        recorder.enqueue(step, 50.0 if step == steps else 1.0)
    recorder.monitor.drain()
    assert not recorder.events_seen


def test_run_fails_after_too_many_skips_in_a_row(tmp_path):
    recorder = _Recorder(tmp_path, skipped_updates=3)
    for step in range(1, 9):
        recorder.enqueue(step, np.nan, skipped=step != 4)  # three, a good one, four
    with pytest.raises(RunFailed, match=rf"in 4 steps in a row .*skipped_updates=3.* the last one, 8.*{tmp_path}"):
        recorder.monitor.drain()
    folder = tmp_path / "failures" / "step_8"
    dump = json.loads((folder / "step.json").read_text())
    assert (dump["step"], dump["records"]) == (8, [["8a", "8b"], [], ["8c"]])
    np.testing.assert_array_equal(np.load(folder / "batch.host0.npz", allow_pickle=False)["tokens"], np.full((2, 3), 8))


def test_skip_count_survives_a_restart(tmp_path):
    recorder = _Recorder(tmp_path, skipped_updates=3, in_a_row=2)
    recorder.enqueue(9, np.nan, skipped=True)
    recorder.monitor.drain()
    assert recorder.monitor.in_a_row == 3
    recorder.enqueue(10, np.nan, skipped=True)
    with pytest.raises(RunFailed, match="in 4 steps in a row"):
        recorder.monitor.drain()


def test_batches_without_target_tokens_do_not_end_a_run(tmp_path, caplog):
    recorder = _Recorder(tmp_path, skipped_updates=3)
    for step in range(1, 31):
        recorder.enqueue(step, 0.0 if step > 5 else 1.0, tokens=0 if step > 5 else 9)
    recorder.monitor.finish(30, 5)
    assert recorder.skipped == 25
    assert [(kind, step) for kind, step, _ in recorder.events_seen] == [("empty", step) for step in range(6, 31)]
    lines = [line for line in caplog.messages if "has a target token" in line]
    assert len(lines) == 10
    assert lines[0].startswith("Step 6: no row of the batch has a target token, so no update was made; records: 6a")
    assert lines[-1].endswith("Further such batches are only counted.")


def test_batches_without_target_tokens_are_excluded_from_the_median(tmp_path):
    """Their loss of 0 would make every other loss a spike."""
    recorder = _Recorder(tmp_path, spike=2.0)
    for step in range(1, 81):
        recorder.enqueue(step, tokens=step % 3 == 0)
    recorder.monitor.drain()
    assert {kind for kind, _, _ in recorder.events_seen} == {"empty"}


@pytest.mark.parametrize("empty", [0, 2])
def test_run_that_ends_in_skipped_updates_fails(tmp_path, empty):
    """Also where batches without target tokens follow the skipped ones."""
    recorder = _Recorder(tmp_path)
    for step in range(1, 11):
        recorder.enqueue(step, np.nan, skipped=step > 6, tokens=9 if step <= 10 - empty else 0)
    with pytest.raises(
        RunFailed, match=rf"ends with {4 - empty} skipped updates.* step 10 is not saved.*learning_rate"
    ):
        recorder.monitor.finish(10, 6)


def test_run_that_recovers_succeeds(tmp_path):
    recorder = _Recorder(tmp_path)
    for step in range(1, 11):
        recorder.enqueue(step, np.nan if step < 10 else 1.0, skipped=step < 10)
    recorder.monitor.finish(10, 1)


def test_run_without_any_update_fails(tmp_path):
    recorder = _Recorder(tmp_path)
    for step in range(1, 6):
        recorder.enqueue(step, 0.0, tokens=0)
    with pytest.raises(RunFailed, match="No update was made in 5 steps, because no batch has a target token"):
        recorder.monitor.finish(5, 0)


# ---- A run -----------------------------------------------------------------------------------------------------------


def test_diverging_run_fails_with_a_message_and_a_dump(tmp_path, capsys):
    workdir = tmp_path / "run"
    changes = ["mesh.data=1", "optimizer.learning_rate=1e30", "faults.skipped_updates=2", "checkpoint.every_steps=3"]
    arguments = [f"--config={ROOT}/tests/tiny.py:steps=40", f"--workdir={workdir}", *(f"--config.{c}" for c in changes)]
    assert run_command(main, arguments) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith(
        "error: Updates were skipped in 3 steps in a row (faults.skipped_updates=2), because loss"
    )
    events = [json.loads(line) for line in (workdir / "events.jsonl").read_text().splitlines()]
    skipped = [event["step"] for event in events if event["event"] == "skipped"]
    assert len(skipped) == 3
    assert skipped == list(range(skipped[0], skipped[0] + 3))
    assert (events[-1]["event"], events[-1]["status"]) == ("stopped", 1)
    # The lines are strict JSON, which has no NaN.
    lines = [
        json.loads(line, parse_constant=pytest.fail) for line in (workdir / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["updates_skipped"] for line in lines if line["step"] >= skipped[0]][:2] == [1, 2]
    # The dump is the batch of that step, with the ids of its records.
    folder = workdir / "failures" / f"step_{skipped[-1]}"
    config = Setup.of(steps=40, **{"mesh.data": 1}).config
    stream = Batches(config, load_training_records(config), make_preprocessor(config), host=0, hosts=1)
    for _ in range(skipped[-1]):
        batch = next(stream)
    found = np.load(folder / "batch.host0.npz", allow_pickle=False)
    assert {*found} == {name for name, array in vars(batch).items() if array is not None}
    for name in found:
        np.testing.assert_array_equal(found[name], getattr(batch, name))
    dump = json.loads((folder / "step.json").read_text())
    assert dump["records"] == stream.record_ids(skipped[-1])
    assert [len(row) for row in dump["records"]] == [1] * 8
    assert events[-2]["records"] == [name for row in dump["records"] for name in row]


@pytest.mark.slow  # two runs
def test_run_that_ends_in_skipped_updates_is_not_complete(tmp_path, capsys):
    """The status is 1, the last step is not saved, and restarting amid these updates changes nothing."""
    changes = ["mesh.data=1", "optimizer.learning_rate=1e30", "checkpoint.every_steps=3"]
    arguments = [f"--config={ROOT}/tests/tiny.py:steps=8", *(f"--config.{c}" for c in changes)]
    messages = []
    for name, first in (("uninterrupted", []), ("again", ["--config.faults.skipped_updates=3"])):
        workdir = tmp_path / name
        if first:
            assert run_command(main, [*arguments, f"--workdir={workdir}", *first]) == 1
            assert "in 4 steps in a row (faults.skipped_updates=3)" in capsys.readouterr().err
        assert run_command(main, [*arguments, f"--workdir={workdir}"]) == 1
        messages.append(capsys.readouterr().err.strip().splitlines()[-1])
        assert saved_steps(workdir) == [3, 6]  # not 8
    assert re.match(r"error: The run ends with \d skipped updates, .* step 8 is not saved\.", messages[0])
    assert messages[1] == messages[0]
