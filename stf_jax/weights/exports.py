"""What every export does: parameters one by one under others' names, and a report of it."""

import collections
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import tqdm

from stf_jax.config import UserError
from stf_jax.weights.hf import Place
from stf_jax.weights.model import SavedModel


def whole(saved: SavedModel, checkpoint: pathlib.Path) -> None:
    """Raises UserError where the model lacks a part or its tokenizer."""
    parts = {part: getattr(saved.description, part) for part in ("vision", "fusion", "llm")}
    parts["tokenizer"] = saved.tokenizer
    if lacking := [part for part, value in parts.items() if value is None]:
        raise UserError(f"{checkpoint} is not a whole model: it lacks {', '.join(lacking)}.")


class Tensors:
    """The tensors of a model under others' names, cast where asked, counted as they pass.

    Attributes:
      places: by path, of what is written.
      report: ``tensors_written``, ``parameters``, ``transposed``, ``cast``, and what of the model went ``unused``.
    """

    def __init__(self, saved: SavedModel, places: Mapping[str, Place], dtype: str):
        """``dtype``: type to write in; empty: each tensor keeps its own."""
        self.places, self._saved, self._dtype = places, saved, dtype
        unused = sorted(saved.shapes.keys() - places.keys())
        self.report: dict[str, Any] = {"tensors_written": 0, "parameters": 0, "transposed": 0}
        self.report |= {"cast": collections.Counter(), "unused": unused}

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        """Name and values of one after the other; a parameter of ours is held at a time."""
        for path, place in tqdm.tqdm(self.places.items(), "export", unit="parameter"):
            value = self._saved.read(path)
            self.report["parameters"] += value.size
            self.report["transposed"] += len(place.names) * place.turned
            if self._dtype and value.dtype != jnp.dtype(self._dtype):
                self.report["cast"][f"{value.dtype} to {self._dtype}"] += len(place.names)
                value = value.astype(jnp.dtype(self._dtype))
            for name, tensor in place.to_theirs(value):
                self.report["tensors_written"] += 1
                yield name, tensor

    def save_report(self, folder: pathlib.Path) -> None:
        """Writes ``export.json``."""
        (folder / "export.json").write_text(json.dumps(self.report, indent=2) + "\n")


def summary(report: dict[str, Any], to: pathlib.Path) -> str:
    """The report for people to read."""
    cast = ", ".join(f"{count} from {kind}" for kind, count in report["cast"].items()) or "none"
    lines = [
        f"{report['tensors_written']} tensors, {report['parameters']:,} parameters: {to}",
        f"{report['transposed']} transposed; cast: {cast}",
    ]
    if report["unused"]:
        lines.append(f"not written: {', '.join(report['unused'])}")
    return "\n".join(lines)
