"""Checkpoints are restored exactly, on any mesh, and kept as configured."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import Setup

from stf_jax.checkpointing.manager import Checkpoints
from stf_jax.checkpointing.params import SavedParams
from stf_jax.config import CheckpointConfig, RunFailed, UserError
from stf_jax.training.state import TrainState

AXES = ("mesh.data", "mesh.fsdp", "mesh.tensor")


def _setup(*mesh, **changes):
    return Setup.of(**dict(zip(AXES, mesh, strict=True)), **{"model.precision": "bfloat16"}, **changes)


def _position(rows=0):
    """The position in a stream of batches, as the stream gives it."""
    return {"rows": rows, "plan": "5f3c"}


def _state(value=0.0):
    """A state with few parameters, quick to write."""
    leaf = jnp.full((4,), value, jnp.float32)
    return TrainState(jnp.int32(0), {"llm/a": leaf}, {"llm/b": jnp.full((4,), 2, jnp.bfloat16)}, (leaf,))


def _layout(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The workdir of a state that was saved from a 2×2×2 mesh, and the values."""
    workdir = tmp_path_factory.mktemp("saved")
    state = _setup(2, 2, 2).state(seed=3)
    # Zero moments would also be equal if they were not restored.
    moments = jax.tree.map(lambda x: jax.device_put(np.full(x.shape, 3, x.dtype), x.sharding), state.moments)
    state = dataclasses.replace(state, moments=moments)
    checkpoints = Checkpoints(workdir, CheckpointConfig(every_steps=2))
    checkpoints.save(2, state, _position(40), {"seconds": 12.5})
    checkpoints.close()
    return workdir, jax.tree.map(np.asarray, state)


@pytest.mark.parametrize("mesh", [(1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 4, 2)], ids=str)
def test_state_is_restored_on_another_mesh(saved, mesh):
    workdir, expected = saved
    layout = _setup(*mesh).layout
    checkpoints = Checkpoints(workdir, CheckpointConfig())
    assert checkpoints.latest == 2
    arrays, position, clock = checkpoints.restore(2, layout)
    checkpoints.close()
    for name, tree in arrays.items():
        expected_layout = getattr(layout, name)
        assert jax.tree.structure(tree) == jax.tree.structure(expected_layout)
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, tree), getattr(expected, name))
        for leaf, spec in zip(jax.tree.leaves(tree), jax.tree.leaves(expected_layout), strict=True):
            assert (leaf.dtype, leaf.sharding) == (spec.dtype, spec.sharding)
    assert arrays.keys() == {"trainable", "frozen", "moments"}
    assert clock == {"seconds": 12.5}
    assert position == _position(40)


def test_state_without_frozen_parameters(tmp_path):
    state = dataclasses.replace(_state(2.0), frozen={})
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every_steps=1))
    checkpoints.save(1, state, _position(), {"seconds": 0.0})
    arrays, _, _ = checkpoints.restore(1, _layout(state))
    checkpoints.close()
    assert arrays["frozen"] == {}
    np.testing.assert_array_equal(arrays["trainable"]["llm/a"], 2.0)
    assert SavedParams(tmp_path).shapes.keys() == {"llm/a"}


def test_later_steps_do_not_change_what_is_saved(tmp_path):
    """Arrays are written in the background while batches are read and the state's buffers are donated."""
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = jax.tree.map(lambda x: jnp.broadcast_to(x, (*x.shape[:0], 1 << 20)) + 0, {"a": jnp.zeros(())})
    state = TrainState(jnp.int32(0), state, {}, (jnp.zeros(3),))
    layout, position = _layout(state), _position(8)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every_steps=1))
    checkpoints.save(1, state, position, {"seconds": 0.0})
    for _ in range(5):
        state = step(state)
        position["rows"] += 8
    arrays, position, _ = checkpoints.restore(1, layout)
    checkpoints.close()
    np.testing.assert_array_equal(arrays["trainable"]["a"], 0)
    assert position == _position(8)


@pytest.mark.parametrize(
    ("every", "keep_last", "keep_every", "expected"),
    [
        (1, 1, 0, [10]),
        (1, 3, 0, [8, 9, 10]),
        (3, 2, 0, [9, 10]),  # the last step is always saved
        (3, 9, 0, [3, 6, 9, 10]),
        (2, 1, 4, [4, 8, 10]),
        (2, 2, 4, [4, 8, 10]),
        (1, 2, 5, [5, 9, 10]),
    ],
)
def test_checkpoints_are_kept_as_configured(tmp_path, every, keep_last, keep_every, expected):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every, keep_last, keep_every))
    assert checkpoints.latest is None
    for step in range(1, 11):
        if checkpoints.should_save(step, last=step == 10):
            checkpoints.save(step, _state(), _position(), {"seconds": 0.0})
    checkpoints.close()
    assert sorted(int(folder.name) for folder in (tmp_path / "checkpoints").iterdir()) == expected


def test_last_step_is_not_saved_twice(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every_steps=2))
    assert checkpoints.should_save(2)
    assert not checkpoints.should_save(3)
    assert checkpoints.should_save(3, last=True)
    checkpoints.save(2, _state(), _position(), {"seconds": 0.0})
    assert not checkpoints.should_save(2, last=True)
    checkpoints.close()
    assert Checkpoints(tmp_path, CheckpointConfig()).latest == 2


def test_partly_written_step_is_ignored_and_deleted(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every_steps=1))
    checkpoints.save(1, _state(1.0), _position(8), {"seconds": 1.0})
    checkpoints.close()
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "1", folder / "2.orbax-checkpoint-tmp")
    shutil.rmtree(folder / "2.orbax-checkpoint-tmp" / "moments")
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every_steps=1))
    assert checkpoints.latest == 1
    # The step can now be written.
    checkpoints.save(2, _state(2.0), _position(16), {"seconds": 2.0})
    arrays, position, clock = checkpoints.restore(2, _layout(_state()))
    checkpoints.close()
    assert (position, clock) == (_position(16), {"seconds": 2.0})
    np.testing.assert_array_equal(arrays["trainable"]["llm/a"], 2.0)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


@pytest.mark.parametrize("item", ["trainable", "moments"])
@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
def test_non_finite_step_is_not_saved(tmp_path, item, value):
    """Earlier checkpoints are kept."""
    leaf = jnp.array([1.0, value, 1.0, 1.0])
    bad = dataclasses.replace(
        _state(), **{"trainable": {"trainable": {"llm/a": leaf}}, "moments": {"moments": (leaf,)}}[item]
    )
    with Checkpoints(tmp_path, CheckpointConfig(every_steps=1, keep_last=1)) as checkpoints:
        checkpoints.save(1, _state(1.0), _position(8), {"seconds": 1.0})
        name = {"trainable": "trainable/llm/a", "moments": "moments/0"}[item]
        with pytest.raises(
            RunFailed, match=rf"^Step 2 is not saved, because {name} has .* not finite; .* checkpoint: step 1\."
        ):
            checkpoints.save(2, bad, _position(16), {"seconds": 2.0}, last=True)
        arrays, _, _ = checkpoints.restore(1, _layout(_state()))
    np.testing.assert_array_equal(arrays["trainable"]["llm/a"], 1.0)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_non_finite_frozen_parameters_are_saved(tmp_path):
    """Training does not change them, and some published models have them in unused rows."""
    state = dataclasses.replace(_state(), frozen={"llm/b": jnp.array([jnp.nan, 1.0])})
    with Checkpoints(tmp_path, CheckpointConfig(every_steps=1)) as checkpoints:
        checkpoints.save(1, state, _position(), {"seconds": 0.0})
        arrays, _, _ = checkpoints.restore(1, _layout(state))
    np.testing.assert_array_equal(arrays["frozen"]["llm/b"], [np.nan, 1.0])


# ---- SavedParams -----------------------------------------------------------------------------------------------------


def test_saved_params_reads_the_newest_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every_steps=1))
    for step in (1, 2):
        checkpoints.save(step, _state(step), _position(), {"seconds": 0.0})
    checkpoints.close()
    saved = SavedParams(tmp_path)
    expected = {"llm/a": ("float32", [2.0] * 4), "llm/b": ("bfloat16", [2.0] * 4)}
    restored = dict(saved.restore(dict.fromkeys(saved.shapes, jnp.zeros(()).sharding)))
    assert {path: (leaf.dtype.name, leaf.tolist()) for path, leaf in restored.items()} == expected
    assert {path: (leaf.dtype.name, leaf.tolist()) for path in saved.shapes for leaf in [saved.read(path)]} == expected
    assert [path for path, _ in saved.restore({"llm/b": jnp.zeros(()).sharding})] == ["llm/b"]


def test_saved_params_restores_with_given_shardings(saved):
    workdir, expected = saved
    shardings = {path: leaf.sharding for path, leaf in _setup(1, 8, 1).layout.params.items()}
    params = dict(SavedParams(workdir).restore(shardings))
    assert params.keys() == expected.params.keys()
    for path, value in params.items():
        np.testing.assert_array_equal(np.asarray(value), expected.params[path])
        assert value.dtype == expected.params[path].dtype
        assert value.sharding == shardings[path]


def test_run_without_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=rf"Run {tmp_path} has no complete checkpoint"):
        SavedParams(tmp_path)
