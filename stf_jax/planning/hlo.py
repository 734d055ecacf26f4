"""Communication of a compiled program, parsed from its optimized HLO (``compiled.as_text()``).

The counts are the bytes that one device sends with ring algorithms, in groups of n devices:

| operation | bytes |
|---|---|
| all-gather | result · (n−1)/n, which is operand · (n−1) |
| reduce-scatter, all-to-all | operand · (n−1)/n |
| all-reduce | 2 · operand · (n−1)/n |
| collective-permute | operand, for a device that sends |

XLA may change this text at any time, so text that cannot be parsed is an error, never zero bytes.
"""

import collections
import dataclasses
import functools
import itertools
import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that one device sends per execution of a program, by kind of operation, axes and links."""

    kind: str  # HLO's name: all-gather, reduce-scatter, …
    axes: tuple[str, ...]  # mesh axes along which communicating devices differ, in mesh order; none of size 1
    bytes: int
    count: int  # operations; one in a loop counts per iteration
    between_slices: bool  # whether some of the devices are in different slices, which the network connects


def count_traffic(text: str, mesh: jax.sharding.Mesh, trips: int | None = None) -> list[Traffic]:
    """Counts all that one device sends, largest first; a conditional counts as the branch that sends most.

    Args:
      text: optimized HLO of a program that jax partitioned over the mesh.
      mesh: the mesh, with the devices that the program was compiled for.
      trips: iterations to count for loops whose end depends on data, such as decoding; None: such a loop is an error.

    Raises:
      ValueError: the number of iterations of a loop with communication, or a group of devices, cannot be determined.
    """
    program = _Program(text, mesh, trips)
    sums: dict[tuple[str, tuple[str, ...], bool], np.ndarray] = {}
    for (kind, axes, between, size), count in program.count_sent(program.entry).items():
        sums[kind, axes, between] = sums.get((kind, axes, between), 0) + np.array([size * count, count])
    if unstarted := [channel for channel, started in program.async_channels.items() if not started]:
        raise ValueError(f"No fusion starts the asynchronous collectives on channels {unstarted}.")
    entries = [
        Traffic(kind, axes, int(total), int(count), between) for (kind, axes, between), (total, count) in sums.items()
    ]
    return sorted(entries, key=lambda entry: entry.bytes, reverse=True)


_BYTES_SENT: dict[str, Callable[[int, int], int]] = {  # from the bytes of the operand and the size of the group
    "all-gather": lambda size, n: size * (n - 1),
    "reduce-scatter": lambda size, n: size * (n - 1) // n,
    "all-reduce": lambda size, n: 2 * size * (n - 1) // n,
    "all-to-all": lambda size, n: size * (n - 1) // n,
    "collective-permute": lambda size, n: size,
}
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_OPERATION = re.compile(r" +(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\(([^)]*)\)(.*)")
_CALLED = re.compile(r"\b(calls|to_apply|condition|body|\w+_computations?)=(\{[^}]*\}|%?[\w.-]+)")
_ARITHMETIC: dict[str, Callable[[int, int], int]] = {"add": operator.add, "subtract": operator.sub}
_COMPARISON: dict[str, Callable[[int, int], bool]] = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "NE": operator.ne,
}
_MOST_TRIPS = 100_000

# Occurrences of (operation, axes, between slices, bytes).
_Sent = collections.Counter[tuple[str, tuple[str, ...], bool, int]]
_Path = tuple[int, ...]  # of a value in the parameters of a computation: index of the parameter, of its element, …


class _Operation(NamedTuple):
    shape: str
    code: str
    inside: str  # text between its parentheses
    rest: str  # its attributes

    @property
    def operands(self) -> list[tuple[str, _Path]]:
        """Names of the operands, each with an element index: ``%a#1`` is the second element of a tuple."""
        matches = re.findall(r"%([\w.-]+)(?:#(\d+))?", self.inside)
        return [(name, (int(element),) if element else ()) for name, element in matches]

    @property
    def called(self) -> dict[str, list[str]]:
        """Names of the called computations by attribute."""
        return {attribute: re.findall(r"[\w.-]+", names) for attribute, names in _CALLED.findall(self.rest)}

    def attribute(self, pattern: str) -> str | None:
        match = re.search(pattern, self.rest)
        return match and match[1]


class _Program:
    """The computations of a program, each with its operations by name."""

    def __init__(self, text: str, mesh: jax.sharding.Mesh, trips: int | None):
        self.mesh, self.trips = mesh, trips
        slices = np.array([getattr(device, "slice_index", 0) for device in mesh.devices.flat])
        self.coordinates = np.stack([*np.indices(mesh.devices.shape).reshape(mesh.devices.ndim, -1), slices])
        # Programs number devices in mesh order; the program of one TPU slice numbers only those of that slice; and
        # communication between slices identifies devices by their ids.
        partitions = re.match(r"HloModule .*\bnum_partitions=(\d+)", text)
        one_slice = partitions and int(partitions[1]) < mesh.size
        self.numbering = np.flatnonzero(slices == slices[0]) if one_slice else np.arange(mesh.size)
        self.positions = {device.id: position for position, device in enumerate(mesh.devices.flat)}
        self.computations: dict[str, dict[str, _Operation]] = {}
        self.roots: dict[str, str] = {}
        self.async_channels: dict[str | None, bool] = {}  # asynchronous collectives by channel: does a fusion start it?
        self._counted: dict[str, _Sent] = {}
        for line in text.splitlines():
            if start := _COMPUTATION.match(line):
                name = start[2]
                self.computations[name] = {}
                if start[1]:
                    self.entry = name
            elif self.computations and (match := _OPERATION.match(line)):
                self.computations[name][match[2]] = _Operation(*match.groups()[2:])
                if match[1]:
                    self.roots[name] = match[2]

    def count_sent(self, name: str) -> _Sent:
        """Counts what one execution of a computation sends, including the computations it calls."""
        if name not in self._counted:
            self._counted[name] = _Sent()
            for label in self.computations[name]:
                self._counted[name].update(self._count_operation(name, label))
        return self._counted[name]

    def _count_operation(self, name: str, label: str) -> _Sent:
        operation = self.computations[name][label]
        if operation.code == "recv" or operation.code.endswith(("-update", "-done")):  # counted at its send or -start
            return _Sent()
        if re.search("replica_groups=|source_target_pairs=|_xla_megascale_target=", operation.rest):
            return self._count_collective(name, label)
        parts = [self.count_sent(computation) for called in operation.called.values() for computation in called]
        if operation.code == "conditional":
            return max(parts, key=lambda part: sum(key[-1] * count for key, count in part.items()))
        total = sum(parts, _Sent())
        trips = self._count_trips(name, label) if operation.code == "while" and total else 1
        return _Sent({key: count * trips for key, count in total.items()})

    def _count_collective(self, name: str, label: str) -> _Sent:
        computation = self.computations[name]
        operation = computation[label]
        kind, operands = operation.code.removesuffix("-start"), operation.operands
        if transfer := operation.attribute(r'_xla_megascale_transfer_type="(\w+)"'):  # between slices of TPUs
            kind = {"ONE_TO_ONE": "collective-permute"}.get(transfer, transfer.lower().replace("_", "-"))
            operands = operands[:1]  # the other is a token for ordering
        if kind not in _BYTES_SENT:
            raise ValueError(f"The operation {label} in {name} communicates, but its kind, {kind}, is not known.")
        if "async_collective_fusion_config" in operation.rest:
            # The TPU compiler repeats a collective in all fusions that run concurrently with it; one of them starts it.
            starts = any(
                "AsyncCollectiveStart" in other.rest and (label, ()) in other.operands for other in computation.values()
            )
            channel = operation.attribute(r"channel_id=(\d+)")
            self.async_channels[channel] = starts or self.async_channels.get(channel, False)
            if not starts:
                return _Sent()
        if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # the TPU compiler's name for its fusion with the slicing of the result
        groups = self._groups(operation)
        if not groups:
            return _Sent()
        differ = np.any([np.ptp(self.coordinates[:, group], axis=1) > 0 for group in groups], axis=0)
        axes = tuple(itertools.compress(self.mesh.axis_names, differ))
        size = sum(_count_bytes(computation[operand].shape, element) for operand, element in operands)
        key = (kind, axes, bool(differ[-1]), _BYTES_SENT[kind](size, max(map(len, groups))))
        return _Sent({key: 1}) if axes else _Sent()

    def _groups(self, operation: _Operation) -> Sequence[np.ndarray | Sequence[int]]:
        """Groups of communicating devices, by position in the mesh; pairs for a permutation."""
        pattern = r'(replica_groups|source_target_pairs|_xla_megascale_target)="?(.*)'
        match = re.search(pattern, operation.rest)
        assert match is not None  # the operation communicates
        attribute, form = match.groups()
        if form.startswith("{}"):
            return [self.numbering] if attribute == "replica_groups" else []
        if attribute == "_xla_megascale_target":
            return [[self.positions[number] for number in group] for group in _parse_groups(form)]
        return [self.numbering[group] for group in _parse_groups(form)]

    def _count_trips(self, name: str, label: str) -> int:
        """Iterations of a loop: as the compiler reports, else by evaluating its counter and condition."""
        operation = self.computations[name][label]
        if known := operation.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
            return int(known)
        (condition,), (body,) = operation.called["condition"], operation.called["body"]
        initial, element = operation.operands[0]

        def initial_state(path: _Path) -> int | None:
            return self._value(name, initial, (*element, *path[1:]), lambda path: None)

        state: Callable[[_Path], int | None] = initial_state
        for trips in range(_MOST_TRIPS):
            proceed = self._value(condition, self.roots[condition], (), state)
            if proceed is None:
                break
            if not proceed:
                return trips
            state = functools.cache(lambda path, before=state: self._value(body, self.roots[body], path[1:], before))
        if self.trips is not None:
            return self.trips
        raise ValueError(f"The loop {label} in {name} communicates, but its number of iterations cannot be determined.")

    def _value(self, name: str, label: str, index: _Path, arguments: Callable[[_Path], int | None]) -> int | None:
        """The integer result of an operation, or that element of its tuple; None if it cannot be determined.

        Args:
          arguments: returns the values of the computation's parameters.
        """
        operation = self.computations[name][label]
        function: Callable[[int, int], int] | None

        def operand(number: int, index: _Path = ()) -> int | None:
            source, element = operation.operands[number]
            return self._value(name, source, (*element, *index), arguments)

        match operation.code:
            case "constant":
                return int(operation.inside) if re.fullmatch(r"-?\d+", operation.inside) else None
            case "parameter":
                return arguments((int(operation.inside), *index))
            case "tuple":
                return operand(index[0], index[1:])
            case "get-tuple-element":
                element = operation.attribute(r"index=(\d+)")
                assert element is not None  # HLO's syntax
                return operand(0, (int(element), *index))
            case "bitcast" | "convert" | "copy" | "copy-start" | "copy-done" | "opt-barrier":
                return operand(0, index)
            case "fusion" | "call":
                ((called,),) = operation.called.values()
                return self._value(called, self.roots[called], index, lambda path: operand(path[0], path[1:]))
            case "compare":
                function = _COMPARISON.get(operation.attribute(r"direction=(\w+)") or "")
            case code:
                function = _ARITHMETIC.get(code)
        if function is None:
            return None
        first, second = operand(0), operand(1)
        return None if first is None or second is None else int(function(first, second))


def _count_bytes(shape: str, element: _Path) -> int:
    """Bytes of an array such as ``bf16[8,128]{1,0:T(8,128)(2,1)}``, or of one element of a tuple of arrays."""
    kind, sizes = re.findall(r"\b([a-z]\w*)\[(.*?)\]", shape)[element[0] if element else 0]
    bits = 8 if kind == "pred" else int(re.findall(r"\d+", kind)[0])  # as in f8e4m3fn
    return -(-math.prod(int(size) for size in sizes.split(",") if size) * bits // 8)


def _parse_groups(form: str) -> Sequence[Sequence[int]] | np.ndarray:
    """Parses groups of device numbers in any of their notations."""
    if match := re.match(r"\{(\{.*?\})\}", form):  # "{{0,1},{2,3}}", "{{0->1},{1->0}}"
        return [[int(number) for number in re.findall(r"\d+", group)] for group in match[1].split("},{")]
    if match := re.match(r"\{([\d,]+)\}x\{(\d+):(\d+)\}", form):  # ids: "{1,2}x{0:3}", devices 0 to 3 of two slices
        slices = [int(number) * 100_000 for number in match[1].split(",")]
        return [[first + device for first in slices] for device in range(int(match[2]), int(match[3]) + 1)]
    if form.startswith("["):
        return _parse_iota(form)
    if form.startswith("mesh["):
        return _parse_mesh_groups(form)
    raise ValueError(f"Groups of devices have an unknown form: {form[:80]}")


def _match_form(pattern: str, form: str) -> re.Match[str]:
    if match := re.match(pattern, form):
        return match
    raise ValueError(f"Groups of devices have an unknown form: {form[:80]}")


def _parse_iota(form: str) -> np.ndarray:
    """Parses ``[4,8]<=[8,4]T(1,0)``: device numbers in the second shape, transposed, then in the first shape.

    Without a second shape, the first one is transposed.
    """
    match = _match_form(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?", form)
    shape, source_shape, order = (
        [int(number) for number in part.split(",")] if part else [] for part in match.groups()
    )
    numbers = np.arange(math.prod(shape)).reshape(source_shape or shape).transpose(order or None)
    return numbers.reshape(shape) if source_shape else numbers


def _parse_mesh_groups(form: str) -> np.ndarray:
    """Parses ``mesh['a'=4,'b'=8], device_ids=([8,4]T(1,0)) {'a','b':(2)4}``: groups over ``a`` and a part of ``b``.

    ``b`` is split in three parts; the first has size 2, and the groups span the second, of size 4. Without device_ids,
    devices are in order.
    """
    match = _match_form(r"mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", form)
    mesh, devices, grouped = match.groups()
    parts = sorted(re.findall(r"([\w']+)(?::\((\d+)\)(\d+))?", grouped), key=lambda part: int(part[1] or 1))
    shape: list[int] = []
    grouped_axes: list[int] = []
    for axis, size in re.findall(r"([\w']+)=(\d+)", mesh):
        done = 1
        for _, before, length in (part for part in parts if part[0] == axis):
            grouped_axes.append(len(shape) + 1)
            shape += [int(before or 1) // done, int(length or size)]
            done = int(before or 1) * int(length or size)
        shape.append(int(size) // done)
    if devices is None:
        numbers = np.arange(math.prod(shape))
    else:
        numbers = (
            _parse_iota(devices)
            if devices.startswith("[")
            else np.array([int(number) for number in devices.split(",")])
        )
    last = range(-len(grouped_axes), 0)
    return np.moveaxis(numbers.reshape(shape), grouped_axes, last).reshape(
        -1, math.prod(shape[axis] for axis in grouped_axes)
    )
