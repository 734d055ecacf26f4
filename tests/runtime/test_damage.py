"""Checkpoints that were damaged are noticed and set aside; a disk that is full ends no run that can still be saved."""

import errno
import os
import pathlib
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from full_disk import limit_file_size

from stf_jax.config import CheckpointConfig, FaultsConfig, RunFailed, TryAgain, UserError
from stf_jax.runtime import checkpoint
from stf_jax.runtime.checkpoint import Checkpoints, DamagedCheckpoint
from stf_jax.runtime.parameters import SavedParams
from stf_jax.training.state import TrainState

DATA, CLOCK = {"rows": 40, "plan": "5f3c"}, {"seconds": 1.5}


def _state(value=0.0, size=300):
    """Of noise, which no checksum takes for other noise."""
    rng = np.random.default_rng(int(value))

    def leaf(*shape):
        return jnp.asarray(rng.standard_normal(shape) + value, jnp.float32)

    trainable = {"llm/a": leaf(size), "llm/c": leaf(20, 30)}
    return TrainState(jnp.int32(0), trainable, {"llm/b": leaf(400).astype(jnp.bfloat16)}, (leaf(size), jnp.int32(3)))


def _layout(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with steps 1 and 2, whose values are about 1 and 2."""
    workdir = tmp_path_factory.mktemp("saved")
    with Checkpoints(workdir, CheckpointConfig(every_steps=1)) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, _state(step), DATA, CLOCK)
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def _flip(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    path.write_bytes(content)


HARMS = {
    "cut": lambda path, rng: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path, rng: os.truncate(path, 0),
    "deleted": lambda path, rng: path.unlink(),
    "one bit flipped": _flip,
}


@pytest.mark.parametrize("harm", HARMS)
def test_no_damage_to_any_file_goes_unnoticed(saved, tmp_path, harm):
    """Either all is as it was (some files only serve Orbax's writing), or the checkpoint is known to be damaged."""
    rng, found, expected = np.random.default_rng(7), [], _state(2)
    step = pathlib.Path("checkpoints") / "2"
    names = sorted(path.relative_to(saved) for path in (saved / step).rglob("*") if path.is_file())
    for name in names:
        if (saved / name).stat().st_size == 0:
            continue
        shutil.copytree(saved / step, tmp_path / step)
        HARMS[harm](tmp_path / name, rng)
        with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
            try:
                arrays, data, clock = checkpoints.restore(2, _layout(expected))
            except DamagedCheckpoint:
                found.append(name)
            else:
                assert (data, clock) == (DATA, CLOCK), name
                for tree, values in arrays.items():
                    jax.tree.map(np.testing.assert_array_equal, values, getattr(expected, tree))
        shutil.rmtree(tmp_path / step)
    # Of the files that hold the arrays, the data's place and the clock, none is left out.
    assert len(found) >= 8
    assert {name.parts[2] for name in found} >= {"trainable", "frozen", "moments", "data", "clock"}


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_taken(workdir, caplog):
    (largest,) = sorted(
        (workdir / "checkpoints/2/trainable/ocdbt.process_0/d").iterdir(), key=lambda path: path.stat().st_size
    )[-1:]
    content = largest.read_bytes()
    largest.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])  # which Orbax does not notice
    broken = {path.name for path in (workdir / "checkpoints/2").rglob("*")}
    told = []
    with Checkpoints(
        workdir, CheckpointConfig(), tell=lambda *what, **facts: told.append((what, facts))
    ) as checkpoints:
        step, arrays, data, _ = checkpoints.restore_newest(_layout(_state()))
        assert (step, data) == (1, DATA)
        np.testing.assert_array_equal(arrays["trainable"]["llm/a"], _state(1).trainable["llm/a"])
        # Nothing was deleted, and the run goes on: the step is free again.
        assert {path.name for path in (workdir / "damaged/2").rglob("*")} == broken
        checkpoints.save(2, _state(5), DATA, CLOCK, last=True)
        assert checkpoints.latest == 2
    (((kind, at), facts),) = told
    assert (kind, at) == ("set_aside", 2)
    assert facts["folder"] == str(workdir / "damaged" / "2")
    assert facts["reason"].startswith("trainable/llm/")
    assert f"Checkpoint 2 is damaged ({facts['reason']}) and was moved to {workdir}/damaged/2." in caplog.text


def test_a_second_damaged_checkpoint_of_a_step_does_not_replace_the_first(workdir):
    (workdir / "damaged" / "2").mkdir(parents=True)
    shutil.rmtree(workdir / "checkpoints/2/moments")
    with Checkpoints(workdir, CheckpointConfig()) as checkpoints:
        assert checkpoints.restore_newest(_layout(_state()))[0] == 1
    assert sorted(path.name for path in (workdir / "damaged").iterdir()) == ["2", "2.2"]


def test_a_run_whose_every_checkpoint_is_damaged_does_not_begin_anew(workdir):
    for step in (1, 2):
        shutil.rmtree(workdir / "checkpoints" / str(step) / "trainable")
    said = rf"No checkpoint of this run can be read; they are in {workdir}/damaged"
    for _ in range(2):  # nor when the command is given again
        with Checkpoints(workdir, CheckpointConfig()) as checkpoints, pytest.raises(UserError, match=said):
            checkpoints.restore_newest(_layout(_state()))
    assert sorted(path.name for path in (workdir / "damaged").iterdir()) == ["1", "2"]
    (workdir / "damaged").rename(workdir / "moved")
    with Checkpoints(workdir, CheckpointConfig()) as checkpoints:
        assert checkpoints.restore_newest(_layout(_state())) is None


def test_of_several_hosts_each_that_finds_damage_ends(workdir, monkeypatch):
    """The second finds it moved by the first. What each would go on from, the others do not know."""
    told = []

    def tell(kind, step, folder, reason):
        told.append(folder)

    with Checkpoints(workdir, CheckpointConfig(), tell=tell) as checkpoints, monkeypatch.context() as patch:
        patch.setattr(checkpoint.jax, "process_count", lambda: 2)
        for _ in range(2):
            with pytest.raises(TryAgain, match="to resume from the one before"):
                checkpoints._set_aside(2, "cut")
    assert [path.name for path in (workdir / "damaged").iterdir()] == ["2"]
    assert told == [str(workdir / "damaged" / "2")] * 2


REFUSALS = {
    "a disk that fails": (OSError(errno.EIO, "Input/output error"), TryAgain, "cannot be read now"),
    "too many files": (OSError(errno.EMFILE, "Too many open files"), TryAgain, "cannot be read now"),
    "a bucket that is away": (ValueError("UNAVAILABLE: the bucket is away"), TryAgain, "start again later"),
    "a disk that fails, to tensorstore": (ValueError("read: I/O error [os_error_code='5']"), TryAgain, "read now"),
    "what may not be read": (ValueError("PERMISSION_DENIED: no"), UserError, "fix its permissions"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_read_now_is_not_taken_for_damage(workdir, case, monkeypatch):
    """These faults cannot be caused here; Orbax passes them on as they come."""
    error, raised, says = REFUSALS[case]

    def restore(*_, **__):
        raise error

    with Checkpoints(workdir, CheckpointConfig()) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "restore", restore)
        with pytest.raises(raised, match=rf"{workdir}/checkpoints/2 .*{says}"):
            checkpoints.restore_newest(_layout(_state()))
        assert checkpoints.latest == 2
    assert not (workdir / "damaged").exists()


def test_another_model_is_not_taken_for_damage(workdir):
    layout = _layout(_state(size=301))
    with Checkpoints(workdir, CheckpointConfig()) as checkpoints:
        with pytest.raises(UserError, match=r"of another model: llm/a was \(300,\), now \(301,\)"):
            checkpoints.restore_newest(layout)
        assert checkpoints.latest == 2
    assert not (workdir / "damaged").exists()


# ---- No room ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def told(monkeypatch):
    monkeypatch.setattr(checkpoint, "_PAUSE", 0.0)
    return []


def _checkpoints(workdir, told, **faults):
    def tell(kind, step, **facts):
        told.append((kind, step, facts["last"]))

    return Checkpoints(workdir, CheckpointConfig(every_steps=10), FaultsConfig(**faults), tell)


def _run(checkpoints, steps):
    """As training does; until ``steps`` are done or it is given up. Gives the steps that were tried to be saved."""
    tried = []
    for step in steps:
        if checkpoints.should_save(step):
            tried.append(step)
            checkpoints.save(step, _state(step, 5000), DATA, CLOCK)
            while checkpoints._manager.is_saving_in_progress():
                time.sleep(0.01)
    return tried


def test_what_could_not_be_saved_is_saved_later(tmp_path, told, caplog):
    with _checkpoints(tmp_path, told) as checkpoints:
        assert _run(checkpoints, range(1, 11)) == [10]
        with limit_file_size(1024):
            # Noticed a step later, and tried again after a tenth of the interval.
            assert _run(checkpoints, range(11, 24)) == [20, 22]
        assert checkpoints.latest == 10
        assert _run(checkpoints, range(24, 31)) == [24, 30]
        arrays, *_ = checkpoints.restore(30, _layout(_state(size=5000)))
    np.testing.assert_array_equal(arrays["trainable"]["llm/a"], _state(30, 5000).trainable["llm/a"])
    assert told == [("save_failed", step, 10) for step in (20, 22)]
    assert "Step 20 could not be saved (File too large); the newest complete checkpoint: step 10." in caplog.text
    # Nothing half-written takes up the room that is wanted.
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["24", "30"]


def test_a_run_that_cannot_be_saved_for_long_ends(tmp_path, told):
    with _checkpoints(tmp_path, told, unsaved_steps=15) as checkpoints:
        _run(checkpoints, range(1, 11))
        with (
            limit_file_size(1024),
            pytest.raises(
                RunFailed, match=r"Step 2[67] cannot be saved.*File too large.*checkpoint: step 10.*unsaved_steps"
            ),
        ):
            _run(checkpoints, range(11, 100))
        assert checkpoints.latest == 10
        assert checkpoints.restore(10, _layout(_state(size=5000)))


def test_the_last_step_is_tried_again_and_then_given_up(tmp_path, told):
    with _checkpoints(tmp_path, told) as checkpoints:
        _run(checkpoints, range(1, 11))
        with limit_file_size(1024), pytest.raises(RunFailed, match="Step 12 cannot be saved"):
            checkpoints.save(12, _state(12, 5000), DATA, CLOCK, last=True)
        assert told == [("save_failed", 12, 10)] * 3
        checkpoints.save(12, _state(12, 5000), DATA, CLOCK, last=True)
        assert checkpoints.latest == 12


# ---- Parameters alone ------------------------------------------------------------------------------------------------


def test_a_parameter_that_is_not_as_it_was_written_is_not_given(workdir):
    """To evaluate, export or start from. Orbax itself notices some flipped bits, and of others nothing."""
    folder, expected = workdir / "checkpoints/2/trainable/ocdbt.process_0/d", _state(2)
    where, unnoticed = jnp.zeros(()).sharding, 0
    *_, file = sorted(folder.iterdir(), key=os.path.getsize)
    content = file.read_bytes()
    for place in range(0, len(content), len(content) // 20):
        file.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        sentence = ""
        try:
            np.testing.assert_array_equal(SavedParams(workdir).read("llm/c"), expected.trainable["llm/c"])
        except UserError as error:
            sentence = str(error)
        if "does not match its checksum" in sentence:
            unnoticed += 1
            saved = SavedParams(workdir)
            with pytest.raises(UserError, match="trainable is damaged: parameter llm/c does not match its checksum"):
                dict(saved.restore({"llm/c": where}))
            np.testing.assert_array_equal(saved.read("llm/b"), expected.frozen["llm/b"])
    assert unnoticed > 5
