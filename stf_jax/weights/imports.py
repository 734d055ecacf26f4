"""Checkpoints of theirs into ours: read tensor by tensor, written parameter by parameter, nothing of theirs run."""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tqdm

from stf_jax.config import UserError
from stf_jax.data.tokenizer import FILES, read_tokenizer, save_tokenizer
from stf_jax.runtime.files import fetched
from stf_jax.runtime.parameters import write_params
from stf_jax.weights.folder import new_folder
from stf_jax.weights.gguf_tokenizer import read_gguf_tokenizer
from stf_jax.weights.model import described
from stf_jax.weights.recognise import Recognised
from stf_jax.weights.tensors import cast, overflow_lines
from stf_jax.weights.theirs import gguf_file, open_theirs, recognised, values


def import_weights(source: str, to: pathlib.Path, vision: str = "", dtype: str = "") -> dict[str, Any]:
    """Writes a folder for ``config.init_from``, ``config.model.vision`` and ``config.model.llm``.

    It holds ``params/`` (Orbax), ``model.json``, ``tokenizer/`` where the source has one, and ``import.json``, the
    report. It appears when it is complete.

    Args:
      source: a folder, or a file, in any layout that weights/recognise.py knows.
      to: the folder to write; it must not exist.
      vision: another source, whose vision tower is taken in place of the source's own.
      dtype: the type to cast values to; empty: each keeps its own.

    Returns:
      The report: count of ``parameters``; names of tensors ``read``, ``transposed``, ``cast`` (by types) and ``unused``
      (with reasons); by tensor, how many values ``overflowed`` to infinity when cast; parts of a whole model that are
      ``missing``; ``notes``; the ``model``.

    Raises:
      UserError: a source that cannot be read or used, named with the tensor at fault; ``to`` exists.
    """
    with new_folder(to) as folder:
        return _import(source, folder, vision, dtype)


def _import(source, folder, vision, dtype):
    tower, sources = None, []
    if vision:
        tensors, config = open_theirs(vision)
        found = recognised(vision, tensors, config)
        if found.vision is None:
            raise UserError(f"--vision={vision} holds no vision tower.")
        tower = found.vision
        sources.append((tensors, _only(found, "vision/")))
    tensors, config = open_theirs(source)
    main = recognised(source, tensors, config, tower)
    sources.append((tensors, main))
    description = described(dataclasses.replace(main, vision=main.vision or tower), config)

    lacking = [part for part in ("vision", "fusion", "llm") if getattr(description, part) is None]
    report = {"parameters": 0, "read": [], "transposed": [], "cast": collections.defaultdict(list), "missing": lacking}
    report["overflowed"] = {}
    count = sum(len(found.places) for _, found in sources)
    with tqdm.tqdm(total=count, desc="import", unit="parameter") as bar:
        write_params(folder, _params(sources, dtype, report, bar))
    description.save(folder)
    report |= {
        "unused": {name: why for _, found in sources for name, why in found.unused.items()},
        "notes": [note for _, found in sources for note in found.notes],
        "model": dataclasses.asdict(description),
    }
    if main.llm is not None and (trouble := _save_tokenizer(fetched(source), folder / "tokenizer")):
        report["notes"].append(f"No tokenizer came along ({trouble}); give one as config.data.tokenizer.")
    (folder / "import.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def summary(report: dict[str, Any], to: pathlib.Path) -> str:
    """The report of :func:`import_weights` for people to read."""
    model = report["model"]
    parts = [part for part in ("vision", "fusion", "llm") if model[part] is not None]
    lines = [
        f"{len(report['read'])} tensors, {report['parameters']:,} parameters of {', '.join(parts)}: {to}",
        f"{len(report['transposed'])} transposed; cast: "
        + (", ".join(f"{len(names)} from {kind}" for kind, names in report["cast"].items()) or "none"),
    ]
    reasons = collections.Counter(report["unused"].values())
    lines += [f"{count} unused: {why}" for why, count in reasons.items()]
    lines += report["notes"] + overflow_lines(report["overflowed"])
    return "\n".join([*lines, f"Every name is in {to / 'import.json'}."])


def _only(found: Recognised, root: str) -> Recognised:
    kept = {path: place for path, place in found.places.items() if path.startswith(root)}
    return dataclasses.replace(found, places=kept)


def _params(sources, dtype, report, bar) -> Iterator[tuple[str, np.ndarray]]:
    for tensors, found in sources:
        for path, place in found.places.items():
            value = place.to_ours(_cast(tensors, path, place, dtype, report["overflowed"]))
            report["parameters"] += value.size
            for name in place.names:
                report["read"].append(name)
                if place.turned:
                    report["transposed"].append(name)
                if tensors.dtype(name) != value.dtype.name:
                    report["cast"][f"{tensors.dtype(name)} to {value.dtype.name}"].append(name)
            bar.update()
            yield path, value
            del value  # before the next one is made


def _cast(tensors, path, place, dtype, overflowed):
    """:func:`values` in that type, or each in its own; counts those that became infinite, by name."""
    for name, value in zip(place.names, values(tensors, path, place), strict=True):
        value, count = cast(value, dtype)
        if count:
            overflowed[name] = count
        yield value


def _save_tokenizer(source, folder):
    """Saves the source's tokenizer, if it has one that can be read; otherwise says what is wrong with it."""
    file = gguf_file(source)
    source = source if source.is_dir() else source.parent
    if file is None and not any((source / name).is_file() for name in FILES):
        return "its files are not there"
    try:
        tokenizer = read_tokenizer(source) if file is None else read_gguf_tokenizer(file)
    except Exception as error:  # whatever a foreign tokenizer's files raise, it can be given another way
        return f"reading it fails: {str(error).strip().splitlines()[0] if str(error) else type(error).__name__}"
    save_tokenizer(tokenizer, source, folder)
    return ""
