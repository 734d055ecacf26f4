"""Streams parameters under new names, with a report, for all exports; and the export under our own names."""

import collections
import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from etils import epath

from stf_jax.checkpointing.renames import path_matches
from stf_jax.config import FusionConfig, UserError
from stf_jax.data.tiles import Tiles
from stf_jax.models.decoders.base import LLMConfig
from stf_jax.models.tensor_names import Tensor, TensorNames
from stf_jax.models.towers.base import VisionConfig
from stf_jax.weights.folder import new_folder
from stf_jax.weights.mapping import TensorMapping, map_parameters
from stf_jax.weights.model import SavedModel, open_model
from stf_jax.weights.shards import write_shards
from stf_jax.weights.tensors import cast, format_overflow


@dataclasses.dataclass(frozen=True)
class CompleteModel:
    """The description of a model that has all parts, and the folder of its tokenizer."""

    vision: VisionConfig
    fusion: FusionConfig
    llm: LLMConfig
    tokenizer: pathlib.Path
    template: str
    aspect: str
    tiles: Tiles | None


def require_complete(saved: SavedModel, checkpoint: epath.Path) -> CompleteModel:
    """Returns the description of a complete model. Raises UserError if it lacks a part or its tokenizer."""
    model = saved.description
    vision, fusion, llm, tokenizer = model.vision, model.fusion, model.llm, saved.tokenizer
    if vision is None or fusion is None or llm is None or tokenizer is None:
        parts = {"vision": vision, "fusion": fusion, "llm": llm, "tokenizer": tokenizer}
        missing = [part for part, value in parts.items() if value is None]
        fix = f" Copy the folder of its tokenizer to {checkpoint / 'tokenizer'}." if missing == ["tokenizer"] else ""
        raise UserError(f"{checkpoint} is not a complete model: it lacks {', '.join(missing)}.{fix}")
    return CompleteModel(vision, fusion, llm, tokenizer, model.template, model.aspect, model.tiles)


def refuse_schedule(saved: SavedModel, checkpoint: epath.Path) -> None:
    """Raises UserError if the model's decoder follows a schedule, which no exported class does."""
    if name := saved.config.schedule:
        raise UserError(
            f"{checkpoint} was trained with schedule={name}, which PyTorch's classes cannot follow yet; only "
            "--format=native exports it."
        )


def map_part(
    shapes: Mapping[str, jax.ShapeDtypeStruct], part: str, table: TensorNames, prefixes: Mapping[str, str]
) -> dict[str, TensorMapping]:
    """Maps one part (``vision``, ``fusion``, ``llm``) of a model, by full parameter paths."""
    root = f"{part}/"
    own = {path.removeprefix(root): leaf.shape for path, leaf in shapes.items() if path.startswith(root)}
    return {root + path: mapping for path, mapping in map_parameters(table, own, prefixes).items()}


def widest_dtype(saved: SavedModel) -> str:
    """Returns the name of the smallest type that holds the values of all parameters."""
    return jnp.result_type(*(leaf.dtype for leaf in saved.shapes.values())).name


class ExportStream:
    """Iterates over a model's tensors under new names, casts them and records what was done.

    Attributes:
      mappings: tensors of each exported parameter, by path.
      report: count of ``parameters``; names of tensors ``written``, ``transposed`` and ``cast`` (by types); number of
        values that ``overflowed`` to infinity when cast, by tensor; ``unused`` parameters of the model; ``notes``.
    """

    def __init__(self, saved: SavedModel, mappings: Mapping[str, TensorMapping], dtype: str) -> None:
        """``dtype``: the type to write; empty: each tensor keeps its own."""
        self.mappings, self._saved, self._dtype = mappings, saved, dtype
        unused = sorted(saved.shapes.keys() - mappings.keys())
        self.report: dict[str, Any] = {"parameters": 0, "written": [], "transposed": []}
        self.report |= {"cast": collections.defaultdict(list), "unused": unused, "notes": [], "overflowed": {}}

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yields names and values; only one parameter is in memory at a time."""
        for path, mapping in tqdm.tqdm(self.mappings.items(), "export", unit="parameter"):
            value = self._saved.read(path)
            self.report["parameters"] += value.size
            if mapping.transposed:
                self.report["transposed"] += mapping.names
            if self._dtype and value.dtype != jnp.dtype(self._dtype):
                self.report["cast"][f"{value.dtype} to {self._dtype}"] += mapping.names
            for name, tensor in mapping.to_hf(value):
                self.report["written"].append(name)
                tensor, overflowed = cast(tensor, self._dtype)
                if overflowed:
                    self.report["overflowed"][name] = overflowed
                yield name, tensor
            del value  # frees it before the next one is read

    def save_report(self, folder: pathlib.Path) -> None:
        """Writes ``export.json``."""
        (folder / "export.json").write_text(json.dumps(self.report, indent=2) + "\n")


def export_native(checkpoint: epath.Path, to: epath.Path, dtype: str = "", only: str = ".*") -> dict[str, Any]:
    """Writes safetensors under our own parameter paths, for ``config.init_from``; the folder appears when complete.

    Args:
      checkpoint: workdir of a run, or a folder of imported weights.
      to: the folder to write; it must not exist.
      dtype: the type to cast values to; empty: each keeps its own.
      only: a regular expression that must match the full path of a parameter for it to be written.

    Returns:
      The report of :class:`ExportStream`.

    Raises:
      UserError: the checkpoint cannot be read; ``to`` exists; the pattern matches nothing.
    """
    with new_folder(to) as folder:
        saved = open_model(checkpoint)
        try:
            chosen = {path: leaf.shape for path, leaf in saved.shapes.items() if path_matches(only, path)}
        except re.error as error:
            raise UserError(f"--only={only!r} is not a regular expression: {error}.") from None
        if not chosen:
            raise UserError(f"--only={only!r} matches none of the {len(saved.shapes)} parameters.")
        table = {path: Tensor(path, tuple((axis,) for axis in range(len(shape)))) for path, shape in chosen.items()}
        stream = ExportStream(saved, map_parameters(table, chosen, {"": ""}), dtype)
        write_shards(folder, stream)
        stream.save_report(folder)
    return stream.report


def summarize(report: Mapping[str, Any], to: epath.Path) -> str:
    """Formats the report for the terminal."""
    cast = ", ".join(f"{len(names)} from {types}" for types, names in report["cast"].items()) or "none"
    lines = [
        f"{len(report['written'])} tensors, {report['parameters']:,} parameters: {to}",
        f"{len(report['transposed'])} transposed; cast: {cast}",
    ]
    lines += report["notes"] + format_overflow(report["overflowed"])
    if report["unused"]:
        lines.append(f"not written: {', '.join(report['unused'])}")
    return "\n".join([*lines, f"Every name is in {to / 'export.json'}."])
