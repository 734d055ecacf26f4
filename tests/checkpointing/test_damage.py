"""Damaged checkpoints are detected and moved; a full disk does not end a run that can still be saved."""

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

from stf_jax.checkpointing import manager as checkpoint
from stf_jax.checkpointing.items import error_reason
from stf_jax.checkpointing.manager import Checkpoints, DamagedCheckpoint
from stf_jax.checkpointing.params import SavedParams
from stf_jax.config import CheckpointConfig, FaultsConfig, RunFailed, TryAgain, UserError
from stf_jax.training.state import TrainState

DATA, CLOCK = {"rows": 40, "plan": "5f3c"}, {"seconds": 1.5}


def _state(value=0.0, size=300):
    """A state of random numbers, so that checksums differ."""
    rng = np.random.default_rng(int(value))

    def leaf(*shape):
        return jnp.asarray(rng.standard_normal(shape) + value, jnp.float32)

    trainable = {"llm/a": leaf(size), "llm/c": leaf(20, 30)}
    frozen = {"llm/b": jnp.linspace(0, 1, 400, dtype=jnp.bfloat16)}
    return TrainState(jnp.int32(0), trainable, frozen, (leaf(size), jnp.int32(3)))


def _layout(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with checkpoints of steps 1 and 2, whose values are around 1 and 2."""
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


DAMAGE = {
    "truncated": lambda path, rng: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path, rng: os.truncate(path, 0),
    "deleted": lambda path, rng: path.unlink(),
    "one bit flipped": _flip,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_any_file_is_detected(saved, tmp_path, damage):
    """Either nothing changes (Orbax uses some files only for writing), or the checkpoint is reported as damaged."""
    rng, found, expected = np.random.default_rng(7), [], _state(2)
    step = pathlib.Path("checkpoints") / "2"
    for name in sorted(path.relative_to(saved) for path in (saved / step).rglob("*") if path.is_file()):
        if (saved / name).stat().st_size == 0:
            continue
        shutil.copytree(saved / step, tmp_path / step)
        shutil.copytree(saved / "frozen", tmp_path / "frozen", dirs_exist_ok=True)
        DAMAGE[damage](tmp_path / name, rng)
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
    # This includes the files with arrays, the position in the data, and the clock.
    assert len(found) >= 7
    assert {name.parts[2] for name in found} >= {"trainable", "moments", "data", "clock"}


def _restore(workdir, reload, events):
    with Checkpoints(
        workdir, CheckpointConfig(every_steps=1), on_event=lambda kind, step, **fields: events.append(kind)
    ) as checkpoints:
        step, arrays, *_ = checkpoints.restore_newest(_layout(_state()), reload)
        assert step == 2
        np.testing.assert_array_equal(arrays["frozen"]["llm/b"], _state().frozen["llm/b"])
        np.testing.assert_array_equal(arrays["trainable"]["llm/a"], _state(2).trainable["llm/a"])
        checkpoints.save(3, _state(3), DATA, CLOCK, last=True)


@pytest.mark.parametrize("damage", ["deleted", "one bit flipped"])
def test_damaged_frozen_parameters_are_loaded_again(saved, tmp_path, damage):
    """From where the run started, and written again at the next save. No step counts as damaged."""
    rng, reloaded = np.random.default_rng(7), 0
    for name in sorted(path.relative_to(saved) for path in (saved / "frozen").rglob("*") if path.is_file()):
        if (saved / name).stat().st_size == 0:
            continue
        shutil.rmtree(tmp_path, ignore_errors=True)
        shutil.copytree(saved, tmp_path)
        DAMAGE[damage](tmp_path / name, rng)
        events = []
        _restore(tmp_path, lambda: _state().frozen, events)
        reloaded += events == ["frozen_reloaded"]
        assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]
        np.testing.assert_array_equal(SavedParams(tmp_path).read("llm/b"), _state().frozen["llm/b"])
    assert reloaded >= 3  # the arrays, their metadata, the checksums


def test_frozen_parameters_are_missing(workdir):
    shutil.rmtree(workdir / "frozen")
    with pytest.raises(
        UserError, match=rf"^{workdir}/frozen, which holds the frozen parameters of the run, is missing"
    ):
        SavedParams(workdir)
    with Checkpoints(workdir, CheckpointConfig()) as checkpoints:
        with pytest.raises(UserError, match=rf"{workdir}/frozen are damaged or missing .* copy that folder"):
            checkpoints.restore_newest(_layout(_state()))
        with pytest.raises(UserError, match="and init_from has others now"):
            checkpoints.restore_newest(_layout(_state()), lambda: {"llm/b": _state().frozen["llm/b"] + 1})
        assert checkpoints.latest == 2


def test_frozen_parameters_of_another_run(workdir):
    """The folder is sound, so it is the steps that are of another run."""
    state = _state(1)
    state.frozen["llm/b"] += 1
    with Checkpoints(workdir / "other", CheckpointConfig()) as checkpoints:
        checkpoints.save(1, state, DATA, CLOCK)
    shutil.rmtree(workdir / "frozen")
    shutil.copytree(workdir / "other" / "frozen", workdir / "frozen")
    with (
        Checkpoints(workdir, CheckpointConfig()) as checkpoints,
        pytest.raises(DamagedCheckpoint, match="frozen parameters do not match its checksum"),
    ):
        checkpoints.restore(2, _layout(_state()), lambda: _state().frozen)
    with pytest.raises(UserError, match="is damaged, or of another run"):
        SavedParams(workdir)


def test_damaged_checkpoint_is_moved_and_the_one_before_restored(workdir, caplog):
    (largest,) = sorted(
        (workdir / "checkpoints/2/trainable/ocdbt.process_0/d").iterdir(), key=lambda path: path.stat().st_size
    )[-1:]
    content = largest.read_bytes()
    largest.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])  # Orbax does not notice this
    broken = {path.name for path in (workdir / "checkpoints/2").rglob("*")}
    reported = []
    with Checkpoints(
        workdir, CheckpointConfig(), on_event=lambda *args, **fields: reported.append((args, fields))
    ) as checkpoints:
        step, arrays, data, _ = checkpoints.restore_newest(_layout(_state()))
        assert (step, data) == (1, DATA)
        np.testing.assert_array_equal(arrays["trainable"]["llm/a"], _state(1).trainable["llm/a"])
        # Nothing was deleted, and the step can be saved again.
        assert {path.name for path in (workdir / "damaged/2").rglob("*")} == broken
        checkpoints.save(2, _state(5), DATA, CLOCK, last=True)
        assert checkpoints.latest == 2
    (((kind, step), fields),) = reported
    assert (kind, step) == ("set_aside", 2)
    assert fields["folder"] == str(workdir / "damaged" / "2")
    assert fields["reason"].startswith("trainable/llm/")
    assert f"Checkpoint 2 is damaged ({fields['reason']}) and was moved to {workdir}/damaged/2." in caplog.text


def test_second_damaged_checkpoint_of_a_step_does_not_replace_the_first(workdir):
    (workdir / "damaged" / "2").mkdir(parents=True)
    shutil.rmtree(workdir / "checkpoints/2/moments")
    with Checkpoints(workdir, CheckpointConfig()) as checkpoints:
        assert checkpoints.restore_newest(_layout(_state()))[0] == 1
    assert sorted(path.name for path in (workdir / "damaged").iterdir()) == ["2", "2.2"]


def test_run_with_only_damaged_checkpoints_does_not_start_from_scratch(workdir):
    for step in (1, 2):
        shutil.rmtree(workdir / "checkpoints" / str(step) / "trainable")
    message = rf"No checkpoint of this run can be read; they are in {workdir}/damaged"
    for _ in range(2):  # also when the command is run again
        with Checkpoints(workdir, CheckpointConfig()) as checkpoints, pytest.raises(UserError, match=message):
            checkpoints.restore_newest(_layout(_state()))
    assert sorted(path.name for path in (workdir / "damaged").iterdir()) == ["1", "2"]
    (workdir / "damaged").rename(workdir / "moved")
    with Checkpoints(workdir, CheckpointConfig()) as checkpoints:
        assert checkpoints.restore_newest(_layout(_state())) is None


def test_with_several_hosts_each_that_finds_damage_ends(workdir, monkeypatch):
    """The second host finds that the first has moved it. No host can know which step the others restored."""
    reported = []

    def on_event(kind, step, folder, reason):
        reported.append(folder)

    with Checkpoints(workdir, CheckpointConfig(), on_event=on_event) as checkpoints, monkeypatch.context() as patch:
        patch.setattr(checkpoint.jax, "process_count", lambda: 2)
        for _ in range(2):
            with pytest.raises(TryAgain, match="to resume from the one before"):
                checkpoints._set_aside(2, "truncated")
    assert [path.name for path in (workdir / "damaged").iterdir()] == ["2"]
    assert reported == [str(workdir / "damaged" / "2")] * 2


READ_ERRORS = {
    "failing disk": (OSError(errno.EIO, "Input/output error"), TryAgain, "cannot be read now"),
    "too many open files": (OSError(errno.EMFILE, "Too many open files"), TryAgain, "cannot be read now"),
    "unavailable bucket": (ValueError("UNAVAILABLE: the bucket is unavailable"), TryAgain, "start again later"),
    "failing disk, reported by tensorstore": (ValueError("read: I/O error [os_error_code='5']"), TryAgain, "read now"),
    "no permission": (ValueError("PERMISSION_DENIED: no"), UserError, "fix its permissions"),
}


@pytest.mark.parametrize("case", READ_ERRORS)
def test_read_errors_do_not_count_as_damage(workdir, case, monkeypatch):
    """These faults are simulated; Orbax passes on such errors unchanged."""
    error, raised, message = READ_ERRORS[case]

    def restore(*_, **__):
        raise error

    with Checkpoints(workdir, CheckpointConfig()) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "restore", restore)
        with pytest.raises(raised, match=rf"{workdir}/checkpoints/2 .*{message}"):
            checkpoints.restore_newest(_layout(_state()))
        assert checkpoints.latest == 2
    assert not (workdir / "damaged").exists()


def test_checkpoint_of_another_model_does_not_count_as_damaged(workdir):
    layout = _layout(_state(size=301))
    with Checkpoints(workdir, CheckpointConfig()) as checkpoints:
        with pytest.raises(UserError, match=r"of another model: llm/a was \(300,\), now \(301,\)"):
            checkpoints.restore_newest(layout)
        assert checkpoints.latest == 2
    assert not (workdir / "damaged").exists()


# ---- A full disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def reported(monkeypatch):
    monkeypatch.setattr(checkpoint, "_PAUSE", 0.0)
    return []


def _checkpoints(workdir, reported, **faults):
    def on_event(kind, step, **fields):
        reported.append((kind, step, fields["last"]))

    return Checkpoints(workdir, CheckpointConfig(every_steps=10), FaultsConfig(**faults), on_event)


def _run(checkpoints, steps):
    """Saves as training does, until the end of ``steps`` or RunFailed. Returns the steps that it attempted to save."""
    attempted = []
    for step in steps:
        if checkpoints.should_save(step):
            attempted.append(step)
            checkpoints.save(step, _state(step, 5000), DATA, CLOCK)
            while checkpoints._manager.is_saving_in_progress():
                time.sleep(0.01)
    return attempted


def test_failed_save_is_retried(tmp_path, reported, caplog):
    with _checkpoints(tmp_path, reported) as checkpoints:
        assert _run(checkpoints, range(1, 11)) == [10]
        with limit_file_size(1024):
            # The failure is noticed a step later; saving is retried after a tenth of the interval.
            assert _run(checkpoints, range(11, 24)) == [20, 22]
        assert checkpoints.latest == 10
        assert _run(checkpoints, range(24, 31)) == [24, 30]
        arrays, *_ = checkpoints.restore(30, _layout(_state(size=5000)))
    np.testing.assert_array_equal(arrays["trainable"]["llm/a"], _state(30, 5000).trainable["llm/a"])
    assert reported == [("save_failed", step, 10) for step in (20, 22)]
    assert "Step 20 could not be saved (File too large); the newest complete checkpoint: step 10." in caplog.text
    # Partly written checkpoints do not take up disk space.
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["24", "30"]


@pytest.mark.parametrize("specification", ["", r"""[tensorstore_spec='{\"a\":{},\"open\":true}'] """])
def test_the_reason_of_tensorstore_is_the_systems(specification):
    message = f"Error writing 'a' at local file '/b:c/': File too large {specification}[os_error_code='27']"
    assert error_reason(ValueError(message)) == "File too large"


def test_run_that_cannot_be_saved_for_long_ends(tmp_path, reported):
    with _checkpoints(tmp_path, reported, unsaved_steps=15) as checkpoints:
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


@pytest.mark.parametrize("failures", [2, 4])
def test_a_partial_checkpoint_is_deleted_while_threads_of_its_save_end(tmp_path, reported, monkeypatch, failures):
    """They remove a file, or add one, while the folder is deleted."""
    partial, rmtree = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp", shutil.rmtree
    partial.mkdir(parents=True)
    errors = [FileNotFoundError(errno.ENOENT, "a file"), OSError(errno.ENOTEMPTY, "a folder")] * 2

    def fail_at_first(path, *arguments, **options):
        if os.fspath(path) == os.fspath(partial) and len(errors) > 4 - failures:
            raise errors.pop()
        return rmtree(path, *arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", fail_at_first)
    monkeypatch.setattr(checkpoint.time, "sleep", lambda _: None)
    if failures == 4:
        with pytest.raises(FileNotFoundError):
            _checkpoints(tmp_path, reported)
        return
    with _checkpoints(tmp_path, reported):
        assert not partial.exists()


def test_last_step_is_retried_before_giving_up(tmp_path, reported):
    with _checkpoints(tmp_path, reported) as checkpoints:
        _run(checkpoints, range(1, 11))
        with limit_file_size(1024), pytest.raises(RunFailed, match="Step 12 cannot be saved"):
            checkpoints.save(12, _state(12, 5000), DATA, CLOCK, last=True)
        assert reported == [("save_failed", 12, 10)] * 3
        checkpoints.save(12, _state(12, 5000), DATA, CLOCK, last=True)
        assert checkpoints.latest == 12


# ---- SavedParams -----------------------------------------------------------------------------------------------------


def test_damaged_parameter_is_not_returned(workdir):
    """Nor evaluated, exported or started from. Orbax itself detects only some of the flipped bits."""
    folder, expected = workdir / "checkpoints/2/trainable/ocdbt.process_0/d", _state(2)
    sharding, undetected_by_orbax = jnp.zeros(()).sharding, 0
    *_, file = sorted(folder.iterdir(), key=os.path.getsize)
    content = file.read_bytes()
    for place in range(0, len(content), len(content) // 20):
        file.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        message = ""
        try:
            np.testing.assert_array_equal(SavedParams(workdir).read("llm/c"), expected.trainable["llm/c"])
        except UserError as error:
            message = str(error)
        if "does not match its checksum" in message:
            undetected_by_orbax += 1
            saved = SavedParams(workdir)
            with pytest.raises(UserError, match="trainable is damaged: parameter llm/c does not match its checksum"):
                dict(saved.restore({"llm/c": sharding}))
            np.testing.assert_array_equal(saved.read("llm/b"), expected.frozen["llm/b"])
    assert undetected_by_orbax > 5
