"""Communication counts of compiled programs with known traffic, and of HLO text from other compilers."""

import functools
import itertools
import operator
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from stf_jax.planning.hlo import Traffic, count_traffic

pytestmark = pytest.mark.usefixtures("optimized")

AXES = ("data", "fsdp", "tensor")
SUBSETS = [axes for size in (1, 2, 3) for axes in itertools.combinations(AXES, size)]
ROWS, BYTES = 64, 64 * 4  # float32, on each device


@functools.cache
def make_mesh(*sizes, order=range(8)):
    return Mesh(np.array(jax.devices())[list(order)].reshape(sizes), AXES, axis_types=(AxisType.Auto,) * 3)


def compile_hlo(function, mesh, *types):
    """Optimized HLO of a function of one device's rows."""
    sharding = NamedSharding(mesh, P(AXES))
    arguments = [jax.ShapeDtypeStruct((ROWS * mesh.size,), kind, sharding=sharding) for kind in types or (jnp.float32,)]
    mapped = jax.shard_map(function, mesh=mesh, in_specs=P(AXES), out_specs=P(AXES), check_vma=False)
    return jax.jit(mapped).lower(*arguments).compile().as_text()


# ---- Compiled for eight devices --------------------------------------------------------------------------------------

OPERATIONS = {
    "all-gather": (lax.all_gather, lambda n: BYTES * (n - 1)),
    "reduce-scatter": (functools.partial(lax.psum_scatter, tiled=True), lambda n: BYTES * (n - 1) // n),
    "all-reduce": (lax.psum, lambda n: 2 * BYTES * (n - 1) // n),
    "all-to-all": (
        functools.partial(lax.all_to_all, split_axis=0, concat_axis=0, tiled=True),
        lambda n: BYTES * (n - 1) // n,
    ),
    "collective-permute": (
        lambda x, axes: lax.ppermute(x, axes, [(i, (i + 1) % 2 ** len(axes)) for i in range(2 ** len(axes))]),
        lambda n: BYTES,
    ),
}


@pytest.mark.parametrize("kind", OPERATIONS)
def test_each_operation_over_each_subset_of_axes(kind):
    operation, sent = OPERATIONS[kind]
    text = compile_hlo(lambda x: [operation(x * i, axes) for i, axes in enumerate(SUBSETS)], make_mesh(2, 2, 2))
    entries = count_traffic(text, make_mesh(2, 2, 2))
    expected = {(kind, axes, sent(2 ** len(axes))) for axes in SUBSETS}
    assert {(entry.kind, entry.axes, entry.bytes) for entry in entries} == expected
    assert [entry.bytes for entry in entries] == sorted((entry.bytes for entry in entries), reverse=True)


@pytest.mark.parametrize(("sizes", "order"), [((2, 2, 2), range(8)), ((1, 4, 2), (3, 1, 0, 2, 7, 5, 6, 4))])
@pytest.mark.parametrize("axes", SUBSETS)
def test_all_gather_inserted_by_the_partitioner(axes, sizes, order):
    mesh = make_mesh(*sizes, order=order)
    argument = jax.ShapeDtypeStruct((ROWS, 8), jnp.int32, sharding=NamedSharding(mesh, P(axes)))
    compiled = jax.jit(lambda x: x + 1, out_shardings=NamedSharding(mesh, P())).lower(argument).compile()
    over = tuple(axis for axis in axes if mesh.shape[axis] > 1)
    n = np.prod([mesh.shape[axis] for axis in over], dtype=int)
    assert count_traffic(compiled.as_text(), mesh) == (
        [Traffic("all-gather", over, ROWS * 8 * 4 * (n - 1) // n, 1, False)] if over else []
    )


def test_bytes_depend_on_the_dtype():
    types = {jnp.float32: 4, jnp.int8: 1, jnp.uint32: 4, jnp.bool: 1, jnp.int16: 2}
    text = compile_hlo(lambda *arrays: [lax.all_gather(array, "fsdp") for array in arrays], make_mesh(2, 2, 2), *types)
    (entry,) = count_traffic(text, make_mesh(2, 2, 2))
    assert entry.bytes == ROWS * sum(types.values())


# ---- Loops and branches ----------------------------------------------------------------------------------------------


def scan(times):
    return lambda x: lax.scan(lambda x, _: (lax.psum(x, "fsdp"), None), x, None, times)[0]


def nested_scan(x):
    return lax.scan(lambda x, _: (lax.psum(scan(3)(x), "data"), None), x, None, 5)[0]


def counted_loop(start, compare, stop, step):
    def body(state):
        return state[0] + step, lax.psum(state[1], "fsdp")

    return lambda x: lax.while_loop(lambda state: compare(state[0], stop), body, (start, x))[1]


def data_dependent_loop(x):
    return lax.while_loop(lambda x: x.sum() > 1, lambda x: lax.psum(x, "fsdp") * 0.1, x)


@pytest.mark.parametrize("annotated", [True, False], ids=["annotated", "not annotated"])
@pytest.mark.parametrize(
    ("function", "counts"),
    [
        (scan(5), {"fsdp": 5}),
        (nested_scan, {"fsdp": 15, "data": 5}),
        (lambda x: scan(2)(x) + scan(4)(x), {"fsdp": 6}),
        (counted_loop(1, operator.lt, 10, 2), {"fsdp": 5}),
        (counted_loop(1, operator.le, 10, 3), {"fsdp": 4}),
        (counted_loop(9, operator.gt, 2, -1), {"fsdp": 7}),
        (counted_loop(9, operator.ge, 3, -2), {"fsdp": 4}),
        (counted_loop(11, operator.ne, 3, -2), {"fsdp": 4}),
    ],
    ids=["scan", "nested", "twice", "<", "<=", ">", ">=", "!="],
)
def test_loops_count_every_iteration(function, counts, annotated):
    text = compile_hlo(function, make_mesh(2, 2, 2))
    assert " while(" in text
    if not annotated:  # as on TPUs
        text = re.sub(r'"known_trip_count":\{"n":"\d+"\}', "", text)
    entries = {entry.axes[0]: (entry.count, entry.bytes) for entry in count_traffic(text, make_mesh(2, 2, 2))}
    assert entries == {axis: (count, count * BYTES) for axis, count in counts.items()}


def test_the_annotated_trip_count_takes_precedence_over_the_counter():
    text = compile_hlo(scan(5), make_mesh(2, 2, 2)).replace(
        '"known_trip_count":{"n":"5"}', '"known_trip_count":{"n":"9"}'
    )
    assert count_traffic(text, make_mesh(2, 2, 2))[0].count == 9


def test_a_data_dependent_loop_is_an_error_if_it_communicates():
    with pytest.raises(ValueError, match=r"The loop while\S* in main\S* communicates, but its number of iterations"):
        count_traffic(compile_hlo(data_dependent_loop, make_mesh(2, 2, 2)), make_mesh(2, 2, 2))
    quiet = compile_hlo(lambda x: lax.while_loop(lambda x: x.sum() > 1, lambda x: x * 0.1, x), make_mesh(2, 2, 2))
    assert " while(" in quiet
    assert count_traffic(quiet, make_mesh(2, 2, 2)) == []


def test_a_conditional_counts_as_the_branch_that_sends_most():
    def conditional(x):
        most = lambda x: lax.psum(lax.psum(x, "data") * x, "tensor")  # noqa: E731
        return lax.switch(x[0].astype(int), [lambda x: x, most, lambda x: lax.psum(x, "fsdp")], x)

    entries = count_traffic(compile_hlo(conditional, make_mesh(2, 2, 2)), make_mesh(2, 2, 2))
    assert {(entry.axes, entry.bytes) for entry in entries} == {(("data",), BYTES), (("tensor",), BYTES)}


# ---- HLO text of other compilers -------------------------------------------------------------------------------------


def module(operations, computations="", partitions=8):
    head = "ENTRY %main (a: bf16[16]) -> bf16[16] {\n  %a = bf16[16]{0} parameter(0)\n"
    return f"HloModule m, num_partitions={partitions}\n\n{computations}{head}{operations}\n}}\n"


@pytest.mark.parametrize(
    ("groups", "axes", "n"),
    [
        ("{{0,4},{1,5},{2,6},{3,7}}", ("data",), 2),
        ("{{0,3},{1,2},{4,7},{5,6}}", ("fsdp", "tensor"), 2),  # not aligned with any axis of the mesh
        ("{{0},{1},{2},{3},{4},{5},{6},{7}}", (), 1),
        ("{}", AXES, 8),
        ("[4,2]<=[8]", ("tensor",), 2),
        ("[4,2]<=[4,2]T(1,0)", ("fsdp",), 2),
        ("[2,4]<=[2,2,2]T(1,0,2)", ("data", "tensor"), 4),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", ("fsdp", "tensor"), 4),
        ("mesh['axis_0'=2,'axis_1'=1,'axis_2'=4] {'axis_0','axis_1'}", ("data",), 2),
        ("mesh['axis_0'=2,'axis_1'=4], device_ids=([2,2,2]T(1,0,2)) {'axis_0'}", ("fsdp",), 2),
        ("mesh['axis_0'=2,'axis_1'=4], device_ids=(0,4,1,5,2,6,3,7) {'axis_1'}", ("data", "tensor"), 4),
        ("mesh['axis_0'=8] {'axis_0':(2)2}", ("fsdp",), 2),  # part of an axis
        ("mesh['axis_0'=8] {'axis_0':(4)2,'axis_0':(1)2}", ("data", "tensor"), 4),
    ],
)
def test_groups(groups, axes, n):
    line = f"  ROOT %b = bf16[99]{{0}} all-gather(%a), channel_id=1, replica_groups={groups}, dimensions={{0}}"
    expected = [Traffic("all-gather", axes, 32 * (n - 1), 1, False)] if axes else []
    assert count_traffic(module(line), make_mesh(2, 2, 2)) == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("%b = bf16[16]{0} all-gather(%a), replica_groups=<0 to 7>, dimensions={0}", "unknown form: <0 to 7>"),
        ("%b = bf16[16]{0} all-gather(%a), _xla_megascale_target={1,2}to{3,4}", "unknown form: .1,2.to"),
        ("%b = bf16[16]{0} all-knowing(%a), replica_groups=[4,2]<=[8]", "kind, all-knowing, is not known"),
    ],
)
def test_unparsable_text_is_an_error(line, message):
    with pytest.raises(ValueError, match=message):
        count_traffic(module("  ROOT " + line), make_mesh(2, 2, 2))


# From a compiler for slices of 2×2 v5e: collectives over these axes, and how the mesh was laid out on the devices.
TRANSPOSED = lambda ids: ids.reshape(2, 2, 2).transpose(1, 0, 2)  # noqa: E731
PERMUTED = lambda ids: ids[:, [2, 0, 3, 1]].reshape(2, 2, 2)  # noqa: E731
FOUR_SLICES = lambda ids: ids.reshape(2, 2, 4)  # noqa: E731
SEND = "send(%a, %order), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_megascale_target="


@pytest.mark.parametrize(
    ("layout", "operation", "expected"),
    [
        (TRANSPOSED, "all-reduce(%a), channel_id=1, replica_groups={{0,2},{1,3}}", ("all-reduce", ("data",), 32)),
        (TRANSPOSED, "all-reduce(%a), channel_id=1, replica_groups={{0,1},{2,3}}", ("all-reduce", ("tensor",), 32)),
        (TRANSPOSED, "all-reduce(%a), channel_id=1, replica_groups={}", ("all-reduce", ("data", "tensor"), 48)),
        (TRANSPOSED, SEND + '"{1,2}x{0:3}",TYPE="ALL_REDUCE"', ("all-reduce", ("fsdp",), 32)),
        (TRANSPOSED, SEND + '"{1,2}x{0:3}",TYPE="ALL_GATHER"', ("all-gather", ("fsdp",), 32)),
        (TRANSPOSED, SEND + '"{1,2}x{0:3}",TYPE="REDUCE_SCATTER"', ("reduce-scatter", ("fsdp",), 16)),
        (
            PERMUTED,
            SEND + '{{100002,100003,200002,200003},{100000,100001,200000,200001}},TYPE="ALL_TO_ALL"',
            ("all-to-all", ("data", "fsdp"), 24),
        ),
        (
            PERMUTED,
            SEND + '{{100002->200002},{100000->200000},{100003->200003},{100001->200001}},TYPE="ONE_TO_ONE"',
            ("collective-permute", ("data",), 32),
        ),
        (
            FOUR_SLICES,
            SEND + '{{100000,300000},{100001,300001},{200000,400000},{200001,400001}},TYPE="ALL_REDUCE"',
            ("all-reduce", ("data",), 32),
        ),
    ],
)
def test_slices(layout, operation, expected):
    slices = 4 if layout is FOUR_SLICES else 2
    ids = np.array([[100_000 * (number + 1) + device for device in range(4)] for number in range(slices)])
    device = np.vectorize(lambda id_: types.SimpleNamespace(id=id_, slice_index=id_ // 100_000 - 1), otypes=[object])
    mesh = types.SimpleNamespace(devices=device(layout(ids)), axis_names=AXES, size=4 * slices)
    operation = operation.replace("TYPE", "_xla_megascale_transfer_type")
    received = operation.replace("send(%a, %order)", "recv(%order)") if "send" in operation else "bitcast(%a)"
    text = module(
        f"  %order = token[] after-all()\n  %r = bf16[16]{{0}} {received}\n  %b = bf16[16]{{0}} {operation}", "", 4
    )
    assert count_traffic(text, mesh) == [Traffic(*expected, 1, "send" in operation)]


# Shortened from programs for h100 and v5e.
ASYNC = """\
  %t = (f32[9]{0:T(128)S(1)}, f8e4m3fn[24]{0}) opt-barrier(%u)
  %g = ((bf16[16]{0}, f32[9]{0}, f8e4m3fn[24]{0}), (bf16[128]{0}, f32[72]{0}, f8e4m3fn[192]{0})) all-gather-start(%a, \
/*index=1*/%t#0, %t#1), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
  %h = (bf16[128]{0}, f32[72]{0}, f8e4m3fn[192]{0}) all-gather-done(%g)
  %s = ((bf16[16]{0}), bf16[8]{0}) reduce-scatter-start(%a), replica_groups=[4,2]<=[8], to_apply=%add
  %d = bf16[8]{0} reduce-scatter-done(%s)
  %p = (bf16[16]{0}, bf16[16]{0}, u32[], u32[]) collective-permute-start(%a), source_target_pairs={{0,2},{4,6}}
  %q = bf16[16]{0} collective-permute-done(%p)
  %n = bf16[16]{0} collective-permute(%q), channel_id=4, source_target_pairs={}
  %e = ((bf16[16]{0}), bf16[16]{0}, u32[]) async-start(%q), async_execution_thread="sparsecore", calls=%wrapped
  %f = bf16[16]{0} async-done(%e), async_execution_thread="sparsecore", calls=%wrapped
  ROOT %r = bf16[16]{0} all-reduce(%a, %f), channel_id=2, replica_groups=[4,2]<=[8], to_apply=%add"""
WRAPPED = """\
%wrapped (x: bf16[16]) -> bf16[16] {
  %x = bf16[16]{0} parameter(0)
  ROOT %all-to-all = bf16[16]{0} all-to-all(%x), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}

"""


def test_asynchronous_operations_count_once():
    assert count_traffic(module(ASYNC, WRAPPED), make_mesh(2, 2, 2)) == [
        Traffic("all-gather", AXES, (16 * 2 + 9 * 4 + 24) * 7, 1, False),
        Traffic("all-reduce", ("tensor",), 2 * (16 * 2 + 16 * 2) // 2, 1, False),
        Traffic("collective-permute", ("fsdp",), 16 * 2, 1, False),
        Traffic("all-to-all", ("fsdp", "tensor"), 16 * 2 * 3 // 4, 1, False),
        Traffic("reduce-scatter", ("tensor",), 16 * 2 // 2, 1, False),
    ]


# A loop over 3 layers. In each, weights are gathered during a matrix product that is itself a loop, which sends its
# operand around the ring: 4 iterations (u32 6 to 14 by 2) of two steps each, then one more step. The condition and the
# addition of the counter are fused or copied, as compilers do.
WINDOWED = """\
HloModule jit_train_step, is_scheduled=true

%start (x: bf16[16,128]) -> (bf16[16,128], bf16[128,128]) {
  %x = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[128,128]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=7, GROUPS, dimensions={0}, CONFIG
  ROOT %custom-call.1 = (bf16[16,128]{1,0}, bf16[128,128]{1,0}) custom-call(%all-gather.1), \
custom_call_target="AsyncCollectiveSTART"
}

%step (y: bf16[16,128]) -> bf16[128,128] {
  %y = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[128,128]{1,0:T(8,128)(2,1)} all-gather(%y), channel_id=7, GROUPS, dimensions={0}, CONFIG
}

%done (z: bf16[16,128]) -> bf16[128,128] {
  %z = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.3 = bf16[128,128]{1,0:T(8,128)(2,1)} all-gather(%z), channel_id=7, GROUPS, dimensions={0}, CONFIG
  ROOT %custom-call.3 = bf16[128,128]{1,0} custom-call(%all-gather.3), custom_call_target="AsyncCollectiveDone"
}

%windowed_cond (p: (u32[], bf16[16,128])) -> pred[] {
  %c = u32[]{:T(128)} constant(14)
  %p = (u32[]{:T(128)}, bf16[16,128]{1,0}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %c), direction=LT
}

%windowed_body (p: (u32[], bf16[16,128])) -> (u32[], bf16[16,128]) {
  %two = u32[]{:T(128)} constant(2)
  %p = (u32[]{:T(128)}, bf16[16,128]{1,0}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  %v = bf16[16,128]{1,0} get-tuple-element(%p), index=1
  %f = bf16[128,128]{1,0} fusion(%v), kind=kOutput, calls=%step
  %there = bf16[16,128]{1,0} collective-permute(%v), channel_id=8, RING
  %further = bf16[16,128]{1,0} collective-permute(%there), channel_id=9, RING
  %next = u32[]{:T(128)} add(%i, %two)
  ROOT %t = (u32[]{:T(128)}, bf16[16,128]{1,0}) tuple(%next, %further)
}

%less (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %gt = pred[] compare(%b, %a), direction=GT
}

%cond (p: (s32[], bf16[16,128], s32[], s32[])) -> pred[] {
  %p = (s32[], bf16[16,128]{1,0}, s32[], /*index=3*/s32[]) parameter(0)
  ROOT %going = pred[] fusion(%p#0, %p#2), kind=kLoop, calls=%less
}

%body (p: (s32[], bf16[16,128], s32[], s32[])) -> (s32[], bf16[16,128], s32[], s32[]) {
  %six = u32[]{:T(128)} constant(6)
  %p = (s32[], bf16[16,128]{1,0}, s32[], /*index=3*/s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %w = bf16[16,128]{1,0} get-tuple-element(%p), index=1
  %end = s32[] get-tuple-element(%p), index=2
  %one = s32[] get-tuple-element(%p), index=3
  %s = (bf16[16,128]{1,0}, bf16[128,128]{1,0}) fusion(%w), kind=kCustom, calls=%start
  %copy = u32[]{:T(128)} copy(%six)
  %into = (u32[]{:T(128)}, bf16[16,128]{1,0}) tuple(%copy, %w)
  %while.2 = (u32[]{:T(128)}, bf16[16,128]{1,0}) while(%into), condition=%windowed_cond, body=%windowed_body
  %v = bf16[16,128]{1,0} get-tuple-element(%while.2), index=1
  %last = bf16[16,128]{1,0} collective-permute(%v), channel_id=10, RING
  %d = bf16[128,128]{1,0} fusion(%w), kind=kCustom, calls=%done
  %next = s32[] add(%i, %one)
  ROOT %t = (s32[], bf16[16,128]{1,0}, s32[], s32[]) tuple(%next, %last, %end, %one)
}

%all-reduce-scatter (input: f32[8,128]) -> f32[1,128] {
  %input = f32[8,128]{1,0} parameter(0)
  %all-reduce.1 = f32[8,128]{1,0} all-reduce(%input), channel_id=11, GROUPS, use_global_device_ids=true, to_apply=%add
  %zero = u32[] constant(0)
  ROOT %dynamic-slice = f32[1,128]{1,0} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={1,128}
}

ENTRY %main (w: bf16[16,128], g: f32[8,128]) -> f32[1,128] {
  %w = bf16[16,128]{1,0} parameter(0)
  %g = f32[8,128]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %one = s32[] constant(1)
  %three = s32[] constant(3)
  %into = (s32[], bf16[16,128]{1,0}, s32[], s32[]) tuple(%zero, %w, %three, %one)
  %alone = ((s32[], bf16[16,128]{1,0}, s32[], s32[])) tuple(%into)
  %behind = ((s32[], bf16[16,128]{1,0}, s32[], s32[])) opt-barrier(%alone)
  %while.1 = (s32[], bf16[16,128]{1,0}, s32[], s32[]) while(%behind#0), condition=%cond, body=%body
  ROOT %fusion = f32[1,128]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter
}
"""
for placeholder, text in {
    "GROUPS": "replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}",
    "CONFIG": 'backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}',
    "RING": "source_target_pairs={{0,1},{1,2},{2,3},{3,4},{4,5},{5,6},{6,7},{7,0}}",
}.items():
    WINDOWED = WINDOWED.replace(placeholder, text)


def test_windowed_matrix_products():
    shard = 16 * 128 * 2
    assert count_traffic(WINDOWED.replace("START", "Start"), make_mesh(1, 8, 1)) == [
        Traffic("collective-permute", ("fsdp",), 3 * (4 * 2 + 1) * shard, 3 * (4 * 2 + 1), False),
        Traffic("all-gather", ("fsdp",), 3 * 7 * shard, 3, False),
        Traffic("reduce-scatter", ("fsdp",), 8 * 128 * 4 * 7 // 8, 1, False),
    ]


def test_an_asynchronous_collective_that_never_starts_is_an_error():
    with pytest.raises(ValueError, match=r"channels \['7'\]"):
        count_traffic(WINDOWED, make_mesh(1, 8, 1))
