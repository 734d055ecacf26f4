"""What every export does: parameters one by one under new names, and a report of it; and the export under our own."""

import collections
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import tqdm

from stf_jax.config import UserError
from stf_jax.weights.folder import new_folder
from stf_jax.weights.hf import Place, Tensor, places
from stf_jax.weights.model import SavedModel, open_model
from stf_jax.weights.shards import write_shards
from stf_jax.weights.tensors import cast, overflow_lines


def whole(saved: SavedModel, checkpoint: pathlib.Path) -> None:
    """Raises UserError where the model lacks a part or its tokenizer."""
    parts = {part: getattr(saved.description, part) for part in ("vision", "fusion", "llm")}
    parts["tokenizer"] = saved.tokenizer
    if lacking := [part for part, value in parts.items() if value is None]:
        copied = f" Copy the folder of its tokenizer to {checkpoint / 'tokenizer'}." if lacking == ["tokenizer"] else ""
        raise UserError(f"{checkpoint} is not a whole model: it lacks {', '.join(lacking)}.{copied}")


def part_places(
    saved: SavedModel, part: str, table: Mapping[str, Tensor], prefixes: Mapping[str, str]
) -> dict[str, Place]:
    """:func:`stf_jax.weights.hf.places` of one part (``vision``, ``fusion``, ``llm``) of a model, by whole paths."""
    begin = f"{part}/"
    shapes = {path.removeprefix(begin): leaf.shape for path, leaf in saved.shapes.items() if path.startswith(begin)}
    return {begin + path: place for path, place in places(table, shapes, prefixes).items()}


def widest_dtype(saved: SavedModel) -> str:
    """Name of the type that holds every parameter's."""
    return jnp.result_type(*(leaf.dtype for leaf in saved.shapes.values())).name


class Tensors:
    """The tensors of a model under others' names, cast where asked, counted as they pass.

    Attributes:
      places: by path, of what is written.
      report: count of ``parameters``; names of tensors ``written``, ``transposed`` and ``cast`` (by types); by
        tensor, how many values ``overflowed`` to infinity when cast; parameters of the model that went ``unused``;
        ``notes``.
    """

    def __init__(self, saved: SavedModel, places: Mapping[str, Place], dtype: str):
        """``dtype``: type to write in; empty: each tensor keeps its own."""
        self.places, self._saved, self._dtype = places, saved, dtype
        unused = sorted(saved.shapes.keys() - places.keys())
        self.report: dict[str, Any] = {"parameters": 0, "written": [], "transposed": []}
        self.report |= {"cast": collections.defaultdict(list), "unused": unused, "notes": [], "overflowed": {}}

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        """Name and values of one after the other; a parameter of ours is held at a time."""
        for path, place in tqdm.tqdm(self.places.items(), "export", unit="parameter"):
            value = self._saved.read(path)
            self.report["parameters"] += value.size
            if place.turned:
                self.report["transposed"] += place.names
            if self._dtype and value.dtype != jnp.dtype(self._dtype):
                self.report["cast"][f"{value.dtype} to {self._dtype}"] += place.names
            for name, tensor in place.to_theirs(value):
                self.report["written"].append(name)
                tensor, overflowed = cast(tensor, self._dtype)
                if overflowed:
                    self.report["overflowed"][name] = overflowed
                yield name, tensor
            del value  # before the next one is read

    def save_report(self, folder: pathlib.Path) -> None:
        """Writes ``export.json``."""
        (folder / "export.json").write_text(json.dumps(self.report, indent=2) + "\n")


def export_native(checkpoint: pathlib.Path, to: pathlib.Path, dtype: str = "", only: str = ".*") -> dict[str, Any]:
    """Writes safetensors under our own parameter paths, for ``config.init_from``; the folder appears when complete.

    Args:
      checkpoint: workdir of a run, or a folder of imported weights.
      to: the folder to write; it must not exist.
      dtype: the type to cast values to; empty: each keeps its own.
      only: a regular expression; parameters whose path it matches whole are written.

    Returns:
      The report of :class:`Tensors`.

    Raises:
      UserError: a checkpoint that cannot be read; ``to`` exists; a pattern that matches nothing.
    """
    with new_folder(to) as folder:
        saved = open_model(checkpoint)
        try:
            chosen = {path: leaf.shape for path, leaf in saved.shapes.items() if re.fullmatch(only, path)}
        except re.error as error:
            raise UserError(f"--only={only!r} is not a regular expression: {error}.") from None
        if not chosen:
            raise UserError(f"--only={only!r} matches none of the {len(saved.shapes)} parameters.")
        unturned = {path: Tensor(path, tuple((axis,) for axis in range(len(shape)))) for path, shape in chosen.items()}
        tensors = Tensors(saved, places(unturned, chosen, {"": ""}), dtype)
        write_shards(folder, tensors)
        tensors.save_report(folder)
    return tensors.report


def summary(report: dict[str, Any], to: pathlib.Path) -> str:
    """The report for people to read."""
    cast = ", ".join(f"{len(names)} from {kind}" for kind, names in report["cast"].items()) or "none"
    lines = [
        f"{len(report['written'])} tensors, {report['parameters']:,} parameters: {to}",
        f"{len(report['transposed'])} transposed; cast: {cast}",
    ]
    lines += report["notes"] + overflow_lines(report["overflowed"])
    if report["unused"]:
        lines.append(f"not written: {', '.join(report['unused'])}")
    return "\n".join([*lines, f"Every name is in {to / 'export.json'}."])
