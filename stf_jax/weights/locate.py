"""Finds the weight files of a folder: those that transformers 5 would load, or a clear error if there are none."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Iterable

from stf_jax.config import UserError, shorten
from stf_jax.files import parse_json

# transformers' order (modeling_utils._get_resolved_checkpoint_files): a single file comes before an index.
_ORDER = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_SUFFIXES = (".safetensors", ".bin", ".gguf")
# Beginnings of the names of files that never hold the weights of a model.
_NOT_WEIGHTS = ("consolidated", "adapter_", "training_args", "optimizer", "scheduler", "mmproj")
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)(\.\w+)")
_MAX_SHARDS = 10_000
_POINTER = b"version https://git-lfs"
_ADAPTER = "a LoRA adapter, not a complete model: import it with its base"
# Files with weights in unsupported formats, and what to do. Errors name the first one that exists.
_UNSUPPORTED = (
    ("adapter_config.json", _ADAPTER),
    ("adapter_model.*", _ADAPTER),
    (
        "consolidated*",
        "weights under the names of Mistral's or Meta's own code: download the model's model*.safetensors",
    ),
    ("flax_model*.msgpack", "weights for Flax: download the model's model*.safetensors"),
    ("tf_model*.h5", "weights for TensorFlow: download the model's model*.safetensors"),
    ("*.onnx", "weights for ONNX: download the model's model*.safetensors"),
    ("*.pt", "a torch pickle: save it with transformers' save_pretrained"),
    ("*.pth", "a torch pickle: save it with transformers' save_pretrained"),
)


@dataclasses.dataclass(frozen=True)
class LocatedWeights:
    """The weight files of a checkpoint, all with the same suffix.

    Attributes:
      files: the files, sorted by name.
      index: the index that lists them, or None.
      notes: remarks for the user on the choice.
    """

    files: tuple[pathlib.Path, ...]
    index: pathlib.Path | None
    notes: tuple[str, ...]


def locate_weights(source: pathlib.Path, weights_name: str | None = None) -> LocatedWeights:
    """Chooses the weight files to read. No other file of the folder is opened.

    In a folder, this is the first of: the file that its config names; ``model.safetensors``; the shards of
    ``model.safetensors.index.json``; ``pytorch_model.bin``; the shards of its index. transformers refuses a folder with
    none of them; this function then tries a single other index, all ``*.safetensors``, a single ``*.gguf``, and all
    ``*.bin``.

    Args:
      source: a folder, or a single weight file.
      weights_name: the ``transformers_weights`` of the config.

    Raises:
      UserError: there are no weights, or only in an unsupported format; a shard is missing; a file is a dangling link,
        a folder or a Git LFS pointer.
    """
    if not source.is_dir():
        check_file(source)
        if source.suffix not in _SUFFIXES:
            raise UserError(f"{source} is neither *.safetensors, *.bin nor *.gguf.")
        return LocatedWeights((source,), None, ())
    located = _find_standard(source, weights_name) or _find_other(source)
    for file in located.files:
        check_file(file)
    return located


def check_file(file: pathlib.Path) -> None:
    """Raises UserError if a file is missing, a dangling link, a folder or a Git LFS pointer."""
    if file.is_symlink() and not file.exists():
        raise UserError(
            f"{file} is a link to {os.readlink(file)}, which does not exist: copy the folder with its links resolved "
            "(cp -rL), or download the file again."
        )
    if file.is_dir():
        raise UserError(f"{file} is a folder where a file is expected: download the file again.")
    if not file.is_file():
        raise UserError(f"{file} does not exist.")
    with file.open("rb") as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            raise UserError(f"{file} is a Git LFS pointer: download the file itself with git lfs pull.")


def _find_standard(folder: pathlib.Path, weights_name: str | None) -> LocatedWeights | None:
    """Returns the files under transformers' standard names; None if there are none."""
    order: tuple[str, ...] = _ORDER
    if weights_name is not None:
        if not isinstance(weights_name, str) or not weights_name.endswith((".safetensors", ".safetensors.index.json")):
            raise UserError(
                f"config.json sets transformers_weights to {weights_name!r}, which is not a safetensors file."
            )
        _check_relative(folder / "config.json", weights_name)
        check_file(folder / weights_name)
        order = (weights_name,)
    chosen = next((name for name in order if (folder / name).is_file()), None)
    if chosen is None:
        return None
    notes = [
        f"{name} in that folder is not a readable file; {chosen} is read instead."
        for name in order[: order.index(chosen)]
        if os.path.lexists(folder / name)
    ]
    other = f"{chosen}.index.json"
    if (folder / other).is_file():
        notes.append(f"{chosen} is read, as in transformers, and not the shards of {other}.")
    if (folder / "adapter_config.json").exists():
        notes.append("The adapter in the model's folder (adapter_config.json) is not applied.")
    if chosen.endswith(".index.json"):
        return LocatedWeights(_list_shards(folder / chosen), folder / chosen, tuple(notes))
    return LocatedWeights((folder / chosen,), None, tuple(notes))


def _find_other(folder: pathlib.Path) -> LocatedWeights:
    """Returns weight files under other names. Raises UserError if there are none."""
    for name in _ORDER:
        if os.path.lexists(folder / name):  # but is not a file
            check_file(folder / name)
    if any(folder.glob("adapter_*")):
        raise UserError(_explain_no_weights(folder))
    indexes = _glob_weights(folder, "*.safetensors.index.json")
    if len(indexes) > 1:
        raise UserError(f"{folder} has several indexes ({_join_names(indexes)}): keep the one whose shards to import.")
    if indexes:
        return LocatedWeights(_list_shards(indexes[0]), indexes[0], ())
    if files := _glob_weights(folder, "*.safetensors"):
        return LocatedWeights(_check_series(files), None, ())
    if files := _glob_weights(folder, "*.gguf"):
        if len(files) > 1:
            raise UserError(f"{folder} holds {len(files)} GGUF files; give the path of the one to import.")
        return LocatedWeights(files, None, ())
    if files := _glob_weights(folder, "*.bin"):
        return LocatedWeights(_check_series(files), None, ())
    raise UserError(_explain_no_weights(folder))


def _glob_weights(folder: pathlib.Path, pattern: str) -> tuple[pathlib.Path, ...]:
    return tuple(sorted(file for file in folder.glob(pattern) if not file.name.startswith(_NOT_WEIGHTS)))


def _check_series(files: tuple[pathlib.Path, ...]) -> tuple[pathlib.Path, ...]:
    """Returns the same files. Raises UserError if one of a numbered series of shards is missing."""
    for file in files:
        if numbered := _SHARD.fullmatch(file.name):
            stem, _, count, suffix = numbered.groups()
            for number in range(1, min(int(count), _MAX_SHARDS) + 1):
                shard = file.with_name(f"{stem}-{number:0{len(count)}}-of-{count}{suffix}")
                if not os.path.lexists(shard):
                    raise UserError(f"{shard} is missing, although {file.name} exists: download it.")
    return files


def _join_names(files: Iterable[pathlib.Path]) -> str:
    return ", ".join(file.name for file in files)


def _explain_no_weights(folder: pathlib.Path) -> str:
    for pattern, explanation in _UNSUPPORTED:
        if files := sorted(folder.glob(pattern)):
            end = f"{name_base(folder)} (convert import {folder} --base=DIR)" if explanation == _ADAPTER else ""
            return f"{folder} holds {files[0].name}, {explanation}{end}."
    subfolders = sorted(
        {file.parent for glob in ("*/*", "snapshots/*/*") for file in folder.glob(glob) if _is_weights(file)}
    )
    if subfolders:
        inner = subfolders[0]
        return f"{folder} holds no weights, but its folder {inner.relative_to(folder)} does: give {inner}."
    return f"{folder} holds no weights: neither *.safetensors, *.bin nor *.gguf."


def name_base(folder: pathlib.Path) -> str:
    """The base of an adapter as its config names it, to follow "its base"; empty if it names none."""
    try:
        name = parse_json((folder / "adapter_config.json").read_bytes())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return f", {shorten(name)}" if isinstance(name, str) and name else ""


def _is_weights(file: pathlib.Path) -> bool:
    return file.suffix in _SUFFIXES and not file.name.startswith(_NOT_WEIGHTS)


def _list_shards(index: pathlib.Path) -> tuple[pathlib.Path, ...]:
    """Returns the files that an index lists. Raises UserError if one is missing."""
    names = sorted(set(read_weight_map(index).values()))
    for name in names:
        _check_relative(index, name)
        if not os.path.lexists(index.parent / name):
            raise UserError(f"{index} names {name}, which is missing.")
    suffixes = {pathlib.PurePath(name).suffix for name in names}
    if suffixes - {".safetensors", ".bin"} or len(suffixes) > 1:
        raise UserError(f"{index} names files other than *{pathlib.PurePath(index.stem).stem} shards: {names[0]}.")
    return tuple(index.parent / name for name in names)


def _check_relative(file: pathlib.Path, name: str) -> None:
    path = pathlib.PurePath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise UserError(f"{file} names {name!r}, which is not a file in its folder.")


def read_weight_map(index: pathlib.Path) -> dict[str, str]:
    """Reads the map from tensor to file of an index. Raises UserError if the file is not an index."""
    try:
        weight_map = parse_json(index.read_bytes())["weight_map"]
        if weight_map and all(isinstance(file, str) for file in weight_map.values()):
            return weight_map
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{index} is not an index of weights; download it again.")
