"""Which files of a folder are its weights: those that transformers 5 would load, and a clear refusal without any."""

import os
import pathlib
import re
from typing import NamedTuple

from stf_jax.config import UserError
from stf_jax.runtime.files import parse_json

# transformers' order (modeling_utils._get_resolved_checkpoint_files). Of a pair, the single file comes first.
_ORDER = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_SUFFIXES = (".safetensors", ".bin", ".gguf")
_BESIDE = ("consolidated", "adapter_", "training_args", "optimizer", "scheduler", "mmproj")  # never a model's weights
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)(\.\w+)")
_MOST = 10_000  # shards
_POINTER = b"version https://git-lfs"
_MERGE = "merge it into its base model first (peft: merge_and_unload, then save_pretrained), and import the result"
# Files that hold weights in a form that is not read, and what to do. The first that is there is named.
_UNREAD = (
    ("adapter_config.json", f"a LoRA adapter, not a whole model: {_MERGE}"),
    ("adapter_model.*", f"a LoRA adapter, not a whole model: {_MERGE}"),
    (
        "consolidated*",
        "weights under the names of Mistral's or Meta's own code: fetch the same model's model*.safetensors",
    ),
    ("flax_model*.msgpack", "weights for Flax: fetch the same model's model*.safetensors"),
    ("tf_model*.h5", "weights for TensorFlow: fetch the same model's model*.safetensors"),
    ("*.onnx", "weights for ONNX: fetch the same model's model*.safetensors"),
    ("*.pt", "a pickle of torch's: save it with transformers' save_pretrained"),
    ("*.pth", "a pickle of torch's: save it with transformers' save_pretrained"),
)


class Located(NamedTuple):
    """The files of a checkpoint, all of one suffix.

    Attributes:
      files: in the order of their names.
      index: that named them; None where none did.
      notes: what a user should know of the choice.
    """

    files: tuple[pathlib.Path, ...]
    index: pathlib.Path | None
    notes: tuple[str, ...]


def locate_weights(source: pathlib.Path, named: str | None = None) -> Located:
    """Decides which files are read; nothing else in the folder is opened.

    These are, of a folder, the first of: what its config names; ``model.safetensors``; the shards of
    ``model.safetensors.index.json``; ``pytorch_model.bin``; the shards of its index. transformers refuses a folder with
    none of them; here its one other index counts, then all ``*.safetensors``, then its one ``*.gguf``, then all
    ``*.bin``.

    Args:
      source: a folder, or one file of weights.
      named: the ``transformers_weights`` of the config.

    Raises:
      UserError: no weights, or weights of a kind that is not read; a shard that is missing; a link to nothing, a folder
        or a Git LFS pointer in place of a file.
    """
    if not source.is_dir():
        check_file(source)
        if source.suffix not in _SUFFIXES:
            raise UserError(f"{source} is neither *.safetensors, *.bin nor *.gguf.")
        return Located((source,), None, ())
    located = _listed(source, named) or _unlisted(source)
    for file in located.files:
        check_file(file)
    return located


def check_file(file: pathlib.Path) -> None:
    """Raises UserError for what stands in place of a file: nothing, a link to nothing, a folder, a Git LFS pointer."""
    if file.is_symlink() and not file.exists():
        raise UserError(
            f"{file} is a link to {os.readlink(file)}, which does not exist: copy the folder with its links followed "
            "(cp -rL), or fetch the file again."
        )
    if file.is_dir():
        raise UserError(f"{file} is a folder where a file is expected: fetch the file again.")
    if not file.is_file():
        raise UserError(f"{file} does not exist.")
    with file.open("rb") as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            raise UserError(f"{file} is a Git LFS pointer: fetch the file itself with git lfs pull.")


def _listed(folder, named):
    """The files under transformers' names; None where there are none."""
    order = _ORDER
    if named is not None:
        if not isinstance(named, str) or not named.endswith((".safetensors", ".safetensors.index.json")):
            raise UserError(f"config.json names {named!r} as its transformers_weights, which is no safetensors file.")
        _check_inside(folder / "config.json", named)
        check_file(folder / named)
        order = (named,)
    chosen = next((name for name in order if (folder / name).is_file()), None)
    if chosen is None:
        return None
    notes = [
        f"{name} in that folder cannot be read as a file; {chosen} is read instead."
        for name in order[: order.index(chosen)]
        if os.path.lexists(folder / name)
    ]
    other = f"{chosen}.index.json"
    if (folder / other).is_file():
        notes.append(f"{chosen} is read, as transformers does, and not the shards of {other} beside it.")
    if (folder / "adapter_config.json").exists():
        notes.append("The adapter beside the model (adapter_config.json) is not applied.")
    if chosen.endswith(".index.json"):
        return Located(_shards(folder / chosen), folder / chosen, tuple(notes))
    return Located((folder / chosen,), None, tuple(notes))


def _unlisted(folder):
    """The files under other names."""
    for name in _ORDER:
        if os.path.lexists(folder / name):  # but is no file
            check_file(folder / name)
    if any(folder.glob("adapter_*")):
        raise UserError(_why_unread(folder))
    indexes = _weights(folder, "*.safetensors.index.json")
    if len(indexes) > 1:
        raise UserError(f"{folder} has several indexes ({_names(indexes)}): keep the one whose shards are wanted.")
    if indexes:
        return Located(_shards(indexes[0]), indexes[0], ())
    if files := _weights(folder, "*.safetensors"):
        return Located(_complete(files), None, ())
    if files := _weights(folder, "*.gguf"):
        if len(files) > 1:
            raise UserError(f"{folder} holds {len(files)} GGUF files; name the one to import.")
        return Located(files, None, ())
    if files := _weights(folder, "*.bin"):
        return Located(_complete(files), None, ())
    raise UserError(_why_unread(folder))


def _weights(folder, pattern):
    return tuple(sorted(file for file in folder.glob(pattern) if not file.name.startswith(_BESIDE)))


def _complete(files):
    """The same files. Raises UserError where one of numbered shards, which no index names, is missing."""
    for file in files:
        if numbered := _SHARD.fullmatch(file.name):
            stem, _, count, suffix = numbered.groups()
            for number in range(1, min(int(count), _MOST) + 1):
                shard = file.with_name(f"{stem}-{number:0{len(count)}}-of-{count}{suffix}")
                if not os.path.lexists(shard):
                    raise UserError(f"{shard} is missing, beside {file.name}: fetch it.")
    return files


def _names(files):
    return ", ".join(file.name for file in files)


def _why_unread(folder):
    for pattern, why in _UNREAD:
        if files := sorted(folder.glob(pattern)):
            return f"{folder} holds {files[0].name}, {why}."
    inside = sorted(
        {file.parent for glob in ("*/*", "snapshots/*/*") for file in folder.glob(glob) if _is_weights(file)}
    )
    if inside:
        return f"{folder} holds no weights, but its folder {inside[0].relative_to(folder)} does: give {inside[0]}."
    return f"{folder} holds no weights: neither *.safetensors, *.bin nor *.gguf."


def _is_weights(file):
    return file.suffix in _SUFFIXES and not file.name.startswith(_BESIDE)


def _shards(index):
    """The files that an index names, all of which are there."""
    names = sorted(set(weight_map(index).values()))
    for name in names:
        _check_inside(index, name)
        if not os.path.lexists(index.parent / name):
            raise UserError(f"{index} names {name}, which is missing.")
    suffixes = {pathlib.PurePath(name).suffix for name in names}
    if suffixes - {".safetensors", ".bin"} or len(suffixes) > 1:
        raise UserError(f"{index} names files other than *{pathlib.PurePath(index.stem).stem} shards: {names[0]}.")
    return tuple(index.parent / name for name in names)


def _check_inside(file, name):
    path = pathlib.PurePath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise UserError(f"{file} names {name!r}, which is not a file beside it.")


def weight_map(index: pathlib.Path) -> dict[str, str]:
    """Tensor → file, as an index says. Raises UserError where it is none."""
    try:
        named = parse_json(index.read_bytes())["weight_map"]
        if named and all(isinstance(file, str) for file in named.values()):
            return named
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{index} is not an index of weights; fetch it again.")
