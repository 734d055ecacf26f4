"""What a compiled program sends between devices, read from its optimized HLO (``compiled.as_text()``).

Counted is what one device sends by ring algorithms, n devices in a group:

| operation | bytes |
|---|---|
| all-gather | result · (n−1)/n, which is operand · (n−1) |
| reduce-scatter, all-to-all | operand · (n−1)/n |
| all-reduce | 2 · operand · (n−1)/n |
| collective-permute | operand, of a device that sends |

How such text looks is for XLA to change, so what cannot be told from it is an error, never nothing.
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
    """What one device sends in one run of a program, by all operations of a kind over the same axes and links."""

    kind: str  # HLO's name: all-gather, reduce-scatter, …
    axes: tuple[str, ...]  # on which devices that talk to each other differ, in the mesh's order; none of size 1
    bytes: int
    count: int  # operations; one in a loop as often as that runs
    between_slices: bool  # over the network, that is, as some of the devices are of different slices


def traffic(text: str, mesh: jax.sharding.Mesh, trips: int | None = None) -> list[Traffic]:
    """All that one device sends, largest first; of a conditional, what the branch does that sends most.

    Args:
      text: optimized HLO of one program, which jax partitioned over the mesh.
      mesh: that mesh, of the very devices.
      trips: how often to count a loop whose end only data tell, such as that of decoding; None: it is an error.

    Raises:
      ValueError: the text doesn't tell how often a loop that sends something runs, or who talks to whom.
    """
    program = _Program(text, mesh, trips)
    sums: dict[tuple[str, tuple[str, ...], bool], np.ndarray] = {}
    for (*key, size), count in program.sent(program.entry).items():
        sums[tuple(key)] = sums.get(tuple(key), 0) + np.array([size * count, count])
    if lost := [channel for channel, begins in program.spread.items() if not begins]:
        raise ValueError(f"Collectives over the channels {lost} are spread over fusions, none of which begins them.")
    found = [Traffic(kind, axes, *both.tolist(), between) for (kind, axes, between), both in sums.items()]
    return sorted(found, key=lambda one: one.bytes, reverse=True)


_SENT: dict[str, Callable[[int, int], int]] = {  # bytes, of an operand's bytes and the devices in a group
    "all-gather": lambda size, n: size * (n - 1),
    "reduce-scatter": lambda size, n: size * (n - 1) // n,
    "all-reduce": lambda size, n: 2 * size * (n - 1) // n,
    "all-to-all": lambda size, n: size * (n - 1) // n,
    "collective-permute": lambda size, n: size,
}
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_OPERATION = re.compile(r" +(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\(([^)]*)\)(.*)")
_CALLED = re.compile(r"\b(calls|to_apply|condition|body|\w+_computations?)=(\{[^}]*\}|%?[\w.-]+)")
_ARITHMETIC = {"add": operator.add, "subtract": operator.sub}
_COMPARISON = {"LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge, "NE": operator.ne}
_MOST_TRIPS = 100_000

_Sent = collections.Counter[tuple[str, tuple[str, ...], bool, int]]  # how often: operation, axes, between slices, bytes
_Path = tuple[int, ...]  # to a value in a computation's parameters: which of them, which element of that tuple, …


class _Operation(NamedTuple):
    shape: str
    code: str
    inside: str  # what stands between its parentheses
    rest: str  # its attributes

    @property
    def operands(self) -> list[tuple[str, _Path]]:
        """Their names, each with the index of an element of it: ``%a#1`` is the second of a tuple."""
        found = re.findall(r"%([\w.-]+)(?:#(\d+))?", self.inside)
        return [(name, (int(element),) if element else ()) for name, element in found]

    @property
    def called(self) -> dict[str, list[str]]:
        return {how: re.findall(r"[\w.-]+", names) for how, names in _CALLED.findall(self.rest)}

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.rest)
        return found and found[1]


class _Program:
    """The computations of a program, each with its operations by name."""

    def __init__(self, text: str, mesh: jax.sharding.Mesh, trips: int | None):
        self.mesh, self.trips = mesh, trips
        slices = np.array([getattr(device, "slice_index", 0) for device in mesh.devices.flat])
        self.coordinates = np.stack([*np.indices(mesh.devices.shape).reshape(mesh.devices.ndim, -1), slices])
        # Devices are numbered in the mesh's order; by the program of one slice of TPUs, those of that slice; and where
        # such slices talk to each other, devices are told by their ids.
        partitions = re.match(r"HloModule .*\bnum_partitions=(\d+)", text)
        one_slice = partitions and int(partitions[1]) < mesh.size
        self.numbered = np.flatnonzero(slices == slices[0]) if one_slice else np.arange(mesh.size)
        self.places = {device.id: place for place, device in enumerate(mesh.devices.flat)}
        self.computations: dict[str, dict[str, _Operation]] = {}
        self.roots: dict[str, str] = {}
        self.spread: dict[str | None, bool] = {}  # channels of collectives spread over fusions: do they begin in one?
        self._seen: dict[str, _Sent] = {}
        for line in text.splitlines():
            if start := _COMPUTATION.match(line):
                name = start[2]
                self.computations[name] = {}
                if start[1]:
                    self.entry = name
            elif self.computations and (found := _OPERATION.match(line)):
                self.computations[name][found[2]] = _Operation(*found.groups()[2:])
                if found[1]:
                    self.roots[name] = found[2]

    def sent(self, name: str) -> _Sent:
        """What one run of a computation sends, with all that it calls."""
        if name not in self._seen:
            self._seen[name] = _Sent()
            for label in self.computations[name]:
                self._seen[name].update(self._sent_by(name, label))
        return self._seen[name]

    def _sent_by(self, name: str, label: str) -> _Sent:
        operation = self.computations[name][label]
        if operation.code == "recv" or operation.code.endswith(("-update", "-done")):  # of what a send or -start began
            return _Sent()
        if re.search("replica_groups=|source_target_pairs=|_xla_megascale_target=", operation.rest):
            return self._sent_by_collective(name, label)
        parts = [self.sent(computation) for called in operation.called.values() for computation in called]
        if operation.code == "conditional":
            return max(parts, key=lambda part: sum(key[-1] * count for key, count in part.items()))
        once = sum(parts, _Sent())
        times = self._trips(name, label) if operation.code == "while" and once else 1
        return _Sent({key: count * times for key, count in once.items()})

    def _sent_by_collective(self, name: str, label: str) -> _Sent:
        operation, beside = self.computations[name][label], self.computations[name]
        kind, operands = operation.code.removesuffix("-start"), operation.operands
        if transfer := operation.attribute(r'_xla_megascale_transfer_type="(\w+)"'):  # between slices of TPUs
            kind = {"ONE_TO_ONE": "collective-permute"}.get(transfer, transfer.lower().replace("_", "-"))
            operands = operands[:1]  # the other gives an order
        if kind not in _SENT:
            raise ValueError(f"The operation {label} in {name} sends something, and its kind, {kind}, is not known.")
        if "async_collective_fusion_config" in operation.rest:
            # A TPU's compiler repeats a collective in all fusions that compute while it goes on. It begins in one.
            begins = any("AsyncCollectiveStart" in one.rest and (label, ()) in one.operands for one in beside.values())
            channel = operation.attribute(r"channel_id=(\d+)")
            self.spread[channel] = begins or self.spread.get(channel, False)
            if not begins:
                return _Sent()
        if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # so a TPU's compiler calls its fusion with the slicing of the result
        groups = self._groups(operation)
        if not groups:
            return _Sent()
        differ = np.any([np.ptp(self.coordinates[:, group], axis=1) > 0 for group in groups], axis=0)
        axes = tuple(itertools.compress(self.mesh.axis_names, differ))
        size = sum(_bytes(beside[operand].shape, element) for operand, element in operands)
        key = (kind, axes, bool(differ[-1]), _SENT[kind](size, max(map(len, groups))))
        return _Sent({key: 1}) if axes else _Sent()

    def _groups(self, operation: _Operation) -> list:
        """Places in the mesh of devices that talk to each other; of a permutation, in pairs."""
        named = r'(replica_groups|source_target_pairs|_xla_megascale_target)="?(.*)'
        how, form = re.search(named, operation.rest).groups()
        if form.startswith("{}"):
            return [self.numbered] if how == "replica_groups" else []
        if how == "_xla_megascale_target":
            return [[self.places[number] for number in group] for group in _groups(form)]
        return [self.numbered[group] for group in _groups(form)]

    def _trips(self, name: str, label: str) -> int:
        """How often a loop's body runs: as its compiler says, else by running what counts."""
        operation = self.computations[name][label]
        if known := operation.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
            return int(known)
        (condition,), (body,) = operation.called["condition"], operation.called["body"]
        initial, element = operation.operands[0]

        def state(path):
            return self._value(name, initial, (*element, *path[1:]), lambda path: None)

        for trips in range(_MOST_TRIPS):
            goes_on = self._value(condition, self.roots[condition], (), state)
            if goes_on is None:
                break
            if not goes_on:
                return trips
            state = functools.cache(lambda path, before=state: self._value(body, self.roots[body], path[1:], before))
        if self.trips is not None:
            return self.trips
        raise ValueError(f"The loop {label} in {name} sends something, and how often it runs cannot be told.")

    def _value(self, name: str, label: str, index: _Path, given: Callable[[_Path], int | None]) -> int | None:
        """The integer that an operation gives, or that its tuple has there, as far as it can be told.

        Args:
          given: values of the computation's parameters.
        """
        operation = self.computations[name][label]

        def operand(number, index=()):
            source, element = operation.operands[number]
            return self._value(name, source, (*element, *index), given)

        match operation.code:
            case "constant":
                return int(operation.inside) if re.fullmatch(r"-?\d+", operation.inside) else None
            case "parameter":
                return given((int(operation.inside), *index))
            case "tuple":
                return operand(index[0], index[1:])
            case "get-tuple-element":
                return operand(0, (int(operation.attribute(r"index=(\d+)")), *index))
            case "bitcast" | "convert" | "copy" | "copy-start" | "copy-done" | "opt-barrier":
                return operand(0, index)
            case "fusion" | "call":
                ((called,),) = operation.called.values()
                return self._value(called, self.roots[called], index, lambda path: operand(path[0], path[1:]))
            case "compare":
                how = _COMPARISON.get(operation.attribute(r"direction=(\w+)"))
            case code:
                how = _ARITHMETIC.get(code)
        if how is None:
            return None
        both = operand(0), operand(1)
        return None if None in both else int(how(*both))


def _bytes(shape: str, element: _Path) -> int:
    """Of an array such as ``bf16[8,128]{1,0:T(8,128)(2,1)}``, or of one in a tuple of them."""
    kind, sizes = re.findall(r"\b([a-z]\w*)\[(.*?)\]", shape)[element[0] if element else 0]
    bits = 8 if kind == "pred" else int(re.search(r"\d+", kind)[0])  # as in f8e4m3fn
    return -(-math.prod(int(size) for size in sizes.split(",") if size) * bits // 8)


def _groups(form: str) -> Sequence[Sequence[int]] | np.ndarray:
    """Groups of numbers, whatever form they are written in."""
    if listed := re.match(r"\{(\{.*?\})\}", form):  # "{{0,1},{2,3}}", "{{0->1},{1->0}}"
        return [[int(number) for number in re.findall(r"\d+", group)] for group in listed[1].split("},{")]
    if product := re.match(r"\{([\d,]+)\}x\{(\d+):(\d+)\}", form):  # ids: "{1,2}x{0:3}", devices 0 to 3 of two slices
        slices = [int(one) * 100_000 for one in product[1].split(",")]
        return [[one + device for one in slices] for device in range(int(product[2]), int(product[3]) + 1)]
    if form.startswith("["):
        return _iota(form)
    if form.startswith("mesh["):
        return _groups_of_mesh(form)
    raise ValueError(f"Groups of devices are told in an unknown form: {form[:80]}")


def _iota(form: str) -> np.ndarray:
    """``[4,8]<=[8,4]T(1,0)``: the numbers laid out as the second brackets say, transposed, then as the first say.

    Without second brackets, the first take their part.
    """
    shape, laid_out, order = (
        part and [int(one) for one in part.split(",")]
        for part in re.match(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?", form).groups()
    )
    numbers = np.arange(math.prod(shape)).reshape(laid_out or shape).transpose(order)
    return numbers.reshape(shape) if laid_out else numbers


def _groups_of_mesh(form: str) -> np.ndarray:
    """``mesh['a'=4,'b'=8], device_ids=([8,4]T(1,0)) {'a','b':(2)4}``: groups over ``a`` and a part of ``b``.

    That part is the middle of three, of which the first has size 2 and this one 4. Devices are in order if not said.
    """
    mesh, devices, grouped = re.match(r"mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", form).groups()
    parts = sorted(re.findall(r"([\w']+)(?::\((\d+)\)(\d+))?", grouped), key=lambda part: int(part[1] or 1))
    shape: list[int] = []
    chosen: list[int] = []
    for axis, size in re.findall(r"([\w']+)=(\d+)", mesh):
        done = 1
        for _, before, length in (part for part in parts if part[0] == axis):
            chosen.append(len(shape) + 1)
            shape += [int(before or 1) // done, int(length or size)]
            done = int(before or 1) * int(length or size)
        shape.append(int(size) // done)
    if devices is None:
        numbers = np.arange(math.prod(shape))
    else:
        numbers = _iota(devices) if devices.startswith("[") else np.array([int(one) for one in devices.split(",")])
    last = range(-len(chosen), 0)
    return np.moveaxis(numbers.reshape(shape), chosen, last).reshape(-1, math.prod(shape[axis] for axis in chosen))
