"""The mesh, and the sharding of every parameter on it."""

import contextlib
import math

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from tiny import Setup, batches, load_recipe, random_params, tiny

from stf_jax.config import MeshConfig, ModelConfig, UserError
from stf_jax.models.blueprint import blueprint
from stf_jax.parallel.mesh import BATCH, check_batch, fit_mesh, get_row_share, make_mesh, parameter_sharding
from stf_jax.planning.topology import topology_devices
from stf_jax.training.state import init_state, state_layout

# ---- Sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((-1, 1, 1), (8, 1, 1)),
        ((1, -1, 1), (1, 8, 1)),
        ((1, 1, -1), (1, 1, 8)),
        ((2, -1, 2), (2, 2, 2)),
        ((-1, 4, 2), (1, 4, 2)),
        ((2, 2, 2), (2, 2, 2)),
        ((1, 2, 4), (1, 2, 4)),
        # If all sizes are given, devices may be left unused.
        ((1, 1, 1), (1, 1, 1)),
        ((1, 2, 2), (1, 2, 2)),
        # Devices without a slice index form one slice.
        ((-1, -1, 1), (1, 8, 1)),
        ((-1, -1, 2), (1, 4, 2)),
    ],
)
def test_mesh_has_the_given_sizes(sizes, expected):
    mesh = make_mesh(MeshConfig(*sizes))
    assert dict(mesh.shape) == dict(zip(("data", "fsdp", "tensor"), expected, strict=True))
    assert sorted(d.id for d in mesh.devices.flat) == list(range(math.prod(expected)))
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((4, 4, 1), "4×4×1 does not fit the 8 cpu device(s)"),
        ((9, 1, 1), "9×1×1 does not fit"),
        ((-1, 16, 1), "-1×16×1 does not fit"),
        ((-1, 3, 1), "-1×3×1 does not fit"),
        ((-1, -1, 3), "-1×-1×3 does not fit"),
        ((-1, -1, -1), "Only one mesh axis may be -1, or mesh.data and mesh.fsdp both; set mesh.tensor to a size."),
        ((1, -1, -1), "Only one mesh axis may be -1"),
        ((1, 0, 1), "mesh.fsdp=0 must be at least 1, or -1"),
        ((1, 1, -2), "mesh.tensor=-2 must be at least 1, or -1"),
    ],
)
def test_invalid_sizes_are_refused(sizes, message):
    with pytest.raises(UserError) as raised:
        make_mesh(MeshConfig(*sizes))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({"global_batch_size": 16}, (1, 8, 1)),
        ({"global_batch_size": 4}, (1, 4, 2)),
        ({"global_batch_size": 8, "optimizer.accumulation_steps": 4}, (1, 2, 4)),
        ({"global_batch_size": 3}, (1, 8, 1)),  # which the check then refuses
        ({"global_batch_size": 4, "mesh.fsdp": 8}, (1, 8, 1)),  # as the config says
    ],
)
def test_tensor_takes_the_devices_that_rows_cannot_be_split_over(changes, sizes):
    config = tiny(**{"mesh.fsdp": -1} | changes)
    assert tuple(make_mesh(fit_mesh(config).mesh).shape.values()) == sizes


def test_the_recipe_starts_on_a_pod_with_more_chips_than_rows():
    config = load_recipe("finetune.py")
    assert config.global_batch_size == 128
    devices = topology_devices("v5e:16x16")
    mesh = make_mesh(fit_mesh(config, devices).mesh, devices)
    check_batch(config, mesh)
    assert tuple(mesh.shape.values()) == (1, 128, 2)


@pytest.mark.parametrize(
    ("sizes", "rows", "accumulation", "fits"),
    [
        ((8, 1, 1), 8, 1, True),
        ((2, 2, 2), 4, 1, True),
        ((1, 1, 8), 1, 1, True),
        ((2, 2, 2), 6, 1, False),
        ((4, 2, 1), 12, 1, False),
        ((2, 1, 1), 8, 4, True),
        ((2, 1, 1), 8, 8, False),
        ((4, 1, 1), 8, 4, False),
    ],
)
def test_mesh_and_microbatches_must_divide_the_batch(sizes, rows, accumulation, fits):
    config = tiny(
        **dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), sizes, strict=True)),
        global_batch_size=rows,
        **{"optimizer.accumulation_steps": accumulation},
    )
    if fits:
        check_batch(config, make_mesh(config.mesh))
    else:
        with pytest.raises(
            UserError, match=rf"global_batch_size={rows} is not a multiple of \d+ .*mesh.data {sizes[0]}"
        ):
            check_batch(config, make_mesh(config.mesh))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.tokens_per_batch": 1535}, r"=1535 must be at least .* = 1536; .* as 4\.$"),
        ({"data.tokens_per_batch": 1536, "data.packing": True}, "is for rows that are not packed"),
        ({"data.tokens_per_batch": 1536}, ""),
    ],
)
def test_batches_by_tokens_must_have_room_for_the_longest_rows(changes, message):
    config = tiny(**{"mesh.data": 2, "mesh.fsdp": 2, "global_batch_size": 8} | changes)
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        check_batch(config, make_mesh(config.mesh))


# ---- Slices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "slices", "sizes", "expected"),
    [
        ("v5e:4x8", 1, (-1, -1, 1), (1, 32, 1)),
        ("v5e:4x8", 2, (-1, -1, 1), (2, 32, 1)),
        ("v5e:4x8", 2, (-1, -1, 4), (2, 8, 4)),
        ("v5e:4x8", 2, (4, -1, 2), (4, 8, 2)),
        ("v5e:4x8", 2, (-1, 4, 2), (8, 4, 2)),
        ("v6e:4x4", 3, (-1, -1, 2), (3, 8, 2)),
        # A torus whose axes must be split.
        ("v5p:4x4x4", 1, (-1, -1, 2), (1, 32, 2)),
    ],
)
def test_data_spans_slices(name, slices, sizes, expected, caplog):
    devices = topology_devices(name, slices)
    mesh = make_mesh(MeshConfig(*sizes), devices)
    assert mesh.devices.shape == expected
    assert set(mesh.devices.flat) == set(devices)
    for rank, part in enumerate(mesh.devices):
        assert {getattr(device, "slice_index", 0) for device in part.flat} == {rank * slices // expected[0]}
    assert not caplog.messages


def test_fsdp_spans_slices_with_a_warning(caplog):
    mesh = make_mesh(MeshConfig(1, -1, 2), topology_devices("v5e:4x8", 2))
    assert mesh.devices.shape == (1, 32, 2)
    assert [{device.slice_index for device in pair} for pair in mesh.devices[0]] == [{0}] * 16 + [{1}] * 16
    (warning,) = caplog.messages
    assert "mesh.fsdp=32 spans 2 slices" in warning
    assert "mesh.data to a multiple of 2" in warning


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1, 1, 64), "make mesh.tensor=64 span the 2 slices here; set mesh.data to a multiple of 2"),
        ((3, 1, -1), "does not fit the 64 tpu device"),
        # With several hosts, none may be left unused.
        ((1, 32, 1), "does not fit the 64 tpu device"),
    ],
)
def test_tensor_stays_in_a_slice_and_all_hosts_are_used(sizes, message):
    with pytest.raises(UserError, match=message):
        make_mesh(MeshConfig(*sizes), topology_devices("v5e:4x8", 2))


@pytest.mark.parametrize(
    ("name", "slices", "sizes", "shares"),
    [
        ("v5e:4x8", 1, (-1, -1, 1), 8),
        ("v5e:4x8", 2, (-1, -1, 1), 16),
        ("v5e:4x8", 2, (-1, -1, 4), 8),
        ("v5p:2x2x4", 1, (1, 2, -1), 1),
    ],
)
def test_hosts_with_the_same_rows_read_the_same_share(name, slices, sizes, shares):
    mesh = make_mesh(MeshConfig(*sizes), topology_devices(name, slices))
    rows = jax.NamedSharding(mesh, BATCH).devices_indices_map((64,))
    rows_of_share = {}
    for process in {device.process_index for device in mesh.devices.flat}:
        process_rows = {(part.start, part.stop) for d, (part,) in rows.items() if d.process_index == process}
        share, count = get_row_share(mesh, process)
        assert count == shares
        assert rows_of_share.setdefault(share, process_rows) == process_rows
    assert sorted(rows_of_share) == list(range(shares))
    # Together they read every row exactly once.
    read = [row for share_rows in rows_of_share.values() for start, stop in share_rows for row in range(64)[start:stop]]
    assert sorted(read) == list(range(64))


def test_hosts_that_share_only_some_rows_are_refused():
    devices = sorted(topology_devices("v5e:4x8", 1), key=lambda device: device.process_index)
    mesh = jax.sharding.Mesh(np.roll(devices, 1).reshape(1, 4, 8), ("data", "fsdp", "tensor"))
    with pytest.raises(UserError, match=r"mesh\.tensor=8 gives the hosts unequal shares of the rows"):
        get_row_share(mesh, 0)


# ---- Parameters ------------------------------------------------------------------------------------------------------

EXPECTED = {
    "fusion/connector/mbtf/first/bias": P("tensor"),
    "fusion/connector/mbtf/first/kernel": P("fsdp", "tensor"),
    "fusion/connector/mbtf/second/bias": P("fsdp"),
    "fusion/connector/mbtf/second/kernel": P("tensor", "fsdp"),
    "fusion/connector/stf/conv/bias": P("tensor"),
    "fusion/connector/stf/conv/kernel": P(None, None, "fsdp", "tensor"),
    "fusion/connector/stf/out/bias": P("fsdp"),
    "fusion/connector/stf/out/kernel": P("tensor", "fsdp"),
    "llm/blocks/attention/key/kernel": P(None, "fsdp", "tensor", None),
    "llm/blocks/attention/out/kernel": P(None, "tensor", None, "fsdp"),
    "llm/blocks/attention/query/kernel": P(None, "fsdp", "tensor", None),
    "llm/blocks/attention/value/kernel": P(None, "fsdp", "tensor", None),
    "llm/blocks/attention_norm/scale": P(None, None),
    "llm/blocks/mlp/down/kernel": P(None, "tensor", "fsdp"),
    "llm/blocks/mlp/gate/kernel": P(None, "fsdp", "tensor"),
    "llm/blocks/mlp/up/kernel": P(None, "fsdp", "tensor"),
    "llm/blocks/mlp_norm/scale": P(None, None),
    "llm/embedding": P("tensor", "fsdp"),
    "llm/norm/scale": P(None),
    "vision/blocks/attention/key/bias": P(None, "tensor", None),
    "vision/blocks/attention/key/kernel": P(None, "fsdp", "tensor", None),
    "vision/blocks/attention/out/bias": P(None, "fsdp"),
    "vision/blocks/attention/out/kernel": P(None, "tensor", None, "fsdp"),
    "vision/blocks/attention/query/bias": P(None, "tensor", None),
    "vision/blocks/attention/query/kernel": P(None, "fsdp", "tensor", None),
    "vision/blocks/attention/value/bias": P(None, "tensor", None),
    "vision/blocks/attention/value/kernel": P(None, "fsdp", "tensor", None),
    "vision/blocks/attention_norm/bias": P(None, None),
    "vision/blocks/attention_norm/scale": P(None, None),
    "vision/blocks/mlp/down/bias": P(None, "fsdp"),
    "vision/blocks/mlp/down/kernel": P(None, "tensor", "fsdp"),
    "vision/blocks/mlp/up/bias": P(None, "tensor"),
    "vision/blocks/mlp/up/kernel": P(None, "fsdp", "tensor"),
    "vision/blocks/mlp_norm/bias": P(None, None),
    "vision/blocks/mlp_norm/scale": P(None, None),
    "vision/class_token": P(None),
    "vision/patch_embed/kernel": P(None, None, None, "fsdp"),
    "vision/position_embed": P(None, "fsdp"),
    "vision/pre_norm/bias": P(None),
    "vision/pre_norm/scale": P(None),
}


@pytest.fixture(scope="module")
def cube():
    """The tiny model's setup on a 2×2×2 mesh."""
    return Setup.of(**{"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2})


def test_every_parameter_has_the_expected_sharding(cube):
    assert {path: sharding.spec for path, sharding in cube.plan.shardings(cube.mesh).items()} == EXPECTED


def _check_sharding(array, spec, name):
    """Checks that each device holds the shard of this spec: on the 2×2×2 mesh, half of each sharded axis."""
    assert array.sharding.spec == spec, name
    expected = tuple(
        size // 2 if axis else size for size, axis in zip(array.shape, [*spec, *[None] * array.ndim], strict=False)
    )
    assert [shard.data.shape for shard in array.addressable_shards] == [expected] * 8, name


def test_devices_hold_their_shards_of_state_and_moments(cube):
    shardings = cube.plan.shardings(cube.mesh)
    values = random_params(cube.plan.shapes)
    # Loaded rather than initialized: there is less to compile, and the same program shards them.
    state = init_state(
        cube.config, cube.plan, cube.layout, cube.tx, {p: jax.device_put(v, shardings[p]) for p, v in values.items()}
    )
    assert state.params.keys() == EXPECTED.keys()
    for path, array in state.params.items():
        _check_sharding(array, EXPECTED[path], path)
        np.testing.assert_array_equal(np.asarray(array), values[path])
    for name in ("mu", "nu"):
        moments = optax.tree_utils.tree_get(state.moments, name)
        assert moments.keys() == state.trainable.keys()
        for path, array in moments.items():
            _check_sharding(array, EXPECTED[path], f"{name} of {path}")
    for leaf in [state.step, *(leaf for leaf in jax.tree.leaves(state.moments) if leaf.ndim == 0)]:
        assert leaf.sharding.is_fully_replicated


def test_batches_are_split_over_data_and_fsdp(cube):
    batch = jax.device_put(batches(cube.config, 1)[0], jax.NamedSharding(cube.mesh, BATCH))
    assert P(("data", "fsdp")) == BATCH
    for array in jax.tree.leaves(batch):
        rows = {shard.device.id: shard.index[0] for shard in array.addressable_shards}
        assert {shard.data.shape for shard in array.addressable_shards} == {(2, *array.shape[1:])}
        # Devices of one tensor group hold the same rows.
        assert [rows[device.id].indices(8)[0] for device in cube.mesh.devices.flat] == [0, 0, 2, 2, 4, 4, 6, 6]


def test_axis_without_a_rule_is_a_bug():
    with pytest.raises(ValueError, match=r"Parameter llm/new has axes without a rule: \['wide'\]"):
        parameter_sharding("llm/new", (8, 8), ("embed", "wide"), make_mesh(MeshConfig()))


@pytest.mark.parametrize(
    ("sizes", "shape", "refused"),
    [
        ((1, 8, 1), (1024, 1024), True),
        ((4, 1, 2), (1024, 1024), True),
        ((8, 1, 1), (1024, 1024), False),
        ((1, 8, 1), (1024, 1023), False),
    ],
)
def test_replicated_large_parameter_is_a_bug(sizes, shape, refused):
    mesh = make_mesh(MeshConfig(*sizes))
    if refused:
        with pytest.raises(ValueError, match=r"vision/big of 1048576 elements would be replicated"):
            parameter_sharding("vision/big", shape, ("position", "head_dim"), mesh)
    else:
        assert parameter_sharding("vision/big", shape, ("position", "head_dim"), mesh).is_fully_replicated


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        # Two key heads cannot be split over four devices, nor a width of 32 over three.
        ((1, 1, 4), "mesh.tensor=4 does not divide the kv_heads axis of llm/blocks/attention/key/kernel, which is 2"),
        ((1, 3, 1), "mesh.fsdp=3 does not divide the embed axis of fusion/connector/mbtf/second/bias, which is 32"),
    ],
)
def test_mesh_that_does_not_divide_a_parameter_is_refused(sizes, message):
    config = tiny()
    plan, mesh = blueprint(config.model), make_mesh(MeshConfig(*sizes))
    with pytest.raises(UserError) as raised:
        state_layout(config, plan, optax.sgd(0.1), mesh)
    assert message in str(raised.value)


def test_each_device_holds_an_eighth_of_seven_billion_parameters():
    plan, mesh = blueprint(ModelConfig(vision="clip-l-14-336", llm="vicuna-7b")), make_mesh(MeshConfig(1, 8, 1))
    total = sum(math.prod(leaf.shape) for leaf in plan.shapes.values())
    per_device = sum(
        math.prod(sharding.shard_shape(plan.shapes[path].shape)) for path, sharding in plan.shardings(mesh).items()
    )
    assert total > 7.2e9
    assert total / 8 <= per_device < total / 8 * 1.001
