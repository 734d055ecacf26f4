"""Imports foreign checkpoints: reads tensor by tensor, writes parameter by parameter, runs none of their code."""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm
from etils import epath

from stf_jax.checkpointing.params import write_params
from stf_jax.config import UserError
from stf_jax.data.tokenizer import FILES, read_tokenizer, save_tokenizer
from stf_jax.files import local_copy, read_json
from stf_jax.models.towers.base import VisionConfig
from stf_jax.registry import refuse_code_in
from stf_jax.weights.detect import DetectedModel
from stf_jax.weights.folder import new_folder
from stf_jax.weights.foreign import detect_or_raise, find_gguf, open_checkpoint, read_tensors
from stf_jax.weights.gguf_tokenizer import read_gguf_tokenizer
from stf_jax.weights.mapping import TensorMapping
from stf_jax.weights.model import describe_checkpoint
from stf_jax.weights.peft import apply_adapter, is_adapter
from stf_jax.weights.tensors import TensorFile, cast, format_overflow


def import_weights(
    source: str, to: epath.Path, vision: str = "", dtype: str = "", families: Sequence[str] = (), base: str = ""
) -> dict[str, Any]:
    """Writes a folder for ``config.init_from``, ``config.model.vision`` and ``config.model.llm``.

    It holds ``params/`` (Orbax), ``model.json``, ``tokenizer/`` if the source has one, and the report,
    ``import.json``. It appears when it is complete.

    Args:
      source: a folder or file in any layout that weights/detect.py supports.
      to: the folder to write; it must not exist.
      vision: another source, whose vision tower replaces the source's own.
      dtype: the type to cast values to; empty: each keeps its own.
      families: ``package.module:FAMILY`` of a tower or a language model, besides the package's own.
      base: the model that ``source`` adapts, if that is a LoRA adapter in PEFT's files, which is merged into it.

    Returns:
      The report: count of ``parameters``; names of tensors ``read``, ``transposed``, ``cast`` (by types) and ``unused``
      (with reasons); number of values that ``overflowed`` to infinity when cast, by tensor; ``missing`` parts of the
      model; ``notes``; the ``model``.

    Raises:
      UserError: a source cannot be read or used (the message names it and the tensor); ``to`` exists.
    """
    with new_folder(to) as folder:
        return _import(source, folder, vision, dtype, families, base)


def _import(
    source: str, folder: pathlib.Path, vision: str, dtype: str, families: Sequence[str], base: str
) -> dict[str, Any]:
    tower: VisionConfig | None = None
    sources: list[tuple[TensorFile, DetectedModel]] = []
    if vision:
        tensors, config = open_checkpoint(vision)
        detected = detect_or_raise(vision, tensors, config, families=families)
        if detected.vision is None:
            raise UserError(f"--vision={vision} holds no vision tower.")
        tower = detected.vision
        sources.append((tensors, _select(detected, "vision/")))
    tensors, config = _open_adapter(source, base) if base else open_checkpoint(source)
    main = detect_or_raise(source, tensors, config, tower, families)
    sources.append((tensors, main))
    description = describe_checkpoint(dataclasses.replace(main, vision=main.vision or tower), config)

    missing = [part for part in ("vision", "fusion", "llm") if getattr(description, part) is None]
    report: dict[str, Any] = {
        "parameters": 0,
        "read": [],
        "transposed": [],
        "cast": collections.defaultdict(list),
        "missing": missing,
    }
    report["overflowed"] = {}
    count = sum(len(detected.mappings) for _, detected in sources)
    with tqdm.tqdm(total=count, desc="import", unit="parameter") as bar:
        write_params(folder, _read_params(sources, dtype, report, bar))
    description.save(folder)
    report |= {
        "unused": {name: reason for _, detected in sources for name, reason in detected.unused.items()},
        "notes": [note for _, detected in sources for note in detected.notes],
        "model": dataclasses.asdict(description),
    }
    if main.llm is not None and (problem := _save_tokenizer(local_copy(base or source), folder / "tokenizer")):
        report["notes"].append(f"No tokenizer was imported ({problem}); set config.data.tokenizer.")
    (folder / "import.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def _open_adapter(source: str, base: str) -> tuple[TensorFile, dict[str, Any]]:
    """The tensors of a base with an adapter merged into them, and its config with what the adapter's folder changes."""
    adapter = local_copy(source)
    if not is_adapter(adapter):
        raise UserError(f"--base={base} is for a LoRA adapter, but {source} holds no adapter_model file.")
    tensors, config = open_checkpoint(base)
    refuse_code_in(base, config)
    changes = read_json(epath.Path(adapter, "config.json")) if (adapter / "config.json").exists() else {}
    return apply_adapter(tensors, adapter), config | changes


def summarize(report: Mapping[str, Any], to: epath.Path) -> str:
    """Formats the report of :func:`import_weights` for the terminal."""
    model = report["model"]
    parts = [part for part in ("vision", "fusion", "llm") if model[part] is not None]
    lines = [
        f"{len(report['read'])} tensors, {report['parameters']:,} parameters of {', '.join(parts)}: {to}",
        f"{len(report['transposed'])} transposed; cast: "
        + (", ".join(f"{len(names)} from {types}" for types, names in report["cast"].items()) or "none"),
    ]
    reasons = collections.Counter(report["unused"].values())
    lines += [f"{count} unused: {reason}" for reason, count in reasons.items()]
    lines += report["notes"] + format_overflow(report["overflowed"])
    return "\n".join([*lines, f"Every name is in {to / 'import.json'}."])


def _select(detected: DetectedModel, root: str) -> DetectedModel:
    """Keeps only the parameters whose path begins with ``root``."""
    mappings = {path: mapping for path, mapping in detected.mappings.items() if path.startswith(root)}
    return dataclasses.replace(detected, mappings=mappings)


def _read_params(
    sources: Iterable[tuple[TensorFile, DetectedModel]], dtype: str, report: dict[str, Any], bar: tqdm.tqdm
) -> Iterator[tuple[str, np.ndarray]]:
    for tensors, detected in sources:
        for path, mapping in detected.mappings.items():
            value = mapping.from_hf(_read_cast(tensors, path, mapping, dtype, report["overflowed"]))
            report["parameters"] += value.size
            for name in mapping.names:
                report["read"].append(name)
                if mapping.transposed:
                    report["transposed"].append(name)
                if tensors.dtype(name) != value.dtype.name:
                    report["cast"][f"{tensors.dtype(name)} to {value.dtype.name}"].append(name)
            bar.update()
            yield path, value
            del value  # frees it before the next one is read


def _read_cast(
    tensors: TensorFile, path: str, mapping: TensorMapping, dtype: str, overflowed: dict[str, int]
) -> Iterator[np.ndarray]:
    """Yields the tensors of a parameter, cast to ``dtype`` if given; counts values that overflow, by name."""
    for name, value in zip(mapping.names, read_tensors(tensors, path, mapping), strict=True):
        value, count = cast(value, dtype)
        if count:
            overflowed[name] = count
        yield value


def _save_tokenizer(source: pathlib.Path, folder: pathlib.Path) -> str:
    """Saves the source's tokenizer if it can be read; returns the problem otherwise, and an empty string on success."""
    file = find_gguf(source)
    source = source if source.is_dir() else source.parent
    if file is None and not any((source / name).is_file() for name in FILES):
        return "there are no tokenizer files"
    try:
        tokenizer = read_tokenizer(source) if file is None else read_gguf_tokenizer(file)
    except Exception as error:  # foreign files may raise anything, and the tokenizer can be set in the config
        return f"reading it fails: {str(error).strip().splitlines()[0] if str(error) else type(error).__name__}"
    save_tokenizer(tokenizer, source, folder)
    return ""
