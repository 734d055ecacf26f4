"""Which parameters are trainable, their types, and that the frozen ones never change."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import Setup, batches, quantized_by_definition, random_params

from stf_jax.checkpointing.rules import decide
from stf_jax.config import ModelConfig, UserError
from stf_jax.models import spec
from stf_jax.models.blueprint import blueprint
from stf_jax.training.state import init_state, learning_rate_factors

STAGE_1 = (("fusion/.*", "train"), ("vision/.*", "freeze"), ("llm/.*", "freeze"))
STAGE_2 = (("fusion/.*", "train"), ("vision/.*", "freeze"), ("llm/.*", "train"))
PATHS = dict.fromkeys(("vision/kernel", "vision/bias", "fusion/kernel", "llm/kernel"))


# ---- Rules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "trainable"),
    [
        (((".*", "train"),), set(PATHS)),
        ((("vision/.*", "freeze"), (".*", "train")), {"fusion/kernel", "llm/kernel"}),
        # The first matching rule decides, so the order of the rules matters.
        (
            ((".*/bias", "train"), ("vision/.*", "freeze"), (".*", "train")),
            {"vision/bias", "fusion/kernel", "llm/kernel"},
        ),
        ((("vision/.*", "freeze"), (".*/bias", "train"), (".*", "train")), {"fusion/kernel", "llm/kernel"}),
        # A pattern matches the whole path, not its beginning or a part.
        (((".*kernel", "freeze"), (".*", "train")), {"vision/bias"}),
        ((("vision/b.*", "train"), (".*", "freeze")), {"vision/bias"}),
    ],
)
def test_first_matching_rule_decides(rules, trainable):
    assert {path for path, decision in decide(rules, PATHS).items() if any(decision.factors)} == trainable


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((("vision/.*", "freeze"), ("fusion/.*", "train")), "No freeze rule covers parameter 'llm/kernel'"),
        ((), "No freeze rule covers parameter 'vision/kernel'"),
        ((("vision", "freeze"), (".*", "train")), "'vision' covers no parameter; paths look like 'fusion/kernel'"),
        ((("vision/.*", "freeze"), ("lm/.*", "freeze"), (".*", "train")), "'lm/.*' covers no parameter"),
        (((".*", "frozen"),), "('.*', 'frozen') must say 'train' or 'freeze'"),
        ((("vision/(.*", "freeze"), (".*", "train")), r"'vision/\(.*' is not a regular expression"),
        (((".*", "freeze"),), "leave nothing to train"),
    ],
)
def test_invalid_rules_are_rejected(rules, message):
    with pytest.raises(UserError) as raised:
        decide(rules, PATHS)
    assert message.replace("\\", "") in str(raised.value)


# ---- Counts ----------------------------------------------------------------------------------------------------------


def _elements(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


# Elements of the tiny model, layer by layer: MBTF 96→32→32 and STF 4·32→64→32; a tied decoder of two layers with half
# as many key heads; a tower of three.
TOWER = spec.VISION["clip-tiny"]
PATCH, POSITIONS = TOWER.patch_size**2 * 3, TOWER.grid**2 + 1
FUSION = (96 * 32 + 32) + (32 * 32 + 32) + (4 * 32 * 64 + 64) + (64 * 32 + 32)
LLM = 512 * 32 + 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64 + 2 * 32) + 32
VISION = (PATCH + 1 + POSITIONS + 2) * 32 + 3 * (4 * (32 * 32 + 32) + (32 * 64 + 64) + (64 * 32 + 32) + 4 * 32)


@pytest.mark.parametrize(
    ("rules", "leaves", "trainable", "frozen"),
    [(STAGE_1, (8, 11 + 21), FUSION, LLM + VISION), (STAGE_2, (8 + 11, 21), FUSION + LLM, VISION)],
    ids=["stage-1", "stage-2"],
)
def test_stages_train_and_freeze_the_expected_leaves(rules, leaves, trainable, frozen):
    layout = Setup.of(rules=rules).layout
    assert (len(layout.trainable), len(layout.frozen)) == leaves
    assert (_elements(layout.trainable), _elements(layout.frozen)) == (trainable, frozen)
    parts = {path.split("/")[0] for path in layout.trainable}
    assert parts == ({"fusion"} if rules is STAGE_1 else {"fusion", "llm"})


def test_parameter_counts_of_the_7b_model():
    plan = blueprint(ModelConfig(vision="clip-l-14-336", llm="vicuna-7b"))

    def count_trainable(rules):
        return _elements({path: plan.shapes[path] for path in learning_rate_factors(rules, plan)})

    assert count_trainable(STAGE_1) == 171_992_064
    assert count_trainable(STAGE_2) == 171_992_064 + 6_738_415_616


# ---- Types and moments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_trainable_leaves_are_float32_and_frozen_ones_in_the_compute_type(precision):
    setup = Setup.of(rules=STAGE_1, **{"model.precision": precision})
    state = jax.eval_shape(lambda: init_state(setup.config, setup.plan, setup.layout, setup.tx, {}))
    assert {leaf.dtype for leaf in state.trainable.values()} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in state.frozen.values()} == {jnp.dtype(precision)}
    # The layout that checkpoints are restored into has the same shapes and types.
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), setup.layout)


@pytest.mark.parametrize("rules", [STAGE_1, STAGE_2], ids=["stage-1", "stage-2"])
@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_moments_exist_for_trainable_leaves_only(rules, clip_norm):
    layout = Setup.of(rules=rules, **{"optimizer.clip_norm": clip_norm}).layout
    for name in ("mu", "nu"):
        moments = optax.tree_utils.tree_get(layout.moments, name)
        assert {path: leaf.shape for path, leaf in moments.items()} == {
            path: leaf.shape for path, leaf in layout.trainable.items()
        }
        assert {leaf.dtype for leaf in moments.values()} == {jnp.dtype("float32")}
    # The only other leaves are counts.
    rest = [leaf for leaf in jax.tree.leaves(layout.moments) if leaf.shape == ()]
    assert len(jax.tree.leaves(layout.moments)) == 2 * len(layout.trainable) + len(rest)


# ---- Steps -----------------------------------------------------------------------------------------------------------


def test_steps_move_every_trainable_leaf_and_no_frozen_bit():
    setup = Setup.of(
        rules=STAGE_1, **{"model.precision": "bfloat16", "optimizer.weight_decay": 0.1, "optimizer.warmup_ratio": 0.0}
    )
    state, step = setup.state(), setup.step()
    before = jax.tree.map(np.array, state)
    for batch in batches(setup.config, 3):
        state, metrics = step(state, batch)
        assert np.isfinite(float(metrics["loss"]))
    assert int(state.step) == 3
    for path, old in before.frozen.items():
        new = np.asarray(state.frozen[path])
        assert new.dtype == old.dtype == jnp.bfloat16
        np.testing.assert_array_equal(new.view(np.uint16), old.view(np.uint16), err_msg=path)
    unmoved = [path for path, old in before.trainable.items() if np.array_equal(old, state.trainable[path])]
    assert not unmoved
    assert {leaf.dtype for leaf in state.trainable.values()} == {jnp.dtype("float32")}


# ---- Initialization --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def initial():
    """An initial state on one device."""
    setup = Setup.of(**{"mesh.data": 1})
    return jax.tree.map(np.asarray, init_state(setup.config, setup.plan, setup.layout, setup.tx, {}))


@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_initialization_is_the_same_on_every_mesh(initial, mesh):
    setup = Setup.of(**dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh, strict=True)))
    state = init_state(setup.config, setup.plan, setup.layout, setup.tx, {})
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, state), initial)


def test_initialization_draws_every_kernel_independently(initial):
    """No two leaves have the same values, and none is zero unless its initializer says so."""
    drawn = {path: value.ravel()[:16] for path, value in initial.params.items() if "kernel" in path or "embed" in path}
    assert len({value.tobytes() for value in drawn.values()}) == len(drawn)
    assert all(np.all(value != 0) for value in drawn.values())
    assert all(np.all(value == 1) for path, value in initial.params.items() if path.endswith("scale"))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(initial.moments))
    assert initial.step == 0


def test_loaded_parameters_are_kept_and_the_others_initialized(initial):
    setup = Setup.of(**{"mesh.fsdp": 2, "mesh.data": 1, "model.precision": "bfloat16", "rules": STAGE_1})
    missing = {"fusion/connector/mbtf/second/kernel", "fusion/connector/stf/conv/bias"}
    values = {path: value for path, value in random_params(setup.plan.shapes).items() if path not in missing}

    def start(config):
        # The arrays are donated, so each start gets its own.
        loaded = {path: jax.device_put(value, setup.layout.params[path].sharding) for path, value in values.items()}
        return init_state(config, setup.plan, setup.layout, setup.tx, loaded)

    state, other = start(setup.config), start(dataclasses.replace(setup.config, seed=1))
    for path, leaf in state.trainable.items():
        np.testing.assert_array_equal(np.asarray(leaf), initial.params[path] if path in missing else values[path])
    for path, leaf in state.frozen.items():
        np.testing.assert_array_equal(np.asarray(leaf), values[path].astype(jnp.bfloat16))
    for path in state.params:
        assert np.array_equal(state.params[path], other.params[path]) == (path not in missing), path


def test_adapters_start_as_pefts_and_change_no_other_parameter(initial):
    """A is U(±1/√inputs), B is 0. The kernels beside them are quantized as loaded ones are."""
    rules = (("llm/blocks/mlp/.*", "lora:rank=16@nf4"), ("llm/.*", "lora:rank=16@int8"), (".*", "train"))
    setup = Setup.of(**{"mesh.data": 1, "rules": rules})
    params = jax.tree.map(np.asarray, init_state(setup.config, setup.plan, setup.layout, setup.tx, {})).params
    assert len(setup.plan.adapted) == 2 * 7
    assert setup.plan.quantized.keys() == setup.plan.adapters.keys()
    expected = initial.params
    for path in setup.plan.quantized:
        expected |= quantized_by_definition(setup.plan, path, expected[path])
    for path, value in params.items():
        if path not in setup.plan.adapted:
            np.testing.assert_array_equal(value, expected[path], strict=True)
        elif path.endswith("/b"):
            assert not value.any()
        else:
            bound = np.prod(value.shape[1:-1]) ** -0.5
            assert 0.95 * bound < np.abs(value).max() <= bound
            assert abs(value.std() / (bound / 3**0.5) - 1) < 0.1, path
